"""Whether an exported file's results are those of the model in PyTorch."""

from dataclasses import dataclass

import numpy as np

from backbones.errors import ExportError

from .description import Description

# What counts as the same.
SCORE_TOLERANCE = 1e-3
LEAST_IOU = 0.99
LEAST_SHARE_OF_PIXELS = 0.999
# Of detections about as sure as the last that there is room for: which is arbitrary.
LARGEST_UNCERTAIN_SHARE = 0.1
# Relative to the largest value of a map, for logits and feature maps.
FEATURE_TOLERANCE = 1e-3

Results = dict[str, np.ndarray]


def compare(expected: Results, found: Results, description: Description) -> str:
    """Compare the results for one picture.

    Args:
        expected: PyTorch's, by name of the output: ``label_map`` (height, width), or ``boxes``
            (N, 4), ``scores`` (N,), ``labels`` (N,) and perhaps ``masks`` (N, M, M), or maps of
            any other name.
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
    if 'label_map' in expected:
        return compare_label_maps(expected['label_map'], found['label_map'])
    return compare_maps(expected, found)


def compare_label_maps(expected: np.ndarray, found: np.ndarray) -> str:
    """Compare label maps pixel by pixel."""
    check_shape('label_map', expected, found)
    share = float(np.mean(expected == found))
    figures = f'{percent(share)} of label pixels'
    if share < LEAST_SHARE_OF_PIXELS:
        raise ExportError(f'only {figures} are the same; {percent(LEAST_SHARE_OF_PIXELS)} have to')
    return figures


def compare_maps(expected: Results, found: Results) -> str:
    """Compare logits or feature maps."""
    differences = []
    for name, values in expected.items():
        check_shape(name, values, found[name])
        largest = max(float(np.abs(values).max()), 1e-6)
        differences.append(np.abs(values - found[name]).max() / largest)
    # Unlike Python's own, this maximum is not a number where one of them is none.
    worst = np.max(differences)
    figures = f'{", ".join(expected)} within {worst:.1e} of the largest value'
    if not worst <= FEATURE_TOLERANCE:
        raise ExportError(f'{figures}; it has to be within {FEATURE_TOLERANCE:.0e}')
    return figures


@dataclass(frozen=True)
class Pair:
    """A detection of PyTorch's and its counterpart in the file's results."""

    expected: int
    found: int
    iou: float
    score_difference: float


def compare_detections(expected: Results, found: Results, description: Description) -> str:
    """Compare detections: each has its counterpart on the other side."""
    pairs = pair(expected, found)
    paired = {p.expected for p in pairs}, {p.found for p in pairs}
    least = max(least_certain_score(results, description) for results in (expected, found))
    lost = count_unpaired(expected, paired[0], least)
    added = count_unpaired(found, paired[1], least)
    total = len(expected['scores'])
    uncertain = max(len(expected['scores']), len(found['scores'])) - len(pairs)
    if lost or added or uncertain > max(1, LARGEST_UNCERTAIN_SHARE * total):
        raise ExportError(
            f'{len(pairs)} of {total} detections are the same; of the sure ones {lost} are lost '
            f'and {added} are new (the same: class, IoU at least {LEAST_IOU}, score within '
            f'{SCORE_TOLERANCE})'
        )
    if not pairs:
        return 'no detection, as in PyTorch'
    iou, score = min(p.iou for p in pairs), max(p.score_difference for p in pairs)
    figures = f'{len(pairs)} of {total} boxes, IoU at least {iou:.5f}, scores within {score:.1e}'
    if 'masks' not in expected:
        return figures
    rows, counterparts = [p.expected for p in pairs], [p.found for p in pairs]
    masks = [
        results['masks'][index] >= description.mask_threshold
        for results, index in ((expected, rows), (found, counterparts))
    ]
    share = float(np.mean(masks[0] == masks[1]))
    figures += f', {percent(share)} of mask pixels'
    if share < LEAST_SHARE_OF_PIXELS:
        raise ExportError(f'{figures}; {percent(LEAST_SHARE_OF_PIXELS)} have to be the same')
    return figures


def pair(expected: Results, found: Results) -> list[Pair]:
    """Pairs of detections that are the same, each detection in one at most."""
    pairs = []
    free = np.ones(len(found['scores']), bool)
    for index, (box, score, label) in enumerate(
        zip(expected['boxes'], expected['scores'], expected['labels'], strict=True)
    ):
        ious = overlaps(box, found['boxes'])
        differences = np.abs(found['scores'] - score)
        same = free & (found['labels'] == label) & (ious >= LEAST_IOU)
        same &= differences <= SCORE_TOLERANCE
        if same.any():
            best = int(np.argmax(np.where(same, ious, -1)))
            free[best] = False
            pairs.append(Pair(index, best, float(ious[best]), float(differences[best])))
    return pairs


def least_certain_score(results: Results, description: Description) -> float:
    """The score above which a detection cannot have been left out for a rounding error.

    What is about as sure as the threshold, or as the last of as many as there may be, may fall on
    either side.
    """
    least = description.score_threshold
    if len(results['scores']) >= description.max_per_picture:
        least = max(least, float(min(results['scores'])))
    return least + SCORE_TOLERANCE


def count_unpaired(results: Results, paired: set[int], least: float) -> int:
    """Detections surer than ``least`` that have no counterpart."""
    scores = enumerate(results['scores'])
    return sum(score > least and index not in paired for index, score in scores)


def overlaps(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """IoU of a box with each of others, all made as wide and as high as a pixel at least.

    Clipping at the picture's edge leaves boxes so thin, without area even, that rounding errors
    of their corners are all that an IoU would be made of.
    """
    box, boxes = at_least_a_pixel(box), at_least_a_pixel(boxes)
    low, high = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=1)
    union = np.prod(box[2:] - box[:2]) + np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) - shared
    return shared / union


def at_least_a_pixel(boxes: np.ndarray) -> np.ndarray:
    """Boxes (..., 4) with every side that is shorter than 1 made 1, about the same centre."""
    low, high = boxes[..., :2].astype(np.float64), boxes[..., 2:].astype(np.float64)
    centre, half = (low + high) / 2, np.maximum(high - low, 1) / 2
    return np.concatenate([centre - half, centre + half], axis=-1)


def check_shape(name: str, expected: np.ndarray, found: np.ndarray) -> None:
    if expected.shape != found.shape:
        raise ExportError(f'{name} is of shape {found.shape} instead of {expected.shape}')


def percent(share: float) -> str:
    """A share in percent, never rounded up to 100."""
    return f'{np.floor(share * 1e5) / 1e3:g} %'
