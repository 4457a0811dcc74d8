"""Turn a segmentor's logits into a class for every pixel, without resizing all of them.

Bilinear interpolation computes weighted means of neighboring logits. Where the same class is the
highest in all neighbors, it is the highest in every mean. Only pixels between logits of different
classes, a tenth of a street scene, must be resized; the result equals that of resizing all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from mmseg.structures import SegDataSample

# How many logits a CPU resizes at once where classes differ: they should fit into the cache.
CPU_VALUES = 2**19
# Bytes of the logits that are resized at once, if all of them are resized.
CPU_BYTES, GPU_BYTES = 2**24, 2**28
# Pixels along an axis whose logits are computed at once; for more, most weights would be 0.
PIXELS = 64


def keep_logits_small(model: nn.Module) -> None:
    """Make a segmentor's head return logits at the head's own size, for :func:`predict_logits`.

    The model is changed in place. It is left as it is if code other than mmseg's, or a sliding
    window, needs the logits at full size.
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
        head.predict_by_feat = lambda seg_logits, batch_img_metas: seg_logits


def predict_logits(
    model: nn.Module, inputs: Tensor, samples: Sequence[SegDataSample]
) -> list[Logits]:
    """Return the logits of a batch, each at the size of its image."""
    head = model.decode_head
    head = head[-1] if isinstance(head, nn.ModuleList) else head
    threshold = head.threshold if model.out_channels == 1 else None
    resized, (height, width) = [], inputs.shape[2:]
    batch = model.inference(inputs, [sample.metainfo for sample in samples])
    for each, sample in zip(batch, samples, strict=True):
        meta = sample.metainfo
        left, right, top, bottom = meta.get('img_padding_size', meta.get('padding_size', [0] * 4))
        logits = Logits.of(each.float(), threshold).resize((height, width), model.align_corners)
        logits = logits.crop(slice(top, height - bottom), slice(left, width - right))
        resized.append(logits.resize(meta['ori_shape'][:2], model.align_corners))
    return resized


def seg_map_of(logits: Logits) -> Tensor:
    """Return the class with the highest logit, for every pixel, on the logits' device.

    Returns uint8, or int32 for more than 255 classes.
    """
    classes, device = len(logits.source), logits.source.device
    # A GPU resizes all of them faster than it finds out which ones must be resized.
    if device.type != 'cpu' or logits.source.shape[1:] == logits.size:
        return argmax_of(logits.resized, classes, logits.size, device)
    rows, columns = cells_of(logits.down), cells_of(logits.across)
    return resized_argmax(logits.source[None], rows, columns, label_type(classes), CPU_VALUES)[0]


