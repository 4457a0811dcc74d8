"""From a segmentor's logits to a class for every pixel of the picture."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits at the picture's size are made for as many rows at a time as fit into this many bytes:
# for 150 classes and a picture of 20,000 pixels a side, all of them would take 240 GB.
STRIP_BUDGET = 2**25


def label_map_of(
    logits: Tensor, size: tuple[int, int], align_corners: bool, threshold: float | None
) -> Tensor:
    """The class with the highest logit, after bilinear resizing to the size of the picture.

    Args:
        logits: (classes, height, width).
        size: Height and width of the picture.
        align_corners: As the segmentor has it.
        threshold: Where there is one class only: the probability from which on a pixel belongs
            to it (class 1, as mmseg numbers it).

    Returns:
        ``size``, uint8, or int32 for more than 255 classes.
    """
    dtype = torch.uint8 if len(logits) <= 255 else torch.int32
    rows = max(1, STRIP_BUDGET // (len(logits) * size[1] * 4))
    strips = []
    for top in range(0, size[0], rows):
        bottom = min(top + rows, size[0])
        strip = resize_rows(logits, size, align_corners, top, bottom)
        if threshold is None:
            # Half the time of argmax on a CPU.
            strips.append(strip.max(dim=0).indices.to(dtype))
        else:
            strips.append((strip[0].sigmoid() > threshold).to(dtype))
    return torch.cat(strips)


def resize_rows(
    logits: Tensor, size: tuple[int, int], align_corners: bool, top: int, bottom: int
) -> Tensor:
    """Rows ``top`` to ``bottom`` of ``F.interpolate(logits, size, mode='bilinear')``.

    Returns:
        (classes, bottom - top, size[1]).
    """
    height = logits.shape[1]
    if tuple(logits.shape[1:]) == tuple(size):
        return logits[:, top:bottom]
    y = torch.arange(top, bottom, device=logits.device, dtype=torch.float32)
    if align_corners:
        y = y * ((height - 1) / max(size[0] - 1, 1))
    else:
        y = ((y + 0.5) * (height / size[0]) - 0.5).clamp(min=0)
    above = y.long().clamp(max=height - 1)
    below = (above + 1).clamp(max=height - 1)
    share = (y - above).to(logits.dtype)[:, None]
    strip = torch.lerp(logits[:, above], logits[:, below], share)
    return F.interpolate(
        strip[None], (bottom - top, size[1]), mode='bilinear', align_corners=align_corners
    )[0]
