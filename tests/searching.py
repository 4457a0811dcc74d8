"""A tiny search: its config, and a supernet that was never trained."""

from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from tiny import with_random_weights, write_tiny_config

from backbones.data.classes import set_classes
from backbones.engine.config import fit_to_device, load_config
from backbones.search.holdout import use_holdout
from backbones.search.latency import fit, latency_path
from backbones.search.space import Choice, Space

# 24 images, of which 8 are held out.
SEARCH = 'search = dict(necks=(8, 16), holdout=1 / 3, calibration_images=6)\n'


def write_search_config(folder: Path, task: str, shapes: Path, extra: str = '') -> Path:
    return write_tiny_config(folder, task, shapes, SEARCH + extra)


def prepared(path: Path, **options: object) -> Config:
    """A config that reads the hold-out, as a search does."""
    config = load_config(str(path), options)
    config.work_dir = str(path.parent / 'work')
    set_classes(config, ('train', 'val'))
    fit_to_device(config)
    use_holdout(config)
    return config


def write_supernet(config: Config, path: Path, space: bool = True) -> Path:
    """A checkpoint as the training of a supernet leaves it, or an ordinary one."""
    torch.manual_seed(0)
    model = with_random_weights(MODELS.build(config.model))
    checkpoint = {'state_dict': model.state_dict(), 'meta': {'cfg': config.pretty_text}}
    if space:
        checkpoint['search_space'] = Space.from_config(config).to_json()
    torch.save(checkpoint, path)
    return path


def write_latency(config: Config, folder: Path, noise: float = 0.0) -> None:
    """A model of the latency on some other device."""
    space = Space.from_config(config)
    rng = np.random.default_rng(0)
    choices = [space.sample(rng) for _ in range(40)]
    times = [
        sum(space.widths(choice).values()) * rng.uniform(1 - noise, 1 + noise) for choice in choices
    ]
    folder.mkdir(parents=True, exist_ok=True)
    measured = dict(zip(choices, times, strict=True))
    fit(space, choices, times).save(latency_path(folder, 'csv'), config, measured)


# Invented costs and metrics of the networks of a real space.
CONFIG = Config(
    dict(
        search=dict(),
        model=dict(
            backbone=dict(type='EfficientFormerV2', arch='s0', out_indices=(0, 1, 2, 3)),
            neck=dict(type='FPN', out_channels=256),
            decode_head=dict(type='FPNHead', channels=128, in_channels=[256] * 4),
        ),
    )
)
SPACE = Space.from_config(CONFIG)


def costs(choice: Choice) -> dict[str, float]:
    widths = SPACE.widths(choice)
    stages = [
        sum(widths[f'stages.{stage}.blocks.{block}'] for block in choice.blocks(stage)) * width
        for stage, width in enumerate(choice.channels)
    ]
    latency = 5 + 1e-4 * sum(n * 4.0**-i for i, n in enumerate(stages)) + choice.neck**2 * 1e-4
    latency += sum(choice.num_attention_blocks)
    return dict(latency=latency, parameters=sum(stages) + choice.neck**2 * 40)


def metric(choice: Choice) -> float:
    """A sum over the dimensions, each with a weight of its own."""
    values = [*choice.channels, *sum(choice.ratios, ()), *choice.num_attention_blocks, choice.neck]
    weights = np.random.default_rng(0).uniform(0.1, 1, len(values))
    return float(weights @ np.log1p(values))
