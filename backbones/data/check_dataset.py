"""The datasets of a config, each checked by the rules of its layout."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace

from mmengine.config import Config, ConfigDict
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS
from tqdm import tqdm

from backbones.errors import DataError

from .check_coco import CocoRules, check_coco_file
from .check_files import PictureJob, catch_decoder_warnings, check_picture
from .classes import (
    category_names,
    check_categories,
    dataset_class,
    is_coco,
    known_classes,
    set_segmentation_classes,
)
from .coco_file import read_coco
from .config_datasets import datasets_of, walk
from .findings import ERROR, Finding, Report
from .paths import annotation_file, data_folder

# Pictures that a process is handed at once.
CHUNK = 32

LAYOUTS = {
    'coco': 'annotations and pictures, by the rules of COCO',
    'label maps': 'pictures and label maps, by the rules of ADE20K',
    'other': 'only that the pictures can be read; the annotations are of a type not known here',
}


@dataclass
class Part:
    """One dataset of a config.

    Attributes:
        split: 'train', 'val' or 'test'.
        dataset: Its config.
        source: What it is read from: an annotation file or a folder.
        layout: A key of :data:`LAYOUTS`.
        jobs: The pictures to be read.
        findings: What has been found so far.
    """

    split: str
    dataset: ConfigDict
    source: str
    layout: str
    jobs: list[PictureJob] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


def check_dataset(
    config: Config,
    splits: Sequence[str],
    workers: int | None = None,
    read_pictures: bool | Callable[[str], bool] = True,
    say: Callable[[str], None] = print,
) -> Report:
    """Go over the data that a config reads.

    Annotations are checked in this process, which holds one annotation file at a time; pictures and
    label maps in others, each of which holds one picture.

    Args:
        config: A config as :func:`~backbones.engine.config.load_config` gives it. Segmentation
            datasets get the names of their classes.
        splits: Which of 'train', 'val' and 'test'. Those that read the same are checked once.
        workers: Processes that read pictures. Default: as many as there are cores.
        read_pictures: Whether a detection set's pictures are decoded (True), or only looked for; or
            a function that says so for a split. Label maps are always read, with their pictures.
        say: Takes one line on every dataset.

    Raises:
        ConfigError: The config names classes or a dataset type that there are not.
    """
    if config.default_scope == 'mmseg':
        set_segmentation_classes(config)
    report = Report()
    for part in parts_of(config, splits):
        decode = read_pictures(part.split) if callable(read_pictures) else read_pictures
        fill(part, config)
        report.pictures[f'{part.split}: {part.source}'] = len(part.jobs)
        say(f'{part.split}: {len(part.jobs)} pictures of {part.source}: {LAYOUTS[part.layout]}')
        jobs = part.jobs if decode or part.layout == 'label maps' else []
        part.findings.extend(check_pictures(jobs, workers, part.split))
        report.findings.extend(replace(found, split=part.split) for found in part.findings)
    return report


def parts_of(config: Config, splits: Sequence[str]) -> Iterator[Part]:
    """The datasets of the splits, each source once.

    What a training and a validation read counts as validation's, whose rules are stricter.
    """
    parts: dict[tuple[str, str], Part] = {}
    for split in splits:
        for dataset in datasets_of(config, (split,)):
            part = Part(split, dataset, *source_and_layout(dataset, config.default_scope))
            key = (part.source, str(annotation_file(dataset)))
            if key not in parts or (parts[key].split == 'train' and split != 'train'):
                parts[key] = part
    yield from parts.values()


def source_and_layout(dataset: ConfigDict, scope: str) -> tuple[str, str]:
    """What a dataset is read from, and by which rules."""
    kinds = {kind.__name__ for kind in dataset_class(dataset).__mro__}
    # Its own file name; LVIS has COCO's layout, but names pictures by their address.
    if is_coco(dataset) and 'CocoDataset' in kinds and 'LVISV05Dataset' not in kinds:
        return str(annotation_file(dataset)), 'coco'
    if scope == 'mmseg' and 'BaseSegDataset' in kinds:
        return str(data_folder(dataset, 'img_path')), 'label maps'
    return str(annotation_file(dataset)), 'other'


def fill(part: Part, config: Config) -> None:
    """Check a dataset's annotations, and note which pictures are to be read."""
    try:
        if part.layout == 'coco':
            fill_from_coco(part, config)
        else:
            fill_from_dataset(part)
    except DataError as error:
        part.findings.append(Finding(ERROR, 'unusable data set', part.source, str(error)))


