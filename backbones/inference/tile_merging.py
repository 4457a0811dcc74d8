"""Merge the detections in the tiles of an image into detections in the image.

1. Parts of one object that is cut by the borders of tiles are joined.
2. A cut part that was not joined is removed if it lies in a better detection.
3. Non-maximum suppression removes duplicates from several tiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from .drawing import overlaps
from .masks import CompressedMask, CroppedMask, extents_of
from .results import Detections

# A box that ends this close to the border of its tile counts as cut by it: a share of the tile's
# side, and at least so many pixels.
MARGIN_SHARE, MIN_MARGIN = 0.01, 2
# Parts belong to one object if their boxes and masks have this IoU in the area that both tiles see.
JOINING_IOU = 0.5
# A part is removed if this share of its area lies in a larger detection, unless its score is more
# than twice as high.
CONTAINED_SHARE, SCORE_SHARE = 0.5, 0.5


class Pieces(NamedTuple):
    """Detections in tiles, in pixels of the image; masks are compressed."""

    found: Detections
    # (N,): the index of the tile that each is from, -1 for none.
    tile: np.ndarray
    # (N, 4): whether the tile's left, top, right or bottom border cuts it.
    is_cut: np.ndarray

    def at(self, indices: np.ndarray) -> Pieces:
        return Pieces(self.found.at(indices), self.tile[indices], self.is_cut[indices])


def in_tile(found: Detections, tile: int, tiles: np.ndarray, size: tuple[int, int]) -> Pieces:
    """Return the pieces found in one of the ``tiles``, (tiles, 4), of an image of this size."""
    left, top, right, bottom = border = tiles[tile]
    boxes = found.boxes + np.float32([left, top, left, top])
    margin = max(MIN_MARGIN, MARGIN_SHARE * min(right - left, bottom - top))
    reaches = (boxes - border) * (-1, -1, 1, 1) >= -margin
    # The edge of the image cuts nothing.
    is_cut = reaches & (border != (0, 0, *size[::-1]))
    masks = found.masks and [
        CompressedMask(CroppedMask(mask.x + left, mask.y + top, mask.pixels))
        for mask in found.masks
    ]
    found = Detections(boxes, found.scores, found.labels, masks)
    return Pieces(found, np.full(len(boxes), tile), is_cut)


def uncut(found: Detections) -> Pieces:
    """Return detections as pieces that no border cuts."""
    count = len(found.boxes)
    return Pieces(found, np.full(count, -1), np.zeros((count, 4), bool))


def together(parts: Sequence[Pieces]) -> Pieces:
    columns = ((p.found.boxes, p.found.scores, p.found.labels, p.tile, p.is_cut) for p in parts)
    boxes, scores, labels, tile, is_cut = map(np.concatenate, zip(*columns, strict=True))
    masks = [mask for part in parts for mask in part.found.masks or ()]
    has_masks = any(part.found.masks is not None for part in parts)
    found = Detections(boxes, scores, labels, masks if has_masks else None)
    return Pieces(found, tile, is_cut)


def merge(parts: Sequence[Pieces], tiles: np.ndarray, nms_threshold: float) -> Detections:
    """Return the detections in the image, the highest score first."""
    # Imported here: only detectors need mmcv's operators.
    from mmcv.ops import nms

    pieces = join(together(parts), tiles)
    found = pieces.found.at(np.flatnonzero(~is_contained(pieces)))
    boxes, scores = torch.from_numpy(found.boxes), torch.from_numpy(found.scores)
    kept = np.zeros(0, np.int64)
    # Not batched_nms: it moves each class by the size of the image, and with hundreds of classes
    # float32 would round the boxes of a large image by up to a pixel.
    for label in np.unique(found.labels):
        own = np.flatnonzero(found.labels == label)
        kept = np.append(kept, own[nms(boxes[own], scores[own], nms_threshold)[1].numpy()])
    return found.at(kept[np.argsort(-found.scores[kept], kind='stable')])


def join(pieces: Pieces, tiles: np.ndarray) -> Pieces:
    """Join the parts of every object that borders cut into one with the highest of their scores.

    Its box and its mask cover all parts.
    """
    pairs = np.array(list(find_pairs(pieces, tiles)), np.int64).reshape(-1, 2)
    count = len(pieces.tile)
    graph = coo_array((np.ones(len(pairs)), pairs.T), shape=(count, count))
    group = connected_components(graph, directed=False)[1]
    order, sizes = np.argsort(group, kind='stable'), np.bincount(group)
    groups = np.split(order, sizes.cumsum()[:-1])
    whole = [unite(pieces.found.at(parts)) for parts in groups if len(parts) > 1]
    return together([pieces.at(np.flatnonzero(sizes[group] == 1)), *map(uncut, whole)])


def unite(parts: Detections) -> Detections:
    """Return one object made of its parts."""
    box = np.concatenate([parts.boxes[:, :2].min(axis=0), parts.boxes[:, 2:].max(axis=0)])
    masks = parts.masks and [union(parts.masks)]
    return Detections(box[None], parts.scores.max(keepdims=True), parts.labels[:1], masks)


def find_pairs(pieces: Pieces, tiles: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield pairs of indices of parts that belong to one object."""
    cut = np.flatnonzero(pieces.is_cut.any(axis=1))
    by_tile = {int(tile): cut[pieces.tile[cut] == tile] for tile in np.unique(pieces.tile[cut])}
    for first, mine in by_tile.items():
        for second in np.flatnonzero(overlaps(tiles[first], tiles)):
            if second > first and second in by_tile:
                yield from find_pairs_in(pieces, tiles[[first, second]], mine, by_tile[second])


