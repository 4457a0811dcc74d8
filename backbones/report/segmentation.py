"""The section of a report about segmentation maps: pixels by class, boundary and confidence."""

import heapq
import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from torch import Tensor

from backbones.inference.results import Segmentation

from .blocks import (
    MAX_IMAGES,
    Block,
    calibration_block,
    count_by_confidence,
    matrix_block,
    pair_block,
    shown_size,
)

# Distances from a boundary of the ground truth, in pixels.
DISTANCES = (1, 2, 4, 8, 16, 32)
# Confidence is counted in every such column and row.
STEP = 4


class PixelMetric(BaseMetric):
    """Counts pixels beside mmseg's IoUMetric, in any number of processes.

    It keeps a few hundred numbers for an image, and the maps of the worst ones, made small.
    """

    default_prefix = 'report'

    def __init__(self, classes: Sequence[str], ignore_index: int) -> None:
        super().__init__()
        self.classes, self.ignore_index = list(classes), ignore_index
        # Of the images whose maps are kept: (-mean IoU, index in the results), the best first.
        self.kept: list[tuple[float, int]] = []

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        for sample in data_samples:
            truth, prediction = (
                sample[name]['data'].squeeze().cpu().numpy().astype(np.int64)
                for name in ('gt_sem_seg', 'pred_sem_seg')
            )
            result = self.count(truth, prediction)
            result['path'], logits = sample['img_path'], sample.get('seg_logits')
            result['calibration'] = logits and self.calibrate(logits['data'], truth, prediction)
            self.results.append(result)
            if result['mIoU'] < 1:
                self.keep_maps(result, truth, prediction)

    def count(self, truth: np.ndarray, prediction: np.ndarray) -> dict[str, Any]:
        """Return the counts of an image, whose maps are (H, W)."""
        size = len(self.classes)
        valid = (truth != self.ignore_index) & (truth < size) & (prediction < size)
        pairs = np.bincount(truth[valid] * size + prediction[valid], minlength=size * size)
        cells = np.flatnonzero(pairs)
        zone = np.searchsorted(DISTANCES, boundary_distance(truth), side='right')
        wrong = valid & (truth != prediction)
        near = [np.bincount(zone[mask], minlength=len(DISTANCES) + 1) for mask in (valid, wrong)]
        matrix = pairs.reshape(size, size)
        present = matrix.any(axis=1)
        score = float(ious(matrix)[present].mean()) if present.any() else math.inf
        return {'cells': cells, 'counts': pairs[cells], 'near': np.stack(near), 'mIoU': score}

    def calibrate(
        self, logits: Tensor, truth: np.ndarray, prediction: np.ndarray
    ) -> np.ndarray | None:
        """Count some pixels by confidence; None if the prediction is not the logits' argmax."""
        # After test-time augmentation, logits, (C, H, W), are those of one image of several.
        grid = (slice(None, None, STEP),) * 2
        truth, prediction = truth[grid], prediction[grid]
        logits = logits[(..., *grid)].float().cpu()
        # Not the softmax's argmax: the softmax rounds near ties to ties.
        best = logits.argmax(dim=0).numpy()
        if len(logits) != len(self.classes) or not np.array_equal(best, prediction):
            return None
        confidence, valid = torch.softmax(logits, 0).amax(dim=0), truth != self.ignore_index
        return count_by_confidence(confidence.numpy()[valid], (truth == prediction)[valid])

    def keep_maps(self, result: dict, truth: np.ndarray, prediction: np.ndarray) -> None:
        """Keep the maps of an image while it is among the worst."""
        result['maps'] = [self.shrink(labels) for labels in (truth, prediction)]
        entry = (-result['mIoU'], len(self.results) - 1)
        if len(self.kept) < MAX_IMAGES:
            heapq.heappush(self.kept, entry)
        else:
            del self.results[heapq.heappushpop(self.kept, entry)[1]]['maps']

    def shrink(self, labels: np.ndarray) -> Segmentation:
        """Return a map at the size that is shown."""
        kind = np.uint8 if len(self.classes) <= 255 else np.uint16
        unknown = (labels == self.ignore_index) | (labels >= len(self.classes))
        labels = np.where(unknown, np.iinfo(kind).max, labels).astype(kind)
        size = shown_size(*labels.shape)
        return Segmentation(cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST_EXACT))

    def compute_metrics(self, results: list[dict]) -> dict:
        """Sum up the images, in the first process; return no metrics."""
        # Pixels: rows ground truth, columns prediction.
        self.matrix = np.zeros([len(self.classes)] * 2, np.int64)
        for result in results:
            self.matrix.flat[result['cells']] += result['counts']
        # (2, len(DISTANCES) + 1), all pixels and wrong ones.
        self.near = sum(result['near'] for result in results)
        bins = [result['calibration'] for result in results]
        self.calibration = None if any(one is None for one in bins) else sum(bins)
        worst = sorted((one for one in results if 'maps' in one), key=lambda one: one['mIoU'])
        # Path, caption, ground truth, prediction, at the size that is shown.
        self.worst = [(one['path'], self.caption(one), *one['maps']) for one in worst[:MAX_IMAGES]]
        return {}

    def caption(self, result: dict) -> str:
        """Describe the errors in an image."""
        rows, columns = np.divmod(result['cells'], len(self.classes))
        parts = result['counts'] / result['counts'].sum()
        wrong = [i for i in np.argsort(-parts) if rows[i] != columns[i]]
        texts = ', '.join(
            f'{self.classes[rows[i]]} as {self.classes[columns[i]]} {parts[i]:.1%}'
            for i in wrong[:3]
        )
        return f'mean IoU {100 * result["mIoU"]:.1f}; wrong {parts[wrong].sum():.1%}: {texts}'


