"""What a model predicts for an image, and the files of it that other programs read."""

import hashlib
import io
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from .masks import CompressedMask, CroppedMask, crop_masks, encode_mask, extents_of

COCO_CLASSES = 80
# COCO numbers its 80 categories from 1 to 90 and leaves these out.
COCO_GAPS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
# The IoU threshold of non-maximum suppression, if a model does not say it.
NMS_THRESHOLD = 0.5


@dataclass(frozen=True)
class Detections:
    """Objects in an image, the highest score first.

    Attributes:
        boxes: (N, 4), float32: left, top, right, bottom in pixels of the image.
        scores: (N,), float32, 0 to 1; None for ground truth, never for predictions.
        labels: (N,), int64, index into the model's class names.
        masks: The mask of each object, or None if the model has no masks; compressed for an image
            in tiles.
    """

    boxes: np.ndarray
    scores: np.ndarray | None
    labels: np.ndarray
    masks: Sequence[CroppedMask] | None = None

    def select(self, score_thr: float, labels: Sequence[int] | None = None) -> 'Detections':
        """Return detections with at least this score, of these classes only (None: of all)."""
        selected = self.scores >= score_thr
        if labels is not None:
            selected &= np.isin(self.labels, labels)
        return self.at(np.flatnonzero(selected))

    def at(self, indices: np.ndarray) -> 'Detections':
        """Return the detections with these indices, in this order."""
        masks = None if self.masks is None else [self.masks[index] for index in indices]
        scores = None if self.scores is None else self.scores[indices]
        return Detections(self.boxes[indices], scores, self.labels[indices], masks)


@dataclass(frozen=True)
class Segmentation:
    """A class for every pixel of an image.

    Attributes:
        seg_map: (height, width), index into the model's class names; uint8, or uint16 for more
            than 255 classes. The largest value of the type marks pixels without a class.
    """

    seg_map: np.ndarray

    def select(self, labels: Sequence[int] | None) -> 'Segmentation':
        """Keep these classes only (None: all); other pixels get the largest value of the type."""
        if labels is None:
            return self
        ignored = np.iinfo(self.seg_map.dtype).max
        return Segmentation(np.where(np.isin(self.seg_map, labels), self.seg_map, ignored))


def categories_of(classes: Sequence[str], task: str) -> list[dict[str, Any]]:
    """Return COCO's ``categories``; ids: a segmentation's labels, COCO's own, else from 1 on."""
    if task == 'segmentation':
        ids = itertools.count()
    elif len(classes) == COCO_CLASSES and (classes[0], classes[-1]) == ('person', 'toothbrush'):
        ids = (number for number in itertools.count(1) if number not in COCO_GAPS)
    else:
        ids = itertools.count(1)
    return [{'id': number, 'name': name} for number, name in zip(ids, classes, strict=False)]


def image_id_of(name: str, frame: int | None = None) -> int:
    """Return an image's id for COCO's results: the number in COCO's names, else a 53-bit hash."""
    if frame is None and re.fullmatch('[0-9]{12}', PurePosixPath(name).stem):
        return int(PurePosixPath(name).stem)
    key = name if frame is None else f'{name}#{frame}'
    digest = hashlib.sha256(key.encode('utf-8', 'surrogateescape')).digest()
    return int.from_bytes(digest[:7], 'big') >> 3


def coco_results(
    detections: Detections,
    size: tuple[int, int],
    image: dict[str, Any],
    categories: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Return detections in COCO's results format; each gets the entries of ``image``."""
    results = []
    for index, (left, top, right, bottom) in enumerate(detections.boxes.tolist()):
        result = {
            **image,
            'category_id': categories[int(detections.labels[index])]['id'],
            'bbox': [round(value, 2) for value in (left, top, right - left, bottom - top)],
        }
        if detections.scores is not None:
            result['score'] = round(float(detections.scores[index]), 5)
        if detections.masks is not None:
            result['segmentation'] = encode_mask(detections.masks[index], size)
        results.append(result)
    return results


def regions_of(segmentation: Segmentation) -> Detections:
    """Return a segmentation's regions as detections without scores: one mask for each class."""
    values = np.unique(segmentation.seg_map)
    labels = values[values != np.iinfo(segmentation.seg_map.dtype).max].astype(np.int64)
    masks = [
        CompressedMask(crop_masks((segmentation.seg_map == label)[None])[0]) for label in labels
    ]
    return Detections(extents_of(masks).astype(np.float32), None, labels, masks)


def to_json(content: Any) -> bytes:
    """Return a line of JSON in UTF-8; bytes of a file name that are not text are escaped."""
    return f'{json.dumps(content, ensure_ascii=False)}\n'.encode(errors='backslashreplace')


def encode_seg_map(segmentation: Segmentation, palette: Sequence[tuple[int, int, int]]) -> bytes:
    """Return a PNG whose values are labels: indexed with the palette's colors, or 16-bit."""
    image = Image.fromarray(segmentation.seg_map)
    if segmentation.seg_map.dtype == np.uint8:
        channels = [channel for color in palette for channel in color]
        image.putpalette(channels + [0] * (768 - len(channels)))
    file = io.BytesIO()
    image.save(file, format='PNG', compress_level=3)
    return file.getvalue()
