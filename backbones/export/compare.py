"""Whether two sets of results for one image are the same."""

from typing import NamedTuple

import numpy as np

from backbones.errors import ExportError
from backbones.inference.exported_file import Description

# What counts as the same.
SCORE_TOLERANCE = 1e-3
MIN_IOU = 0.99
MIN_SHARE_OF_PIXELS = 0.999
# Of detections whose scores are near that of the last for which there is room: an arbitrary choice.
MAX_UNCERTAIN_SHARE = 0.1
# Relative to the largest value of a map, for logits and feature maps.
FEATURE_TOLERANCE = 1e-3

Results = dict[str, np.ndarray]


def compare(expected: Results, found: Results, description: Description) -> str:
    """Compare a file's results for one image with PyTorch's.

    Args:
        expected: PyTorch's, by name of the output: ``segmentation_map`` (height, width), or
            ``boxes`` (N, 4), ``scores`` (N,), ``labels`` (N,) and perhaps ``masks`` (N, M, M), or
            maps of any other name.
        found: The file's.
        description: Of the file.

    Returns:
        The figures, in words.

    Raises:
        ExportError: They differ by more than the limits of this module.
    """
    if set(expected) != set(found):
        raise ExportError(f'the file gives {sorted(found)} instead of {sorted(expected)}')
    if 'boxes' in expected:
        return compare_detections(expected, found, description)
    for name, values in expected.items():
        if values.shape != found[name].shape:
            raise ExportError(f'{name} is of shape {found[name].shape} instead of {values.shape}')
    if 'segmentation_map' in expected:
        same = expected['segmentation_map'] == found['segmentation_map']
        if same.mean() < MIN_SHARE_OF_PIXELS:
            raise ExportError(f'only {percent(same)} of pixels are the same')
        return f'{percent(same)} of pixels'
    return compare_maps(expected, found)


def compare_maps(expected: Results, found: Results) -> str:
    """Compare logits or feature maps."""
    differences = [
        np.abs(values - found[name]).max() / max(float(np.abs(values).max()), 1e-6)
        for name, values in expected.items()
    ]
    # Unlike Python's own, this maximum is NaN where one of them is.
    worst = np.max(differences)
    figures = f'{", ".join(expected)} within {worst:.1e} of the largest value'
    if not worst <= FEATURE_TOLERANCE:
        raise ExportError(f'{figures}; it has to be within {FEATURE_TOLERANCE:.0e}')
    return figures


def compare_detections(expected: Results, found: Results, description: Description) -> str:
    """Compare detections: each has its counterpart on the other side."""
    pairs = pair(expected, found, MIN_IOU, SCORE_TOLERANCE)
    rows, counterparts = [p.expected for p in pairs], [p.found for p in pairs]
    certain = max(min_certain_score(results, description) for results in (expected, found))
    lost = count_unpaired(expected, rows, certain)
    added = count_unpaired(found, counterparts, certain)
    total = len(expected['scores'])
    uncertain = max(len(expected['scores']), len(found['scores'])) - len(pairs)
    if lost or added or uncertain > max(1, MAX_UNCERTAIN_SHARE * total):
        raise ExportError(
            f'{len(pairs)} of {total} detections are the same; of those well above the threshold '
            f'{lost} are lost and {added} are new (the same: class, IoU at least {MIN_IOU}, score '
            f'within {SCORE_TOLERANCE})'
        )
    if not pairs:
        return 'no detection, as in PyTorch'
    iou, score = min(p.iou for p in pairs), max(p.score_difference for p in pairs)
    figures = f'{len(pairs)} of {total} boxes, IoU at least {iou:.5f}, scores within {score:.1e}'
    if 'masks' not in expected:
        return figures
    threshold = description.mask_threshold
    same = (expected['masks'][rows] >= threshold) == (found['masks'][counterparts] >= threshold)
    figures += f', {percent(same)} of mask pixels'
    if same.mean() < MIN_SHARE_OF_PIXELS:
        raise ExportError(f'{figures}; {MIN_SHARE_OF_PIXELS:.1%} have to be the same')
    return figures


class Pair(NamedTuple):
    """A detection of PyTorch's and its counterpart in the file's results."""

    expected: int
    found: int
    iou: float
    score_difference: float


def pair(
    expected: Results, found: Results, min_iou: float, score_tolerance: float = 1.0
) -> list[Pair]:
    """Pairs of detections of the same class, each detection in one pair at most."""
    pairs = []
    free = np.ones(len(found['scores']), bool)
    for index, (box, score, label) in enumerate(
        zip(expected['boxes'], expected['scores'], expected['labels'], strict=True)
    ):
        ious = box_ious(box, found['boxes'])
        differences = np.abs(found['scores'] - score)
        same = free & (found['labels'] == label) & (ious >= min_iou)
        same &= differences <= score_tolerance
        if same.any():
            best = int(np.argmax(np.where(same, ious, -1)))
            free[best] = False
            pairs.append(Pair(index, best, float(ious[best]), float(differences[best])))
    return pairs


def min_certain_score(results: Results, description: Description) -> float:
    """The score above which no rounding error can leave a detection out.

    One with a score like the threshold's, or like the last for which there is room, may fall on
    either side.
    """
    lowest = description.score_threshold
    if len(results['scores']) >= description.max_per_image:
        lowest = max(lowest, float(min(results['scores'])))
    return lowest + SCORE_TOLERANCE


def count_unpaired(results: Results, paired: list[int], min_score: float) -> int:
    """Detections with a score above ``min_score`` that have no counterpart."""
    scores = enumerate(results['scores'])
    return sum(score > min_score and index not in paired for index, score in scores)


def box_ious(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """IoU of a box with each of others, all enlarged to a pixel at least.

    Clipping at the edge of the image leaves boxes so thin that their IoU would be made of rounding
    errors.
    """
    box, boxes = at_least_a_pixel(box), at_least_a_pixel(boxes)
    low, high = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=1)
    union = np.prod(box[2:] - box[:2]) + np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) - shared
    return shared / union


def at_least_a_pixel(boxes: np.ndarray) -> np.ndarray:
    """Boxes (..., 4) with every side below 1 made 1, about the same center."""
    low, high = boxes[..., :2].astype(np.float64), boxes[..., 2:].astype(np.float64)
    center, half = (low + high) / 2, np.maximum(high - low, 1) / 2
    return np.concatenate([center - half, center + half], axis=-1)


def percent(same: np.ndarray) -> str:
    """The share of true values, never rounded up to 100 %."""
    return f'{np.floor(same.mean() * 1e5) / 1e3:g} %'
