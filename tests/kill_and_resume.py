"""Kill a training with SIGKILL at random moments, resume it, and compare it with one left alone.

    python tests/kill_and_resume.py --kills 20 --seed 1

Half of the kills come at a random moment, the others while a checkpoint is being written. Three
kinds of training take turns, each killed a few times before it may end. What is compared, bit for
bit: weights, moving average, optimizer, schedule, every loss that was logged, best metric, and the
weights of the best checkpoint.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent

from tiny import ROOT, draw_shapes, write_tiny_config
from toy_training import differences, end_of

KILLS_A_TRAINING = 4
# How long a checkpoint may be awaited, and a training may take; only a hanging one reaches it.
PATIENCE = 300

SMALL_STEPS = """\
        default_hooks['checkpoint'] = dict(interval=3, max_keep_ckpts=2)
        custom_hooks = [dict(type='EMAHook', momentum=0.1)]
        """
KINDS = {
    'Semantic FPN, by iterations': ('fpn', """\
        train_cfg = dict(max_iters=24, val_interval=6)
        param_scheduler = [dict(type='PolyLR', power=0.9, begin=0, end=24, by_epoch=False)]
        train_dataloader['num_workers'] = 2
        """),
    'RetinaNet, by epochs': ('retinanet', """\
        train_cfg = dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=5, val_interval=2)
        param_scheduler = [dict(type='MultiStepLR', milestones=[2, 4], by_epoch=True)]
        train_dataloader['sampler'] = dict(type='DefaultSampler', shuffle=True)
        train_dataloader['batch_sampler'] = dict(type='AspectRatioBatchSampler')
        train_dataloader['num_workers'] = 1
        """),
    'Mask R-CNN, by iterations': ('mask_rcnn', """\
        train_cfg = dict(max_iters=12, val_interval=6)
        param_scheduler = [dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=12)]
        """),
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--kills', type=int, default=20)
    parser.add_argument('--seed', type=int, default=0, help='of the moments')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shapes = draw_shapes(Path(folder) / 'shapes')
        figures = run(Path(folder), shapes, args.kills, random.Random(args.seed))
    print(json.dumps(figures, indent=2))
    return 0 if not any(figure['differences'] for figure in figures) else 1


def run(folder: Path, shapes: Path, kills: int, moments: random.Random) -> list[dict]:
    """The figures of all trainings, killed ``kills`` times together."""
    kinds = [(name, *kind) for name, kind in KINDS.items()]
    seconds: dict[str, float] = {}
    figures = []
    while kills > 0:
        name, task, extra = kinds[len(figures) % len(kinds)]
        config = write_tiny_config(folder, task, shapes, dedent(extra) + dedent(SMALL_STEPS))
        alone, killed = folder / f'{task}_alone', folder / f'{task}_killed'
        if task not in seconds:
            seconds[task] = train_alone(config, alone)
        figure = Counter({'kills': 0, 'during a write': 0, 'steps done again': 0})
        for number in range(min(kills, KILLS_A_TRAINING)):
            figure.update(kill(config, killed, number, seconds[task], moments))
        train_alone(config, killed, '--resume')
        kills -= figure['kills']
        different = differences(end_of(alone), end_of(killed))
        figures.append({'training': name, **figure, 'differences': different})
        shutil.rmtree(killed)
    return figures


def command(config: Path, work_dir: Path, *options: str) -> list[str]:
    tool = [sys.executable, str(ROOT / 'tools' / 'train.py')]
    return [*tool, str(config), '--seed', '5', '--work-dir', str(work_dir), *options]


@contextmanager
def started(config: Path, work_dir: Path, *options: str) -> Iterator[subprocess.Popen]:
    """A training after its first step, or at its end where it has nothing to do."""
    before, end = len(steps(work_dir)), time.monotonic() + PATIENCE
    with (
        work_dir.with_suffix('.log').open('wb') as log,
        subprocess.Popen(
            command(config, work_dir, *options), stdout=log, stderr=log, start_new_session=True
        ) as process,
    ):
        while len(steps(work_dir)) <= before and process.poll() is None:
            if time.monotonic() > end:
                process.kill()
                raise RuntimeError(work_dir.with_suffix('.log').read_text()[-3000:])
            time.sleep(0.02)
        yield process


def train_alone(config: Path, work_dir: Path, *options: str) -> float:
    """Train to the end; returns how long that takes after the first step."""
    with started(config, work_dir, *options) as process:
        begin = time.monotonic()
        if process.wait(PATIENCE):
            raise RuntimeError(work_dir.with_suffix('.log').read_text()[-3000:])
    return time.monotonic() - begin


def kill(
    config: Path, work_dir: Path, number: int, seconds: float, moments: random.Random
) -> dict[str, int]:
    """Train, resuming where there is something, and kill it unless it comes to its end first."""
    with started(config, work_dir, '--resume') as process:
        if number % 2:
            await_write(process, work_dir, moments.randrange(2))
        else:
            time.sleep(moments.uniform(0, seconds / KILLS_A_TRAINING))
        if process.poll() is not None:
            return {}
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    saved = [int(path.stem.split('_')[-1]) for path in work_dir.glob('iter_*.pth')]
    lost = max(0, steps(work_dir)[-1] - max(saved, default=0))
    is_writing = any(work_dir.glob('*.partial'))
    return {'kills': 1, 'during a write': int(is_writing), 'steps done again': lost}


def await_write(process: subprocess.Popen, work_dir: Path, writes: int) -> None:
    """Wait until a checkpoint is being written, after having seen some whole."""
    seen = set()
    while process.poll() is None:
        with os.scandir(work_dir) as entries:
            seen.update(entry.name for entry in entries if entry.name.endswith('.partial'))
        if len(seen) > writes:
            return


def steps(work_dir: Path) -> list[int]:
    """The training steps that were logged, in the order of the log."""
    lines = []
    for log in sorted(work_dir.glob('*/vis_data/scalars.json')):
        # The last line of a killed training may be cut short.
        lines += [line for line in log.read_text().splitlines() if line.endswith('}')]
    return [entry['step'] for entry in map(json.loads, lines) if 'lr' in entry]


if __name__ == '__main__':
    sys.exit(main())
