"""COCO annotation files: reading them, and what is wrong in them or with the images they list."""

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from backbones.errors import DataError

from .findings import ERROR, WARNING, Finding
from .masks import box_fault, is_degenerate, is_number, mask_fault

COCO_SOURCE = (
    'COCO is at https://cocodataset.org/#download: unpack train2017, val2017 and annotations '
    'into data/coco, or link the folder there'
)
IMAGE_KEYS = ('id', 'file_name', 'width', 'height')
CATEGORY_KEYS = ('id', 'name')
ANNOTATION_KEYS = ('id', 'image_id', 'category_id', 'bbox', 'area')

# In pixels; no decoder reads more (OpenCV's CV_IO_MAX_IMAGE_WIDTH).
LARGEST_SIDE = 2**20


# Two files, of training and validation, are read for their classes first and checked then.
@lru_cache(maxsize=4)
def read_coco(path: Path) -> dict:
    """The contents of a COCO annotation file; kept until ``read_coco.cache_clear()``.

    Raises:
        DataError: It is missing, not JSON, or lacks images, annotations or categories.
    """
    if not path.is_file():
        raise DataError(
            f'there is no annotation file {path} (data_root and ann_file say so). {COCO_SOURCE}; '
            'for data of your own set data_root and ann_file'
        )
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    # ValueError: not UTF-8, not JSON, or a number of thousands of digits.
    except (ValueError, RecursionError) as error:
        what = 'empty' if path.stat().st_size == 0 else f'not JSON: {error}'
        raise DataError(f'{path} is {what}') from error
    if not isinstance(content, dict):
        raise DataError(f'{path} is not a COCO file: it holds a {type(content).__name__}')
    for key in ('images', 'annotations', 'categories'):
        if not isinstance(content.get(key), list) or not content[key]:
            raise DataError(f'{path} is not a COCO file to train or test on: it has no {key}')
    return content


def category_names(path: Path) -> tuple[str, ...]:
    """Names of a COCO file's categories, in its order.

    Raises:
        DataError: The file cannot be read, or a category has no name or one that occurs twice.
    """
    categories = read_coco(path)['categories']
    for category in categories:
        if not isinstance(category, dict) or not is_text(category.get('name')):
            raise DataError(f'{path}: a category has no name that is text: {category!r:.80}')
    names = tuple(category['name'] for category in categories)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f'{path}: more than one category is called {", ".join(map(repr, twice))}')
    return names


@dataclass(frozen=True)
class CocoRules:
    """What decides how an annotation is treated.

    Attributes:
        classes: Names of the categories that are used.
        reads_masks: Whether the pipeline or the metric reads segmentations.
        evaluated: Whether COCO's metrics are computed with the file.
        leaves_out_empty: mmdet's ``filter_empty_gt``.
        min_size: mmdet's ``min_size`` of an image, in pixels.
    """

    classes: tuple[str, ...]
    reads_masks: bool
    evaluated: bool
    leaves_out_empty: bool
    min_size: int

    def leaves_out(self, image: dict, has_objects: bool) -> bool:
        """Whether mmdet leaves an image out of training."""
        too_small = min(image['width'], image['height']) < self.min_size
        return too_small or (self.leaves_out_empty and not has_objects)


def check_coco(
    path: Path, folder: Path, rules: CocoRules
) -> tuple[list[Finding], dict[str, tuple[int, int]]]:
    """Check a COCO file against itself and the folder of its images.

    Args:
        path: The file.
        folder: Where the images are.
        rules: How annotations are treated.

    Returns:
        What was found, and the size (width, height) of every image that exists, by its name.

    Raises:
        DataError: The file cannot be read.
    """
    content = read_coco(path)
    findings = list(check_categories(path, content['categories']))
    images: dict[object, dict] = {}
    findings += check_images(path, content['images'], folder, rules, images)
    findings += check_annotations(path, content, images, folder, rules)
    if not folder.is_dir():
        reason = (
            f'there is no image folder {folder} (data_root and data_prefix say so). {COCO_SOURCE}'
        )
        return [*findings, Finding(ERROR, 'missing folder', str(folder), reason)], {}
    sizes = {image['file_name']: (image['width'], image['height']) for image in images.values()}
    for name, hint in missing_files(folder, sizes):
        reason = f'{path} lists it, but it is not there{hint}'
        findings.append(Finding(ERROR, 'missing image', str(folder / name), reason, image=name))
        del sizes[name]
    return findings, sizes


