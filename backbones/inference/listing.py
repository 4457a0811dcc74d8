"""Files, folders, patterns, addresses and lists of them, as one list of inputs."""

import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from .addresses import LIVE_SCHEMES, WEB_SCHEMES, find_scheme, is_live, is_web
from .pictures import explain_os_error

# Endings of what our own tools write beside pictures.
DATA_ENDINGS = ('.json', '.jsonl')


@dataclass(frozen=True)
class Listed:
    """One input, not opened yet.

    Attributes:
        path: A path, an address, or ``webcam:N``.
        relative: What to call its results by: its path below the folder that was given, or below
            what is fixed in a pattern; for a file that was named, its name; else ``path``.
        found: Whether it was found in a folder or by a pattern, and not named by the user.
        problem: Why there is nothing to open, to go behind the path; None if there may be.
    """

    path: str
    relative: str
    found: bool = False
    problem: str | None = None


def expand_inputs(inputs: Sequence[str], recursive: bool, stdin: TextIO) -> list[Listed]:
    """List everything that the user's inputs stand for, without opening a file.

    An input is a file, a folder, a pattern such as ``photos/*.jpg`` or ``photos/**/*.jpg``, an
    address, ``webcam:N``, or ``-`` for a list of such on standard input, one a line. What exists
    is never taken for a pattern. In folders, hidden files and JSON are passed over.

    Args:
        inputs: As given by the user.
        recursive: Whether folders below folders are searched.
        stdin: Where ``-`` reads.

    Returns:
        In the order of ``inputs``; in folders by name, with ``frame_2`` before ``frame_10`` and
        files before folders. A file that is reached twice is there once. What cannot be listed is
        there with its ``problem``.
    """
    listed: dict[str, Listed] = {}
    for item in _expand(inputs, recursive, stdin):
        listed.setdefault(_identity(item.path), item)
    return list(listed.values())


def explain_missing(given: str, error: OSError | ValueError) -> str:
    """Why there is no such file, to go behind the path."""
    if given == 'webcam' or given.startswith('webcam:'):
        return 'is neither a file nor a camera; the first camera is webcam:0'
    if os.path.islink(given):
        return 'is a link to something that does not exist'
    return explain_os_error(error)


def _expand(inputs: Sequence[str], recursive: bool, stdin: TextIO) -> Iterator[Listed]:
    for given in inputs:
        if given == '-':
            yield from _expand_list(recursive, stdin)
        else:
            yield from _expand_one(given, recursive)


def _expand_list(recursive: bool, stdin: TextIO) -> Iterator[Listed]:
    try:
        lines = [line.rstrip('\r\n') for line in stdin]
    except UnicodeDecodeError as error:
        yield Listed('-', '-', problem=f'standard input is no list of paths: {error}')
        return
    paths = [line for line in lines if line.strip()]
    if not paths:
        yield Listed('-', '-', problem='standard input has no paths in it')
    for path in paths:
        yield from _expand_one(path, recursive)


def _expand_one(given: str, recursive: bool) -> Iterator[Listed]:
    if is_live(given) or is_web(given):
        yield Listed(given, given)
        return
    if scheme := find_scheme(given):
        known = ', '.join((*WEB_SCHEMES, *LIVE_SCHEMES))
        problem = f'{scheme}:// is no address that can be opened; those are {known}'
        yield Listed(given, given, problem=problem)
        return
    name = os.path.basename(os.path.abspath(given)) if given else given
    try:
        is_folder = stat.S_ISDIR(os.stat(given).st_mode)
    except (OSError, ValueError) as error:
        if isinstance(error, PermissionError) or not _is_pattern(given):
            yield Listed(given, name, problem=explain_missing(given, error))
        else:
            yield from _expand_pattern(given, recursive)
        return
    if is_folder:
        yield from _expand_folder(given, '', recursive)
    else:
        yield Listed(given, name)


def _expand_pattern(pattern: str, recursive: bool) -> Iterator[Listed]:
    parts = Path(pattern).parts
    num_fixed = next(index for index, part in enumerate(parts) if _is_pattern(part))
    base, parts = Path(*parts[:num_fixed]), parts[num_fixed:]
    if parts[-1] == '**':
        parts = (*parts, '*')
    # Not glob.glob: it follows links, and two that lead in circles keep it busy for ever.
    try:
        paths = sorted(base.glob(os.path.join(*parts)), key=lambda path: _natural(str(path)))
    except (OSError, ValueError, NotImplementedError) as error:
        yield Listed(pattern, pattern, problem=f'is no pattern that can be searched: {error}')
        return
    names_hidden = any(part.startswith('.') for part in parts)
    num_found = 0
    for path in paths:
        below = path.relative_to(base)
        if not names_hidden and any(part.startswith('.') for part in below.parts):
            continue
        num_found += 1
        if not path.is_dir():
            yield Listed(str(path), below.as_posix(), found=True)
        elif '**' not in parts:
            yield from _expand_folder(str(path), f'{below.as_posix()}/', recursive)
    if not num_found:
        yield Listed(pattern, pattern, problem='does not exist, and as a pattern fits no file')


def _expand_folder(folder: str, prefix: str, recursive: bool) -> Iterator[Listed]:
    """A folder that was named, or that a pattern fits."""
    listed = list(_walk(folder, prefix, recursive, set()))
    if not listed:
        hint = '' if recursive else '; folders in it are searched with --recursive'
        name = prefix.rstrip('/') or os.path.basename(os.path.abspath(folder))
        listed = [Listed(folder, name, problem=f'is a folder without files{hint}')]
    yield from listed


def _walk(folder: str, prefix: str, recursive: bool, seen: set[str]) -> Iterator[Listed]:
    real = os.path.realpath(folder)
    if real in seen:
        return
    seen.add(real)
    try:
        with os.scandir(folder) as entries:
            entries = [entry for entry in entries if not entry.name.startswith('.')]
    except OSError as error:
        name = prefix.rstrip('/') or os.path.basename(real)
        problem = f'is a folder that cannot be searched: {error.strerror}'
        yield Listed(folder, name, found=bool(prefix), problem=problem)
        return
    entries.sort(key=lambda entry: _natural(entry.name))
    folders = []
    for entry in entries:
        if _is_folder(entry):
            folders.append(entry)
        elif not entry.name.lower().endswith(DATA_ENDINGS):
            yield Listed(entry.path, prefix + entry.name, found=True)
    if recursive:
        for entry in folders:
            yield from _walk(entry.path, f'{prefix}{entry.name}/', recursive, seen)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_pattern(path: str) -> bool:
    return re.search(r'[*?[]', path) is not None


def _natural(name: str) -> tuple:
    """Sorts names as people do: numbers by their value."""
    parts = re.split(r'([0-9]+)', name.casefold())
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name


def _identity(path: str) -> str:
    """The same for all ways to write the path of a file.

    Links to folders are followed. Links to files are not: who gives a picture two names in a
    folder wants two results.
    """
    if find_scheme(path) or is_live(path):
        return path
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(folder), name)
