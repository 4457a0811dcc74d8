"""The checker: the datasets of a config, each by the rules of its layout.

check_dataset.py shows all of its report; train.py and test.py refuse to start on an error in what
annotations and segmentation maps show; ``--skip-bad`` leaves out what has errors.
"""

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

from .classes import known_classes, name_classes
from .coco import CocoRules, check_coco, read_coco
from .config_datasets import annotation_file, data_folder, datasets_of, layout_of, walk
from .findings import ERROR, Finding, Report
from .images import Sample, catch_decoder_warnings, check_sample
from .labels import LabelRules, ignored_label
from .masks import box_fault, mask_fault
from .voc import check_voc

# Images that a process is handed at once.
CHUNK = 32

LAYOUTS = {
    'coco': "annotations in COCO's layout",
    'voc': 'annotations in the layout of PASCAL VOC',
    'segmentation': 'segmentation maps',
    'other': "annotations as the dataset's own type reads them",
}
ADE20K_SOURCE = (
    'ADE20K is the "SceneParsing" archive ADEChallengeData2016.zip of '
    'https://groups.csail.mit.edu/vision/datasets/ADE20K/: unpack it into data/ade, or link the '
    'folder there'
)


@dataclass
class Part:
    """One dataset of a config.

    Attributes:
        split: 'train', 'val' or 'test'.
        dataset: Its config.
        layout: A key of :data:`LAYOUTS`.
        source: What it is read from: an annotation file, a list or a folder.
        samples: Its images.
        findings: What has been found so far.
    """

    split: str
    dataset: ConfigDict
    layout: str
    source: str
    samples: list[Sample] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


def refuse_errors(config: Config, splits: Sequence[str]) -> None:
    """Check what annotations and segmentation maps show, before a run.

    Args:
        config: A config whose classes are set.
        splits: Which of 'train', 'val' and 'test' will be read.

    Raises:
        DataError: Something would end the run or falsify it; the message names files and ids.
    """
    report = check_dataset(config, splits, read_images=False)
    errors = report.of(ERROR)
    if errors:
        cure = (
            'train.py --skip-bad trains without what is named here'
            if all(found.can_be_left_out for found in errors)
            else '--skip-bad cannot leave all of this out: fix it'
        )
        lines = '\n'.join(Report(report.images, errors).lines())
        raise DataError(
            f'the data have errors.\n{lines}\n{cure}. tools/check_dataset.py CONFIG lists all, and '
            'reads the images too'
        )


def check_dataset(
    config: Config,
    splits: Sequence[str],
    workers: int | None = None,
    read_images: bool | Callable[[str], bool] = True,
    say: Callable[[str], None] = print,
) -> Report:
    """Check the data that a config reads.

    Annotations are checked in this process, images and segmentation maps in others, each of which
    holds one image.

    Args:
        config: A config as :func:`~backbones.engine.config.load_config` gives it. Its datasets get
            the names of their classes.
        splits: Which of 'train', 'val' and 'test'. Those that read the same are checked once.
        workers: Processes that read images. Default: as many as there are cores.
        read_images: Whether images are decoded (True), or only looked for; or a function that says
            so for a split. Segmentation maps are always read.
        say: Takes one line on every dataset.

    Raises:
        ConfigError: The config names classes or a dataset type that there are not.
    """
    return report_of(check_parts(config, splits, workers, read_images, say))


def check_parts(
    config: Config,
    splits: Sequence[str],
    workers: int | None = None,
    read_images: bool | Callable[[str], bool] = True,
    say: Callable[[str], None] = print,
) -> list[Part]:
    """The datasets of a config with what is wrong in them; see :func:`check_dataset`."""
    try:
        fault = None
        try:
            name_classes(config, splits)
        except DataError as error:
            fault = str(error)
        parts = parts_of(config, splits)
        for part in parts:
            fill(part, config)
            say(
                f'{part.split}: {len(part.samples)} images of {part.source}, {LAYOUTS[part.layout]}'
            )
            decode = read_images(part.split) if callable(read_images) else read_images
            samples = [replace(one, decode=decode) for one in part.samples if decode or one.seg_map]
            part.findings += check_samples(samples, workers, part.split)
    finally:
        read_coco.cache_clear()
    if fault and not any(found.reason == fault for part in parts for found in part.findings):
        parts[0].findings.append(Finding(ERROR, 'categories', parts[0].source, fault))
    return parts


