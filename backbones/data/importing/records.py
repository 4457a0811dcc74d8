"""What every reader yields, where images are found, and what is said about bad input."""

import os
import re
import tempfile
import zipfile
import zlib
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from backbones.data.findings import printable
from backbones.data.images import IMAGE_SUFFIXES, PILLOW_ERRORS, upright_size
from backbones.errors import DataError, in_one_line
from backbones.progress import ProgressBar

SPLIT_WORDS = {
    'train': 'train', 'training': 'train', 'val': 'val', 'valid': 'val', 'validation': 'val',
    'test': 'test', 'testing': 'test',
}  # fmt: skip


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
    split: str | None = None  # 'train', 'val', 'test', or None where the source does not say
    size: tuple[int, int] | None = None  # (width, height) that the annotation says
    instances: list[Instance] = field(default_factory=list)
    seg_map: Path | None = None
    name: str = ''  # of the image's new file


class LeftOut(DataError):
    """An object that is left out: what is wrong with objects of its kind, and with this one."""


def walk_folders(root: Path) -> Iterator[Path]:
    """What is below a folder, through links too; each folder once, by its own path if it can."""
    # Links come last.
    tops, seen = [root], set()
    for top in tops:
        for folder, names, files in os.walk(top):
            real = os.path.realpath(folder)
            if real in seen:
                names.clear()
                continue
            seen.add(real)
            yield from (Path(folder, name) for name in names + files)
            tops += [path for name in names if (path := Path(folder, name)).is_symlink()]


class Source:
    """The files of a folder, of which annotations name images in many ways, and what they say.

    ``options`` is the command line of tools/import_dataset.py, ``only`` a single file to read.
    """

    def __init__(self, root: Path, options: Namespace, only: Path | None = None) -> None:
        self.root, self.options = root.resolve(), options
        # What a zip is unpacked to is gone when its user looks for it.
        self.shown = self.root if only or options.source.is_dir() else options.source
        self.names: list[str] = []  # of classes, in their order
        self.colors: list[tuple[int, int, int]] | None = None  # of the classes
        self.values: dict[int, int] = {}  # the class of each value in a segmentation map
        self.in_color = False  # whether these values are colors
        self.notes: dict[str, list[str]] = defaultdict(list)  # bad input by kind, and where it is
        out = options.out.resolve()
        paths = sorted(path for path in walk_folders(self.root) if out not in (path, *path.parents))
        paths = [path for path in paths if not set(path.parts) & {'__MACOSX', '.git'}]
        self.folders = {path.name for path in paths if path.is_dir()}
        paths = [path for path in paths if path.is_file()]
        images = [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]
        images = ProgressBar(images, 'opening images', leave=False, disable=None)
        self.images = list(filter(self.can_read, images))
        self.files = [only] if only else paths
        self.by_stem: dict[str, list[Path]] = defaultdict(list)
        for path in self.images:
            self.by_stem[path.stem].append(path)

    def note(self, kind: str, place: object) -> None:
        """Say what is wrong in the source, and where."""
        place = str(place).replace(str(self.root), str(self.shown))
        self.notes[kind].append(printable(place))

    @contextmanager
    def leaving_out(self, place: object, what: str = 'malformed objects') -> Iterator[None]:
        """Note what cannot be read, and go on without it."""
        try:
            yield
        except LeftOut as error:
            kind, detail = error.args
            self.note(f'{kind}, left out', f'{place}: {detail}')
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            detail = in_one_line(error) if isinstance(error, ValueError) else repr(error)
            self.note(f'{what}, left out', f'{place}: {detail}')

    def can_read(self, image: Path) -> bool:
        """Whether an image can be opened; notes why it cannot."""
        try:
            return bool(measure(image))
        except PILLOW_ERRORS as error:
            self.note('images that cannot be read, left out', f'{image}: {error}')
            return False

    def called(self, parts: Sequence[str]) -> list[Path]:
        """All images that a name of these parts, folders first, may stand for.

        Another suffix of images will do. They lie in those of its folders that there are below the
        root.
        """
        stem, suffix = os.path.splitext(parts[-1])
        # frame.1 has no suffix: its image is frame.1.jpg, never frame.jpg.
        found = self.by_stem.get(stem if suffix.lower() in IMAGE_SUFFIXES else parts[-1], [])
        folders = self.folders.intersection(parts[:-1])
        depth = len(self.root.parts)
        return [path for path in found if folders.issubset(path.parts[depth:])]

    def image(self, *names: str | None, near: Path, split: str | None = None) -> Path | None:
        """The image that an annotation file calls by the first of ``names`` that there is.

        Of equally close ones it is that of the ``split``. Without any this is noted.
        """
        for name in filter(None, names):
            parts = name.replace('\\', '/').split('/')

            def closeness(path: Path, parts: Sequence[str] = parts) -> tuple:
                tail = 0
                while tail < len(parts) and path.parts[-1 - tail] == parts[-1 - tail]:
                    tail += 1
                shared = sum(a == b for a, b in zip(path.parts, near.parts, strict=False))
                return tail, shared, split in (None, self.split(path)), -len(path.parts)

            if found := self.called(parts):
                return max(found, key=closeness)
        self.note('annotations without an image, left out', f'{near}: {names[-1]}')
        return None

    def split(self, path: Path, with_name: bool = False) -> str | None:
        """The split that the folders of a file name, or its own name too."""
        relative = path.relative_to(self.root)
        names = [*relative.parent.parts, *([relative.stem] if with_name else [])]
        words = [word for name in names for word in re.split('[^a-z]+', name.lower())]
        return next((SPLIT_WORDS[word] for word in reversed(words) if word in SPLIT_WORDS), None)

    def are_apart(self, path: Path, other: Path) -> bool:
        """Whether folders say that two files are of different splits."""
        return len({self.split(path), self.split(other)} - {None}) > 1

    def listed_splits(self, kind: str) -> dict[Path, str | None]:
        """Splits, if any, by image, from PASCAL VOC's ``ImageSets/KIND/*.txt``."""
        # What val.txt, read later, lists of trainval.txt is not for training.
        words, lines, splits = {**SPLIT_WORDS, 'trainval': 'train'}, {}, {}
        for path in self.files:
            if path.match(f'ImageSets/{kind}/*.txt'):
                for line in path.read_text(encoding='utf-8-sig').split('\n'):
                    lines[line] = words.get(path.stem) or lines.get(line)
        for line, split in lines.items():
            # A name with spaces may have quotes; in lists of a class 1, 0 or -1 follows.
            name = line.replace('"', '').replace('\\', '/').strip()
            bare = re.sub(r'\s+-?\d+$', '', name)
            for image in self.called(name.split('/')) or self.called(bare.split('/')):
                splits[image] = split or splits.get(image)
        return splits


