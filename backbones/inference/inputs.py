"""List files, folders, globs, URLs and lists of them as inputs."""

import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import fsspec
import numpy as np

from backbones.errors import InputError, in_one_line, reason_of

WEB_SCHEMES = ('http', 'https')
STREAM_SCHEMES = ('rtsp', 'rtsps', 'rtmp', 'rtmps', 'udp')

# Our own tools write these beside images.
DATA_SUFFIXES = ('.json', '.jsonl')
# Lists a run's results, in the same folder.
RECORDS_NAME = 'predictions.jsonl'

VIDEO_SUFFIXES = (
    *('.3gp', '.asf', '.avi', '.flv', '.h264', '.h265', '.hevc', '.m2ts', '.m4v', '.mjpeg'),
    *('.mjpg', '.mkv', '.mov', '.mp4', '.mpeg', '.mpg', '.mts', '.mxf', '.ogv', '.ts', '.vob'),
    *('.webm', '.wmv', '.y4m'),
)
MEDIA_SUFFIXES = (
    *('.avif', '.bmp', '.gif', '.heic', '.heif', '.jfif', '.jp2', '.jpeg', '.jpg', '.mpo', '.pgm'),
    *('.png', '.pnm', '.ppm', '.qoi', '.tif', '.tiff', '.webp', *VIDEO_SUFFIXES),
)


@dataclass(frozen=True)
class Input:
    """One input, not opened yet."""

    # Normalized (photos/a.jpg for ./photos//a.jpg); or a URL, or webcam:N.
    path: str
    # The name of its results, once that is known; see output_paths.
    name: str = ''
    # The image's name in the results' data.
    file_name: str = ''
    # Whether it was found in a folder or by a glob, and not named by the user.
    found: bool = False
    # Why it cannot be opened, as words that follow the path.
    problem: str | None = None
    # The image, if it is not read from the path: encoded, or (height, width, 3), uint8, BGR.
    data: bytes | np.ndarray | None = field(default=None, repr=False, compare=False)

    @property
    def key(self) -> str:
        """The same for all ways to write a file's path; a link to a file is another file."""
        if find_scheme(self.path) or is_live(self.path):
            return self.path
        folder, name = os.path.split(os.path.abspath(self.path))
        return os.path.join(os.path.realpath(folder), name)

    @property
    def shown(self) -> str:
        """The path as it may be shown and stored: a URL without user and password."""
        return without_password(self.path)


def list_inputs(inputs: Sequence[str], recursive: bool, stdin: TextIO) -> list[Input]:
    """List all files that the user's inputs stand for (see docs/inputs.md), without opening any.

    A file that is found twice is listed once; an input that cannot be listed has a ``problem``.
    """
    listed: dict[str, Input] = {}
    for given in inputs:
        one_by_one = (
            _list_stdin(recursive, stdin) if given == '-' else iterate_inputs(given, recursive)
        )
        for item in one_by_one:
            listed.setdefault(item.key, item)
    return list(listed.values())


def find_scheme(path: str) -> str | None:
    """Return the part before ``://``, in lower case; None for a local path."""
    match = re.match(r'([a-zA-Z][a-zA-Z0-9+.-]*)://', path)
    return match[1].lower() if match else None


def is_live(path: str) -> bool:
    """Return whether this can only be a live source: the URL of a stream, or ``webcam:N``."""
    return find_scheme(path) in STREAM_SCHEMES or re.fullmatch(r'webcam:\d+', path) is not None


def without_password(path: str) -> str:
    """Return a URL without user and password; other paths as they are."""
    # Up to the last @ before the path, since a password may contain some.
    return re.sub(r'^([a-zA-Z][a-zA-Z0-9+.-]*://)[^/?#]*@', r'\1', path)


def _list_stdin(recursive: bool, stdin: TextIO) -> Iterator[Input]:
    paths = lines_of(stdin)
    if not paths:
        yield Input('-', problem='standard input has no paths in it')
    for path in paths:
        yield from iterate_inputs(path, recursive)


def lines_of(file: TextIO) -> list[str]:
    """Return the paths in a file, one per line; it may begin with a byte order mark."""
    # Not splitlines(), which splits at characters that names may have.
    paths = (line.removeprefix('\ufeff').rstrip('\r\n') for line in file)
    return [path for path in paths if path.strip()]


