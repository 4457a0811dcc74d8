"""A segmentor's logits become a class for every pixel, and those of few pixels are resized for it.

Between four neighboring logits, bilinear interpolation computes weighted means. Where the same
class is the highest in all four, it is the highest in every mean: the class is known. Only what
lies between logits of different classes, a tenth of a street scene, has to be interpolated. The
result is that of resizing all logits.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Cells(NamedTuple):
    """Along one axis, the cells between two logits, of which the outer ones lie at the border."""

    # (cells,): the logits on both sides.
    before: Tensor
    after: Tensor
    # (cells, steps): the weight of the logit after, at each pixel of a cell.
    weights: Tensor
    # (pixels,): where a pixel is, in cells of ``steps`` pixels.
    positions: Tensor


def segmentation_map(logits: Tensor, size: tuple[int, int], steps: int) -> Tensor:
    """The class with the highest logit after bilinear resizing, of equal ones the first.

    Args:
        logits: (batch, classes, height, width).
        size: Height and width to resize to, with ``align_corners=False``.
        steps: At least as many pixels as come to one logit, along each axis.

    Returns:
        int32 of shape (batch, *size).
    """
    classes, height, width = logits.shape[1:]
    rows, columns = cells_of(size[0], height, steps), cells_of(size[1], width, steps)
    labels = logits.argmax(dim=1).to(torch.int32)
    above, below = labels[:, rows.before], labels[:, rows.after]
    first = above[:, :, columns.before]
    others = above[:, :, columns.after], below[:, :, columns.before], below[:, :, columns.after]
    differ = (first != others[0]) | (first != others[1]) | (first != others[2])

    image, row, column = differ.nonzero().unbind(dim=1)
    pixels = logits.permute(0, 2, 3, 1).reshape(-1, classes)
    down = rows.weights[row][:, :, None]
    sides = []
    for index in (columns.before[column], columns.after[column]):
        top = pixels[(image * height + rows.before[row]) * width + index][:, None]
        bottom = pixels[(image * height + rows.after[row]) * width + index][:, None]
        sides.append((top + down * (bottom - top))[:, :, None])
    left, right = sides
    values = left + columns.weights[column][:, None, :, None] * (right - left)
    between = values.argmax(dim=-1).to(torch.int32)

    cells = first[..., None, None].repeat(1, 1, 1, steps, steps)
    cells = cells.index_put((image, row, column), between)
    cells = cells.permute(0, 1, 3, 2, 4).flatten(3, 4).flatten(1, 2)
    return cells[:, rows.positions][:, :, columns.positions]


def cells_of(pixels: int, logits: int, steps: int) -> Cells:
    """How pixels lie between logits.

    Pixel p is at (p + 1/2) * logits / pixels - 1/2, as in PyTorch's ``interpolate``; in integers,
    which stay exact where a file is run with half precision.
    """
    cell = torch.arange(logits + 1)
    first = ((2 * cell - 1) * pixels + logits - 1).clamp(min=0) // (2 * logits)
    inside = (2 * (first[:, None] + torch.arange(steps)) + 1) * logits + pixels
    inside = inside - 2 * pixels * cell[:, None]
    pixel = torch.arange(pixels)
    at = ((2 * pixel + 1) * logits + pixels) // (2 * pixels)
    return Cells(
        before=(cell - 1).clamp(min=0),
        after=cell.clamp(max=logits - 1),
        weights=inside.to(torch.float32) / (2 * pixels),
        positions=at * steps + pixel - first[at],
    )
