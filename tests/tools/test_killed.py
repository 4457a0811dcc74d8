"""tools/train.py killed, asked to leave, out of space, out of numbers: what a user is left with."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import kill_and_resume
import pytest
import torch
from fuzzing import IS_THOROUGH
from tiny import write_tiny_config
from tool_process import TOOLS, Started

# Until SIGTERM comes.
LONG = 'train_cfg = dict(max_iters=10000, val_interval=10000)\n'


@pytest.mark.slow
def test_killed_at_random_moments(shapes, tmp_path):
    """One kill; with ``FUZZ=1`` 24 of all models, as docs/reliability.md says."""
    kills = 24 if IS_THOROUGH else 1
    trainings = kill_and_resume.run(tmp_path, shapes, kills, random.Random(0))
    assert sum(training['kills'] for training in trainings) == kills
    assert not any(training['differences'] for training in trainings)


def await_steps(work_dir: Path, is_alive: Callable[[], bool]) -> None:
    """Wait for the first steps of a training."""
    end = time.monotonic() + 300
    while len(kill_and_resume.steps(work_dir)) < 2:
        assert is_alive() and time.monotonic() < end
        time.sleep(0.05)


def test_sigterm_saves_and_has_an_exit_code_of_its_own(shapes, tmp_path, run_tool):
    """A scheduler sends it to all processes of a job, the loader's workers included."""
    config = write_tiny_config(
        tmp_path, 'fpn', shapes, LONG + "train_dataloader['num_workers'] = 2\n"
    )
    command = [TOOLS / 'train.py', config, '--work-dir', 'run']
    process = Started(tmp_path, command, own_group=True)
    await_steps(tmp_path / 'run', process.is_alive)
    os.killpg(process.pid, signal.SIGTERM)
    done = process.wait()
    assert done.returncode == 75, done.stderr[-3000:]
    assert 'Traceback' not in done.stderr
    assert 'preempted.pth; continue with --resume' in done.stderr
    step = torch.load(tmp_path / 'run' / 'preempted.pth', weights_only=False)['meta']['iter']
    options = ['--cfg-options', f'train_cfg.max_iters={step + 1}']
    resumed = run_tool('train.py', config, '--work-dir', 'run', '--resume', *options)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert kill_and_resume.steps(tmp_path / 'run')[-1] == step + 1


