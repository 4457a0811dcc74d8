"""Checkpoints are written whole or not at all, and the newest good one is found."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.fileio import get_file_backend

from backbones import CheckpointError
from backbones.engine import checkpoints
from backbones.engine.checkpoints import (
    newest_checkpoint,
    remove_partial_checkpoints,
    resume,
)
from backbones.errors import ConfigError, OutputError, raise_output_errors


def save(path: Path, age: int, **more: object) -> Path:
    """A checkpoint that can be resumed, as old as ``age`` seconds."""
    content = {'state_dict': {'x': torch.rand(20_000)}, 'optimizer': {}, 'message_hub': {}, **more}
    torch.save(content, path)
    os.utime(path, (10**9 - age, 10**9 - age))
    return path


def run_in(folder: Path) -> Config:
    return Config({'work_dir': str(folder)})


def flip_bits(content: bytes) -> bytes:
    middle = len(content) // 2
    flipped = bytes(byte ^ 0xFF for byte in content[middle : middle + 64])
    return content[:middle] + flipped + content[middle + 64 :]


CORRUPTIONS = {
    'truncated': lambda content: content[: len(content) // 2],
    'cut a little': lambda content: content[:-700],
    'empty': lambda content: b'',
    'bits flipped': flip_bits,
    # What a machine leaves that failed before a file reached its disk.
    'zeros in the last block': lambda content: content[:-4096] + bytes(4096),
    'deleted': None,
}


@pytest.mark.parametrize('corrupt', CORRUPTIONS.values(), ids=CORRUPTIONS)
def test_a_corrupt_newest_is_passed_over(corrupt: Callable | None, tmp_path):
    good = save(tmp_path / 'iter_8.pth', age=20)
    save(tmp_path / 'iter_4.pth', age=30)
    newest = save(tmp_path / 'iter_12.pth', age=10)
    (tmp_path / 'last_checkpoint').write_text(str(newest))
    if corrupt is None:
        newest.unlink()
    else:
        newest.write_bytes(corrupt(newest.read_bytes()))
    path, checkpoint, reasons = newest_checkpoint(run_in(tmp_path))
    assert path == good and 'optimizer' in checkpoint
    assert len(reasons) == (0 if corrupt is None else 1)
    assert all('iter_12.pth' in reason for reason in reasons)


@pytest.mark.parametrize(
    ('note', 'expected'),
    [
        # The folder still has a longer training, of which a copy is younger.
        ('{tmp_path}/iter_8.pth\n', 'iter_8.pth'),
        ('', 'iter_12.pth'),
        # As of a folder that was moved, or copied.
        ('elsewhere/iter_8.pth', 'iter_8.pth'),
        ('{tmp_path}/elsewhere/iter_8.pth', 'iter_8.pth'),
        ('elsewhere/iter_9.pth', 'iter_12.pth'),
    ],
)
def test_the_note_counts_more_than_age(note, expected, tmp_path):
    save(tmp_path / 'iter_8.pth', age=20)
    save(tmp_path / 'iter_12.pth', age=10)
    (tmp_path / 'elsewhere').mkdir()
    save(tmp_path / 'elsewhere/iter_8.pth', age=20)
    (tmp_path / 'last_checkpoint').write_text(note.format(tmp_path=tmp_path))
    assert newest_checkpoint(run_in(tmp_path))[0] == tmp_path / expected


@pytest.mark.parametrize('note', ['', 'disk/run/iter_12.pth'])
def test_checkpoints_of_another_disk_are_found_without_the_noted_one(note, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hook = {'checkpoint': {'type': 'CheckpointHook', 'out_dir': 'disk'}}
    config = Config({'work_dir': 'work_dirs/run', 'default_hooks': hook})
    for folder in (Path(config.work_dir), Path('disk/run')):
        folder.mkdir(parents=True)
    Path(config.work_dir, 'last_checkpoint').write_text(note)
    newest = save(Path('disk/run/iter_8.pth'), age=10)
    resume(config, 'auto')
    assert config.resume and Path(config.load_from).samefile(newest)


def test_the_best_checkpoint_is_none_to_resume(tmp_path):
    save(tmp_path / 'best_mIoU_iter_8.pth', age=10)
    assert newest_checkpoint(run_in(tmp_path)) is None
    assert newest_checkpoint(run_in(tmp_path / 'nowhere')) is None


@pytest.mark.parametrize(
    ('started', 'saved', 'taken'),
    [
        (None, '20260101_120000', True),
        ('20260101_120000', '20260101_120000', True),
        # Whatever the clocks said: they may have gone back, or be those of another time zone.
        ('20260101_120000', '20251231_235959', False),
        ('20260101_120000', '20260101_200000', False),
        ('20260101_120000', None, False),
    ],
)
def test_an_earlier_training_of_the_folder_is_not_taken_for_the_last(
    started, saved, taken, tmp_path
):
    """It would end with the results of another config; a new start would cost those that exist."""
    info = {checkpoints.STARTED: saved} if saved else {}
    path = save(tmp_path / 'iter_8.pth', age=10, message_hub={'runtime_info': info})
    if started:
        (tmp_path / checkpoints.STARTED).write_text(started)
    config = run_in(tmp_path)
    if taken:
        resume(config, 'auto')
    else:
        with pytest.raises(ConfigError, match=f'--resume {path}'):
            resume(config, 'auto')
        resume(config, str(path))
    assert config.resume and config.load_from == str(path)


@pytest.mark.parametrize(
    ('saved', 'said'),
    [
        ('optim_wrapper = dict(optimizer=dict(lr=0.1))\nparam_scheduler = [dict(end=2)]', False),
        ('optim_wrapper = dict(optimizer=dict(lr=0.2))\nparam_scheduler = [dict(end=2)]', True),
        ('optim_wrapper = dict(optimizer=dict(lr=0.1))\nparam_scheduler = [dict(end=4)]', True),
        ('param_scheduler = [dict(end=range(4))]', False),
        ('', False),
    ],
)
def test_another_schedule_than_that_of_the_checkpoint_is_said(saved, said, tmp_path, capsys):
    path = save(tmp_path / 'iter_8.pth', age=10, meta={'cfg': saved})
    config = Config({'optim_wrapper': {'optimizer': {'lr': 0.1}}, 'param_scheduler': [{'end': 2}]})
    resume(config, str(path))
    assert (f'load_from={path}' in capsys.readouterr().out) == said


@pytest.mark.parametrize(('end', 'said'), [({}, True), ({'end': 8}, False)])
def test_a_schedule_without_an_end_is_another_in_a_longer_training(end, said, tmp_path, capsys):
    schedule = {'param_scheduler': [{'type': 'PolyLR', **end}]}
    saved = Config(schedule | {'train_cfg': {'max_iters': 8}})
    path = save(tmp_path / 'iter_8.pth', age=10, meta={'cfg': saved.pretty_text})
    resume(Config(schedule | {'train_cfg': {'max_iters': 16}}), str(path))
    assert (f'load_from={path}' in capsys.readouterr().out) == said


def test_the_seed_is_the_checkpoints_and_the_rest_of_randomness_stays(tmp_path):
    path = save(tmp_path / 'iter_8.pth', age=10, meta={'seed': 5})
    config = Config({'randomness': {'diff_rank_seed': True}})
    resume(config, str(path))
    assert config.randomness == {'diff_rank_seed': True, 'seed': 5}


def test_only_corrupt_ones_are_no_reason_to_start_anew(tmp_path):
    save(tmp_path / 'iter_8.pth', age=10).write_bytes(b'PK')
    torch.save({'state_dict': {'x': torch.ones(1)}}, tmp_path / 'epoch_1.pth')
    with pytest.raises(CheckpointError) as refused:
        newest_checkpoint(run_in(tmp_path))
    assert 'none of the 2 checkpoints' in str(refused.value)
    assert 'iter_8.pth' in str(refused.value) and 'no optimizer' in str(refused.value)


def fail(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize('function', ['fsync', 'replace'])
def test_what_cannot_be_written_leaves_everything_as_it_was(function, tmp_path, monkeypatch):
    backend = get_file_backend(str(tmp_path), backend_args=checkpoints.DURABLE)
    old, oldest = tmp_path / 'iter_8.pth', tmp_path / 'iter_4.pth'
    for path in (old, oldest):
        backend.put(b'whole', str(path))
    # The first will be written again under its name.
    for path in (old, oldest):
        backend.remove(str(path))
    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match='No space left'):
        backend.put(b'new', str(old))
    assert sorted(path.name for path in tmp_path.iterdir()) == ['iter_4.pth', 'iter_8.pth']
    assert old.read_bytes() == b'whole'
    monkeypatch.undo()
    backend.put(b'new', str(old))
    assert old.read_bytes() == b'new'
    assert not oldest.exists(), 'removed once the next one is there'


def test_what_was_being_written_is_removed(tmp_path):
    (tmp_path / 'iter_8.pth.0123.partial').write_bytes(b'half')
    save(tmp_path / 'iter_4.pth', age=1)
    remove_partial_checkpoints(run_in(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ['iter_4.pth']


def test_a_disk_that_logs_have_filled_is_named():
    with (
        pytest.raises(OutputError, match=r'written to run/.*scalars\.json: No space.*resume'),
        raise_output_errors('; then resume'),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'run/vis_data/scalars.json')
    with pytest.raises(PermissionError), raise_output_errors():
        raise PermissionError(errno.EACCES, 'no')