def find_pairs_in(
    pieces: Pieces, tiles: np.ndarray, mine: np.ndarray, others: np.ndarray
) -> Iterator[tuple[int, int]]:
    """Yield pairs of parts in two overlapping ``tiles``: one of ``mine``, one of ``others``."""
    (one, two), found = tiles, pieces.found
    shared = np.concatenate([np.maximum(one[:2], two[:2]), np.minimum(one[2:], two[2:])])
    matches = np.zeros((len(mine), len(others)), bool)
    for side, opposite in ((0, 2), (1, 3), (2, 0), (3, 1)):
        # On this side the first tile ends inside the second, on the opposite side it is reversed.
        if shared[side] == one[side] != two[side] and (
            shared[opposite] == two[opposite] != one[opposite]
        ):
            is_cut = pieces.is_cut[mine, side][:, None], pieces.is_cut[others, opposite]
            matches |= is_cut[0] & is_cut[1]
    matches &= found.labels[mine][:, None] == found.labels[others]
    inside = [clip(found.boxes[indices], shared) for indices in (mine, others)]
    matches &= ious(inside[0][:, None], inside[1]) >= JOINING_IOU
    for pair in zip(mine[np.nonzero(matches)[0]], others[np.nonzero(matches)[1]], strict=True):
        masks = found.masks and [crop(found.masks[index], shared) for index in pair]
        if not masks or mask_iou(*masks) >= JOINING_IOU:
            yield pair


def is_contained(pieces: Pieces) -> np.ndarray:
    """Return (N,): whether a border cuts a piece, and a larger one of another tile contains it."""
    found, areas = pieces.found, areas_of(pieces.found.boxes)
    result = np.zeros(len(areas), bool)
    for part in np.flatnonzero(pieces.is_cut.any(axis=1)):
        contains = overlaps(found.boxes[part], found.boxes) >= CONTAINED_SHARE * areas[part]
        contains &= (areas > areas[part]) & (pieces.tile != pieces.tile[part])
        contains &= found.labels == found.labels[part]
        contains &= found.scores >= SCORE_SHARE * found.scores[part]
        result[part] = contains.any()
    return result


def areas_of(boxes: np.ndarray) -> np.ndarray:
    return (boxes[..., 2:] - boxes[..., :2]).prod(axis=-1)


def ious(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the IoU of boxes (..., 4), by broadcasting; 0 where both are empty."""
    shared = overlaps(first, second)
    return shared / np.maximum(areas_of(first) + areas_of(second) - shared, 1e-6)


def clip(boxes: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Return the parts of boxes (N, 4) inside a box."""
    return np.clip(boxes, np.tile(limits[:2], 2), np.tile(limits[2:], 2))


def crop(mask: CroppedMask, box: np.ndarray) -> np.ndarray:
    """Return the pixels of a mask in a box of whole pixels, (height, width), bool."""
    pixels = np.zeros((box[3] - box[1], box[2] - box[0]), bool)
    paste(mask, pixels, box[0], box[1])
    return pixels


def mask_iou(first: np.ndarray, second: np.ndarray) -> float:
    return (first & second).sum() / max((first | second).sum(), 1)


def union(masks: Sequence[CroppedMask]) -> CompressedMask:
    """Return a mask of all pixels of several masks."""
    extents = extents_of(masks)
    (left, top), (right, bottom) = extents[:, :2].min(axis=0), extents[:, 2:].max(axis=0)
    pixels = np.zeros((bottom - top, right - left), bool)
    for mask in masks:
        paste(mask, pixels, left, top)
    return CompressedMask(CroppedMask(int(left), int(top), pixels))


def paste(mask: CroppedMask, pixels: np.ndarray, left: int, top: int) -> None:
    """Add a mask to the ``pixels`` of an image that begin at this column and row."""
    source = mask.pixels[max(top - mask.y, 0) :, max(left - mask.x, 0) :]
    y, x = max(mask.y - top, 0), max(mask.x - left, 0)
    target = pixels[y : y + source.shape[0], x : x + source.shape[1]]
    target |= source[: target.shape[0], : target.shape[1]]
