"""Records written in COCO's or ADE20K's layout, with a config that trains on them."""

import json
import os
import random
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm import tqdm

from backbones.errors import ConfigError, DataError, in_one_line

from .formats import FORMATS
from .masks import UNLABELED, Legend, encode_map, read_maps
from .records import Instance, Notes, Record, Source, is_readable, measure, rotate_record

ADE_SPLITS = {'train': 'training', 'val': 'validation', 'test': 'test'}
CONFIGS = {
    'detection': 'det_configs/retinanet_effv2_small.py',
    'instances': 'det_configs/mask_rcnn_effv2_small.py',
    'segmentation': 'seg_configs/fpn_effv2_small.py',
}
# Training goes on for about as many iterations, whatever the number of images.
ITERATIONS = 2000
RECORD = 'import.json'
# What a config says where there is a test split, which test.py measures on.
TEST_ON_OBJECTS = """\
test_dataloader = dict(
    dataset=dict(ann_file='annotations/instances_test.json', data_prefix=dict(img='test/')))
test_evaluator = dict(ann_file=data_root + 'annotations/instances_test.json')"""
TEST_ON_MAPS = """\
test_dataloader = dict(dataset=dict(
    data_prefix=dict(img_path='images/test', seg_map_path='annotations/test')))"""


@dataclass
class Options:
    """What a user chooses; None where the source decides."""

    out: Path
    task: str | None = None
    val: float | None = None
    group: str | None = None  # 'folder' or 'video'
    seed: int = 0
    classes: Sequence[str] = ()
    ignore: Sequence[str] = ()
    overwrite: bool = False
    origin: str = ''  # what the config says that the data are from


@dataclass
class Written:
    """What was written."""

    task: str
    classes: list[str]
    colors: list[tuple[int, int, int]] | None
    splits: dict[str, list[Record]]
    files: dict[Path, str] = field(default_factory=dict)  # the new name of each image


def write_dataset(
    source: Source, format_name: str, files: list[Path], options: Options, notes: Notes
) -> Written:
    """Read a source, and write it to a folder that appears when it is complete.

    Raises:
        DataError: The source has nothing for the task, or cannot be split.
        ConfigError: The folder exists and may not be overwritten.
    """
    out = options.out.resolve()
    if out.exists() and not (options.overwrite and (out / RECORD).is_file()):
        hint = '--overwrite replaces it' if (out / RECORD).is_file() else 'and is no import'
        raise ConfigError(f'{options.out} exists ({hint}): choose another --out')
    legend: Legend | None = None
    names: list[str] = []
    if format_name == 'masks':
        records, legend = read_maps(source, notes, options.classes)
        names = legend.classes
        records = [record for record in records if is_readable(record.image, notes)]
    else:
        records = read_objects(source, format_name, files, notes, names)
        if not names:
            names = sorted({one.label for record in records for one in record.instances})
    task = options.task or guess_task(records)
    check_task(records, task)
    classes = choose_classes(names, options, notes)
    chosen = {names.index(name): i for i, name in enumerate(classes) if name in names}
    colors = [legend.colors[i] for i in chosen] if legend and legend.colors else None
    for record in records:
        record.instances = [one for one in record.instances if one.label in classes]
    if task == 'segmentation' and legend is None and 'background' not in classes:
        classes = ['background', *classes]
    written = Written(task, classes, colors, split(records, source, options))
    written.files = unique_names(records, source, task)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{out.name}-', dir=out.parent) as temporary:
        root = Path(temporary, 'new')
        root.mkdir()
        for name, part in written.splits.items():
            write = write_maps if task == 'segmentation' else write_coco
            write(root, name, part, written, (legend, chosen, notes))
        (root / 'classes.txt').write_text('\n'.join(classes) + '\n', encoding='utf-8')
        if colors:
            lines = [' '.join(map(str, color)) for color in colors]
            (root / 'palette.txt').write_text('\n'.join(lines) + '\n')
        about = {
            'source': options.origin,
            'format': format_name,
            'task': task,
            'seed': options.seed,
        }
        about['images'] = {name: len(part) for name, part in written.splits.items()}
        about['notes'] = notes.places
        (root / RECORD).write_text(json.dumps(about, indent=1, ensure_ascii=False) + '\n')
        (root / f'{out.name}.py').write_text(config_text(written, options), encoding='utf-8')
        if out.exists():
            shutil.rmtree(out)
        root.rename(out)
    return written


def read_objects(
    source: Source, format_name: str, files: list[Path], notes: Notes, names: list[str]
) -> list[Record]:
    """One record for each image, on the pixels as they are read; adds to names what is declared."""
    records: dict[Path, Record] = {}
    try:
        for record in FORMATS[format_name].read(source, files, notes, names):
            if not is_readable(record.image, notes):
                continue
            rotate_record(record, notes)
            clip(record, notes)
            first = records.setdefault(record.image, record)
            if first.split != record.split:
                notes.add('images of two splits, left out of the second', record.image)
            elif first is not record:
                notes.add('images that are annotated twice, their objects joined', record.image)
                first.instances += record.instances
    except DataError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f'{source.root} is no {FORMATS[format_name].title} that can be read: '
            f'{type(error).__name__}: {in_one_line(error)}'
        ) from error
    return list(records.values())


