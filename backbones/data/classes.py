"""Set the class names and counts of the data in all datasets and heads of a config.

Names are the config's ``classes`` (a list, or the path of a text file with one name per line), else
the ``metainfo`` of its datasets, else the categories of the COCO file for training, else the
classes of the dataset's type. A ``palette`` beside ``classes`` gives each an (R, G, B).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmengine.config import Config, ConfigDict

from backbones.errors import ConfigError, DataError

from .coco import categories_of, read_coco
from .config_datasets import annotation_file, dataset_class, datasets_of, layout_of, option, walk
from .labels import set_ignored_label
from .voc import object_names

# The classes of these models are not those of the data, but texts or tracked persons.
OTHER_MODELS = ('language_model', 'tracker', 'reid')


def set_classes(config: Config, splits: Sequence[str], keep_files: bool = False) -> tuple[str, ...]:
    """Set the classes of the data in the datasets and heads of a config; return their names.

    Only the files of ``splits`` have to exist. ``keep_files`` leaves COCO files in memory for the
    checker. Raises ConfigError for a head with another number of classes than the data, DataError
    if annotation files disagree with each other or with the named classes.
    """
    of_types = counts_of_types(config)
    try:
        names = name_classes(config, splits)
    finally:
        if not keep_files:
            read_coco.cache_clear()
    if config.default_scope == 'mmseg':
        set_ignored_label(config)
    set_num_classes(config, len(names), of_types)
    return names


def check_class_weights(model: ConfigDict) -> None:
    """Raise ConfigError if a segmentor's loss has weights for another number of classes."""
    for head, key in class_heads(model):
        for loss in walk(head.get('loss_decode')):
            weights = loss.get('class_weight')
            # SAN has one more, for "no object"; with two classes, a head may compute only one.
            right = head[key] + (loss.get('loss_name') == 'loss_cls_ce'), head.get('out_channels')
            if isinstance(weights, (list, tuple)) and len(weights) not in right:
                raise ConfigError(
                    f'class_weight of {head.get("type")} is a list of {len(weights)}, for '
                    f'{head[key]} classes: give one number per class'
                )


def name_classes(config: Config, splits: Sequence[str]) -> tuple[str, ...]:
    """Name the classes in every dataset of a config; see :func:`set_classes`."""
    datasets = list(datasets_of(config))
    chosen = config.get('classes')
    if chosen is None:
        chosen = next(filter(None, (d.get('metainfo', {}).get('classes') for d in datasets)), None)
    names = class_list(chosen) if chosen is not None else next(map(known_classes, datasets), ())
    if config.default_scope == 'mmseg':
        for dataset in datasets:
            check_metainfo(dataset, names)
            if names != known_classes(dataset):
                name_segmentation_classes(dataset, names, config)
        return names
    coco = [dataset for dataset in datasets if layout_of(dataset) == 'coco']
    # The training set comes first, unless this machine has only a test set.
    source = next((d for d in coco if annotation_file(d).is_file()), None) or next(iter(coco), None)
    if chosen is None and source is not None:
        names = tuple(categories_of(annotation_file(source)).values())
    for dataset in datasets_of(config, splits):
        check_metainfo(dataset, names)
        if layout_of(dataset) == 'coco':
            check_categories(annotation_file(dataset), names, annotation_file(source))
        elif layout_of(dataset) == 'voc' and not names:
            raise ConfigError(
                f'{annotation_file(dataset)}: name the classes in the config, as '
                f'classes = {sorted(object_names(dataset))}'
            )
    for dataset in datasets:
        if names and names != known_classes(dataset):
            name_in_dataset(dataset, names, config)
    return names


def check_metainfo(dataset: ConfigDict, names: tuple[str, ...]) -> None:
    """Raise ConfigError if a dataset's metainfo has other classes than the rest of the config."""
    own = class_list(dataset.get('metainfo', {}).get('classes') or ())
    if own and own != names:
        raise ConfigError(
            f'a {dataset.type} of the config has metainfo with the classes {list(own)}, others '
            f'have {list(names)}. All datasets need the same classes in the same order'
        )


def name_segmentation_classes(dataset: ConfigDict, names: tuple[str, ...], config: Config) -> None:
    """Name the classes of a segmentation dataset.

    If ``metainfo`` names some of the classes of its type, mmseg selects these. With other names it
    is another dataset than its type is made for, and the order of the names numbers the classes.
    """
    known = set(known_classes(dataset))
    if not (set(names) <= known and ('classes' not in config or 'metainfo' in dataset)):
        for key in ('img_suffix', 'seg_map_suffix', 'reduce_zero_label'):
            dataset[key] = option(dataset, key)
        dataset.type = 'mmseg.BaseSegDataset'
    name_in_dataset(dataset, names, config)


def name_in_dataset(dataset: ConfigDict, names: tuple[str, ...], config: Config) -> None:
    """Give a dataset its class names, and their colors where the config has a ``palette``."""
    colors = {'palette': config.palette} if 'palette' in config else {}
    dataset.metainfo = ConfigDict({**dataset.get('metainfo', {}), 'classes': names, **colors})


