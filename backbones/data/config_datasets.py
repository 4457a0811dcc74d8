"""Find the datasets of a config, inside wrappers too, and their files."""

import inspect
import io
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path

from mmengine.config import Config, ConfigDict
from mmengine.registry import DATASETS
from torch.utils.data import Dataset

from backbones.errors import ConfigError

SPLITS = ('train', 'val', 'test')


def datasets_of(config: Config, splits: Sequence[str] = SPLITS) -> Iterator[ConfigDict]:
    """Yield the datasets of a config's splits, without wrappers such as RepeatDataset."""
    for split in splits:
        loader = config.get(f'{split}_dataloader')
        if loader:
            yield from unwrap_dataset(loader.dataset)


def test_pipeline(config: Config) -> list[ConfigDict]:
    """Return the pipeline of a config's test images; empty if it has none."""
    dataset = next(datasets_of(config, ('test', 'val')), {})
    return dataset.get('pipeline') or config.get('test_pipeline') or []


def build_images(dataset: ConfigDict) -> Dataset:
    """Build a dataset that only reads its images: ``img`` (height, width, 3) in each sample."""
    steps = [step for step in dataset.pipeline if 'LoadImage' in str(step.type)]
    # pycocotools prints messages when it reads a file.
    with redirect_stdout(io.StringIO()):
        return DATASETS.build({**dataset, 'pipeline': steps})


def unwrap_dataset(dataset: ConfigDict) -> Iterator[ConfigDict]:
    """Yield the datasets that a dataset wraps or joins; itself if it does neither."""
    parts = [dataset.dataset] if 'dataset' in dataset else dataset.get('datasets')
    if parts is None:
        yield dataset
    for part in parts or ():
        yield from unwrap_dataset(part)


def walk(node: object) -> Iterator[ConfigDict]:
    """Yield all dicts inside a config, outermost first."""
    if isinstance(node, dict):
        yield node
        node = tuple(node.values())
    if isinstance(node, (list, tuple)):
        for value in node:
            yield from walk(value)


def reads_masks(dataset: ConfigDict) -> bool:
    """Return whether a dataset's pipeline loads the masks of objects."""
    return any(node.get('with_mask') for node in walk(dataset.get('pipeline', [])))


def decoder_of(dataset: ConfigDict) -> tuple[str, str]:
    """Return how a dataset's pipeline reads images: ``color_type`` and ``imdecode_backend``."""
    for node in walk(dataset.get('pipeline', [])):
        if str(node.get('type')).rpartition('.')[2] == 'LoadImageFromFile':
            return node.get('color_type', 'color'), node.get('imdecode_backend', 'cv2')
    return 'color', 'cv2'


def annotation_file(dataset: ConfigDict) -> Path:
    """Return the path of ``ann_file``, inside ``data_root`` unless it is absolute."""
    return Path(dataset.get('data_root') or '') / dataset.get('ann_file', '')


def data_folder(dataset: ConfigDict, key: str) -> Path:
    """Return the folder for a key of ``data_prefix``, inside ``data_root`` unless absolute."""
    prefix = dataset.get('data_prefix') or {}
    # mmengine joins data_root and a prefix only if the prefix is given.
    return Path(dataset.get('data_root') or '') / prefix[key] if key in prefix else Path()


def dataset_class(dataset: ConfigDict) -> type:
    """Return the class that a dataset's ``type`` names, or raise ConfigError."""
    if inspect.isclass(dataset.type):
        return dataset.type
    with DATASETS.switch_scope_and_registry(dataset.get('_scope_')) as registry:
        found = registry.get(dataset.type)
    if found is None:
        raise ConfigError(
            f'no dataset type {dataset.type!r} is known; name the module that registers your own '
            "type in the config: custom_imports = dict(imports=['...'])"
        )
    return found


def option(dataset: ConfigDict, name: str) -> object:
    """Return a dataset's option in the config, else the default of its type, else None."""
    if name in dataset:
        return dataset[name]
    for kind in dataset_class(dataset).__mro__:
        parameter = inspect.signature(kind.__init__).parameters.get(name)
        if parameter is not None:
            return None if parameter.default is parameter.empty else parameter.default
    return None


def layout_of(dataset: ConfigDict) -> str:
    """Return the layout of a dataset's files: 'coco', 'voc', 'segmentation' or 'other'."""
    kind = dataset_class(dataset)
    bases = {base.__name__: base for base in kind.__mro__}
    if 'BaseSegDataset' in bases:
        return 'segmentation'
    for name, layout in (('CocoDataset', 'coco'), ('XMLDataset', 'voc')):
        # LVIS and panoptic datasets have other files; a user's types may too.
        if name in bases and all(
            getattr(kind, part, None) is getattr(bases[name], part, None)
            for part in ('load_data_list', 'COCOAPI')
        ):
            return layout
    return 'other'
