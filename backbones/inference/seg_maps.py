"""A segmentor's logits become a class for every pixel, without resizing all of them.

Bilinear interpolation computes weighted means of neighboring logits. Where the same class is the
highest in all neighbors, it is the highest in every mean. Only what lies between logits of
different classes, a tenth of a street scene, has to be resized: the result is that of resizing all.

Where the logits of several tiles are blended, they are resized a few rows at a time: for 150
classes and an image of 20,000 pixels a side, all of them would take 240 GB.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from mmseg.structures import SegDataSample

Strip = Callable[[slice], Tensor]

# How many logits a CPU resizes at once where classes differ: they should fit into the cache.
CPU_VALUES = 2**19
# Of a strip: pixels on a CPU, where the logits of one class should fit into the cache; bytes of all
# classes on a GPU, where fewer steps count.
CPU_STRIP_PIXELS = 2**18
GPU_STRIP_BYTES = 2**28


def keep_logits_small(model: nn.Module) -> None:
    """Make a segmentor's head return logits at the head's own size, for :func:`predict_logits`.

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
    threshold = binary_threshold_of(model)
    return [seg_map_of(logits, threshold) for logits in predict_logits(model, inputs, samples)]


def predict_logits(
    model: nn.Module, inputs: Tensor, samples: Sequence[SegDataSample]
) -> list[Logits]:
    """The logits of a batch, each at the size of its image."""
    resized = []
    batch = model.inference(inputs, [sample.metainfo for sample in samples])
    for each, sample in zip(batch, samples, strict=True):
        meta = sample.metainfo
        padding = meta.get('img_padding_size', meta.get('padding_size', [0] * 4))
        logits = Logits.of(each.float()).resize(inputs.shape[2:], model.align_corners)
        resized.append(logits.crop(*padding).resize(meta['ori_shape'][:2], model.align_corners))
    return resized


def binary_threshold_of(model: nn.Module) -> float | None:
    """The ``threshold`` of :func:`seg_map_of` for a segmentor."""
    head = model.decode_head
    last_head = head[-1] if isinstance(head, nn.ModuleList) else head
    return last_head.threshold if model.out_channels == 1 else None


