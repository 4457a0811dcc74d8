"""Test-time augmentation: predictions on flipped and resized images, merged.

A segmentor's probabilities are averaged, a detector's boxes are merged by nms.
"""

import copy

from mmengine.config import Config, ConfigDict

from backbones.data.config_datasets import datasets_of, walk
from backbones.errors import ConfigError


def use_test_time_augmentation(config: Config) -> None:
    """Wrap the model of a config and replace its test pipeline.

    If the config has ``tta_model`` and ``tta_pipeline``, these are used. Otherwise the model is
    tested on each image and its mirror image. Raises ConfigError for models with masks.
    """
    if any(node.get('mask_head') for node in walk(config.model)):
        raise ConfigError('--tta: mmdet merges only boxes; test a model with masks without --tta')
    add_defaults(config)
    for dataset in datasets_of(config, ('test',)):
        dataset.pipeline = config.tta_pipeline
    config.model = ConfigDict(**config.tta_model, module=config.model)


def add_defaults(config: Config) -> None:
    """Add the default model and pipeline of mmdet's test tool, or similar ones for mmseg."""
    model, pack = {'type': 'SegTTAModel'}, {'type': 'PackSegInputs'}
    if config.default_scope == 'mmdet':
        merging = dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)
        model = {'type': 'DetTTAModel', 'tta_cfg': merging}
        pack = {'type': 'PackDetInputs'}
    config.setdefault('tta_model', ConfigDict(model))
    if 'tta_pipeline' in config:
        return
    pipeline = copy.deepcopy(next(datasets_of(config, ('test',))).pipeline)
    # mmseg uses the ground truth of the first image, which must not be flipped.
    flips = [{'type': 'RandomFlip', 'prob': prob} for prob in (0.0, 1.0)]
    augment = ConfigDict(type='TestTimeAug', transforms=[flips, [pack]])
    config.tta_pipeline = [*pipeline[:-1], augment]
