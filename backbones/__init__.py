"""EfficientFormerV2 for dense prediction. Importing it registers the backbone and ``timm://``."""

from mmengine.runner.checkpoint import CheckpointLoader

from backbones.efficientformer_v2.backbone import ARCHITECTURES, EfficientFormerV2

from .errors import CheckpointError
from .weights import load_from_source, trust_checkpoints

__all__ = ['ARCHITECTURES', 'CheckpointError', 'EfficientFormerV2', 'trust_checkpoints']

CheckpointLoader.register_scheme('timm://', load_from_source, force=True)
