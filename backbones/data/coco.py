"""COCO annotation files: reading them, and what is wrong in them."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from mmengine.config import Config

from backbones.errors import DataError

from .config_datasets import annotation_file, data_folder, reads_masks, walk
from .findings import ERROR, WARNING, CheckedDataset
from .objects import box_fault, is_degenerate, is_number, mask_fault, misplaced

COCO_SOURCE = (
    'COCO is at https://cocodataset.org/#download: unpack train2017, val2017 and annotations '
    'into data/coco, or link the folder there'
)
Id = int | str


def is_text(value: object) -> bool:
    """Whether a name is text that can be printed, written and be the name of a file."""
    if not isinstance(value, str) or '\0' in value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a pair of code units, which JSON can spell
        return False
    return True


def is_id(value: object) -> bool:
    """Whether mmdet and pycocotools can tell entries apart by it."""
    return (type(value) is int and abs(value) < 2**63) or is_text(value)


def is_side(value: object) -> bool:
    """Whether it is a width or height in pixels: decoders read up to 2**20, NaN is none."""
    return is_number(value) and 1 <= value <= 2**20


# What entries have to have, and how it is told whether that can be read.
IMAGE_KEYS = {'id': is_id, 'file_name': is_text, 'width': is_side, 'height': is_side}
CATEGORY_KEYS = {'id': is_id, 'name': is_text}
ANNOTATION_KEYS = {
    'id': is_id,
    'image_id': is_id,
    'category_id': is_id,
    'area': is_number,
    'bbox': lambda box: True,  # check_object says more about it
}


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
        reads_masks: Whether the pipeline or the metric reads segmentations.
        evaluated: Whether COCO's metrics are computed with the file.
        filter_empty_gt: Whether mmdet leaves out images without objects.
        min_size: Of an image, in pixels; mmdet leaves out smaller ones.
    """

    reads_masks: bool
    evaluated: bool
    filter_empty_gt: bool
    min_size: int


def rules_of(checked: CheckedDataset, config: Config) -> CocoRules:
    dataset, evaluated = checked.dataset, checked.split != 'train'
    filters = {} if dataset.get('test_mode') else dataset.get('filter_cfg') or {}
    metrics = [n.get('metric') or [] for n in walk(config.get(f'{checked.split}_evaluator'))]
    return CocoRules(
        reads_masks(dataset) or (evaluated and any('segm' in metric for metric in metrics)),
        evaluated,
        filters.get('filter_empty_gt', False),
        filters.get('min_size', 0),
    )


def check_coco(checked: CheckedDataset, config: Config) -> None:
    """Check a COCO file against itself and the folder of its images.

    Raises:
        DataError: The file cannot be read, or the config names no folder of images.
    """
    if 'img' not in (checked.dataset.get('data_prefix') or {}):
        raise DataError("it has no data_prefix=dict(img='...'), the folder of its images")
    content = read_coco(annotation_file(checked.dataset))
    folder, rules = data_folder(checked.dataset, 'img'), rules_of(checked, config)
    categories = check_categories(checked, content['categories'])
    images = check_images(checked, content['images'], folder, rules)
    check_annotations(checked, content['annotations'], images, categories, folder, rules)
    if not folder.is_dir():
        reason = (
            f'there is no image folder {folder} (data_root and data_prefix say so). {COCO_SOURCE}'
        )
        checked.add(ERROR, 'missing folder', reason, folder)
        return
    sizes = {image['file_name']: (image['width'], image['height']) for image in images.values()}
    checked.add_samples(folder, sizes)


def check_categories(checked: CheckedDataset, entries: list) -> dict[Id, str]:
    """The names of the categories by their id."""
    names: dict[Id, str] = {}
    for category in entries:
        fault = entry_fault(category, CATEGORY_KEYS)
        if fault:
            reason = f'a category {fault}: {category!r:.80}'
            checked.add(ERROR, 'incomplete category', reason)
            continue
        number, name = category['id'], category['name']
        if number in names:
            reason = f'{names[number]!r} and {name!r} both have this id, and only the last is used'
            checked.add(ERROR, 'duplicate category id', reason, annotation=number)
        names[number] = name
    ids = [number for number in names if is_number(number)]
    if ids != sorted(ids):
        reason = (
            f'the category ids come in the order {ids[:10]}; classes are numbered by the order in '
            'the file, so that it has to be the same in all files of the config'
        )
        checked.add(WARNING, 'categories out of order', reason)
    return names


def check_images(
    checked: CheckedDataset, entries: list, folder: Path, rules: CocoRules
) -> dict[Id, dict]:
    """The entries of images that can be used, by their id."""
    images: dict[Id, dict] = {}
    by_name: dict[str, Id] = {}
    by_lower_case: dict[str, str] = {}
    for image in entries:
        fault = entry_fault(image, IMAGE_KEYS)
        if fault:
            checked.add(ERROR, 'incomplete image', f'an image {fault}: {image!r:.100}')
            continue
        name, number = image['file_name'], image['id']
        file = os.path.join(folder, name)
        if number in images:
            first = images[number]['file_name']
            reason = f'{first} has the image id {number} too, and only the last is used'
            for each in (first, name):
                checked.add(ERROR, 'duplicate image id', reason, file, each)
        same = by_lower_case.setdefault(name.lower(), name)
        if name in by_name:
            reason = f'it is listed as image {by_name[name]} and as image {number}'
            checked.add(WARNING, 'image listed twice', reason, file)
        elif same != name:
            reason = (
                f'its name differs from {same} in case only: one of both is lost where case does '
                'not count, as on macOS and Windows'
            )
            checked.add(WARNING, 'names that differ in case', reason, file)
        by_name[name] = number
        side = min(image['width'], image['height'])
        if side < max(rules.min_size, 2):
            left_out = f'left out of training (min_size={rules.min_size})'
            outcome = left_out if side < rules.min_size else 'it is scaled like any other'
            reason = f'it is {image["width"]}x{image["height"]}; {outcome}'
            checked.add(WARNING, 'small image', reason, file)
        images[number] = image
    return images


