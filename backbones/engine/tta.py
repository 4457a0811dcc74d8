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

    The config's own ``tta_model`` and ``tta_pipeline`` are used if it has them. A detector without
    them is tested on each image and its mirror image.
    """
    if any(node.get('mask_head') for node in walk(config.model)):
        raise ConfigError('--tta: mmdet merges boxes only; test a model with masks without --tta')
    if config.default_scope == 'mmdet':
        add_detection_defaults(config)
    for key in ('tta_model', 'tta_pipeline'):
        if key not in config:
            raise ConfigError(f'--tta: the config has no {key}; see seg_configs/_base_ for one')
    for dataset in datasets_of(config, ('test',)):
        dataset.pipeline = config.tta_pipeline
    config.model = ConfigDict(**config.tta_model, module=config.model)


def add_detection_defaults(config: Config) -> None:
    """Give a detector's config the model and pipeline that mmdet's own tool defaults to."""
    merging = dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)
    config.setdefault('tta_model', ConfigDict(type='DetTTAModel', tta_cfg=merging))
    if 'tta_pipeline' in config:
        return
    pipeline = copy.deepcopy(next(datasets_of(config, ('test',))).pipeline)
    flips = [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)]
    pack = [dict(type='PackDetInputs', meta_keys=DETECTION_META_KEYS)]
    augment = ConfigDict(type='TestTimeAug', transforms=[flips, pack])
    config.tta_pipeline = [*pipeline[:-1], augment]
