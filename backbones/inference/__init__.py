"""Predictions for images, videos, cameras and arrays."""

from backbones.errors import InputError

from .inferencer import Inferencer, Result
from .masks import CroppedMask
from .reading import Clip
from .results import Detections, Segmentation

__all__ = [
    'Clip',
    'CroppedMask',
    'Detections',
    'Inferencer',
    'InputError',
    'Result',
    'Segmentation',
]
