"""The network. It needs only torch, mmengine, mmcv.cnn and ``backbones.errors``."""

from .backbone import ARCHITECTURES, EfficientFormerV2

__all__ = ['ARCHITECTURES', 'EfficientFormerV2']