def argmax_of(
    planes: Callable[[slice], Tensor], classes: int, size: tuple[int, int], device: torch.device
) -> Tensor:
    """Return the class with the highest value, the first of equal ones; ``planes`` gives some."""
    on_cpu, dtype = device.type == 'cpu', label_type(classes)
    step = max(1, (CPU_BYTES if on_cpu else GPU_BYTES) // (4 * size[0] * size[1]))
    highest = torch.full(size, -torch.inf, device=device)
    labels = torch.zeros(size, dtype=dtype, device=device)
    for first in range(0, classes, step):
        values = planes(slice(first, first + step))
        if on_cpu:
            # One after another: faster than max().
            candidates = enumerate(values, first)
        else:
            values, indices = values.max(dim=0)
            candidates = [(indices.to(dtype) + first, values)]
        for label, value in candidates:
            # Labels only grow, so a maximum will do, which is faster than torch.where().
            torch.maximum(labels, (value > highest).to(dtype).mul_(label), out=labels)
            torch.maximum(highest, value, out=highest)
    return labels


def label_type(classes: int) -> torch.dtype:
    return torch.uint8 if classes <= 255 else torch.int32


class Cells(NamedTuple):
    """Groups of pixels along an axis that lie between the same logits."""

    # (cells, neighbors): the indices of these logits.
    neighbors: Tensor
    # (cells, steps, neighbors - 1): the weights in the mean at each pixel of a cell, of all
    # neighbors but the first, which has the rest.
    weights: Tensor
    # (pixels,): the index of a pixel, in cells of ``steps`` pixels.
    positions: Tensor


def resized_argmax(
    logits: Tensor, rows: Cells, columns: Cells, dtype: torch.dtype, at_once: int | None = None
) -> Tensor:
    """Return the class with the highest logit after resizing, the first of equal ones.

    ``logits`` are (batch, classes, height, width); ``at_once`` of them are resized at a time.
    """
    classes, height, width = logits.shape[1:]
    # Faster than argmax().
    labels = logits.max(dim=1).indices.to(dtype)
    pairs = product(rows.neighbors.unbind(dim=1), columns.neighbors.unbind(dim=1))
    first, *others = (labels[:, row][:, :, column] for row, column in pairs)
    differ = torch.zeros_like(first, dtype=torch.bool)
    for other in others:
        differ = differ | (other != first)
    index = differ.nonzero()

    source = logits.permute(0, 2, 3, 1).reshape(-1, classes)
    steps = rows.weights.shape[1], columns.weights.shape[1]
    cells = first[..., None, None].repeat(1, 1, 1, *steps)
    number = at_once and max(1, at_once // (classes * steps[0] * steps[1]))
    for part in index.split(number) if number else [index]:
        image, row, column = part.unbind(dim=1)
        sides = []
        for x in columns.neighbors[column].unbind(dim=1):
            lines = [
                source[(image * height + y) * width + x][:, None]
                for y in rows.neighbors[row].unbind(dim=1)
            ]
            sides.append(_mean(lines, rows.weights[row][..., None])[:, :, None])
        values = _mean(sides, columns.weights[column][:, None, ..., None])
        cells[image, row, column] = values.max(dim=-1).indices.to(dtype)
    cells = cells.permute(0, 1, 3, 2, 4).flatten(3, 4).flatten(1, 2)
    return cells[:, rows.positions][:, :, columns.positions]


def _mean(values: list[Tensor], weights: Tensor) -> Tensor:
    """Return the weighted mean of neighbors; ``weights``, along axis -2, skip the first one."""
    first, *others = values
    mean = first
    for value, weight in zip(others, weights.unbind(dim=-2), strict=True):
        mean = mean + weight * (value - first)
    return mean


class Logits(NamedTuple):
    """The logits of every pixel, not computed yet: each is a weighted mean of a few others."""

    # (classes, height, width).
    source: Tensor
    # (height, pixels) and (width, pixels): the weights of rows and of columns.
    down: Tensor
    across: Tensor
    # The crops and resizes that have the same result, in order.
    steps: tuple[Callable[[Tensor], Tensor], ...] = ()

    @classmethod
    def of(cls, logits: Tensor, threshold: float | None = None) -> Logits:
        """Wrap logits (classes, height, width); of one class, label 1 is above ``threshold``."""
        if threshold is not None:
            limit = torch.logit(torch.tensor(threshold), eps=1e-6).item()
            logits = torch.cat([torch.full_like(logits, limit), logits])
        down, across = (torch.eye(n, device=logits.device) for n in logits.shape[1:])
        # A head's logits may be in channels last.
        return cls(logits.contiguous(), down, across)

    @property
    def size(self) -> tuple[int, int]:
        return self.down.shape[1], self.across.shape[1]

    def crop(self, rows: slice, columns: slice) -> Logits:
        def step(planes: Tensor) -> Tensor:
            return planes[:, rows, columns]

        down, across = self.down[:, rows], self.across[:, columns]
        return Logits(self.source, down, across, (*self.steps, step))

    def resize(self, size: tuple[int, int], align_corners: bool) -> Logits:
        """Like ``F.interpolate(logits, size, mode='bilinear', align_corners=align_corners)``."""
        if tuple(size) == self.size:
            return self

        def step(planes: Tensor) -> Tensor:
            planes = planes[None]
            return F.interpolate(planes, size, mode='bilinear', align_corners=align_corners)[0]

        down, across = (
            F.interpolate(weights[None], length, mode='linear', align_corners=align_corners)[0]
            for weights, length in zip((self.down, self.across), size, strict=True)
        )
        return Logits(self.source, down, across, (*self.steps, step))

    def resized(self, chosen: slice = slice(None)) -> Tensor:
        """Return the logits of some classes, (classes, height, width)."""
        return reduce(lambda planes, step: step(planes), self.steps, self.source[chosen])

    def planes(self, chosen: slice = slice(None)) -> Tensor:
        """Like :meth:`resized`, without computing what was cropped away."""
        columns = weighted_means(self.source[chosen].mT, self.across)
        return weighted_means(columns.mT, self.down)


def weighted_means(values: Tensor, weights: Tensor) -> Tensor:
    """Return ``weights.T @ values``, computed without most of the weights that are 0."""
    parts = []
    for some in weights.split(PIXELS, dim=1):
        used = some.any(dim=1).nonzero()
        near = slice(int(used[0]), int(used[-1]) + 1)
        parts.append(some[near].T @ values[:, near])
    return torch.cat(parts, dim=1)


def cells_of(weights: Tensor) -> Cells:
    """Return the cells along an axis; ``weights`` are (logits, pixels)."""
    length, pixels = weights.shape
    logit, at = (weights > 0).nonzero().T
    first = torch.full((pixels,), length).scatter_reduce(0, at, logit, 'amin')
    last = torch.zeros(pixels, dtype=torch.int64).scatter_reduce(0, at, logit, 'amax')
    neighbors = int((last - first).max()) + 1
    # Only a few cells are larger, those at the border; they are split.
    steps = -(-pixels // length)
    pixel = torch.arange(pixels)
    begins = first.diff(prepend=first[:1] - 1) > 0
    slot = (pixel - (pixel * begins).cummax(dim=0).values) % steps
    cell = (slot == 0).cumsum(0) - 1
    index = first[:, None] + torch.arange(neighbors)
    inside = torch.zeros(int(cell[-1]) + 1, steps, neighbors - 1)
    # Neighbors after the last logit have the weight 0.
    chosen = weights[index.clamp(max=length - 1), pixel[:, None]] * (index < length)
    inside[cell, slot] = chosen[:, 1:]
    return Cells(index[slot == 0].clamp(max=length - 1), inside, cell * steps + slot)
