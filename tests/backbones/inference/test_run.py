"""Runs with models that fail, with files that cannot be written, and in bounded memory."""

import threading
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from trained_tiny import write_trained
from videos import read_number, write_video

from backbones.inference import Clip, Inferencer, Segmentation, pipeline
from backbones.inference.drawing import Visualizer
from backbones.inference.inputs import Input
from backbones.inference.output import Writer
from backbones.inference.run import Run
from backbones.inference.video_reader import VideoReader

BRIGHT = 250
CLASSES = tuple('abcdefg')


class FakeModel:
    """Says that every pixel is of class 1; fails on bright images and on a numbered one."""

    task = 'segmentation'
    classes = CLASSES
    visualizer = Visualizer(CLASSES, [(40 * index, 90, 0) for index in range(len(CLASSES))])

    def __init__(self, bad_number: int | None = None) -> None:
        self.bad_number = bad_number

    def preprocess(self, image):
        is_bad = image.min() > BRIGHT or read_number(image) == self.bad_number
        return {'inputs': torch.zeros(3, *image.shape[:2]), 'is_bad': is_bad}

    def predict(self, batch):
        if any(item['is_bad'] for item in batch):
            raise RuntimeError('out of memory\nTried')
        return [None] * len(batch)

    def postprocess(self, raw, size):
        return Segmentation(np.ones(size, np.uint8))


def run_over(folder: Path, out: Path, model, batch_size: int = 1) -> Run:
    """A run over a folder, into another."""
    out.mkdir(exist_ok=True)
    jobs = [Input(str(path), path.stem) for path in sorted(folder.iterdir())]
    run = Run(model, Writer(out, model), Clip(), batch_size)
    run(jobs)
    return run


def write_gray(path: Path, level: int, size: tuple[int, int] = (40, 60)) -> None:
    cv2.imwrite(str(path), np.full((*size, 3), level, np.uint8))


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / 'in'
    path.mkdir()
    return path


@pytest.mark.parametrize('batch_size', [1, 4])
def test_an_image_that_the_model_fails_on_fails_alone(folder, tmp_path, batch_size):
    for name, level in (('a', 80), ('b', 255), ('c', 80), ('d', 80)):
        write_gray(folder / f'{name}.png', level)
    summary = run_over(folder, tmp_path / 'out', FakeModel(), batch_size)
    assert summary.counts['done'] == 3
    assert summary.failed == [(str(folder / 'b.png'), 'out of memory Tried')]
    written = sorted(path.name for path in (tmp_path / 'out' / 'data').iterdir())
    assert written == ['a.png', 'c.png', 'd.png']


def test_a_frame_that_the_model_fails_on_stays_in_the_video(folder, tmp_path):
    write_video(folder / 'clip.mp4', 8)
    out = tmp_path / 'out'
    summary = run_over(folder, out, FakeModel(bad_number=3))
    assert summary.failed == [(str(folder / 'clip.mp4'), 'frame 3: out of memory Tried')]
    with closing(VideoReader(out / 'drawn' / 'clip.mp4')) as reader:
        assert [frame.index for frame in reader] == list(range(8))
    names = sorted(path.name for path in (out / 'data' / 'clip.frames').iterdir())
    assert names == [f'{index:06d}.png' for index in range(8) if index != 3]


def test_a_file_that_cannot_be_written_fails_alone(folder, tmp_path):
    """A folder has the name of the drawing."""
    for name in 'ab':
        write_gray(folder / f'{name}.png', 80)
    (tmp_path / 'out' / 'drawn' / 'a.jpg').mkdir(parents=True)
    summary = run_over(folder, tmp_path / 'out', FakeModel())
    assert summary.counts['done'] == 1
    assert 'its results cannot be written: Is a directory' in summary.failed[0][1]


def test_a_video_whose_maps_cannot_be_written_fails_alone(folder, tmp_path):
    """A file has the name of the data folder."""
    write_video(folder / 'clip.mp4', 2)
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'data').touch()
    summary = run_over(folder, tmp_path / 'out', FakeModel())
    assert 'its results cannot be written' in summary.failed[0][1]
    assert (tmp_path / 'out' / 'drawn' / 'clip.mp4').is_file()


def test_images_in_the_pipeline_stay_within_the_budget(folder, tmp_path, monkeypatch):
    """The model waits for its first image until no more are read."""
    for number in range(40):
        write_gray(folder / f'{number}.png', 80)
    write_gray(folder / 'giant.png', 80, (1200, 1600))
    budget = 4
    monkeypatch.setattr(pipeline, 'IMAGE_BUDGET', budget)
    lock, counts = threading.Lock(), SimpleNamespace(now=0, most=0)
    budget_is_used = threading.Event()
    model = FakeModel()
    preprocess, predict, finish = model.preprocess, model.predict, Writer.finish

    def counted_preprocess(image):
        with lock:
            counts.now += 1
            counts.most = max(counts.most, counts.now)
            if counts.most == budget:
                budget_is_used.set()
        return preprocess(image)

    def counted_finish(writer, predicted):
        finish(writer, predicted)
        with lock:
            counts.now -= 1

    model.preprocess = counted_preprocess
    model.predict = lambda batch: budget_is_used.wait(60) and predict(batch)
    monkeypatch.setattr(Writer, 'finish', counted_finish)
    summary = run_over(folder, tmp_path / 'out', model)
    assert summary.counts['done'] == 41
    assert counts.most == budget


def test_an_image_of_64_megapixels(folder, tmp_path, shapes):
    side = 8_000
    Image.new('P', (side, side), 3).save(folder / 'huge.png')
    steps = [
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=(160, 160), keep_ratio=True),
        dict(type='PackSegInputs'),
    ]
    inferencer = Inferencer(
        *write_trained(tmp_path, 'fpn', shapes),
        cfg_options={'test_dataloader.dataset.pipeline': steps},
    )
    out = tmp_path / 'out'
    summary = run_over(folder, out, inferencer)
    assert summary.counts['done'] == 1 and not summary.failed
    Image.MAX_IMAGE_PIXELS, limit = None, Image.MAX_IMAGE_PIXELS
    try:
        with (
            Image.open(out / 'drawn' / 'huge.jpg') as drawn,
            Image.open(out / 'data' / 'huge.png') as data,
        ):
            assert drawn.width == side and drawn.height > side
            assert (data.mode, data.size) == ('P', (side, side))
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def test_an_image_that_is_too_thin_for_the_network_fails_alone(folder, tmp_path, shapes):
    write_gray(folder / 'line.png', 80, (1, 3000))
    write_gray(folder / 'image.png', 80)
    inferencer = Inferencer(*write_trained(tmp_path, 'retinanet', shapes))
    summary = run_over(folder, tmp_path / 'out', inferencer)
    assert summary.counts['done'] == 1
    assert [path for path, _ in summary.failed] == [str(folder / 'line.png')]
