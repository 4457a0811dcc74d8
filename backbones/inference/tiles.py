"""Images larger than a network takes: tiles of them go through the model one after another.

Logits of a segmentor are blended where tiles overlap. Of a detector, an object that several tiles
see becomes one, also where each sees a part of it, and objects that no tile may see whole are also
looked for in the whole image, made smaller. What is held at a time does not grow with the image:
the logits of about one row of tiles, and compressed masks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import pairwise, product
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from backbones.errors import ConfigError

from .inputs import Input
from .masks import CompressedMask, CroppedMask
from .pipeline import Model, Pipeline
from .reading import Frame
from .results import Detections, Segmentation
from .seg_maps import Logits, seg_map_of
from .tile_merging import Pieces, merge

DEFAULT_OVERLAP = 0.2
MIN_TILE = 64
MAX_OVERLAP = 0.9
# The longer side of a whole image for a detector: at most this, or two tiles if that is more. Most
# test pipelines make it smaller still.
MAX_WHOLE = 2048
# Seconds before there is a progress bar.
BAR_DELAY = 2


class TiledModel:
    """A model whose large images are taken apart, with the methods of :class:`.model.TorchModel`.

    Args:
        model: A TorchModel or an ExportedModel. A tile goes through it as an image of its own,
            with the resizing of the test pipeline.
        tile: Height and width of the tiles in pixels of the image, at least ``MIN_TILE``. An image
            without a longer side goes through the model as it is.
        overlap: The share of a tile's side that its neighbor sees too, at least; below 0.9.
            Default: ``DEFAULT_OVERLAP``.
        batch_size: Tiles that go through the model at once.
        score_thr: Detections below this score are left out before they are merged.

    Attributes:
        shows_progress: Whether a terminal shows how many tiles of an image are done.

    Raises:
        ConfigError: Tiles of this size or overlap cannot work.
    """

    shows_progress = False

    def __init__(
        self,
        model: Any,
        tile: int,
        overlap: float | None = None,
        batch_size: int = 1,
        score_thr: float = 0.0,
    ) -> None:
        check_tile(tile, overlap)
        self.model, self.tile = model, tile
        self.overlap = DEFAULT_OVERLAP if overlap is None else overlap
        self.batch_size, self.score_thr = batch_size, score_thr

    def preprocess(self, image: np.ndarray) -> dict[str, Any]:
        """As the model's own; a large image is left as it is, to be taken apart later."""
        if max(image.shape[:2]) <= self.tile:
            return self.model.preprocess(image)
        # One dimension more than any input of a model, so that the two are never in one batch.
        return dict(inputs=image[None], is_large=True)

    @torch.inference_mode()
    def predict(self, batch: list[dict[str, Any]]) -> list[Any]:
        """As the model's own; for a large image the whole prediction."""
        if 'is_large' not in batch[0]:
            return self.model.predict(batch)
        is_segmentor = self.model.task == 'segmentation'
        predict = self._segment if is_segmentor else self._detect
        return [predict(item['inputs'][0]) for item in batch]

    def postprocess(self, raw: Any, size: tuple[int, int]) -> Detections | Segmentation:
        """As the model's own."""
        is_done = isinstance(raw, Detections | Segmentation)
        return raw if is_done else self.model.postprocess(raw, size)

    def _segment(self, image: np.ndarray) -> Segmentation:
        grid = Grid(image.shape[:2], self.tile, self.overlap)
        dtype = np.uint8 if len(self.model.classes) <= 255 else np.uint16
        seg_map = np.empty(image.shape[:2], dtype)
        if not self.model.gives_logits:
            for (row, column), part in zip(grid, self._run(self.model, grid, image), strict=True):
                inner, inside = grid.middle(row, column)
                seg_map[inner] = part.seg_map[inside]
            return Segmentation(seg_map)
        # Later tiles blend with these.
        held: dict[tuple[int, int], Logits] = {}
        parts = self._run(LogitsModel(self.model), grid, image)
        for (row, column), logits in zip(grid, parts, strict=True):
            held[row, column] = logits
            region = grid.beginning(row, column)
            blended = blend(grid, region, held, (row, column))
            seg_map[region] = seg_map_of(blended, self.model.binary_threshold).cpu().numpy()
            for key in [key for key in held if not grid.is_needed(key, (row, column))]:
                del held[key]
        return Segmentation(seg_map)

    def _detect(self, image: np.ndarray) -> Detections:
        grid = Grid(image.shape[:2], self.tile, self.overlap)
        pieces = Pieces(grid.boxes(), image.shape[:2])
        found = self._run(self.model, grid, image)
        for number, detections in enumerate(found):
            pieces.add(number, detections.select(self.score_thr))
        whole = self._detect_whole(image).select(self.score_thr)
        pieces.add_whole(whole, min_side=grid.shared)
        return merge(pieces, self.model.nms_threshold)

    def _detect_whole(self, image: np.ndarray) -> Detections:
        """Detections in the whole image, which is made smaller first where it is very large."""
        height, width = image.shape[:2]
        ratio = min(1, max(MAX_WHOLE, 2 * self.tile) / max(height, width))
        small = (max(1, round(height * ratio)), max(1, round(width * ratio)))
        if ratio < 1:
            image = cv2.resize(image, small[::-1], interpolation=cv2.INTER_AREA)
        raw = self.model.predict([self.model.preprocess(image)])[0]
        found = self.model.postprocess(raw, small)
        return found if ratio == 1 else enlarge(found, small, (height, width))

    def _run(self, model: Model, grid: Grid, image: np.ndarray) -> Iterator[Any]:
        """The model's predictions for the tiles, in order."""
        frames = (
            Frame(Input('tile'), grid.num_bytes, load=partial(cut, image, grid.slices(*cell)))
            for cell in grid
        )
        bar = tqdm(
            Pipeline(model, self.batch_size).run(frames),
            total=len(grid.boxes()),
            unit='tile',
            leave=False,
            dynamic_ncols=True,
            delay=BAR_DELAY,
            # None: unless it is a terminal.
            disable=None if self.shows_progress else True,
        )
        for frame in bar:
            if frame.problem:
                raise ValueError(frame.problem)
            yield frame.prediction


