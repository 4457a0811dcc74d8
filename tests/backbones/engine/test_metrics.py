"""Metrics of single classes, the one that chooses the best checkpoint, and the validation loss."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mmdet.evaluation import CocoMetric
from mmengine import dist
from mmengine.config import Config
from mmengine.dataset import DefaultSampler
from mmengine.hooks import CheckpointHook
from mmengine.logging import MessageHub, MMLogger
from mmseg.evaluation import IoUMetric
from torch import nn
from torch.utils.data import DataLoader

from backbones.engine.config import keep_best_checkpoint
from backbones.engine.console import quiet
from backbones.engine.hooks import (
    BestMetricHook,
    ValLossHook,
    is_annotated_after_resizing,
    resize_ground_truth,
)
from backbones.engine.metrics import add_per_class, format_metrics, main_metrics, write_metrics
from backbones.engine.preflight import is_ours

BOXES = {'cat': [10, 10, 40, 40], 'dog': [60, 60, 30, 30]}


@pytest.fixture
def annotations(tmp_path: Path) -> str:
    """A COCO file of one image of 100x100 pixels with a cat and a dog."""
    objects = [
        {'id': i, 'image_id': 1, 'category_id': i, 'bbox': box, 'area': box[2] * box[3]}
        | {'iscrowd': 0, 'segmentation': [[0, 0, 9, 0, 9, 9]]}
        for i, box in enumerate(BOXES.values(), 1)
    ]
    content = {
        'images': [{'id': 1, 'file_name': 'a.jpg', 'width': 100, 'height': 100}],
        'annotations': objects,
        'categories': [{'id': i, 'name': name} for i, name in enumerate(BOXES, 1)],
    }
    path = tmp_path / 'coco.json'
    path.write_text(json.dumps(content))
    return str(path)


def evaluate(metric: CocoMetric, found: list[str]) -> dict[str, float]:
    """The metrics of a detector that finds the boxes of these classes exactly, and no mask."""
    add_per_class(metric)
    metric.dataset_meta = {'classes': tuple(BOXES)}
    boxes = torch.tensor([BOXES[name] for name in found]).float().reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    prediction = {
        'bboxes': boxes,
        'scores': torch.ones(len(found)),
        'labels': torch.tensor([list(BOXES).index(name) for name in found]),
        'masks': torch.zeros(len(found), 100, 100, dtype=torch.bool),
    }
    sample = {'img_id': 1, 'ori_shape': (100, 100), 'pred_instances': prediction}
    metric.process({}, [sample])
    return metric.evaluate(1)


def test_coco_has_the_ap_of_every_class(annotations):
    metric = CocoMetric(annotations, metric=['bbox', 'segm'])
    metrics = evaluate(metric, ['cat'])
    # A training validates many times.
    assert evaluate(metric, ['cat']) == metrics
    assert metrics['coco/bbox_AP/cat'] == 1
    assert metrics['coco/bbox_AP/dog'] == 0
    assert metrics['coco/bbox_mAP'] == 0.5
    # mmdet gives that of boxes and that of masks one name.
    assert metrics['coco/segm_AP/cat'] == metrics['coco/segm_mAP'] == 0


def test_a_class_has_its_own_ap_whatever_the_order_of_ids(annotations):
    """mmdet names classes in the order of the file, pycocotools sorts them by their ids."""
    content = json.loads(Path(annotations).read_text())
    for row in content['categories']:
        row['id'] = 3 - row['id']
    for row in content['annotations']:
        row['category_id'] = 3 - row['category_id']
    Path(annotations).write_text(json.dumps(content))
    test_coco_has_the_ap_of_every_class(annotations)


def test_without_any_detection_the_ap_is_zero(annotations, capsys):
    """mmdet returns nothing, so that keeping the best checkpoint fails, and logs an error."""
    quiet(MMLogger.get_instance('nothing detected'))
    assert evaluate(CocoMetric(annotations, metric_items=['mAP_50']), []) == {'coco/bbox_mAP_50': 0}
    assert evaluate(CocoMetric(annotations), [])['coco/bbox_mAP'] == 0
    assert 'error' not in capsys.readouterr().err


def test_writing_results_alone_measures_nothing(annotations, tmp_path):
    metric = CocoMetric(annotations, format_only=True, outfile_prefix=str(tmp_path / 'out'))
    assert evaluate(metric, ['cat']) == {}
    assert (tmp_path / 'out.bbox.json').is_file()


def test_iou_of_every_class():
    metric = IoUMetric()
    add_per_class(metric)
    metric.dataset_meta = {'classes': ('sky', 'road', 'car')}
    prediction, ground_truth = torch.zeros(1, 2, 2), torch.tensor([[[0, 0], [0, 1]]])
    sample = {'pred_sem_seg': {'data': prediction.long()}, 'gt_sem_seg': {'data': ground_truth}}
    metric.process({}, [sample])
    metrics = metric.evaluate(1)
    assert metrics['IoU/sky'] == 75 and metrics['IoU/road'] == 0
    assert np.isnan(metrics['IoU/car'])


@pytest.mark.parametrize(
    ('names', 'expected'),
    [
        (['coco/bbox_mAP', 'coco/bbox_mAP_50', 'coco/segm_mAP'], 'coco/segm_mAP'),
        (['x/bbox_mAP_50', 'x/bbox_mAP'], 'x/bbox_mAP'),
        (['x/bbox_mAP_50', 'x/segm_mAP_50'], 'x/segm_mAP_50'),
        (['lvis/bbox_AP', 'lvis/bbox_AP50', 'lvis/segm_AP'], 'lvis/segm_AP'),
        (['aAcc', 'mIoU', 'IoU/segm_mAP_'], 'mIoU'),
        (['x/aAcc', 'x/mDice', 'x/mAcc'], 'x/mDice'),
        (['pascal_voc/mAP', 'pascal_voc/AP50'], 'pascal_voc/mAP'),
        (['coco/AR@100', 'coco/AR@300'], 'coco/AR@100'),
        (['teacher/coco/bbox_mAP', 'student/coco/bbox_mAP'], 'teacher/coco/bbox_mAP'),
    ],
)
def test_the_main_metric(names, expected):
    assert main_metrics(names)[0] == expected


COCO = ['coco/bbox_mAP', 'coco/bbox_mAP_50']
JOINED = ['a/coco/bbox_mAP', 'b/coco/bbox_mAP']
# Names of datasets that are those of metrics too.
MIXED = ['pascal_voc/pascal_voc/mAP', 'coco/coco/bbox_mAP', 'coco/coco/bbox_mAP_50']


@pytest.mark.parametrize(
    ('names', 'save_best', 'expected'),
    [
        (COCO, None, ['coco/bbox_mAP']),
        (COCO, 'coco/bbox_mAP_50', ['coco/bbox_mAP_50']),
        ([*COCO, 'val/loss'], 'val/loss', ['val/loss']),
        # Without --val-loss; boxes alone of a base with masks.
        (COCO, 'val/loss', ['coco/bbox_mAP']),
        (COCO, 'coco/segm_mAP', ['coco/bbox_mAP']),
        (COCO, COCO, COCO),
        (COCO, ['coco/bbox_mAP', 'coco/segm_mAP'], ['coco/bbox_mAP']),
        (['aAcc', 'mDice'], 'mIoU', ['mDice']),
        (['pascal_voc/mAP', 'pascal_voc/AP50'], 'coco/bbox_mAP', ['pascal_voc/mAP']),
        (JOINED, 'coco/bbox_mAP', ['a/coco/bbox_mAP']),
        (JOINED, 'b/coco/bbox_mAP', ['b/coco/bbox_mAP']),
        (['voc/pascal_voc/mAP', *MIXED[1:]], None, ['coco/coco/bbox_mAP']),
        (MIXED, 'coco/bbox_mAP', ['coco/coco/bbox_mAP']),
        (MIXED, 'coco/coco/bbox_mAP_50', ['coco/coco/bbox_mAP_50']),
        (MIXED, [MIXED[0]], [MIXED[0]]),
    ],
)
def test_the_best_checkpoint_is_by_what_was_measured(names, save_best, expected, tmp_path):
    """Also where the training is resumed in between: the best one until then is removed."""
    validations = [dict.fromkeys(names, step / 10) for step in (1, 2)]
    files = best_of([validations[:1], validations[1:]], save_best, 'greater', tmp_path)
    assert files == {f'best_{name.replace("/", "_")}_epoch_2.pth' for name in expected}


@pytest.mark.parametrize(
    ('trainings', 'save_best', 'rule', 'expected'),
    [
        # Resumed without --val-loss: a figure of another metric is no better or worse one.
        (
            [
                [{'bbox_mAP': 0.1, 'val/loss': 0.9}, {'bbox_mAP': 0.2, 'val/loss': 0.5}],
                [{'bbox_mAP': 0.3}, {'bbox_mAP': 0.4}],
            ],
            'val/loss',
            'less',
            {'best_val_loss_epoch_2.pth', 'best_bbox_mAP_epoch_4.pth'},
        ),
        # LVIS has no figures where nothing is detected.
        (
            [[{'val/loss': 1.5}, {'bbox_AP': 0.1, 'val/loss': 1.1}, {'bbox_AP': 0.2}]],
            'auto',
            'greater',
            {'best_bbox_AP_epoch_3.pth'},
        ),
        ([[{'loss': 1.0}, {'loss': 0.5}, {'loss': 0.7}]], 'auto', None, {'best_loss_epoch_2.pth'}),
        # mmengine knows no rule for it.
        ([[{'aAcc': 90.0, 'mFscore': 50.0}]], 'auto', None, {'best_mFscore_epoch_1.pth'}),
    ],
)
def test_what_is_measured_may_change(trainings, save_best, rule, expected, tmp_path):
    assert best_of(trainings, save_best, rule, tmp_path) == expected


def best_of(
    trainings: list[list[dict]], save_best: str | list[str], rule: str | None, folder: Path
) -> set[str]:
    """The best checkpoints that are left; each training but the first is resumed."""
    config = Config({'default_hooks': {'checkpoint': {'rule': rule}}, 'val_evaluator': {'a': 1}})
    config.default_hooks.checkpoint.save_best = save_best
    keep_best_checkpoint(config)
    runner = SimpleNamespace(message_hub=MessageHub('best'), work_dir=str(folder), epoch=0)
    runner.logger = MMLogger.get_current_instance()
    runner.save_checkpoint = lambda folder, filename, **_: Path(folder, filename).touch()
    for validations in trainings:
        hook = CheckpointHook(**config.default_hooks.checkpoint)
        runner.hooks = [hook]
        hook.before_train(runner)
        for metrics in validations:
            runner.epoch = runner.iter = runner.epoch + 1
            BestMetricHook().after_val_epoch(runner, metrics)
            hook.after_val_epoch(runner, metrics)
    return {path.name for path in folder.iterdir()}


def test_not_every_model_has_a_backbone_at_its_top():
    assert not is_ours({})


def test_metrics_of_any_kind_can_be_written_and_printed(tmp_path):
    metrics = {'mAP': np.float32(0.5), 'coco/bbox_AP/a/b': 0.25, 'IoU/x': float('nan')}
    metrics |= {'tensor': torch.tensor(2.0), 'list': [1, 2], 'time': 3.0}
    write_metrics(metrics, tmp_path / 'new' / 'metrics.json')
    written = json.loads((tmp_path / 'new' / 'metrics.json').read_text())
    assert written == {**metrics, 'IoU/x': None}
    rows = [line.split() for line in format_metrics(metrics).splitlines()]
    assert ['mAP', '0.500'] in rows and ['a/b', '0.250', 'nan'] in rows


class Numbers:
    """A dataset whose images are their own loss."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> float:
        return float(10**index)


