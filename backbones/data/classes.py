"""Class names and counts come from the data, and every head of the model follows.

Names are the config's ``classes`` (a list, or the path of a text file with one name a line), else
the ``metainfo`` of its datasets, else the categories of the COCO file that is trained on, else
those of the dataset's type. A ``palette`` beside ``classes`` gives each an (R, G, B).
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

# What these tell apart are no classes of the data: texts, and persons that are tracked.
OTHER_MODELS = ('language_model', 'tracker', 'reid')


def set_classes(config: Config, splits: Sequence[str], keep_files: bool = False) -> tuple[str, ...]:
    """Give the datasets and every head of a config the classes of its data; returns their names.

    Splits that will not be read need not be there. ``keep_files`` leaves COCO files in memory for
    the checker. Raises ConfigError for a head with a number of classes that the data do not have,
    DataError where annotation files disagree with each other or with the named classes.
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
    """Refuse a segmentor's loss with weights for another number of classes than its head has."""
    for head, key in class_heads(model):
        for loss in walk(head.get('loss_decode')):
            weights = loss.get('class_weight')
            # SAN has one more, for "no object"; of two classes one may be all that is computed.
            right = head[key] + (loss.get('loss_name') == 'loss_cls_ce'), head.get('out_channels')
            if isinstance(weights, (list, tuple)) and len(weights) not in right:
                raise ConfigError(
                    f'class_weight of {head.get("type")} is a list of {len(weights)}, for '
                    f'{head[key]} classes: give one number for each'
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
    # The training set comes first, unless this machine has no more than a test set.
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
    """Refuse a dataset whose metainfo has other classes than the rest of the config."""
    own = class_list(dataset.get('metainfo', {}).get('classes') or ())
    if own and own != names:
        raise ConfigError(
            f'a {dataset.type} of the config has metainfo with the classes {list(own)}, others '
            f'have {list(names)}. All datasets have to have the same, in the same order'
        )


def name_segmentation_classes(dataset: ConfigDict, names: tuple[str, ...], config: Config) -> None:
    """Name the classes of a segmentation dataset.

    Some of the classes of its type, named by ``metainfo``, are picked out by mmseg. With other
    names it no longer is the set that its type is made for: their own order numbers them then.
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
    """Refuse a COCO file without all of the classes in their order, by which mmdet numbers them."""
    found = tuple(categories_of(path).values())
    if tuple(name for name in found if name in names) != names:
        missing = ', '.join(repr(name) for name in names if name not in found)
        what = f'no category {missing}' if missing else 'another order, which numbers classes'
        raise DataError(
            f'{path} has {what}: its "categories" are {list(found)}, the classes {list(names)} (of '
            f'the config or {first}). It needs all of these, in this order'
        )


def class_list(classes: str | Sequence[str]) -> tuple[str, ...]:
    """Class names, from a text file with one a line where a path is given."""
    if not isinstance(classes, str):
        return tuple(classes)
    try:
        lines = Path(classes).read_text(encoding='utf-8-sig').splitlines()
    # ValueError: it is not UTF-8, or not even the name of a file.
    except (OSError, ValueError) as error:
        raise ConfigError(
            f'classes = {classes!r}: there is no such file, or it is not text in UTF-8 ({error}). '
            '`classes` is a list of names, or the path of a text file with one name a line'
        ) from error
    names = tuple(line.strip() for line in lines if line.strip())
    if not names:
        raise ConfigError(f'classes = {classes!r}: the file has no names in it, one a line')
    return names


def known_classes(dataset: ConfigDict) -> tuple[str, ...]:
    """The classes that a dataset's type is made for; none for a general one."""
    return tuple(dataset_class(dataset).METAINFO.get('classes') or ())


def classes_of(dataset: ConfigDict) -> tuple[str, ...]:
    """The classes of a dataset after :func:`set_classes`, which leaves out those of its type."""
    return tuple(dataset.get('metainfo', {}).get('classes') or known_classes(dataset))


def counts_of_types(config: Config) -> set[int]:
    """How many classes the types of a config's datasets are made for."""
    metas = [dataset_class(dataset).METAINFO for dataset in datasets_of(config)]
    # Heads of panoptic models tell apart the things alone.
    return {len(meta.get('thing_classes') or meta.get('classes') or ()) for meta in metas}


def set_num_classes(config: Config, count: int, of_types: set[int] | None = None) -> None:
    """Set ``num_classes`` of the heads that have that of the dataset's type or of a base config.

    Heads that tell other things apart, such as 183 kinds of stuff in HTC or two in STDC, stay; with
    a ``count`` of 0, which is unknown, all do. ``of_types``: how many the types of the datasets are
    made for. Raises ConfigError if no head has as many classes as the data after that.
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
            f'{key}={count} there, or leave it to the base config and the data'
        )


def class_heads(model: ConfigDict) -> Iterator[tuple[ConfigDict, str]]:
    """Parts of a model that have a number of classes, and their key for it.

    Not the RPN, which finds objects of any class.
    """
    agnostic = {id(node) for node in walk(model.get('rpn_head'))}
    for node in walk(model):
        if 'num_classes' in node and id(node) not in agnostic:
            yield node, 'num_classes'
        elif 'num_things_classes' in node and not node.get('num_stuff_classes'):
            yield node, 'num_things_classes'


def set_head(head: ConfigDict, key: str, count: int) -> None:
    """Set the number of classes of a head, and of equal weights in its loss."""
    before, head[key] = head[key], count
    for node in walk(head):
        weights = node.get('class_weight')
        if isinstance(weights, (list, tuple)) and len(set(weights[:before])) == 1:
            node.class_weight = [weights[0]] * count + list(weights[before:])


def inherited_counts(config: Config) -> Iterator[int]:
    """The number of classes that most heads have, in every base that a config's file names."""
    path = str(config.filename or '')
    if not Path(path).is_file() or Config._is_lazy_import(path):
        return
    for base in Config._get_base_files(path):
        base_path, _ = Config._get_cfg_path(base, path)
        model = Config.fromfile(base_path, import_custom_modules=False).get('model')
        counts = Counter(head[key] for head, key in class_heads(model)) if model else Counter()
        yield from (number for number, _ in counts.most_common(1))
