"""A two-stage detector has one AP, whichever tool computes it and in whatever memory its maps lie.

mmcv's RoIAlign reads every map as if it were contiguous and says nothing where one is not.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmcv.ops import batched_nms
from mmdet.apis import inference_detector, init_detector
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tiny import TINY_ARCH
from torch import nn

from backbones.inference.model import TorchModel

CLASSES = ('a', 'b')
SIZE = (384, 512)
IMAGES = 3
# One with objects on several levels, and with which rounding changes no rank.
SEED = 3
CONFIG = """\
_base_ = [
    'mmdet::_base_/models/{model}_r50_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    'mmdet::_base_/default_runtime.py',
]
custom_imports = dict(imports=['backbones'], allow_failed_imports=False)
head = dict(num_classes=2, in_channels=16)
fpn = dict(type='FPN', in_channels=[4, 8, 8, 16], out_channels=16, num_outs=5)
balance = dict(type='BFP', in_channels=16, num_levels=5, refine_level=2, refine_type='non_local')
model = dict(
    data_preprocessor=dict(pad_mask=False),
    backbone=dict(_delete_=True, type='EfficientFormerV2', arch={arch}, norm_eval=True),
    neck={neck},
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(fc_out_channels=16, **head),
        {mask_head}
    ),
    test_cfg=dict(rpn=dict(nms_pre=30), rcnn=dict(score_thr=0.0, max_per_img=30)),
)
meta_keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(512, 384), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=meta_keys),
]
data = dict(type='CocoDataset', ann_file='{folder}/annotations.json',
            data_prefix=dict(img='{folder}/images/'), metainfo=dict(classes={classes}),
            pipeline=pipeline)
train_dataloader = dict(batch_size=1, num_workers=0, persistent_workers=False,
                        dataset=dict(_delete_=True, **data))
val_dataloader = dict(num_workers=0, persistent_workers=False,
                      dataset=dict(_delete_=True, test_mode=True, **data))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file='{folder}/annotations.json', metric={metrics})
test_evaluator = val_evaluator
train_cfg = dict(type='IterBasedTrainLoop', max_iters=1, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.0))
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=1))
log_processor = dict(by_epoch=False)
"""
MODELS = {
    'list_neck': dict(model='faster-rcnn', neck='[fpn, balance]', mask_head='', metrics=['bbox']),
    'mask_rcnn': dict(
        model='mask-rcnn',
        neck='fpn',
        mask_head='mask_roi_extractor=dict(out_channels=16),'
        'mask_head=dict(conv_out_channels=16, num_convs=1, **head),',
        metrics=['bbox', 'segm'],
    ),
}


@dataclass
class Detector:
    """Files of a detector, and what it detects where every map is contiguous."""

    config: str
    checkpoint: str
    images: list[Path]
    ground_truth: COCO
    expected: float
    expected_tta: float


@pytest.fixture(scope='module')
def detector(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Detector]:
    """Makes one of MODELS, once."""
    made = {}

    def make(kind: str) -> Detector:
        if kind not in made:
            made[kind] = make_detector(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return make


def make_detector(folder: Path, kind: str) -> Detector:
    """A detector with random weights; every third of its detections is an object of its data."""
    paths = write_images(folder / 'images')
    annotations = folder / 'annotations.json'
    write_annotations(annotations, [[] for _ in paths])
    config = folder / f'{kind}.py'
    config.write_text(CONFIG.format(folder=folder, arch=TINY_ARCH, classes=CLASSES, **MODELS[kind]))
    checkpoint = folder / 'random.pth'
    torch.manual_seed(SEED)
    model = init_detector(str(config), device='cpu', palette='random')
    randomize(model)
    meta = {'dataset_meta': {'classes': CLASSES}}
    torch.save({'state_dict': model.state_dict(), 'meta': meta}, checkpoint)
    for module in model.modules():
        if type(module).__name__ == 'RoIAlign':
            module.register_forward_pre_hook(lambda _, args: tuple(a.contiguous() for a in args))
    found = [detect(model, path) for path in paths]
    boxes, _, labels = zip(*found, strict=True)
    write_annotations(annotations, [b[::3] for b in boxes], [each[::3] for each in labels])
    ground_truth = COCO(annotations)
    sides = [one['area'] ** 0.5 for one in ground_truth.anns.values()]
    assert min(sides) < 100 and max(sides) > 224, 'all on one level of the pyramid'
    expected = average_precision(ground_truth, found)
    by_hand = [merged_with_flip(model, path, f) for path, f in zip(paths, found, strict=True)]
    return Detector(
        str(config), str(checkpoint), paths, ground_truth, expected,
        average_precision(ground_truth, by_hand),
    )  # fmt: skip


def write_images(folder: Path) -> list[Path]:
    folder.mkdir()
    generator = np.random.default_rng(0)
    paths = []
    for number in range(1, IMAGES + 1):
        coarse = generator.integers(0, 256, (12, 16, 3), np.uint8)
        paths.append(folder / f'{number:012d}.png')
        cv2.imwrite(str(paths[-1]), cv2.resize(coarse, SIZE[::-1], interpolation=cv2.INTER_CUBIC))
    return paths


def write_annotations(path: Path, boxes: list, labels: list | None = None) -> None:
    objects = []
    for image, of_image in enumerate(boxes):
        for index, (left, top, right, bottom) in enumerate(np.asarray(of_image).tolist()):
            width, height = right - left, bottom - top
            outline = [left, top, right, top, right, bottom, left, bottom]
            objects.append(
                dict(id=len(objects) + 1, image_id=image + 1, iscrowd=0, area=width * height,
                     category_id=int(labels[image][index]) + 1, bbox=[left, top, width, height],
                     segmentation=[outline])
            )  # fmt: skip
    images = [
        dict(id=number, file_name=f'{number:012d}.png', height=SIZE[0], width=SIZE[1])
        for number in range(1, IMAGES + 1)
    ]
    categories = [dict(id=index + 1, name=name) for index, name in enumerate(CLASSES)]
    path.write_text(json.dumps(dict(images=images, annotations=objects, categories=categories)))


def randomize(model: nn.Module) -> None:
    """Weights with which scores and boxes differ from region to region."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            if not name.startswith('backbone'):
                # Boxes stay about as large as anchors, which are of all sizes.
                module.weight.data *= 0.1 if name.endswith('_reg') else 0.5
    images = torch.nn.functional.interpolate(torch.randn(4, 3, 12, 16), (96, 128), mode='bicubic')
    model.backbone.norm_eval = False
    with torch.no_grad():
        for _ in range(20):
            model.train().backbone(images)
    model.backbone.norm_eval = True
    model.eval()


