"""Anchors, box decoding and selection with shapes that do not depend on values."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops import suppress


def grid_anchors(base_anchors: Tensor, stride: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The anchors of one level, as mmdet's AnchorGenerator lays them out.

    Args:
        base_anchors: (A, 4), those of the first cell.
        stride: Pixels from a cell to the next, (x, y).
        grid: Height and width of the level's map.

    Returns:
        (height * width * A, 4), anchors of a cell next to each other, cells in row-major order.
    """
    x = torch.arange(grid[1], device=base_anchors.device).to(base_anchors) * stride[0]
    y = torch.arange(grid[0], device=base_anchors.device).to(base_anchors) * stride[1]
    left, top = x.expand(grid[0], grid[1]), y[:, None].expand(grid[0], grid[1])
    shifts = torch.stack([left, top, left, top], dim=-1)
    return (shifts[:, :, None] + base_anchors).reshape(-1, 4)


def decode_boxes(coder: object, anchors: Tensor, deltas: Tensor, height: int, width: int) -> Tensor:
    """Boxes from anchors and a network's deltas, as mmdet's DeltaXYWHBBoxCoder decodes them.

    Args:
        coder: A DeltaXYWHBBoxCoder.
        anchors: (..., 4).
        deltas: (..., 4).
        height: Of the picture, to which boxes are clipped.
        width: Of the picture.

    Returns:
        (..., 4), left, top, right, bottom.
    """
    deltas = deltas * deltas.new_tensor(coder.stds) + deltas.new_tensor(coder.means)
    size = anchors[..., 2:] - anchors[..., :2]
    centre = (anchors[..., :2] + anchors[..., 2:]) * 0.5
    # The limit of Fast R-CNN and all that followed: a box grows by 1000 / 16 at most.
    limit = abs(math.log(16 / 1000))
    centre = centre + size * deltas[..., :2]
    half = size * deltas[..., 2:].clamp(-limit, limit).exp() * 0.5
    left, top = (centre - half).unbind(-1)
    right, bottom = (centre + half).unbind(-1)
    if coder.clip_border:
        left, right = left.clamp(0, width), right.clamp(0, width)
        top, bottom = top.clamp(0, height), bottom.clamp(0, height)
    return torch.stack([left, top, right, bottom], dim=-1)


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest scores of each picture and where they are.

    Args:
        scores: (batch, N), at least 0; N may be a size that is known only while running.
        k: A constant, as what runs exported files wants it.

    Returns:
        Scores (batch, k), in falling order, and indices (batch, k); where there are fewer, the
        score is 0 and the index that of any.
    """
    count = scores.shape[1]
    if not isinstance(count, int):
        scores = F.pad(scores, (0, k))
    elif count < k:
        scores = F.pad(scores, (0, k - count))
    best, index = scores.topk(k, dim=1)
    return best, index.clamp(max=count - 1)


def take_rows(values: Tensor, index: Tensor) -> Tensor:
    """Rows of each picture: (batch, N, D) and (batch, k) to (batch, k, D)."""
    return values.gather(1, index[:, :, None].expand(-1, -1, values.shape[2]))


def suppress_by_group(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor,
    nms: dict,
    score_threshold: float,
    max_per_picture: int,
) -> tuple[Tensor, Tensor]:
    """Suppression of boxes by those of their own group (class, or pyramid level).

    Args:
        boxes: (batch, N, 4).
        scores: (batch, N).
        groups: (batch, N), int64.
        nms: mmcv's ``nms`` settings.
        score_threshold: Boxes that are not surer are dropped; at least 0.
        max_per_picture: How many stay at most.

    Returns:
        Scores (batch, max_per_picture), in falling order and 0 where there are no more, and the
        indices of their boxes.
    """
    shifted = boxes
    if not nms.get('class_agnostic', False):
        # As in mmcv: groups are moved so far apart that none overlap.
        apart = boxes.flatten().max() + 1
        shifted = boxes + (groups * apart)[:, :, None]
    iou_threshold = nms.get('iou_threshold', nms.get('iou_thr'))
    kept = suppress(shifted, scores, iou_threshold, score_threshold, max_per_picture)
    return top_k(kept, max_per_picture)