def check_categories(path: Path, names: tuple[str, ...], first: Path) -> None:
    """Raise DataError if a COCO file lacks classes or their order, which mmdet numbers them by."""
    found = tuple(categories_of(path).values())
    if tuple(name for name in found if name in names) != names:
        missing = ', '.join(repr(name) for name in names if name not in found)
        what = f'no category {missing}' if missing else 'another order, which numbers classes'
        raise DataError(
            f'{path} has {what}: its "categories" are {list(found)}, the classes {list(names)} (of '
            f'the config or {first}). It needs all classes in this order'
        )


def class_list(classes: str | Sequence[str]) -> tuple[str, ...]:
    """Return class names: a list, or read from a text file with one per line."""
    if not isinstance(classes, str):
        return tuple(classes)
    try:
        lines = Path(classes).read_text(encoding='utf-8-sig').splitlines()
    # ValueError: it is not UTF-8, or not even the name of a file.
    except (OSError, ValueError) as error:
        raise ConfigError(
            f'classes = {classes!r}: there is no such file, or it is not text in UTF-8 ({error}). '
            '`classes` is a list of names, or the path of a text file with one name per line'
        ) from error
    names = tuple(line.strip() for line in lines if line.strip())
    if not names:
        raise ConfigError(f'classes = {classes!r}: the file has no names; it needs one per line')
    return names


def known_classes(dataset: ConfigDict) -> tuple[str, ...]:
    """Return the classes that a dataset's type is made for; none for a general type."""
    return tuple(dataset_class(dataset).METAINFO.get('classes') or ())


def classes_of(dataset: ConfigDict) -> tuple[str, ...]:
    """Return a dataset's classes after :func:`set_classes`: set there, else those of its type."""
    return tuple(dataset.get('metainfo', {}).get('classes') or known_classes(dataset))


def counts_of_types(config: Config) -> set[int]:
    """Return how many classes the types of a config's datasets are made for."""
    metas = [dataset_class(dataset).METAINFO for dataset in datasets_of(config)]
    # Heads of panoptic models classify only the things.
    return {len(meta.get('thing_classes') or meta.get('classes') or ()) for meta in metas}


def set_num_classes(config: Config, count: int, of_types: set[int] | None = None) -> None:
    """Set ``num_classes`` in heads whose count comes from the dataset's type or a base config.

    Heads with other classes, such as HTC's 183 kinds of stuff or STDC's two, stay unchanged; so do
    all if ``count`` is 0, which means unknown. ``of_types``: the counts of the datasets' types.
    Raises ConfigError if afterwards no head has as many classes as the data.
    """
    heads = list(class_heads(config.model))
    if not count or not heads or any(key in config.model for key in OTHER_MODELS):
        return
    of_types = of_types or counts_of_types(config)
    panoptic = any('thing_classes' in dataset_class(d).METAINFO for d in datasets_of(config))
    if panoptic and any(head[key] in of_types for head, key in heads):
        return
    if all(head[key] == count for head, key in heads):
        return
    inherited = of_types | set(inherited_counts(config))
    for head, key in heads:
        if head[key] in inherited:
            set_head(head, key, count)
    if not any(head[key] == count for head, key in heads):
        head, key = heads[0]
        raise ConfigError(
            f'{head.get("type")} has {key}={head[key]}, but the data have {count} classes. Set '
            f'{key}={count} there, or remove it from the config'
        )


def class_heads(model: ConfigDict) -> Iterator[tuple[ConfigDict, str]]:
    """Yield the parts of a model that have a number of classes, and their key for it.

    The RPN is left out, since it finds objects of any class.
    """
    agnostic = {id(node) for node in walk(model.get('rpn_head'))}
    for node in walk(model):
        if 'num_classes' in node and id(node) not in agnostic:
            yield node, 'num_classes'
        elif 'num_things_classes' in node and not node.get('num_stuff_classes'):
            yield node, 'num_things_classes'


def set_head(head: ConfigDict, key: str, count: int) -> None:
    """Set the number of classes in a head and, if its weights are equal, in its loss."""
    before, head[key] = head[key], count
    for node in walk(head):
        weights = node.get('class_weight')
        if isinstance(weights, (list, tuple)) and len(set(weights[:before])) == 1:
            node.class_weight = [weights[0]] * count + list(weights[before:])


def inherited_counts(config: Config) -> Iterator[int]:
    """Yield for every base of a config the number of classes that most of its heads have."""
    path = str(config.filename or '')
    if not Path(path).is_file() or Config._is_lazy_import(path):
        return
    for base in Config._get_base_files(path):
        base_path, _ = Config._get_cfg_path(base, path)
        model = Config.fromfile(base_path, import_custom_modules=False).get('model')
        counts = Counter(head[key] for head, key in class_heads(model)) if model else Counter()
        yield from (number for number, _ in counts.most_common(1))
