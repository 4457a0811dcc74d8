"""Comparison of two sets of results for one image."""

from typing import NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from backbones.errors import ExportError
from backbones.inference.exported_file import Description

# Limits within which results count as the same.
SCORE_TOLERANCE = 1e-3
MIN_IOU = 0.99
MIN_SHARE_OF_PIXELS = 0.999
# Share of detections without counterpart, by rounding of scores near the limit (arbitrary choice).
MAX_UNCERTAIN_SHARE = 0.1
# For logits and feature maps, relative to the largest value of a map.
FEATURE_TOLERANCE = 1e-3

Results = dict[str, np.ndarray]


def compare(expected: Results, found: Results, description: Description) -> str:
    """Compare a file's results for one image with PyTorch's and return the figures in words.
    Raises ExportError if they differ by more than the limits of this module.

    Both are arrays by output name: ``segmentation_map`` (height, width), or ``boxes`` (N, 4),
    ``scores``, ``labels`` and optionally ``masks`` (N, M, M), or maps of any other name.
    """
    if set(expected) != set(found):
        raise ExportError(f'the file has {sorted(found)} instead of {sorted(expected)}')
    if 'boxes' in expected:
        return compare_detections(expected, found, description)
    for name, values in expected.items():
        if values.shape != found[name].shape:
            raise ExportError(f'{name} has shape {found[name].shape} instead of {values.shape}')
    if 'segmentation_map' in expected:
        same = expected['segmentation_map'] == found['segmentation_map']
        if same.mean() < MIN_SHARE_OF_PIXELS:
            raise ExportError(f'only {percent(same)} of pixels are the same')
        return f'{percent(same)} of pixels'
    differences = [
        np.abs(values - found[name]).max() / max(float(np.abs(values).max()), 1e-6)
        for name, values in expected.items()
    ]
    # Unlike Python's max, this is NaN if any difference is.
    worst = np.max(differences)
    figures = f'{", ".join(expected)} within {worst:.1e} of the largest value'
    if not worst <= FEATURE_TOLERANCE:
        raise ExportError(f'{figures}; the limit is {FEATURE_TOLERANCE:.0e}')
    return figures


def compare_detections(expected: Results, found: Results, description: Description) -> str:
    """Compare detections: each must have a counterpart on the other side."""
    pairs = pair(expected, found, MIN_IOU, SCORE_TOLERANCE)
    rows, counterparts = [p.expected for p in pairs], [p.found for p in pairs]
    # By a rounding error, scores near the threshold, or near the lowest when max_per_image are
    # found, may be on either side.
    full = [each for each in (expected, found) if len(each['scores']) >= description.max_per_image]
    lowest = [description.score_threshold, *(min(each['scores']) for each in full)]
    certain = max(lowest) + SCORE_TOLERANCE
    lost = np.sum(np.delete(expected['scores'], rows) > certain)
    added = np.sum(np.delete(found['scores'], counterparts) > certain)
    total = len(expected['scores'])
    uncertain = max(len(expected['scores']), len(found['scores'])) - len(pairs)
    if lost or added or uncertain > max(1, MAX_UNCERTAIN_SHARE * total):
        raise ExportError(
            f'{len(pairs)} of {total} detections are the same; of those well above the threshold '
            f'{lost} are lost and {added} are new (the same: equal class, IoU at least {MIN_IOU}, '
            f'scores within {SCORE_TOLERANCE})'
        )
    if not pairs:
        return f'no detection with a score above {certain:g}, as in PyTorch'
    iou, score = min(p.iou for p in pairs), max(p.score_difference for p in pairs)
    figures = f'{len(pairs)} of {total} boxes, IoU at least {iou:.5f}, scores within {score:.1e}'
    if 'masks' not in expected:
        return figures
    threshold = description.mask_threshold
    same = (expected['masks'][rows] >= threshold) == (found['masks'][counterparts] >= threshold)
    figures += f', {percent(same)} of mask pixels'
    if same.mean() < MIN_SHARE_OF_PIXELS:
        raise ExportError(f'{figures}; {MIN_SHARE_OF_PIXELS:.1%} must be the same')
    return figures


class Pair(NamedTuple):
    """A detection by PyTorch and its counterpart in the file's results."""

    expected: int
    found: int
    iou: float
    score_difference: float


def pair(
    expected: Results, found: Results, min_iou: float, score_tolerance: float = 1.0
) -> list[Pair]:
    """Return pairs of detections of the same class, with each detection in at most one pair."""
    pairs, count = [], len(found['scores'])
    free = np.ones(count, bool)
    boxes = [at_least_a_pixel(results['boxes']) for results in (expected, found)]
    # Without boxes on one side pycocotools returns an empty list.
    all_ious = np.reshape(coco_mask.iou(*boxes, [0] * count), (len(expected['scores']), count))
    for index, (ious, score, label) in enumerate(
        zip(all_ious, expected['scores'], expected['labels'], strict=True)
    ):
        differences = np.abs(found['scores'] - score)
        same = free & (found['labels'] == label) & (ious >= min_iou)
        same &= differences <= score_tolerance
        if same.any():
            best = int(np.argmax(np.where(same, ious, -1)))
            free[best] = False
            pairs.append(Pair(index, best, float(ious[best]), float(differences[best])))
    return pairs


def at_least_a_pixel(boxes: np.ndarray) -> np.ndarray:
    """Return boxes (N, 4) as left, top, width and height, with sides of at least 1 pixel.

    Clipping at the edge of the image leaves some boxes so thin that rounding errors would decide
    their IoU.
    """
    low, high = boxes[:, :2].astype(np.float64), boxes[:, 2:].astype(np.float64)
    sides = np.maximum(high - low, 1)
    return np.concatenate([(low + high - sides) / 2, sides], axis=1)


def percent(same: np.ndarray) -> str:
    """Return the share of true values as text, never rounded up to 100 %."""
    return f'{np.floor(same.mean() * 1e5) / 1e3:g} %'
