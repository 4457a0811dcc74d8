"""Read and check COCO annotation files."""

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
    """Return whether a text can be printed, written and used as a file name."""
    # JSON can contain half of a surrogate pair, which cannot be encoded.
    return isinstance(value, str) and not re.search('[\0\ud800-\udfff]', value)


def is_id(value: object) -> bool:
    """Return whether mmdet and pycocotools can use a value as an id."""
    return (type(value) is int and abs(value) < 2**63) or is_text(value)


def is_side(value: object) -> bool:
    """Return whether a value is a width or height in pixels; decoders read up to 2**20."""
    return is_number(value) and 1 <= value <= 2**20


# The keys that entries need, each with a test of its value.
Keys = dict[str, Callable[[object], bool]]
IMAGE_KEYS: Keys = {'id': is_id, 'file_name': is_text, 'width': is_side, 'height': is_side}
CATEGORY_KEYS: Keys = {'id': is_id, 'name': is_text}
ANNOTATION_KEYS: Keys = {
    'id': is_id,
    'image_id': is_id,
    'category_id': is_id,
    'area': is_number,
    'bbox': lambda box: True,  # object_faults checks it
}


# The files of training and validation are first read for their classes, and checked later.
@lru_cache(maxsize=4)
def read_coco(path: Path) -> dict:
    """Read a COCO file, or raise DataError; it is cached until ``read_coco.cache_clear()``."""
    if not path.is_file():
        raise DataError(
            f'there is no annotation file {path} (data_root and ann_file say so). {COCO_SOURCE}; '
            'for your own data set data_root and ann_file'
        )
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    # ValueError: not UTF-8, not JSON, or a number of thousands of digits.
    except (ValueError, RecursionError) as error:
        what = 'empty' if path.stat().st_size == 0 else f'not JSON: {error}'
        raise DataError(f'{path} is {what}') from error
    if not isinstance(content, dict):
        raise DataError(f'{path} is not a COCO file: it holds a {type(content).__name__}')
    # COCO's lists of test images have no annotations.
    content.setdefault('annotations', [])
    for key in ('images', 'annotations', 'categories'):
        if not isinstance(content.get(key), list) or not (content[key] or key == 'annotations'):
            raise DataError(f'{path} is not a COCO file to train or test on: it has no {key}')
    return content


