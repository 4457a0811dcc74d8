"""Losses and gradients that are no longer numbers stop a training in their step."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from mmengine.optim.optimizer import amp_optimizer_wrapper
from toy_training import disturb, end_of, toy_config, train

from backbones.engine.nan_guard import DivergenceError

OFTEN = {'default_hooks__checkpoint__interval': 1}


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob('iter_*.pth'))


@pytest.mark.parametrize(('part', 'value'), [('weights', 'nan'), ('bias', 'inf')])
def test_a_loss_that_is_no_number_is_named_with_its_images(part, value, tmp_path):
    with pytest.raises(DivergenceError) as stopped:
        train(toy_config(tmp_path, **OFTEN, **disturb(4, f'corrupt_{part}')))
    message = str(stopped.value)
    assert f'loss_a is {value}, loss_b is {value} at iteration 5' in message
    assert len(re.findall(r'\d+\.jpg', message)) == 2
    assert f'the last good checkpoint is {tmp_path}/iter_4.pth' in message
    assert checkpoints(tmp_path) == ['iter_3.pth', 'iter_4.pth'], 'the corrupt step is not saved'
    assert all(tensor.isfinite().all() for tensor in end_of(tmp_path)['weights'].values())


def test_a_gradient_that_is_infinite_stops_too(tmp_path):
    with pytest.raises(DivergenceError, match='the gradient norm is inf at iteration 3'):
        train(toy_config(tmp_path, **OFTEN, **disturb(2, 'corrupt_gradients')))
    assert checkpoints(tmp_path) == ['iter_1.pth', 'iter_2.pth']


@pytest.fixture
def float16(monkeypatch: pytest.MonkeyPatch) -> dict:
    """mmengine's mixed precision with torch's loss scaling, which exists for CPUs as well."""
    monkeypatch.setattr(amp_optimizer_wrapper, 'is_cuda_available', lambda: True)
    scaler = partial(torch.amp.GradScaler, 'cpu')
    monkeypatch.setattr(amp_optimizer_wrapper, 'GradScaler', scaler)
    return {'optim_wrapper__type': 'AmpOptimWrapper'}


def test_loss_scaling_may_overflow(float16, tmp_path):
    train(toy_config(tmp_path, **float16, **disturb(5, 'overflow_once')))
    norms = end_of(tmp_path)['log']['train/grad_norm']
    assert [index for index, norm in enumerate(norms) if not norm < float('inf')] == [5]
    assert all(tensor.isfinite().all() for tensor in end_of(tmp_path)['weights'].values())


def test_an_overflow_without_end_is_none(float16, tmp_path):
    """Each one halves the scale, until that cannot be the reason any more."""
    float16['optim_wrapper__loss_scale'] = {'init_scale': 2.0**-10}
    with pytest.raises(DivergenceError, match='the gradient norm is inf at iteration 10'):
        train(toy_config(tmp_path, **float16, **disturb(5, 'corrupt_gradients')))


def test_the_gradient_norm_is_logged_and_measuring_it_changes_no_gradient(tmp_path):
    """Clipping far above any norm multiplies by one."""
    logger = {'default_hooks__logger': {'type': 'LoggerHook', 'interval': 1}}
    runs = []
    for name, clip_grad in (('measured', None), ('clipped', {'max_norm': 1e6})):
        train(toy_config(tmp_path / name, optim_wrapper__clip_grad=clip_grad, **logger))
        runs.append(end_of(tmp_path / name)['weights'])
        lines = next(tmp_path.glob(f'{name}/*/vis_data/scalars.json')).read_text().splitlines()
        norms = [entry['grad_norm'] for entry in map(json.loads, lines) if 'lr' in entry]
        assert len(norms) == 24 and min(norms) > 0
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
