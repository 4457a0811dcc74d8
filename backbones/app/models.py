"""Find the models that a command line names, and open them."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backbones.inference import Inferencer
from backbones.inference.exported_file import is_exported

# A config and its checkpoint; or an exported file and None.
Named = tuple[str, str | None]


def pair_up(arguments: Sequence[str]) -> list[Named]:
    """Split arguments into models: CONFIG CHECKPOINT, or an exported file."""
    models, rest = [], list(arguments)
    while rest:
        first = rest.pop(0)
        is_alone = is_exported(first) or not rest
        models.append((first, None if is_alone else rest.pop(0)))
    return models


def name_models(models: Sequence[Named]) -> list[str]:
    """Return a unique name for each: that of its config or file, else with folder or suffix."""
    files = [Path(config) for config, _ in models]
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
    # Every score is kept: the page has a threshold of its own.
    return {
        name: Inferencer(*files, score_thr=0.0, **options)
        for name, files in zip(name_models(models), models, strict=True)
    }
