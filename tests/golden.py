"""Checkpoints in the published layouts, and what the published networks compute from them."""

import json
from pathlib import Path

import torch
from make_checkpoint import make_state_dict
from torch import Tensor

GOLDEN = Path(__file__).parent / 'data' / 'golden'


def read_manifest(name: str) -> dict:
    """What a published file holds, key by key; ``name`` is 'snap_s0_imagenet' for instance."""
    return json.loads((GOLDEN / f'{name}.json').read_text())


def published(name: str) -> dict[str, Tensor]:
    """The tensors of a published file, filled with reproducible numbers."""
    return {
        key: torch.from_numpy(value) for key, value in make_state_dict(read_manifest(name)).items()
    }


def published_file(name: str) -> dict:
    """A published file as it is: its tensors under the key that it keeps them under."""
    wrapper = read_manifest(name)['wrapper']
    return {wrapper: published(name)} if wrapper else published(name)
