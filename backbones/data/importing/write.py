"""Records written in COCO's or ADE20K's layout, with a config that trains on them."""

import json
import os
import random
import re
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from backbones.data.objects import mask_fault
from backbones.errors import ConfigError, DataError, in_one_line
from backbones.progress import ProgressBar

from .formats import FORMATS
from .masks import UNLABELED, encode_map
from .records import Instance, Record, Source, measure, rotate_record

ADE_SPLITS = {'train': 'training', 'val': 'validation', 'test': 'test'}
CONFIGS = {
    'detection': 'det_configs/retinanet_effv2_small.py',
    'instances': 'det_configs/mask_rcnn_effv2_small.py',
    'segmentation': 'seg_configs/fpn_effv2_small.py',
}
# Training goes on for about as many iterations, whatever the number of images.
ITERATIONS = 2000
RECORD = 'import.json'
BACKGROUND = 'background'


@dataclass
class Written:
    """What was written."""

    task: str
    classes: list[str]
    colors: list[tuple[int, int, int]] | None
    splits: dict[str, list[Record]]


def write_dataset(source: Source, format_name: str, files: list[Path]) -> Written:
    """Read a source, and write it to a folder that appears when it is complete."""
    options, out = source.options, source.options.out.resolve()
    if out.exists() and not (options.overwrite and (out / RECORD).is_file()):
        hint = '--overwrite replaces it' if (out / RECORD).is_file() else 'and is no import'
        raise ConfigError(f'{options.out} exists ({hint}): choose another --out')
    records = read_records(source, format_name, files)
    task = choose_task(records, source)
    classes = choose_classes(source, task)
    chosen = {source.names.index(name): i for i, name in enumerate(classes) if name in source.names}
    colors = source.colors and [source.colors[i] for i in chosen]
    for record in records:
        record.instances = [one for one in record.instances if one.label in classes]
    for name in ('val', 'test'):
        part = [record for record in records if record.split == name]
        if part and not any(record.instances or record.seg_map for record in part):
            source.note(f'{name} images without any annotation, left out', part[0].image.parent)
            records = [record for record in records if record.split != name]
    name_images(records, source, task)
    written = Written(task, classes, colors, split(records, source))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{out.name}-', dir=out.parent) as temporary:
        root = Path(temporary, 'new')
        root.mkdir()
        for name in written.splits:
            if task == 'segmentation':
                write_maps(root, name, written, source, chosen)
            else:
                write_coco(root, name, written)
        (root / 'classes.txt').write_text('\n'.join(classes) + '\n', encoding='utf-8')
        config, text = keep_configs(out, root, source), config_text(written, source)
        (root / config).write_text(text, encoding='utf-8')
        about = dict(
            source=str(options.source), format=format_name, task=task, seed=options.seed,
            images={name: len(part) for name, part in written.splits.items()}, notes=source.notes,
            config=text,
        )  # fmt: skip
        record = json.dumps(about, indent=1, ensure_ascii=False)
        (root / RECORD).write_text(f'{record}\n', encoding='utf-8')
        if out.exists():
            shutil.rmtree(out)
        root.rename(out)
    return written


def keep_configs(out: Path, root: Path, source: Source) -> str:
    """Copy configs that are not as an earlier import wrote them; returns a name for the new one."""
    name = f'{out.name}.py'
    if out.exists():
        text = json.loads((out / RECORD).read_bytes()).get('config', '')
        for path in sorted(out.glob('*.py')):
            if path.read_bytes() != text.encode():
                shutil.copy(path, root)
                source.note('configs that were changed, kept', path)
    while (root / name).exists():
        name = name.replace('.py', '_new.py')
    if name != f'{out.name}.py':
        source.note('the new config is beside them', out / name)
    return name


def read_records(source: Source, format_name: str, files: list[Path]) -> list[Record]:
    """One record for each image, on the pixels as they are read."""
    records: dict[Path, Record] = {}
    try:
        for record in FORMATS[format_name][1](source, files):
            rotate_record(record, source)
            leave_out_malformed(record, source)
            first = records.setdefault(record.image, record)
            if first.split != record.split:
                source.note('images of two splits, left out of the second', record.image)
            elif first is not record:
                source.note('images that are annotated twice, their objects joined', record.image)
                first.instances += record.instances
    except DataError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f'{source.root} is no {FORMATS[format_name][0]} that can be read: '
            f'{type(error).__name__}: {in_one_line(error)}'
        ) from error
    if not source.names:
        source.names = sorted({one.label for r in records.values() for one in r.instances})
    # What has the same name is one class.
    names = list(dict.fromkeys(source.names))
    source.colors = source.colors and [source.colors[source.names.index(name)] for name in names]
    source.values = {value: names.index(source.names[i]) for value, i in source.values.items()}
    source.names = names
    return list(records.values())


