"""The paths of results: below the output folder, they mirror the inputs' paths."""

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

# The possible suffixes of an input's results, by folder.
SUFFIXES = {'drawn': ('.jpg', '.png', '.mp4'), 'data': ('.json', '.png', '.jsonl', '.frames')}
# Of the 255 bytes that file systems allow, a checksum, the suffix and a temporary name need 56.
MAX_NAME_BYTES = 199

Existing = Literal['refuse', 'overwrite', 'skip']


def plan_jobs(
    listed: Sequence[Input], folder: Path, existing: Existing, parts: Sequence[str]
) -> tuple[list[Input], int]:
    """Return the inputs to process, with the names of their results, and how many were skipped.

    Raises ConfigError if one of ``parts`` has results, and ``existing`` is 'refuse'.
    """
    jobs, num_skipped = [], 0
    for item, stem in zip(listed, result_stems([item.path for item in listed]), strict=True):
        found = [find_result(folder, part, stem) for part in parts]
        if existing == 'refuse' and any(found):
            raise ConfigError(
                f'{next(filter(None, found))} exists already: --skip-existing leaves out inputs '
                'that have results, --overwrite replaces them, --out-dir sets another folder'
            )
        if existing == 'skip' and all(found):
            num_skipped += 1
        else:
            jobs.append(replace(item, name=stem, file_name=mirrored_path(item.path)))
    return jobs, num_skipped


def find_result(folder: Path, part: str, stem: str) -> Path | None:
    """Return the result of an input in ``drawn/`` or ``data/``, or None."""
    paths = (folder / part / f'{stem}{suffix}' for suffix in SUFFIXES[part])
    return next(filter(Path.exists, paths), None)


def result_stems(paths: Sequence[str]) -> list[str]:
    """Return the stems of results below ``drawn/`` and ``data/``, independent of other inputs.

    ``a`` for ``a.jpg``, but ``a.jpg`` and ``a.png`` if both may exist; live inputs get the time.
    """
    names = [mirrored_path(path) for path in paths]
    neighbors = lru_cache(stems_in)
    stems: dict[str, None] = {}
    for path, name in zip(paths, names, strict=True):
        stem = without_suffix(name)
        folder, last = os.path.split(os.path.abspath(path))
        # The other files of a storage are not known.
        if find_scheme(path) or neighbors(folder)[without_suffix(last)] > 1:
            stem = name
        if is_live(path):
            stem += time.strftime('_%Y-%m-%d_%H-%M-%S')
        stems[shorten(stem, path, is_taken=stem in stems)] = None
    return list(stems)


def shorten(stem: str, path: str, is_taken: bool = False) -> str:
    """Return the stem, or if it is taken or too long for file systems, one unique to the path."""
    *folders, last = map(os.fsencode, stem.split('/'))
    short = b'/'.join([*(name[:255] for name in folders), last[:MAX_NAME_BYTES]])
    if is_taken or short != os.fsencode(stem):
        stem = f'{short.decode("utf-8", "ignore")}_{crc32(os.fsencode(path)):08x}'
    return stem


def mirrored_path(path: str) -> str:
    """Return a path from the current folder on, else from the root on; a URL's host and path."""
    if find_scheme(path) or is_live(path):
        url = without_password(path).replace('webcam:', 'webcam_')
        try:
            parts = urlsplit(url)
            query = f'_{parts.query}' if parts.query else ''
            path = f'{parts.hostname or ""}/{unquote(parts.path)}{query}'
        except ValueError:  # brackets without an address: opening it will say so
            path = url.partition('://')[2]
        path = re.sub(r'[\x00-\x1f\\:*?"<>|]', '_', path)
        return '/'.join(part for part in path.split('/') if part not in ('', '.', '..'))
    path = os.path.abspath(path)
    below = os.path.relpath(path)
    is_below = PurePath(below).parts[:1] != (os.pardir,)
    return below if is_below else path.lstrip('/')


def without_suffix(name: str) -> str:
    """Return ``a`` for ``a.jpg``; only suffixes of images and videos are cut off."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in MEDIA_SUFFIXES else name


def stems_in(folder: str) -> Counter:
    """Count how many files of a folder have each stem."""
    try:
        with os.scandir(folder) as entries:
            return Counter(without_suffix(entry.name) for entry in entries if entry.is_file())
    except OSError:
        return Counter()
