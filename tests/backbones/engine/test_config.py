"""Fitting a config to the machine that it runs on."""

import re
import sys
from argparse import Namespace

import pytest
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.device import utils as device_utils

from backbones.engine.config import (
    fit_to_device,
    load_config,
    load_run_config,
    log_to_tensorboard,
    name_pretrained,
)
from backbones.engine.preflight import pretrained_backbone
from backbones.errors import ConfigError


@pytest.mark.parametrize('has_gpu', [False, True])
def test_what_needs_a_gpu_is_left_out_without_one(has_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: has_gpu)
    loader = dict(batch_size=2, pin_memory=True)
    model = dict(backbone=dict(norm_cfg=dict(type='SyncBN')))
    config = Config(dict(model=model, train_dataloader=loader, val_dataloader=None))
    fit_to_device(config)
    assert config.model.backbone.norm_cfg.type == ('SyncBN' if has_gpu else 'BN')
    assert config.train_dataloader.get('pin_memory', False) is has_gpu


def test_the_config_in_a_folder_is_named(tmp_path):
    """As an import writes it."""
    (tmp_path / 'cells').mkdir()
    (tmp_path / 'cells/cells.py').touch()
    with pytest.raises(ConfigError, match=re.escape('cells/cells.py')):
        load_config(str(tmp_path / 'cells'))


@pytest.mark.parametrize(('found', 'used'), [('mps', 'cpu'), ('cuda', 'cuda'), ('cpu', 'cpu')])
def test_apples_gpu_is_left_alone(found, used, tiny_config, monkeypatch):
    """Most of mmcv's operators are not for it."""
    monkeypatch.setattr(device_utils, 'DEVICE', found)
    args = Namespace(config=str(tiny_config('fpn')), cfg_options={}, launcher='none', work_dir=None)
    load_run_config(args)
    assert get_device() == used


AMP = dict(type='AmpOptimWrapper', dtype='bfloat16', loss_scale=512.0)
CPU_AMP = dict(type='CPUAmpOptimWrapper')


@pytest.mark.parametrize(
    ('has_gpu', 'given', 'expected'),
    [
        (False, AMP, CPU_AMP),
        (True, AMP, AMP),
        (True, CPU_AMP, dict(type='AmpOptimWrapper', loss_scale='dynamic')),
        (False, dict(type='OptimWrapper'), dict(type='OptimWrapper')),
        (True, dict(type='MyAmpOptimWrapper'), dict(type='MyAmpOptimWrapper')),
    ],
)
def test_mixed_precision_is_that_of_the_device(has_gpu, given, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: has_gpu)
    config = Config(dict(model={}, optim_wrapper=given))
    fit_to_device(config)
    assert config.optim_wrapper == expected


@pytest.mark.parametrize('is_installed', [True, False])
def test_runs_log_to_tensorboard_where_it_is_installed(is_installed, monkeypatch):
    if not is_installed:
        monkeypatch.setitem(sys.modules, 'tensorboard', None)
    config = Config()
    log_to_tensorboard(config)
    backends = [each.type for each in config.get('visualizer', {}).get('vis_backends', [])]
    assert backends == is_installed * ['LocalVisBackend', 'TensorboardVisBackend']


def test_mmsegs_older_way_to_start_from_weights_is_known():
    model = dict(pretrained='open-mmlab://resnet50_v1c', backbone=dict(type='ResNetV1c'))
    config = Config(dict(model=model, load_from='whole.pth'))
    name_pretrained(config)
    assert pretrained_backbone(config) == 'open-mmlab://resnet50_v1c'
    assert 'pretrained' not in config.model