def ious(matrix: np.ndarray) -> np.ndarray:
    """Return the IoU of every class, 0 to 1; NaN for a class in neither map."""
    correct = np.diag(matrix)
    with np.errstate(invalid='ignore'):
        return correct / (matrix.sum(axis=0) + matrix.sum(axis=1) - correct)


def boundary_distance(truth: np.ndarray) -> np.ndarray:
    """Return each pixel's distance in pixels to the nearest with a neighbor of another label."""
    inside = np.ones(truth.shape, np.uint8)
    # Views, so that both directions write into the same array.
    for labels, mask in ((truth, inside), (truth.T, inside.T)):
        changes = labels[1:] != labels[:-1]
        mask[1:][changes] = mask[:-1][changes] = 0
    if inside.all():
        return np.full(truth.shape, np.inf)
    return cv2.distanceTransform(inside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)


def pixel_blocks(pixels: PixelMetric) -> list[Block]:
    """Return all blocks of a section."""
    matrix, names = pixels.matrix, pixels.classes
    matrix_note = 'In percent of the row; rows are ground truth, columns predictions.'
    blocks = [
        pixel_class_block(matrix, names),
        matrix_block(matrix, names, 'pixels', matrix_note),
        pair_block(matrix, names, 'pixels', 'Of all images.'),
        boundary_block(pixels.near),
    ]
    if pixels.calibration is None:
        causes = '--tta, --tile, exported files and models with one logit'
        note = f'Not measured with {causes}, which do not return the logits of all classes.'
        return [*blocks, Block('Calibration', note, half=True)]
    note = f'Every {STEP}th pixel of every {STEP}th row, by the softmax of the predicted class.'
    return [*blocks, calibration_block(pixels.calibration, note)]


def pixel_class_block(matrix: np.ndarray, names: Sequence[str]) -> Block:
    """Return a table of the IoU, accuracy and precision of every class."""
    correct, truth, predicted = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    with np.errstate(invalid='ignore'):
        columns = (ious(matrix), correct / truth, correct / predicted, truth / truth.sum())
    rows = [
        [name, *values] for name, values in zip(names, np.stack(columns, 1).tolist(), strict=True)
    ]
    note = (
        'Accuracy is the share of the ground truth that is predicted, precision the share of the '
        'prediction that is correct, pixels the class’s share of the ground truth.'
    )
    return Block('Classes', note, ('class', 'IoU', 'accuracy', 'precision', 'pixels'), rows, '.2%')


def boundary_block(near: np.ndarray) -> Block:
    """Return a table of errors by their distance from a boundary of the ground truth."""
    everything, wrong = near.cumsum(axis=1)
    with np.errstate(invalid='ignore'):
        columns = (wrong / wrong[-1], everything / everything[-1], 1 - wrong / everything)
    shares = np.stack(columns, 1)[:-1].tolist()
    rows = [[distance, *own] for distance, own in zip(DISTANCES, shares, strict=True)]
    note = (
        'Pixels within this distance of a boundary in the ground truth: their share of the '
        'wrong pixels and of all pixels, and the accuracy among them (trimap). '
        'Errors near boundaries are imprecise outlines, others wrong regions.'
    )
    names = ('distance (px)', 'wrong pixels', 'all pixels', 'accuracy')
    return Block('Errors at boundaries', note, names, rows, '.1%', half=True)