def clip(record: Record, notes: Notes) -> None:
    """Cut boxes at the border of their image, and leave out those without area."""
    width, height = measure(record.image)[1]
    kept = []
    for one in record.instances:
        x1, y1, x2, y2 = one.box
        box = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
        place = f'{record.image}: {one.label} {[round(value, 1) for value in one.box]}'
        if not (box[2] - box[0] >= 1 and box[3] - box[1] >= 1):
            notes.add('boxes outside of the image or without area, left out', place)
            continue
        if max(abs(a - b) for a, b in zip(box, one.box, strict=True)) > 1:
            notes.add('boxes beyond the border, clipped', place)
        one.box = box
        kept.append(one)
    record.instances = kept


def guess_task(records: Sequence[Record]) -> str:
    """Segmentation for maps, instances where every object has a mask, else detection."""
    if any(record.seg_map for record in records):
        return 'segmentation'
    objects = [one for record in records for one in record.instances]
    return 'instances' if objects and all(one.mask for one in objects) else 'detection'


def check_task(records: Sequence[Record], task: str) -> None:
    if not records:
        raise DataError('no image is left')
    maps = any(record.seg_map for record in records)
    if maps != (task == 'segmentation') and maps:
        raise DataError(f'segmentation maps have no objects for --task {task}')
    if not maps and not any(record.instances for record in records):
        raise DataError('no object is left')
    if task != 'detection' and not maps:
        for record in records:
            for one in record.instances:
                if not one.mask:
                    raise DataError(
                        f'--task {task} needs masks, and {record.image} has a {one.label} without'
                    )


def choose_classes(names: Sequence[str], options: Options, notes: Notes) -> list[str]:
    """The classes that are taken, in their order."""
    wanted = list(options.classes) or list(names)
    ignored = set(options.ignore) | {
        n for n in names if n.lower() in UNLABELED and not options.classes
    }
    for name in [*options.classes, *options.ignore]:
        if name not in names:
            raise DataError(
                f'--classes and --ignore: the source has no class {name!r}, but {list(names)}'
            )
    classes = [name for name in wanted if name not in ignored]
    if not classes:
        raise DataError('no class is left')
    if left_out := [name for name in names if name not in classes]:
        notes.add('classes left out', ', '.join(left_out))
    return classes


def split(records: list[Record], source: Source, options: Options) -> dict[str, list[Record]]:
    """The source's own splits, or new ones of whole groups, the same for the same seed."""
    parts: dict[str, list[Record]] = {'train': [], 'val': [], 'test': []}
    if options.val is None and {r.split for r in records} >= {'train', 'val'}:
        for record in records:
            parts[record.split or 'train'].append(record)
    elif options.val is None and {r.split for r in records} >= {'train', 'test'}:
        for record in records:
            parts['val' if record.split == 'test' else 'train'].append(record)
    else:
        groups: dict[str, list[Record]] = {}
        for record in records:
            groups.setdefault(group_of(record.image, source, options.group), []).append(record)
        if len(groups) < 2:
            by = f' by --group {options.group}' if options.group else ''
            raise DataError(
                f'the source has {len(records)} images, which are one group{by}: nothing is left '
                'to validate on'
            )
        keys = sorted(groups)
        random.Random(options.seed).shuffle(keys)
        share = 0.2 if options.val is None else options.val
        target = max(1, round(share * len(records)))
        for key in keys:
            new = len(parts['val']) + len(groups[key])
            closer = abs(new - target) <= abs(len(parts['val']) - target)
            rest = sum(map(len, groups.values())) - new
            parts['val' if closer and rest > 0 else 'train'] += groups[key]
        if not parts['val'] or not parts['train']:
            raise DataError('one group has nearly all images: there is nothing left to validate on')
    return {name: sorted(p, key=lambda r: r.image) for name, p in parts.items() if p}


def group_of(image: Path, source: Source, group: str | None) -> str:
    """What is not torn apart by a split."""
    folder = str(image.parent.relative_to(source.root))
    if group == 'folder':
        return folder
    # Roboflow's augmented copies of an image have its name before '.rf.'.
    stem = image.stem.split('.rf.')[0]
    return f'{folder}/{re.sub(r"[0-9]+[^0-9]*$", "", stem) if group == "video" else stem}'


