"""Test-time augmentation: predictions on flipped and resized images, merged.

Segmentors' are averaged, detectors' boxes put together by nms.
"""

import copy

from mmengine.config import Config, ConfigDict

from backbones.data.config_datasets import datasets_of, walk
from backbones.errors import ConfigError

DETECTION_META_KEYS = (
    *('img_id', 'img_path', 'ori_shape', 'img_shape'),
    *('scale_factor', 'flip', 'flip_direction'),
)


def use_test_time_augmentation(config: Config) -> None:
    """Wrap the model of a config and replace its test pipeline, or raise ConfigError.

    The config's own ``tta_model`` and ``tta_pipeline`` are used if it has them. A model without
    them is tested on each image and its mirror image.
    """
    if any(node.get('mask_head') for node in walk(config.model)):
        raise ConfigError('--tta: mmdet merges boxes only; test a model with masks without --tta')
    add_defaults(config)
    for dataset in datasets_of(config, ('test',)):
        dataset.pipeline = config.tta_pipeline
    config.model = ConfigDict(**config.tta_model, module=config.model)


def add_defaults(config: Config) -> None:
    """Give a config the model and pipeline that mmdet's own tool defaults to, or mmseg's alike."""
    model, pack = {'type': 'SegTTAModel'}, {'type': 'PackSegInputs'}
    if config.default_scope == 'mmdet':
        merging = dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)
        model = {'type': 'DetTTAModel', 'tta_cfg': merging}
        pack = {'type': 'PackDetInputs', 'meta_keys': DETECTION_META_KEYS}
    config.setdefault('tta_model', ConfigDict(model))
    if 'tta_pipeline' in config:
        return
    pipeline = copy.deepcopy(next(datasets_of(config, ('test',))).pipeline)
    # mmseg compares with the ground truth of the first, which is not flipped.
    flips = [{'type': 'RandomFlip', 'prob': prob} for prob in (0.0, 1.0)]
    augment = ConfigDict(type='TestTimeAug', transforms=[flips, [pack]])
    config.tta_pipeline = [*pipeline[:-1], augment]
