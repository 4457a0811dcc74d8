"""Predictions as data: COCO's results format for detection, indexed PNGs for segmentation."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from backbones.files import atomic_write

from .masks import encode_mask
from .prediction import Detections, Segmentation

CATEGORIES_NAME = 'categories.json'

COCO_CLASSES = 80
# Numbers that COCO's categories, counted from 1 to 90, leave out.
COCO_GAPS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)


def categories_of(classes: tuple[str, ...]) -> list[dict[str, Any]]:
    """The classes as COCO's ``categories``: COCO's own numbers for its 80, else from 1 on."""
    is_coco = len(classes) == COCO_CLASSES and (classes[0], classes[-1]) == ('person', 'toothbrush')
    skipped = COCO_GAPS if is_coco else ()
    numbers = (number for number in itertools.count(1) if number not in skipped)
    return [{'id': number, 'name': name} for number, name in zip(numbers, classes, strict=False)]


def coco_results(
    detections: Detections,
    size: tuple[int, int],
    image_id: int | str,
    categories: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Detections in COCO's results format, masks run-length encoded.

    Args:
        detections: The detections of a picture.
        size: Height and width of the picture.
        image_id: What names the picture in every result.
        categories: From :func:`categories_of`.
    """
    results = []
    for index, (left, top, right, bottom) in enumerate(detections.boxes.tolist()):
        result = {
            'image_id': image_id,
            'category_id': categories[int(detections.labels[index])]['id'],
            'bbox': [round(value, 2) for value in (left, top, right - left, bottom - top)],
            'score': round(float(detections.scores[index]), 5),
        }
        if detections.masks is not None:
            result['segmentation'] = encode_mask(detections.masks[index], size)
        results.append(result)
    return results


def image_id_of(name: str) -> int | str:
    """COCO's pictures are named by their number, ``000000000139.jpg``; others keep their name."""
    stem = Path(name).stem
    return int(stem) if stem.isdecimal() and stem.isascii() else name


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with atomic_write(path) as temporary:
        text = json.dumps(content, ensure_ascii=False) + '\n'
        # What is no text in a name becomes one of JSON's escapes.
        temporary.write_text(text, encoding='utf-8', errors='backslashreplace')


def write_label_map(
    path: Path, segmentation: Segmentation, palette: list[tuple[int, int, int]]
) -> None:
    """Write a PNG whose values are class indices, whole or not at all.

    Up to 255 classes are an indexed PNG in the palette's colours, more a 16-bit one.

    Args:
        path: Where it goes.
        segmentation: What to write.
        palette: (R, G, B) of each class.
    """
    picture = Image.fromarray(segmentation.label_map)
    if segmentation.label_map.dtype == np.uint8:
        picture = picture.convert('P') if picture.mode != 'P' else picture
        colours = [channel for colour in palette for channel in colour]
        picture.putpalette(colours + [0] * (768 - len(colours)))
    with atomic_write(path) as temporary, temporary.open('wb') as file:
        picture.save(file, format='PNG', compress_level=3)
