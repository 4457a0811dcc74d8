"""Whole detectors and segmentors on a GPU."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage
import torch
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, MODELS
from mmengine.runner import load_checkpoint
from trained_tiny import write_trained

from backbones.engine.config import load_config
from backbones.inference import Detections, Inferencer
from backbones.inference.model import TorchModel
from backbones.inference.seg_maps import Logits, seg_map_of

TASKS = ['fpn', 'ham', 'retinanet', 'mask_rcnn']
PHOTOGRAPHS = [Path(skimage.data_dir) / name for name in ('coffee.png', 'rocket.jpg', 'camera.png')]


@pytest.fixture(scope='module', params=TASKS)
def trained(request, tmp_path_factory, shapes) -> tuple[str, Path, Path]:
    """A task, a config and a checkpoint."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, *write_trained(folder, request.param, shapes)


def predictions(config: Path, checkpoint: Path, **options: Any) -> list:
    inferencer = Inferencer(config, checkpoint, score_thr=0, **options)
    return [result.prediction for result in inferencer(PHOTOGRAPHS)]


def assert_alike(found: list, expected: list, part: float, score: float) -> None:
    """Equal in this part of the pixels or boxes, with scores as near as this."""
    if not isinstance(expected[0], Detections):
        assert len({label for each in expected for label in np.unique(each.seg_map)}) > 1
    assert len(found) == len(expected) == len(PHOTOGRAPHS)
    for ours, theirs in zip(found, expected, strict=True):
        if not isinstance(theirs, Detections):
            assert (ours.seg_map == theirs.seg_map).mean() >= part
            continue
        assert len(theirs.scores) == 10
        np.testing.assert_allclose(ours.scores, theirs.scores, atol=score)
        same = np.isclose(ours.boxes, theirs.boxes, atol=1).all(axis=1)
        # Which of two boxes with nearly the same score comes first is chance.
        assert same.mean() >= part - 0.2 or score > 0.01
        for index in np.flatnonzero(same) if theirs.masks else ():
            areas = [int(each.masks[index].pixels.sum()) for each in (ours, theirs)]
            assert abs(areas[0] - areas[1]) <= 0.05 * areas[1] + 8


@pytest.mark.parametrize('options', [{}, {'deploy': False}, {'batch_size': 3}], ids=str)
def test_predictions_are_those_of_a_cpu(trained, options):
    _, *files = trained
    expected = predictions(*files, device='cpu')
    assert_alike(predictions(*files, **options), expected, part=0.999, score=1e-3)


def test_mixed_precision_is_close(trained):
    _, *files = trained
    mixed = predictions(*files, amp=True)
    assert_alike(mixed, predictions(*files), part=0.9, score=0.02)


def test_operators_read_maps_in_channels_last_as_they_are(trained):
    """mmcv's RoIAlign alone would return other boxes without an error."""
    _, config, checkpoint = trained
    models = [TorchModel(str(config), str(checkpoint)) for _ in range(2)]
    models[0].model.to(memory_format=torch.channels_last)
    image = skimage.io.imread(PHOTOGRAPHS[0])
    found, expected = (model.predict([model.preprocess(image)])[0] for model in models)
    if isinstance(expected, torch.Tensor):
        assert (found == expected).float().mean() >= 0.999
        return
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.bboxes, expected.bboxes, atol=0.1, rtol=0)


def losses_and_gradients(model: torch.nn.Module, batch: dict, device: str) -> tuple[dict, dict]:
    """With BatchNorm as at inference."""
    model = copy.deepcopy(model).to(device).eval()
    data = model.data_preprocessor(copy.deepcopy(batch), True)
    total, losses = model.parse_losses(model(**data, mode='loss'))
    total.backward()
    weights = [(name, each) for name, each in model.named_parameters() if each.grad is not None]
    return (
        {name: float(loss) for name, loss in losses.items()},
        {name: weight.grad.cpu() for name, weight in weights},
    )


def test_losses_and_gradients_are_those_of_a_cpu(trained):
    task, config, checkpoint = trained
    if task == 'mask_rcnn':
        pytest.skip('the boxes that it trains on are drawn at random on each device')
    loaded = load_config(str(config))
    model = MODELS.build(loaded.model)
    load_checkpoint(model, str(checkpoint), map_location='cpu')
    dataset = DATASETS.build(loaded.train_dataloader.dataset)
    batch = pseudo_collate([dataset[index] for index in range(2)])
    losses, gradients = losses_and_gradients(model, batch, 'cuda')
    expected_losses, expected = losses_and_gradients(model, batch, 'cpu')
    assert losses == pytest.approx(expected_losses, rel=1e-3)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 0.01 * gradient.norm() + 1e-6, name


@pytest.mark.parametrize('classes', [7, 150])
def test_segmentation_maps_are_those_of_a_cpu(classes):
    logits = torch.randn(classes, 64, 96, generator=torch.Generator().manual_seed(0))
    for size in [(256, 384), (300, 411), (40, 60), (64, 96)]:
        expected = seg_map_of(Logits.of(logits).resize(size, False))
        found = seg_map_of(Logits.of(logits.cuda()).resize(size, False))
        assert found.is_cuda and found.dtype == expected.dtype
        assert (found.cpu() == expected).float().mean() >= 0.9999
