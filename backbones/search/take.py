"""Writing a network of a search as an ordinary config and checkpoint."""

import json
import os
from pathlib import Path
from pprint import pformat
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor

from backbones.data.config_datasets import datasets_of
from backbones.engine.config import load_config
from backbones.errors import ConfigError
from backbones.files import atomic_write, write_text

from .evaluate import Evaluator, load_supernet
from .holdout import prepare_holdout
from .space import Choice, Space

LINE_LENGTH = 100
# Options that concern the search, not the recipe of the training.
RUN_ONLY = ('search', 'work_dir', 'load_from', 'resume')


def take_network(
    config: Config, source: str, number: int, path: Path, options: dict[str, Any]
) -> None:
    """Write a network of a search's front, by its number, as a config and a checkpoint.

    Args:
        config: The config of the search, with ``work_dir``; modified in place.
        source: The checkpoint that was searched.
        number: The number of the network in front.md.
        path: The config to write.
        options: The overrides of the config, by dotted key.
    """
    if path.suffix != '.py':
        raise ConfigError(f'--out is the config to write and must end with .py, unlike {path}')
    for file in (path, path.with_suffix('.pth')):
        if file.exists():
            raise ConfigError(f'{file} exists already: choose another --out, or remove it')
    found = Path(config.work_dir) / 'search' / 'front.json'
    if not found.is_file():
        raise ConfigError(f'there is no {found}: run `search.py find` first')
    front = json.loads(found.read_text(encoding='utf-8'))
    members = {member['number']: member for member in front['networks']}
    if number not in members:
        raise ConfigError(f'--number must be 1 to {max(members)}, see front.md, not {number}')
    member = members[number]
    prepare_holdout(config)
    layout, state_dict = load_supernet(config, source)
    evaluator = Evaluator(config, layout, state_dict)
    choice = Choice.from_dict(member['choice'])
    if choice not in evaluator.known:
        raise ConfigError(
            f'{found} was made with another checkpoint than {source}, or other --cfg-options or '
            '--skip-bad: use those that `find` was called with, or search again'
        )
    milliseconds = member['measured_ms'] or member['latency_ms']
    latency = f', {milliseconds:.1f} ms' if milliseconds else ''
    comment = (
        f'From a search: {front["metric"]} {member["metric"]:.4g} on the hold-out{latency}, '
        f'{member["parameters"] / 1e6:.2f} M parameters.'
    )
    write_network(config, choice, evaluator.calibrated_state_dict(choice), path, comment, options)


def write_network(
    config: Config,
    choice: Choice,
    state_dict: dict[str, Tensor],
    path: Path,
    comment: str,
    options: dict[str, Any],
) -> None:
    """Write a network's config, which inherits the search's, and its weights beside it."""
    weights = path.with_suffix('.pth')
    metainfo = next(datasets_of(config, ('train',))).get('metainfo') or {}
    classes = metainfo.get('classes')
    with atomic_write(weights) as partial:
        meta = {'dataset_meta': {'classes': tuple(classes)}} if classes else {}
        torch.save({'state_dict': state_dict, 'meta': meta}, partial)
    base = os.path.relpath(config.filename, path.parent.resolve())
    given = {key: each for key, each in options.items() if key.partition('.')[0] not in RUN_ONLY}
    # The base config computes other values from these, so the new config must set them too.
    settings = {key: each for key, each in given.items() if key in config.get('settings', ())}
    given |= Space.from_config(config).options(choice, config)
    # load_from has the weights of the whole model.
    given['model.backbone.init_cfg'] = None
    read = [load_config(config.filename, each).to_dict() for each in (given, settings)]
    # search=None makes it an ordinary training.
    values = dict(_base_=base, search=None, load_from=str(weights)) | settings | changes(*read)
    lines = [f'# {comment}', *(assignment(key, value) for key, value in values.items())]
    write_text(path, '\n'.join(lines))


def assignment(name: str, value: Any) -> str:
    """Return the config line that sets a name, or several lines if one would be too long."""
    start = f'{name} = '
    text = pformat(value, width=LINE_LENGTH - len(start), sort_dicts=False)
    return start + text.replace('\n', '\n' + ' ' * len(start))


def changes(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """Return what a config that inherits `old` must set to be equal to `new`."""
    found = {}
    for key, value in new.items():
        if key in old and value == old[key]:
            continue
        if isinstance(value, dict) and key in old:
            # mmengine merges only dicts, and never drops a key.
            is_merged = isinstance(old[key], dict) and old[key].keys() <= value.keys()
            value = changes(value, old[key]) if is_merged else dict(value, _delete_=True)
        found[key] = value
    return found
