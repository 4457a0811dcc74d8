"""A COCO annotation file against itself and the folder of its pictures."""

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .coco_file import COCO_SOURCE, is_text
from .findings import ERROR, WARNING, Finding
from .masks import box_fault, is_degenerate, is_number, mask_fault

IMAGE_KEYS = ('id', 'file_name', 'width', 'height')
CATEGORY_KEYS = ('id', 'name')
ANNOTATION_KEYS = ('id', 'image_id', 'category_id', 'bbox', 'area')
ID_KEYS = ('id', 'image_id', 'category_id')
TEXT_KEYS = ('file_name', 'name')

# In pixels; no decoder reads more (OpenCV's CV_IO_MAX_IMAGE_WIDTH).
LARGEST_SIDE = 2**20


@dataclass(frozen=True)
class CocoRules:
    """What decides how an annotation is treated.

    Attributes:
        classes: Names of the categories that are used.
        reads_masks: Whether the pipeline or the metric reads segmentations.
        evaluated: Whether COCO's metrics are computed with the file.
        leaves_out_empty: mmdet's ``filter_empty_gt``.
        min_size: mmdet's ``min_size`` of a picture, in pixels.
    """

    classes: tuple[str, ...]
    reads_masks: bool
    evaluated: bool
    leaves_out_empty: bool
    min_size: int


# A finding, and a picture that is there to be read: one of both is None.
Step = tuple[Finding | None, dict | None]


def check_coco_file(path: Path, content: dict, folder: Path, rules: CocoRules) -> Iterator[Step]:
    """Check a COCO file, and tell its pictures.

    Args:
        path: The file.
        content: What is in it.
        folder: Where the pictures are.
        rules: How annotations are treated.

    Yields:
        (finding, None) for everything found, (None, image) for every picture that exists.
    """
    for found in check_categories_of(path, content['categories']):
        yield found, None
    images: dict[object, dict] = {}
    for found, image in check_images(path, content['images'], folder, rules):
        if found is not None:
            yield found, None
        if image is not None:
            images[image['id']] = image
    for found in check_annotations(path, content, images, folder, rules):
        yield found, None
    if not folder.is_dir():
        reason = (
            f'there is no picture folder {folder} (data_root and data_prefix say so). {COCO_SOURCE}'
        )
        yield Finding(ERROR, 'missing folder', str(folder), reason), None
        return
    missing = dict(missing_pictures(folder, images.values()))
    for name, hint in missing.items():
        reason = f'{path} lists it, but it is not there{hint}'
        yield Finding(ERROR, 'missing picture', str(folder / name), reason, picture=name), None
    for image in images.values():
        if image['file_name'] not in missing:
            yield None, image