def categories_of(path: Path) -> dict[Id, str]:
    """Return the category names of a COCO file by id, in its order, or raise DataError."""
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
    """Checks the COCO file and the image folder of a dataset."""

    def __init__(self, checked: CheckedDataset, config: Config) -> None:
        dataset = checked.dataset
        if 'img' not in (dataset.get('data_prefix') or {}):
            raise DataError("it has no data_prefix=dict(img='...') with the folder of its images")
        filters = {} if dataset.get('test_mode') else dataset.get('filter_cfg') or {}
        nodes = list(walk(config.get(f'{checked.split}_evaluator')))
        metrics = [node.get('metric') or [] for node in nodes]
        files = {Path(node.ann_file) for node in nodes if node.get('ann_file')}
        has_own = annotation_file(dataset).resolve() in {file.resolve() for file in files}
        # The parts of a joined dataset can each have a metric.
        self.metric_files = set() if has_own else files
        self.checked = checked
        self.folder = data_folder(dataset, 'img')
        # Whether the file is used to compute COCO's metrics.
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
        by_name: dict[str, Id] = {}
        for image in entries:
            fault = entry_fault(image, IMAGE_KEYS)
            if fault:
                reason = f'an image {fault}: {image!r:.100}'
                self.checked.add(ERROR, 'incomplete image', reason, image='')
                continue
            name, number = image['file_name'], image['id']
            if number in self.images:
                first = self.images[number]['file_name']
                reason = f'{first} also has the image id {number}, and only the last is used'
                for each in (first, name):
                    self.checked.add(ERROR, 'duplicate image id', reason, self.path(each), each)
            if (other := by_name.setdefault(name, number)) != number:
                reason = f'it is listed as image {other} and as image {number}'
                self.warn_of_image('image listed twice', reason, name)
            self.images[number] = image
            if self.is_too_small(image):
                size = f'{image["width"]}x{image["height"]}'
                reason = f'it is {size}; left out of training (min_size={self.min_size})'
                self.warn_of_image('small image', reason, name)

    def check_metric_file(self, file: Path) -> None:
        """Check that a metric's file has the same images: it finds ground truth by id alone."""
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
                f'such as {others[0]}, and metrics would compare them; set {name} to '
                f'{self.checked.source}'
            )
            self.checked.add(ERROR, 'ground truth of other images', reason, file)

    def check_annotations(self, entries: list) -> None:
        """Check the objects, and that there are images with objects."""
        chosen = self.checked.dataset.get('metainfo', {}).get('classes') or self.categories.values()
        used = {number for number, name in self.categories.items() if name in chosen}
        with_objects, seen = Counter(), set()
        for annotation in entries:
            # These two may be valid even if another key is not.
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
                'every object is a crowd region (iscrowd=1): none is learned or measured. '
                'CVAT marks all masks so; tools/import_dataset.py imports them as objects'
            )
            self.checked.add(ERROR, 'only crowds', reason)
        if more := [number for number in with_objects.values() if number > self.max_per_img]:
            reason = (
                f'{count(len(more), "image")} with up to {max(more)}, but at most '
                f'{self.max_per_img} are detected in an image: raise model.test_cfg.max_per_img, '
                'or for two stages model.test_cfg.rcnn.max_per_img'
            )
            self.checked.add(WARNING, 'many objects', reason)
        self.check_empty_images(with_objects, list(chosen))

    def check_empty_images(self, with_objects: Counter[Id], chosen: list[str]) -> None:
        empty = [image for number, image in self.images.items() if number not in with_objects]
        left = with_objects if self.filter_empty_gt else self.images
        filters = f'(filter_empty_gt={self.filter_empty_gt}, min_size={self.min_size})'
        if not with_objects:
            reason = f'no annotation has any of the classes {chosen}'
            self.checked.add(ERROR, 'no objects', reason)
        elif all(self.is_too_small(self.images[number]) for number in left):
            reason = f'every image is left out of training {filters}'
            self.checked.add(ERROR, 'no images', reason)
        else:
            outcome = (
                f'left out of training {filters}' if self.filter_empty_gt
                else 'all detections in it count as false' if self.is_evaluated
                else 'it is trained as background'
            )  # fmt: skip
            for image in empty:
                self.warn_of_image('image without objects', outcome, image['file_name'])

    def object_faults(self, annotation: dict, image: dict) -> Iterator[tuple[str, str, str]]:
        """Yield what is wrong with one object: (severity, kind, reason)."""
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
            reason = 'to pycocotools, 0 means no object: a detection of it counts as false'
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
            reason = f'a group{shape}: it is not learned, and a detection in it does not count'
            yield WARNING, 'crowd region', reason
        if self.reads_masks and (self.is_evaluated or is_trained):
            yield from self.mask_faults(mask, image)

    def mask_faults(self, mask: object, image: dict) -> Iterator[tuple[str, str, str]]:
        """Yield what is wrong with the segmentation of an object: (severity, kind, reason)."""
        fault = mask_fault(mask, image['height'], image['width'])
        if fault:
            yield ERROR, 'malformed mask', fault
        elif isinstance(mask, list) and (parts := sum(map(is_degenerate, mask))):
            what = 'the object is ignored' if parts == len(mask) else 'this part is left out'
            reason = f'{parts} of its {len(mask)} polygons: {what} when masks are trained'
            yield WARNING, 'polygon of fewer than three points', reason

    def is_too_small(self, image: dict) -> bool:
        return min(image['width'], image['height']) < self.min_size

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def warn_of_image(self, kind: str, reason: str, name: str) -> None:
        # Without the image's name, so that --skip-bad keeps the image.
        self.checked.add(WARNING, kind, reason, self.path(name))


def entry_fault(entry: object, keys: Keys) -> str | None:
    """Return what an entry of the file lacks, or which value is invalid; None if it is valid."""
    if not isinstance(entry, dict):
        return 'is not an object with keys and values'
    lacking = [key for key in keys if key not in entry]
    if lacking:
        return f'lacks {", ".join(lacking)}'
    for key, is_valid in keys.items():
        if not is_valid(entry[key]):
            return f'has {entry[key]!r:.40} as {key}'
    return None


def id_in(entry: object, key: str) -> Id | None:
    """Return an id in an entry; None if there is no valid one."""
    value = entry.get(key) if isinstance(entry, dict) else None
    return value if is_id(value) else None


def without_images(content: dict, names: set[str | None]) -> dict:
    """Return a COCO file's content without some images, by name, and without invalid entries."""
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
