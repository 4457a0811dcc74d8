"""The Parquet set that results go to, in a local folder or a storage: what is in it is done."""

import json
from pathlib import Path
from typing import Any

import fsspec

from backbones.errors import ConfigError, in_one_line
from backbones.files import atomic_write
from backbones.inference.inputs import find_scheme

# Where pandas and Spark read a folder, they leave out names that begin with _ or a dot.
RUN_FILE, INPUTS_FOLDER = '_run.json', '_inputs'


class Destination:
    """A folder, local or of any storage that fsspec reaches, whose files appear whole."""

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self.fs, self.root = fsspec.core.url_to_fs(url)
        # Each storage has errors of its own.
        except Exception as error:
            raise ConfigError(f'--out {url} cannot be used: {in_one_line(error)}') from error
        self.root = self.root.rstrip('/')
        self.is_local = find_scheme(url) in (None, 'file', 'local')

    def path(self, name: str) -> str:
        """A file of the folder, for its file system."""
        return f'{self.root}/{name}'

    def names(self, folder: str = '') -> list[str]:
        """The names of the finished files in the folder, or in a folder in it."""
        path = self.path(folder).rstrip('/')
        # Another process may have listed it before.
        self.fs.invalidate_cache()
        if not self.fs.isdir(path):
            return []
        found = self.fs.ls(path, detail=False)
        names = (name.rstrip('/').rpartition('/')[2] for name in found)
        return sorted(name for name in names if not name.startswith('.'))

    def write(self, name: str, content: bytes) -> None:
        """Write a file, whole or not at all."""
        if self.is_local:
            with atomic_write(Path(self.path(name))) as temporary:
                temporary.write_bytes(content)
        else:
            # In a storage of objects it is there when the request has ended, and not before.
            self.fs.pipe_file(self.path(name), content)

    def commit(self, file: Path, name: str) -> None:
        """Copy a finished local file, which may be large, to the folder, whole or not at all."""
        if self.is_local:
            with atomic_write(Path(self.path(name))) as temporary:
                self.fs.put_file(str(file), str(temporary))
        else:
            self.fs.put_file(str(file), self.path(name))

    def has(self, name: str) -> bool:
        self.fs.invalidate_cache()
        return self.fs.exists(self.path(name))

    def claim(self, run: dict[str, Any]) -> None:
        """Make this the folder of a run: of one model with one set of options.

        Raises ConfigError where it cannot be written or is that of another run, and what differs.
        """
        try:
            if all(name.startswith('_') for name in self.names()):
                self.write(RUN_FILE, json.dumps(run, indent=1).encode())
            known = self.fs.cat_file(self.path(RUN_FILE)) if self.has(RUN_FILE) else None
        # Each storage has errors of its own.
        except Exception as error:
            raise ConfigError(f'--out {self.url} cannot be used: {in_one_line(error)}') from error
        if known is None:
            raise ConfigError(
                f'--out {self.url} has other files than those of such a run; take an empty folder'
            )
        known = json.loads(known)
        differing = [key for key in {**known, **run} if known.get(key) != run.get(key)]
        if differing:
            lines = [f'{key}: {known.get(key)}, now {run.get(key)}' for key in differing]
            raise ConfigError(
                f'--out {self.url} has results of another model or other options; take another '
                'folder, or those again:\n  ' + '\n  '.join(lines)
            )
