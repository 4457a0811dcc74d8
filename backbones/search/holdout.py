"""The hold-out: a part of the training images that a search compares its candidates on.

Which images it has follows from their names and ``search.seed`` alone, so that the training of the
supernet and all processes of a search agree on it. Validation stays untouched by both, and is an
honest test of what was found.
"""

import copy
import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
from mmengine.config import Config, ConfigDict
from PIL import Image

from backbones.data.check import check_built, refuse_errors
from backbones.data.classes import classes_of, set_classes
from backbones.data.coco import categories_of, id_in, read_coco
from backbones.data.config_datasets import (
    annotation_file,
    data_folder,
    datasets_of,
    layout_of,
    option,
    walk,
)
from backbones.data.findings import CheckedDataset
from backbones.data.skip_bad import leave_out_bad
from backbones.data.voc import object_names, xml_files
from backbones.errors import ConfigError, DataError
from backbones.files import write_text
from backbones.weights import config_of

from .space import search_options

MIN_IMAGES = 8


def leave_out_holdout(config: Config) -> list[ConfigDict]:
    """Let a config train on lists without the images of the hold-out, in ``WORK_DIR/search``.

    The same for every call, before and after the classes are set, and with ``--skip-bad`` if that
    comes later. Raises ConfigError or DataError where no images can be held out.

    Returns:
        The datasets that read the hold-out, as a test does.
    """
    parts = []
    for number, (dataset, held_out, rest) in enumerate(split_training(config)):
        # A small dataset among others may have none.
        if held_out:
            parts.append(as_test(dataset, config))
            write_part(parts[-1], held_out, rest, config, f'holdout_{number}')
        write_part(dataset, rest, held_out, config, f'train_{number}')
    read_coco.cache_clear()
    return parts


def prepare_holdout(config: Config) -> None:
    """Set the classes of a config, let it validate on the hold-out, and check these images.

    With ``skip_bad`` in the config, images with errors are left out before the split, as in the
    training of the supernet.
    """
    set_classes(config, ('train', 'val'))
    if config.get('skip_bad'):
        # Not where the training of the supernet keeps what it has left out.
        leave_out_bad(config, ('train',), 'search/train')
    use_holdout(config)
    if config.get('skip_bad'):
        leave_out_bad(config, ('val',), 'search/holdout')
    else:
        refuse_errors(config, ('val',))


def use_holdout(config: Config) -> None:
    """Let a config whose classes are set validate on the hold-out and train on the rest.

    ``config.unseen_classes`` has the names of the classes that the hold-out has no pixel and no box
    of; these are printed as a warning too.
    """
    if not config.get('val_dataloader') or not config.get('val_evaluator'):
        raise ConfigError('a search needs a val_dataloader and a val_evaluator in the config')
    classes = classes_of(next(datasets_of(config, ('val',))))
    datasets = leave_out_holdout(config)
    config.val_dataloader.dataset = join_datasets(datasets)
    for node in walk(config.val_evaluator):
        if node.get('ann_file'):
            node.ann_file = datasets[0].ann_file
    seen = set().union(*(seen_classes(dataset, config) for dataset in datasets))
    read_coco.cache_clear()
    config.unseen_classes = [name for name in classes if name not in seen]
    if config.unseen_classes:
        print(
            f'warning: no image of the hold-out has {", ".join(config.unseen_classes)}, so that '
            'the search cannot see how well a network does there; a larger search.holdout may '
            'have them',
            file=sys.stderr,
        )


def check_holdout(config: Config, supernet: dict) -> None:
    """Raise ConfigError where a supernet's checkpoint has seen images of the hold-out."""
    trained = config_of(supernet)
    if trained is None:
        return
    before, now = search_options(trained), search_options(config)
    # A smaller hold-out is a part of a larger one.
    if now['seed'] != before['seed'] or now['holdout'] > before['holdout']:
        raise ConfigError(
            'the supernet was trained on images of this hold-out: leave search.seed at '
            f'{before["seed"]}, and search.holdout at {before["holdout"]} or less'
        )


def as_test(dataset: ConfigDict, config: Config) -> ConfigDict:
    """A training dataset that reads all of its images as a test does."""
    dataset = copy.deepcopy(dataset)
    pipeline = next(datasets_of(config, ('val',)), {}).get('pipeline', [])
    dataset.update(pipeline=pipeline, test_mode=True)
    for key in ('filter_cfg', 'indices'):
        dataset.pop(key, None)
    return dataset


def join_datasets(datasets: list[ConfigDict]) -> ConfigDict:
    """One dataset out of some."""
    # Editions of VOC differ in a key that tells them apart.
    joined = dict(type='ConcatDataset', datasets=datasets, ignore_keys=['dataset_type'])
    return datasets[0] if len(datasets) == 1 else ConfigDict(joined)