def check_tile(tile: int | None, overlap: float | None) -> None:
    """Check the arguments of :class:`TiledModel`, or raise ConfigError; None is the default."""
    if tile is None and overlap is not None:
        raise ConfigError('an overlap is one of tiles: give --tile PIXELS (tile=...) with it')
    if tile is not None and tile < MIN_TILE:
        raise ConfigError(f'tiles of {tile} pixels are too small: give {MIN_TILE} or more')
    if overlap is not None and not 0 <= overlap < MAX_OVERLAP:
        raise ConfigError(
            f'an overlap of {overlap:g} cannot work: it is the share of a tile that the next one '
            f'sees too, from 0 to below {MAX_OVERLAP}'
        )


class LogitsModel:
    """A segmentor whose predictions are logits."""

    def __init__(self, model: Any) -> None:
        self.preprocess, self.predict = model.preprocess, model.predict_logits
        self.postprocess = model.logits_of


def cut(image: np.ndarray, slices: tuple[slice, slice]) -> np.ndarray:
    return np.ascontiguousarray(image[slices])


def enlarge(found: Detections, small: tuple[int, int], size: tuple[int, int]) -> Detections:
    """Detections in an image of one size (height, width) as those in the same image of another."""
    scale = np.divide(size, small)[::-1]
    masks = None
    if found.masks is not None:
        masks = [CompressedMask(enlarge_mask(mask, scale, size)) for mask in found.masks]
    boxes = (found.boxes * np.tile(scale, 2)).astype(np.float32)
    return Detections(boxes, found.scores, found.labels, masks)


def enlarge_mask(mask: CroppedMask, scale: np.ndarray, size: tuple[int, int]) -> CroppedMask:
    """A mask in an image of ``size``, larger by ``scale`` (horizontally, vertically)."""
    start = np.array([mask.x, mask.y])
    left, top = np.floor(start * scale).astype(int)
    right, bottom = np.floor((start + mask.pixels.shape[::-1]) * scale).astype(int)
    right, bottom = min(right, size[1]), min(bottom, size[0])
    if not mask.pixels.size:
        return CroppedMask(left, top, mask.pixels)
    pixels = mask.pixels.astype(np.uint8) * 255
    return CroppedMask(left, top, cv2.resize(pixels, (right - left, bottom - top)) > 127)


# ------------------------------------------------------------------------------------------------
# The grid of tiles
# ------------------------------------------------------------------------------------------------