@contextmanager
def open_source(options: Namespace) -> Iterator[Source]:
    """A folder, a zip, which is unpacked beside ``options.out``, or one annotation file."""
    path, beside = options.source, options.out.resolve().parent
    if path.is_dir():
        yield Source(path, options)
    elif zipfile.is_zipfile(path):
        beside.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix='.unpacked-', dir=beside) as folder:
            try:
                with zipfile.ZipFile(path) as archive:
                    for member in archive.infolist():
                        # As Windows PowerShell 5.1 writes them.
                        member.filename = member.filename.replace('\\', '/')
                        # It takes '..' and leading slashes out of names.
                        archive.extract(member, folder)
            except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
                raise DataError(f'{path} cannot be unpacked: {in_one_line(error)}') from error
            try:
                yield Source(Path(folder), options)
            except DataError as error:
                raise DataError(str(error).replace(folder, str(path))) from error
    elif path.is_file() and path.suffix.lower() in ('.json', '.xml', '.txt'):
        root = path.resolve().parent
        root = root.parent if root.name == 'annotations' else root
        yield Source(root, options, path.resolve())
    else:
        what = 'no annotation file and no whole zip: give its folder, or unpack it'
        raise DataError(f'{path} is {what}' if path.exists() else f'there is no {path}')


@cache
def measure(path: Path) -> tuple[tuple[int, int], tuple[int, int], int]:
    """(width, height) as stored, the same as mmcv reads it, and the EXIF orientation (1 to 8).

    mmcv rotates images by their EXIF orientation, for detectors and segmentors alike.
    """
    with Image.open(path) as image:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        return image.size, upright_size(image), orientation


def rotate_record(record: Record, source: Source) -> None:
    """Bring annotations of the stored pixels to the image as it is read."""
    stored, upright, _ = measure(record.image)
    if record.size == stored != upright:
        source.note('annotations rotated as EXIF rotates their image', record.image)
        kept = [one for one in record.instances if not isinstance(one.mask, dict)]
        if len(kept) < len(record.instances):
            source.note('run-length masks of images that EXIF rotates, left out', record.image)
        record.instances = kept
        for one in kept:
            x1, y1, x2, y2 = rotate_points(one.box, record.image)
            one.box = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
            one.mask = one.mask and [rotate_points(part, record.image) for part in one.mask]
    elif record.size and all(record.size) and record.size != upright:
        text = '{}x{}, annotated as {}x{}'.format(*upright, *record.size)
        kind = 'images of another size than annotated, their objects not scaled'
        source.note(kind, f'{record.image}: {text}')


def rotate_points(points: Sequence[float], image: Path) -> list[float]:
    """[x, y, x, y, ...] on the stored pixels, where EXIF's orientation, 5 to 8, moves them."""
    (width, height), _, orientation = measure(image)
    x, y = np.reshape(points, (-1, 2)).T
    moved_x = height - y if orientation in (6, 7) else y
    moved_y = width - x if orientation in (7, 8) else x
    return np.stack([moved_x, moved_y], axis=1).ravel().tolist()
