"""A network of a search as an ordinary config and checkpoint."""

import os
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor

from backbones.errors import ConfigError
from backbones.files import atomic_write

from .space import Choice, Space

LINE_LENGTH = 100


def write_network(
    config: Config,
    choice: Choice,
    state_dict: dict[str, Tensor],
    classes: list[str] | None,
    path: Path,
    comment: str,
) -> None:
    """Write a network's config, and its weights beside it with the suffix ``.pth``.

    Args:
        config: The config of the search, which the new one inherits from.
        choice: The network.
        state_dict: Its weights, from which its training starts.
        classes: Names of the classes that the weights know.
        path: The config to write.
        comment: Its first line.

    Raises:
        ConfigError: One of the two files is there already, or ``path`` does not end with .py.
    """
    if path.suffix != '.py':
        raise ConfigError(f'--out is the config to write, which ends with .py, not {path}')
    weights = path.with_suffix('.pth')
    for file in (path, weights):
        if file.exists():
            raise ConfigError(f'{file} is there already: choose another --out, or remove it')
    with atomic_write(weights) as partial:
        meta = {'dataset_meta': {'classes': classes}} if classes else {}
        torch.save({'state_dict': state_dict, 'meta': meta}, partial)
    base = os.path.relpath(config.filename, path.parent.resolve())
    options = Space.from_config(config).options(choice, config)
    model = nest(options)['model']
    # The weights are loaded with the rest of the model.
    model['backbone']['init_cfg'] = None
    lines = [
        f'# {comment}',
        f'_base_ = {base!r}',
        '',
        '# An ordinary training, and no longer a search.',
        'search = None',
        f'load_from = {str(weights)!r}',
        f'model = {format_value(model)}',
    ]
    with atomic_write(path) as partial:
        partial.write_text('\n'.join(lines) + '\n')


def nest(options: dict[str, Any]) -> dict[str, Any]:
    """A dict of dicts out of dotted keys."""
    nested: dict[str, Any] = {}
    for key, value in options.items():
        *parents, last = key.split('.')
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return nested


def format_value(value: Any, indent: int = 0, room: int = LINE_LENGTH) -> str:
    """A value as a person would write it: on one line where there is room, else one item a line."""
    if isinstance(value, dict):
        opening, closing = 'dict(', ')'
        items = [(f'{key}=', item) for key, item in value.items()]
    elif isinstance(value, tuple | list):
        opening, closing = ('(', ')') if isinstance(value, tuple) else ('[', ']')
        items = [('', item) for item in value]
    else:
        return f'{value:g}' if isinstance(value, float) else repr(value)
    comma = ',' if isinstance(value, tuple) and len(value) == 1 else ''
    line = f'{opening}{", ".join(k + format_value(v, 0, 10**9) for k, v in items)}{comma}{closing}'
    # Of dicts, those in others on lines of their own.
    is_flat = not any(isinstance(item, dict) for _, item in items)
    if (is_flat and len(line) + indent + 12 <= room) or room > LINE_LENGTH:
        return line
    inner = ' ' * (indent + 4)
    rows = [f'{inner}{k}{format_value(v, indent + 4, room)},' for k, v in items]
    return '\n'.join([opening, *rows, ' ' * indent + closing])


def comment_of(number: int, metric: str, member: dict[str, Any]) -> str:
    """What a network of the front is, for the first line of its config."""
    latency = f', {member["latency"]:.1f} ms' if member.get('latency') else ''
    return (
        f'Number {number} of a search: {metric} {member["metric"]:.4g} on the hold-out{latency}, '
        f'{member["parameters"] / 1e6:.2f} M parameters.'
    )
