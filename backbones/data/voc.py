"""Annotations in PASCAL VOC's layout: a list of names, and an XML file for each."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from mmengine.config import ConfigDict

from backbones.errors import DataError

from .coco import missing_files
from .config_datasets import annotation_file, data_folder, option
from .findings import ERROR, WARNING, Finding

CORNERS = ('xmin', 'ymin', 'xmax', 'ymax')
LAYOUT = (
    'mmdet reads data_root/ann_file, a text file with one name a line, and for each '
    'JPEGImages/NAME.jpg and Annotations/NAME.xml in the folder of data_root that '
    "data_prefix=dict(sub_data_root='...') says"
)


def read_names(dataset: ConfigDict) -> list[str]:
    """The names that a dataset's list has, one a line.

    Raises:
        DataError: There is no such file, or it has no names or is not text.
    """
    path = annotation_file(dataset)
    if not path.is_file():
        raise DataError(f'there is no list {path} (data_root and ann_file say so). {LAYOUT}')
    try:
        names = [line for line in path.read_text(encoding='utf-8').splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f'{path} is not text in UTF-8: {error}') from error
    if not names:
        raise DataError(f'{path} has no names in it, one a line')
    return names


def xml_files(dataset: ConfigDict) -> dict[str, Path]:
    """The XML file of every name."""
    folder = data_folder(dataset, 'sub_data_root') / option(dataset, 'ann_subdir')
    return {name: folder / f'{name}.xml' for name in read_names(dataset)}


def object_names(dataset: ConfigDict) -> Counter:
    """How many objects of each name there are."""
    counts: Counter = Counter()
    for path in xml_files(dataset).values():
        try:
            counts.update(item.findtext('name') for item in parse(path).findall('object'))
        except DataError:
            continue
    return counts


def check_voc(
    dataset: ConfigDict, classes: Sequence[str]
) -> tuple[list[Finding], dict[str, tuple[str, tuple[int, int] | None]]]:
    """Check the XML files of a dataset against themselves, their images and the classes.

    Returns:
        What was found, and for every name whose image exists its path and its size (width, height).

    Raises:
        DataError: The list or a folder is missing.
    """
    source = annotation_file(dataset)
    folder = data_folder(dataset, 'sub_data_root') / option(dataset, 'img_subdir')
    files = xml_files(dataset)
    for place in (folder, next(iter(files.values())).parent):
        if not place.is_dir():
            raise DataError(f'there is no folder {place}. {LAYOUT}')
    findings: list[Finding] = []
    sizes: dict[str, tuple[int, int] | None] = {}
    others: Counter = Counter()
    filters = {} if dataset.get('test_mode') else dataset.get('filter_cfg') or {}
    left_out = 'left out of training' if filters.get('filter_empty_gt') else 'all is background'
    trained = 0
    for name, path in files.items():
        try:
            root = parse(path)
            sizes[name] = size_of(root)
            objects = [check_object(item, sizes[name]) for item in root.findall('object')]
        except DataError as error:
            kind = 'incomplete annotation' if path.is_file() else 'missing annotation'
            findings.append(Finding(ERROR, kind, str(path), str(error), image=name))
            sizes.setdefault(name, None)
            continue
        others.update(label for label, _ in objects if label not in classes)
        for label, fault in objects:
            if fault and label in classes:
                findings.append(Finding(fault[0], fault[1], str(path), fault[2], image=name))
        has_objects = any(label in classes for label, _ in objects)
        trained += has_objects
        if not has_objects:
            findings.append(Finding(WARNING, 'image without objects', str(path), left_out))
    for label, number in others.most_common():
        reason = f'{number} objects called {label!r} are left out: that is none of the classes'
        findings.append(Finding(WARNING, 'objects of other classes', str(source), reason))
    if not trained:
        reason = f'no object is of any of the classes {list(classes)}'
        findings.append(Finding(ERROR, 'no objects', str(source), reason))
    for file, hint in missing_files(folder, [f'{name}.jpg' for name in files]):
        name = file.removesuffix('.jpg')
        reason = f'{source} lists it, but it is not there{hint}; mmdet looks for .jpg alone'
        findings.append(Finding(ERROR, 'missing image', str(folder / file), reason, image=name))
        del sizes[name]
    return findings, {name: (str(folder / f'{name}.jpg'), sizes[name]) for name in sizes}


def parse(path: Path) -> ElementTree.Element:
    """The root of an XML file.

    Raises:
        DataError: It is missing or not XML.
    """
    try:
        return ElementTree.parse(path).getroot()
    except FileNotFoundError as error:
        raise DataError('it is not there') from error
    except (ElementTree.ParseError, ValueError, LookupError, OSError) as error:
        raise DataError(f'it is not XML: {error}') from error


def size_of(root: ElementTree.Element) -> tuple[int, int] | None:
    """(width, height) as the file says; None where it does not, and mmdet reads the image.

    Raises:
        DataError: The size is no size.
    """
    size = root.find('size')
    if size is None:
        return None
    try:
        width, height = (int(size.findtext(key)) for key in ('width', 'height'))
    except (TypeError, ValueError):
        width = height = 0
    if min(width, height) < 1:
        raise DataError('its <size> has no <width> and <height> that are whole numbers from 1 on')
    return width, height


def check_object(
    item: ElementTree.Element, size: tuple[int, int] | None
) -> tuple[str, tuple[str, str, str] | None]:
    """The name of an object, and what is wrong with it: (severity, kind, reason).

    Raises:
        DataError: It lacks what mmdet needs to read the file.
    """
    label, box = item.findtext('name'), item.find('bndbox')
    if label is None:
        raise DataError('an <object> has no <name>')
    try:
        int(item.findtext('difficult', '0'))
        x1, y1, x2, y2 = (int(float(box.findtext(corner))) for corner in CORNERS)
    except (AttributeError, TypeError, ValueError, OverflowError):
        reason = f'an object {label!r} has no <bndbox> of four numbers, or no number as <difficult>'
        raise DataError(reason) from None
    text = f'the box of {label!r}, {x1} {y1} {x2} {y2} ({" ".join(CORNERS)})'
    if x2 <= x1 or y2 <= y1:
        return label, (ERROR, 'box without area', f'{text}, has no area')
    if size and not (x1 <= size[0] and y1 <= size[1] and x2 > 0 and y2 > 0):
        return label, (ERROR, 'box outside the image', f'{text} is outside of {size[0]}x{size[1]}')
    if size and (min(x1, y1) < 0 or x2 > size[0] + 1 or y2 > size[1] + 1):
        reason = f'{text} reaches out of {size[0]}x{size[1]}: cut by Resize'
        return label, (WARNING, 'box beyond the border', reason)
    return label, None
