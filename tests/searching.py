"""A tiny search: its config, and a supernet that was never trained."""

from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from tiny import with_random_weights, write_tiny_config

from backbones.data.classes import set_classes
from backbones.engine.config import fit_to_device, load_config
from backbones.search.holdout import use_holdout
from backbones.search.space import Space

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
    checkpoint = {'state_dict': model.state_dict(), 'meta': {}}
    if space:
        checkpoint['search_space'] = Space.from_config(config).to_json()
    torch.save(checkpoint, path)
    return path
