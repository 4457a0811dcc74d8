"""Test-time augmentation is refused for models with masks alone."""

import pytest
from mmengine.config import Config

from backbones.engine.tta import use_test_time_augmentation
from backbones.errors import ConfigError


def detector(**parts: object) -> Config:
    pipeline = [{'type': 'LoadImageFromFile'}, {'type': 'PackDetInputs'}]
    return Config(
        {
            'default_scope': 'mmdet',
            'model': {'type': 'FasterRCNN', **parts},
            'test_dataloader': {'dataset': {'type': 'CocoDataset', 'pipeline': pipeline}},
        }
    )


def test_masks_alone_cannot_be_merged():
    config = detector(roi_head={'type': 'StandardRoIHead', 'mask_head': None})
    use_test_time_augmentation(config)
    assert config.model.module.type == 'FasterRCNN'
    assert config.test_dataloader.dataset.pipeline[-1].type == 'TestTimeAug'
    for parts in ({'roi_head': {'mask_head': {'type': 'X'}}}, {'mask_head': {'type': 'X'}}):
        with pytest.raises(ConfigError, match='mask'):
            use_test_time_augmentation(detector(**parts))
