"""A supernet trains like any model: resumed exactly, on several processes, with --amp."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from searching import CONFIG, SPACE, write_supernet
from tool_process import TOOLS, run_in_two
from torch import nn

from backbones.data.classes import set_classes
from backbones.engine.config import load_config
from backbones.errors import ConfigError
from backbones.search import supernet
from backbones.search.supernet import SpaceHook, Supernet

SEARCH = """\
search = dict(necks=(8,), channels=((2, 4), (4, 8), (4, 8), (8, 16)), holdout=1 / 3)
train_cfg = dict(max_iters=4, val_interval=2)
default_hooks['checkpoint'] = dict(interval=2)
"""
# One step, since rounding errors grow with every further one, by SGD, since Adam makes large steps
# of the smallest gradients.
COMPARABLE = """\
train_cfg = dict(max_iters=1, val_interval=1)
default_hooks['checkpoint'] = dict(interval=1)
optim_wrapper = dict(optimizer=dict(_delete_=True, type='SGD', lr=0.1))
model['decode_head']['dropout_ratio'] = 0
"""


@pytest.fixture
def write(tiny_config: Callable[..., Path], many_shapes: Path) -> Callable[..., Path]:
    """Writes a tiny config with enough images for a hold-out: ``write(task, extra)``."""
    return partial(tiny_config, shapes=many_shapes)


def first_losses(folder: Path) -> dict[str, float]:
    """What a training logged after its first step."""
    log = next(folder.glob('*/vis_data/scalars.json'))
    return json.loads(log.read_text().splitlines()[0])


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=False)['state_dict']


@pytest.mark.parametrize(
    'task',
    [*(pytest.param(task, marks=pytest.mark.slow) for task in ('fpn', 'retinanet')), 'mask_rcnn'],
)
def test_a_resumed_supernet_ends_as_one_left_alone(task, write, tmp_path, run_tool):
    config = write(task, SEARCH)
    done = run_tool('train.py', config, '--seed', 0, '--work-dir', 'alone')
    assert done.returncode == 0, done.stderr[-3000:]

    resumed = tmp_path / 'resumed'
    resumed.mkdir()
    (resumed / 'iter_2.pth').write_bytes((tmp_path / 'alone' / 'iter_2.pth').read_bytes())
    (resumed / 'last_checkpoint').write_text(str(resumed / 'iter_2.pth'))
    done = run_tool('train.py', config, '--seed', 0, '--work-dir', resumed, '--resume')
    assert done.returncode == 0, done.stderr[-3000:]
    expected, found = (weights_of(tmp_path / run / 'iter_4.pth') for run in ('alone', 'resumed'))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_two_processes_train_as_one_with_the_doubled_batch(write, tmp_path, run_tool):
    config = write('fpn', SEARCH + COMPARABLE)
    options = ['--seed', 0, '--work-dir', 'two', '--launcher', 'pytorch']
    done, _ = run_in_two(tmp_path, TOOLS / 'train.py', config, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    batch = ('--cfg-options', 'train_dataloader.batch_size=4')
    done = run_tool('train.py', config, '--seed', 0, '--work-dir', 'one', *batch)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (weights_of(tmp_path / run / 'iter_1.pth') for run in ('one', 'two'))
    for name, tensor in one.items():
        tolerance = (1e-5 if 'running_' in name else 1e-6) * max(1, tensor.abs().max())
        assert (tensor - two[name]).abs().max() < tolerance, name
    name = 'decode_head.conv_seg.bias'
    assert one[name].abs().max() > 1e-3, 'it starts at 0'


def test_losses_of_networks_in_full_and_mixed_precision(write, tmp_path, run_tool):
    config = write('fpn', SEARCH)
    for folder, options in (('full', ()), ('mixed', ('--amp',))):
        done = run_tool('train.py', config, '--seed', 0, '--work-dir', folder, *options)
        assert done.returncode == 0, done.stderr[-3000:]
    full, mixed = first_losses(tmp_path / 'full'), first_losses(tmp_path / 'mixed')
    kinds = [full[f'loss_{name}'] for name in ('largest', 'smallest', 'random', 'random')]
    assert full['loss'] == pytest.approx(sum(kinds) / 4)
    assert len(set(kinds)) == 3
    assert mixed['loss'] != full['loss']
    assert mixed['loss'] == pytest.approx(full['loss'], rel=0.05)


def test_a_supernet_that_starts_from_one_keeps_the_order_of_its_channels(write, tmp_path, run_tool):
    config = write('fpn', SEARCH)
    read = load_config(str(config))
    set_classes(read, ('train',))
    given = write_supernet(read, tmp_path / 'given.pth')
    # Nothing but the statistics of norms moves.
    options = (f'load_from={given}', 'train_cfg.max_iters=2', 'optim_wrapper.optimizer.lr=0')
    done = run_tool('train.py', config, '--seed', 0, '--work-dir', 'out', '--cfg-options', *options)
    assert done.returncode == 0, done.stderr[-3000:]
    expected, found = weights_of(given), weights_of(tmp_path / 'out' / 'iter_2.pth')
    for name in expected:
        if 'running_' not in name and 'num_batches' not in name:
            assert torch.equal(found[name], expected[name]), name


def test_a_step_follows_the_mean_of_the_networks_gradients(monkeypatch):
    model = nn.Module()
    model.weight = nn.Parameter(torch.tensor(7.0))
    model.data_preprocessor = lambda data, training: data
    model.forward = lambda mode: model.factor * model.weight
    model.parse_losses = lambda loss: (loss, {})
    # In place of networks, what their losses are in units of the weight.
    factors = iter((1.0, 2.0, 3.0, 6.0))
    monkeypatch.setattr(supernet, 'make_elastic', lambda model, layout: model)
    monkeypatch.setattr(
        supernet, 'set_choice', lambda model, *_: setattr(model, 'factor', next(factors))
    )
    rng = np.random.default_rng(0)
    net = Supernet(model, SimpleNamespace(space=SPACE), lambda: rng)
    optim_wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.5))
    losses = net.train_step({}, optim_wrapper)
    assert model.weight.item() == 7 - 0.5 * 3
    assert {name: float(loss) for name, loss in losses.items()} == pytest.approx(
        dict(loss=21, loss_largest=7, loss_smallest=14, loss_random=31.5)
    )


@pytest.mark.parametrize('classes', [('cat', 'dog'), ('cell',)])
def test_a_supernet_that_starts_from_one_holds_out_no_more(classes):
    config = Config({**CONFIG, 'search': dict(holdout=0.2)})
    checkpoint = dict(
        search_space=SPACE.to_json(),
        meta=dict(cfg='search = dict(holdout=0.1)', dataset_meta=dict(classes=['cat', 'dog'])),
    )
    dataset = SimpleNamespace(metainfo=dict(classes=classes))
    runner = SimpleNamespace(cfg=config, train_dataloader=SimpleNamespace(dataset=dataset))
    hook = SpaceHook(SPACE)
    refused = pytest.raises(ConfigError, match='hold-out')
    # One of other classes was trained on other images.
    with nullcontext() if classes == ('cell',) else refused:
        hook.after_load_checkpoint(runner, checkpoint)
    assert hook.has_supernet


def test_accumulated_gradients_are_refused(write, run_tool):
    config = write('fpn', SEARCH + 'optim_wrapper = dict(accumulative_counts=2)\n')
    done = run_tool('train.py', config)
    assert done.returncode == 1 and 'accumulative_counts' in done.stderr
