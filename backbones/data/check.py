"""Check the datasets of a config, each by the rules of its layout.

check_dataset.py shows the whole report; train.py and test.py do not start if annotations or
segmentation maps have errors; ``--skip-bad`` leaves out images with errors.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS

from backbones.errors import DataError
from backbones.progress import ProgressBar

from .classes import classes_of, name_classes
from .coco import CocoCheck, read_coco
from .config_datasets import (
    SPLITS,
    annotation_file,
    data_folder,
    datasets_of,
    decoder_of,
    layout_of,
    reads_masks,
)
from .findings import ERROR, WARNING, CheckedDataset, Report, Sample, count
from .images import IMAGE_SUFFIXES, catch_decoder_warnings, check_sample
from .labels import NO_CLASS, LabelRules, ignored_label
from .objects import box_fault, mask_fault
from .voc import check_voc

# Images that a process gets at once.
CHUNK = 32

ADE20K_SOURCE = (
    'ADE20K is the "SceneParsing" archive ADEChallengeData2016.zip of '
    'https://groups.csail.mit.edu/vision/datasets/ADE20K/: unpack it into data/ade, or link the '
    'folder there; for your own data set data_root and data_prefix'
)


def refuse_errors(config: Config, splits: Sequence[str]) -> None:
    """Raise DataError if errors in annotations or maps would end a run or falsify its results."""
    report = check_dataset(config, splits, decode=())
    if report.of(ERROR):
        lines = '\n'.join(report.lines([ERROR]))
        raise DataError(
            f'the data have errors.\n{lines}\ntrain.py --skip-bad trains without the images and '
            'entries named here; all other errors have to be fixed. tools/check_dataset.py '
            'CONFIG lists all errors, and also reads the images'
        )


def check_dataset(
    config: Config,
    splits: Sequence[str],
    workers: int | None = None,
    decode: Sequence[str] = SPLITS,
) -> Report:
    """Check the data that a config reads, and print a line on every dataset.

    Sets the names of the classes in the config's datasets. ``workers`` processes (default: one per
    core) decode the images of the splits in ``decode``; other images only have to exist; maps are
    always read. Raises ConfigError if the config names unknown classes or dataset types.
    """
    fault = None
    try:
        try:
            name_classes(config, splits)
        except DataError as error:
            fault = str(error)
        report = Report(datasets_to_check(config, splits))
        for checked in report.datasets:
            check_annotations(checked, config)
            images = f'{len(checked.samples)} images of {checked.source}'
            print(f'{checked.split}: {images}, layout: {checked.layout}')
            check_images(checked, workers, checked.split in decode)
        # A few test images may have a single class.
        if 'train' in splits:
            check_number_of_classes(report)
    finally:
        read_coco.cache_clear()
    if fault and fault not in [found.reason for found in report.findings]:
        report.datasets[0].add(ERROR, 'categories', fault)
    return report


def check_number_of_classes(report: Report) -> None:
    """Add an error if the segmentation maps of all datasets have a single class."""
    labeled = set().union(*(checked.labeled for checked in report.datasets))
    # A label of no class has its own error.
    if len(labeled) == 1 and NO_CLASS not in labeled:
        checked = next(checked for checked in report.datasets if checked.labeled)
        reason = (
            f'in all maps {classes_of(checked.dataset)[labeled.pop()]!r} is the only class, and '
            'other pixels are ignored: there is nothing to learn. A background is also a class: '
            'number it 0 with reduce_zero_label=False, and the foreground 1, not 255'
        )
        checked.add(ERROR, 'a single class', reason)


def datasets_to_check(config: Config, splits: Sequence[str]) -> list[CheckedDataset]:
    """Return the datasets of the splits, each source once.

    A source of both training and validation counts as validation, whose rules are stricter.
    """
    found: dict[tuple, CheckedDataset] = {}
    for split in splits:
        for dataset in datasets_of(config, (split,)):
            layout, source = layout_of(dataset), annotation_file(dataset)
            if layout == 'segmentation' and not dataset.get('ann_file'):
                source = data_folder(dataset, 'img_path')
            key = (source, str(dataset.get('data_prefix')))
            if key not in found or (found[key].split == 'train' and split != 'train'):
                found[key] = CheckedDataset(split, dataset, layout, str(source))
    return list(found.values())


def check_annotations(checked: CheckedDataset, config: Config) -> None:
    """Add the errors of a dataset's annotations, and its images, to ``checked``."""
    try:
        if checked.layout == 'coco':
            CocoCheck(checked, config).run()
        elif checked.layout == 'voc':
            if reads_masks(checked.dataset):
                raise DataError(
                    "PASCAL VOC's layout has no masks, but the pipeline loads masks: use a "
                    'detector without masks, or set with_mask=False in LoadAnnotations'
                )
            check_voc(checked, classes_of(checked.dataset))
        else:
            check_built(checked, config)
    except DataError as error:
        checked.add(ERROR, 'unusable dataset', str(error))