def unique_names(records: Sequence[Record], source: Source, task: str) -> dict[Path, str]:
    """A file name for each image: its own where it is the only one, else with its folders.

    mmseg reads images of one suffix, and decoders go by the content.
    """
    images = [record.image for record in records]
    count = Counter(image.stem.lower() for image in images)
    common = Counter(image.suffix for image in images).most_common(1)[0][0]
    names = {}
    for image in images:
        stem = image.stem
        if count[stem.lower()] > 1:
            stem = '_'.join(image.relative_to(source.root).with_suffix('').parts)
            stem += '' if task == 'segmentation' else image.suffix.replace('.', '_')
        names[image] = stem + (common if task == 'segmentation' else image.suffix)
    if len({name.lower() for name in names.values()}) < len(names):
        raise DataError('two images would get one name: rename them')
    return names


def link(image: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(image.resolve(), target)
    except OSError:
        shutil.copyfile(image, target)


def write_coco(root: Path, name: str, records: list[Record], written: Written, _: tuple) -> None:
    """Write a split in COCO's layout."""
    images, annotations = [], []
    for number, record in enumerate(tqdm(records, f'writing {name}', leave=False, disable=None), 1):
        file_name, (width, height) = written.files[record.image], measure(record.image)[1]
        link(record.image, root / name / file_name)
        images.append(dict(id=number, file_name=file_name, width=width, height=height))
        for one in record.instances:
            x1, y1, x2, y2 = (round(value, 2) for value in one.box)
            box = [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)]
            annotation = dict(
                # COCOeval takes an id of 0 for "none".
                id=len(annotations) + 1, image_id=number,
                category_id=written.classes.index(one.label) + 1,
                bbox=box, area=box[2] * box[3], iscrowd=int(one.is_crowd),
            )  # fmt: skip
            if one.mask and written.task == 'instances':
                annotation['segmentation'] = one.mask
                annotation['area'] = float(coco_mask.area(run_lengths(one, width, height)))
            annotations.append(annotation)
    categories = [dict(id=i, name=label) for i, label in enumerate(written.classes, 1)]
    content = dict(images=images, annotations=annotations, categories=categories)
    path = root / 'annotations' / f'instances_{name}.json'
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding='utf-8')


def run_lengths(one: Instance, width: int, height: int) -> dict:
    """The mask of an object as pycocotools' run-length encoding."""
    if isinstance(one.mask, dict):
        counts = one.mask['counts']
        return (
            coco_mask.frPyObjects(one.mask, height, width) if isinstance(counts, list) else one.mask
        )
    return coco_mask.merge(coco_mask.frPyObjects(one.mask, height, width))


def write_maps(root: Path, name: str, records: list[Record], written: Written, maps: tuple) -> None:
    """Write a split in ADE20K's layout."""
    legend, chosen, notes = maps
    folder = ADE_SPLITS[name]
    (root / 'annotations' / folder).mkdir(parents=True)
    for record in tqdm(records, f'writing {name}', leave=False, disable=None):
        file_name = written.files[record.image]
        link(record.image, root / 'images' / folder / file_name)
        if record.seg_map:
            labels = encode_map(record, legend, chosen, notes)
        else:
            width, height = measure(record.image)[1]
            labels = np.ones((height, width), np.uint8) * (written.classes.index('background') + 1)
            for one in record.instances:
                pixels = coco_mask.decode(run_lengths(one, width, height)).astype(bool)
                labels[pixels] = written.classes.index(one.label) + 1
        path = root / 'annotations' / folder / Path(file_name).with_suffix('.png').name
        Image.fromarray(labels).save(path)


def config_text(written: Written, options: Options) -> str:
    """A config as a person would write it; what it does not say follows."""
    train, sizes = written.splits['train'], [measure(r.image)[1] for r in written.splits['train']]
    segments = written.task == 'segmentation'
    side = float(np.median([(min if segments else max)(size) for size in sizes]))
    low, high = (128, 512) if segments else (160, 640)
    size = int(min(max(round(side / 32) * 32, low), high))
    batch = min(4, len(train))
    epochs = int(min(max(round(ITERATIONS * batch / len(train) / 10) * 10, 20), 300))
    counts = ' + '.join(f'{len(part)} {name}' for name, part in written.splits.items())
    lines = [
        f'# {counts} images, imported from {options.origin}.',
        f"_base_ = 'backbones::{CONFIGS[written.task]}'",
        '',
        f'data_root = {str(options.out) + "/"!r}',
        f"arch = 's0'\nimage_size = {size}\nbatch_size = {batch}\nepochs = {epochs}",
    ]
    if segments and (suffix := Path(written.files[train[0].image]).suffix) != '.jpg':
        lines.append(f'img_suffix = {suffix!r}')
    if segments and written.colors:
        lines.append(f'palette = {[list(color) for color in written.colors]}')
    if 'test' in written.splits:
        lines += ['', TEST_ON_MAPS if segments else TEST_ON_OBJECTS]
    return '\n'.join(lines) + '\n'
