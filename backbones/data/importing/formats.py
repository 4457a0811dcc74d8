"""Formats of boxes and polygons, each a short reader that yields records."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import yaml
from pycocotools import mask as coco_mask
from tqdm import tqdm

from backbones.errors import DataError, in_one_line

from .masks import paired_maps
from .records import SPLIT_WORDS, Instance, Notes, Record, Source, is_readable, measure

YOLO_LINE = re.compile(r'\d+(\s+-?[\d.]+(e-?\d+)?){4,}\s*$', re.I)
MISSING = 'annotations without an image, left out'
MALFORMED = 'malformed objects, left out'
OTHER_SHAPES = 'shapes that are neither boxes nor areas, left out'


@dataclass(frozen=True)
class Format:
    """A format, how its files are found, and how they are read."""

    title: str
    find: Callable[[Source], list[Path]]
    # Of the source and the files found: records, and the names that the source declares, in order.
    read: Callable[[Source, list[Path], Notes, list[str]], Iterable[Record]] | None


def choose_format(source: Source, name: str | None, task: str | None) -> tuple[str, list[Path]]:
    """The format of a source with its annotation files, or DataError for none and for several."""
    names = [name] if name else list(FORMATS)
    if task and not name:
        # Boxes cannot be made from segmentation maps, and maps are made from polygons last of all.
        names = [one for one in names if one != 'masks' or task == 'segmentation']
    found = {one: FORMATS[one].find(source) for one in names}
    found = {one: files for one, files in found.items() if files}
    if task == 'segmentation' and 'masks' in found and not name:
        found = {'masks': found['masks']}
    if not found:
        formats = ', '.join(FORMATS[one].title for one in names)
        raise DataError(
            f'{source.root} has no annotations of {formats} ({len(source.images)} images)'
        )
    if len(found) > 1:
        counts = ', '.join(f'{one} ({len(files)}: {files[0]})' for one, files in found.items())
        raise DataError(
            f'{source.root} has annotations of several formats, say which with --format: {counts}'
        )
    return next(iter(found.items()))


def containing(
    suffix: str, *marks: bytes, unless: bytes = b'\0\0'
) -> Callable[[Source], list[Path]]:
    """Finds files of a suffix that have all marks in them."""

    def find(source: Source) -> list[Path]:
        found = []
        for path in source.files:
            if path.suffix.lower() == suffix:
                content = path.read_bytes()
                if all(mark in content for mark in marks) and unless not in content:
                    found.append(path)
        return found

    return find


def progress(paths: Sequence[Path]) -> Iterable[Path]:
    return tqdm(paths, 'reading annotations', unit=' files', leave=False, disable=None)


def parse_xml(path: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise DataError(f'{path} is not XML: {error}') from error


def parse_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise DataError(f'{path} is not JSON: {error}') from error


def parse_yaml(path: Path) -> object:
    try:
        return yaml.safe_load(path.read_text(encoding='utf-8'))
    except (yaml.YAMLError, ValueError) as error:
        raise DataError(f'{path} is not YAML: {in_one_line(error)}') from error


def read_names(path: Path) -> list[str]:
    """The names of a file, one a line."""
    try:
        lines = path.read_text(encoding='utf-8').split('\n')
    except ValueError as error:
        raise DataError(f'{path} is not UTF-8: {error}') from error
    return [line.strip() for line in lines if line.strip()]


def hull(polygons: Sequence[Sequence[float]]) -> tuple[float, float, float, float]:
    """The box around polygons."""
    xs, ys = ([v for part in polygons for v in part[first::2]] for first in (0, 1))
    return min(xs), min(ys), max(xs), max(ys)


def box_of_mask(polygons: list[list[float]]) -> tuple[float, float, float, float]:
    """[x, y, width, height] around polygons."""
    x1, y1, x2, y2 = hull(polygons)
    return x1, y1, x2 - x1, y2 - y1


def of_polygon(label: str, points: Sequence[float], place: str, notes: Notes) -> Instance | None:
    """An object of one polygon; None where it has fewer than three points or no finite ones."""
    if len(points) < 6 or len(points) % 2 or not all(map(math.isfinite, points)):
        notes.add('polygons of fewer than three points, left out', place)
        return None
    return Instance(label, hull([points]), [list(map(float, points))])


def read_voc(source: Source, files: list[Path], notes: Notes, names: list[str]) -> Iterator[Record]:
    splits = source.listed_splits('Main')
    for path in progress(files):
        root = parse_xml(path)
        # mmdet and others go by the file's own name, which copies of a file differ in.
        image = source.image(path.stem, path) or source.image(root.findtext('filename') or '', path)
        if image is None:
            notes.add(MISSING, f'{path}: {root.findtext("filename")}')
            continue
        record = Record(image, split=splits.get(path.stem) or source.split(path))
        sides = [root.findtext(f'size/{key}', '') for key in ('width', 'height')]
        record.size = tuple(map(int, sides)) if all(map(str.isdecimal, sides)) else None
        for number, item in enumerate(root.findall('object'), 1):
            label, place = item.findtext('name'), f'{path}, object {number}'
            corners = [item.findtext(f'bndbox/{key}') for key in ('xmin', 'ymin', 'xmax', 'ymax')]
            try:
                x1, y1, x2, y2 = map(float, corners)
            except (TypeError, ValueError):
                notes.add(MALFORMED, f'{place}: {corners}')
                continue
            if not label:
                notes.add(MALFORMED, f'{place} has no name')
                continue
            # PASCAL VOC counts pixels from 1, and the last one belongs to the box.
            difficult = item.findtext('difficult') == '1'
            record.instances.append(Instance(label, (x1 - 1, y1 - 1, x2, y2), None, difficult))
        yield record


def find_yolo(source: Source) -> list[Path]:
    found = []
    for path in source.files:
        if path.suffix == '.txt' and (path.stem in source.by_stem):
            lines = path.read_text(encoding='utf-8', errors='replace').split('\n')
            first = next((line for line in lines if line.strip()), '')
            if YOLO_LINE.match(first) or (not first and 'labels' in path.parts):
                found.append(path)
    return found


def read_yolo(
    source: Source, files: list[Path], notes: Notes, names: list[str]
) -> Iterator[Record]:
    config, content = next(
        (
            (path, content)
            for path in source.files
            if path.suffix in ('.yaml', '.yml')
            and isinstance(content := parse_yaml(path), dict)
            and content.keys() & {'names', 'train'}
        ),
        (None, {}),
    )
    declared = content.get('names')
    if declared is None:
        lists = ('classes.txt', 'obj.names', '_darknet.labels')
        path = next((p for p in source.files if p.name in lists), None)
        declared = read_names(path) if path else []
    if isinstance(declared, dict):
        declared = {int(key): name for key, name in declared.items()}
        declared = [declared.get(i, f'class_{i}') for i in range(max(declared, default=-1) + 1)]
    if not isinstance(declared, list):
        raise DataError(f'{config}: names is {declared!r}, neither a list nor names by numbers')
    names += map(str, declared)
    splits = yolo_splits(source, config, content)
    labels = {path: source.image(path.stem, image_folder(path) / path.name) for path in files}
    of_images = {image: path for path, image in labels.items()}
    for image in progress(sorted({*of_images, *source.images} - {None})):
        if not is_readable(image, notes):
            continue
        path = of_images.get(image)
        split = splits.get(image) or source.split(image) or (path and source.split(path))
        record = Record(image, split=split)
        if path is None:
            notes.add('images without a label file, taken as without objects', image)
        for number, line in enumerate(path.read_text().split('\n') if path else (), 1):
            one = line.strip() and yolo_instance(line, record, names, f'{path}:{number}', notes)
            if one:
                record.instances.append(one)
        yield record


def image_folder(label: Path) -> Path:
    """The folder of images beside that of the labels."""
    parts = ['images' if part == 'labels' else part for part in label.parent.parts]
    return Path(*parts)


def yolo_splits(source: Source, config: Path | None, content: dict) -> dict[Path, str]:
    """The split of images by data.yaml, whose entries are folders or lists of images."""
    splits = {}
    for key in SPLIT_WORDS:
        entries = content.get(key) or []
        for entry in [entries] if isinstance(entries, str) else entries:
            inside = re.sub(r'^(\.\./|\./|/)+', '', entry)
            place = next(
                (
                    p
                    for base in (str(content.get('path') or ''), '')
                    for p in [config.parent / base / entry, config.parent / base / inside]
                    if p.exists()
                ),
                None,
            )
            if place and place.suffix == '.txt':
                found = [
                    source.image(line.strip(), place)
                    for line in place.read_text().split('\n')
                    if line.strip()
                ]
            else:
                folder = place.resolve() if place else None
                found = [p for p in source.images if folder in p.parents]
            splits.update(dict.fromkeys(filter(None, found), SPLIT_WORDS[key]))
    return splits


def yolo_instance(
    line: str, record: Record, names: list[str], place: str, notes: Notes
) -> Instance | None:
    try:
        index, *numbers = line.split()
        index, numbers = int(index), list(map(float, numbers))
    except ValueError:
        notes.add(MALFORMED, f'{place}: {line.strip()[:60]}')
        return None
    if (names and index >= len(names)) or index < 0:
        notes.add('objects of unknown classes, left out', f'{place}: class {index} of {len(names)}')
        return None
    label = names[index] if names else f'class_{index}'
    if len(numbers) not in (4, *range(6, 20000, 2)) or max(map(abs, numbers)) > 2:
        notes.add(MALFORMED, f'{place}: not 4 or an even number of values from 0 to 1')
        return None
    width, height = measure(record.image)[1]
    if len(numbers) > 4:
        points = [v * (height if i % 2 else width) for i, v in enumerate(numbers)]
        return of_polygon(label, points, place, notes)
    x, y, w, h = numbers
    box = (x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height
    return Instance(label, box)


def read_coco(
    source: Source, files: list[Path], notes: Notes, names: list[str]
) -> Iterator[Record]:
    if preferred := [path for path in files if 'instances' in path.stem]:
        files = preferred
    by_split = {source.split(path, with_name=True): path for path in files}
    if len(by_split) < len(files):
        found = ', '.join(map(str, files))
        raise DataError(f'several annotation files are for one split, give one as SOURCE: {found}')
    for path in files:
        content = parse_json(path)
        parents = {c.get('supercategory') for c in content['categories']}
        used = {a.get('category_id') for a in content['annotations']}
        # Roboflow adds the name of the project as a category that all others belong to.
        labels = {
            c['id']: c['name']
            for c in content['categories']
            if c['id'] in used or c['name'] not in parents or c['name'] == c.get('supercategory')
        }
        names += [label for label in labels.values() if label not in names]
        annotations = defaultdict(list)
        for one in content['annotations']:
            annotations[one.get('image_id')].append(one)
        for entry in progress(content['images']):
            image = source.image(entry['file_name'], path)
            if image is None:
                notes.add('missing images, left out', f'{path}: {entry["file_name"]}')
                continue
            record = Record(image, split=source.split(path, with_name=True))
            size = entry.get('width'), entry.get('height')
            record.size = size if all(size) else None
            for one in annotations[entry['id']]:
                place = f'{path}, annotation {one.get("id")}'
                if one.get('category_id') not in labels:
                    notes.add(
                        'objects of unknown classes, left out', f'{place}: {one.get("category_id")}'
                    )
                    continue
                mask = one.get('segmentation') or None
                try:
                    if isinstance(mask, list):
                        # Some tools write a single polygon without the list around it.
                        parts = mask if isinstance(mask[0], list) else [mask]
                        parts = [list(map(float, part)) for part in parts]
                        mask = [p for p in parts if len(p) >= 6 and len(p) % 2 == 0] or None
                    x, y, w, h = one.get('bbox') or box_of_mask(mask)
                    box = float(x), float(y), float(x + w), float(y + h)
                except (TypeError, ValueError):
                    notes.add(MALFORMED, place)
                    continue
                label = labels[one['category_id']]
                record.instances.append(Instance(label, box, mask, one.get('iscrowd') == 1))
            yield record


def read_labelme(
    source: Source, files: list[Path], notes: Notes, names: list[str]
) -> Iterator[Record]:
    for path in progress(files):
        content = parse_json(path)
        image = source.image(content['imagePath'], path) or source.image(path.stem, path)
        if image is None:
            notes.add(MISSING, f'{path}: {content["imagePath"]}')
            continue
        record = Record(image, split=source.split(path) or source.split(image))
        size = content.get('imageWidth'), content.get('imageHeight')
        record.size = size if all(size) else None
        groups: dict[tuple, Instance] = {}
        for number, shape in enumerate(content['shapes'], 1):
            kind, place = shape.get('shape_type') or 'polygon', f'{path}, shape {number}'
            label, points = shape.get('label', ''), [float(v) for p in shape['points'] for v in p]
            if kind == 'rectangle' and len(points) in (4, 8):
                one = Instance(label, hull([points]))
            elif kind == 'circle' and len(points) == 4:
                radius = math.dist(points[:2], points[2:])
                turns = [i * math.pi / 16 for i in range(32)]
                points = [
                    v
                    for t in turns
                    for v in (points[0] + radius * math.cos(t), points[1] + radius * math.sin(t))
                ]
                one = of_polygon(label, points, place, notes)
            elif kind == 'polygon':
                one = of_polygon(label, points, place, notes)
            else:
                notes.add(OTHER_SHAPES, f'{place}: {kind}')
                continue
            group = (label, shape.get('group_id'))
            if one and group[1] is not None and one.mask and group in groups:
                # Parts of one object.
                groups[group].mask += one.mask
                groups[group].box = hull(groups[group].mask)
            elif one:
                record.instances.append(one)
                if one.mask:
                    groups[group] = one
        yield record


def read_cvat(
    source: Source, files: list[Path], notes: Notes, names: list[str]
) -> Iterator[Record]:
    for path in files:
        root = parse_xml(path)
        if root.find('track') is not None:
            raise DataError(f'{path} holds tracks of a video: export it as "CVAT for images"')
        declared = [e.text for e in root.iterfind('meta//labels/label/name')]
        names += [name for name in declared if name and name not in names]
        for entry in progress(root.findall('image')):
            image = source.image(entry.get('name', ''), path)
            if image is None:
                notes.add('missing images, left out', f'{path}: {entry.get("name")}')
                continue
            split = SPLIT_WORDS.get((entry.get('subset') or '').lower())
            record = Record(image, split=split or source.split(image))
            record.size = int(entry.get('width', 0)), int(entry.get('height', 0))
            for number, shape in enumerate(
                sorted(entry, key=lambda e: int(e.get('z_order', 0))), 1
            ):
                place = f'{path}, {entry.get("name")}, shape {number}'
                if one := cvat_instance(shape, record.size, place, notes):
                    record.instances.append(one)
            yield record


def cvat_instance(
    shape: ElementTree.Element, size: tuple[int, int], place: str, notes: Notes
) -> Instance | None:
    label = shape.get('label', '')
    try:
        if shape.tag == 'polygon':
            numbers = [float(v) for v in re.split('[;,]', shape.get('points', ''))]
            return of_polygon(label, numbers, place, notes)
        if shape.tag == 'box':
            x1, y1, x2, y2 = (float(shape.get(k)) for k in ('xtl', 'ytl', 'xbr', 'ybr'))
            angle = math.radians(float(shape.get('rotation', 0)))
            wide = abs((x2 - x1) * math.cos(angle)) + abs((y2 - y1) * math.sin(angle))
            high = abs((x2 - x1) * math.sin(angle)) + abs((y2 - y1) * math.cos(angle))
            x, y = (x1 + x2) / 2, (y1 + y2) / 2
            return Instance(label, (x - wide / 2, y - high / 2, x + wide / 2, y + high / 2))
        if shape.tag == 'mask':
            left, top, wide, high = (int(shape.get(k)) for k in ('left', 'top', 'width', 'height'))
            runs = [int(v) for v in shape.get('rle').split(',')]
            inside = np.repeat(np.arange(len(runs)) % 2, runs).reshape(high, wide)
            pixels = np.zeros(size[::-1], np.uint8, order='F')
            pixels[top : top + high, left : left + wide] = inside
            mask = coco_mask.encode(pixels)
            mask['counts'] = mask['counts'].decode()
            return Instance(label, (left, top, left + wide, top + high), mask)
    except (TypeError, ValueError):
        notes.add(MALFORMED, place)
        return None
    if shape.tag not in ('tag',):
        notes.add(OTHER_SHAPES, f'{place}: {shape.tag}')
    return None


COCO_MARKS = (b'"images"', b'"annotations"', b'"categories"')
FORMATS = {
    'coco': Format('COCO', containing('.json', *COCO_MARKS), read_coco),
    'voc': Format(
        'PASCAL VOC', containing('.xml', b'<annotation', unless=b'<annotations'), read_voc
    ),
    'yolo': Format('YOLO', find_yolo, read_yolo),
    'labelme': Format('LabelMe', containing('.json', b'"shapes"', b'"imagePath"'), read_labelme),
    'cvat': Format('CVAT', containing('.xml', b'<annotations', b'<image'), read_cvat),
    # Read with their legend, by masks.read_maps.
    'masks': Format('segmentation maps as PNGs', lambda s: [p for _, p in paired_maps(s)], None),
}
