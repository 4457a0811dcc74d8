"""A segmentor's logits become a class for every pixel, a few rows of the image at a time.

For 150 classes and an image of 20,000 pixels a side, all logits at once would take 240 GB; and
resizing them for a 512x512 image takes longer than an EfficientFormerV2-S0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from mmseg.structures import SegDataSample

# Bytes of a strip's logits: on a CPU they should fit into the cache, on a GPU fewer steps count.
CPU_STRIP_BYTES = 2**22
GPU_STRIP_BYTES = 2**25


def keep_logits_small(model: nn.Module) -> None:
    """Make a segmentor's head return logits at the head's own size, for :func:`predict_seg_maps`.

    The model is changed in place, or left as it is where other code than mmseg's own or the seams
    of a sliding window need the logits at full size.
    """
    from mmseg.models.decode_heads.decode_head import BaseDecodeHead
    from mmseg.models.segmentors import EncoderDecoder

    head = getattr(model, 'decode_head', None)
    if (
        type(model) is EncoderDecoder
        and model.test_cfg.get('mode', 'whole') == 'whole'
        and isinstance(head, BaseDecodeHead)
        and type(head).predict is BaseDecodeHead.predict
        and type(head).predict_by_feat is BaseDecodeHead.predict_by_feat
    ):
        head.predict_by_feat = _unchanged


def _unchanged(seg_logits: Tensor, batch_img_metas: list[dict]) -> Tensor:
    """Replaces a head's ``predict_by_feat``, with the same arguments."""
    return seg_logits


def predict_seg_maps(
    model: nn.Module, inputs: Tensor, samples: Sequence[SegDataSample]
) -> list[Tensor]:
    """The segmentation maps of a batch, as :func:`seg_map_of` returns them."""
    head = model.decode_head
    last_head = head[-1] if isinstance(head, nn.ModuleList) else head
    threshold = last_head.threshold if model.out_channels == 1 else None
    maps = []
    batch = model.inference(inputs, [sample.metainfo for sample in samples])
    for each, sample in zip(batch, samples, strict=True):
        meta = sample.metainfo
        padding = meta.get('img_padding_size', meta.get('padding_size', [0] * 4))
        logits = Logits.of(each.float()).resize(inputs.shape[2:], model.align_corners)
        logits = logits.crop(*padding).resize(meta['ori_shape'][:2], model.align_corners)
        maps.append(seg_map_of(logits, threshold))
    return maps


def seg_map_of(logits: Logits, threshold: float | None) -> Tensor:
    """The class with the highest logit, for every pixel, on the logits' device.

    ``threshold`` is that of a model with a single class: the probability from which on a pixel
    belongs to it (label 1, as in mmseg). Returns uint8, or int32 for more than 255 classes.
    """
    height, width = logits.size
    dtype = torch.uint8 if logits.classes <= 255 else torch.int32
    strip_bytes = CPU_STRIP_BYTES if logits.device.type == 'cpu' else GPU_STRIP_BYTES
    rows = max(1, strip_bytes // (logits.classes * width * 4))
    strips = []
    for top in range(0, height, rows):
        strip = logits.rows(top, min(top + rows, height))
        if threshold is None:
            # Faster than argmax on a CPU.
            strips.append(strip.max(dim=-1).indices.to(dtype))
        else:
            strips.append((strip[..., 0].sigmoid() > threshold).to(dtype))
    return torch.cat(strips)


@dataclass(frozen=True)
class Logits:
    """The logits of every pixel, computed a few rows at a time."""

    classes: int
    # Height and width.
    size: tuple[int, int]
    device: torch.device
    # Maps (top, bottom) to the logits of these rows, (bottom - top, width, classes).
    rows: Callable[[int, int], Tensor]

    @classmethod
    def of(cls, logits: Tensor) -> Logits:
        """Logits (classes, height, width)."""
        # With the classes of a pixel side by side, their maximum takes a quarter of the time.
        pixels = logits.permute(1, 2, 0).contiguous()
        classes, *size = logits.shape
        return cls(classes, tuple(size), logits.device, lambda top, bottom: pixels[top:bottom])

    def crop(self, left: int, right: int, top: int, bottom: int) -> Logits:
        """Without this many columns and rows at the edges."""
        size = (self.size[0] - top - bottom, self.size[1] - left - right)

        def rows(first: int, last: int) -> Tensor:
            return self.rows(top + first, top + last)[:, left : left + size[1]]

        return replace(self, size=size, rows=rows)

    def resize(self, size: tuple[int, int], align_corners: bool) -> Logits:
        """As ``F.interpolate(logits, size, mode='bilinear', align_corners=align_corners)``."""
        if tuple(size) == self.size:
            return self
        x = torch.arange(size[1], device=self.device)
        left, right, along = _neighbors(x, self.size[1], size[1], align_corners)

        def rows(first: int, last: int) -> Tensor:
            y = torch.arange(first, last)
            above, below, down = _neighbors(y, self.size[0], size[0], align_corners)
            start = int(above[0])
            source = self.rows(start, int(below[-1]) + 1)
            # Vertically first: usually there are fewer columns before the other interpolation.
            down = down.to(source)[:, None, None]
            strip = torch.lerp(source[above - start], source[below - start], down)
            return torch.lerp(strip[:, left], strip[:, right], along.to(source)[:, None])

        return replace(self, size=tuple(size), rows=rows)


def _neighbors(
    target: Tensor, source_length: int, target_length: int, align_corners: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """For target indices: the source index before, the one after, and the weight of the latter."""
    if align_corners:
        position = target * ((source_length - 1) / max(target_length - 1, 1))
    else:
        position = ((target + 0.5) * (source_length / target_length) - 0.5).clamp(min=0)
    before = position.long().clamp(max=source_length - 1)
    return before, (before + 1).clamp(max=source_length - 1), position - before
