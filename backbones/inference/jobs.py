"""Which inputs are to be worked on, and what their results are called."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from backbones.errors import ConfigError

from .data_files import CATEGORIES_NAME
from .inputs import Input
from .names import output_stems
from .records import FILE_NAME, read_records

OUTPUT_FOLDERS = ('drawn', 'data')
Earlier = Literal['refuse', 'overwrite', 'skip']


def plan_jobs(
    listed: Sequence[Input],
    folder: Path,
    earlier: Earlier,
    wanted: Sequence[str] = OUTPUT_FOLDERS,
) -> tuple[list[Input], int]:
    """Name the results of all inputs, and leave out what an earlier run has finished.

    An input keeps its name from run to run, and nothing that belongs to another input, or to
    nobody known here, is written over.

    Args:
        listed: The inputs.
        folder: The output folder; need not be there.
        earlier: What to do where an earlier run has results in the folder: 'refuse' to work,
            'overwrite' them, or 'skip' inputs that are done.
        wanted: Which of 'drawn' and 'data' an input needs to be done. Default: both.

    Returns:
        The inputs that are to be worked on, and how many were skipped.

    Raises:
        ConfigError: There are results in the folder, and ``earlier`` is 'refuse'; or a file of
            somebody else has the name of one of ours.
    """
    records = read_records(folder)
    if not records and earlier != 'overwrite' and (folder / CATEGORIES_NAME).exists():
        raise ConfigError(
            f'{folder / CATEGORIES_NAME} is not from an earlier run: take another --out-dir, or '
            '--overwrite it'
        )
    if records and earlier == 'refuse':
        raise ConfigError(
            f'{folder / FILE_NAME} has the results of an earlier run: --skip-existing goes on '
            'with what is not done yet, --overwrite does everything again, --out-dir takes '
            'another folder'
        )
    known = {name: record['name'] for name, record in records.items() if 'name' in record}
    new = [item for item in listed if item.shown not in known]
    taken = {*known.values(), *existing_stems(folder)}
    stems = iter(output_stems([item.name for item in new], taken))
    jobs = []
    for item in listed:
        shown = item.shown
        stem = known[shown] if shown in known else next(stems)
        if earlier == 'overwrite' or not is_done(records.get(shown), folder, wanted):
            jobs.append(replace(item, name=stem))
    return jobs, len(listed) - len(jobs)


def is_done(record: dict | None, folder: Path, wanted: Sequence[str]) -> bool:
    """Whether an input was finished, and the files that are wanted are there."""
    if record is None or record.get('status') != 'done':
        return False
    return all(key in record and (folder / record[key]).exists() for key in wanted)


def existing_stems(folder: Path) -> set[str]:
    """Names, without endings, of what lies in the output folders."""
    return {
        path.relative_to(folder / part).with_suffix('').as_posix()
        for part in OUTPUT_FOLDERS
        for path in (folder / part).rglob('*')
        if path.is_file() or path.suffix == '.frames'
    }
