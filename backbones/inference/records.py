"""What a run has done with each input: one line of JSON for each in ``predictions.jsonl``.

It is what a later run goes on from, so a line is there only when the files that it names are.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from backbones.checkpoint_file import written_whole
from backbones.engine.errors import ConfigError

FILE_NAME = 'predictions.jsonl'
# One for each process; they become one file when all have finished.
PART_PATTERN = 'predictions.part*.jsonl'


class RecordFile:
    """Takes a line for each input as soon as it is done.

    Args:
        folder: The output folder.
        rank: Number of this process.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self._file = (folder / PART_PATTERN.replace('*', str(rank))).open('w', encoding='utf-8')

    def write(self, record: dict[str, Any]) -> None:
        """Add a line and see to it that it is in the file."""
        self._file.write(json.dumps(record, ensure_ascii=False) + '\n')
        self._file.flush()

    def close(self) -> None:
        """Write no more."""
        self._file.close()


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """What earlier runs have said of each input, whether or not they came to their end.

    Raises:
        ConfigError: There is a file of that name which is not ours.
    """
    records = {}
    for path in (folder / FILE_NAME, *sorted(folder.glob(PART_PATTERN))):
        if not path.exists():
            continue
        lines = path.read_text(encoding='utf-8').splitlines()
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
        The records.
    """
    records = read_records(folder)
    this_run = dict.fromkeys(inputs)
    order = [*(name for name in records if name not in this_run), *this_run]
    merged = {name: records[name] for name in order if name in records}
    with written_whole(folder / FILE_NAME) as temporary:
        temporary.write_text(
            ''.join(json.dumps(record, ensure_ascii=False) + '\n' for record in merged.values()),
            encoding='utf-8',
        )
    for part in folder.glob(PART_PATTERN):
        os.remove(part)
    return merged