def check_annotations(
    checked: CheckedDataset,
    entries: list,
    images: dict[Id, dict],
    categories: dict[Id, str],
    folder: Path,
    rules: CocoRules,
) -> None:
    """Check objects, and which images have any."""
    chosen = checked.dataset.get('metainfo', {}).get('classes') or categories.values()
    used = {number for number, name in categories.items() if name in chosen}
    with_objects, seen = set(), set()
    for annotation in entries:
        fault = entry_fault(annotation, ANNOTATION_KEYS)
        # What is wrong may be another entry than these two.
        number = id_in(annotation, 'id')
        image = images.get(id_in(annotation, 'image_id'))
        name = image['file_name'] if image else None
        where = (os.path.join(folder, name) if image else None, name, number)
        if fault:
            reason = f'an annotation {fault}: {annotation!r:.100}'
            checked.add(ERROR, 'incomplete annotation', reason, *where)
            continue
        if number in seen:
            reason = f'more than one annotation of {checked.source} has this id'
            checked.add(ERROR, 'duplicate annotation id', reason, *where)
        seen.add(number)
        category = annotation['category_id']
        if image is None:
            reason = f'it belongs to image_id {annotation["image_id"]}, which is not listed'
            checked.add(ERROR, 'annotation of no image', reason, *where)
        elif category not in categories:
            reason = f'its category_id {category} is not among {list(categories)}'
            checked.add(ERROR, 'annotation of no category', reason, *where)
        else:
            if category in used:
                with_objects.add(annotation['image_id'])
            for fault in check_object(annotation, image, rules):
                checked.add(*fault, *where)
    empty = [image for number, image in images.items() if number not in with_objects]
    if not with_objects:
        reason = f'no annotation is of any of the classes {list(chosen)}'
        checked.add(ERROR, 'no objects', reason)
    elif all(
        min(image['width'], image['height']) < rules.min_size
        or (rules.filter_empty_gt and number not in with_objects)
        for number, image in images.items()
    ):
        reason = f'every image is left out of training (filter_empty_gt, min_size={rules.min_size})'
        checked.add(ERROR, 'no images', reason)
    elif empty:
        outcome = (
            'left out of training (filter_empty_gt=True)' if rules.filter_empty_gt
            else 'whatever is detected in it counts as false' if rules.evaluated
            else 'all of it is trained as background'
        )  # fmt: skip
        for image in empty:
            file = folder / image['file_name']
            checked.add(WARNING, 'image without objects', outcome, file)


def check_object(annotation: dict, image: dict, rules: CocoRules) -> Iterator[tuple[str, str, str]]:
    """What is wrong with one object: (severity, kind, reason)."""
    box, area = annotation['bbox'], annotation['area']
    is_crowd = annotation.get('iscrowd', 0)
    fault = box_fault(box)
    if fault:
        yield ERROR, 'malformed box', fault
        return
    if is_crowd not in (0, 1):
        yield ERROR, 'malformed iscrowd', f'iscrowd is {is_crowd!r:.40}, not 0 or 1'
        return
    if rules.evaluated and 'iscrowd' not in annotation:
        reason = 'it lacks "iscrowd", without which COCO cannot evaluate'
        yield ERROR, 'incomplete annotation', reason
    if rules.evaluated and annotation['id'] == 0:
        reason = (
            'to pycocotools 0 is no object: what is detected there counts as false. Count from 1'
        )
        yield WARNING, 'annotation id 0', reason
    misplacement = misplaced(box, (image['width'], image['height']))
    if area <= 0 and not (misplacement and misplacement[0] == 'box without area'):
        misplacement = 'box without area', f'its area is {area}'
    trained = True
    if misplacement:
        kind, reason = misplacement
        trained = kind == 'box beyond the border'
        outcome = '' if trained else ': mmdet leaves the object out of training'
        yield WARNING, kind, f'{reason}{outcome}'
    mask = annotation.get('segmentation')
    if is_crowd:
        shape = ', given as a polygon' if isinstance(mask, list) else ''
        reason = f'a group{shape}: it is not learned, and what is detected in it does not count'
        yield WARNING, 'crowd region', reason
    if rules.evaluated or trained:
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


def entry_fault(entry: object, keys: dict[str, Callable[[object], bool]]) -> str | None:
    """What an entry of the file lacks, or has as something that cannot be read; None if nothing."""
    if not isinstance(entry, dict):
        return 'is no object with keys and values'
    lacking = [key for key in keys if key not in entry]
    if lacking:
        return f'lacks {", ".join(lacking)}'
    for key, is_valid in keys.items():
        if not is_valid(entry[key]):
            return f'has {entry[key]!r:.40} as {key}'
    return None


def id_in(entry: object, key: str) -> Id | None:
    """An id in an entry, if there is one."""
    value = entry.get(key) if isinstance(entry, dict) else None
    return value if is_id(value) else None


def without_images(content: dict, names: set[str | None]) -> dict:
    """A COCO file's content without the images of some names and what cannot be read."""
    images = [
        image
        for image in content['images']
        if not entry_fault(image, IMAGE_KEYS) and image['file_name'] not in names
    ]
    ids = {image['id'] for image in images}
    annotations = [
        annotation
        for annotation in content['annotations']
        if not entry_fault(annotation, ANNOTATION_KEYS) and annotation['image_id'] in ids
    ]
    return {**content, 'images': images, 'annotations': annotations}