def fill_from_coco(part: Part, config: Config, classes: Sequence[str] | None = None) -> None:
    """Check a COCO file, and note which pictures are to be read.

    Args:
        part: Gets the findings and the pictures.
        config: The config that it is of.
        classes: Names of the classes, where they are known to fit the file. Default: those of the
            config's first annotation file, which is read for it.

    Raises:
        DataError: It is missing, not JSON, or has no pictures, annotations or categories.
    """
    dataset, path = part.dataset, annotation_file(part.dataset)
    try:
        content = read_coco(path)
        if classes is None:
            classes, named_by = coco_classes(config, part)
            try:
                check_categories(path, classes, named_by)
            except DataError as error:
                part.findings.append(Finding(ERROR, 'categories', str(path), str(error)))
        evaluated = part.split != 'train'
        loads_masks = any(node.get('with_mask') for node in walk(dataset.get('pipeline', [])))
        metrics = [node.get('metric', []) for node in walk(config.get(f'{part.split}_evaluator'))]
        filters = {} if dataset.get('test_mode') else dataset.get('filter_cfg') or {}
        rules = CocoRules(
            classes=tuple(classes),
            reads_masks=loads_masks or (evaluated and any('segm' in metric for metric in metrics)),
            evaluated=evaluated,
            leaves_out_empty=filters.get('filter_empty_gt', False),
            min_size=filters.get('min_size', 0),
        )
        decoder = decoder_of(dataset)
        folder = data_folder(dataset, 'img')
        for found, image in check_coco_file(path, content, folder, rules):
            if found is not None:
                part.findings.append(found)
            if image is not None:
                size = (image['width'], image['height'])
                part.jobs.append(
                    PictureJob(str(folder / image['file_name']), image['file_name'], size, *decoder)
                )
    finally:
        read_coco.cache_clear()


def coco_classes(config: Config, part: Part) -> tuple[Sequence[str], object]:
    """The classes of a detection config, and the file that names them."""
    chosen = part.dataset.get('metainfo', {}).get('classes')
    if chosen:
        return tuple(chosen), 'the config'
    for dataset in datasets_of(config):
        if is_coco(dataset) and annotation_file(dataset).is_file():
            try:
                return category_names(annotation_file(dataset)), annotation_file(dataset)
            except DataError:
                continue
    return known_classes(part.dataset), 'the dataset type'


def fill_from_dataset(part: Part) -> None:
    """Let the dataset itself say what it would read."""
    # With nothing in it, what mmengine would serialize for its loaders cannot be.
    settings = {**part.dataset, 'pipeline': [], 'serialize_data': False, 'lazy_init': False}
    try:
        dataset: BaseDataset = DATASETS.build(settings)
    except Exception as error:
        raise DataError(f'it cannot be read: {type(error).__name__}: {error}') from error
    if not len(dataset):
        suffix = getattr(dataset, 'img_suffix', None)
        hint = f' that ends in {suffix!r} (img_suffix)' if suffix else ''
        raise DataError(f'there is no picture{hint}')
    decoder = decoder_of(part.dataset)
    classes = len(dataset.metainfo.get('classes') or ())
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        path = str(info['img_path'])
        job = PictureJob(path, path, None, *decoder)
        if part.layout == 'label maps' and info.get('seg_map_path'):
            job = replace(
                job,
                label_map=str(info['seg_map_path']),
                # Where classes were chosen out of the type's own, the file still has all of them.
                num_classes=len(info['label_map']) if info.get('label_map') else classes,
                reduce_zero_label=bool(info.get('reduce_zero_label')),
            )
        part.jobs.append(job)


def decoder_of(dataset: ConfigDict) -> tuple[str, str]:
    """How a dataset's pipeline reads pictures: ``color_type`` and ``imdecode_backend``."""
    for node in walk(dataset.get('pipeline', [])):
        if str(node.get('type')).rpartition('.')[2] == 'LoadImageFromFile':
            return node.get('color_type', 'color'), node.get('imdecode_backend', 'cv2')
    return 'color', 'cv2'


def check_pictures(
    jobs: Sequence[PictureJob], workers: int | None, split: str
) -> Iterator[Finding]:
    """Read pictures in several processes; findings come in the order of the pictures."""
    workers = max(1, min(workers or os.cpu_count() or 1, len(jobs)))
    with tqdm(total=len(jobs), desc=f'reading {split}', unit=' pictures', leave=False) as bar:
        while bar.n < len(jobs):
            try:
                for findings in read_in_parallel(jobs[bar.n :], workers):
                    bar.update()
                    yield from findings
            except BrokenProcessPool:
                # One of those that were being read ended its process: the next ones alone.
                for job in jobs[bar.n : bar.n + workers * CHUNK]:
                    bar.update()
                    yield from read_alone(job)


def read_in_parallel(jobs: Sequence[PictureJob], workers: int) -> Iterator[list[Finding]]:
    chunk = min(CHUNK, -(-len(jobs) // workers))
    with ProcessPoolExecutor(workers, initializer=catch_decoder_warnings) as pool:
        yield from pool.map(check_picture, jobs, chunksize=chunk)


def read_alone(job: PictureJob) -> list[Finding]:
    """Read a picture in a process of its own, which it may end."""
    try:
        return next(read_in_parallel([job], 1))
    except BrokenProcessPool:
        reason = 'the process that read it was ended, for want of memory or by a fault of a decoder'
        return [Finding(ERROR, 'unreadable picture', job.path, reason, picture=job.name)]
