"""COCO annotation files: reading them, and what is wrong in them."""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

from mmengine.config import Config

from backbones.errors import DataError

from .config_datasets import annotation_file, data_folder, reads_masks, walk
from .findings import ERROR, WARNING, CheckedDataset, count
from .objects import box_fault, is_degenerate, is_number, mask_fault, misplaced

COCO_SOURCE = (
    'COCO is at https://cocodataset.org/#download: unpack train2017, val2017 and annotations '
    'into data/coco, or link the folder there'
)
Id = int | str


def is_text(value: object) -> bool:
    """Whether a name can be printed, written and be the name of a file."""
    # JSON can spell half of a pair of code units, which no encoding has.
    return isinstance(value, str) and not re.search('[\0\ud800-\udfff]', value)


def is_id(value: object) -> bool:
    """Whether mmdet and pycocotools can tell entries apart by it."""
    return (type(value) is int and abs(value) < 2**63) or is_text(value)


def is_side(value: object) -> bool:
    """Whether it is a width or height in pixels: decoders read up to 2**20, NaN is none."""
    return is_number(value) and 1 <= value <= 2**20


# What entries have to have, and how it is told whether that can be read.
Keys = dict[str, Callable[[object], bool]]
IMAGE_KEYS: Keys = {'id': is_id, 'file_name': is_text, 'width': is_side, 'height': is_side}
CATEGORY_KEYS: Keys = {'id': is_id, 'name': is_text}
ANNOTATION_KEYS: Keys = {
    'id': is_id,
    'image_id': is_id,
    'category_id': is_id,
    'area': is_number,
    'bbox': lambda box: True,  # object_faults says more about it
}


# Two files, of training and validation, are read for their classes first and checked then.
@lru_cache(maxsize=4)
def read_coco(path: Path) -> dict:
    """The contents of a COCO file, or DataError; kept until ``read_coco.cache_clear()``."""
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
    # COCO's own lists of test images come without annotations.
    content.setdefault('annotations', [])
    for key in ('images', 'annotations', 'categories'):
        if not isinstance(content.get(key), list) or not (content[key] or key == 'annotations'):
            raise DataError(f'{path} is not a COCO file to train or test on: it has no {key}')
    return content


def categories_of(path: Path) -> dict[Id, str]:
    """The names of a COCO file's categories by their ids, in its order, or DataError."""
    names: dict[Id, str] = {}
    for category in read_coco(path)['categories']:
        if fault := entry_fault(category, CATEGORY_KEYS):
            raise DataError(f'{path}: a category {fault}: {category!r:.80}')
        number, name = category['id'], category['name']
        if number in names:
            raise DataError(f'{path}: {names[number]!r} and {name!r} both have the id {number!r}')
        if name in names.values():
            raise DataError(f'{path}: more than one category is called {name!r}')
        names[number] = name
    return names