def report_of(parts: Sequence[Part]) -> Report:
    """What was found in datasets."""
    return Report(
        {f'{part.split}: {part.source}': len(part.samples) for part in parts},
        [replace(found, split=part.split) for part in parts for found in part.findings],
    )


def parts_of(config: Config, splits: Sequence[str]) -> list[Part]:
    """The datasets of the splits, each source once.

    What a training and a validation read counts as validation's, whose rules are stricter.
    """
    parts: dict[tuple, Part] = {}
    for split in splits:
        for dataset in datasets_of(config, (split,)):
            layout, source = layout_of(dataset), annotation_file(dataset)
            if layout == 'segmentation' and not dataset.get('ann_file'):
                source = data_folder(dataset, 'img_path')
            part = Part(split, dataset, layout, str(source))
            key = (part.source, str(dataset.get('data_prefix')))
            if key not in parts or (parts[key].split == 'train' and split != 'train'):
                parts[key] = part
    return list(parts.values())


def fill(part: Part, config: Config) -> None:
    """Check a dataset's annotations, and note which images it has."""
    check = {'coco': fill_from_coco, 'voc': fill_from_voc}.get(part.layout, fill_from_dataset)
    try:
        check(part, config)
    except DataError as error:
        part.findings.append(Finding(ERROR, 'unusable dataset', part.source, str(error)))


def fill_from_coco(part: Part, config: Config) -> None:
    dataset, path = part.dataset, annotation_file(part.dataset)
    evaluated = part.split != 'train'
    metrics = [node.get('metric') or [] for node in walk(config.get(f'{part.split}_evaluator'))]
    filters = {} if dataset.get('test_mode') else dataset.get('filter_cfg') or {}
    names = dataset.get('metainfo', {}).get('classes')
    if 'img' not in (dataset.get('data_prefix') or {}):
        raise DataError("it has no data_prefix=dict(img='...'), the folder of its images")
    if not names:
        content = read_coco(path)
        names = [c['name'] for c in content['categories'] if isinstance(c, dict) and 'name' in c]
    rules = CocoRules(
        classes=tuple(names),
        reads_masks=reads_masks(dataset) or (evaluated and any('segm' in m for m in metrics)),
        evaluated=evaluated,
        leaves_out_empty=filters.get('filter_empty_gt', False),
        min_size=filters.get('min_size', 0),
    )
    folder = data_folder(dataset, 'img')
    findings, sizes = check_coco(path, folder, rules)
    part.findings += findings
    color = decoder_of(dataset)
    part.samples = [
        Sample(f'{folder}{os.sep}{name}', name, size, *color) for name, size in sizes.items()
    ]


def fill_from_voc(part: Part, config: Config) -> None:
    classes = part.dataset.get('metainfo', {}).get('classes') or known_classes(part.dataset)
    findings, files = check_voc(part.dataset, classes)
    part.findings += findings
    color = decoder_of(part.dataset)
    part.samples = [Sample(path, name, size, *color) for name, (path, size) in files.items()]


