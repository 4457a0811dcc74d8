"""tools/batch_infer.py on this machine: results of infer.py, once each, whatever is killed."""

import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from trained_tiny import write_trained
from videos import truncate, write_video

from backbones.errors import ConfigError
from backbones.inference import Inferencer

pytest.importorskip('ray', reason='requirements/scale.txt is not installed')
import pyarrow.dataset

from backbones.batch_inference.job import plan

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def folder(tmp_path_factory, shapes) -> Path:
    """A model, and inputs of all kinds: images, videos, and some that are corrupt."""
    folder = tmp_path_factory.mktemp('batch')
    write_trained(folder, 'mask_rcnn', shapes)
    (folder / 'in' / 'deep').mkdir(parents=True)
    for number in range(6):
        image = np.random.default_rng(number).integers(0, 256, (64, 96, 3), np.uint8)
        cv2.imwrite(str(folder / 'in' / 'deep' / f'{number}.jpg'), image)
    write_video(folder / 'in' / 'whole.mp4', 12)
    truncate(write_video(folder / 'in' / 'cut.mkv', 12), 0.7)
    (folder / 'in' / 'bad.png').write_bytes(b'nothing')
    return folder


def read(out: Path) -> list[dict]:
    return pyarrow.dataset.dataset(out, format='parquet').to_table().to_pylist()


def test_results_of_infer(folder, run_tool, tmp_path):
    """The second run finds the results of the first."""
    model = [folder / 'saved_mask_rcnn.py', folder / 'mask_rcnn.pth']
    command = ['batch_infer.py', *model, folder / 'in', '--out', tmp_path / 'out']
    options = ['--images-per-file', 3, '--score-thr', 0, '--every', 2, '--draw', '--actors', 1]
    process = run_tool(*command, *options)
    assert process.returncode == 3, process.stderr
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / 'out').glob('part-*')}
    assert len(before) == 5
    process = run_tool(*command, *options)
    assert process.returncode == 0, process.stderr
    assert '9 inputs, 9 done earlier' in process.stdout
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / 'out').glob('part-*')}
    assert after == before

    rows = {
        (row['path'], row['frame'], row['problem'] is None): row for row in read(tmp_path / 'out')
    }
    expected = list(Inferencer(*model, score_thr=0)(folder / 'in' / 'deep'))
    assert len(expected) == 6
    for result in expected:
        row = rows[result.source, None, True]
        np.testing.assert_array_equal(np.float32(row['boxes']), result.prediction.boxes)
        assert row['masks'] == [one['segmentation'] for one in result.to_coco()]
    frames = {Path(path).name: [] for path, *_ in rows}
    for path, frame, is_good in rows:
        frames[Path(path).name].append(frame if is_good else 'problem')
    assert frames['whole.mp4'] == [0, 2, 4, 6, 8, 10]
    assert frames['bad.png'] == ['problem']
    assert frames['cut.mkv'][0] == 0
    assert frames['cut.mkv'][-1] == 'problem'
    assert len(frames) == 9
    drawn = tmp_path / 'out' / '_drawn'
    for result in expected[:2]:
        found = next(drawn.rglob(Path(result.source).name))
        encoded = cv2.imencode('.jpg', result.draw())[1]
        assert found.read_bytes() == encoded.tobytes()
    assert len(list(drawn.rglob('whole.mp4/*.jpg'))) == 6

    process = run_tool(*command, *options, '--every', 3)
    assert process.returncode == 1
    assert '"every": 2' in process.stderr


@pytest.mark.slow
def test_killed_at_random(tmp_path):
    """Processes with the model, and the command; docs/scale.md has the same with 100,000 images."""
    command = [sys.executable, TESTS / 'kill_batch_infer.py', '--images', 400, '--kills', 2]
    command += ['--images-per-file', 20, '--seed', 2, '--folder', tmp_path]
    process = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=500)
    assert process.returncode == 0, process.stdout + process.stderr
    assert 'killed' in process.stdout


@pytest.mark.parametrize('arguments', ['a', 'a b c d', 'a b c --actors 4:2'])
def test_a_wrong_command_line(arguments, run_tool):
    assert run_tool('batch_infer.py', *arguments.split(), '--out', 'out').returncode == 2


