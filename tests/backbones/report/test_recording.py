"""What is recorded of mmdet's metrics, compared with their own figures."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmdet.evaluation import CocoMetric, VOCMetric
from mmengine.evaluator import Evaluator
from mmengine.registry import init_default_scope
from pycocotools.coco import COCO

from backbones.engine.metrics import add_per_class
from backbones.errors import ConfigError
from backbones.report.detection import class_block, detection_blocks, mean_of
from backbones.report.matching import CORRECT, average_precision
from backbones.report.recording import ReportHook


@pytest.fixture(scope='module')
def annotations(shapes, tmp_path_factory):
    """The path of ground truth in which one object is a crowd region and one image has none."""
    content = json.loads((shapes / 'coco/annotations/instances_val2017.json').read_text())
    first, last = content['images'][0], content['images'][-1]
    rows = [row for row in content['annotations'] if row['image_id'] != last['id']]
    of_first = [row for row in rows if row['image_id'] == first['id']]
    # The report numbers objects by their class, so that others follow this one.
    crowd = min(of_first, key=lambda row: row['category_id'])
    crowd['iscrowd'] = 1
    path = tmp_path_factory.mktemp('annotations') / 'truth.json'
    path.write_text(json.dumps(content | {'annotations': rows}))
    return path


def detections_of(coco: COCO, number: int, rng: np.random.Generator) -> dict[str, object]:
    """Copies of the objects, moved, of other classes, or twice."""
    boxes, labels, masks = [], [], []
    for row in coco.imgToAnns[number]:
        for _ in range(rng.integers(0, 4)):
            left, top, width, height = row['bbox']
            moved = np.array([left, top, left + width, top + height])
            boxes.append(moved + rng.normal(0, 0.12, 4) * width)
            category = row['category_id'] if rng.random() < 0.7 else rng.integers(1, 7)
            labels.append(category - 1)
            shift = rng.integers(0, 1 + int(width / 4))
            masks.append(np.roll(coco.annToMask(row), shift, 1))
    size = coco.imgs[number]
    return {
        'bboxes': torch.tensor(np.array(boxes).reshape(-1, 4), dtype=torch.float32),
        'labels': torch.tensor(labels, dtype=torch.int64),
        # Some scores are equal.
        'scores': torch.tensor(rng.integers(1, 20, len(boxes)) / 20),
        'masks': torch.tensor(np.array(masks).reshape(-1, size['height'], size['width'])).bool(),
    }


def record(metric, samples, classes) -> tuple[ReportHook, dict[str, float]]:
    """Evaluate samples as a test does."""
    init_default_scope('mmdet')
    add_per_class(metric)
    evaluator = Evaluator([metric])
    evaluator.dataset_meta = {'classes': classes}
    hook = ReportHook()
    hook.before_test(SimpleNamespace(test_evaluator=evaluator))
    for sample in samples:
        evaluator.process([sample])
    return hook, evaluator.evaluate(len(samples))


@pytest.fixture(scope='module')
def coco(annotations):
    return COCO(str(annotations))


@pytest.fixture(scope='module')
def classes(coco):
    return tuple(one['name'] for one in coco.loadCats(coco.getCatIds()))


def samples_of(coco: COCO, is_empty: bool = False) -> list[dict]:
    rng = np.random.default_rng(2)
    samples = []
    for number, image in coco.imgs.items():
        found = detections_of(coco, number, rng)
        if is_empty:
            found = {name: values[:0] for name, values in found.items()}
        size = (image['height'], image['width'])
        about = {'img_id': number, 'img_path': image['file_name'], 'ori_shape': size}
        samples.append({**about, 'pred_instances': found})
    return samples


def test_figures_are_those_of_the_metric(annotations, coco, classes):
    metric = CocoMetric(str(annotations), ['bbox', 'segm'])
    hook, metrics = record(metric, samples_of(coco), classes)
    assert [one.kind for one in hook.detections] == ['bbox', 'segm']
    for results in hook.detections:
        # COCOeval's own figure at IoU 0.5, crowd region and equal scores included.
        at_50 = results.precision[0, :, :, 0, -1]
        ap50 = at_50.mean(axis=0)[at_50[0] > -1]
        matches = results.matches
        own = (matches.label, matches.score, matches.kind == CORRECT)
        counts = np.bincount(matches.object_label, minlength=len(classes))
        assert average_precision(*own, counts)[counts > 0] == pytest.approx(ap50, abs=1e-9)
        correct = matches.kind == CORRECT
        target = matches.target[correct]
        assert np.array_equal(matches.object_label[target], matches.label[correct])
        assert np.array_equal(matches.object_image[target], matches.image[correct])
        block = class_block(results, '')
        column = [row[3] for row in block.rows if row[1]]
        assert column == pytest.approx(ap50, abs=1e-9)
        assert np.mean(column) == pytest.approx(metrics[f'coco/{results.kind}_mAP_50'], abs=6e-4)
        for row in block.rows:
            printed = metrics[f'coco/{results.kind}_AP/{row[0]}'] if row[1] else math.nan
            assert row[2] == pytest.approx(printed, abs=6e-4, nan_ok=True)
        for size, name in enumerate('sml', 1):
            measured = mean_of(results.precision[:, :, :, size, -1])
            printed = metrics[f'coco/{results.kind}_mAP_{name}']
            assert printed == (-1 if np.isnan(measured) else pytest.approx(measured, abs=6e-4))
            column = [row[6 + size] for row in block.rows if not math.isnan(row[6 + size])]
            assert printed == pytest.approx(np.mean(column or [-1]), abs=6e-4)
        objects = [row for row in coco.anns.values() if not row['iscrowd']]
        assert sum(row[1] for row in block.rows) == sum(results.sizes) == len(objects)
        path, _, truth, _ = results.worst[0]
        numbers = [number for number, image in coco.imgs.items() if image['file_name'] == path]
        assert len(truth.boxes) == len(coco.imgToAnns[numbers[0]])
        assert (truth.masks is None) == (results.kind == 'bbox')


def test_nothing_was_detected(annotations, coco, classes):
    metric = CocoMetric(str(annotations), ['bbox', 'segm'])
    hook, metrics = record(metric, samples_of(coco, is_empty=True), classes)
    assert metrics['coco/segm_mAP'] == 0
    for results in hook.detections:
        assert results.matches.missed().all()
        assert len(results.worst) == len(coco.imgs) - 1, 'one image has no objects'
        assert detection_blocks(results)
    assert [one.kind for one in hook.detections] == ['bbox', 'segm']


def test_voc_metric_is_evaluated_as_coco_does():
    truth = torch.tensor([[10.0, 10, 60, 60], [100, 100, 150, 150]])
    no_object = {'bboxes': torch.empty(0, 4), 'labels': torch.empty(0, dtype=torch.int64)}
    difficult = {'bboxes': truth[1:], 'labels': torch.tensor([1])}
    sample = {
        'img_path': 'a.jpg',
        'ori_shape': (200, 200),
        'gt_instances': {'bboxes': truth[:1], 'labels': torch.tensor([0])},
        'ignored_instances': difficult,
        'pred_instances': {
            'bboxes': truth + 1,
            'labels': torch.tensor([0, 1]),
            'scores': torch.tensor([0.9, 0.8]),
        },
    }
    empty = sample | {'img_path': 'b.jpg', 'gt_instances': no_object}
    empty['ignored_instances'] = no_object
    empty['pred_instances'] = no_object | {'scores': torch.empty(0)}
    hook, metrics = record(VOCMetric(), [sample, empty], ('cat', 'dog'))
    (results,) = hook.detections
    assert metrics['pascal_voc/mAP'] > 0
    assert [len(results.matches.score), len(results.matches.object_label)] == [1, 1]
    assert results.matches.found().all() and not results.worst


def test_other_metrics_are_refused(annotations):
    for metric in (CocoMetric(str(annotations), 'proposal'), VOCMetric(metric='recall')):
        evaluator = Evaluator([metric])
        evaluator.dataset_meta = {'classes': ('cat',)}
        with pytest.raises(ConfigError, match='--report'):
            ReportHook().before_test(SimpleNamespace(test_evaluator=evaluator))
