"""Predictions for pictures, videos, cameras and arrays."""

from backbones.errors import InputError

from .inferencer import Inferencer, Result
from .prediction import CroppedMask, Detections, Segmentation
from .reading import Clip

__all__ = [
    'Clip',
    'CroppedMask',
    'Detections',
    'Inferencer',
    'InputError',
    'Result',
    'Segmentation',
]
