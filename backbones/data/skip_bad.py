"""``--skip-bad``: a training on what is left of a data set without what is wrong in it.

What annotations and label maps show, and all of validation, is left out before the training. The
pictures of a detector's training, which would take long to read twice, are skipped when they turn
out to be unreadable (:mod:`~backbones.data.dataset_guard`).
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from mmengine.config import Config, ConfigDict

from backbones.data import Report, check_dataset
from backbones.errors import DataError

from .check_coco import without_pictures
from .check_dataset import parts_of
from .classes import constructor_defaults
from .coco_file import read_coco
from .config_datasets import datasets_of, walk
from .findings import count
from .paths import annotation_file, data_folder

FOLDER = 'without_bad'


def leave_out_bad(config: Config, splits: tuple[str, ...]) -> None:
    """Let a config read lists without the pictures that are wrong, and skip what fails later.

    The lists are written to ``without_bad`` in the work folder, and what is not in them, with the
    reason, to ``skipped.json``.

    Args:
        config: Changed in place: ``skip_bad`` is set, datasets and metrics read the new lists.
        splits: Which of 'train', 'val' and 'test' will be read.

    Raises:
        ConfigError: The config names classes or a dataset type that there are not.
        DataError: What is wrong is not a matter of single pictures, or nothing is left.
    """
    config.skip_bad = True
    parts = list(parts_of(config, splits))
    report = check_dataset(config, splits, read_pictures=lambda split: split != 'train')
    refuse_whole(report)
    folder = Path(config.work_dir).resolve() / FOLDER
    for number, part in enumerate(parts):
        if part.layout == 'other':
            continue
        suffix = '.json' if part.layout == 'coco' else '.txt'
        kept = folder / f'{part.split}_{number}{suffix}'
        folder.mkdir(parents=True, exist_ok=True)
        write = write_coco if part.layout == 'coco' else write_names
        bad = {found.picture for found in report.of('error') if found.split == part.split}
        write(part.dataset, bad - {None}, kept)
        read_instead(config, part.dataset, kept)
    tell(report, config)


def refuse_whole(report: Report) -> None:
    """Stop on what leaving pictures out does not cure."""
    for found in report.of('error'):
        if not found.can_be_left_out:
            raise DataError(f'--skip-bad leaves out pictures, and this is none: {found}')


def write_coco(dataset: ConfigDict, bad: set[str], kept: Path) -> None:
    path = annotation_file(dataset)
    content = without_pictures(read_coco(path), bad)
    read_coco.cache_clear()
    if not content['images'] or not content['annotations']:
        raise DataError(f'--skip-bad leaves nothing of {path}')
    kept.write_text(json.dumps(content), encoding='utf-8')


def write_names(dataset: ConfigDict, bad: set[str], kept: Path) -> None:
    """Write mmseg's list of pictures: names below the folder, without suffix."""
    suffix = dataset.get('img_suffix', constructor_defaults(dataset).get('img_suffix', '.jpg'))
    folder = data_folder(dataset, 'img_path')
    names = list(names_of(dataset, suffix))
    wrong = {os.path.normpath(path) for path in bad}
    left = [name for name in names if os.path.normpath(folder / f'{name}{suffix}') not in wrong]
    if not left:
        raise DataError(f'--skip-bad leaves nothing of {folder}')
    kept.write_text('\n'.join(left) + '\n', encoding='utf-8')


def names_of(dataset: ConfigDict, suffix: str) -> Iterator[str]:
    listed = annotation_file(dataset) if dataset.get('ann_file') else None
    if listed and listed.is_file():
        yield from filter(None, map(str.strip, listed.read_text(encoding='utf-8').splitlines()))
        return
    folder = data_folder(dataset, 'img_path')
    for file in sorted(folder.rglob(f'*{suffix}')):
        yield file.relative_to(folder).as_posix()[: -len(suffix)]


def read_instead(config: Config, dataset: ConfigDict, kept: Path) -> None:
    """Let all datasets and metrics that read what a dataset reads take the list that was kept."""
    old = annotation_file(dataset), data_folder(dataset, 'img_path')
    for other in list(datasets_of(config)):
        if (annotation_file(other), data_folder(other, 'img_path')) == old:
            other.ann_file = str(kept)
    for key in ('val_evaluator', 'test_evaluator'):
        for node in walk(config.get(key)):
            if node.get('ann_file') and Path(node.ann_file) == old[0]:
                node.ann_file = str(kept)


def tell(report: Report, config: Config) -> None:
    """Say what is left out, and write it to the work folder."""
    path = Path(config.work_dir) / 'skipped.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    errors = report.of('error')
    pictures = {(found.split, found.picture) for found in errors if found.picture}
    content = {
        'pictures': report.pictures,
        'left_out_before_training': len(pictures),
        'reasons': [asdict(found) for found in errors],
    }
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
    print('\n'.join(Report(report.pictures, errors).lines()))
    print(f'--skip-bad: {count(len(pictures), "picture")} left out; {path} names them', flush=True)