def detect(model: nn.Module, image: Path | np.ndarray) -> tuple[np.ndarray, ...]:
    """Boxes, scores and labels by mmdet's own function."""
    image = str(image) if isinstance(image, Path) else image
    found = inference_detector(model, image).pred_instances
    return found.bboxes.numpy(), found.scores.numpy(), found.labels.numpy()


def merged_with_flip(model: nn.Module, path: Path, found: tuple) -> tuple[np.ndarray, ...]:
    """Detections of an image and of its mirror image, overlapping ones suppressed."""
    boxes, scores, labels = detect(model, np.ascontiguousarray(cv2.imread(str(path))[:, ::-1]))
    boxes = np.stack([SIZE[1] - boxes[:, 2], boxes[:, 1], SIZE[1] - boxes[:, 0], boxes[:, 3]], 1)
    both = [
        torch.from_numpy(np.concatenate(pair))
        for pair in zip(found, (boxes, scores, labels), strict=True)
    ]
    rows, index = batched_nms(*both, dict(type='nms', iou_threshold=0.5))
    return rows[:100, :4].numpy(), rows[:100, 4].numpy(), both[2][index][:100].numpy()


def average_precision(ground_truth: COCO, found: list[tuple[np.ndarray, ...]]) -> float:
    results = [
        dict(image_id=image, category_id=int(label) + 1, score=float(score),
             bbox=[box[0], box[1], box[2] - box[0], box[3] - box[1]])
        for image, of_image in enumerate(found, start=1)
        for box, score, label in zip(*(np.asarray(part).tolist() for part in of_image), strict=True)
    ]  # fmt: skip
    return evaluate(ground_truth, results)


def evaluate(ground_truth: COCO, results: list[dict]) -> float:
    """AP of boxes in COCO's results format."""
    evaluation = COCOeval(ground_truth, ground_truth.loadRes(results), 'bbox')
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return float(evaluation.stats[0])


@pytest.mark.parametrize('kind', MODELS)
def test_without_our_tools(detector, kind):
    made = detector(kind)
    assert 0.1 < made.expected < 0.9
    model = init_detector(made.config, made.checkpoint, device='cpu', palette='random')
    found = [detect(model, path) for path in made.images]
    assert average_precision(made.ground_truth, found) == pytest.approx(made.expected, abs=1e-4)


@pytest.mark.parametrize('deploy', [True, False])
@pytest.mark.parametrize('kind', MODELS)
def test_in_python(detector, kind, deploy):
    made = detector(kind)
    model = TorchModel(made.config, made.checkpoint, device='cpu', deploy=deploy)
    found = []
    for path in made.images:
        (raw,) = model.predict([model.preprocess(cv2.imread(str(path)))])
        found.append((raw.bboxes, raw.scores, raw.labels))
    assert average_precision(made.ground_truth, found) == pytest.approx(made.expected, abs=1e-4)


@pytest.mark.parametrize('options', [[], ['--no-deploy'], ['--tta']], ids=str)
def test_by_test_py(detector, options, run_tool, tmp_path):
    made = detector('list_neck')
    done = run_tool('test.py', made.config, made.checkpoint, '--out', 'out.json', *options)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / 'out.json').read_text())['coco/bbox_mAP']
    expected = made.expected_tta if options == ['--tta'] else made.expected
    # mmdet rounds it.
    assert found == pytest.approx(expected, abs=6e-4)


def test_by_validation_in_training(detector, run_tool):
    made = detector('list_neck')
    done = run_tool(
        *('train.py', made.config, '--work-dir', 'run'),
        *('--cfg-options', f'load_from={made.checkpoint}'),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = re.findall(r'validation at .*?coco/bbox_mAP ([\d.]+)', done.stdout)
    assert float(found) == pytest.approx(made.expected, abs=6e-4)


def test_by_infer_py(detector, run_tool, tmp_path):
    made = detector('list_neck')
    options = ('--score-thr', 0, '--data-only', '--out-dir', 'out')
    done = run_tool('infer.py', made.config, made.checkpoint, made.images[0].parent, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [
        dict(result, image_id=int(re.search(r'\d+', str(result['image_id']))[0]))
        for path in (tmp_path / 'out' / 'data').rglob('0*.json')
        for result in json.loads(path.read_text())
    ]
    assert evaluate(made.ground_truth, results) == pytest.approx(made.expected, abs=1e-3)
