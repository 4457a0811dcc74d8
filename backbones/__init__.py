"""EfficientFormerV2 for dense prediction. Importing it registers the backbone.

It also makes mmengine read checkpoints safely and know ``timm://``, see :mod:`.weights`.
"""

from .checkpoint import CheckpointError
from .checkpoint_file import trust_checkpoints
from .efficientformer_v2 import ARCHITECTURES, EfficientFormerV2
from .weights import register_loaders

__all__ = ['ARCHITECTURES', 'CheckpointError', 'EfficientFormerV2', 'trust_checkpoints']

register_loaders()