class MeanLoss(nn.Module):
    def data_preprocessor(self, batch: dict, training: bool) -> dict:
        return batch

    def forward(self, inputs: list[float], mode: str) -> dict:
        return {'loss': torch.tensor(inputs).mean()}

    def parse_losses(self, losses: dict) -> tuple[Any, dict]:
        return None, losses


def val_loss_sums(rank: int, world_size: int, batch_size: int, monkeypatch) -> tuple[float, int]:
    """The loss that a process adds up, and over how many images."""
    monkeypatch.setattr(dist, 'get_rank', lambda: rank)
    monkeypatch.setattr(dist, 'get_world_size', lambda: world_size)
    sampler = DefaultSampler(Numbers(), shuffle=False)
    sampler.rank, sampler.world_size = rank, world_size
    sampler.num_samples = -(-5 // world_size)
    sampler.total_size = sampler.num_samples * world_size
    loader = DataLoader(Numbers(), batch_size, sampler=sampler, collate_fn=list)
    runner = SimpleNamespace(val_dataloader=loader, model=MeanLoss())
    hook = ValLossHook()
    hook.before_val_epoch(runner)
    for index, batch in enumerate(loader):
        hook.after_val_iter(runner, index, {'inputs': batch})
    return hook.sums['loss'], hook.counted


@pytest.mark.parametrize('batch_size', [1, 2, 4])
@pytest.mark.parametrize('processes', [1, 2, 3, 4])
def test_val_loss_counts_every_image_of_all_processes_once(processes, batch_size, monkeypatch):
    shares = [val_loss_sums(rank, processes, batch_size, monkeypatch) for rank in range(processes)]
    assert sum(images for _, images in shares) == 5
    assert sum(loss for loss, _ in shares) == pytest.approx(11111)


def test_ground_truth_is_resized_for_the_loss_alone():
    """Other metrics than COCO's compare the samples' own ground truth with the prediction."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.bbox import HorizontalBoxes
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData, PixelData

    metainfo = {'scale_factor': (2.0, 3.0), 'img_shape': (12, 6), 'ori_shape': (4, 3)}
    sample = DetDataSample(metainfo=metainfo)
    boxes, mask = torch.tensor([[1.0, 1, 2, 3]]), np.zeros((1, 4, 3), np.uint8)
    mask[0, 1:3, 1] = 1
    for name in ('gt_instances', 'ignored_instances'):
        given = HorizontalBoxes(boxes.clone()), BitmapMasks(mask, 4, 3)
        setattr(sample, name, InstanceData(bboxes=given[0], masks=given[1]))
    sample.gt_sem_seg = PixelData(metainfo={'ignore_index': 9}, sem_seg=torch.from_numpy(mask))
    resized, expected = resize_ground_truth(sample), mask.repeat(3, axis=1).repeat(2, axis=2)
    for instances in (resized.gt_instances, resized.ignored_instances):
        assert instances.bboxes.tensor.tolist() == [[2, 3, 4, 9]]
        assert np.array_equal(instances.masks.masks, expected)
    found = resized.gt_sem_seg
    assert np.array_equal(found.sem_seg, expected) and found.ignore_index == 9
    assert torch.equal(sample.gt_instances.bboxes.tensor, boxes)
    assert sample.gt_sem_seg.sem_seg.shape == (1, 4, 3)


@pytest.mark.parametrize(
    'steps', [['Resize', 'LoadAnnotations'], ['mmdet.LoadAnnotations', 'Resize']]
)
def test_where_annotations_are_loaded(steps):
    dataset = {'pipeline': [{'type': step} for step in ['LoadImageFromFile', *steps]]}
    config = Config({'default_scope': 'mmdet', 'val_dataloader': {'dataset': dataset}})
    assert is_annotated_after_resizing(config) == (steps[0] == 'Resize')
