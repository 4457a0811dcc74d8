"""Names of output files: recognisable, never twice the same, the same whoever computes them."""

import re
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

# Bytes of a name without ending, out of the 255 that file systems take: endings need some, and
# so does what distinguishes a file that is not finished.
LONGEST_NAME = 200


def output_stems(inputs: Sequence[str], taken: Collection[str] = ()) -> list[str]:
    """A name without ending for each input.

    ``a.jpg`` becomes ``a``. Where that would be said twice, ``a.jpg`` and ``a.png`` become
    ``a_jpg`` and ``a_png``, and whatever still is the same gets a number.

    Args:
        inputs: Paths below the output folder, or addresses.
        taken: Names that must not be used. Upper and lower case count as the same, since some
            file systems do not tell them apart.
    """
    candidates = [PurePosixPath(readable(path)) for path in inputs]
    shared = Counter(str(path.with_suffix('')).casefold() for path in candidates)
    used = {name.casefold() for name in taken}
    stems = []
    for path in candidates:
        stem = str(path.with_suffix(''))
        if shared[stem.casefold()] > 1 and path.suffix:
            stem = f'{stem}_{path.suffix[1:]}'
        stem = shortened(stem)
        number, unique = 1, stem
        while unique.casefold() in used:
            number += 1
            unique = f'{stem}_{number}'
        used.add(unique.casefold())
        stems.append(unique)
    return stems


def shortened(stem: str) -> str:
    """The name as it is, or its beginning where it is too long."""
    folders, separator, name = stem.rpartition('/')
    encoded = name.encode('utf-8', 'surrogateescape')
    if len(encoded) > LONGEST_NAME:
        name = encoded[:LONGEST_NAME].decode('utf-8', 'ignore')
    return f'{folders}{separator}{name}'


def readable(path: str) -> str:
    """An address as a file name: what it points to, or else its host; other paths as they are."""
    scheme, separator, _ = path.partition('://')
    if separator:
        parts = urlsplit(path)
        host = (parts.hostname or scheme).replace('.', '_')
        path = PurePosixPath(unquote(parts.path)).name or host
    parts = (part for part in path.replace('\\', '/').split('/') if part not in ('', '.', '..'))
    cleaned = '/'.join(re.sub(r'[\x00-\x1f:*?"<>|]', '_', part) for part in parts)
    return cleaned or 'input'