def test_a_source_that_is_none(folder, run_tool, tmp_path):
    model = [folder / 'saved_mask_rcnn.py', folder / 'mask_rcnn.pth']
    process = run_tool('batch_infer.py', *model, tmp_path / 'no', '--out', 'out')
    assert process.returncode == 1
    assert str(tmp_path / 'no') in process.stderr


def test_without_ray(call_tool, monkeypatch):
    monkeypatch.setitem(sys.modules, 'ray', None)
    code, said = call_tool('batch_infer.py', 'a', 'b', 'c', '--out', 'out')
    assert code == 1 and 'requirements/scale.txt' in said


def test_slurm_starts_ray_on_each_machine(tmp_path):
    """With a SLURM that runs what it is given, and a Python that says what it was to run."""
    for name, text in (
        ('srun', 'echo "$@"; while [ "$1" != bash ]; do shift; done; exec "$@"'),
        ('scontrol', 'printf "first\\nsecond\\n"'),
        ('python', 'echo "$@"'),
    ):
        (tmp_path / name).write_text(f'#!/usr/bin/env bash\n{text}\n')
        (tmp_path / name).chmod(0o755)
    script = TESTS.parent / 'tools' / 'slurm_batch_infer.sh'
    done = subprocess.run(
        [script, 'gpu', 'job', 'config.py', 'model.pth', 'my images', '--out', 'out'],
        env={
            **os.environ,
            'PATH': f'{tmp_path}:{os.environ["PATH"]}',
            'PYTHON': str(tmp_path / 'python'),
            'SLURM_JOB_NODELIST': 'machines',
            'NODES': '2',
            'GPUS_PER_NODE': '4',
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert '--nodes 2 --ntasks-per-node 1 --gres gpu:4' in done.stdout
    started = done.stdout.splitlines()[-1]
    assert '--address first:6379 --min-nodes 2 -- ' in started
    command = 'batch_infer.py config.py model.pth my images --out out --address first:6379'
    assert started.endswith(command)


@pytest.mark.parametrize(
    ('machines', 'resources', 'options', 'actors'),
    [
        ([{'CPU': 8.0}], dict(), dict(num_cpus=1, num_gpus=0.0), (8, 8)),
        ([{'CPU': 8.0}], dict(cpus=3), dict(num_cpus=3, num_gpus=0.0), (2, 2)),
        ([{'CPU': 64.0, 'GPU': 4.0}], dict(), dict(num_cpus=16, num_gpus=1.0), (4, 4)),
        ([{'CPU': 64.0, 'GPU': 4.0}], dict(gpus=0.5), dict(num_cpus=8, num_gpus=0.5), (8, 8)),
        ([{'CPU': 64.0, 'GPU': 4.0}], dict(gpus=0), dict(num_cpus=1, num_gpus=0), (64, 64)),
        ([{'CPU': 2.0}], dict(actors=(1, 50)), dict(num_cpus=1, num_gpus=0.0), (1, 50)),
        ([{}], dict(may_grow=True, gpus=1, actors=(1, 50)), dict(num_cpus=1, num_gpus=1), (1, 50)),
        # A process has to fit into one machine.
        (
            [{'CPU': 16.0}, *[{'CPU': 16.0, 'GPU': 1.0}] * 4],
            dict(),
            dict(num_cpus=16, num_gpus=1.0),
            (4, 4),
        ),
        (
            [{'CPU': 64.0, 'GPU': 1.0}, {'CPU': 8.0, 'GPU': 1.0}],
            dict(),
            dict(num_cpus=8, num_gpus=1.0),
            (2, 2),
        ),
    ],
)
def test_what_processes_get(machines, resources, options, actors):
    assert plan(machines, 100, **resources) == (options, actors)
    assert plan(machines, 1, **resources)[1] == (1, 1)


@pytest.mark.parametrize(
    ('machines', 'resources'),
    [
        ([{'CPU': 4.0}] * 2, dict(cpus=8)),
        ([{'CPU': 4.0, 'GPU': 1.0}] * 2, dict(gpus=2)),
        # Our own cluster does not grow.
        ([{'CPU': 4.0}], dict(gpus=0.5, actors=(4, 64))),
    ],
)
def test_no_room_for_a_process(machines, resources):
    with pytest.raises(ConfigError, match='4 cores'):
        plan(machines, 100, **resources)