def leave_out_malformed(record: Record, source: Source) -> None:
    """Cut boxes at the border of their image; leave out objects without area or a mask to read."""
    width, height = measure(record.image)[1]
    kept = []
    for one in record.instances:
        x1, y1, x2, y2 = one.box
        box = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
        place = f'{record.image}: {one.label} {[round(value, 1) for value in one.box]}'
        if not one.label:
            source.note('objects without a class, left out', place)
        elif not (box[2] - box[0] >= 1 and box[3] - box[1] >= 1):
            source.note('boxes outside of the image or without area, left out', place)
        elif one.mask and (fault := mask_fault(one.mask, height, width)):
            source.note('malformed objects, left out', f'{place}: {fault}')
        else:
            if max(abs(a - b) for a, b in zip(box, one.box, strict=True)) > 1:
                source.note('boxes beyond the border, clipped', place)
            one.box = box
            kept.append(one)
    record.instances = kept


def choose_task(records: Sequence[Record], source: Source) -> str:
    """Segmentation for maps, instances where every object has a mask, else detection."""
    task = source.options.task
    if not records:
        raise DataError('no image is left')
    objects = [(record, one) for record in records for one in record.instances]
    if any(record.seg_map for record in records):
        if task not in (None, 'segmentation'):
            raise DataError(f'segmentation maps have no objects for --task {task}')
        return 'segmentation'
    if not objects:
        raise DataError('no object is left')
    unmasked = [f'{record.image}: {one.label}' for record, one in objects if not one.mask]
    if task == 'detection' or not unmasked:
        return task or 'instances'
    if len(unmasked) == len(objects):
        if task:
            raise DataError(f'--task {task} needs masks, and no object has one')
        return 'detection'
    what = 'left out' if task else 'so that all are boxes (--task instances leaves these out)'
    for place in unmasked:
        source.note(f'objects without a mask, {what}', place)
    if task:
        for record in records:
            record.instances = [one for one in record.instances if one.mask]
    return task or 'detection'


def choose_classes(source: Source, task: str) -> list[str]:
    """The classes that are taken, in their order."""
    names, options = source.names, source.options
    # What no polygon covers has a class too.
    has_background = task == 'segmentation' and not source.values
    known = [*names, BACKGROUND] if has_background else names
    for name in [*options.classes, *options.ignore]:
        if name not in known:
            raise DataError(
                f'--classes and --ignore: the source has no class {name!r}, but {names}'
            )
    wanted = options.classes or [name for name in names if name.lower() not in UNLABELED]
    classes = [name for name in wanted if name not in options.ignore]
    if not classes:
        raise DataError('no class is left')
    if left_out := [name for name in names if name not in classes]:
        source.note('classes left out', ', '.join(left_out))
    if has_background and BACKGROUND not in [*classes, *options.ignore]:
        classes = [BACKGROUND, *classes]
    if task == 'segmentation' and not 2 <= len(classes) <= 254:
        raise DataError(
            f'segmentation tells 2 to 254 classes apart, not {len(classes)}: pixels of none '
            'are ignored, so that the background has to be named too'
        )
    return classes


def split(records: list[Record], source: Source) -> dict[str, list[Record]]:
    """The source's own splits, or new ones of whole groups, the same for the same seed."""
    parts: dict[str, list[Record]] = {'train': [], 'val': [], 'test': []}
    options, declared = source.options, {record.split for record in records}
    if options.val is None and declared & {'train', None} and declared & {'val', 'test'}:
        if options.group or options.seed:
            source.note('--group and --seed are for new splits', 'none are drawn without --val')
        # A source with one of both is validated on that.
        names = {None: 'train'} if 'val' in declared else {None: 'train', 'test': 'val'}
        for record in records:
            parts[names.get(record.split, record.split)].append(record)
    else:
        groups: dict[str, list[Record]] = defaultdict(list)
        for record in records:
            groups[group_of(record.image, source)].append(record)
        keys = sorted(groups)
        random.Random(options.seed).shuffle(keys)
        share = 0.2 if options.val is None else options.val
        target = max(1, round(share * len(records)))
        for key in keys:
            new = len(parts['val']) + len(groups[key])
            closer = abs(new - target) <= abs(len(parts['val']) - target)
            parts['val' if closer and new < len(records) else 'train'] += groups[key]
        if not parts['val'] or not parts['train']:
            by = f' by --group {options.group}' if options.group else ''
            raise DataError(
                f'nothing is left to validate on: {len(records)} images are {len(groups)} '
                f'group(s){by}, one of which has nearly all'
            )
    return {name: sorted(p, key=lambda r: r.image) for name, p in parts.items() if p}


