"""The folder of Parquet files with the results, local or in a storage; its files are complete."""

import json
from pathlib import Path
from typing import Any

import fsspec

from backbones.errors import ConfigError, in_one_line
from backbones.files import atomic_write, write_bytes
from backbones.inference.inputs import find_scheme

# When pandas and Spark read a folder, they skip names that begin with _ or a dot.
RUN_FILE, INPUTS_FOLDER = '_run.json', '_inputs'


class Destination:
    """A folder, local or in any storage that fsspec supports, where files appear whole."""

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
        """Return the path of a file in the folder, for the folder's file system."""
        return f'{self.root}/{name}'

    def names(self, folder: str = '') -> list[str]:
        """Return the sorted names of the finished files in the folder, or in a subfolder."""
        path = self.path(folder).rstrip('/')
        # Other processes may have added files since the last listing.
        self.fs.invalidate_cache()
        if not self.fs.isdir(path):
            return []
        found = self.fs.ls(path, detail=False)
        names = (name.rstrip('/').rpartition('/')[2] for name in found)
        return sorted(name for name in names if not name.startswith('.'))

    def write(self, name: str, content: bytes) -> None:
        """Write a file, whole or not at all."""
        if self.is_local:
            write_bytes(Path(self.path(name)), content)
        else:
            # In an object storage, the file appears only when the request has ended.
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

        Raises ConfigError if it cannot be written, or is another run's, and says what differs.
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
                f'--out {self.url} has files that no such run wrote; use an empty folder'
            )
        known = json.loads(known)
        differing = [key for key in {**known, **run} if known.get(key) != run.get(key)]
        if differing:
            lines = [f'{key}: {known.get(key)}, now {run.get(key)}' for key in differing]
            raise ConfigError(
                f'--out {self.url} has results of another model or other options; use another '
                'folder, or the same model and options:\n  ' + '\n  '.join(lines)
            )
