"""Masks of instances, kept as what lies inside their boxes."""

import numpy as np
import torch
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from pycocotools import mask as coco_mask
from torch import Tensor, nn

from .prediction import CroppedMask


def keep_masks_small(model: nn.Module) -> None:
    """Have Mask R-CNN's heads return mask probabilities at the head's own size.

    mmdet pastes every mask into a picture of its own, which is most of the time and memory that a
    large picture costs; :func:`paste_masks` does that for the boxes alone, and later.

    Args:
        model: A detector, changed in place. Boxes and scores stay what they are.
    """
    for module in model.modules():
        if isinstance(module, FCNMaskHead):
            module._predict_by_feat_single = _ProbabilitiesOf(module)


class _ProbabilitiesOf:
    """Stands in for a mask head's ``_predict_by_feat_single``, with its arguments."""

    def __init__(self, head: FCNMaskHead) -> None:
        self.class_agnostic = head.class_agnostic

    def __call__(
        self,
        mask_preds: Tensor,
        bboxes: Tensor,
        labels: Tensor,
        img_meta: dict,
        rcnn_test_cfg: dict,
        rescale: bool = False,
        activate_map: bool = False,
    ) -> Tensor:
        if rescale:
            bboxes /= bboxes.new_tensor(img_meta['scale_factor']).repeat((1, 2))
        probabilities = mask_preds if activate_map else mask_preds.sigmoid()
        rows = torch.arange(len(labels), device=labels.device)
        return probabilities[rows, 0 if self.class_agnostic else labels]


def paste_masks(
    probabilities: np.ndarray, boxes: np.ndarray, size: tuple[int, int], threshold: float
) -> list[CroppedMask]:
    """Masks of a picture from the probabilities inside their boxes (He et al., "Mask R-CNN", 3.1).

    Bilinear between the centres of the cells, 0 beyond them; the same pixels as mmdet's.

    Args:
        probabilities: (N, cells, cells), 0 to 1.
        boxes: (N, 4): left, top, right, bottom in pixels of the picture.
        size: Height and width of the picture.
        threshold: A pixel belongs to the instance from this probability on.
    """
    masks = []
    for cells, (left, top, right, bottom) in zip(probabilities, boxes, strict=True):
        y, rows = _interpolation(top, bottom, size[0], len(cells))
        x, columns = _interpolation(left, right, size[1], len(cells))
        masks.append(CroppedMask(x, y, rows @ cells @ columns.T >= threshold))
    return masks


def crop_masks(masks: np.ndarray, boxes: np.ndarray) -> list[CroppedMask]:
    """What lies inside the boxes of masks that have the size of the picture.

    Args:
        masks: (N, height, width), bool.
        boxes: (N, 4): left, top, right, bottom in pixels of the picture.
    """
    cropped = []
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        x, y = max(int(left) - 1, 0), max(int(top) - 1, 0)
        pixels = mask[y : max(int(np.ceil(bottom)) + 1, y), x : max(int(np.ceil(right)) + 1, x)]
        cropped.append(CroppedMask(x, y, pixels.astype(bool)))
    return cropped


def encode_mask(mask: CroppedMask, size: tuple[int, int]) -> dict:
    """A mask in COCO's run-length encoding, without ever making the whole picture.

    Args:
        mask: The mask.
        size: Height and width of the picture.

    Returns:
        ``{'size': [height, width], 'counts': str}``.
    """
    height, width = size
    # Runs go down the columns; a frame of zeros gives every run a beginning and an end.
    columns = np.pad(mask.pixels.T, ((0, 0), (1, 1))).astype(np.int8)
    change = np.diff(columns, axis=1)
    position = (mask.x + np.arange(len(change)))[:, None] * height + mask.y
    position = position + np.arange(change.shape[1])
    starts, ends = position[change == 1], position[change == -1]
    # Where a column's last pixel and the next column's first belong together, so do their runs.
    joined = np.isin(starts, ends)
    starts, ends = starts[~joined], ends[~np.isin(ends, position[change == 1])]
    edges = np.concatenate([[0], np.stack([starts, ends], 1).ravel(), [height * width]])
    counts = np.diff(edges).tolist()
    counts = counts[:-1] if counts[-1] == 0 else counts
    encoded = coco_mask.frPyObjects({'size': [height, width], 'counts': counts}, height, width)
    return {'size': [height, width], 'counts': encoded['counts'].decode()}


def _interpolation(low: float, high: float, limit: int, cells: int) -> tuple[int, np.ndarray]:
    """Weights of the cells along one side of a box, for the pixels that they reach.

    Returns:
        The first pixel, and (pixels, cells) weights.
    """
    first = int(np.clip(np.floor(low) - 1, 0, limit))
    last = int(np.clip(np.ceil(high) + 1, first, limit))
    extent = max(float(high) - float(low), 1e-6)
    centres = (np.arange(first, last) + 0.5 - float(low)) / extent * cells - 0.5
    weights = 1 - np.abs(centres[:, None] - np.arange(cells))
    return first, np.maximum(weights, 0).astype(np.float32)
