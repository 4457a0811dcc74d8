"""The last step of an exported segmentor."""

import torch
from torch import Tensor

from backbones.inference.seg_maps import Cells, resized_argmax


def segmentation_map(logits: Tensor, size: tuple[int, int], steps: int) -> Tensor:
    """The class with the highest logit after bilinear resizing, of equal ones the first.

    Args:
        logits: (batch, classes, height, width).
        size: Height and width to resize to, with ``align_corners=False``.
        steps: At least as many pixels as come to one logit, along each axis.

    Returns:
        int32 of shape (batch, *size).
    """
    rows, columns = (
        cells_of(*lengths, steps) for lengths in zip(size, logits.shape[2:], strict=True)
    )
    return resized_argmax(logits, rows, columns, torch.int32)


def cells_of(pixels: int, logits: int, steps: int) -> Cells:
    """How pixels lie between logits.

    Pixel p is at (p + 1/2) * logits / pixels - 1/2, as in PyTorch's ``interpolate``; in integers,
    which stay exact where a file is run with half precision. Cells have a logit on both sides, the
    outer ones the same twice.
    """
    cell = torch.arange(logits + 1)
    first = ((2 * cell - 1) * pixels + logits - 1).clamp(min=0) // (2 * logits)
    inside = (2 * (first[:, None] + torch.arange(steps)) + 1) * logits + pixels
    after = (inside - 2 * pixels * cell[:, None]).to(torch.float32) / (2 * pixels)
    pixel = torch.arange(pixels)
    at = ((2 * pixel + 1) * logits + pixels) // (2 * pixels)
    return Cells(
        neighbors=torch.stack([(cell - 1).clamp(min=0), cell.clamp(max=logits - 1)], dim=1),
        weights=after[:, :, None],
        positions=at * steps + pixel - first[at],
    )