def seg_map_of(logits: Logits, threshold: float | None) -> Tensor:
    """The class with the highest logit, for every pixel, on the logits' device.

    ``threshold`` is that of a model with a single class: the probability from which on a pixel
    belongs to it (label 1, as in mmseg). Returns uint8, or int32 for more than 255 classes.
    """
    height, width = logits.size
    dtype = torch.uint8 if logits.classes <= 255 else torch.int32
    on_cpu = logits.device.type == 'cpu'
    # A GPU resizes all of them in less time than it takes to find out which it has to.
    if logits.axes and logits.is_resized and threshold is None:
        rows, columns = (axis.cells() for axis in logits.axes)
        return resized_argmax(logits.source[None], rows, columns, dtype, CPU_VALUES)[0]
    pixels = CPU_STRIP_PIXELS if on_cpu else GPU_STRIP_BYTES // (4 * logits.classes)
    rows = max(1, pixels // width)
    strips = []
    for top in range(0, height, rows):
        strip = logits.rows(top, min(top + rows, height))
        if threshold is not None:
            strips.append((strip(slice(1))[0].sigmoid() > threshold).to(dtype))
        elif on_cpu:
            strips.append(_running_argmax(strip, logits.classes, dtype))
        else:
            strips.append(strip(slice(None)).max(dim=0).indices.to(dtype))
    return torch.cat(strips)


class Cells(NamedTuple):
    """Along an axis, groups of pixels that lie between the same logits."""

    # (cells, neighbors): which logits these are.
    neighbors: Tensor
    # (cells, steps, neighbors - 1): at each pixel of a cell the weights in their mean, of all but
    # the first, which has the rest.
    weights: Tensor
    # (pixels,): where a pixel is, in cells of ``steps`` pixels.
    positions: Tensor


def resized_argmax(
    logits: Tensor, rows: Cells, columns: Cells, dtype: torch.dtype, at_once: int | None = None
) -> Tensor:
    """The class with the highest logit after resizing, of equal ones the first.

    Args:
        logits: (batch, classes, height, width).
        rows: Of the pixels, among the rows of logits.
        columns: Of the pixels, among the columns of logits.
        dtype: Of the classes.
        at_once: How many logits are resized at a time. Default: all that have to be.

    Returns:
        (batch, pixels of ``rows``, pixels of ``columns``).
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
    """The mean of neighbors with the weights of all but the first, in the last but one axis."""
    first, *others = values
    mean = first
    for value, weight in zip(others, weights.unbind(dim=-2), strict=True):
        mean = mean + weight * (value - first)
    return mean


def _running_argmax(strip: Strip, classes: int, dtype: torch.dtype) -> Tensor:
    """The class with the highest logit, of equal ones the first."""
    highest = strip(slice(1))[0]
    labels = torch.zeros(highest.shape, dtype=dtype)
    for label in range(1, classes):
        values = strip(slice(label, label + 1))[0]
        # Labels only grow, and their maximum is faster than a choice between two.
        torch.maximum(labels, (values > highest).to(dtype).mul_(label), out=labels)
        highest = torch.maximum(highest, values)
    return labels


@dataclass(frozen=True)
class Logits:
    """The logits of every pixel, computed for a few rows and classes at a time."""

    classes: int
    # Height and width.
    size: tuple[int, int]
    device: torch.device
    # Maps (top, bottom) to a function of a slice of the classes, which returns their logits in
    # these rows, (classes, bottom - top, width).
    rows: Callable[[int, int], Strip]
    # (classes, height, width) before resizing and cropping, and how pixels follow from these along
    # both axes; None where tiles are blended, and axes on a CPU alone.
    source: Tensor | None = None
    axes: tuple[Axis, Axis] | None = None

    @property
    def is_resized(self) -> bool:
        """Whether there are more pixels than logits, or fewer."""
        return self.source is not None and self.source.shape[1:] != self.size

    @classmethod
    def of(cls, logits: Tensor) -> Logits:
        """Logits (classes, height, width)."""
        # A head's may be in channels last.
        logits = logits.contiguous()
        classes, *size = logits.shape

        def rows(top: int, bottom: int) -> Strip:
            return lambda chosen: logits[chosen, top:bottom]

        axes = None
        if logits.device.type == 'cpu':
            axes = tuple(Axis(torch.arange(n), torch.ones(n, 1), n) for n in size)
        return cls(classes, tuple(size), logits.device, rows, logits, axes)

    def crop(self, left: int, right: int, top: int, bottom: int) -> Logits:
        """Without this many columns and rows at the edges."""
        size = (self.size[0] - top - bottom, self.size[1] - left - right)

        def rows(first: int, last: int) -> Strip:
            strip = self.rows(top + first, top + last)
            return lambda chosen: strip(chosen)[..., left : left + size[1]]

        axes = self.axes and (
            self.axes[0].crop(top, top + size[0]),
            self.axes[1].crop(left, left + size[1]),
        )
        return replace(self, size=size, rows=rows, axes=axes)

    def resize(self, size: tuple[int, int], align_corners: bool) -> Logits:
        """As ``F.interpolate(logits, size, mode='bilinear', align_corners=align_corners)``."""
        if tuple(size) == self.size:
            return self

        def rows(first: int, last: int) -> Strip:
            resize = dict(
                size=(last - first, size[1]), mode='bilinear', align_corners=align_corners
            )
            if last - first == size[0]:
                whole = self.rows(0, self.size[0])
                return lambda chosen: F.interpolate(whole(chosen)[None], **resize)[0]
            y = torch.arange(first, last)
            above, below, down = _neighbors(y, self.size[0], size[0], align_corners)
            start = int(above[0])
            strip = self.rows(start, int(below[-1]) + 1)
            above, below = ((index - start).to(self.device) for index in (above, below))
            down = down[:, None].to(self.device, torch.float32)

            def resized(chosen: slice) -> Tensor:
                source = strip(chosen)
                # Vertically first: usually there are fewer columns before the other interpolation.
                lines = torch.lerp(
                    source.index_select(1, above), source.index_select(1, below), down
                )
                return F.interpolate(lines[None], **resize)[0]

            return resized

        axes = self.axes and tuple(
            axis.resize(length, align_corners) for axis, length in zip(self.axes, size, strict=True)
        )
        return replace(self, size=tuple(size), rows=rows, axes=axes)


class Axis(NamedTuple):
    """How pixels follow from logits along an axis: as weighted means of neighboring ones."""

    # (pixels,), rising: the first of the neighbors.
    first: Tensor
    # (pixels, neighbors).
    weights: Tensor
    # How many logits there are.
    length: int

    def crop(self, start: int, stop: int) -> Axis:
        return Axis(self.first[start:stop], self.weights[start:stop], self.length)

    def resize(self, length: int, align_corners: bool) -> Axis:
        """As :meth:`Logits.resize`, along this axis."""
        before, after, weight = _neighbors(
            torch.arange(length), len(self.first), length, align_corners
        )
        weight = weight.to(torch.float32)[:, None]
        first, shift = self.first[before], self.first[after] - self.first[before]
        neighbors = self.weights.shape[1]
        weights = torch.zeros(length, neighbors + int(shift.max()))
        weights[:, :neighbors] = (1 - weight) * self.weights[before]
        at = shift[:, None] + torch.arange(neighbors)
        weights.scatter_add_(1, at, weight * self.weights[after])
        return Axis(first, weights, self.length)

    def cells(self) -> Cells:
        pixels, neighbors = self.weights.shape
        # So that few cells are larger, which are several then: those at the border.
        steps = -(-pixels // self.length)
        pixel = torch.arange(pixels)
        begins = self.first.diff(prepend=self.first[:1] - 1) > 0
        slot = (pixel - (pixel * begins).cummax(dim=0).values) % steps
        cell = (slot == 0).cumsum(0) - 1
        first = self.first[slot == 0]
        weights = torch.zeros(len(first), steps, neighbors - 1)
        weights[cell, slot] = self.weights[:, 1:]
        index = (first[:, None] + torch.arange(neighbors)).clamp(max=self.length - 1)
        return Cells(index, weights, cell * steps + slot)


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
