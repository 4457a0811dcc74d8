"""EfficientFormerV2 for dense prediction. Importing this package registers the backbone."""

from .checkpoint import CheckpointError
from .efficientformer_v2 import ARCHITECTURES, EfficientFormerV2

__all__ = ['ARCHITECTURES', 'CheckpointError', 'EfficientFormerV2']
