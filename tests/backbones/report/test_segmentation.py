"""Segmentation maps, counted as mmseg does and by hand."""

import numpy as np
import pytest
import torch
from mmseg.evaluation import IoUMetric

from backbones.report.blocks import (
    MAX_CLASSES,
    calibration_block,
    count_by_confidence,
    matrix_block,
    pair_block,
)
from backbones.report.charts import calibration_error
from backbones.report.segmentation import (
    MAX_IMAGES,
    PixelMetric,
    boundary_distance,
    pixel_blocks,
    pixel_class_block,
)

CLASSES = ['sky', 'road', 'car', 'dog']


def sample_of(truth, prediction, path='a.jpg', logits=None) -> dict:
    maps = {'gt_sem_seg': truth, 'pred_sem_seg': prediction}
    data = {name: {'data': torch.as_tensor(values)[None]} for name, values in maps.items()}
    return {**data, 'img_path': path} | ({} if logits is None else {'seg_logits': {'data': logits}})


def run(samples, classes=CLASSES) -> PixelMetric:
    metric = PixelMetric(classes, 255)
    for sample in samples:
        metric.process(None, [sample])
    metric.evaluate(len(samples))
    return metric


def test_figures_are_those_of_iou_metric():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, (3, 40, 50))
    truth[:, :, :5] = 255
    prediction = np.where(rng.random(truth.shape) < 0.7, truth % 255, 1)
    samples = [sample_of(*both) for both in zip(truth, prediction, strict=True)]
    theirs = IoUMetric()
    theirs.dataset_meta = {'classes': CLASSES}
    theirs.process(None, samples)
    totals = [sum(result) for result in zip(*theirs.results, strict=True)]
    expected = theirs.total_area_to_metrics(*totals, ['mIoU', 'mFscore'])
    block = pixel_class_block(run(samples).matrix, CLASSES)
    for column, name in enumerate(('IoU', 'Acc', 'Precision'), 1):
        found = [row[column] for row in block.rows]
        # The last class is nowhere.
        assert found == pytest.approx(expected[name], abs=1e-6, nan_ok=True)


def test_distance_from_boundaries():
    truth = np.zeros((5, 20), int)
    truth[:, 10:] = 1
    expected = np.abs(np.arange(20) - np.where(np.arange(20) < 10, 9, 10))
    assert boundary_distance(truth)[2] == pytest.approx(expected)
    prediction = truth.copy()
    prediction[:, 8:10] = 1  # beside the boundary, within 1 and 2 pixels
    prediction[:, 0] = 1  # 9 pixels away
    near = run([sample_of(truth, prediction)]).near
    assert near[1].tolist() == [5, 5, 0, 0, 5, 0, 0]
    assert near[0].tolist() == [10, 10, 20, 40, 20, 0, 0]
    assert np.isinf(boundary_distance(np.zeros((4, 4)))).all()


def test_calibration():
    truth = np.zeros((8, 8), int)
    logits = torch.full((4, 8, 8), -100.0)
    logits[0], logits[1] = np.log(0.7), np.log(0.3)
    prediction = np.zeros((8, 8), int)
    bins = run([sample_of(truth, prediction, logits=logits)]).calibration
    # Every fourth pixel of both axes.
    assert bins[[6, 7]].sum(axis=0) == pytest.approx([4, 4, 2.8])
    assert calibration_error(bins) == pytest.approx(0.3)
    unlabeled = truth.copy()
    unlabeled[:4] = 255
    bins = run([sample_of(unlabeled, prediction, logits=logits)]).calibration
    assert bins.sum(axis=0) == pytest.approx([2, 2, 1.4])
    # Without logits, and where the prediction was made from others.
    assert run([sample_of(truth, prediction)]).calibration is None
    assert run([sample_of(truth, 1 - prediction, logits=logits)]).calibration is None


def test_calibration_of_logits_that_nearly_tie():
    """Their softmax is equal, and the first of equals another label."""
    logits = torch.full((4, 8, 8), -100.0)
    logits[0] = 0.01
    logits[1] = torch.nextafter(logits[0], torch.tensor(1.0))
    prediction = np.ones((8, 8), int)
    bins = run([sample_of(prediction, prediction, logits=logits)]).calibration
    assert bins.sum(axis=0) == pytest.approx([4, 4, 2])


def test_calibration_error_by_hand():
    bins = count_by_confidence(np.array([0.95, 0.95, 1.0, 0.15]), np.array([1, 1, 0, 0]))
    assert bins[9].tolist() == [3, 2, pytest.approx(2.9)]
    assert calibration_error(bins) == pytest.approx((abs(2 - 2.9) + 0.15) / 4)
    nothing = count_by_confidence(np.empty(0), np.empty(0))
    assert np.isnan(calibration_error(nothing))
    assert '–' in calibration_block(nothing, '').charts[0].title


def test_the_worst_are_kept_and_no_other():
    rng = np.random.default_rng(0)
    samples, shares = [], rng.permutation(MAX_IMAGES * 2) + 1
    for share in shares:
        truth = np.zeros((10, 10), int)
        prediction = truth.copy()
        prediction.flat[:share] = 2
        samples.append(sample_of(truth, prediction, f'{share}.jpg'))
    samples.append(sample_of(np.full((10, 10), 255), prediction, 'unlabelled.jpg'))
    samples.append(sample_of(truth, truth, 'perfect.jpg'))
    metric = PixelMetric(CLASSES, 255)
    for sample in samples:
        metric.process(None, [sample])
    assert sum('maps' in result for result in metric.results) == MAX_IMAGES
    metric.evaluate(len(samples))
    worst = sorted(shares)[: -MAX_IMAGES - 1 : -1]
    assert [path for path, *_ in metric.worst] == [f'{share}.jpg' for share in worst]
    assert 'sky as car 24.0%' in metric.worst[0][1]
    assert pixel_blocks(metric)


def test_a_matrix_of_many_classes_is_folded():
    size = MAX_CLASSES + 10
    matrix = np.diag(np.full(size, 100))
    matrix[:20, 39] = 7
    names = [f'c{number}' for number in range(size)]
    block = matrix_block(matrix, names, 'pixels', '')
    assert len(block.matrix) == MAX_CLASSES and block.columns[-1] == 'others'
    assert {'c0', 'c19', 'c39'} <= set(block.columns)
    # 11 classes without errors.
    assert block.matrix[-1][0][-1] == 1100


def test_nothing_confused_is_said():
    block = pair_block(np.eye(2, dtype=int), ['a', 'b'], 'pixels', 'Of all images.')
    assert not block.rows and 'None' in block.note