def test_sigterm_in_two_processes(shapes, tmp_path):
    config = write_tiny_config(tmp_path, 'fpn', shapes, LONG)
    process = subprocess.Popen(
        [TOOLS / 'dist_train.sh', config, '2', '--work-dir', tmp_path / 'run'],
        env={**os.environ, 'PYTHON': sys.executable},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    await_steps(tmp_path / 'run', lambda: process.poll() is None)
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 75, errors[-3000:]
    assert (tmp_path / 'run' / 'preempted.pth').is_file()


def test_a_loss_that_is_nan_ends_in_one_message(tiny_config, run_tool, tmp_path):
    options = ['--cfg-options', 'optim_wrapper.optimizer.lr=1e30', 'train_cfg.max_iters=9']
    done = run_tool('train.py', tiny_config('fpn'), '--work-dir', 'run', *options)
    assert done.returncode == 1
    assert 'Traceback' not in done.stderr
    assert 'loss_ce is nan' in done.stderr and 'train_0' in done.stderr
    for path in (tmp_path / 'run').glob('*.pth'):
        tensors = torch.load(path, weights_only=False)['state_dict'].values()
        assert all(tensor.isfinite().all() for tensor in tensors)


@pytest.fixture
def small_disk(tmp_path) -> list[str]:
    """What to put before a command so that ``tmp_path / 'small'`` is a disk of 8 MB for it."""
    (tmp_path / 'small').mkdir()
    mount = f'mount -t tmpfs -o size=8m none {tmp_path / "small"} && exec "$@"'
    prefix = ['unshare', '--user', '--map-root-user', '--mount', 'sh', '-c', mount, 'sh']
    if sys.platform != 'linux' or subprocess.run([*prefix, 'true'], capture_output=True).returncode:
        pytest.skip('this machine lets nobody but root mount a file system')
    return prefix


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_good_checkpoint(small_disk, shapes, tmp_path):
    """Checkpoints of a megabyte, of which all are kept: some fit, then none does."""
    extra = (
        'train_cfg = dict(max_iters=50, val_interval=100)\n'
        "default_hooks['checkpoint'] = dict(interval=1, max_keep_ckpts=-1)\n"
    )
    config = write_tiny_config(tmp_path, 'fpn', shapes, extra)
    folder = tmp_path / 'small' / 'run'
    train = ' '.join(kill_and_resume.command(config, folder))
    # The disk is gone with the command, so what is on it is looked at by the same.
    script = f'{train} || {{ echo "code $?"; cp -r {folder} {tmp_path}/left; }}'
    done = subprocess.run([*small_disk, 'sh', '-c', script], capture_output=True, text=True)
    assert 'code 1' in done.stdout, done.stderr[-3000:]
    assert ': No space left on device. Checkpoints in' in done.stderr
    assert 'Traceback' not in done.stderr
    left = tmp_path / 'left'
    assert not list(left.glob('*.partial'))
    saved = sorted(int(path.stem.removeprefix('iter_')) for path in left.glob('iter_*.pth'))
    assert saved == list(range(1, len(saved) + 1)) and saved
    for step in saved:
        checkpoint = torch.load(left / f'iter_{step}.pth', weights_only=False)
        assert checkpoint['meta']['iter'] == step


FAKE_SRUN = """\
#!/usr/bin/env bash
printf '%s\\n' "$*" >> "$CALLS"
[ -z "${SAVED:-}" ] || touch "$PREEMPTION_NOTE"
exit "${CODE:-0}"
"""
FAKE_SCONTROL = """\
#!/usr/bin/env bash
if [ "$1" = show ]; then echo "JobId=$3 JobState=$STATE"; else echo "$*" >> "$CALLS"; fi
"""


@pytest.fixture
def slurm(tmp_path):
    """Runs slurm_train.sh with a SLURM that writes down what it is asked for."""
    for name, text in (('srun', FAKE_SRUN), ('scontrol', FAKE_SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(**environment: str) -> tuple[int, list[str]]:
        path = f'{tmp_path}:{os.environ["PATH"]}'
        calls = {'CALLS': str(tmp_path / 'calls'), 'STATE': 'RUNNING', **environment}
        done = subprocess.run(
            [TOOLS / 'slurm_train.sh', 'gpu', 'job', 'config.py'],
            env={**os.environ, 'PATH': path, **calls},
            cwd=tmp_path,
            capture_output=True,
        )
        assert not list(tmp_path.glob('.preempted*'))
        return done.returncode, (tmp_path / 'calls').read_text().splitlines()

    return run


def test_slurm_requeues_what_was_saved(slurm):
    code, calls = slurm(SAVED='1', CODE='143', SLURM_JOB_ID='17', GPUS='16')
    assert code == 75
    assert '--signal=TERM@120' in calls[0] and '--ntasks 16 --ntasks-per-node 8' in calls[0]
    assert calls[0].endswith('config.py --launcher slurm')
    assert calls[1:] == ['requeue 17']


@pytest.mark.parametrize(
    ('environment', 'code'),
    [
        ({'SLURM_JOB_ID': '17', 'SLURM_RESTART_COUNT': '1'}, 0),
        ({'CODE': '1', 'SLURM_JOB_ID': '17'}, 1),
        ({'CODE': '75', 'SAVED': '1'}, 75),
        ({'CODE': '75', 'SAVED': '1', 'SLURM_JOB_ID': '17', 'STATE': 'CANCELLED'}, 75),
    ],
    ids=['its turn again', 'an error', 'outside a batch job', 'cancelled'],
)
def test_slurm_requeues_nothing_else_and_resumes_a_requeued_job(environment, code, slurm):
    ended, calls = slurm(**environment)
    assert ended == code
    assert len(calls) == 1
    assert ('--resume' in calls[0]) == ('SLURM_RESTART_COUNT' in environment)
