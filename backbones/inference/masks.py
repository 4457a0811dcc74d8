"""Masks of instances, each stored as the part of the image that it covers."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import cv2
import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor, nn


@dataclass(frozen=True)
class CroppedMask:
    """The mask of one instance, cropped: a hundred as large as the image may not fit in memory."""

    # Column and row of the image at which the pixels begin.
    x: int
    y: int
    # (height, width), bool, inside the image; either may be 0.
    pixels: np.ndarray

    @cached_property
    def shape(self) -> tuple[int, int]:
        return self.pixels.shape


class CompressedMask(CroppedMask):
    """A :class:`CroppedMask`, compressed to a hundredth; each access decompresses the pixels."""

    def __init__(self, mask: CroppedMask) -> None:
        # All but the pixels, which are computed.
        vars(self).update(x=mask.x, y=mask.y, shape=mask.shape)
        self._bits = zlib.compress(np.packbits(mask.pixels), level=1)

    @property
    def pixels(self) -> np.ndarray:
        bits = np.frombuffer(zlib.decompress(self._bits), np.uint8)
        return np.unpackbits(bits, count=np.prod(self.shape)).reshape(self.shape).view(bool)


def keep_masks_small(model: nn.Module) -> None:
    """Make a detector's mask heads return probabilities, float, at the head's own size, in place.

    mmdet pastes every mask into an array as large as the image, which takes most of the time and
    memory of a large image; later, :func:`paste_masks` computes only the pixels inside the boxes.
    """
    from mmdet.models.roi_heads.mask_heads import FCNMaskHead

    for module in model.modules():
        if isinstance(module, FCNMaskHead):
            module._predict_by_feat_single = partial(_probabilities, module.class_agnostic)


def _probabilities(
    class_agnostic: bool,
    mask_preds: Tensor,
    bboxes: Tensor,
    labels: Tensor,
    img_meta: dict,
    rcnn_test_cfg: dict,
    rescale: bool = False,
    activate_map: bool = False,
) -> Tensor:
    """Replace a mask head's ``_predict_by_feat_single``; the other arguments are its own."""
    if rescale:
        bboxes /= bboxes.new_tensor(img_meta['scale_factor']).repeat((1, 2))
    probabilities = mask_preds if activate_map else mask_preds.sigmoid()
    rows = torch.arange(len(labels), device=labels.device)
    return probabilities[rows, 0 if class_agnostic else labels]


def paste_masks(
    probabilities: np.ndarray, boxes: np.ndarray, size: tuple[int, int], threshold: float
) -> list[CroppedMask]:
    """Compute masks from probabilities in their boxes (He et al., "Mask R-CNN", section 3.1).

    Bilinear between the centers of the cells, 0 outside; the pixels equal mmdet's.
    ``probabilities`` are (N, cells, cells), ``boxes`` (N, 4) in pixels, ``size`` height and width.
    """
    masks = []
    for cells, (left, top, right, bottom) in zip(probabilities, boxes, strict=True):
        y, rows = _interpolation(top, bottom, size[0], len(cells))
        x, columns = _interpolation(left, right, size[1], len(cells))
        masks.append(CroppedMask(x, y, rows @ cells @ columns.T >= threshold))
    return masks


def crop_masks(masks: np.ndarray) -> list[CroppedMask]:
    """Crop masks as large as the image, (N, height, width), each to its own extent."""
    cropped = []
    # Not to the boxes: SOLO and SOLOv2 predict zeros for these.
    for mask in np.asarray(masks, bool):
        x, y, width, height = cv2.boundingRect(mask.view(np.uint8))
        cropped.append(CroppedMask(x, y, mask[y : y + height, x : x + width].copy()))
    return cropped


def extents_of(masks: Sequence[CroppedMask]) -> np.ndarray:
    """Return (N, 4): left, top, right and bottom of the pixels of each mask."""
    starts = np.array([(mask.x, mask.y) for mask in masks], np.int64).reshape(-1, 2)
    sizes = np.array([mask.shape[::-1] for mask in masks], np.int64).reshape(-1, 2)
    return np.hstack([starts, starts + sizes])


def fill_empty_boxes(boxes: np.ndarray, masks: Sequence[CroppedMask]) -> np.ndarray:
    """Return boxes, (N, 4); a box without an area becomes the extent of its mask."""
    is_empty = (boxes[:, 2:] <= boxes[:, :2]).any(axis=1, keepdims=True)
    return np.where(is_empty, extents_of(masks), boxes).astype(boxes.dtype)


def encode_mask(mask: CroppedMask, size: tuple[int, int]) -> dict:
    """Encode a mask by COCO's run-length encoding, without an array as large as the image."""
    height, width = size
    # Runs go down the columns; zeros around the mask give every run a beginning and an end.
    change = np.diff(np.pad(mask.pixels.T, ((0, 0), (1, 1))).view(np.int8), axis=1)
    starts, ends = (
        (mask.x + column) * height + mask.y + row
        for column, row in (np.nonzero(change == step) for step in (1, -1))
    )
    # A run that ends with a column and one that begins with the next are one run.
    starts, ends = np.setdiff1d(starts, ends), np.setdiff1d(ends, starts)
    edges = np.concatenate([[0], np.stack([starts, ends], 1).ravel(), [height * width]])
    counts = np.diff(edges).tolist()
    counts = counts[:-1] if counts[-1] == 0 else counts
    encoded = coco_mask.frPyObjects({'size': [height, width], 'counts': counts}, height, width)
    return {'size': [height, width], 'counts': encoded['counts'].decode()}


def _interpolation(low: float, high: float, limit: int, cells: int) -> tuple[int, np.ndarray]:
    """Return the first pixel along a side of a box, and the (pixels, cells) weights of cells."""
    first = int(np.clip(np.floor(low) - 1, 0, limit))
    last = int(np.clip(np.ceil(high) + 1, first, limit))
    extent = max(float(high) - float(low), 1e-6)
    centers = (np.arange(first, last) + 0.5 - float(low)) / extent * cells - 0.5
    weights = 1 - np.abs(centers[:, None] - np.arange(cells))
    return first, np.maximum(weights, 0).astype(np.float32)
