"""Detections in the tiles of an image become detections in the image.

1. Parts of one object, which borders of tiles cut, are joined.
2. What a border cuts and nothing was joined to goes where it lies in a better detection.
3. Non-maximum suppression removes what several tiles saw.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from .drawing import overlaps
from .masks import CompressedMask, CroppedMask
from .results import Detections

# A box that ends this close to the border of its tile is taken to go on behind it: a share of the
# tile's side, and pixels.
MARGIN_SHARE, MIN_MARGIN = 0.01, 2
# Parts belong to one object where their boxes and masks have this IoU inside what both tiles see.
JOINING_IOU = 0.5
# A part goes where this share of its area lies in a larger detection, unless its score is more
# than twice as high.
CONTAINED_SHARE, SCORE_SHARE = 0.5, 0.5
# Parts that are compared with all detections at a time, so that memory is bounded.
CHUNK = 256
# In place of the index of a tile.
WHOLE, JOINED = -1, -2


class Pieces:
    """What was found in each tile, in pixels of the image.

    Args:
        tiles: (tiles, 4): left, top, right, bottom of each.
        size: Height and width of the image.
    """

    def __init__(self, tiles: np.ndarray, size: tuple[int, int]) -> None:
        self.tiles, self.size = tiles, size
        # (N, 4), (N,), (N,); as of Detections.
        self.boxes = np.empty((0, 4), np.float32)
        self.scores, self.labels = np.empty(0, np.float32), np.empty(0, np.int64)
        # Compressed; None as long as there are none.
        self.masks: list[CompressedMask] | None = None
        # (N,): which tile it is from; (N, 4): whether the tile's left, top, right or bottom border
        # cuts it.
        self.tile, self.is_cut = np.empty(0, np.int64), np.empty((0, 4), bool)

    def add(self, tile: int, found: Detections) -> None:
        """Add what was found in a tile, in pixels of the tile."""
        left, top, right, bottom = border = self.tiles[tile]
        boxes = found.boxes + np.float32([left, top, left, top])
        margin = max(MIN_MARGIN, MARGIN_SHARE * min(right - left, bottom - top))
        reaches = (boxes - border) * (-1, -1, 1, 1) >= -margin
        # Nothing goes on behind the edge of the image.
        is_cut = reaches & (border != (0, 0, *self.size[::-1]))
        masks = found.masks and [CroppedMask(m.x + left, m.y + top, m.pixels) for m in found.masks]
        self.append(Detections(boxes, found.scores, found.labels, masks), tile, is_cut)

    def add_whole(self, found: Detections, min_side: float) -> None:
        """Add what was found in the whole image, if it is wider or higher than ``min_side``."""
        is_large = (found.boxes[:, 2:] - found.boxes[:, :2]).max(axis=1, initial=0) > min_side
        found = found.at(np.flatnonzero(is_large))
        self.append(found, WHOLE, np.zeros((len(found.boxes), 4), bool))

    def append(self, found: Detections, tile: int, is_cut: np.ndarray) -> None:
        self.boxes = np.concatenate([self.boxes, found.boxes.astype(np.float32)])
        self.scores = np.concatenate([self.scores, found.scores])
        self.labels = np.concatenate([self.labels, found.labels])
        self.tile = np.concatenate([self.tile, np.full(len(found.boxes), tile)])
        self.is_cut = np.concatenate([self.is_cut, is_cut])
        if found.masks is not None:
            self.masks = self.masks or []
            self.masks.extend(map(compressed, found.masks))

    def at(self, indices: np.ndarray) -> Pieces:
        """These only."""
        chosen = Pieces(self.tiles, self.size)
        for name in ('boxes', 'scores', 'labels', 'tile', 'is_cut'):
            setattr(chosen, name, getattr(self, name)[indices])
        chosen.masks = self.masks and [self.masks[index] for index in indices]
        return chosen


def merge(pieces: Pieces, nms_threshold: float) -> Detections:
    """The detections in the image, the highest score first."""
    # Of the operators that detectors need as well.
    from mmcv.ops import batched_nms

    pieces = join(pieces)
    pieces = pieces.at(np.flatnonzero(~is_contained(pieces)))
    found = Detections(pieces.boxes, pieces.scores, pieces.labels, pieces.masks)
    if not len(found.boxes):
        return found
    boxes, scores, labels = map(torch.from_numpy, (found.boxes, found.scores, found.labels))
    settings = dict(type='nms', iou_threshold=nms_threshold)
    return found.at(batched_nms(boxes, scores, labels, settings)[1].numpy())


def join(pieces: Pieces) -> Pieces:
    """Replace the parts of every object that borders cut by one with the highest of their scores.

    Its box and its mask are those of all parts together.
    """
    pairs = np.array(list(find_pairs(pieces)), np.int64).reshape(-1, 2)
    count = len(pieces.boxes)
    graph = coo_array((np.ones(len(pairs)), pairs.T), shape=(count, count))
    group = connected_components(graph, directed=False)[1]
    order, sizes = np.argsort(group, kind='stable'), np.bincount(group)
    groups = np.split(order, sizes.cumsum()[:-1])
    joined = pieces.at(np.flatnonzero(sizes[group] == 1))
    wholes = [unite(pieces.at(parts)) for parts in groups if len(parts) > 1]
    if wholes:
        boxes, scores, labels, masks = zip(*wholes, strict=True)
        masks = None if pieces.masks is None else list(masks)
        found = Detections(np.stack(boxes), np.stack(scores), np.stack(labels), masks)
        joined.append(found, JOINED, np.zeros((len(wholes), 4), bool))
    return joined


def unite(parts: Pieces) -> tuple[np.ndarray, np.float32, np.int64, CompressedMask | None]:
    """Box, score, label and mask of an object."""
    box = np.concatenate([parts.boxes[:, :2].min(axis=0), parts.boxes[:, 2:].max(axis=0)])
    mask = None if parts.masks is None else union(parts.masks)
    return box, parts.scores.max(), parts.labels[0], mask


def find_pairs(pieces: Pieces) -> Iterator[tuple[int, int]]:
    """The indices of parts that belong to one object."""
    cut = np.flatnonzero(pieces.is_cut.any(axis=1))
    by_tile = {int(tile): cut[pieces.tile[cut] == tile] for tile in np.unique(pieces.tile[cut])}
    for first, mine in by_tile.items():
        for second in np.flatnonzero(overlaps(pieces.tiles[first], pieces.tiles)):
            if second > first and second in by_tile:
                yield from find_pairs_in(pieces, (first, second), mine, by_tile[second])


def find_pairs_in(
    pieces: Pieces, tiles: tuple[int, int], mine: np.ndarray, others: np.ndarray
) -> Iterator[tuple[int, int]]:
    """Those of the first of two tiles that overlap (``mine``) with those of the second."""
    one, two = pieces.tiles[list(tiles)]
    shared = np.concatenate([np.maximum(one[:2], two[:2]), np.minimum(one[2:], two[2:])])
    matches = np.zeros((len(mine), len(others)), bool)
    for side, opposite in ((0, 2), (1, 3), (2, 0), (3, 1)):
        # The first tile ends inside the second, which on the other side ends inside the first.
        if shared[side] == one[side] != two[side] and (
            shared[opposite] == two[opposite] != one[opposite]
        ):
            is_cut = pieces.is_cut[mine, side][:, None], pieces.is_cut[others, opposite]
            matches |= is_cut[0] & is_cut[1]
    matches &= pieces.labels[mine][:, None] == pieces.labels[others]
    inside = [clip(pieces.boxes[indices], shared) for indices in (mine, others)]
    matches &= ious(inside[0][:, None], inside[1]) >= JOINING_IOU
    for pair in zip(mine[np.nonzero(matches)[0]], others[np.nonzero(matches)[1]], strict=True):
        masks = pieces.masks and [crop(pieces.masks[index], shared) for index in pair]
        if not masks or mask_iou(*masks) >= JOINING_IOU:
            yield pair


def is_contained(pieces: Pieces) -> np.ndarray:
    """(N,): whether a border cuts it and it lies in a larger detection from elsewhere."""
    areas, result = areas_of(pieces.boxes), np.zeros(len(pieces.boxes), bool)
    cut = np.flatnonzero(pieces.is_cut.any(axis=1))
    for start in range(0, len(cut), CHUNK):
        part = cut[start : start + CHUNK, None]
        contains = overlaps(pieces.boxes[part], pieces.boxes) >= CONTAINED_SHARE * areas[part]
        contains &= (areas > areas[part]) & (pieces.tile != pieces.tile[part])
        contains &= pieces.labels == pieces.labels[part]
        contains &= pieces.scores >= SCORE_SHARE * pieces.scores[part]
        result[part[:, 0]] = contains.any(axis=1)
    return result


def areas_of(boxes: np.ndarray) -> np.ndarray:
    return (boxes[..., 2:] - boxes[..., :2]).prod(axis=-1)


def ious(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes (..., 4), by broadcasting; 0 where both are empty."""
    shared = overlaps(first, second)
    return shared / np.maximum(areas_of(first) + areas_of(second) - shared, 1e-6)