class Grid:
    """Tiles of one size, spread evenly over an image; iterates over (row, column), row by row.

    Attributes:
        shared: Pixels along a side that two neighbors both see, at least: what is smaller is whole
            in one of them.
    """

    def __init__(self, size: tuple[int, int], tile: int, overlap: float) -> None:
        # Vertically, then horizontally.
        self.axes = [Axis(length, tile, overlap) for length in size]
        self.num_bytes = 3 * math.prod(axis.tile for axis in self.axes)
        self.shared = min(axis.shared for axis in self.axes)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return product(*(range(len(axis.starts)) for axis in self.axes))

    def slices(self, *cell: int) -> tuple[slice, slice]:
        """The rows and columns of a tile."""
        starts = (axis.starts[index] for axis, index in zip(self.axes, cell, strict=True))
        return tuple(
            slice(start, start + axis.tile) for start, axis in zip(starts, self.axes, strict=True)
        )

    def boxes(self) -> np.ndarray:
        """(tiles, 4): left, top, right, bottom."""
        every = (self.slices(*cell) for cell in self)
        return np.array([(x.start, y.start, x.stop, y.stop) for y, x in every])

    def beginning(self, *cell: int) -> tuple[slice, slice]:
        """The part of a tile that no later one sees: it ends where the next ones begin."""
        return tuple(
            slice(axis.starts[index], axis.next_start(index))
            for axis, index in zip(self.axes, cell, strict=True)
        )

    def middle(self, *cell: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """The part of a tile that is farther from its border than from any other tile's.

        Returns its rows and columns in the image, and those in the tile.
        """
        ends = [axis.middles[i : i + 2] for axis, i in zip(self.axes, cell, strict=True)]
        starts = [axis.starts[i] for axis, i in zip(self.axes, cell, strict=True)]
        return tuple(slice(*pair) for pair in ends), tuple(
            slice(low - start, high - start)
            for (low, high), start in zip(ends, starts, strict=True)
        )

    def is_needed(self, cell: tuple[int, int], done: tuple[int, int]) -> bool:
        """Whether a tile reaches into the :meth:`beginning` of one after the tile ``done``."""
        below, right = (
            axis.starts[index] + axis.tile > axis.next_start(last)
            for axis, index, last in zip(self.axes, cell, done, strict=True)
        )
        return below or right


class Axis:
    """The tiles along one side of an image.

    Attributes:
        tile: Their length, in pixels; that of the image where it is shorter.
        starts: Where each begins.
        middles: Where each ends to be the one whose border is farthest away, from 0 on.
        weights: (tiles, tile), float32: how much each counts, by the distance from its own border;
            the edge of the image is none. In every pixel they add up to 1.
        shared: Pixels that two neighbors both see; infinite for a single tile.
    """

    def __init__(self, length: int, tile: int, overlap: float) -> None:
        self.length, self.tile = length, min(tile, length)
        count = 1 + math.ceil((length - self.tile) / max(1, int(tile * (1 - overlap))))
        self.starts = np.linspace(0, length - self.tile, count).round().astype(int).tolist()
        steps = [later - start for start, later in pairwise(self.starts)]
        self.shared = min((self.tile - step for step in steps), default=math.inf)
        between = [(start + self.tile + later) // 2 for start, later in pairwise(self.starts)]
        self.middles = [0, *between, length]
        self.weights = self._weigh()

    def next_start(self, index: int) -> int:
        """Where the next tile begins, or the image ends."""
        return self.starts[index + 1] if index + 1 < len(self.starts) else self.length

    def _weigh(self) -> Tensor:
        distance = np.arange(self.tile) + 0.5
        weights = np.tile(np.minimum(distance, distance[::-1]), (len(self.starts), 1))
        weights[0] = distance[::-1]
        weights[-1] = distance if len(self.starts) > 1 else 1
        total = np.zeros(self.length)
        for start, each in zip(self.starts, weights, strict=True):
            total[start : start + self.tile] += each
        for start, each in zip(self.starts, weights, strict=True):
            each /= total[start : start + self.tile]
        return torch.from_numpy(weights.astype(np.float32))


def blend(
    grid: Grid,
    region: tuple[slice, slice],
    tiles: dict[tuple[int, int], Logits],
    first: tuple[int, int],
) -> Logits:
    """The logits in a region that the tile ``first`` covers, and others cover in part.

    They are averaged with the weights of the tiles, before the softmax: as mmseg does it where it
    slides a window, and a few classes at a time.
    """
    size = tuple(each.stop - each.start for each in region)
    parts = []
    for cell, logits in tiles.items():
        offsets, ends, weights = [], [], []
        for axis, index, wanted in zip(grid.axes, cell, region, strict=True):
            begin = wanted.start - axis.starts[index]
            end = min(wanted.stop - axis.starts[index], axis.tile)
            offsets.append(begin)
            ends.append(end)
            weights.append(axis.weights[index][max(begin, 0) : max(end, 0)])
        if min(offsets) < 0 or any(e <= b for b, e in zip(offsets, ends, strict=True)):
            continue
        margins = [offsets[1], logits.size[1] - ends[1], offsets[0], logits.size[0] - ends[0]]
        weights = [each.to(logits.device) for each in weights]
        parts.append((cell == first, logits.crop(*margins), weights))
    # What covers all of the region comes first.
    parts.sort(key=lambda part: not part[0])

    def rows(top: int, bottom: int) -> Any:
        strips = [
            (part.rows(top, min(bottom, part.size[0])), down[top:bottom, None] * across)
            for _, part, (down, across) in parts
            if top < part.size[0]
        ]

        def strip(chosen: slice) -> Tensor:
            (own, weight), *others = strips
            total = own(chosen) * weight
            for other, weight in others:
                values = other(chosen) * weight
                total[:, : values.shape[1], : values.shape[2]] += values
            return total

        return strip

    return Logits(parts[0][1].classes, size, parts[0][1].device, rows)
