"""The hold-out: a part of the training images, on which a search compares its candidates.

Its images depend only on their names and ``search.seed``, so the training of the supernet and all
processes of a search have the same hold-out. Neither uses the validation images, so they remain a
fair test of the found network.
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
from backbones.data.coco import categories_of, id_in, read_coco, without_images
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

    The split is the same in every call, before and after the classes are set, and if ``--skip-bad``
    comes later. Raises ConfigError or DataError if no images can be held out.

    Returns:
        The datasets that read the hold-out, as in a test.
    """
    parts = []
    for number, (dataset, held_out, rest) in enumerate(split_training(config)):
        # A small dataset among others may have no image in the hold-out.
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
        # In another folder than the supernet's training has its record of left out images.
        leave_out_bad(config, ('train',), 'search/train')
    use_holdout(config)
    if config.get('skip_bad'):
        leave_out_bad(config, ('val',), 'search/holdout')
    else:
        refuse_errors(config, ('val',))


def use_holdout(config: Config) -> None:
    """Let a config whose classes are set validate on the hold-out and train on the rest.

    Sets ``config.unseen_classes`` to the classes without any pixel or box in the hold-out, and
    prints a warning with their names.
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
            f'warning: no image of the hold-out has {", ".join(config.unseen_classes)}, so the '
            'search cannot measure networks on these classes. A larger search.holdout may have '
            'them',
            file=sys.stderr,
        )


def check_holdout(config: Config, supernet: dict) -> None:
    """Raise ConfigError if a supernet was trained on images of the hold-out."""
    trained = config_of(supernet)
    if trained is None:
        return
    before, now = search_options(trained), search_options(config)
    # A smaller hold-out is a part of a larger one.
    if now['seed'] != before['seed'] or now['holdout'] > before['holdout']:
        raise ConfigError(
            'the supernet was trained on images of this hold-out: set search.seed to '
            f'{before["seed"]} and search.holdout to {before["holdout"]} or less'
        )


def as_test(dataset: ConfigDict, config: Config) -> ConfigDict:
    """Return a copy of a training dataset that reads all its images as in a test."""
    dataset = copy.deepcopy(dataset)
    pipeline = next(datasets_of(config, ('val',)), {}).get('pipeline', [])
    dataset.update(pipeline=pipeline, test_mode=True)
    for key in ('filter_cfg', 'indices'):
        dataset.pop(key, None)
    return dataset


def join_datasets(datasets: list[ConfigDict]) -> ConfigDict:
    """Join several datasets into one."""
    # Editions of VOC differ in dataset_type.
    joined = dict(type='ConcatDataset', datasets=datasets, ignore_keys=['dataset_type'])
    return datasets[0] if len(datasets) == 1 else ConfigDict(joined)


def split_training(config: Config) -> list[tuple[ConfigDict, list[str], list[str]]]:
    """Return every training dataset with the names of its images in the hold-out and the rest."""
    options = search_options(config)
    fraction = options['holdout']
    if not isinstance(fraction, int | float) or not 0 < fraction < 1:
        raise ConfigError(f'search.holdout must be above 0 and below 1, not {fraction}')
    datasets = list(datasets_of(config, ('train',)))
    if len(datasets) > 1 and any(layout_of(dataset) == 'coco' for dataset in datasets):
        raise ConfigError(
            "COCO's metric reads one file, so a search needs one COCO dataset to train on, "
            f'not {len(datasets)}: merge them into one file'
        )
    parts, total = [], 0
    for dataset in datasets:
        # The name that write_part gives.
        if (path := annotation_file(dataset)).match('search/train_[0-9].*'):
            raise ConfigError(
                f'{config.filename} reads {path}, a list without the hold-out, since the training '
                'of a supernet saved this config: give the config that the training was called with'
            )
        names = names_of(dataset, config)
        chosen = choose(set(names), fraction, options['seed'])
        held_out, rest = ([n for n in names if (n in chosen) == inside] for inside in (True, False))
        parts.append((dataset, held_out, rest))
        total += len(names)
    if not all(rest for *_, rest in parts):
        raise ConfigError(
            f'search.holdout={fraction} leaves a dataset with none to train on: set a smaller one'
        )
    number = sum(len(held_out) for _, held_out, _ in parts)
    if number < MIN_IMAGES:
        advice = (
            f'set search.holdout to {-(-100 * MIN_IMAGES // total) / 100} or more'
            if total >= 2 * MIN_IMAGES
            else 'a search needs more images'
        )
        raise ConfigError(
            f'search.holdout={fraction} holds out {number} of {total} training images, but a '
            f'comparison of networks needs {MIN_IMAGES}: {advice}'
        )
    return parts


def choose(names: set[str], fraction: float, seed: int) -> set[str]:
    """Choose a fraction of names; most of them stay the same if names are added."""

    def rank(name: str) -> str:
        return hashlib.sha256(f'{seed} {name}'.encode()).hexdigest()

    return set(sorted(names, key=rank)[: round(fraction * len(names))])


def names_of(dataset: ConfigDict, config: Config) -> list[str]:
    """Return the names of a dataset's images as in its annotation file or list."""
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
        f'a search needs a training dataset in the layout of COCO, PASCAL VOC or mmseg, '
        f'to take the hold-out from it; {dataset.type} has another layout'
    )


def segmentation_samples(dataset: ConfigDict, config: Config) -> list:
    """Return the images and segmentation maps that a dataset reads."""
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
    """Write a list or COCO file of some of a dataset's images, and let the dataset read it."""
    path = Path(config.work_dir).resolve() / 'search' / part
    if layout_of(dataset) == 'coco':
        content = without_images(read_coco(annotation_file(dataset)), set(others))
        path, text = path.with_suffix('.json'), json.dumps(content)
    else:
        path, text = path.with_suffix('.txt'), '\n'.join(names)
    write_text(path, text)
    dataset.ann_file = str(path)


def label_files(dataset: ConfigDict, config: Config) -> list[Path]:
    """Return the files with the labels of a dataset's images; none if its ann_file has them."""
    layout = layout_of(dataset)
    if layout == 'voc':
        return list(xml_files(dataset).values())
    if layout == 'segmentation':
        return [Path(sample.seg_map) for sample in segmentation_samples(dataset, config)]
    return []


def seen_classes(dataset: ConfigDict, config: Config) -> set[str]:
    """Return the classes that have pixels or boxes in a dataset."""
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