def check_categories(path: Path, categories: list) -> Iterator[Finding]:
    known: dict[object, object] = {}
    for category in categories:
        fault = entry_fault(category, CATEGORY_KEYS)
        if fault:
            reason = f'a category {fault}: {category!r:.80}'
            yield Finding(ERROR, 'incomplete category', str(path), reason)
        elif category['id'] in known:
            reason = (
                f'{known[category["id"]]!r} and {category["name"]!r} both have this id, and only '
                'the last is used'
            )
            yield Finding(ERROR, 'duplicate category id', str(path), reason, category['id'])
        else:
            known[category['id']] = category['name']
    ids = [number for number in known if is_number(number)]
    if ids != sorted(ids):
        reason = (
            f'the category ids come in the order {ids[:10]}; classes are numbered by the order in '
            'the file, so that it has to be the same in all files of the config'
        )
        yield Finding(WARNING, 'categories out of order', str(path), reason)


def check_images(
    path: Path, entries: list, folder: Path, rules: CocoRules, images: dict[object, dict]
) -> Iterator[Finding]:
    """What is wrong with entries of images; those that can be used go to ``images`` by their id."""
    by_name: dict[str, object] = {}
    by_lower_case: dict[str, str] = {}
    for image in entries:
        fault = image_fault(image)
        if fault:
            yield Finding(ERROR, 'incomplete image', str(path), f'an image {fault}: {image!r:.100}')
            continue
        name, number = image['file_name'], image['id']
        file = f'{folder}{os.sep}{name}'
        if number in images:
            first = images[number]['file_name']
            reason = f'{first} has the image id {number} too, and only the last is used'
            for each in (first, name):
                yield Finding(ERROR, 'duplicate image id', file, reason, image=each)
        if name in by_name:
            reason = f'it is listed as image {by_name[name]} and as image {number}'
            yield Finding(WARNING, 'image listed twice', file, reason)
        elif name.lower() in by_lower_case:
            reason = (
                f'its name differs from {by_lower_case[name.lower()]} in case only: one of both is '
                'lost where case does not count, as on macOS and Windows'
            )
            yield Finding(WARNING, 'names that differ in case', file, reason)
        by_name[name] = number
        by_lower_case.setdefault(name.lower(), name)
        side = min(image['width'], image['height'])
        if side < max(rules.min_size, 2):
            reason = f'it is {image["width"]}x{image["height"]}; ' + (
                f'left out of training (min_size={rules.min_size})'
                if side < rules.min_size
                else 'it is scaled like any other'
            )
            yield Finding(WARNING, 'small image', file, reason)
        images[number] = image


