"""Inputs, split into units; each unit becomes one file of results."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from backbones.errors import ConfigError, in_one_line
from backbones.inference.inputs import (
    MEDIA_SUFFIXES,
    VIDEO_SUFFIXES,
    find_scheme,
    is_live,
    iterate_inputs,
    lines_of,
)

from .destination import INPUTS_FOLDER, Destination

# Usual names in published datasets for the columns with paths and with encoded images.
PATH_COLUMNS = ('path', 'file_name', 'filename', 'image_path', 'file', 'url')
BYTES_COLUMNS = ('bytes', 'image', 'content', 'image_bytes', 'jpg', 'png')
# Rows of a Parquet file that are in memory at a time.
BATCH_ROWS = 16


class Unit(NamedTuple):
    """Some inputs: a row group of a Parquet file."""

    # Its path or URL; for the destination's own lists, the path below the destination.
    file: str
    row_group: int
    num_inputs: int

    @property
    def part(self) -> str:
        """The name of the file with the results, the same in every run."""
        digest = hashlib.sha256(f'{self.file}#{self.row_group}'.encode()).hexdigest()
        return f'part-{digest[:16]}.parquet'


def list_units(source: str, destination: Destination, images_per_unit: int) -> list[Unit]:
    """Return all units of a source, and of earlier runs into the same destination.

    New paths are added to the destination's lists, so that a unit has the same inputs in every run.
    If Parquet files hold the images themselves, their row groups are the units.
    """
    if is_live(source):
        raise ConfigError(f'{source} is live and has no end; use tools/infer.py for it')
    paths = list_paths(source, destination)
    if all(path.lower().endswith('.parquet') for path in paths):
        if find_columns(open_parquet(paths[0]).schema_arrow, paths[0])[1]:
            return [unit for path in paths for unit in _units_in(path, path)]
        paths = _absolute(path for file in paths for path in _read_paths(file))
    _add_paths(paths, destination, images_per_unit)
    files = [f'{INPUTS_FOLDER}/{name}' for name in destination.names(INPUTS_FOLDER)]
    return [unit for file in files for unit in _units_in(file, f'{destination.url}/{file}')]


def list_paths(source: str, destination: Destination) -> list[str]:
    """Return the full paths that a file, folder, glob, URL or list (.txt) stands for."""
    if source.endswith('.txt'):
        try:
            with fsspec.open(source, 'rt', encoding='utf-8') as file:
                paths = lines_of(file)
        # Each storage has errors of its own.
        except Exception as error:
            raise ConfigError(f'{source} cannot be read: {in_one_line(error)}') from error
        if not paths:
            raise ConfigError(f'{source} has no paths in it')
        return _absolute(paths)
    listed = list(iterate_inputs(source, recursive=True))
    for item in listed:
        if item.problem:
            raise ConfigError(f'{item.shown} {item.problem}')
    paths = _absolute(item.path for item in listed)
    if any(item.found for item in listed):
        paths = _choose(paths, destination)
    if not paths:
        raise ConfigError(f'{source} has no files but the results in {destination.url}')
    return paths


def _absolute(paths: Iterable[str]) -> list[str]:
    """Return absolute paths, valid for processes in any folder."""
    return [path if find_scheme(path) else os.path.abspath(path) for path in paths]


def _choose(found: Sequence[str], destination: Destination) -> list[str]:
    """Return the files named as images or videos; if there are none, Parquet files, else all.

    Files in the destination, which are results, are left out.
    """
    root, fs = destination.root, destination.fs
    own = os.path.abspath(root) if destination.is_local else fs.unstrip_protocol(root)
    found = [path for path in found if not path.startswith(f'{own}/')]
    for kind, suffixes in (('images or videos', MEDIA_SUFFIXES), ('Parquet', '.parquet')):
        if chosen := [path for path in found if path.lower().endswith(suffixes)]:
            if num_others := len(found) - len(chosen):
                print(f'left out, since not named as {kind}: {num_others}')
            return chosen
    return found


def read_unit(unit: Unit, destination: Destination) -> Iterator[pa.Table]:
    """Yield the inputs of a unit, a few at a time, with the columns that Predictor needs."""
    is_listed = unit.file.startswith(f'{INPUTS_FOLDER}/')
    file = open_parquet(f'{destination.url}/{unit.file}' if is_listed else unit.file)
    path_column, bytes_column = find_columns(file.schema_arrow, unit.file)
    columns = [column for column in (path_column, bytes_column) if column]
    start = sum(file.metadata.row_group(k).num_rows for k in range(unit.row_group))
    for batch in file.iter_batches(BATCH_ROWS, [unit.row_group], columns):
        rows = pa.array([f'{unit.file}/{start + row}' for row in range(len(batch))], pa.string())
        start += len(batch)
        table = {'path': batch[path_column] if path_column else rows}
        if bytes_column:
            table['bytes'] = batch[bytes_column]
            if pa.types.is_struct(table['bytes'].type):
                # As in Hugging Face's datasets; a path in it is at most a file name.
                table['bytes'] = pc.struct_field(table['bytes'], 'bytes')
            table['path'] = pc.coalesce(table['path'], rows)
        yield pa.table(table)


def find_columns(schema: pa.Schema, file: str) -> tuple[str | None, str | None]:
    """Return the columns with paths and with encoded images; ConfigError if there is neither."""
    path = next((name for name in PATH_COLUMNS if name in schema.names), None)
    kinds = {name: schema.field(name).type for name in BYTES_COLUMNS if name in schema.names}
    image = next((name for name, kind in kinds.items() if _has_bytes(kind)), None)
    if path is None and image is None:
        raise ConfigError(
            f'{file} has no column with paths ({", ".join(PATH_COLUMNS)}) or with encoded images '
            f'({", ".join(BYTES_COLUMNS)}); it has {", ".join(schema.names)}'
        )
    return path, image


def _has_bytes(kind: pa.DataType) -> bool:
    # Hugging Face's datasets have structs.
    if pa.types.is_struct(kind):
        return kind.get_field_index('bytes') >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


# A footer of thousands of row groups takes a while to read.
@lru_cache(maxsize=4)
def open_parquet(file: str) -> pq.ParquetFile:
    """Open a Parquet file by its path or URL."""
    try:
        return pq.ParquetFile(fsspec.open(file, 'rb').open())
    except Exception as error:
        raise ConfigError(f'{file} cannot be read: {in_one_line(error)}') from error


def _units_in(name: str, file: str) -> Iterator[Unit]:
    metadata = open_parquet(file).metadata
    for number in range(metadata.num_row_groups):
        yield Unit(name, number, metadata.row_group(number).num_rows)


def _read_paths(file: str) -> list[str]:
    parquet = open_parquet(file)
    column = find_columns(parquet.schema_arrow, file)[0]
    return [path for path in parquet.read([column])[column].to_pylist() if path]


def _add_paths(paths: Sequence[str], destination: Destination, images_per_unit: int) -> None:
    """Add new paths to the destination's lists; each video is a unit of its own."""
    names = destination.names(INPUTS_FOLDER)
    known = {
        path for name in names for path in _read_paths(f'{destination.url}/{INPUTS_FOLDER}/{name}')
    }
    # Each once, in order; file names need not be valid text.
    texts = (os.fsencode(path).decode(errors='backslashreplace') for path in paths)
    new = [path for path in dict.fromkeys(texts) if path not in known]
    if not new:
        return
    with TemporaryDirectory() as folder:
        file = Path(folder, 'inputs.parquet')
        schema = pa.schema({'path': pa.string()})
        with pq.ParquetWriter(file, schema) as writer:
            for unit in _split(new, images_per_unit):
                writer.write_table(pa.table({'path': unit}, schema))
        destination.commit(file, f'{INPUTS_FOLDER}/{len(names):04d}.parquet')


def _split(paths: Sequence[str], images_per_unit: int) -> Iterator[list[str]]:
    videos = [path for path in paths if path.lower().endswith(VIDEO_SUFFIXES)]
    images = [path for path in paths if not path.lower().endswith(VIDEO_SUFFIXES)]
    yield from ([video] for video in videos)
    for start in range(0, len(images), images_per_unit):
        yield images[start : start + images_per_unit]
