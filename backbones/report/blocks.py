"""What a report consists of: sections of blocks with tables, charts, matrices and images."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .charts import Chart, calibration_error, reliability_chart

BINS = 10
# Of the worst images: how many, and the limits of their longer side in pixels.
MAX_IMAGES = 12
IMAGE_SIZES = (320, 512)
# A matrix of more classes has those with most errors, and one row for all others.
MAX_CLASSES = 30
MAX_PAIRS = 10
# What a matrix may have to stand beside the table of its largest errors.
MAX_HALF = 8


@dataclass
class Block:
    """A part of a section: a title, a note, and what is below them."""

    title: str
    note: str = ''
    columns: Sequence[str] = ()
    # Texts, whole numbers, and shares of 0 to 1 or NaN, which have a bar and this format.
    rows: list[list[str | int | float]] = field(default_factory=list)
    style: str = '.3f'
    charts: list[Chart] = field(default_factory=list)
    more_charts: list[Chart] = field(default_factory=list)
    # Of each row its numbers, and their shares of it.
    matrix: list[tuple[list[int], list[float]]] = field(default_factory=list)
    unit: str = ''
    images: list[dict[str, object]] = field(default_factory=list)
    half: bool = False


def matrix_block(matrix: np.ndarray, names: Sequence[str], unit: str, note: str) -> Block:
    """A confusion matrix, (N, N), rows ground truth; pixels are shown in per cent of the row."""
    errors = matrix.sum(axis=0) + matrix.sum(axis=1) - 2 * np.diag(matrix)
    if len(names) > MAX_CLASSES:
        chosen = np.sort(np.argsort(-errors, kind='stable')[: MAX_CLASSES - 1])
        note += f' The {len(chosen)} with most errors; “others” are all others together.'
        groups = np.full(len(names), len(chosen))
        groups[chosen] = np.arange(len(chosen))
        folded = np.zeros((len(chosen) + 1, len(chosen) + 1), np.int64)
        np.add.at(folded, (groups[:, None], groups), matrix)
        matrix, names = folded, [*(names[index] for index in chosen), 'others']
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    rows = list(zip(matrix.tolist(), shares.tolist(), strict=True))
    half = len(names) <= MAX_HALF
    return Block('Confusion matrix', note, names, matrix=rows, unit=unit, half=half)


def pair_block(matrix: np.ndarray, names: Sequence[str], unit: str, note: str) -> Block:
    """The most frequent errors of a confusion matrix."""
    wrong = matrix - np.diag(np.diag(matrix))
    order = [divmod(int(i), len(names)) for i in np.argsort(-wrong, axis=None, kind='stable')]
    rows = [
        [
            names[i],
            names[j],
            int(wrong[i, j]),
            wrong[i, j] / wrong.sum(),
            wrong[i, j] / matrix[i].sum(),
        ]
        for i, j in order[:MAX_PAIRS]
        if wrong[i, j]
    ]
    columns = ('ground truth', 'prediction', unit, 'of errors', 'of row')
    half = len(names) <= MAX_HALF
    return Block('Most frequent confusions', note, columns, rows, '.1%', half=half)


def calibration_block(bins: np.ndarray, note: str) -> Block:
    """Whether confidences are the shares of what is correct; see :func:`count_by_confidence`."""
    title = f'Reliability, ECE {calibration_error(bins):.3f}'.replace('nan', '–')
    chart = reliability_chart(title, bins, ('confidence', 'share that is correct'))
    note += (
        ' ECE is the mean distance of confidence from the share that is correct, bins weighted by '
        'their numbers.'
    )
    return Block('Calibration', note, charts=[chart], half=True)


def count_by_confidence(confidence: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """(BINS, 3): how many, how many that are correct, the sum of their confidences."""
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    weights = (None, correct, confidence)
    return np.stack([np.bincount(place, weight, BINS) for weight in weights], axis=1)


def shown_size(height: int, width: int) -> tuple[int, int]:
    """Width and height in which an image of some size is shown."""
    low, high = IMAGE_SIZES
    scale = min(max(height, width, low), high) / max(height, width)
    return max(round(width * scale), 1), max(round(height * scale), 1)