def clip(boxes: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """The parts of boxes (N, 4) inside a box."""
    return np.clip(boxes, np.tile(limits[:2], 2), np.tile(limits[2:], 2))


def crop(mask: CroppedMask, box: np.ndarray) -> np.ndarray:
    """The pixels of a mask in a box of whole pixels, (height, width), bool."""
    pixels = np.zeros((box[3] - box[1], box[2] - box[0]), bool)
    paste(mask, pixels, box[0], box[1])
    return pixels


def mask_iou(first: np.ndarray, second: np.ndarray) -> float:
    return (first & second).sum() / max((first | second).sum(), 1)


def union(masks: Sequence[CroppedMask]) -> CompressedMask:
    """All pixels of several masks."""
    shapes = np.array([mask.shape for mask in masks])
    starts = np.array([(mask.y, mask.x) for mask in masks])
    (top, left), size = starts.min(axis=0), (starts + shapes).max(axis=0) - starts.min(axis=0)
    pixels = np.zeros(size, bool)
    for mask in masks:
        paste(mask, pixels, left, top)
    return CompressedMask(CroppedMask(int(left), int(top), pixels))


def compressed(mask: CroppedMask | CompressedMask) -> CompressedMask:
    return mask if isinstance(mask, CompressedMask) else CompressedMask(mask)


def paste(mask: CroppedMask, pixels: np.ndarray, left: int, top: int) -> None:
    """Add the pixels of a mask to those of an image from this column and row on."""
    source = mask.pixels[max(top - mask.y, 0) :, max(left - mask.x, 0) :]
    y, x = max(mask.y - top, 0), max(mask.x - left, 0)
    target = pixels[y : y + source.shape[0], x : x + source.shape[1]]
    target |= source[: target.shape[0], : target.shape[1]]
