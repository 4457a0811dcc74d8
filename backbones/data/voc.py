"""Check annotations in PASCAL VOC's layout: a list of names, and an XML file for each."""

import math
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from mmengine.config import ConfigDict

from backbones.errors import DataError

from .config_datasets import annotation_file, data_folder, option
from .findings import ERROR, WARNING, CheckedDataset
from .objects import misplaced

LAYOUT = (
    'mmdet reads data_root/ann_file, a text file with one name per line, and for each '
    'JPEGImages/NAME.jpg and Annotations/NAME.xml in the folder of data_root that '
    "data_prefix=dict(sub_data_root='...') names"
)


def xml_files(dataset: ConfigDict) -> dict[str, Path]:
    """Return the XML file of every name in a dataset's list, or raise DataError if it is empty."""
    path = annotation_file(dataset)
    if not path.is_file():
        raise DataError(f'there is no list {path} (data_root and ann_file say so). {LAYOUT}')
    try:
        names = [line for line in path.read_text(encoding='utf-8').splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f'{path} is not text in UTF-8: {error}') from error
    if not names:
        raise DataError(f'{path} has no names in it; it needs one per line')
    folder = data_folder(dataset, 'sub_data_root') / option(dataset, 'ann_subdir')
    return {name: folder / f'{name}.xml' for name in names}


def object_names(dataset: ConfigDict) -> set[str]:
    """Return the names of objects in the readable XML files."""
    names = set()
    for path in xml_files(dataset).values():
        try:
            names.update(item.findtext('name') for item in parse_xml(path).findall('object'))
        except DataError:
            continue
    return names - {None}


def check_voc(checked: CheckedDataset, classes: tuple[str, ...]) -> None:
    """Check the XML files of a dataset against themselves, their images and the classes."""
    dataset = checked.dataset
    folder = data_folder(dataset, 'sub_data_root') / option(dataset, 'img_subdir')
    files = xml_files(dataset)
    for place in (folder, next(iter(files.values())).parent):
        if not place.is_dir():
            raise DataError(f'there is no folder {place}. {LAYOUT}')
    filters = {} if dataset.get('test_mode') else dataset.get('filter_cfg') or {}
    outcome = 'left out of training' if filters.get('filter_empty_gt') else 'all is background'
    sizes: dict[str, tuple[int, int] | None] = dict.fromkeys(files)
    labels: Counter = Counter()
    for name, path in files.items():
        try:
            root = parse_xml(path)
            sizes[name] = size_of(root)
            objects = [read_object(item)[:2] for item in root.findall('object')]
        except DataError as error:
            kind = 'incomplete annotation' if path.is_file() else 'missing annotation'
            checked.add(ERROR, kind, str(error), path, name)
            continue
        labels.update(label for label, _ in objects)
        boxes = [one for one in objects if one[0] in classes]
        for label, corners in boxes:
            # mmdet reads whole pixels; PASCAL VOC counts them from 1.
            x1, y1, x2, y2 = map(int, corners)
            if fault := misplaced([x1 - 1, y1 - 1, x2 - x1, y2 - y1], sizes[name]):
                severity = WARNING if fault[0] == 'box beyond the border' else ERROR
                checked.add(severity, fault[0], f'{label!r}: {fault[1]}', path, name)
        if not boxes:
            checked.add(WARNING, 'image without objects', outcome, path)
    for label, number in labels.most_common():
        if label not in classes:
            reason = f'{number} objects called {label!r} are left out: it is not one of the classes'
            checked.add(WARNING, 'objects of other classes', reason)
    if not any(label in classes for label in labels):
        checked.add(ERROR, 'no objects', f'no object has any of the classes {list(classes)}')
    checked.add_samples(folder, sizes, '.jpg')


def parse_xml(path: Path) -> ElementTree.Element:
    """Return the root of an XML file, or raise DataError."""
    try:
        return ElementTree.parse(path).getroot()
    except FileNotFoundError as error:
        raise DataError('it is not there') from error
    except (ElementTree.ParseError, ValueError, LookupError, OSError) as error:
        raise DataError(f'it is not XML: {error}') from error


def size_of(root: ElementTree.Element) -> tuple[int, int] | None:
    """Return (width, height) in the file; None if it has no size, so that mmdet reads the image."""
    if root.find('size') is None:
        return None
    try:
        width, height = (int(root.findtext(f'size/{key}')) for key in ('width', 'height'))
    except (TypeError, ValueError):
        width = height = 0
    if min(width, height) < 1:
        raise DataError('its <size> has no <width> and <height> that are whole numbers from 1 on')
    return width, height


def read_object(item: ElementTree.Element) -> tuple[str, list[float], bool]:
    """Return an object's name, its corners and whether it is difficult, as in the file."""
    label = item.findtext('name')
    try:
        corners = [float(item.findtext(f'bndbox/{k}')) for k in ('xmin', 'ymin', 'xmax', 'ymax')]
        is_difficult = int(item.findtext('difficult', '0')) == 1
    except (TypeError, ValueError):
        corners = []
    if label is None or not corners or not all(map(math.isfinite, corners)):
        reason = 'has no <name>, no <bndbox> of four numbers, or no number as <difficult>'
        raise DataError(f'an <object> {label!r} {reason}')
    return label, corners, is_difficult