def check_built(checked: CheckedDataset, config: Config) -> None:
    """Build a dataset and check what it lists; raise DataError if it cannot be built."""
    is_segmentation = checked.layout == 'segmentation'
    try:
        # mmengine cannot serialize a dataset that turns out to be empty.
        options = {'pipeline': [], 'serialize_data': False, 'lazy_init': False}
        dataset = DATASETS.build({**checked.dataset, **options})
    except Exception as error:
        hint = f'. {ADE20K_SOURCE}' if is_segmentation and isinstance(error, OSError) else ''
        raise DataError(f'it cannot be read: {type(error).__name__}: {error}{hint}') from error
    if not len(dataset):
        suffix = getattr(dataset, 'img_suffix', None)
        hint = f' that ends in {suffix!r} (img_suffix)' if suffix else ''
        raise DataError(f'there is no image{hint}')
    if is_segmentation and not checked.dataset.get('ann_file'):
        warn_of_other_images(checked, dataset)
    classes = len(dataset.metainfo.get('classes') or ())
    ignored = ignored_label(config) if is_segmentation else None
    with_masks = reads_masks(checked.dataset)
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        path = info.get('img_path')
        if not isinstance(path, str):
            continue  # the frames of a video
        sample = Sample(path, path)
        if is_segmentation and info.get('seg_map_path'):
            label_map = tuple((info.get('label_map') or {}).items())
            rules = LabelRules(classes, bool(info.get('reduce_zero_label')), label_map, ignored)
            sample = replace(sample, seg_map=str(info['seg_map_path']), labels=rules)
        checked.samples.append(sample)
        for instance in info.get('instances', []):
            fault = box_fault(list(instance['bbox'])) if 'bbox' in instance else None
            if not fault and with_masks and 'height' in info:
                fault = mask_fault(instance.get('mask'), info['height'], info['width'])
            if fault:
                checked.add(ERROR, 'malformed object', fault, path, path)


def warn_of_other_images(checked: CheckedDataset, dataset: BaseDataset) -> None:
    """Add a warning if mmseg does not read some images of the folder because of their suffix."""
    folder, maps = (dataset.data_prefix.get(key) for key in ('img_path', 'seg_map_path'))
    files = Path(folder).rglob('*') if folder else ()
    others = sorted(
        path
        for path in files
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not path.name.endswith(dataset.img_suffix)
        # Maps may lie beside the images.
        and not (maps and path.is_relative_to(maps) and path.name.endswith(dataset.seg_map_suffix))
    )
    if others:
        reason = (
            f'{count(len(others), "image")}, such as {others[0].name}: not read, since mmseg reads '
            f'only names that end in {dataset.img_suffix!r} (img_suffix)'
        )
        checked.add(WARNING, 'images of another suffix', reason, folder)


def check_images(checked: CheckedDataset, workers: int | None, decode: bool) -> None:
    """Read images and segmentation maps in several processes; add findings in their order."""
    flag, backend = decoder_of(checked.dataset)
    samples = [
        replace(sample, color_type=flag, backend=backend, decode=decode)
        for sample in checked.samples
        if decode or sample.seg_map
    ]
    name, workers = f'reading {checked.split}', min(workers or os.cpu_count() or 1, len(samples))
    with ProgressBar(total=len(samples), desc=name, unit=' images', leave=False, delay=2) as bar:
        checks = check_samples(samples, workers)
        for sample, (faults, labeled) in zip(samples, checks, strict=True):
            bar.update()
            checked.labeled |= labeled
            for fault in faults:
                checked.add(*fault, sample.name)


def check_samples(
    samples: Sequence[Sample], workers: int
) -> Iterator[tuple[list[tuple], set[int]]]:
    """Yield the result of :func:`check_sample` for each image, even if one kills its process."""
    done, alone = 0, 0
    while done < len(samples):
        try:
            rest = samples[done : done + 1] if alone else samples[done:]
            for found in check_in_parallel(rest, workers):
                done, alone = done + 1, max(alone - 1, 0)
                yield found
        except BrokenProcessPool:
            if alone:
                reason = 'the process that read it was ended, by lack of memory or by a decoder'
                done, alone = done + 1, alone - 1
                yield [(ERROR, 'unreadable image', reason, rest[0].path)], set()
            else:
                # One of the images in progress did it: read so many one by one.
                alone = workers * CHUNK


def check_in_parallel(
    samples: Sequence[Sample], workers: int
) -> Iterator[tuple[list[tuple], set[int]]]:
    chunk = min(CHUNK, -(-len(samples) // workers))
    with ProcessPoolExecutor(workers, initializer=catch_decoder_warnings) as pool:
        yield from pool.map(check_sample, samples, chunksize=chunk)
