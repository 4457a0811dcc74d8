"""The network. It needs torch, mmengine and mmcv.cnn, and nothing else of this package."""

from .backbone import ARCHITECTURES, EfficientFormerV2

__all__ = ['ARCHITECTURES', 'EfficientFormerV2']