def split_training(config: Config) -> list[tuple[ConfigDict, list[str], list[str]]]:
    """Every training dataset with the names of its images in the hold-out, and of the others."""
    options = search_options(config)
    fraction = options['holdout']
    if not isinstance(fraction, int | float) or not 0 < fraction < 1:
        raise ConfigError(f'search.holdout is a part of the training images, not {fraction}')
    datasets = list(datasets_of(config, ('train',)))
    if len(datasets) > 1 and any(layout_of(dataset) == 'coco' for dataset in datasets):
        raise ConfigError(
            "COCO's metric reads one file, so that a search needs one COCO dataset to train on, "
            f'not {len(datasets)}: put them into one file'
        )
    parts, total = [], 0
    for dataset in datasets:
        # As write_part names it.
        if (path := annotation_file(dataset)).match('search/train_[0-9].*'):
            raise ConfigError(
                f'{config.filename} reads {path}, without the hold-out, since the training of '
                'a supernet saved it: give the config that was trained'
            )
        names = names_of(dataset, config)
        chosen = choose(set(names), fraction, options['seed'])
        held_out, rest = ([n for n in names if (n in chosen) == inside] for inside in (True, False))
        parts.append((dataset, held_out, rest))
        total += len(names)
    if not all(rest for *_, rest in parts):
        raise ConfigError(
            f'search.holdout={fraction} leaves a dataset with none to train on: make it smaller'
        )
    number = sum(len(held_out) for _, held_out, _ in parts)
    if number < MIN_IMAGES:
        advice = (
            f'set search.holdout to {-(-100 * MIN_IMAGES // total) / 100} or more'
            if total >= 2 * MIN_IMAGES
            else 'a search needs more of them'
        )
        raise ConfigError(
            f'search.holdout={fraction} of {total} training images are {number}, too few to '
            f'compare networks on ({MIN_IMAGES}): {advice}'
        )
    return parts


def choose(names: set[str], fraction: float, seed: int) -> set[str]:
    """A part of some names; most of them stay the same where names are added."""

    def rank(name: str) -> str:
        return hashlib.sha256(f'{seed} {name}'.encode()).hexdigest()

    return set(sorted(names, key=rank)[: round(fraction * len(names))])


def names_of(dataset: ConfigDict, config: Config) -> list[str]:
    """The images of a dataset as its annotation file or list names them."""
    layout = layout_of(dataset)
    if layout == 'coco':
        images = read_coco(annotation_file(dataset))['images']
        return [str(image.get('file_name')) for image in images if isinstance(image, dict)]
    if layout == 'voc':
        return list(xml_files(dataset))
    if layout == 'segmentation':
        folder, suffix = data_folder(dataset, 'img_path'), option(dataset, 'img_suffix')
        samples = segmentation_samples(dataset, config)
        return [os.path.relpath(one.path, folder).removesuffix(suffix) for one in samples]
    raise ConfigError(
        f'the hold-out of a search is taken from datasets that are laid out like COCO, PASCAL VOC '
        f'or those of mmseg, and {dataset.type} is none of them'
    )


def segmentation_samples(dataset: ConfigDict, config: Config) -> list:
    """The images and segmentation maps that a dataset reads."""
    source = str(data_folder(dataset, 'img_path'))
    checked = CheckedDataset('train', dataset, 'segmentation', source)
    try:
        check_built(checked, config)
    except DataError as error:
        raise DataError(f'{source}: {error}') from error
    return checked.samples


def write_part(
    dataset: ConfigDict, names: list[str], others: list[str], config: Config, part: str
) -> None:
    """Write a list or COCO file of some of a dataset's images, and let the dataset read that."""
    path = Path(config.work_dir).resolve() / 'search' / part
    if layout_of(dataset) == 'coco':
        path, text = path.with_suffix('.json'), json.dumps(coco_without(dataset, set(others)))
    else:
        path, text = path.with_suffix('.txt'), '\n'.join(names)
    write_text(path, text)
    dataset.ann_file = str(path)


def coco_without(dataset: ConfigDict, names: set[str]) -> dict:
    """A COCO file's content without some images; what is malformed stays, for the data's check."""
    content = read_coco(annotation_file(dataset))
    images = [one for one in content['images'] if isinstance(one, dict)]
    ids = {id_in(one, 'id') for one in images if str(one.get('file_name')) in names} - {None}
    left = {
        key: [one for one in content[key] if id_in(one, name) not in ids]
        for key, name in (('images', 'id'), ('annotations', 'image_id'))
    }
    return {**content, **left}


def seen_classes(dataset: ConfigDict, config: Config) -> set[str]:
    """The classes that a dataset has pixels or boxes of."""
    layout = layout_of(dataset)
    if layout == 'voc':
        return object_names(dataset)
    if layout == 'coco':
        path = annotation_file(dataset)
        used = {id_in(annotation, 'category_id') for annotation in read_coco(path)['annotations']}
        return {name for number, name in categories_of(path).items() if number in used}
    classes, seen = classes_of(dataset), set()
    for sample in segmentation_samples(dataset, config):
        try:
            with Image.open(sample.seg_map) as image:
                values = np.unique(np.asarray(image).astype(np.uint8))
        except OSError as error:
            raise DataError(f'{sample.seg_map}: {error}') from error
        seen.update(int(label) for label in sample.labels.classes_of_values()[values])
    return {classes[label] for label in seen if label >= 0}
