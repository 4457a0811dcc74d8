"""Running a part of a network on a few rows of a feature map at a time, to stay in the cache.

Maps with many channels between two layers would go through memory twice; and memory that was never
used before is slower still than memory: the operating system has to provide it page by page.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# What the widest map inside may take, in bytes.
STRIP_BUDGET = 6 * 2**20


def in_strips(part: Callable[[Tensor], Tensor], x: Tensor, most_channels: int) -> Tensor:
    """What ``part`` makes of x, strip by strip where all of it would take too much.

    Args:
        part: Maps (batch, channels, height, width) to the same shape. A pixel's result depends on
            the pixel and its eight neighbours; beyond the edges it takes zeros for them. Needs no
            gradient.
        x: Channels last.
        most_channels: Channels of the widest map inside ``part``.
    """
    height, width = x.shape[2:]
    most = max(1, STRIP_BUDGET // (x.element_size() * most_channels * width))
    if len(x) * height <= most:
        return part(x)
    rows = even_step(height, most)
    # A row more on either side. All strips have the same size, for which weights are in order.
    window = min(height, rows + 2)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    for picture, result in zip(x.split(1), out.split(1), strict=True):
        for top in range(0, height, rows):
            bottom = min(height, top + rows)
            first = min(max(0, top - 1), height - window)
            strip = part(picture[:, :, first : first + window])
            result[:, :, top:bottom] = strip[:, :, top - first : bottom - first]
    return out


def even_step(length: int, most: int) -> int:
    """The step that divides a length into as few steps as possible, as alike as possible."""
    return -(-length // -(-length // most))
