"""EfficientFormerV2 for dense prediction. Importing it registers the backbone.

It also makes mmengine read checkpoints safely and know ``timm://``, see :mod:`.weights`.
"""

from backbones.efficientformer_v2.backbone import ARCHITECTURES, EfficientFormerV2

from .errors import CheckpointError
from .weights import register_loaders, trust_checkpoints

__all__ = ['ARCHITECTURES', 'CheckpointError', 'EfficientFormerV2', 'trust_checkpoints']

register_loaders()
