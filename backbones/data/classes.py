"""Class names and counts come from the data, and every head of the model follows.

For detection they are the categories of the COCO file that is trained on. For segmentation they
are the config's ``classes`` (a list, or the path of a text file with one name a line), else those
of the dataset's type; a ``palette`` beside them gives each an (R, G, B).
"""

import inspect
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config, ConfigDict
from mmengine.registry import DATASETS

from backbones.errors import ConfigError, DataError

from .coco_file import is_text, read_coco
from .config_datasets import datasets_of, walk
from .paths import annotation_file

# Class counts that mmdet's and mmseg's own model configs carry (Cityscapes, PASCAL VOC, COCO,
# ADE20K, COCO-Stuff): a head with one of these was inherited, not chosen.
INHERITED_COUNTS = (19, 20, 21, 59, 60, 80, 150, 171)


def set_classes(config: Config, splits: tuple[str, ...]) -> tuple[str, ...]:
    """Give the datasets and every head of a config the classes of its data.

    Args:
        config: Changed in place.
        splits: Which of 'train', 'val' and 'test' will be read. Others need not be there.

    Returns:
        The class names, in the order of the labels.

    Raises:
        ConfigError: A head has a number of classes that the data do not have.
        DataError: Annotation files disagree with each other or with the named classes.
    """
    if config.default_scope == 'mmdet':
        names = set_detection_classes(config, splits)
    else:
        names = set_segmentation_classes(config)
    set_num_classes(config.model, len(names))
    return names


def set_detection_classes(config: Config, splits: tuple[str, ...]) -> tuple[str, ...]:
    """Check that all COCO files number the same classes in the same order, and name them."""
    datasets = [dataset for dataset in datasets_of(config) if is_coco(dataset)]
    if not datasets:
        return known_classes(next(datasets_of(config)))
    # The training set comes first, unless this machine has no more than a test set.
    source = next((d for d in datasets if annotation_file(d).is_file()), datasets[0])
    chosen = source.get('metainfo', {}).get('classes')
    names = tuple(chosen) if chosen else category_names(annotation_file(source))
    for dataset in datasets_of(config, splits):
        if is_coco(dataset):
            check_categories(annotation_file(dataset), names, annotation_file(source))
    for dataset in datasets:
        if names != known_classes(dataset):
            name_classes(dataset, names, config)
    return names


def check_categories(path: Path, names: Sequence[str], first: Path) -> None:
    """mmdet numbers classes by their order in the file, and leaves out what it cannot find."""
    found = category_names(path)
    missing = [name for name in names if name not in found]
    if missing:
        raise DataError(
            f'{path} has no category {", ".join(map(repr, missing))}; the classes are '
            f'{list(names)} (of {first}), its categories {list(found)}. Without them every '
            'annotation of these classes would be left out'
        )
    in_file_order = tuple(name for name in found if name in names)
    if in_file_order != tuple(names):
        raise DataError(
            f'{path} lists its categories in another order than {first}, and classes are numbered '
            f'by that order: {list(in_file_order)} instead of {list(names)}. Bring "categories" of '
            'both files into one order'
        )


def category_names(path: Path) -> tuple[str, ...]:
    """Names of a COCO file's categories, in its order."""
    categories = read_coco(path)['categories']
    for category in categories:
        if not isinstance(category, dict) or not is_text(category.get('name')):
            raise DataError(f'{path}: a category has no name that is text: {category!r:.80}')
    names = tuple(category['name'] for category in categories)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f'{path}: more than one category is called {", ".join(map(repr, twice))}')
    return names


def set_segmentation_classes(config: Config) -> tuple[str, ...]:
    """Name the classes of every dataset, which then no longer is the set its type is made for."""
    first = next(datasets_of(config))
    chosen = config.get('classes') or first.get('metainfo', {}).get('classes')
    if chosen is None:
        return known_classes(first)
    names = read_class_names(chosen) if isinstance(chosen, str) else tuple(chosen)
    for dataset in datasets_of(config):
        if names == known_classes(dataset):
            continue
        defaults = constructor_defaults(dataset)
        for key in ('img_suffix', 'seg_map_suffix', 'reduce_zero_label'):
            if key in defaults:
                dataset.setdefault(key, defaults[key])
        dataset.type = 'mmseg.BaseSegDataset'
        name_classes(dataset, names, config)
    return names


def name_classes(dataset: ConfigDict, names: tuple[str, ...], config: Config) -> None:
    """Give a dataset its class names, and their colours where the config has a ``palette``."""
    colours = {'palette': config.palette} if 'palette' in config else {}
    dataset.metainfo = ConfigDict({**dataset.get('metainfo', {}), 'classes': names, **colours})


def read_class_names(path: str) -> tuple[str, ...]:
    """Class names from a text file, one a line."""
    if not Path(path).is_file():
        raise ConfigError(
            f'classes = {path!r}: there is no such file. `classes` is a list of names, or the '
            'path of a text file with one name a line'
        )
    try:
        lines = Path(path).read_text(encoding='utf-8').splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f'classes = {path!r}: the file is not text in UTF-8: {error}') from error
    names = tuple(line.strip() for line in lines if line.strip())
    if not names:
        raise ConfigError(f'classes = {path!r}: the file has no names in it, one a line')
    return names


def set_num_classes(model: ConfigDict, count: int) -> None:
    """Set ``num_classes`` of every head, except of those that only tell objects from background.

    Raises:
        ConfigError: A head has a count that is neither the data's nor one that is inherited.
    """
    class_agnostic = [model[key] for key in ('rpn_head',) if isinstance(model.get(key), dict)]
    skipped = [node for head in class_agnostic for node in walk(head)]
    for node in walk(model):
        given = node.get('num_classes')
        if given is None or given == count or any(node is other for other in skipped):
            continue
        if given not in INHERITED_COUNTS:
            raise ConfigError(
                f'{node.get("type")} has num_classes={given}, but the data have {count} classes. '
                'Leave num_classes out: it is set from the data'
            )
        node.num_classes = count


def is_coco(dataset: ConfigDict) -> bool:
    """Whether a dataset is read from a COCO annotation file."""
    return str(dataset.get('ann_file', '')).endswith('.json')


def known_classes(dataset: ConfigDict) -> tuple[str, ...]:
    """The classes that a dataset's type is made for; none for a general one."""
    classes = dataset_class(dataset).METAINFO.get('classes')
    return tuple(classes or ())


def constructor_defaults(dataset: ConfigDict) -> dict:
    """Default arguments of a dataset's type."""
    parameters = inspect.signature(dataset_class(dataset).__init__).parameters
    return {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }


def dataset_class(dataset: ConfigDict) -> type:
    """The class that a dataset's ``type`` names.

    Raises:
        ConfigError: No dataset of that name is registered.
    """
    if inspect.isclass(dataset.type):
        return dataset.type
    with DATASETS.switch_scope_and_registry(dataset.get('_scope_')) as registry:
        found = registry.get(dataset.type)
    if found is None:
        raise ConfigError(
            f'no dataset type {dataset.type!r} is known; a type of your own is registered by a '
            "module that the config names in custom_imports = dict(imports=['...'])"
        )
    return found
