"""Formats of boxes and polygons, each a short reader that yields records."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import yaml
from pycocotools import mask as coco_mask

from backbones.data.objects import is_degenerate
from backbones.data.voc import parse_xml, read_object, size_of
from backbones.errors import DataError, in_one_line
from backbones.progress import ProgressBar

from .masks import paired_maps, read_maps
from .records import SPLIT_WORDS, Instance, LeftOut, Record, Source, measure

YOLO_LINE = re.compile(r'\d+(\s+-?[\d.]+(e[-+]?\d+)?){4,}\s*$', re.I)
# What files of a suffix have in them; the first format that fits is theirs.
MARKS = {
    '.json': {
        'coco': (b'"images"', b'"annotations"', b'"categories"'),
        'labelme': (b'"shapes"', b'"imagePath"'),
    },
    '.xml': {'cvat': (b'<annotations', b'<image'), 'voc': (rb'<annotation\b',)},
}
UNREADABLE = 'annotations that cannot be read'
UNKNOWN = 'objects of unknown classes'
OTHER_SHAPES = 'shapes of kinds that are not read'


def choose_format(source: Source) -> tuple[str, list[Path]]:
    """The format of a source with its annotation files, or DataError for none and for several."""
    chosen, task = source.options.format, source.options.task
    found = {name: [] for name in FORMATS if chosen in (None, name)}
    # Boxes cannot be made from segmentation maps, and maps are made from polygons last of all.
    if not chosen and task in ('detection', 'instances'):
        del found['masks']
    for path in source.files:
        if (name := format_of(path, source)) in found:
            found[name].append(path)
    if 'masks' in found:
        found['masks'] = [path for _, path in paired_maps(source)]
        if task == 'segmentation' and found['masks']:
            found = {'masks': found['masks']}
    several = {name: files for name, files in found.items() if files}
    if not several:
        formats = ', '.join(FORMATS[name][0] for name in found)
        raise DataError(
            f'{source.options.source} has no annotations of {formats} ({len(source.images)} images)'
        )
    if len(several) > 1:
        counts = ', '.join(f'{name} ({len(files)}: {files[0]})' for name, files in several.items())
        raise DataError(
            f'{source.options.source} has several formats, say which with --format: {counts}'
        )
    return several.popitem()


def format_of(path: Path, source: Source) -> str | None:
    """The format that a file is of by its content, or None."""
    if path.suffix == '.txt' and path.stem in source.by_stem:
        lines = path.read_text(encoding='utf-8-sig', errors='replace').strip().split('\n')
        is_empty_list = lines == [''] and 'labels' in path.parts
        return 'yolo' if is_empty_list or any(map(YOLO_LINE.match, lines)) else None
    if marks := MARKS.get(path.suffix.lower()):
        content = path.read_bytes()
        found = (name for name in marks if all(re.search(mark, content) for mark in marks[name]))
        return next(found, None)
    return None


def progress(paths: Sequence[Any]) -> Iterable[Any]:
    return ProgressBar(paths, 'reading annotations', unit=' files', leave=False, disable=None)


def parse(path: Path) -> Any:
    """The content of JSON, YAML or XML, or the lines of a text; DataError if it has none."""
    try:
        if path.suffix.lower() == '.xml':
            return parse_xml(path)
        text = path.read_text(encoding='utf-8-sig')
        if path.suffix.lower() == '.json':
            return json.loads(text)
        if path.suffix in ('.yaml', '.yml'):
            return yaml.safe_load(text)
        return [line.strip() for line in text.split('\n') if line.strip()]
    except (yaml.YAMLError, ValueError) as error:
        raise DataError(f'{path} cannot be read: {in_one_line(error)}') from error


def bounding_box(polygons: Sequence[Sequence[float]]) -> tuple[float, float, float, float]:
    """The box around polygons."""
    xs, ys = ([v for part in polygons for v in part[first::2]] for first in (0, 1))
    return min(xs), min(ys), max(xs), max(ys)


def of_polygon(label: str, points: Sequence[float]) -> Instance:
    """An object of one polygon."""
    if is_degenerate(points):
        raise LeftOut('polygons of fewer than three points', f'{len(points)} numbers')
    return Instance(label, bounding_box([points]), [list(map(float, points))])


def read_voc(source: Source, files: list[Path]) -> Iterator[Record]:
    splits = source.listed_splits('Main')
    for path in progress(files):
        with source.leaving_out(path, UNREADABLE):
            root = parse_xml(path)
            # mmdet and others go by the file's own name, which copies of a file differ in.
            image = source.image(path.stem, root.findtext('filename'), near=path)
            if image is None:
                continue
            if 'train' in splits.values() and image not in splits:
                source.note('images in no list of ImageSets/Main, left out', path)
                continue
            record = Record(image, splits.get(image) or source.split(path))
            with suppress(DataError):
                record.size = size_of(root)
            for number, item in enumerate(root.findall('object'), 1):
                with source.leaving_out(f'{path}, object {number}'):
                    label, (x1, y1, x2, y2), is_difficult = read_object(item)
                    # PASCAL VOC counts pixels from 1, and the last one belongs to the box.
                    box = (x1 - 1, y1 - 1, x2, y2)
                    record.instances.append(Instance(label, box, None, is_difficult))
            yield record


def read_yolo(source: Source, files: list[Path]) -> Iterator[Record]:
    yamls = ((path, parse(path)) for path in source.files if path.suffix in ('.yaml', '.yml'))
    config, content = next(
        ((path, c) for path, c in yamls if isinstance(c, dict) and c.keys() & {'names', 'train'}),
        (None, {}),
    )
    names = content.get('names')
    if names is None:
        lists = ('classes.txt', 'obj.names', '_darknet.labels')
        names = next((parse(path) for path in source.files if path.name in lists), [])
    if isinstance(names, dict):
        names = {int(key): name for key, name in names.items()}
        names = [names.get(i, f'class_{i}') for i in range(max(names, default=-1) + 1)]
    if not isinstance(names, list):
        raise DataError(f'{config}: names is {names!r}, neither a list nor names by numbers')
    source.names += map(str, names)
    splits = yolo_splits(source, config, content)
    labels = {}
    for path in files:
        # The images lie in a folder beside that of the labels.
        near = Path(*('images' if part == 'labels' else part for part in path.parts))
        if image := source.image(path.stem, near=near):
            labels[image] = path
    for image in progress(sorted({*labels, *source.images})):
        path = labels.get(image)
        split = splits.get(image) or source.split(image) or (path and source.split(path))
        record = Record(image, split)
        if path is None:
            source.note('images without a label file, taken as without objects', image)
            yield record
            continue
        with source.leaving_out(path, UNREADABLE):
            for number, line in enumerate(path.read_text(encoding='utf-8-sig').split('\n'), 1):
                if line.strip():
                    if content.get('kpt_shape'):
                        # Keypoints follow the box.
                        line = ' '.join(line.split()[:5])
                    with source.leaving_out(f'{path}:{number}'):
                        record.instances.append(yolo_instance(line, image, source.names))
            yield record


def yolo_splits(source: Source, config: Path | None, content: dict) -> dict[Path, str]:
    """The split of images by data.yaml, whose entries are folders or lists of images."""
    splits = {}
    for key in SPLIT_WORDS:
        entries = content.get(key) or []
        for entry in [entries] if isinstance(entries, str) else entries:
            inside = re.sub(r'^(\.\./|\./|/)+', '', entry)
            bases = config.parent / str(content.get('path') or ''), config.parent
            places = [base / name for base in bases for name in (entry, inside)]
            place = next(filter(Path.exists, places), None)
            found = []
            if place and place.suffix == '.txt':
                found = [source.image(line, near=place) for line in parse(place)]
            elif place:
                folders = {path.parent for path in source.images}
                inside = {one for one in folders if one.resolve().is_relative_to(place.resolve())}
                found = [path for path in source.images if path.parent in inside]
            splits.update(dict.fromkeys(filter(None, found), SPLIT_WORDS[key]))
    return splits


def yolo_instance(line: str, image: Path, names: list[str]) -> Instance:
    index, *numbers = line.split()
    index, numbers = int(index), list(map(float, numbers))
    if (names and index >= len(names)) or index < 0:
        raise LeftOut(UNKNOWN, f'class {index} of {len(names)}')
    label = names[index] if names else f'class_{index}'
    if len(numbers) not in (4, *range(6, 20000, 2)) or max(map(abs, numbers)) > 2:
        raise ValueError('not 4 or an even number of values from 0 to 1')
    width, height = measure(image)[1]
    if len(numbers) > 4:
        points = [v * (height if i % 2 else width) for i, v in enumerate(numbers)]
        return of_polygon(label, points)
    x, y, w, h = numbers
    box = (x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height
    return Instance(label, box)


def read_coco(source: Source, files: list[Path]) -> Iterator[Record]:
    files = [path for path in files if 'instances' in path.stem] or files
    if len({source.split(path, with_name=True) for path in files}) < len(files):
        found = ', '.join(map(str, files))
        raise DataError(f'several annotation files are for one split, give one as SOURCE: {found}')
    for path in files:
        content = parse(path)
        parents = {c.get('supercategory') for c in content['categories']}
        used = {a.get('category_id') for a in content['annotations']}
        # Roboflow adds the name of the project as a category that all others belong to.
        labels = {
            c['id']: str(c['name'])
            for c in content['categories']
            if c['id'] in used or c['name'] not in parents or c['name'] == c.get('supercategory')
        }
        source.names += [label for label in labels.values() if label not in source.names]
        annotations = defaultdict(list)
        for one in content['annotations']:
            annotations[one.get('image_id')].append(one)
        split = source.split(path, with_name=True)
        for number, entry in enumerate(progress(content['images']), 1):
            image, place = None, f'{path}, entry {number} of "images"'
            with source.leaving_out(place, 'malformed entries'):
                own = annotations[entry['id']]
                image = source.image(entry['file_name'], near=path, split=split)
            if image is None:
                continue
            record = Record(image, split)
            record.size = entry.get('width'), entry.get('height')
            for one in own:
                place = f'{path}, annotation {one.get("id")}'
                with source.leaving_out(place):
                    instance = coco_instance(one, labels)
                    # CVAT, which writes "occluded", marks every mask that is no polygon as a crowd.
                    if instance.is_crowd and 'occluded' in (one.get('attributes') or ()):
                        source.note("masks of CVAT's marked as crowds, taken as objects", place)
                        instance.is_crowd = False
                    record.instances.append(instance)
            yield record


def coco_instance(one: dict, labels: dict) -> Instance:
    category, mask = one.get('category_id'), one.get('segmentation') or None
    if category not in labels:
        raise LeftOut(UNKNOWN, category)
    if isinstance(mask, list):
        # Some tools write a single polygon without the list around it.
        parts = mask if isinstance(mask[0], list) else [mask]
        parts = [list(map(float, part)) for part in parts]
        mask = [part for part in parts if not is_degenerate(part)] or None
    if one.get('bbox'):
        x, y, w, h = map(float, one['bbox'])
        box = x, y, x + w, y + h
    elif isinstance(mask, list):
        box = bounding_box(mask)
    else:
        raise ValueError('neither a box nor polygons')
    return Instance(labels[category], box, mask, one.get('iscrowd') == 1)


def read_labelme(source: Source, files: list[Path]) -> Iterator[Record]:
    for path in progress(files):
        with source.leaving_out(path, UNREADABLE):
            content = json.loads(path.read_text(encoding='utf-8-sig'))
            image = source.image(content['imagePath'], path.stem, near=path)
            if image is None:
                continue
            record = Record(image, source.split(path) or source.split(image))
            record.size = content.get('imageWidth'), content.get('imageHeight')
            groups: dict[tuple, Instance] = {}
            for number, shape in enumerate(content['shapes'], 1):
                with source.leaving_out(f'{path}, shape {number}'):
                    one = labelme_instance(shape)
                    group = one.label, shape.get('group_id')
                    if group[1] is not None and one.mask and group in groups:
                        # Parts of one object.
                        groups[group].mask += one.mask
                        groups[group].box = bounding_box(groups[group].mask)
                    else:
                        record.instances.append(one)
                        if one.mask:
                            groups[group] = one
            yield record


def labelme_instance(shape: dict) -> Instance:
    kind, label = shape.get('shape_type') or 'polygon', str(shape.get('label') or '')
    points = [float(value) for point in shape['points'] for value in point]
    if kind == 'rectangle' and len(points) in (4, 8):
        return Instance(label, bounding_box([points]))
    if kind == 'circle' and len(points) == 4:
        radius, turns = math.dist(points[:2], points[2:]), np.arange(32) * np.pi / 16
        around = radius * np.stack([np.cos(turns), np.sin(turns)], axis=1)
        points = (points[:2] + around).ravel().tolist()
    elif kind != 'polygon':
        raise LeftOut(OTHER_SHAPES, kind)
    return of_polygon(label, points)


def read_cvat(source: Source, files: list[Path]) -> Iterator[Record]:
    for path in files:
        root = parse(path)
        if root.find('track') is not None:
            raise DataError(f'{path} holds tracks of a video: export it as "CVAT for images"')
        names = [element.text for element in root.iterfind('meta//labels/label/name')]
        source.names += [name for name in names if name and name not in source.names]
        for entry in progress(root.findall('image')):
            split = SPLIT_WORDS.get((entry.get('subset') or '').lower())
            image = source.image(entry.get('name', ''), near=path, split=split)
            if image is None:
                continue
            record = Record(image, split or source.split(image))
            record.size = int(entry.get('width', 0)), int(entry.get('height', 0))
            shapes = sorted(entry, key=lambda shape: int(shape.get('z_order', 0)))
            for number, shape in enumerate(shapes, 1):
                if shape.tag != 'tag':
                    with source.leaving_out(f'{path}, {entry.get("name")}, shape {number}'):
                        record.instances.append(cvat_instance(shape, record.size))
            yield record


def cvat_instance(shape: ElementTree.Element, size: tuple[int, int]) -> Instance:
    label = shape.get('label', '')
    if shape.tag == 'polygon':
        return of_polygon(label, list(map(float, re.split('[;,]', shape.get('points', '')))))
    if shape.tag == 'box':
        x1, y1, x2, y2 = (float(shape.get(k)) for k in ('xtl', 'ytl', 'xbr', 'ybr'))
        angle = math.radians(float(shape.get('rotation', 0)))
        wide = abs((x2 - x1) * math.cos(angle)) + abs((y2 - y1) * math.sin(angle))
        high = abs((x2 - x1) * math.sin(angle)) + abs((y2 - y1) * math.cos(angle))
        x, y = (x1 + x2) / 2, (y1 + y2) / 2
        return Instance(label, (x - wide / 2, y - high / 2, x + wide / 2, y + high / 2))
    if shape.tag == 'mask':
        left, top, wide, high = (int(shape.get(k)) for k in ('left', 'top', 'width', 'height'))
        runs = [int(run) for run in shape.get('rle', '').split(',')]
        inside = np.repeat(np.arange(len(runs)) % 2, runs).reshape(high, wide)
        pixels = np.zeros(size[::-1], np.uint8, order='F')
        pixels[top : top + high, left : left + wide] = inside
        mask = coco_mask.encode(pixels)
        mask['counts'] = mask['counts'].decode()
        return Instance(label, (left, top, left + wide, top + high), mask)
    raise LeftOut(OTHER_SHAPES, shape.tag)


# The title of each format, and what reads its files.
FORMATS: dict[str, tuple[str, Callable[[Source, list[Path]], Iterable[Record]]]] = {
    'coco': ('COCO', read_coco),
    'voc': ('PASCAL VOC', read_voc),
    'yolo': ('YOLO', read_yolo),
    'labelme': ('LabelMe', read_labelme),
    'cvat': ('CVAT', read_cvat),
    'masks': ('segmentation maps as PNGs', read_maps),
}