class CocoCheck:
    """Notes what is wrong in the COCO file and the image folder of a dataset."""

    def __init__(self, checked: CheckedDataset, config: Config) -> None:
        dataset = checked.dataset
        if 'img' not in (dataset.get('data_prefix') or {}):
            raise DataError("it has no data_prefix=dict(img='...'), the folder of its images")
        filters = {} if dataset.get('test_mode') else dataset.get('filter_cfg') or {}
        nodes = list(walk(config.get(f'{checked.split}_evaluator')))
        metrics = [node.get('metric') or [] for node in nodes]
        files = {Path(node.ann_file) for node in nodes if node.get('ann_file')}
        has_own = annotation_file(dataset).resolve() in {file.resolve() for file in files}
        # Parts of a joined dataset can have a metric each.
        self.metric_files = set() if has_own else files
        self.checked = checked
        self.folder = data_folder(dataset, 'img')
        # Whether COCO's metrics are computed with the file.
        self.is_evaluated = checked.split != 'train'
        # Whether predictions are written without being compared.
        self.is_formatted = any(node.get('format_only') for node in nodes)
        # Whether the pipeline or the metric reads segmentations.
        self.reads_masks = reads_masks(dataset) or (
            self.is_evaluated and any('segm' in metric for metric in metrics)
        )
        # mmdet leaves out images without objects, and smaller ones.
        self.filter_empty_gt = filters.get('filter_empty_gt', False)
        self.min_size = filters.get('min_size', 0)
        nodes = walk(config.get('model', {}).get('test_cfg'))
        limits = [node.max_per_img for node in nodes if (node.get('max_per_img') or 0) > 0]
        self.max_per_img = min(limits, default=math.inf)
        self.images: dict[Id, dict] = {}
        self.categories = categories_of(annotation_file(dataset))

    def run(self) -> None:
        content = read_coco(annotation_file(self.checked.dataset))
        self.check_images(content['images'])
        if content['annotations'] or not self.is_formatted:
            self.check_annotations(content['annotations'])
        for file in self.metric_files:
            self.check_metric_file(file)
        if not self.folder.is_dir():
            reason = (
                f'there is no image folder {self.folder} (data_root and data_prefix say so). '
                f'{COCO_SOURCE}'
            )
            self.checked.add(ERROR, 'missing folder', reason, self.folder)
            return
        images = self.images.values()
        sizes = {image['file_name']: (image['width'], image['height']) for image in images}
        self.checked.add_samples(self.folder, sizes)

    def check_images(self, entries: list) -> None:
        by_name: dict[str, dict] = {}
        for image in entries:
            fault = entry_fault(image, IMAGE_KEYS)
            if fault:
                reason = f'an image {fault}: {image!r:.100}'
                self.checked.add(ERROR, 'incomplete image', reason, image='')
                continue
            name, number = image['file_name'], image['id']
            if number in self.images:
                first = self.images[number]['file_name']
                reason = f'{first} has the image id {number} too, and only the last is used'
                for each in (first, name):
                    self.checked.add(ERROR, 'duplicate image id', reason, self.path(each), each)
            first = by_name.setdefault(name.lower(), image)
            if first['file_name'] != name:
                reason = (
                    f'its name differs from {first["file_name"]} in case only: one of both is lost '
                    'where case does not count, as on macOS and Windows'
                )
                self.warn_of_image('names that differ in case', reason, name)
            elif first is not image:
                reason = f'it is listed as image {first["id"]} and as image {number}'
                self.warn_of_image('image listed twice', reason, name)
            self.images[number] = image
            side = min(image['width'], image['height'])
            if side < max(self.min_size, 2):
                left_out = f'left out of training (min_size={self.min_size})'
                outcome = left_out if self.is_too_small(image) else 'it is scaled like any other'
                reason = f'it is {image["width"]}x{image["height"]}; {outcome}'
                self.warn_of_image('small image', reason, name)

    def check_metric_file(self, file: Path) -> None:
        """Metrics find the ground truth of an image by its id alone."""
        found = {id_in(image, 'id'): image for image in read_coco(file)['images']}
        others = [
            image['file_name']
            for number, image in self.images.items()
            if number not in found or found[number].get('file_name') != image['file_name']
        ]
        if others:
            name = f'{self.checked.split}_evaluator.ann_file'
            reason = (
                f'{name} has other images with the ids of {len(others)} images of this dataset, '
                f'{others[0]} for one: metrics would compare them; set {name} to '
                f'{self.checked.source}'
            )
            self.checked.add(ERROR, 'ground truth of other images', reason, file)

    def check_annotations(self, entries: list) -> None:
        """Check objects, and which images have any."""
        chosen = self.checked.dataset.get('metainfo', {}).get('classes') or self.categories.values()
        used = {number for number, name in self.categories.items() if name in chosen}
        with_objects, seen = Counter(), set()
        for annotation in entries:
            # What is wrong may be another entry than these two.
            number = id_in(annotation, 'id')
            image = self.images.get(id_in(annotation, 'image_id'))
            name = image['file_name'] if image else ''
            where = (self.path(name) if image else None, name, number)
            fault = entry_fault(annotation, ANNOTATION_KEYS)
            if fault:
                reason = f'an annotation {fault}: {annotation!r:.100}'
                self.checked.add(ERROR, 'incomplete annotation', reason, *where)
                continue
            if number in seen:
                reason = f'more than one annotation of {self.checked.source} has this id'
                self.checked.add(ERROR, 'duplicate annotation id', reason, *where)
            seen.add(number)
            category = annotation['category_id']
            if image is None:
                reason = f'it belongs to image_id {annotation["image_id"]}, which is not listed'
                self.checked.add(ERROR, 'annotation of no image', reason, *where)
            elif category not in self.categories:
                reason = f'its category_id {category} is not among {list(self.categories)}'
                self.checked.add(ERROR, 'annotation of no category', reason, *where)
            else:
                if category in used:
                    with_objects[annotation['image_id']] += annotation.get('iscrowd') != 1
                for fault in self.object_faults(annotation, image):
                    self.checked.add(*fault, *where)
        if with_objects and not any(with_objects.values()):
            reason = (
                'every object is a crowd region (iscrowd=1), none of which is learned or measured. '
                'CVAT marks all masks as such; tools/import_dataset.py takes them as objects'
            )
            self.checked.add(ERROR, 'only crowds', reason)
        if more := [number for number in with_objects.values() if number > self.max_per_img]:
            reason = (
                f'{count(len(more), "image")} with up to {max(more)}, of which {self.max_per_img} '
                'are detected in an image: model.test_cfg.max_per_img, or in two stages '
                'model.test_cfg.rcnn.max_per_img, sets how many'
            )
            self.checked.add(WARNING, 'many objects', reason)
        self.check_empty_images(with_objects, list(chosen))

    def check_empty_images(self, with_objects: Counter[Id], chosen: list[str]) -> None:
        empty = [image for number, image in self.images.items() if number not in with_objects]
        left = with_objects if self.filter_empty_gt else self.images
        filters = f'(filter_empty_gt={self.filter_empty_gt}, min_size={self.min_size})'
        if not with_objects:
            reason = f'no annotation is of any of the classes {chosen}'
            self.checked.add(ERROR, 'no objects', reason)
        elif all(self.is_too_small(self.images[number]) for number in left):
            reason = f'every image is left out of training {filters}'
            self.checked.add(ERROR, 'no images', reason)
        else:
            outcome = (
                f'left out of training {filters}' if self.filter_empty_gt
                else 'whatever is detected in it counts as false' if self.is_evaluated
                else 'all of it is trained as background'
            )  # fmt: skip
            for image in empty:
                self.warn_of_image('image without objects', outcome, image['file_name'])

    def object_faults(self, annotation: dict, image: dict) -> Iterator[tuple[str, str, str]]:
        """What is wrong with one object: (severity, kind, reason)."""
        box, area = annotation['bbox'], annotation['area']
        is_crowd = annotation.get('iscrowd', 0)
        if fault := box_fault(box):
            yield ERROR, 'malformed box', fault
            return
        if is_crowd not in (0, 1):
            yield ERROR, 'malformed iscrowd', f'iscrowd is {is_crowd!r:.40}, not 0 or 1'
            return
        if self.is_evaluated and 'iscrowd' not in annotation:
            reason = 'it lacks "iscrowd", without which COCO cannot evaluate'
            yield ERROR, 'incomplete annotation', reason
        if self.is_evaluated and annotation['id'] == 0:
            reason = 'to pycocotools 0 is no object: what is detected there counts as false'
            yield WARNING, 'annotation id 0', f'{reason}. Count from 1'
        misplacement = misplaced(box, (image['width'], image['height']))
        if area <= 0 and not (misplacement and misplacement[0] == 'box without area'):
            misplacement = 'box without area', f'its area is {area}'
        is_trained = misplacement is None or misplacement[0] == 'box beyond the border'
        if misplacement:
            kind, reason = misplacement
            outcome = '' if is_trained else ': mmdet leaves the object out of training'
            yield WARNING, kind, f'{reason}{outcome}'
        mask = annotation.get('segmentation')
        if is_crowd:
            shape = ', given as a polygon' if isinstance(mask, list) else ''
            reason = f'a group{shape}: it is not learned, and what is detected in it does not count'
            yield WARNING, 'crowd region', reason
        if (self.is_evaluated or is_trained) and (mask or self.reads_masks):
            yield from self.mask_faults(mask, image)

    def mask_faults(self, mask: object, image: dict) -> Iterator[tuple[str, str, str]]:
        """What is wrong with the segmentation of an object: (severity, kind, reason)."""
        fault = mask_fault(mask, image['height'], image['width'])
        if fault and self.reads_masks:
            yield ERROR, 'malformed mask', fault
        elif fault:
            yield WARNING, 'malformed mask', f'{fault}; this config reads no masks'
        elif isinstance(mask, list) and (parts := sum(map(is_degenerate, mask))):
            what = 'the object is ignored' if parts == len(mask) else 'this part is left out'
            reason = f'{parts} of its {len(mask)} polygons: {what} where masks are trained'
            yield WARNING, 'polygon of fewer than three points', reason

    def is_too_small(self, image: dict) -> bool:
        return min(image['width'], image['height']) < self.min_size

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def warn_of_image(self, kind: str, reason: str, name: str) -> None:
        # Without the image's name: a run need not do without it.
        self.checked.add(WARNING, kind, reason, self.path(name))


def entry_fault(entry: object, keys: Keys) -> str | None:
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
