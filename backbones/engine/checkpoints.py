"""Checkpoints: write them whole or not at all, find the newest good one, resume a training."""

import os
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

from mmengine.config import Config, ConfigDict
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import Hook
from mmengine.runner import Runner

from backbones.efficientformer_v2.checkpoint_keys import check_nan, tensors_of
from backbones.errors import CheckpointError, ConfigError
from backbones.files import atomic_write
from backbones.weights import are_checkpoints_trusted, config_of, read_checkpoint

# The best and the published checkpoints have no optimizer, so they cannot be resumed.
RESUMABLE = ('iter_*.pth', 'epoch_*.pth', 'preempted.pth')
# A file in the work folder: when a new training was started there. Resuming removes it.
STARTED = 'started'
DURABLE = {'backend': 'durable'}


class DurableBackend(LocalBackend):
    """mmengine's storage of local files, which are written whole or not at all.

    mmengine removes an old checkpoint before it writes a new one. Here the old one stays until the
    new one is on the disk.
    """

    _to_remove: ClassVar[set[Path]] = set()

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write a file; on an error existing files stay unchanged."""
        path = Path(filepath)
        write_durably(path, obj)
        self._to_remove.discard(path)
        while self._to_remove:
            self._to_remove.pop().unlink(missing_ok=True)

    def remove(self, filepath: str | Path) -> None:
        """Remove a file as soon as the next one is written."""
        self._to_remove.add(Path(filepath))


register_backend('durable', DurableBackend, force=True)


def write_durably(path: Path, content: bytes) -> None:
    """Write a file that survives a power failure right after the call."""
    with atomic_write(path) as partial, partial.open('wb') as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    # The file's name is stored in its folder, which has to reach the disk as well.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def checkpoint_folder(config: Config) -> str:
    """Return the folder that mmengine's CheckpointHook writes to."""
    work_dir = os.path.abspath(config.work_dir)
    out_dir = (config.get('default_hooks', {}).get('checkpoint') or {}).get('out_dir')
    return os.path.join(out_dir, os.path.basename(work_dir)) if out_dir else work_dir


def remove_partial_checkpoints(config: Config) -> None:
    """Remove half-written files of a training that was killed."""
    for partial in Path(checkpoint_folder(config)).glob('*.pth.*.partial'):
        partial.unlink(missing_ok=True)


def newest_checkpoint(config: Config) -> tuple[Path, dict, list[str]] | None:
    """Find the newest checkpoint that can be resumed.

    Returns the file, its content, and why newer ones were skipped; None if there is no checkpoint.
    Raises CheckpointError if none can be resumed.
    """
    reasons = []
    for path in candidates(config):
        try:
            return path, read_resumable(path), reasons
        except CheckpointError as error:
            reasons.append(str(error))
    if reasons:
        raise CheckpointError(
            f'none of the {len(reasons)} checkpoints can be resumed:\n  ' + '\n  '.join(reasons)
        )
    return None


def candidates(config: Config) -> list[Path]:
    """List a training's checkpoints: the one that ``last_checkpoint`` names, then newest first."""
    noted, folder = [], Path(checkpoint_folder(config))
    note = Path(config.work_dir, 'last_checkpoint')
    if note.is_file() and (name := note.read_text().strip()):
        # In a moved or copied work folder, the path is still the old one.
        noted = [path for path in (folder / Path(name).name, Path(name)) if path.is_file()][:1]
        folder = noted[0].parent if noted else folder
    found = {path for glob in RESUMABLE for path in folder.glob(glob)}
    found -= {*noted}
    return noted + sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def read_resumable(path: Path) -> dict:
    """Read a checkpoint; raise CheckpointError if no training can continue from it."""
    try:
        checkpoint = read_checkpoint(path)
        # torch does not verify the checksums that it wrote.
        with zipfile.ZipFile(path) as archive:
            corrupt = archive.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        # torch raises OSError for some truncated files.
        raise CheckpointError(f'checkpoint {path} cannot be read: {error}') from error
    if corrupt:
        raise CheckpointError(f'checkpoint {path} is corrupt: the checksum of {corrupt} differs')
    # A buffer may have NaN by design, and buffers are not known here: the user can skip the check.
    if not are_checkpoints_trusted():
        check_nan(tensors_of(checkpoint), f'checkpoint {path} (--trust-checkpoint resumes it)')
    missing = [key for key in ('optimizer', 'message_hub') if key not in checkpoint]
    if missing:
        raise CheckpointError(
            f'checkpoint {path} cannot be resumed: it has no {" and no ".join(missing)}. Resume '
            'an iter_*.pth or epoch_*.pth, which are saved at intervals, or start a new training '
            f'from its weights: --cfg-options load_from={path}'
        )
    return checkpoint


