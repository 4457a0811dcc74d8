"""A training of milliseconds, in which everything occurs that a resumed one has to restore."""

import os
import random
import signal
import uuid
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS
from torch import Tensor, nn
from torch.utils.data import Dataset

from backbones.engine.runner import ReliableRunner

EMA = {'type': 'EMAHook', 'momentum': 0.1}


@DATASETS.register_module(force=True)
class ToyNumbers(Dataset):
    """Numbers with noise from every source of random numbers that a transform may use."""

    metainfo: dict = {}  # noqa: RUF012

    def __init__(self, length: int = 20) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        noise = random.random() + np.random.rand() + float(torch.rand(()))
        inputs = torch.tensor([index / self.length, noise, 1.0, -1.0])
        return {'inputs': inputs, 'data_samples': SimpleNamespace(img_path=f'{index}.jpg')}


@MODELS.register_module(force=True)
class ToyModel(BaseModel):
    """Linear layers with BatchNorm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1)
        )

    def forward(self, inputs: Sequence[Tensor], data_samples: Any, mode: str) -> Any:
        outputs = self.layers(torch.stack(tuple(inputs)))
        if mode == 'predict':
            return [{'score': float(output)} for output in outputs]
        return {'loss_a': outputs.square().mean(), 'loss_b': outputs.abs().mean()}


@METRICS.register_module(force=True)
class ToyScore(BaseMetric):
    default_prefix = 'toy'

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        self.results.extend(sample['score'] for sample in data_samples)

    def compute_metrics(self, results: list) -> dict:
        return {'score': float(np.mean(results))}


class PowerCut(Exception):
    """Ends a training without leaving it time for anything."""


def cut_power(runner: ReliableRunner) -> None:
    raise PowerCut


def send_sigterm(runner: ReliableRunner) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def fail_in_second_process(runner: ReliableRunner) -> None:
    if runner.rank == 1:
        raise RuntimeError('the second process has had enough')


def corrupt_weights(runner: ReliableRunner) -> None:
    """Let the next losses be NaN."""
    nn.init.constant_(runner.model.layers[0].weight, float('nan'))


def corrupt_bias(runner: ReliableRunner) -> None:
    """Let the next losses be infinite."""
    nn.init.constant_(runner.model.layers[-1].bias, float('inf'))


def corrupt_gradients(runner: ReliableRunner) -> None:
    """Let all gradients from here on be infinite, and the losses finite."""
    runner.model.layers[0].weight.register_hook(lambda grad: torch.full_like(grad, float('inf')))


def overflow_once(runner: ReliableRunner) -> None:
    """Let the next gradient alone be infinite."""

    def corrupt(gradient: Tensor) -> Tensor:
        handle.remove()
        return gradient * float('inf')

    handle = runner.model.layers[0].weight.register_hook(corrupt)


@HOOKS.register_module(force=True)
class Disturb(Hook):
    """Calls a function of this module at one step of the training, or of its validations."""

    priority = 'NORMAL'

    def __init__(self, step: int, what: str, validation: bool = False) -> None:
        self.step, self.what, self.validation = step, what, validation

    def before_train_iter(self, runner: ReliableRunner, *args: Any, **kwargs: Any) -> None:
        if not self.validation and runner.iter == self.step:
            globals()[self.what](runner)

    def before_val_iter(self, runner: ReliableRunner, *args: Any, **kwargs: Any) -> None:
        if self.validation and runner.iter == self.step:
            globals()[self.what](runner)


def disturb(step: int, what: str, validation: bool = False) -> dict:
    """What to change in :func:`toy_config`, so that something happens at a step."""
    hook = {'type': 'Disturb', 'step': step, 'what': what, 'validation': validation}
    return {'custom_hooks': [EMA, hook]}


def toy_config(folder: Path, by_epoch: bool = False, **changes: Any) -> Config:
    """A training of 24 steps with two numbers each, validated every sixth step or second epoch.

    Args:
        folder: The work folder.
        by_epoch: Whether it goes by epochs, of which it has three.
        **changes: Entries of the config by dotted key, with ``__`` for the dots.
    """
    sampler = 'DefaultSampler' if by_epoch else 'InfiniteSampler'
    loader = {'batch_size': 2, 'num_workers': 0, 'dataset': {'type': 'ToyNumbers'}}
    config = Config(
        {
            'default_scope': 'mmengine',
            'model': {'type': 'ToyModel'},
            'train_dataloader': {**loader, 'sampler': {'type': sampler, 'shuffle': True}},
            'val_dataloader': {**loader, 'sampler': {'type': 'DefaultSampler', 'shuffle': False}},
            'val_evaluator': {'type': 'ToyScore'},
            'train_cfg': {'by_epoch': True, 'max_epochs': 3, 'val_interval': 2}
            if by_epoch
            else {'by_epoch': False, 'max_iters': 24, 'val_interval': 6},
            'val_cfg': {},
            'optim_wrapper': {'optimizer': {'type': 'AdamW', 'lr': 0.01}},
            'param_scheduler': [{'type': 'LinearLR', 'by_epoch': False, 'end': 24}],
            'default_hooks': {
                'checkpoint': {
                    'type': 'CheckpointHook',
                    'by_epoch': by_epoch,
                    'interval': 1 if by_epoch else 4,
                    'save_best': 'toy/score',
                    'rule': 'greater',
                    'max_keep_ckpts': 2,
                },
            },
            'custom_hooks': [EMA],
            'randomness': {'seed': 3},
            'work_dir': str(folder),
            'experiment_name': f'{folder.name}_{uuid.uuid4()}',
            'log_level': 'WARNING',
        }
    )
    config.merge_from_dict({key.replace('__', '.'): value for key, value in changes.items()})
    return config


def train(config: Config) -> None:
    """Train as tools/train.py does."""
    ReliableRunner.from_cfg(config).train()


def end_of(folder: Path) -> dict:
    """All that a training has come to, by name."""
    last = torch.load((folder / 'last_checkpoint').read_text(), weights_only=False)
    log = last['message_hub']
    best = {path.name: torch.load(path, weights_only=False) for path in folder.glob('best_*')}
    logged = {
        name: buffer.data[0].tolist()
        for name, buffer in log['log_scalars'].items()
        if 'time' not in name and name != 'train/memory'
    }
    return {
        'place': (last['meta']['iter'], last['meta']['epoch']),
        'weights': last['state_dict'],
        'moving average': last['ema_state_dict'],
        'optimizer': last['optimizer'],
        'schedule': last['param_schedulers'],
        'log': logged,
        'best score': log['runtime_info'].get('best_score'),
        'best': {name: checkpoint['state_dict'] for name, checkpoint in best.items()},
    }


def differences(first: Any, second: Any, name: str = '') -> list[str]:
    """The places in which two structures differ, tensors bit for bit."""
    if isinstance(first, dict) and isinstance(second, dict):
        parts = [(key, first.get(key), second.get(key)) for key in first | second]
    elif isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        parts = [(index, *pair) for index, pair in enumerate(zip_longest(first, second))]
    else:
        is_tensor = isinstance(first, Tensor) and isinstance(second, Tensor)
        same = torch.equal(first, second) if is_tensor else first == second
        # The norm of gradients that are too large for float16 is NaN.
        same = same or (first != first and second != second)
        return [] if same else [name]
    return [place for key, *pair in parts for place in differences(*pair, f'{name}.{key}')]
