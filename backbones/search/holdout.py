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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config, ConfigDict
from PIL import Image

from backbones.data.check import check_built
from backbones.data.coco import id_in, read_coco
from backbones.data.config_datasets import (
    annotation_file,
    data_folder,
    datasets_of,
    layout_of,
    option,
    walk,
)
from backbones.data.findings import CheckedDataset
from backbones.data.skip_bad import write
from backbones.data.voc import object_names, xml_files
from backbones.errors import ConfigError, DataError

from .space import search_options

MIN_IMAGES = 8


def leave_out_holdout(config: Config) -> None:
    """Let a config train on lists without the images of the hold-out, in ``WORK_DIR/search``.

    The same for every call, before and after the classes are set, and with ``--skip-bad`` if that
    comes later.

    Args:
        config: A config with ``search`` and ``work_dir``; its training datasets are changed.

    Raises:
        ConfigError: The hold-out would be too small, or a dataset's layout is unknown.
        DataError: A dataset cannot be read.
    """
    for number, (dataset, _, rest) in enumerate(split_training(config)):
        dataset.ann_file = write_list(config, f'train_{number}', rest)


def use_holdout(config: Config) -> None:
    """Let a config validate on the hold-out and train on the rest.

    ``config.holdout`` then has its number of ``images`` and the names of ``unseen_classes``, of
    which it has no pixel and no box; these are printed as a warning too.

    Args:
        config: A config with ``search`` and ``work_dir``, whose classes are set; changed in place.

    Raises the errors of :func:`leave_out_holdout`.
    """
    if not config.get('val_dataloader') or not config.get('val_evaluator'):
        raise ConfigError('a search needs a val_dataloader and a val_evaluator in the config')
    parts = [(as_test(dataset, config), part) for dataset, part, _ in split_training(config)]
    leave_out_holdout(config)
    if isinstance(parts[0][1], dict):
        # COCO's metric takes one file.
        parts = [join_coco(parts)]
    for number, (dataset, part) in enumerate(parts):
        dataset.ann_file = write_list(config, f'holdout_{number}', part)
    datasets = [dataset for dataset, _ in parts]
    config.val_dataloader.dataset = join_datasets(datasets)
    for node in walk(config.val_evaluator):
        if node.get('ann_file'):
            node.ann_file = datasets[0].ann_file
    images = sum(len(names_of(dataset, config)) for dataset in datasets)
    classes = next(datasets_of(config, ('val',))).get('metainfo', {}).get('classes') or ()
    seen = set().union(*(seen_classes(dataset, config) for dataset in datasets))
    unseen = [name for name in classes if name not in seen]
    config.holdout = ConfigDict(images=images, unseen_classes=unseen)
    if unseen:
        print(
            f'warning: none of the {images} images of the hold-out has {", ".join(unseen)}, so '
            'that the search cannot see how well a network does there; a larger search.holdout '
            'may have them',
            file=sys.stderr,
        )


def as_test(dataset: ConfigDict, config: Config) -> ConfigDict:
    """A training dataset that reads all of its images as a test does."""
    dataset = copy.deepcopy(dataset)
    pipeline = next(datasets_of(config, ('val',))).get('pipeline', [])
    dataset.update(pipeline=pipeline, test_mode=True)
    for key in ('filter_cfg', 'indices'):
        dataset.pop(key, None)
    return dataset


def join_datasets(datasets: list[ConfigDict]) -> ConfigDict:
    """One dataset out of some."""
    # Editions of VOC differ in a key that tells them apart.
    joined = dict(type='ConcatDataset', datasets=datasets, ignore_keys=['dataset_type'])
    return datasets[0] if len(datasets) == 1 else ConfigDict(joined)


def split_training(config: Config) -> Iterator[tuple[ConfigDict, Any, Any]]:
    """Every training dataset, its part of the hold-out and the rest: COCO's content, or names."""
    options = search_options(config)
    fraction = options['holdout']
    if not 0 < fraction < 1:
        raise ConfigError(f'search.holdout is a part of the training images, not {fraction}')
    datasets = list(datasets_of(config, ('train',)))
    names = [names_of(dataset, config) for dataset in datasets]
    chosen = [choose(set(each), fraction, options['seed']) for each in names]
    total, number = sum(map(len, names)), sum(map(len, chosen))
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
    for dataset, each, part in zip(datasets, names, chosen, strict=True):
        if layout_of(dataset) == 'coco':
            yield dataset, *split_coco(read_coco(annotation_file(dataset)), part)
        else:
            yield dataset, [n for n in each if n in part], [n for n in each if n not in part]
    read_coco.cache_clear()


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


def split_coco(content: dict, names: set[str]) -> tuple[dict, dict]:
    """A COCO file's content with some images alone, and without them."""
    images = [one for one in content['images'] if isinstance(one, dict)]
    ids = {id_in(one, 'id') for one in images if str(one.get('file_name')) in names} - {None}

    def keep(inside: bool) -> dict:
        return {
            **content,
            'images': [one for one in content['images'] if (id_in(one, 'id') in ids) == inside],
            'annotations': [
                one for one in content['annotations'] if (id_in(one, 'image_id') in ids) == inside
            ],
        }

    return keep(True), keep(False)


def join_coco(parts: list[tuple[ConfigDict, dict]]) -> tuple[ConfigDict, dict]:
    """One COCO dataset out of several, with absolute names of files and ids from 1."""
    categories = parts[0][1]['categories']
    numbers = {category['name']: category['id'] for category in categories}
    images, annotations = [], []
    for dataset, content in parts:
        folder = data_folder(dataset, 'img').resolve()
        names = {category['id']: category['name'] for category in content['categories']}
        new_ids = {}
        for image in content['images']:
            new_ids[image['id']] = len(images) + 1
            path = str(folder / image['file_name'])
            images.append({**image, 'id': len(images) + 1, 'file_name': path})
        for annotation in content['annotations']:
            changed = dict(
                id=len(annotations) + 1,
                image_id=new_ids.get(annotation['image_id']),
                category_id=numbers.get(names.get(annotation['category_id'])),
            )
            annotations.append({**annotation, **changed})
    joined = parts[0][0]
    joined.update(data_root='', data_prefix=ConfigDict(img=''))
    return joined, dict(images=images, annotations=annotations, categories=categories)


def write_list(config: Config, name: str, content: dict | list[str]) -> str:
    """Write a COCO file or a list of names into the work folder; returns its path."""
    is_coco = isinstance(content, dict)
    path = Path(config.work_dir).resolve() / 'search' / f'{name}{".json" if is_coco else ".txt"}'
    write(path, json.dumps(content) if is_coco else '\n'.join(content))
    return str(path)


def seen_classes(dataset: ConfigDict, config: Config) -> set[str]:
    """The classes that a dataset has pixels or boxes of."""
    layout = layout_of(dataset)
    if layout == 'voc':
        return object_names(dataset)
    if layout == 'coco':
        content = json.loads(Path(dataset.ann_file).read_text(encoding='utf-8'))
        used = {annotation['category_id'] for annotation in content['annotations']}
        return {each['name'] for each in content['categories'] if each['id'] in used}
    classes, seen = dataset.metainfo.classes, set()
    for sample in segmentation_samples(dataset, config):
        with Image.open(sample.seg_map) as image:
            values = np.unique(np.asarray(image).astype(np.uint8))
        seen.update(int(label) for label in sample.labels.classes_of_values()[values])
    return {classes[label] for label in seen if label >= 0}
