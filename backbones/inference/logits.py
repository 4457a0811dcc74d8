"""A segmentor's logits at the size of a picture, of which a few rows are made at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Logits:
    """The classes' logits for every pixel, computed where they are asked for.

    For 150 classes and a picture of 20,000 pixels a side, all of them would take 240 GB.

    Attributes:
        classes: How many there are.
        size: Height and width.
        device: Where they are.
        rows: Maps (top, bottom) to the logits of these rows, (bottom - top, width, classes).
    """

    classes: int
    size: tuple[int, int]
    device: torch.device
    rows: Callable[[int, int], Tensor]

    @classmethod
    def of(cls, logits: Tensor) -> Logits:
        """Logits that are there, (classes, height, width)."""
        # A pixel's classes side by side: the greatest of them is found in a quarter of the time.
        pixels = logits.permute(1, 2, 0).contiguous()
        classes, *size = logits.shape
        return cls(classes, tuple(size), logits.device, lambda top, bottom: pixels[top:bottom])

    def crop(self, left: int, right: int, top: int, bottom: int) -> Logits:
        """Without so many columns and rows at the edges."""
        size = (self.size[0] - top - bottom, self.size[1] - left - right)

        def rows(first: int, last: int) -> Tensor:
            return self.rows(top + first, top + last)[:, left : left + size[1]]

        return replace(self, size=size, rows=rows)

    def resize(self, size: tuple[int, int], align_corners: bool) -> Logits:
        """As ``F.interpolate(logits, size, mode='bilinear', align_corners=align_corners)``."""
        if tuple(size) == self.size:
            return self
        x = torch.arange(size[1], device=self.device)
        left, right, along = neighbours(x, self.size[1], size[1], align_corners)

        def rows(first: int, last: int) -> Tensor:
            y = torch.arange(first, last)
            above, below, down = neighbours(y, self.size[0], size[0], align_corners)
            start = int(above[0])
            source = self.rows(start, int(below[-1]) + 1)
            # Down first: there are fewer columns before they are interpolated, as a rule.
            down = down.to(source)[:, None, None]
            strip = torch.lerp(source[above - start], source[below - start], down)
            return torch.lerp(strip[:, left], strip[:, right], along.to(source)[:, None])

        return replace(self, size=tuple(size), rows=rows)


def neighbours(
    target: Tensor, source_length: int, target_length: int, align_corners: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Between which two of the source a pixel of the target lies.

    Args:
        target: Indices along one side of the target, rising.
        source_length: Of that side.
        target_length: Of that side.
        align_corners: Whether the first and last pixels' centres lie on each other, or the edges.

    Returns:
        The index before, the index behind, and the share of the latter, 0 to 1.
    """
    if align_corners:
        position = target * ((source_length - 1) / max(target_length - 1, 1))
    else:
        position = ((target + 0.5) * (source_length / target_length) - 0.5).clamp(min=0)
    before = position.long().clamp(max=source_length - 1)
    return before, (before + 1).clamp(max=source_length - 1), position - before
