"""What a report consists of: sections of blocks with tables, charts, matrices and images."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .charts import Chart, calibration_error, reliability_chart

BINS = 10
# The worst images: how many are shown, and the limits of their longer side in pixels.
MAX_IMAGES = 12
IMAGE_SIZES = (320, 512)
# A matrix of more classes shows those with most errors, and one row for all others.
MAX_CLASSES = 30
MAX_PAIRS = 10
# With at most this many classes, a matrix and the table of its errors are side by side.
MAX_HALF = 8


@dataclass
class Block:
    """A part of a section: a title, a note, and the content below them."""

    title: str
    note: str = ''
    columns: Sequence[str] = ()
    # Texts, integers, and shares: 0 to 1 or NaN, shown as a bar and in the format ``style``.
    rows: list[list[str | int | float]] = field(default_factory=list)
    style: str = '.3f'
    charts: list[Chart] = field(default_factory=list)
    more_charts: list[Chart] = field(default_factory=list)
    # For each row its numbers, and their shares of the row's sum.
    matrix: list[tuple[list[int], list[float]]] = field(default_factory=list)
    unit: str = ''
    images: list[dict[str, object]] = field(default_factory=list)
    half: bool = False


def matrix_block(matrix: np.ndarray, names: Sequence[str], unit: str, note: str) -> Block:
    """Return a confusion matrix, (N, N), rows ground truth; pixels in percent of the row."""
    errors = matrix.sum(axis=0) + matrix.sum(axis=1) - 2 * np.diag(matrix)
    if len(names) > MAX_CLASSES:
        chosen = np.sort(np.argsort(-errors, kind='stable')[: MAX_CLASSES - 1])
        note += f' The {len(chosen)} classes with most errors; “others” is the sum of all others.'
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
    """Return a table of the most frequent errors in a confusion matrix."""
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
    columns = ('ground truth', 'prediction', unit, 'share of errors', 'share of row')
    half = len(names) <= MAX_HALF
    note = note if rows else 'None.'
    return Block('Most frequent confusions', note, columns, rows, '.1%', half=half)


def calibration_block(bins: np.ndarray, note: str) -> Block:
    """Return a reliability diagram with its ECE; ``bins``: see :func:`count_by_confidence`."""
    title = f'Reliability, ECE {calibration_error(bins):.3f}'.replace('nan', '–')
    chart = reliability_chart(title, bins, ('confidence', 'fraction that is correct'))
    note += (
        ' ECE (expected calibration error) is the mean difference between confidence and the '
        'fraction that is correct, with bins weighted by their size.'
    )
    return Block('Calibration', note, charts=[chart], half=True)


def count_by_confidence(confidence: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """Return (BINS, 3): the number in each bin, the number correct, the sum of confidences."""
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    weights = (None, correct, confidence)
    return np.stack([np.bincount(place, weight, BINS) for weight in weights], axis=1)


def shown_size(height: int, width: int) -> tuple[int, int]:
    """Return the width and height at which an image of this size is shown."""
    low, high = IMAGE_SIZES
    scale = min(max(height, width, low), high) / max(height, width)
    return max(round(width * scale), 1), max(round(height * scale), 1)