def group_of(image: Path, source: Source) -> str:
    """What is not torn apart by a split."""
    folder = str(image.parent.relative_to(source.root))
    if source.options.group == 'folder':
        return folder
    # Roboflow's augmented copies of an image have its name before '.rf.'.
    stem = image.stem.split('.rf.')[0]
    is_frame = source.options.group == 'video'
    return f'{folder}/{re.sub(r"[0-9]+[^0-9]*$", "", stem) if is_frame else stem}'


def name_images(records: Sequence[Record], source: Source, task: str) -> None:
    """Give each image a file name: its own where it is the only one, else with its folders.

    mmseg reads images of one suffix, and decoders go by the content.
    """
    counts = Counter(record.image.stem.lower() for record in records)
    common = Counter(record.image.suffix for record in records).most_common(1)[0][0]
    for record in records:
        stem, suffix = record.image.stem, record.image.suffix
        if counts[stem.lower()] > 1:
            stem = '_'.join(record.image.relative_to(source.root).with_suffix('').parts)
            stem += '' if task == 'segmentation' else suffix.replace('.', '_')
        # COCO's files and mmseg's lists are UTF-8, in which other bytes cannot be written.
        stem = re.sub('[\ud800-\udfff]', '_', stem)
        record.name = stem + (common if task == 'segmentation' else suffix)
    if len({record.name.lower() for record in records}) < len(records):
        raise DataError('two images would get one name: rename them')


def link(image: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(image.resolve(), target)
    except OSError:
        shutil.copyfile(image, target)


def write_coco(root: Path, name: str, written: Written) -> None:
    """Write a split in COCO's layout."""
    images, annotations = [], []
    records = ProgressBar(written.splits[name], f'writing {name}', leave=False, disable=None)
    for number, record in enumerate(records, 1):
        width, height = measure(record.image)[1]
        link(record.image, root / name / record.name)
        images.append(dict(id=number, file_name=record.name, width=width, height=height))
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
    if isinstance(one.mask, dict) and not isinstance(one.mask['counts'], list):
        return one.mask
    parts = coco_mask.frPyObjects(one.mask, height, width)
    return coco_mask.merge(parts) if isinstance(parts, list) else parts


def write_maps(
    root: Path, name: str, written: Written, source: Source, chosen: dict[int, int]
) -> None:
    """Write a split in ADE20K's layout."""
    folder = ADE_SPLITS[name]
    (root / 'annotations' / folder).mkdir(parents=True)
    for record in ProgressBar(written.splits[name], f'writing {name}', leave=False, disable=None):
        link(record.image, root / 'images' / folder / record.name)
        if record.seg_map:
            labels = encode_map(record, source, chosen)
        else:
            width, height = measure(record.image)[1]
            labels = np.zeros((height, width), np.uint8)
            if BACKGROUND in written.classes:
                labels += written.classes.index(BACKGROUND) + 1
            for one in record.instances:
                pixels = coco_mask.decode(run_lengths(one, width, height)).astype(bool)
                labels[pixels] = written.classes.index(one.label) + 1
        path = root / 'annotations' / folder / Path(record.name).with_suffix('.png').name
        Image.fromarray(labels).save(path)


def config_text(written: Written, source: Source) -> str:
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
        f'# {counts} images, imported from {source.options.source}.',
        f"_base_ = 'backbones::{CONFIGS[written.task]}'",
        '',
        f'data_root = {str(source.options.out) + "/"!r}',
        f"arch = 's0'\nimage_size = {size}\nbatch_size = {batch}\nepochs = {epochs}",
    ]
    if segments and (suffix := Path(train[0].name).suffix) != '.jpg':
        lines.append(f'img_suffix = {suffix!r}')
    if segments and written.colors:
        lines.append(f'palette = {[list(color) for color in written.colors]}')
    if 'test' in written.splits:
        lines.append("test_split = 'test'")
    return '\n'.join(lines) + '\n'
