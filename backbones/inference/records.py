"""What a run has done with each input: one line of JSON for each in ``predictions.jsonl``.

It is what a later run goes on from: an input is 'pending' until its files are there, and so keeps
its name even if the process is killed between the two.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from backbones.errors import ConfigError, OutputError, raise_output_errors
from backbones.files import atomic_write

from .inputs import Input

FILE_NAME = 'predictions.jsonl'
# One for each process; they become one file when all have finished.
PART_PATTERN = 'predictions.part*.jsonl'
# Names that are no text have bytes in them which only JSON's escapes can say.
ENCODING = {'encoding': 'utf-8', 'errors': 'backslashreplace'}


class RecordFile:
    """Takes a line for each input as soon as it is done.

    Args:
        folder: The output folder.
        jobs: The inputs of this process, pending for now.
        rank: Number of this process.

    Raises:
        ConfigError: There can be no such file.
        OutputError: Nothing can be written any more. From here on, and from all methods.
    """

    def __init__(self, folder: Path, jobs: Iterable[Input], rank: int = 0) -> None:
        path = folder / PART_PATTERN.replace('*', str(rank))
        pending = [{'input': job.shown, 'name': job.name, 'status': 'pending'} for job in jobs]
        try:
            with raise_output_errors():
                self._file = path.open('w', **ENCODING)
                self._file.writelines(map(line_of, pending))
                self._file.flush()
        except OutputError:
            raise
        except OSError as error:
            raise ConfigError(f'{path} cannot be written: {error.strerror}') from error

    def write(self, record: dict[str, Any]) -> None:
        """Add a line and see to it that it is in the file."""
        with raise_output_errors():
            self._file.write(line_of(record))
            self._file.flush()

    def close(self) -> None:
        """Write no more."""
        with raise_output_errors():
            self._file.close()


def line_of(record: dict[str, Any]) -> str:
    """A record as a line of the file."""
    return json.dumps(record, ensure_ascii=False) + '\n'


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """What earlier runs have said of each input, whether or not they came to their end.

    Raises:
        ConfigError: There is a file of that name which is not ours.
    """
    records = {}
    for path in (folder / FILE_NAME, *sorted(folder.glob(PART_PATTERN))):
        if not path.exists():
            continue
        # Not as text: a process that was killed may have left half a letter as well.
        lines = path.read_bytes().splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                records[record['input']] = record
            except (ValueError, KeyError, TypeError) as error:
                # A process that was killed leaves half a line at the end.
                if number < len(lines):
                    raise ConfigError(
                        f'{path}, line {number}, was not written by this tool; take another '
                        '--out-dir'
                    ) from error
    return records


def merge_records(folder: Path, inputs: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Bring all there is into one file, in the order of the inputs.

    Args:
        folder: The output folder.
        inputs: The inputs of this run. What earlier runs said of others comes before them.

    Returns:
        The records, without those of files that were left out.

    Raises:
        OutputError: Nothing can be written. What there is stays as it is.
    """
    records = read_records(folder)
    this_run = dict.fromkeys(inputs)
    order = [*(name for name in records if name not in this_run), *this_run]
    merged = {
        name: records[name]
        for name in order
        if name in records and records[name]['status'] != 'left out'
    }
    with raise_output_errors(), atomic_write(folder / FILE_NAME) as temporary:
        temporary.write_text(''.join(map(line_of, merged.values())), **ENCODING)
    for part in folder.glob(PART_PATTERN):
        os.remove(part)
    return merged
