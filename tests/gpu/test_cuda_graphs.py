"""A network that is replayed computes what it computes operator by operator."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from tiny import assert_same
from torch import nn
from trained_tiny import write_trained

from backbones.inference.cuda_graphs import CALLS_BEFORE_RECORDING, MAX_SHAPES, Recorded
from backbones.inference.model import TorchModel
from backbones.inference.results import Detections

SIZES = [(128, 160), (160, 128), (128, 160), (200, 130)]


def frames(rounds: int = 5) -> list[np.ndarray]:
    """Of several sizes in turn, each with something else on it."""
    generator = np.random.default_rng(0)
    small = [generator.integers(0, 255, (5, 6, 3), np.uint8) for _ in range(rounds * len(SIZES))]
    sizes = SIZES * rounds
    return [
        np.kron(image, np.ones((-(-h // 5), -(-w // 6), 1), np.uint8))[:h, :w]
        for image, (h, w) in zip(small, sizes, strict=True)
    ]


def predict(model: TorchModel, image: np.ndarray) -> list[np.ndarray]:
    raw = model.predict([model.preprocess(image)])[0]
    found = model.postprocess(raw, image.shape[:2])
    return [found.scores, found.boxes] if isinstance(found, Detections) else [found.seg_map]


@pytest.mark.parametrize('amp', [False, True])
@pytest.mark.parametrize('task', ['fpn', 'ham', 'retinanet', 'mask_rcnn'])
def test_predictions_stay_the_same_from_frame_to_frame(task, amp, shapes, tmp_path):
    config, checkpoint = map(str, write_trained(tmp_path, task, shapes))
    model = TorchModel(config, checkpoint, amp=amp)
    recorded = model.model.extract_feat
    other = TorchModel(config, checkpoint, amp=amp)
    for part in (other.model, *other.model.children()):
        for name in ('extract_feat', 'forward'):
            if isinstance(part.__dict__.get(name), Recorded):
                delattr(part, name)
    assert isinstance(recorded, Recorded) and not isinstance(other.model.extract_feat, Recorded)
    for image in frames():
        for found, expected in zip(predict(model, image), predict(other, image), strict=True):
            if task in ('fpn', 'ham'):
                assert (found == expected).mean() > (0.98 if amp else 0.999)
            else:
                np.testing.assert_allclose(found, expected, atol=0.5 if amp else 0.01, rtol=1e-3)
    assert len(recorded.graphs) >= 2 and all(recorded.graphs.values())


def test_threads_that_share_a_model(shapes, tmp_path):
    config, checkpoint = map(str, write_trained(tmp_path, 'retinanet', shapes))
    images = frames()
    model, other = (TorchModel(config, checkpoint) for _ in range(2))
    expected = [predict(other, image) for image in images]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(partial(predict, model), images))
    assert all(model.model.extract_feat.graphs.values())
    for ours, theirs in zip(found, expected, strict=True):
        for each, right in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(each, right, atol=0.01, rtol=1e-3)


@torch.no_grad()
def test_results_are_not_overwritten_by_the_next():
    layer = nn.Conv2d(3, 4, 3).cuda()
    recorded = Recorded(layer)
    inputs = [torch.randn(1, 3, 8, 8, device='cuda') for _ in range(6)]
    found = [recorded(each) for each in inputs]
    assert all(recorded.graphs.values()) and len(recorded.graphs) == 1
    assert_same(found, [layer(each) for each in inputs])


@torch.no_grad()
def test_only_so_many_shapes_are_kept():
    recorded = Recorded(torch.square)
    for size in list(range(1, MAX_SHAPES + 5)) * 4:
        x = torch.randn(size, device='cuda')
        assert_same(recorded(x), x * x)
    assert len(recorded.graphs) == MAX_SHAPES


@torch.no_grad()
def test_graphs_share_their_memory():
    recorded = Recorded(lambda x: x.exp().sin().cos().mean(dim=(1, 2, 3)))
    reserved = []
    # What the second needs fits into what the first left.
    for size in (512, 500):
        for _ in range(CALLS_BEFORE_RECORDING + 1):
            recorded(torch.randn(1, 64, size, size, device='cuda'))
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved())
    assert len(recorded.graphs) == 2 and all(recorded.graphs.values())
    # The copy of its inputs, without two maps more.
    assert reserved[1] - reserved[0] < 1.5 * 4 * 64 * 500 * 500


@torch.no_grad()
def test_what_cannot_be_recorded_runs_as_before():
    recorded = Recorded(lambda x: x * float(x.sum()))
    for _ in range(5):
        x = torch.randn(7, device='cuda')
        assert_same(recorded(x), x * x.sum())
    assert list(recorded.graphs.values()) == [None]
    follows = Recorded(torch.square)
    for _ in range(5):
        assert_same(follows(x), x * x)
    assert all(follows.graphs.values())


def test_gradients_are_not_lost():
    layer = nn.Linear(3, 2).cuda()
    recorded = Recorded(layer)
    for _ in range(5):
        recorded(torch.ones(1, 3, device='cuda')).sum().backward()
    assert layer.weight.grad.abs().sum() > 0
