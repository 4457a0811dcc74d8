"""A network of a search as an ordinary config and checkpoint."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor

from backbones.data.config_datasets import datasets_of
from backbones.engine.config import load_config
from backbones.errors import ConfigError
from backbones.files import atomic_write

from .evaluate import Evaluator, load_supernet
from .holdout import prepare_holdout
from .space import Choice, Space

LINE_LENGTH = 100
# What an override says about the search, not about the recipe.
RUN_ONLY = ('search', 'work_dir', 'load_from', 'resume')


def take_network(
    config: Config, source: str, number: int, path: Path, options: dict[str, Any]
) -> None:
    """Write a network of a search's front as a config and a checkpoint.

    Args:
        config: The config of the search, with ``work_dir``; changed in place.
        source: The checkpoint that was searched.
        number: The network's in front.md.
        path: The config to write.
        options: The overrides that the config was read with, by dotted key.

    Raises:
        CheckpointError: The checkpoint does not fit.
        ConfigError: There is no front, it is of another checkpoint or has no such number, or a file
            to write is there already.
    """
    check_free(path)
    front, member = read_front(Path(config.work_dir) / 'search' / 'front.json', number)
    prepare_holdout(config)
    layout, state_dict = load_supernet(config, source)
    evaluator = Evaluator(config, layout, state_dict, config.work_dir)
    choice = Choice.from_json(json.dumps(member['choice']))
    if choice not in evaluator.known:
        raise ConfigError(
            f'{source} is not the checkpoint that {config.work_dir}/search/front.json was made '
            'with: give that one, or search again'
        )
    comment = comment_of(member, front['metric'])
    write_network(config, choice, evaluator.calibrated_state_dict(choice), path, comment, options)


def read_front(path: Path, number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What ``search.py find`` wrote, and the network of that number in it."""
    if not path.is_file():
        raise ConfigError(f'there is no {path}: run `search.py find` first')
    front = json.loads(path.read_text(encoding='utf-8'))
    members = {member['number']: member for member in front['networks']}
    if number not in members:
        raise ConfigError(f'--number is from 1 to {max(members)}, as in front.md, not {number}')
    return front, members[number]


def check_free(path: Path) -> None:
    """Raise ConfigError unless a config of that name, and weights beside it, can be written."""
    if path.suffix != '.py':
        raise ConfigError(f'--out is the config to write and ends with .py, unlike {path}')
    for file in (path, path.with_suffix('.pth')):
        if file.exists():
            raise ConfigError(f'{file} is there already: choose another --out, or remove it')


def write_network(
    config: Config,
    choice: Choice,
    state_dict: dict[str, Tensor],
    path: Path,
    comment: str,
    options: dict[str, Any],
) -> None:
    """Write a network's config, and its weights beside it with the suffix ``.pth``.

    Args:
        config: The config of the search, which the new one inherits from.
        choice: The network.
        state_dict: Its weights, from which its training starts.
        path: The config to write.
        comment: Its first line.
        options: The overrides that the config of the search was read with, by dotted key.
    """
    weights = path.with_suffix('.pth')
    metainfo = next(datasets_of(config, ('train',))).get('metainfo') or {}
    classes = metainfo.get('classes')
    with atomic_write(weights) as partial:
        meta = {'dataset_meta': {'classes': tuple(classes)}} if classes else {}
        torch.save({'state_dict': state_dict, 'meta': meta}, partial)
    base = os.path.relpath(config.filename, path.parent.resolve())
    given = {key: each for key, each in options.items() if key.partition('.')[0] not in RUN_ONLY}
    # What follows these in the base follows them in the new config too.
    settings = {key: each for key, each in given.items() if key in config.get('settings', ())}
    given |= Space.from_config(config).options(choice, config)
    # The weights are loaded with the rest of the model.
    given['model.backbone.init_cfg'] = None
    read = [load_config(config.filename, each).to_dict() for each in (given, settings)]
    lines = [
        f'# {comment}',
        f'_base_ = {base!r}',
        '',
        '# An ordinary training, and no longer a search.',
        'search = None',
        f'load_from = {str(weights)!r}',
        *(f'{key} = {format_value(each)}' for key, each in (settings | changes(*read)).items()),
    ]
    with atomic_write(path) as partial:
        partial.write_text('\n'.join(lines) + '\n')


def changes(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """What a config that inherits `old` has to say to be `new`."""
    found = {}
    for key, value in new.items():
        if key in old and value == old[key]:
            continue
        if isinstance(value, dict) and key in old:
            # mmengine merges dicts alone, and never drops a key.
            is_merged = isinstance(old[key], dict) and old[key].keys() <= value.keys()
            value = changes(value, old[key]) if is_merged else dict(value, _delete_=True)
        found[key] = value
    return found


def format_value(value: Any, indent: int = 0, room: int = LINE_LENGTH) -> str:
    """A value as a person would write it: on one line where there is room, else one item a line."""
    if isinstance(value, dict):
        opening, closing = 'dict(', ')'
        items = [(f'{key}=', item) for key, item in value.items()]
    elif isinstance(value, tuple | list):
        opening, closing = ('(', ')') if isinstance(value, tuple) else ('[', ']')
        items = [('', item) for item in value]
    else:
        return repr(value).removesuffix('.0') if isinstance(value, float) else repr(value)
    comma = ',' if isinstance(value, tuple) and len(value) == 1 else ''
    line = f'{opening}{", ".join(k + format_value(v, 0, 10**9) for k, v in items)}{comma}{closing}'
    # Of dicts, those in others on lines of their own.
    is_flat = not any(isinstance(item, dict) for _, item in items)
    if (is_flat and len(line) + indent + 12 <= room) or room > LINE_LENGTH:
        return line
    inner = ' ' * (indent + 4)
    rows = [f'{inner}{k}{format_value(v, indent + 4, room)},' for k, v in items]
    return '\n'.join([opening, *rows, ' ' * indent + closing])


def comment_of(member: dict[str, Any], metric: str) -> str:
    """What a network of the front is, for the first line of its config."""
    latency = member['measured_ms'] or member['latency_ms']
    costs = [f'{latency:.1f} ms'] if latency else []
    costs.append(f'{member["parameters"] / 1e6:.2f} M parameters')
    return f'From a search: {metric} {member["metric"]:.4g} on the hold-out, {", ".join(costs)}.'
