"""What a model says about one picture."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class CroppedMask:
    """The mask of one instance: the part of the picture inside its box.

    A whole picture for each of a hundred instances would not fit into memory at 20,000 pixels a
    side, and takes most of the time of drawing at any size.

    Attributes:
        x: Column of the picture at which ``pixels`` begins.
        y: Row of the picture at which ``pixels`` begins.
        pixels: (height, width), bool, inside the picture; either may be 0.
    """

    x: int
    y: int
    pixels: np.ndarray


@dataclass(frozen=True)
class Detections:
    """Objects in a picture, the surest first.

    Attributes:
        boxes: (N, 4), float32: left, top, right, bottom in pixels of the picture.
        scores: (N,), float32, 0 to 1; None for ground truth.
        labels: (N,), int64, index into the model's class names.
        masks: For each object its mask, or None where the model has no masks.
    """

    boxes: np.ndarray
    scores: np.ndarray | None
    labels: np.ndarray
    masks: list[CroppedMask] | None = None

    def select(self, score_thr: float, labels: Sequence[int] | None) -> 'Detections':
        """Those with at least a score, and of some classes only (None: of all)."""
        kept = self.scores >= score_thr
        if labels is not None:
            kept &= np.isin(self.labels, labels)
        masks = self.masks
        if masks is not None:
            masks = [mask for mask, keep in zip(masks, kept, strict=True) if keep]
        return Detections(self.boxes[kept], self.scores[kept], self.labels[kept], masks)


@dataclass(frozen=True)
class Segmentation:
    """A class for every pixel of a picture.

    Attributes:
        label_map: (height, width), index into the model's class names; uint8, or uint16 for more
            than 255 classes. The largest value the type has stands for every class that was not
            asked for.
    """

    label_map: np.ndarray

    def select(self, labels: Sequence[int] | None) -> 'Segmentation':
        """Some classes only (None: all); every other pixel gets the largest value of the type."""
        if labels is None:
            return self
        unlabelled = np.iinfo(self.label_map.dtype).max
        return Segmentation(np.where(np.isin(self.label_map, labels), self.label_map, unlabelled))