def fill_from_dataset(part: Part, config: Config) -> None:
    """Let the dataset itself say what it would read."""
    # With nothing in it, what mmengine would serialize for its loaders cannot be.
    settings = {**part.dataset, 'pipeline': [], 'serialize_data': False, 'lazy_init': False}
    is_segmentation = part.layout == 'segmentation'
    for key in ('img_path', 'seg_map_path') if is_segmentation else ():
        folder = data_folder(part.dataset, key)
        if not folder.is_dir():
            raise DataError(
                f'there is no folder {folder} (data_root and data_prefix say so). {ADE20K_SOURCE}; '
                'for data of your own set data_root'
            )
    try:
        dataset: BaseDataset = DATASETS.build(settings)
    except Exception as error:
        raise DataError(f'it cannot be read: {type(error).__name__}: {error}') from error
    if not len(dataset):
        suffix = getattr(dataset, 'img_suffix', None)
        hint = f' that ends in {suffix!r} (img_suffix)' if suffix else ''
        raise DataError(f'there is no image{hint}')
    color = decoder_of(part.dataset)
    classes = len(dataset.metainfo.get('classes') or ())
    ignored = ignored_label(config) if is_segmentation else None
    with_masks = reads_masks(part.dataset)
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        path = info.get('img_path')
        if not isinstance(path, str):
            continue  # the frames of a video
        sample = Sample(path, path, None, *color)
        if is_segmentation and info.get('seg_map_path'):
            label_map = tuple((info.get('label_map') or {}).items())
            rules = LabelRules(classes, bool(info.get('reduce_zero_label')), label_map, ignored)
            sample = replace(sample, seg_map=str(info['seg_map_path']), labels=rules)
        part.samples.append(sample)
        for fault in instance_faults(info, with_masks):
            part.findings.append(Finding(ERROR, 'malformed object', path, fault, image=path))


def instance_faults(info: dict, with_masks: bool) -> Iterator[str]:
    """What is wrong with boxes and masks as a dataset hands them to its pipeline."""
    for instance in info.get('instances', []):
        fault = box_fault(list(instance['bbox'])) if 'bbox' in instance else None
        if not fault and with_masks and 'height' in info:
            fault = mask_fault(instance.get('mask'), info['height'], info['width'])
        if fault:
            yield fault


def reads_masks(dataset: ConfigDict) -> bool:
    """Whether a dataset's pipeline loads the masks of objects."""
    return any(node.get('with_mask') for node in walk(dataset.get('pipeline', [])))


def decoder_of(dataset: ConfigDict) -> tuple[str, str]:
    """How a dataset's pipeline reads images: ``color_type`` and ``imdecode_backend``."""
    for node in walk(dataset.get('pipeline', [])):
        if str(node.get('type')).rpartition('.')[2] == 'LoadImageFromFile':
            return node.get('color_type', 'color'), node.get('imdecode_backend', 'cv2')
    return 'color', 'cv2'


def check_samples(samples: Sequence[Sample], workers: int | None, split: str) -> Iterator[Finding]:
    """Read images in several processes; findings come in the order of the images."""
    workers = max(1, min(workers or os.cpu_count() or 1, len(samples)))
    with tqdm(
        total=len(samples), desc=f'reading {split}', unit=' images', leave=False, delay=2
    ) as bar:
        while bar.n < len(samples):
            try:
                for findings in read_in_parallel(samples[bar.n :], workers):
                    bar.update()
                    yield from findings
            except BrokenProcessPool:
                # One of those that were being read ended its process: the next ones alone.
                for sample in samples[bar.n : bar.n + workers * CHUNK]:
                    bar.update()
                    yield from read_alone(sample)


def read_in_parallel(samples: Sequence[Sample], workers: int) -> Iterator[list[Finding]]:
    chunk = min(CHUNK, -(-len(samples) // workers))
    with ProcessPoolExecutor(workers, initializer=catch_decoder_warnings) as pool:
        yield from pool.map(check_sample, samples, chunksize=chunk)


def read_alone(sample: Sample) -> list[Finding]:
    """Read an image in a process of its own, which it may end."""
    try:
        return next(read_in_parallel([sample], 1))
    except BrokenProcessPool:
        reason = 'the process that read it was ended, for want of memory or by a fault of a decoder'
        return [Finding(ERROR, 'unreadable image', sample.path, reason, image=sample.name)]
