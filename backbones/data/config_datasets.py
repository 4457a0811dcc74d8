"""The datasets that a config names, out of their wrappers."""

from collections.abc import Iterator

from mmengine.config import Config, ConfigDict

SPLITS = ('train', 'val', 'test')


def datasets_of(config: Config, splits: tuple[str, ...] = SPLITS) -> Iterator[ConfigDict]:
    """The datasets that a config reads, out of wrappers such as RepeatDataset.

    Args:
        config: The config.
        splits: Which of 'train', 'val' and 'test'. Default: all that there are.
    """
    for split in splits:
        loader = config.get(f'{split}_dataloader')
        if loader:
            yield from unwrap_dataset(loader.dataset)


def test_pipeline(config: Config) -> list[ConfigDict]:
    """What a config does to the pictures of a test; nothing where it does not say."""
    dataset = next(datasets_of(config, ('test', 'val')), {})
    return dataset.get('pipeline') or config.get('test_pipeline') or []


def unwrap_dataset(dataset: ConfigDict) -> Iterator[ConfigDict]:
    """What a dataset is made of: itself, or what it wraps or joins."""
    if 'dataset' in dataset:
        yield from unwrap_dataset(dataset.dataset)
    elif 'datasets' in dataset:
        for part in dataset.datasets:
            yield from unwrap_dataset(part)
    else:
        yield dataset


def walk(node: object) -> Iterator[ConfigDict]:
    """All dicts inside a config, outermost first."""
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from walk(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from walk(value)
