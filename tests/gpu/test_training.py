"""Trainings on a GPU, by the tools' command lines."""

import json
from pathlib import Path

import pytest
import torch
from tiny import write_tiny_config
from tool_process import launch
from toy_training import differences, disturb, end_of, toy_config, train

from backbones.engine.checkpoints import resume
from backbones.engine.preemption import Preempted

TASKS = ['fpn', 'ham', 'retinanet', 'mask_rcnn']
LONGER = """
train_cfg.update(max_iters=60, val_interval=60)
optim_wrapper = dict(optimizer=dict(lr=2e-3))
"""


def losses_in(work_dir: Path) -> list[float]:
    lines = next(work_dir.glob('*/vis_data/scalars.json')).read_text().splitlines()
    return [entry['loss'] for entry in map(json.loads, lines) if 'loss' in entry]


@pytest.mark.parametrize('options', [[], ['--amp']], ids=str)
@pytest.mark.parametrize('task', TASKS)
def test_the_loss_falls(task, options, shapes, tmp_path, run_tool):
    config = write_tiny_config(tmp_path, task, shapes, LONGER)
    done = run_tool('train.py', config, '--seed', 0, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert torch.cuda.get_device_name() in done.stdout
    assert ('float16' in done.stdout) == bool(options)
    losses = losses_in(tmp_path / 'work_dirs' / config.stem)
    assert len(losses) == 60
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


@pytest.mark.parametrize('step', [0, 13])
@pytest.mark.parametrize('amp', [False, True])
def test_a_resumed_training_ends_as_one_left_alone(amp, step, tmp_path):
    scaled = dict(optim_wrapper__type='AmpOptimWrapper', optim_wrapper__loss_scale='dynamic')
    settings = scaled if amp else {}
    train(toy_config(tmp_path / 'alone', **settings))
    with pytest.raises(Preempted):
        train(toy_config(tmp_path / 'stopped', **settings, **disturb(step, 'send_sigterm')))
    config = toy_config(tmp_path / 'stopped', **settings)
    resume(config, 'auto')
    train(config)
    assert not differences(end_of(tmp_path / 'stopped'), end_of(tmp_path / 'alone'))


@pytest.mark.parametrize('task', ['fpn', 'mask_rcnn'])
def test_trains_under_torchrun(task, shapes, tmp_path):
    """With NCCL, and SyncBN where a config has it."""
    config = write_tiny_config(tmp_path, task, shapes)
    done = launch('dist_train.sh', config, 1, '--amp', '--val-loss', cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(losses_in(tmp_path / 'work_dirs' / config.stem)) == 2


def test_more_processes_than_gpus_are_refused(shapes, tmp_path):
    config = write_tiny_config(tmp_path, 'fpn', shapes)
    count = torch.cuda.device_count() + 1
    done = launch('dist_train.sh', config, count, cwd=tmp_path)
    assert done.returncode == 1
    assert f'{count} processes' in done.stderr


def test_a_batch_that_is_too_large_is_explained(shapes, tmp_path, run_tool):
    huge = "model['data_preprocessor']['size'] = (50000, 50000)\n"
    config = write_tiny_config(tmp_path, 'fpn', shapes, huge)
    done = run_tool('train.py', config)
    assert done.returncode == 1
    assert 'batch_size' in done.stderr and 'Traceback' not in done.stderr