def iterate_inputs(given: str, recursive: bool) -> Iterator[Input]:
    """Like :func:`list_inputs`, but for one input, and one file at a time."""
    scheme = find_scheme(given)
    try:
        if is_live(given) or scheme in WEB_SCHEMES:
            yield Input(given)
        elif scheme:
            yield from _list_storage(given, recursive)
        else:
            given = str(Path(given)) if given else given
            yield from _list_local(given, recursive)
    except InputError as error:
        yield Input(given, problem=str(error))


def _list_storage(url: str, recursive: bool) -> Iterator[Input]:
    """Yield files of a storage that fsspec has a package for: s3://, gs://, hf://, ..."""
    try:
        storage, path = fsspec.core.url_to_fs(url)
        if _is_glob(path) and not storage.exists(path):
            paths = storage.glob(path)
        elif storage.isdir(path):
            paths = storage.find(path, maxdepth=None if recursive else 1)
        elif storage.exists(path):
            yield Input(url)
            return
        else:
            raise FileNotFoundError('there is no such file')
    # Each storage has errors of its own.
    except Exception as error:
        raise InputError(f'cannot be listed: {in_one_line(error)}') from error
    # The part of the path that the user named is wanted, even if it is hidden.
    named = re.match(r'([^*?[]*/)?\.*', path).end()
    paths = sorted((each for each in paths if _is_wanted(each[named:])), key=_natural)
    if not paths:
        raise InputError('has no files in it')
    for path in paths:
        yield Input(storage.unstrip_protocol(path), found=True)


def _list_local(given: str, recursive: bool) -> Iterator[Input]:
    try:
        is_folder = stat.S_ISDIR(os.stat(given).st_mode)
    except (OSError, ValueError) as error:
        if not _is_glob(given) or isinstance(error, PermissionError):
            raise InputError(f'cannot be read: {reason_of(error)}') from error
        yield from _list_glob(given, recursive)
        return
    files = list(_walk(given, recursive)) if is_folder else [Input(given)]
    if not files:
        hint = '' if recursive else '; --recursive also searches the folders in it'
        raise InputError(f'is a folder without files{hint}')
    yield from files


def _list_glob(glob: str, recursive: bool) -> Iterator[Input]:
    anchor = Path(glob).anchor
    parts = Path(glob).relative_to(anchor).parts
    if parts[-1] == '**':
        parts = (*parts, '*')
    try:
        # Not glob.glob: it follows links, and links in a circle would keep it busy for ever.
        paths = list(map(str, Path(anchor).glob('/'.join(parts))))
    except (OSError, ValueError, NotImplementedError) as error:
        raise InputError(f'cannot be searched: {error}') from error
    if not _is_hidden(glob):
        paths = [path for path in paths if not _is_hidden(path)]
    if not paths:
        raise InputError('does not exist, and matches no file as a glob')
    for path in sorted(paths, key=_natural):
        if not os.path.isdir(path):
            yield Input(path, found=True)
        elif '**' not in parts:
            yield from _walk(path, recursive)


def _walk(folder: str, recursive: bool) -> Iterator[Input]:
    """Yield the files of a folder; each folder is visited once, even if links form circles."""
    seen, errors = set(), []
    for path, folders, files in os.walk(folder, onerror=errors.append, followlinks=True):
        real = os.path.realpath(path)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        results = ('drawn', 'data') if RECORDS_NAME in files else ()
        folders[:] = [
            name for name in folders if recursive and not _is_hidden(name) and name not in results
        ]
        folders.sort(key=_natural)
        for name in sorted(filter(_is_wanted, files), key=_natural):
            yield Input(os.path.join(path, name), found=True)
    for error in errors:
        problem = f'is a folder that cannot be searched: {error.strerror}'
        yield Input(error.filename, problem=problem)


def _is_wanted(path: str) -> bool:
    return not _is_hidden(path) and not path.lower().endswith(DATA_SUFFIXES)


def _is_hidden(path: str) -> bool:
    return any(part.startswith('.') and part.strip('.') for part in Path(path).parts)


def _is_glob(path: str) -> bool:
    return re.search(r'[*?[]', path) is not None


def _natural(path: str) -> tuple:
    """Return a key that sorts names as people do: numbers by their value."""
    parts = re.split(r'([0-9]+)', path.casefold())
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], path
