"""Looking at a config's pictures and annotations before a model is built.

What a training would only trip over hours later, or never notice, is found here.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from mmengine.config import Config, ConfigDict
from PIL import Image
from tqdm import tqdm

from backbones.data import Report
from backbones.errors import IMAGE_DECODE_ERRORS, DataError

from .check_dataset import Part, fill_from_coco, parts_of
from .classes import constructor_defaults
from .findings import ERROR
from .paths import data_folder

ADE20K_SOURCE = (
    'ADE20K is the "SceneParsing" archive ADEChallengeData2016.zip of '
    'https://groups.csail.mit.edu/vision/datasets/ADE20K/: unpack it into data/ade, or link the '
    'folder there'
)
IGNORE_INDEX = 255


def check_data(config: Config, splits: tuple[str, ...], classes: Sequence[str]) -> None:
    """Check the data that a config reads, and say how many pictures there are.

    Args:
        config: A config whose classes are set.
        splits: Which of 'train', 'val' and 'test' will be read.
        classes: Class names, in the order of the labels.

    Raises:
        DataError: Something would spoil a run; the message names files and ids.
    """
    for part in parts_of(config, splits):
        if part.layout == 'coco':
            count = check_detection(part, config, classes)
        elif part.layout == 'label maps':
            count = check_segmentation(part.dataset, classes)
        else:
            continue
        print(f'{part.split}: {count} pictures, as {part.source} has them', flush=True)


def check_detection(part: Part, config: Config, classes: Sequence[str]) -> int:
    """Check a COCO file against its pictures and itself; returns the number of pictures."""
    fill_from_coco(part, config, classes)
    count = len(part.jobs)
    errors = [
        replace(found, split=part.split) for found in part.findings if found.severity == ERROR
    ]
    if errors:
        cure = (
            'train.py --skip-bad trains without what is named here'
            if all(found.can_be_left_out for found in errors)
            else 'Mend the file; --skip-bad cannot leave all of this out'
        )
        raise DataError(
            f'{part.source} has errors.\n'
            + '\n'.join(Report({part.source: count}, errors).lines())
            + f'\n{cure}. tools/check_dataset.py CONFIG lists all, and looks into the pictures too'
        )
    return count


def check_segmentation(dataset: ConfigDict, classes: Sequence[str]) -> int:
    """Check label maps against pictures and classes; returns the number of pictures."""
    defaults = constructor_defaults(dataset)
    suffix = dataset.get('img_suffix', defaults.get('img_suffix', '.jpg'))
    label_suffix = dataset.get('seg_map_suffix', defaults.get('seg_map_suffix', '.png'))
    reduce_zero = dataset.get('reduce_zero_label', defaults.get('reduce_zero_label', False))
    pictures, labels = data_folder(dataset, 'img_path'), data_folder(dataset, 'seg_map_path')
    for folder in (pictures, labels):
        if not folder.is_dir():
            raise DataError(
                f'there is no folder {folder} (data_root and data_prefix say so). '
                f'{ADE20K_SOURCE}; for data of your own set data_root'
            )
    names = sorted(
        str(file.relative_to(pictures))[: -len(suffix)] for file in pictures.rglob(f'*{suffix}')
    )
    if not names:
        others = Counter(file.suffix for file in pictures.rglob('*') if file.is_file())
        raise DataError(
            f"{pictures} has no picture that ends in {suffix!r} (the dataset's img_suffix); it has "
            f'{dict(others) or "no files"}'
        )
    check_present(labels, [name + label_suffix for name in names], pictures)
    files = [labels / (name + label_suffix) for name in names]
    check_labels(files, len(classes), reduce_zero)
    return len(names)


def check_present(folder: Path, names: Sequence[str], wanted_by: Path) -> None:
    """Refuse a folder that lacks files, and say how many and which come first."""
    present = {}
    for parent in {os.path.dirname(name) for name in names}:
        inside = folder / parent
        present[parent] = set(os.listdir(inside)) if inside.is_dir() else set()
    missing = [
        name for name in names if os.path.basename(name) not in present[os.path.dirname(name)]
    ]
    if missing:
        raise DataError(
            f'{len(missing)} of {len(names)} files that {wanted_by} asks for are not in {folder}: '
            f'{", ".join(missing[:5])}{", ..." if len(missing) > 5 else ""}'
        )


def check_labels(files: Sequence[Path], num_classes: int, reduce_zero_label: bool) -> None:
    """Refuse label maps with labels that no class has."""
    first = 1 if reduce_zero_label else 0
    allowed = np.zeros(2**16, bool)
    allowed[first : first + num_classes] = True
    allowed[[0, IGNORE_INDEX] if reduce_zero_label else IGNORE_INDEX] = True
    for file, labels in zip(files, progress(read_labels(files), len(files)), strict=True):
        wrong = labels[~allowed[labels]]
        if len(wrong):
            raise DataError(
                f'{file}: label {wrong[0]} belongs to no class. There are {num_classes} classes, '
                f'stored as {first} to {first + num_classes - 1}'
                + (
                    ', after 0 for "unlabelled" (reduce_zero_label=True)'
                    if reduce_zero_label
                    else ''
                )
                + f'; {IGNORE_INDEX} is left out. Mend the file, or the list of classes'
            )


def read_labels(files: Sequence[Path]) -> Iterator[np.ndarray]:
    """The labels that occur in each label map, read on all cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(labels_in, files)


def labels_in(file: Path) -> np.ndarray:
    """The labels that occur in a label map."""
    try:
        with Image.open(file) as picture:
            label_map = np.asarray(picture)
    except (*IMAGE_DECODE_ERRORS, Image.DecompressionBombError) as error:
        raise DataError(f'{file} cannot be read as a label map: {error}') from error
    if label_map.ndim != 2:
        raise DataError(
            f'{file} is a colour picture. A label map has one channel that holds the number of a '
            'class at every pixel; colours have to be turned into numbers first'
        )
    return np.flatnonzero(np.bincount(label_map.ravel().astype(np.uint16), minlength=1))


def progress(items: Iterable, total: int) -> Iterable:
    """A progress bar that shows itself only where there is something to wait for."""
    return tqdm(items, 'checking label maps', total, unit=' files', leave=False, delay=2)