class StartHook(Hook):
    """Notes when a new training starts in its work folder, for :func:`refuse_earlier`."""

    # Not earlier: a start that fails must not change the training before it.
    def before_train(self, runner: Runner) -> None:
        note = Path(runner.work_dir, STARTED)
        if runner._resume:
            note.unlink(missing_ok=True)
        else:
            # Saved in every checkpoint, also after resuming.
            runner.message_hub.update_info(STARTED, runner.timestamp)
            note.write_text(runner.timestamp)


def refuse_earlier(path: Path, checkpoint: dict, work_dir: str) -> None:
    """Raise ConfigError if a newer training was started that the checkpoint is not from."""
    note = Path(work_dir, STARTED)
    started = note.read_text() if note.is_file() else ''
    if started and checkpoint['message_hub'].get('runtime_info', {}).get(STARTED) != started:
        raise ConfigError(
            f'--resume: {path} is of an earlier training: at {started} a new one was started in '
            f'{work_dir}, and it has no checkpoint to resume. --resume {path} continues the '
            'earlier one; without --resume the new one starts again'
        )


def schedule_of(config: Config) -> tuple:
    """Return the settings that mmengine takes from the checkpoint, not the config, on resuming."""
    schedule, length = config.get('param_scheduler'), config.get('train_cfg') or {}
    parts = schedule if isinstance(schedule, list) else [schedule]
    # Schedules without an end last as long as the training.
    is_open = any(isinstance(part, dict) and 'end' not in part for part in parts)
    end = is_open and (length.get('max_epochs'), length.get('max_iters'))
    return (config.get('optim_wrapper') or {}).get('optimizer'), schedule, end


def resume(config: Config, source: str) -> None:
    """Set a config to continue from a checkpoint, with the seed of its training.

    ``source`` is a file, or 'auto' for the newest readable one in the work folder; if there is
    none, the training starts from the beginning. ``started_from`` keeps the config's ``load_from``.
    """
    if source != 'auto':
        path = Path(source)
        if not path.is_file():
            raise ConfigError(f'--resume: there is no checkpoint {path}')
        checkpoint = read_resumable(path)
    elif newest := newest_checkpoint(config):
        path, checkpoint, reasons = newest
        for reason in reasons:
            print(f'--resume: skipped: {reason}')
        refuse_earlier(path, checkpoint, config.work_dir)
    else:
        print(f'--resume: no checkpoint in {config.work_dir} yet, starting from the beginning')
        config.resume = False
        return
    config.started_from = config.get('load_from')
    config.resume, config.load_from = True, str(path)
    meta = checkpoint.get('meta') or {}
    # A saved config that is more than plain data cannot be compared.
    with suppress(CheckpointError):
        if schedule_of(config_of({'meta': meta}) or config) != schedule_of(config):
            print(
                f'--resume: optimizer and schedule stay as in {path}; the config has others. To '
                'use those of the config, start a new training from the weights: '
                f'--cfg-options load_from={path}'
            )
    seed = meta.get('seed')
    if seed is not None:
        randomness = config.get('randomness', {})
        if randomness.get('seed') not in (None, seed):
            print(f'--resume: the seed stays {seed}, as at the start of this training')
        config.randomness = ConfigDict({**randomness, 'seed': seed})