def check_annotations(
    path: Path, content: dict, images: dict[object, dict], folder: Path, rules: CocoRules
) -> Iterator[Finding]:
    categories = {
        category['id']: category['name']
        for category in content['categories']
        if not entry_fault(category, CATEGORY_KEYS)
    }
    used = {number for number, name in categories.items() if name in rules.classes}
    with_objects = set()
    seen = set()
    for annotation in content['annotations']:
        fault = entry_fault(annotation, ANNOTATION_KEYS)
        # What is wrong may be another entry than these two.
        number = id_in(annotation, 'id')
        image = images.get(id_in(annotation, 'image_id'))
        name = image['file_name'] if image else None
        file = f'{folder}{os.sep}{name}' if name else str(path)
        if fault:
            reason = f'an annotation {fault}: {annotation!r:.100}'
            yield Finding(ERROR, 'incomplete annotation', file, reason, number, name)
            continue
        if number in seen:
            reason = f'more than one annotation of {path} has this id'
            yield Finding(ERROR, 'duplicate annotation id', file, reason, number, name)
        seen.add(number)
        if image is None:
            reason = f'it belongs to image_id {annotation["image_id"]}, which is not listed'
            yield Finding(ERROR, 'annotation of no image', file, reason, number)
            continue
        if annotation['category_id'] not in categories:
            reason = f'its category_id {annotation["category_id"]} is not among {list(categories)}'
            yield Finding(ERROR, 'annotation of no category', file, reason, number, name)
            continue
        if annotation['category_id'] in used:
            with_objects.add(annotation['image_id'])
        for severity, kind, reason in check_object(annotation, image, rules):
            yield Finding(severity, kind, file, reason, number, name)
    if not with_objects:
        reason = f'no annotation is of any of the classes {list(rules.classes)}'
        yield Finding(ERROR, 'no objects', str(path), reason)
        return
    if all(rules.leaves_out(image, number in with_objects) for number, image in images.items()):
        reason = f'every image is left out of training (filter_empty_gt, min_size={rules.min_size})'
        yield Finding(ERROR, 'no images', str(path), reason)
        return
    if rules.leaves_out_empty:
        outcome = 'left out of training (filter_empty_gt=True)'
    elif rules.evaluated:
        outcome = 'whatever is detected in it counts as false'
    else:
        outcome = 'all of it is trained as background'
    for number, image in images.items():
        if number not in with_objects:
            file = str(folder / image['file_name'])
            yield Finding(WARNING, 'image without objects', file, outcome)


def check_object(annotation: dict, image: dict, rules: CocoRules) -> Iterator[tuple[str, str, str]]:
    """What is wrong with one object: (severity, kind, reason)."""
    box, area = annotation['bbox'], annotation['area']
    fault = box_fault(box)
    if fault:
        yield ERROR, 'malformed box', fault
        return
    if not is_number(area):
        yield ERROR, 'malformed area', f'its area is {area!r:.40}'
        return
    if annotation.get('iscrowd', 0) not in (0, 1):
        yield ERROR, 'malformed iscrowd', f'iscrowd is {annotation["iscrowd"]!r:.40}, not 0 or 1'
        return
    if rules.evaluated and 'iscrowd' not in annotation:
        reason = 'it lacks "iscrowd", without which COCO cannot evaluate'
        yield ERROR, 'incomplete annotation', reason
    if rules.evaluated and annotation['id'] == 0:
        reason = (
            'to pycocotools 0 is no object: what is detected there counts as false. Count from 1'
        )
        yield WARNING, 'annotation id 0', reason
    x, y, width, height = box
    frame = f'{image["width"]}x{image["height"]}'
    left_out = True
    if width < 1 or height < 1 or area <= 0:
        reason = f'the box {box}, area {area}: mmdet leaves the object out of training'
        yield WARNING, 'box without area', reason
    elif not (-width < x < image['width'] and -height < y < image['height']):
        reason = f'the box {box} is outside of {frame}: mmdet leaves the object out of training'
        yield WARNING, 'box outside the image', reason
    else:
        left_out = False
        if min(x, y) < -1 or x + width > image['width'] + 1 or y + height > image['height'] + 1:
            reason = f'the box {box} reaches out of {frame}: cut by Resize'
            yield WARNING, 'box beyond the border', reason
    mask = annotation.get('segmentation')
    if annotation.get('iscrowd'):
        shape = ', given as a polygon' if isinstance(mask, list) else ''
        reason = f'a group{shape}: it is not learned, and what is detected in it does not count'
        yield WARNING, 'crowd region', reason
    if rules.evaluated or not left_out:
        yield from check_mask(mask, image, rules)


