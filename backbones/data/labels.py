"""The meaning of the values in a segmentation map, by mmseg's rules.

If ``reduce_zero_label`` is set, mmseg subtracts 1, and 0 becomes 255. If ``metainfo`` selects some
classes of a dataset type, ``label_map`` renumbers these and makes the others 255. Pixels with the
``ignore_index``, 255 by default, are neither learned nor measured.
"""

import inspect
from dataclasses import dataclass

import numpy as np
from mmengine.config import Config, ConfigDict
from mmengine.registry import TRANSFORMS

from backbones.errors import ConfigError

from .config_datasets import datasets_of, option, walk

DEFAULT_IGNORED = 255
# In place of a class, for values in a map that have none.
IGNORED, NO_CLASS = -1, -2


@dataclass(frozen=True)
class LabelRules:
    """How a dataset's segmentation maps are read."""

    num_classes: int
    reduce_zero_label: bool = False  # 0 means "unlabeled", and class k is stored as k + 1
    # The class, or 255, for every class number of the dataset's type.
    label_map: tuple[tuple[int, int], ...] = ()
    ignored: int = DEFAULT_IGNORED

    def classes_of_values(self) -> np.ndarray:
        """Return the class of each value 0 to 255 in a file, IGNORED or NO_CLASS; int64 (256,)."""
        labels = np.arange(256)
        if self.reduce_zero_label:
            labels = np.array([255, *range(254), 255])
        renumbered = labels.copy()
        for old, new in self.label_map:
            renumbered[labels == old] = new
        classes = np.where(renumbered < self.num_classes, renumbered, NO_CLASS)
        classes[renumbered == self.ignored] = IGNORED
        return classes

    def __str__(self) -> str:
        classes = self.classes_of_values()
        used, ignored = np.flatnonzero(classes >= 0), np.flatnonzero(classes == IGNORED)
        is_range = len(used) and used[-1] - used[0] == len(used) - 1
        listed = f'{used[0]} to {used[-1]}' if is_range else ', '.join(map(str, used))
        left_out = ', '.join(map(str, ignored))
        return f'the {self.num_classes} classes are {listed}, ignored is {left_out}'


def ignored_label(config: Config) -> int:
    """Return the config's ``ignore_index`` other than 255, else 255; ConfigError for several."""
    datasets = list(datasets_of(config))
    parts = [config.get(key) for key in ('model', 'val_evaluator', 'test_evaluator')]
    nodes = [*walk(parts), *datasets]
    chosen = {node.get('ignore_index'): node.get('type') for node in nodes}
    chosen = {label: owner for label, owner in chosen.items() if label not in (None, 255)}
    if not chosen:
        return DEFAULT_IGNORED
    if len(chosen) > 1:
        raise ConfigError(f'there is more than one ignore_index: {chosen}. Choose one label')
    ((value, owner),) = chosen.items()
    if any(option(dataset, 'reduce_zero_label') for dataset in datasets):
        raise ConfigError(
            f'{owner} has ignore_index={value}, but with reduce_zero_label=True mmseg '
            'ignores 255. Remove one of both'
        )
    return value


def set_ignored_label(config: Config) -> None:
    """Set the same ignored label in all parts of a segmentor's config that have one.

    mmseg has it in heads, metrics, transforms and the model's padding of images. If only some are
    changed, padding is trained as a class, or predictions there count as wrong.
    """
    value = ignored_label(config)
    if value == DEFAULT_IGNORED:
        return
    for node in walk(config.model):
        is_head = 'num_classes' in node and str(node.get('type')).endswith('Head')
        if is_head and node.get('ignore_index', 255) is not None:
            node.ignore_index = value
        if 'seg_pad_val' in node:
            node.seg_pad_val = value
    for node in walk([config.get('val_evaluator'), config.get('test_evaluator')]):
        if str(node.get('type')).endswith('IoUMetric'):
            node.ignore_index = value
    for dataset in datasets_of(config):
        dataset.ignore_index = value
        for node in walk(dataset.get('pipeline')):
            if 'type' in node:
                set_in_transform(node, value)


def set_in_transform(node: ConfigDict, value: int) -> None:
    """Set the label with which a transform fills maps, or which it does not count."""
    with TRANSFORMS.switch_scope_and_registry(node.get('_scope_', 'mmseg')) as registry:
        kind = registry.get(node.type) if isinstance(node.type, str) else node.type
    if kind is None:
        return
    parameters = inspect.signature(kind.__init__).parameters
    for name in ('seg_pad_val', 'ignore_index'):
        if name in parameters and node.get(name, parameters[name].default) == DEFAULT_IGNORED:
            node[name] = value
    if kind.__name__ == 'Pad':
        padding = node.get('pad_val', 0)
        padding = padding if isinstance(padding, dict) else {'img': padding}
        if padding.get('seg', DEFAULT_IGNORED) == DEFAULT_IGNORED:
            node.pad_val = {**padding, 'seg': value}
