"""What tools compute and measure on a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from tiny import ROOT, draw_shapes, write_tiny_config
from trained_tiny import write_trained
from videos import write_video

SEARCH = 'search = dict(necks=(8, 16), holdout=1 / 3)\n'


def run(folder: Path, tool: str, *arguments: object, on_gpu: bool = True) -> str:
    """Run a tool in a process of its own; returns what it printed."""
    hidden = {} if on_gpu else {'CUDA_VISIBLE_DEVICES': ''}
    done = subprocess.run(
        [sys.executable, str(ROOT / 'tools' / tool), *map(str, arguments)],
        env={**os.environ, **hidden},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope='module', params=['fpn', 'mask_rcnn'])
def trained(request, tmp_path_factory, shapes) -> tuple[str, Path, Path]:
    """A task, a config and a checkpoint."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, *write_trained(folder, request.param, shapes)


def test_metrics_are_those_of_a_cpu(trained, tmp_path):
    _, *files = trained
    for name, on_gpu in (('gpu', True), ('cpu', False)):
        run(tmp_path, 'test.py', *files, '--out', f'{name}.json', on_gpu=on_gpu)
    found, expected = (json.loads((tmp_path / f'{n}.json').read_text()) for n in ('gpu', 'cpu'))
    for name, value in expected.items():
        if not name.endswith('time'):
            # Percent, or parts of one.
            tolerance = 0.02 if name.startswith('coco') else 1
            assert found[name] == pytest.approx(value, abs=tolerance, nan_ok=True), name


@pytest.mark.parametrize('options', [[], ['--amp'], ['--batch-size', 4], ['--tile', 128]], ids=str)
def test_a_video_is_drawn_as_on_a_cpu(trained, options, tmp_path):
    _, *files = trained
    write_video(tmp_path / 'clip.mp4', frames=8)
    for name, more in (('gpu', options), ('cpu', ['--device', 'cpu', *options])):
        more = [option for option in more if name == 'gpu' or option != '--amp']
        run(tmp_path, 'infer.py', *files, 'clip.mp4', '--out-dir', name, '--score-thr', 0, *more)
    drawn = []
    for name in ('gpu', 'cpu'):
        (path,) = (tmp_path / name).rglob('*.mp4')
        video = cv2.VideoCapture(str(path))
        images = [video.read()[1].astype(int) for _ in range(8)]
        assert not video.read()[0]
        drawn.append(np.stack(images))
    different = (np.abs(drawn[0] - drawn[1]).max(axis=-1) > 60).mean()
    # In half precision other boxes may have the highest scores: weights are random.
    assert different < (0.5 if '--amp' in options else 0.05)


def test_benchmark_measures_time_and_memory(shapes, tmp_path):
    config, _ = write_trained(tmp_path, 'fpn', shapes)
    options = ['--sizes', '128x128', '--batch', 1, 4, '--train', '--seconds', 0.1]
    run(tmp_path, 'benchmark.py', config, *options, '--out-dir', 'out')
    found = json.loads((tmp_path / 'out' / 'benchmark.json').read_text())
    assert found['machine']['gpu'] == torch.cuda.get_device_name()
    peaks = [each['peak_memory_mib'] for each in found['results']]
    assert all(peak > 0 for peak in peaks)
    # Of a larger batch, more.
    assert max(peaks) > 1.2 * min(peaks)


def test_a_search_measures_and_trains(tmp_path):
    shapes = draw_shapes(tmp_path / 'shapes', train=24, val=3)
    config = write_tiny_config(tmp_path, 'fpn', shapes, SEARCH)
    quick = ('--size', '64x96', '--rounds', 1, '--seconds', 0, '--networks', 12)
    run(tmp_path, 'search.py', 'latency', config, '--work-dir', 'out', *quick)
    model = json.loads((tmp_path / 'out' / 'latency_torch.json').read_text())
    assert all(each['ms'] > 0 for each in model['networks'])
    for options in ([], ['--amp']):
        run(tmp_path, 'train.py', config, '--seed', 0, '--work-dir', f'net{len(options)}', *options)
        assert (tmp_path / f'net{len(options)}' / 'iter_2.pth').is_file()
