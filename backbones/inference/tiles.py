"""Images larger than a network takes: their tiles go through the model one after another.

A segmentor's logits are blended where tiles overlap. A detector's detections of one object in
several tiles become one, even if each tile shows only a part of it. Objects that may be larger than
the overlap are also detected in the whole image, made smaller. Besides the image and its result,
memory holds only the logits of about one row of tiles, and compressed masks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise, product
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from backbones.errors import ConfigError
from backbones.progress import ProgressBar

from .inputs import Input
from .masks import CompressedMask, CroppedMask
from .pipeline import Pipeline
from .reading import Frame
from .results import Detections, Segmentation
from .seg_maps import Logits, argmax_of
from .tile_merging import in_tile, merge, uncut

DEFAULT_OVERLAP = 0.2
MIN_TILE = 64
MAX_OVERLAP = 0.9
# The longer side of a whole image for a detector: at most this, or two tiles if that is more. Most
# test pipelines make it smaller still.
MAX_WHOLE = 2048
# Seconds before a progress bar is shown.
BAR_DELAY = 2


class TiledModel:
    """A model that splits large images into tiles, with the methods of :class:`.model.TorchModel`.

    A tile goes through the model as an image of its own, with the resizing of the test pipeline.
    Neighbors share at least ``overlap`` of a tile's side. Detections below ``score_thr`` are left
    out before merging.
    """

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
        """Like the model's own; a large image is left as it is, to be split later."""
        if max(image.shape[:2]) <= self.tile:
            return self.model.preprocess(image)
        # One dimension more than any input of a model, so that the two are never in one batch.
        return dict(inputs=image[None], is_large=True)

    @torch.inference_mode()
    def predict(self, batch: list[dict[str, Any]]) -> list[Any]:
        """Like the model's own; for a large image, return its final prediction."""
        if 'is_large' not in batch[0]:
            return self.model.predict(batch)
        predict = self._segment if self.model.task == 'segmentation' else self._detect
        return [predict(item['inputs'][0]) for item in batch]

    def postprocess(self, raw: Any, size: tuple[int, int]) -> Detections | Segmentation:
        """Like the model's own; return the prediction of a large image as it is."""
        is_done = isinstance(raw, Detections | Segmentation)
        return raw if is_done else self.model.postprocess(raw, size)

    def _segment(self, image: np.ndarray) -> Segmentation:
        classes, gives_logits = len(self.model.classes), self.model.gives_logits
        seg_map = np.empty(image.shape[:2], np.uint8 if classes <= 255 else np.uint16)
        down, across = axes = self._axes(image)
        # Logits that those of later tiles are blended with.
        held: dict[tuple[int, int], Logits] = {}
        cells = product(range(len(down.tiles)), range(len(across.tiles)))
        for (row, column), part in zip(cells, self._run(axes, image, gives_logits), strict=True):
            if not gives_logits:
                # Later tiles replace what lies after the middle of the overlap.
                top, left = down.middles[row], across.middles[column]
                inside = part.seg_map[
                    top - down.tiles[row].start :, left - across.tiles[column].start :
                ]
                seg_map[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
                continue
            rows, columns = region = down.beginnings[row], across.beginnings[column]
            # Remove tiles that reach neither into the rest of this row nor into the next.
            held = {
                (y, x): each
                for (y, x), each in held.items()
                if down.tiles[y].stop > rows.stop
                or (down.tiles[y].stop > rows.start and across.tiles[x].stop > columns.start)
            }
            held[row, column] = part
            size = rows.stop - rows.start, columns.stop - columns.start
            planes = blend(axes, region, held)
            labels = argmax_of(planes, len(part.source), size, part.source.device)
            seg_map[region] = labels.cpu().numpy()
        return Segmentation(seg_map)

    def _detect(self, image: np.ndarray) -> Detections:
        down, across = axes = self._axes(image)
        tiles = product(down.tiles, across.tiles)
        boxes = np.array([(x.start, y.start, x.stop, y.stop) for y, x in tiles])
        found = [
            in_tile(detections.select(self.score_thr), number, boxes, image.shape[:2])
            for number, detections in enumerate(self._run(axes, image))
        ]
        whole = self._detect_whole(image).select(self.score_thr)
        sides = (whole.boxes[:, 2:] - whole.boxes[:, :2]).max(axis=1, initial=0)
        whole = whole.at(np.flatnonzero(sides > min(down.shared, across.shared)))
        return merge([*found, uncut(whole)], boxes, self.model.nms_threshold)

    def _axes(self, image: np.ndarray) -> tuple[Axis, Axis]:
        """Return the vertical and the horizontal axis."""
        return tuple(Axis(length, self.tile, self.overlap) for length in image.shape[:2])

    def _detect_whole(self, image: np.ndarray) -> Detections:
        """Detect in the whole image, which is made smaller first if it is very large."""
        height, width = image.shape[:2]
        ratio = min(1, max(MAX_WHOLE, 2 * self.tile) / max(height, width))
        small = (max(1, round(height * ratio)), max(1, round(width * ratio)))
        if ratio < 1:
            image = cv2.resize(image, small[::-1], interpolation=cv2.INTER_AREA)
        raw = self.model.predict([self.model.preprocess(image)])[0]
        return enlarge(self.model.postprocess(raw, small), small, (height, width))

    def _run(
        self, axes: tuple[Axis, Axis], image: np.ndarray, gives_logits: bool = False
    ) -> Iterator[Any]:
        """Yield the model's predictions for the tiles, or their logits, row by row."""
        model, tiles = self.model, list(product(axes[0].tiles, axes[1].tiles))
        if gives_logits:
            model = SimpleNamespace(
                preprocess=model.preprocess,
                predict=model.predict_logits,
                postprocess=lambda logits, size: logits,
            )
        num_bytes = 3 * self.tile**2
        frames = (
            Frame(Input('tile'), num_bytes, load=partial(np.ascontiguousarray, image[tile]))
            for tile in tiles
        )
        # disable=None: show the bar only on a terminal.
        options = dict(leave=False, delay=BAR_DELAY, disable=None)
        done = Pipeline(model, self.batch_size).run(frames)
        for frame in ProgressBar(done, total=len(tiles), unit='tile', **options):
            if frame.problem:
                raise ValueError(frame.problem)
            yield frame.prediction


def check_tile(tile: int | None, overlap: float | None) -> None:
    """Check the arguments of :class:`TiledModel`, or raise ConfigError; None is the default."""
    if tile is None and overlap is not None:
        raise ConfigError('an overlap needs tiles: give --tile PIXELS (tile=...) with it')
    if tile is not None and tile < MIN_TILE:
        raise ConfigError(f'tiles of {tile} pixels are too small: give {MIN_TILE} or more')
    if overlap is not None and not 0 <= overlap < MAX_OVERLAP:
        raise ConfigError(
            f'an overlap of {overlap:g} cannot work: it is the share of a tile that the next one '
            f'also covers, from 0 to below {MAX_OVERLAP}'
        )


def enlarge(found: Detections, small: tuple[int, int], size: tuple[int, int]) -> Detections:
    """Scale detections from an image's size ``small`` to ``size``, both (height, width)."""
    scale = np.divide(size, small)[::-1]
    masks = found.masks and [CompressedMask(enlarge_mask(m, scale, size)) for m in found.masks]
    boxes = (found.boxes * np.tile(scale, 2)).astype(np.float32)
    return Detections(boxes, found.scores, found.labels, masks)


def enlarge_mask(mask: CroppedMask, scale: np.ndarray, size: tuple[int, int]) -> CroppedMask:
    """Enlarge a mask by ``scale`` (horizontally, vertically) for an image of ``size``."""
    start = np.array([mask.x, mask.y])
    left, top = np.floor(start * scale).astype(int)
    right, bottom = np.floor((start + mask.pixels.shape[::-1]) * scale).astype(int)
    right, bottom = min(right, size[1]), min(bottom, size[0])
    if not mask.pixels.size:
        return CroppedMask(left, top, mask.pixels)
    pixels = mask.pixels.astype(np.uint8) * 255
    return CroppedMask(left, top, cv2.resize(pixels, (right - left, bottom - top)) > 127)


class Axis:
    """The tiles along one side of an image, of one length and spread evenly.

    ``weights``, (tiles, length of one), grow with the distance from the tile's borders, without
    those at the edge of the image. ``shared`` is the smallest overlap of neighbors in pixels;
    infinite for a single tile.
    """

    def __init__(self, length: int, tile: int, overlap: float) -> None:
        tile, step = min(tile, length), max(1, int(tile * (1 - overlap)))
        count = 1 + math.ceil((length - tile) / step)
        starts = np.linspace(0, length - tile, count).round().astype(int).tolist()
        self.tiles = [slice(start, start + tile) for start in starts]
        # The part of a tile that no later one covers.
        self.beginnings = [slice(*ends) for ends in pairwise([*starts, length])]
        shared = [start + tile - later for start, later in pairwise(starts)]
        self.shared = min(shared, default=math.inf)
        self.middles = [0, *(b + n // 2 for b, n in zip(starts[1:], shared, strict=True))]
        distance = np.arange(tile) + 0.5
        weights = np.tile(np.minimum(distance, distance[::-1]), (count, 1))
        weights[0] = distance[::-1]
        weights[-1] = distance if count > 1 else 1
        self.weights = torch.from_numpy(weights.astype(np.float32))

    def meet(self, index: int, region: slice) -> tuple[slice, slice]:
        """Return what a tile and a region share, in pixels of the region, and of the tile."""
        tile = self.tiles[index]
        start, stop = max(tile.start, region.start), min(tile.stop, region.stop)
        return tuple(slice(start - each.start, stop - each.start) for each in (region, tile))


def blend(
    axes: tuple[Axis, Axis], region: tuple[slice, slice], held: dict[tuple[int, int], Logits]
) -> Callable[[slice], Tensor]:
    """Return a function of classes: their logits in a region, summed with the tiles' weights.

    Before the softmax, as in mmseg's sliding window. The last tile covers the region.
    """
    parts = []
    for cell, logits in held.items():
        meets = [axis.meet(i, part) for axis, i, part in zip(axes, cell, region, strict=True)]
        (rows, inner_rows), (columns, inner_columns) = meets
        if rows.start < rows.stop and columns.start < columns.stop:
            weights = [axis.weights[i] for axis, i in zip(axes, cell, strict=True)]
            weights = weights[0][inner_rows, None] * weights[1][inner_columns]
            part = logits.crop(inner_rows, inner_columns)
            parts.append((rows, columns, part, weights.to(logits.source.device)))

    def planes(chosen: slice) -> Tensor:
        *others, (_, _, own, weights) = parts
        total = own.planes(chosen) * weights
        for rows, columns, part, weights in others:
            total[:, rows, columns] += part.planes(chosen) * weights
        return total

    return planes