def check_mask(mask: object, image: dict, rules: CocoRules) -> Iterator[tuple[str, str, str]]:
    """What is wrong with the segmentation of an object: (severity, kind, reason)."""
    if not mask and not rules.reads_masks:
        return
    fault = mask_fault(mask, image['height'], image['width'])
    if fault and rules.reads_masks:
        yield ERROR, 'malformed mask', fault
    elif fault:
        yield WARNING, 'malformed mask', f'{fault}; this config reads no masks'
    elif isinstance(mask, list):
        parts = sum(map(is_degenerate, mask))
        if parts:
            what = 'the object is ignored' if parts == len(mask) else 'this part is left out'
            reason = (
                f'{parts} of its {len(mask)} polygons (or with half a point): {what} where masks '
                'are trained'
            )
            yield WARNING, 'polygon of fewer than three points', reason


def missing_files(folder: Path, names: Iterable[str]) -> list[tuple[str, str]]:
    """Names of files that a folder lacks, and a hint where one differs in case."""
    by_parent: dict[str, list[str]] = defaultdict(list)
    for name in names:
        by_parent[os.path.dirname(name)].append(name)
    missing = []
    for parent, inside in by_parent.items():
        place = folder / parent
        present = set(os.listdir(place)) if place.is_dir() else set()
        lower_case = {name.lower(): name for name in present}
        for name in inside:
            base = os.path.basename(name)
            if base not in present:
                other = lower_case.get(base.lower())
                missing.append(
                    (name, f'; there is {other}, which differs in case' if other else '')
                )
    return missing


def entry_fault(entry: object, keys: tuple[str, ...]) -> str | None:
    """What an entry of the file lacks, or has as something else; None if nothing."""
    if not isinstance(entry, dict):
        return 'is no object with keys and values'
    for key in keys:
        if key not in entry:
            return f'lacks {", ".join(key for key in keys if key not in entry)}'
    for key in keys:
        value = entry[key]
        if key.endswith('id'):
            if not is_id(value):
                return f'has {value!r:.40} as {key} instead of a number or text'
        elif key.endswith('name') and not is_text(value):
            return f'has {value!r:.40} as {key} instead of text'
    return None


def image_fault(image: object) -> str | None:
    """What is wrong with an entry of an image; None if nothing."""
    fault = entry_fault(image, IMAGE_KEYS)
    if fault is None:
        sides = (image['width'], image['height'])
        # False for NaN too.
        if not all(is_number(side) and 1 <= side <= LARGEST_SIDE for side in sides):
            fault = f'has no size: width {sides[0]!r:.40}, height {sides[1]!r:.40}'
    return fault


def is_id(value: object) -> bool:
    """Whether mmdet and pycocotools can tell entries apart by it."""
    return (type(value) is int and abs(value) < 2**63) or is_text(value)


def id_in(entry: object, key: str) -> int | str | None:
    """An id in an entry, if there is one."""
    value = entry.get(key) if isinstance(entry, dict) else None
    return value if is_id(value) else None


def is_text(value: object) -> bool:
    """Whether a name is text that can be printed, written and be the name of a file."""
    if not isinstance(value, str) or '\0' in value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a pair of code units, which JSON can spell
        return False
    return True


def without_images(content: dict, names: set[str]) -> dict:
    """A COCO file's content without some images, and without entries that cannot be read.

    Args:
        content: Of a file whose categories are whole.
        names: ``file_name`` of the images that are left out, with all their annotations.
    """
    images = [
        image
        for image in content['images']
        if not image_fault(image) and image['file_name'] not in names
    ]
    ids = {image['id'] for image in images}
    annotations = [
        annotation
        for annotation in content['annotations']
        if not entry_fault(annotation, ANNOTATION_KEYS) and annotation['image_id'] in ids
    ]
    return {**content, 'images': images, 'annotations': annotations}