def check_categories_of(path: Path, categories: list) -> Iterator[Finding]:
    known: dict[object, object] = {}
    for category in categories:
        fault = entry_fault(category, CATEGORY_KEYS)
        if fault:
            reason = f'a category {fault}: {category!r:.80}'
            yield Finding(ERROR, 'incomplete category', str(path), reason)
        elif category['id'] in known:
            reason = (
                f'{known[category["id"]]!r} and {category["name"]!r} both have this id, and only '
                'the last is kept'
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


def check_images(path: Path, images: list, folder: Path, rules: CocoRules) -> Iterator[Step]:
    by_id: dict[object, str] = {}
    by_name: dict[str, object] = {}
    by_lower_case: dict[str, str] = {}
    for image in images:
        fault = image_fault(image)
        if fault:
            reason = f'an image {fault}: {image!r:.100}'
            yield Finding(ERROR, 'incomplete image', str(path), reason), None
            continue
        name, number = image['file_name'], image['id']
        file = str(folder / name)
        if number in by_id:
            reason = f'{by_id[number]} has the image id {number} too, and only the last is kept'
            for each in (by_id[number], name):
                yield Finding(ERROR, 'duplicate image id', file, reason, picture=each), None
        if name in by_name:
            reason = f'it is listed as image {by_name[name]} and as image {number}'
            yield Finding(WARNING, 'picture listed twice', file, reason), None
        elif name.lower() in by_lower_case:
            reason = (
                f'its name differs from {by_lower_case[name.lower()]} in case only: one of both is '
                'lost where case does not count, as on macOS and Windows'
            )
            yield Finding(WARNING, 'names that differ in case', file, reason), None
        by_id[number] = name
        by_name[name] = number
        by_lower_case.setdefault(name.lower(), name)
        side = min(image['width'], image['height'])
        if side < max(rules.min_size, 2):
            reason = f'it is {image["width"]}x{image["height"]}; ' + (
                f'left out of training (min_size={rules.min_size})'
                if side < rules.min_size
                else 'it is scaled like any other'
            )
            yield Finding(WARNING, 'small picture', file, reason), None
        yield None, image


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
        file = str(folder / name) if name else str(path)
        at_picture = {'annotation': number, 'picture': name}
        if fault:
            reason = f'an annotation {fault}: {annotation!r:.100}'
            yield Finding(ERROR, 'incomplete annotation', file, reason, **at_picture)
            continue
        if number in seen:
            reason = f'more than one annotation of {path} has this id'
            yield Finding(ERROR, 'duplicate annotation id', file, reason, **at_picture)
        seen.add(number)
        if image is None:
            reason = f'it belongs to image_id {annotation["image_id"]}, which is not listed'
            yield Finding(ERROR, 'annotation of no picture', file, reason, number)
            continue
        if annotation['category_id'] not in categories:
            reason = f'its category_id {annotation["category_id"]} is not among {list(categories)}'
            yield Finding(ERROR, 'annotation of no category', file, reason, **at_picture)
            continue
        if annotation['category_id'] in used:
            with_objects.add(annotation['image_id'])
        for severity, kind, reason in check_object(annotation, image, rules):
            yield Finding(severity, kind, file, reason, **at_picture)
    if not with_objects:
        reason = f'no annotation is of any of the classes {list(rules.classes)}'
        yield Finding(ERROR, 'no objects', str(path), reason)
        return
    if all(is_left_out(image, number in with_objects, rules) for number, image in images.items()):
        reason = (
            f'every picture is left out of training (filter_empty_gt, min_size={rules.min_size})'
        )
        yield Finding(ERROR, 'no pictures', str(path), reason)
        return
    for number, image in images.items():
        if number not in with_objects:
            file = str(folder / image['file_name'])
            yield Finding(WARNING, 'picture without objects', file, what_comes_of_empty(rules))


def is_left_out(image: dict, has_objects: bool, rules: CocoRules) -> bool:
    """Whether mmdet leaves a picture out of training."""
    too_small = min(image['width'], image['height']) < rules.min_size
    return too_small or (rules.leaves_out_empty and not has_objects)


def what_comes_of_empty(rules: CocoRules) -> str:
    if rules.leaves_out_empty:
        return 'left out of training (filter_empty_gt=True)'
    if rules.evaluated:
        return 'whatever is detected in it counts as false'
    return 'all of it is trained as background'


def check_object(annotation: dict, image: dict, rules: CocoRules) -> Iterator[tuple[str, str, str]]:
    """What is wrong with one object: (severity, kind, reason)."""
    box = annotation['bbox']
    fault = box_fault(box)
    if fault:
        yield ERROR, 'malformed box', fault
        return
    if not is_number(annotation['area']):
        yield ERROR, 'malformed area', f'its area is {annotation["area"]!r:.40}'
        return
    if 'iscrowd' in annotation and annotation['iscrowd'] not in (0, 1):
        yield ERROR, 'malformed iscrowd', f'iscrowd is {annotation["iscrowd"]!r:.40}, not 0 or 1'
        return
    if rules.evaluated and 'iscrowd' not in annotation:
        yield (
            ERROR,
            'incomplete annotation',
            'it lacks "iscrowd", without which COCO cannot evaluate',
        )
    if rules.evaluated and annotation['id'] == 0:
        reason = (
            'to pycocotools 0 is no object: what is detected there counts as false. Count from 1'
        )
        yield WARNING, 'annotation id 0', reason
    x, y, width, height = box
    left_out = None
    if width < 1 or height < 1 or annotation['area'] <= 0:
        left_out = 'box without area', f'the box {box}, area {annotation["area"]}'
    elif not (-width < x < image['width'] and -height < y < image['height']):
        left_out = (
            'box outside the picture',
            (f'the box {box} is outside of {image["width"]}x{image["height"]}'),
        )
    if left_out:
        kind, reason = left_out
        yield WARNING, kind, f'{reason}: mmdet leaves the object out of training'
    elif min(x, y) < -1 or x + width > image['width'] + 1 or y + height > image['height'] + 1:
        reason = f'the box {box} reaches out of {image["width"]}x{image["height"]}: cut by Resize'
        yield WARNING, 'box beyond the border', reason
    if annotation.get('iscrowd'):
        shape = ', given as a polygon' if isinstance(annotation.get('segmentation'), list) else ''
        reason = f'a group{shape}: it is not learned, and what is detected in it does not count'
        yield WARNING, 'crowd region', reason
    if rules.evaluated or not left_out:
        yield from check_mask(annotation.get('segmentation'), image, rules)


def check_mask(mask: object, image: dict, rules: CocoRules) -> Iterator[tuple[str, str, str]]:
    """What is wrong with the segmentation of an object: (severity, kind, reason)."""
    fault = mask_fault(mask, image['height'], image['width'])
    if fault and rules.reads_masks:
        yield ERROR, 'malformed mask', fault
    elif fault and mask:
        yield WARNING, 'malformed mask', f'{fault}; this config reads no masks'
    elif isinstance(mask, list):
        parts = sum(map(is_degenerate, mask))
        if parts:
            what = 'the object is ignored' if parts == len(mask) else 'this part is left out'
            reason = f'{parts} of its {len(mask)} polygons'
            yield (
                WARNING,
                'polygon of fewer than three points',
                f'{reason} (or with half a point): {what} where masks are trained',
            )


def missing_pictures(folder: Path, images: object) -> Iterator[tuple[str, str]]:
    """Pictures that are not in their folder, and a hint where one differs in case."""
    names: dict[str, list[str]] = defaultdict(list)
    for image in images:
        names[os.path.dirname(image['file_name'])].append(image['file_name'])
    for parent, inside in names.items():
        place = folder / parent
        present = set(os.listdir(place)) if place.is_dir() else set()
        lower_case = {name.lower(): name for name in present}
        for name in inside:
            base = os.path.basename(name)
            if base not in present:
                other = lower_case.get(base.lower())
                yield name, f'; there is {other}, which differs in case' if other else ''


def entry_fault(entry: object, keys: tuple[str, ...]) -> str | None:
    """What an entry of the file lacks, or has as something else; None if nothing."""
    if not isinstance(entry, dict):
        return 'is no object with keys and values'
    lacking = [key for key in keys if key not in entry]
    if lacking:
        return f'lacks {", ".join(lacking)}'
    for key in keys:
        if key in ID_KEYS and not is_id(entry[key]):
            return f'has {entry[key]!r:.40} as {key} instead of a number or text'
        if key in TEXT_KEYS and not is_text(entry[key]):
            return f'has {entry[key]!r:.40} as {key} instead of text'
    return None


def image_fault(image: object) -> str | None:
    """What is wrong with an entry of a picture; None if nothing."""
    fault = entry_fault(image, IMAGE_KEYS)
    if fault is None and not has_size(image):
        return f'has no size: width {image["width"]!r:.40}, height {image["height"]!r:.40}'
    return fault


def is_id(value: object) -> bool:
    """Whether mmdet and pycocotools can tell entries apart by it."""
    return (type(value) is int and abs(value) < 2**63) or is_text(value)


def id_in(entry: object, key: str) -> int | str | None:
    """An id in an entry, if there is one."""
    value = entry.get(key) if isinstance(entry, dict) else None
    return value if is_id(value) else None


def has_size(image: dict) -> bool:
    sides = (image['width'], image['height'])
    # False for NaN too.
    return all(is_number(side) and 1 <= side <= LARGEST_SIDE for side in sides)


def without_pictures(content: dict, names: set[str]) -> dict:
    """A COCO file's content without some pictures, and without entries that cannot be read.

    Args:
        content: Of a file whose categories are whole.
        names: ``file_name`` of the pictures that are left out, with all their annotations.
    """
    images = [
        image
        for image in content['images']
        if not image_fault(image) and image['file_name'] not in names
    ]
    kept = {image['id'] for image in images}
    annotations = [
        annotation
        for annotation in content['annotations']
        if not entry_fault(annotation, ANNOTATION_KEYS) and annotation['image_id'] in kept
    ]
    return {**content, 'images': images, 'annotations': annotations}
