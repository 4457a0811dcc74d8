"""What every reader yields, where images are found, and what is said about bad input."""

import re
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from PIL import ExifTags, Image

from backbones.data.images import PILLOW_ERRORS, upright_size
from backbones.errors import DataError

IMAGE_SUFFIXES = {'.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff'}
SPLIT_WORDS = {
    'train': 'train', 'training': 'train', 'val': 'val', 'valid': 'val', 'validation': 'val',
    'test': 'test', 'testing': 'test',
}  # fmt: skip
NOTED = 3


@dataclass
class Instance:
    """One object of an image."""

    label: str
    box: tuple[float, float, float, float]  # left, top, right, bottom in pixels
    mask: list[list[float]] | dict | None = None  # COCO's: polygons or a run-length encoding
    is_crowd: bool = False


@dataclass
class Record:
    """An image with its objects or its segmentation map."""

    image: Path
    instances: list[Instance] = field(default_factory=list)
    seg_map: Path | None = None
    size: tuple[int, int] | None = None  # (width, height) that the annotation says
    split: str | None = None  # 'train', 'val', 'test', or None where the source does not say


class Notes:
    """Bad input, by kind: how often, and where it was first."""

    def __init__(self) -> None:
        self.places: dict[str, list[str]] = defaultdict(list)

    def add(self, kind: str, place: object) -> None:
        self.places[kind].append(str(place))

    def lines(self) -> Iterator[str]:
        for kind, places in self.places.items():
            yield f'{kind} ({len(places)}):'
            yield from (f'  {place}' for place in places[:NOTED])
            if len(places) > NOTED:
                yield f'  ... and {len(places) - NOTED} more'


class Source:
    """The files of a folder, of which annotations name images in many ways."""

    def __init__(self, root: Path, out: Path, only: Path | None = None) -> None:
        self.root = root
        paths = sorted(path for path in root.rglob('*') if out not in (path, *path.parents))
        paths = [path for path in paths if not set(path.parts) & {'__MACOSX', '.git'}]
        self.folders = {path.name for path in paths if path.is_dir()}
        paths = [path for path in paths if path.is_file()]
        self.images = [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]
        self.files = [only] if only else paths
        self.by_stem: dict[str, list[Path]] = defaultdict(list)
        for path in self.images:
            self.by_stem[path.stem].append(path)

    def image(self, name: str, near: Path) -> Path | None:
        """The image that an annotation file calls ``name``; one of another suffix will do.

        It lies in those folders of the name that there are below the root.
        """
        parts = name.replace('\\', '/').split('/')
        found = self.by_stem.get(Path(parts[-1]).stem) or self.by_stem.get(parts[-1]) or []
        folders = self.folders.intersection(parts[:-1])
        found = [path for path in found if folders <= {*path.relative_to(self.root).parts}]

        def closeness(path: Path) -> tuple:
            tail = 0
            while tail < len(parts) and path.parts[-1 - tail] == parts[-1 - tail]:
                tail += 1
            shared = sum(a == b for a, b in zip(path.parts, near.parts, strict=False))
            return tail, shared, -len(path.parts)

        return max(found, key=closeness, default=None)

    def split(self, path: Path, with_name: bool = False) -> str | None:
        """The split that the folders of a file name, or its own name too."""
        relative = path.relative_to(self.root)
        names = [*relative.parent.parts, *([relative.stem] if with_name else [])]
        words = [word for name in names for word in re.split('[^a-z]+', name.lower())]
        return next((SPLIT_WORDS[word] for word in reversed(words) if word in SPLIT_WORDS), None)

    def listed_splits(self, kind: str) -> dict[str, str]:
        """Splits by an image's stem, from PASCAL VOC's ``ImageSets/KIND/*.txt``."""
        splits = {}
        for path in self.files:
            if path.match(f'ImageSets/{kind}/*.txt') and path.stem in SPLIT_WORDS:
                for line in path.read_text(encoding='utf-8').split('\n'):
                    splits[line.split(' ')[0].strip()] = SPLIT_WORDS[path.stem]
        return splits


@contextmanager
def open_source(path: Path, out: Path) -> Iterator[Source]:
    """The source at a path: a folder, a zip, which is unpacked, or one annotation file.

    An earlier import in ``out`` is no part of it, and the zip is unpacked beside that.
    """
    out = out.resolve()
    if path.is_dir():
        yield Source(path.resolve(), out)
    elif zipfile.is_zipfile(path):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix='.unpacked-', dir=out.parent) as folder:
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if name.startswith('/') or '..' in Path(name.replace('\\', '/')).parts:
                        raise DataError(f'{path} holds {name!r}, which leads out of the folder')
                archive.extractall(folder)
            yield Source(Path(folder).resolve(), out)
    elif path.is_file():
        root = path.resolve().parent
        yield Source(root.parent if root.name == 'annotations' else root, out, path.resolve())
    else:
        raise DataError(f'there is no {path}')


@cache
def measure(path: Path) -> tuple[tuple[int, int], tuple[int, int], int]:
    """(width, height) as stored, the same as mmcv reads it, and the EXIF orientation (1 to 8).

    mmcv rotates images by their EXIF orientation, for detectors and segmentors alike.
    """
    try:
        with Image.open(path) as image:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            return image.size, upright_size(image), orientation
    except PILLOW_ERRORS as error:
        raise DataError(f'{path} is no image that can be read: {error}') from error


def is_readable(image: Path, notes: Notes) -> bool:
    """Whether an image can be opened; notes why it cannot."""
    try:
        measure(image)
    except DataError as error:
        notes.add('images that cannot be read, left out', error)
        return False
    return True


def is_annotated_unrotated(image: Path, size: tuple[int, int] | None) -> bool:
    """Whether annotations are for the stored pixels of an image that EXIF rotates when read."""
    stored, upright, _ = measure(image)
    return size == stored != upright


def rotate_points(points: Sequence[float], image: Path) -> list[float]:
    """[x, y, x, y, ...] on the stored pixels, where EXIF's orientation moves them."""
    (width, height), _, orientation = measure(image)
    moves = {
        5: lambda x, y: (y, x),
        6: lambda x, y: (height - y, x),
        7: lambda x, y: (height - y, width - x),
        8: lambda x, y: (y, width - x),
    }
    move = moves[orientation]
    pairs = zip(points[::2], points[1::2], strict=True)
    return [number for x, y in pairs for number in move(x, y)]


def rotate_record(record: Record, notes: Notes) -> None:
    """Bring annotations of the stored pixels to the image as it is read."""
    if not is_annotated_unrotated(record.image, record.size):
        _, upright, _ = measure(record.image)
        if record.size and min(record.size) > 0 and record.size != upright:
            text = '{}x{}, annotated as {}x{}'.format(*upright, *record.size)
            notes.add('images of another size than annotated', f'{record.image}: {text}')
        return
    notes.add('annotations rotated as EXIF rotates their image', record.image)
    for one in record.instances:
        x1, y1, x2, y2 = rotate_points(one.box, record.image)
        one.box = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
        if isinstance(one.mask, dict):
            raise DataError(f'{record.image}: run-length masks of an image that EXIF rotates')
        one.mask = one.mask and [rotate_points(part, record.image) for part in one.mask]
