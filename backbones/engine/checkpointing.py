"""Checkpoints that are written whole or not at all, and the newest of them that can be read."""

import errno
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from mmengine.fileio import LocalBackend, register_backend

from backbones.efficientformer_v2.checkpoint_keys import check_nan, tensors_of
from backbones.errors import CheckpointError
from backbones.files import atomic_write
from backbones.weights import are_checkpoints_trusted, read_checkpoint

# What a training saves at intervals; the best and the published ones cannot be resumed.
SAVED_AT_INTERVALS = ('iter_*.pth', 'epoch_*.pth', 'preempted.pth')
FULL = (errno.ENOSPC, errno.EDQUOT)
DURABLE = {'backend': 'durable'}


class DurableBackend(LocalBackend):
    """mmengine's local files, of which none is lost while another one is written.

    A file takes its place when it is whole and on the disk. mmengine removes an old checkpoint
    before it writes a new one; here the old one stays until the new one is there.
    """

    _to_remove: ClassVar[set[Path]] = set()

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write a file whole or not at all.

        Raises:
            CheckpointError: It cannot be written; what was there before is as it was.
        """
        path = Path(filepath)
        try:
            write_durably(path, obj)
        except OSError as error:
            raise CheckpointError(
                f'checkpoint {path} could not be written: {error.strerror}. Earlier checkpoints in '
                f'{path.parent} are as they were: go on from the newest with --resume'
            ) from error
        self._to_remove.discard(path)
        while self._to_remove:
            self._to_remove.pop().unlink(missing_ok=True)

    def remove(self, filepath: str | Path) -> None:
        """Remove a file as soon as the next one is written."""
        self._to_remove.add(Path(filepath))


register_backend('durable', DurableBackend, force=True)


def write_durably(path: Path, content: bytes) -> None:
    """Write a file that is there whole even if the machine fails in the next moment.

    Raises:
        OSError: It cannot be written; what was there before is as it was.
    """
    with atomic_write(path) as partial, partial.open('wb') as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    # The name is a matter of the folder, which has to reach the disk as well.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove_partial_checkpoints(work_dir: str | Path) -> None:
    """Remove what was being written when an earlier training was killed."""
    for partial in Path(work_dir).glob('*.pth.*.partial'):
        partial.unlink(missing_ok=True)


def newest_checkpoint(work_dir: str | Path) -> tuple[Path, dict, list[str]] | None:
    """The newest checkpoint of a training that can be read and resumed.

    Args:
        work_dir: Where the training wrote ``last_checkpoint``.

    Returns:
        The file, what it holds, and why each newer one was passed over; None where there is no
        checkpoint at all.

    Raises:
        CheckpointError: There are checkpoints, and none can be resumed.
    """
    reasons = []
    for path in candidates(Path(work_dir)):
        try:
            return path, read_resumable(path), reasons
        except CheckpointError as error:
            reasons.append(str(error))
    if reasons:
        raise CheckpointError(
            f'none of the {len(reasons)} checkpoints in {work_dir} can be resumed:\n  '
            + '\n  '.join(reasons)
        )
    return None


def candidates(work_dir: Path) -> list[Path]:
    """The checkpoints of a training, the newest first: that which was noted last, then by age."""
    noted, folder = [], work_dir
    note = work_dir / 'last_checkpoint'
    if note.is_file() and (name := note.read_text().strip()):
        # After a move of the work folder the note still has the old one.
        noted = [path for path in (Path(name), work_dir / Path(name).name) if path.is_file()][:1]
        folder = noted[0].parent if noted else folder
    found = {path for pattern in SAVED_AT_INTERVALS for path in folder.glob(pattern)}
    others = {path for path in found if not any(path.samefile(other) for other in noted)}
    return noted + sorted(others, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def read_resumable(path: Path) -> dict:
    """Read a checkpoint that a training can go on from.

    Raises:
        CheckpointError: It cannot be read, or holds a model, but not its training.
    """
    try:
        checkpoint = read_checkpoint(path)
        # torch reads tensors without comparing them with the checksums that it wrote.
        with zipfile.ZipFile(path) as archive:
            spoilt = archive.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        # What torch makes of some files that are cut short.
        raise CheckpointError(f'checkpoint {path} cannot be read: {error}') from error
    if spoilt:
        raise CheckpointError(f'checkpoint {path} is damaged: the checksum of {spoilt} differs')
    # Which of them are weights is not known here, so that there has to be a way past it.
    if not are_checkpoints_trusted():
        check_nan(tensors_of(checkpoint), f'checkpoint {path} (--trust-checkpoint resumes it)')
    missing = [key for key in ('optimizer', 'message_hub') if key not in checkpoint]
    if missing:
        raise CheckpointError(
            f'checkpoint {path} cannot be resumed: it has no {" and no ".join(missing)}, as '
            'the best and the published ones have not. Resume one of those that are saved at '
            'intervals (iter_*.pth, epoch_*.pth), or start from it: --cfg-options load_from=...'
        )
    return checkpoint


@contextmanager
def explain_full_disk(work_dir: str) -> Iterator[None]:
    """Say that a disk is full, whatever was being written to it: logs, curves.

    Raises:
        CheckpointError: It was full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise CheckpointError(
            f'{error.filename or work_dir} could not be written: {error.strerror}. Checkpoints in '
            f'{work_dir} are as they were: make space, and go on from the newest with --resume'
        ) from error
