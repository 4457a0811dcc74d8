"""Find the models that a command line names, and open them."""

import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backbones.errors import ConfigError
from backbones.inference import Inferencer
from backbones.inference.exported_file import is_exported
from backbones.weights import config_of, load_checkpoint

# A config and its checkpoint; the config is None if the checkpoint contains it, and the checkpoint
# is None for an exported file.
Named = tuple[str | None, str | None]


def pair_up(arguments: Sequence[str]) -> list[Named]:
    """Split arguments into models: CONFIG CHECKPOINT, CHECKPOINT alone, or an exported file."""
    models: list[Named] = []
    rest = list(arguments)
    while rest:
        first = rest.pop(0)
        if is_exported(first):
            models.append((first, None))
        elif not first.endswith('.py'):
            models.append((None, first))
        elif rest and not is_exported(rest[0]) and not rest[0].endswith('.py'):
            models.append((first, rest.pop(0)))
        else:
            raise ConfigError(f'{first} is a config: its checkpoint must come right after it')
    return models


def name_models(models: Sequence[Named]) -> list[str]:
    """Return a unique name for each: that of its config or file, else with folder or suffix."""
    files = [Path(config or checkpoint) for config, checkpoint in models]
    counts = Counter(file.stem for file in files)
    names = []
    for (_, checkpoint), file in zip(models, files, strict=True):
        name = file.stem
        if counts[name] > 1:
            weights = Path(checkpoint or file).absolute()
            name = f'{weights.parent.name} {weights.stem}' if checkpoint else file.name
        number = sum(each.partition(' #')[0] == name for each in names) + 1
        names.append(name if number == 1 else f'{name} #{number}')
    return names


def open_models(models: Sequence[Named], **options: Any) -> dict[str, Inferencer]:
    """Open the models of a page, by name; ``options`` are :class:`.Inferencer`'s."""
    opened = {}
    for name, (config, checkpoint) in zip(name_models(models), models, strict=True):
        with tempfile.TemporaryDirectory() as folder:
            if config is None:
                config = write_config(checkpoint, Path(folder))
            # Every score is kept: the page has a threshold of its own.
            opened[name] = Inferencer(config, checkpoint, score_thr=0.0, **options)
    return opened


def write_config(checkpoint: str, folder: Path) -> Path:
    """Write the config that a training saved in its checkpoint; return the file's path."""
    config = config_of(load_checkpoint(checkpoint))
    if config is None:
        raise ConfigError(f'{checkpoint} contains no config: give CONFIG {checkpoint}')
    path = folder / 'config.py'
    config.dump(path)
    return path
