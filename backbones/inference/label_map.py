"""From a segmentor's logits to a class for every pixel of the picture."""

import torch
from torch import Tensor

from .logits import Logits

# What a strip's logits may take, in bytes: on a CPU they should stay in the cache, on a GPU the
# number of steps counts.
CPU_STRIP_BUDGET = 2**22
GPU_STRIP_BUDGET = 2**25


def label_map_of(logits: Logits, threshold: float | None) -> Tensor:
    """The class with the highest logit, for every pixel.

    Args:
        logits: At the size of the picture.
        threshold: Where there is one class only: the probability from which on a pixel belongs
            to it (class 1, as mmseg numbers it).

    Returns:
        (height, width), uint8, or int32 for more than 255 classes; on the logits' device.
    """
    height, width = logits.size
    dtype = torch.uint8 if logits.classes <= 255 else torch.int32
    budget = CPU_STRIP_BUDGET if logits.device.type == 'cpu' else GPU_STRIP_BUDGET
    rows = max(1, budget // (logits.classes * width * 4))
    strips = []
    for top in range(0, height, rows):
        strip = logits.rows(top, min(top + rows, height))
        if threshold is None:
            # Faster than argmax on a CPU.
            strips.append(strip.max(dim=-1).indices.to(dtype))
        else:
            strips.append((strip[..., 0].sigmoid() > threshold).to(dtype))
    return torch.cat(strips)
