"""Where results lie: below the output folder, at paths that mirror the inputs' own."""

import os
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Literal
from urllib.parse import unquote, urlsplit
from zlib import crc32

from backbones.errors import ConfigError

from .inputs import MEDIA_SUFFIXES, Input, find_scheme, is_live, without_password

# What the results of an input can be, by their folder.
SUFFIXES = {'drawn': ('.jpg', '.png', '.mp4'), 'data': ('.json', '.png', '.jsonl', '.frames')}
# Of the 255 bytes that file systems allow, a checksum, the suffix and a temporary name need 56.
MAX_NAME_BYTES = 199

Existing = Literal['refuse', 'overwrite', 'skip']


def plan_jobs(
    listed: Sequence[Input], folder: Path, existing: Existing, parts: Sequence[str]
) -> tuple[list[Input], int]:
    """The inputs to work on, named like their results, and how many were skipped.

    ConfigError where one of ``parts`` has results that are to be neither skipped nor replaced.
    """
    jobs, num_skipped = [], 0
    for item, stem in zip(listed, result_stems([item.path for item in listed]), strict=True):
        found = [find_result(folder, part, stem) for part in parts]
        if existing == 'refuse' and any(found):
            raise ConfigError(
                f'{next(filter(None, found))} is there already: --skip-existing leaves out inputs '
                'that have results, --overwrite replaces them, --out-dir takes another folder'
            )
        if existing == 'skip' and all(found):
            num_skipped += 1
        else:
            jobs.append(replace(item, name=stem, file_name=mirrored_path(item.path)))
    return jobs, num_skipped


def find_result(folder: Path, part: str, stem: str) -> Path | None:
    """The result of an input in ``drawn/`` or ``data/``, if it has one."""
    paths = (folder / part / f'{stem}{suffix}' for suffix in SUFFIXES[part])
    return next(filter(Path.exists, paths), None)


def result_stems(paths: Sequence[str]) -> list[str]:
    """The paths of results below ``drawn/`` and ``data/``, whatever other inputs there are.

    ``a`` for ``a.jpg``, but ``a.jpg`` and ``a.png`` where both may exist; a live one has the time.
    """
    names = [mirrored_path(path) for path in paths]
    neighbors = lru_cache(stems_in)
    stems: dict[str, None] = {}
    for path, name in zip(paths, names, strict=True):
        stem = without_suffix(name)
        folder, last = os.path.split(os.path.abspath(path))
        # What else lies in a storage is not known.
        if find_scheme(path) or neighbors(folder)[without_suffix(last)] > 1:
            stem = name
        if is_live(path):
            stem += time.strftime('_%Y-%m-%d_%H-%M-%S')
        stems[shorten(stem, path, is_taken=stem in stems)] = None
    return list(stems)


def shorten(stem: str, path: str, is_taken: bool = False) -> str:
    """The stem, or if file systems do not take it or it is taken, one that only this path has."""
    *folders, last = map(os.fsencode, stem.split('/'))
    short = b'/'.join([*(name[:255] for name in folders), last[:MAX_NAME_BYTES]])
    if is_taken or short != os.fsencode(stem):
        stem = f'{short.decode("utf-8", "ignore")}_{crc32(os.fsencode(path)):08x}'
    return stem


def mirrored_path(path: str) -> str:
    """From the current folder on for files in it, else from the root on; of a URL host and path."""
    if find_scheme(path) or is_live(path):
        url = without_password(path).replace('webcam:', 'webcam_')
        try:
            parts = urlsplit(url)
            query = f'_{parts.query}' if parts.query else ''
            path = f'{parts.hostname or ""}/{unquote(parts.path)}{query}'
        except ValueError:  # of brackets that hold no address: opening it says so
            path = url.partition('://')[2]
        path = re.sub(r'[\x00-\x1f\\:*?"<>|]', '_', path)
        return '/'.join(part for part in path.split('/') if part not in ('', '.', '..'))
    path = os.path.abspath(path)
    below = os.path.relpath(path)
    is_below = PurePath(below).parts[:1] != (os.pardir,)
    return below if is_below else path.lstrip('/')


def without_suffix(name: str) -> str:
    """``a`` for ``a.jpg``; only suffixes of images and videos are cut off."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in MEDIA_SUFFIXES else name


def stems_in(folder: str) -> Counter:
    """How many files of a folder have each stem."""
    try:
        with os.scandir(folder) as entries:
            return Counter(without_suffix(entry.name) for entry in entries if entry.is_file())
    except OSError:
        return Counter()
