"""Check boxes and masks of objects: values that crash libraries, and the position of a box.

pycocotools does not check its input: a polygon with NaN ends the process, one with infinity uses
all memory, and a malformed run-length encoding makes it read beyond its buffer.
"""

import math
from collections.abc import Sequence
from numbers import Real

import numpy as np

NUMBERS = {int, float}
MAX_COORDINATE = 2**40


def is_number(value: object) -> bool:
    """Return whether a value is a number and not a bool."""
    return type(value) in NUMBERS or (isinstance(value, Real) and not isinstance(value, bool))


def box_fault(box: object) -> str | None:
    """Return what is wrong with the four numbers of a box; None if nothing is."""
    if not isinstance(box, (list, tuple)) or len(box) != 4 or not all(map(is_number, box)):
        return f'the box is {box!r:.80} instead of four numbers'
    # False for NaN too.
    if not all(abs(number) < MAX_COORDINATE for number in box):
        return f'the box {list(box)!r:.80} has no finite size'
    return None


def misplaced(box: Sequence[float], size: tuple[int, int] | None) -> tuple[str, str] | None:
    """Return (kind, reason) if a box [x, y, width, height] has no area or leaves its image.

    ``size`` is (width, height) of the image, or None if unknown. Returns None for a valid box.
    """
    x, y, width, height = box
    text = f'the box {list(box)} (x, y, width, height)'
    if width < 1 or height < 1:
        return 'box without area', f'{text} has no area'
    if size is None:
        return None
    frame = f'{size[0]}x{size[1]}'
    if not (-width < x < size[0] and -height < y < size[1]):
        return 'box outside the image', f'{text} is outside of {frame}'
    if min(x, y) < -1 or x + width > size[0] + 1 or y + height > size[1] + 1:
        return 'box beyond the border', f'{text} reaches out of {frame}: cut by Resize'
    return None


def mask_fault(mask: object, height: int, width: int) -> str | None:
    """Return why a COCO segmentation in an image of this size cannot be read; None if it can."""
    if not mask:
        return 'there is no mask, and the config reads masks'
    if isinstance(mask, list):
        return polygons_fault(mask, 10 * (height + width) + 1000)
    if isinstance(mask, dict):
        return run_length_fault(mask, height, width)
    return f'the mask is a {type(mask).__name__} instead of polygons or a run-length encoding'


def polygons_fault(polygons: list, limit: float) -> str | None:
    for polygon in polygons:
        # COCO has tens of millions of coordinates, too many for Python code on each.
        is_list = isinstance(polygon, (list, tuple, np.ndarray))
        if not is_list or not (set(map(type, polygon)) <= NUMBERS or all(map(is_number, polygon))):
            return f'a polygon is {polygon!r:.60} instead of a list of numbers [x1, y1, x2, ...]'
        # Comparisons with NaN may pass, but a NaN makes the sum NaN.
        if len(polygon) and not (
            -limit <= min(polygon) and max(polygon) <= limit and not math.isnan(sum(polygon))
        ):
            # pycocotools would draw its outline pixel by pixel.
            far = max(polygon, key=lambda number: math.inf if number != number else abs(number))
            return f'a polygon has the coordinate {far}, not finite or far outside the image'
    return None


def is_degenerate(polygon: list) -> bool:
    """Return whether mmdet ignores a polygon: fewer than three points, or half a point."""
    return len(polygon) < 6 or len(polygon) % 2 == 1


def run_length_fault(mask: dict, height: int, width: int) -> str | None:
    if 'size' not in mask or 'counts' not in mask:
        return f'the mask has {sorted(mask)} instead of "size" and "counts"'
    if mask['size'] not in ([height, width], (height, width)):
        return f'the mask has size {mask["size"]}, the image {[height, width]} (height, width)'
    counts = mask['counts']
    try:
        runs = decode_runs(counts) if isinstance(counts, (str, bytes)) else list(counts)
        valid = all(isinstance(run, int) and run >= 0 for run in runs)
    except (ValueError, TypeError):
        valid = False
    if not valid:
        return 'the mask\'s "counts" are no run-length encoding'
    if sum(runs) != height * width:
        return f'the mask\'s "counts" make up {sum(runs)} pixels, the image {height * width}'
    return None


def decode_runs(text: str | bytes) -> list[int]:
    """Decode the lengths of the runs in COCO's compressed encoding, or raise ValueError.

    Each is a signed number in groups of five bits, lowest first; a character is a group plus 48.
    From the fourth on, it is the difference to the length two before (cocoapi's maskApi.c).
    """
    runs: list[int] = []
    value = shift = 0
    for code in text.encode() if isinstance(text, str) else text:
        group = code - 48
        if not 0 <= group < 64:
            raise ValueError(f'no such character: {code}')
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError('it ends within a number')
    return runs
