"""Runs with models that fail, are slow or see pictures without end; where processes meet."""

import json
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from trained_tiny import write_trained
from videos import read_number, write_video

from backbones.errors import ConfigError
from backbones.inference import Clip, Inferencer, Segmentation, pipeline, reading, sharding
from backbones.inference.inputs import list_inputs
from backbones.inference.jobs import plan_jobs
from backbones.inference.progress import Progress
from backbones.inference.records import RecordFile, read_records
from backbones.inference.run import Run, Summary
from backbones.inference.video_reader import VideoReader
from backbones.inference.writing import Writer

BRIGHT = 250
CLASSES = tuple('abcdefg')


class FakeModel:
    """Says that every pixel is of class 1; fails on bright pictures and on numbered ones.

    Args:
        bad_number: The number of the picture that it fails on.
    """

    def __init__(self, bad_number: int | None = None) -> None:
        self.bad_number = bad_number

    def prepare(self, picture):
        is_bad = picture.min() > BRIGHT or read_number(picture) == self.bad_number
        return {'inputs': torch.zeros(3, *picture.shape[:2]), 'is_bad': is_bad}

    def predict(self, prepared):
        if any(item['is_bad'] for item in prepared):
            raise RuntimeError('out of memory\nTried to allocate')
        return [None] * len(prepared)

    def finish(self, raw, size):
        return Segmentation(np.ones(size, np.uint8))


def run_over(folder: Path, out: Path, model, batch_size: int = 1) -> Summary:
    """A run over a folder, into another."""
    out.mkdir(exist_ok=True)
    jobs, _ = plan_jobs(list_inputs([str(folder)], False, None), out, 'refuse')
    writer = Writer(out, CLASSES, [(40 * index, 90, 0) for index in range(len(CLASSES))])
    records = RecordFile(out, jobs)
    run = Run(model, writer, records, Clip(), batch_size, Progress(len(jobs)))
    summary = run(jobs, is_live=False)
    records.close()
    return summary


def write_grey(path: Path, level: int, size: tuple[int, int] = (40, 60)) -> None:
    cv2.imwrite(str(path), np.full((*size, 3), level, np.uint8))


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / 'in'
    path.mkdir()
    return path


@pytest.mark.parametrize('batch_size', [1, 4])
def test_a_picture_that_the_model_fails_on_fails_alone(folder, tmp_path, batch_size):
    for name, level in (('a', 80), ('b', 255), ('c', 80), ('d', 80)):
        write_grey(folder / f'{name}.png', level)
    summary = run_over(folder, tmp_path / 'out', FakeModel(), batch_size)
    assert summary.done == 3
    assert summary.failed == [(str(folder / 'b.png'), 'out of memory')]
    written = sorted(path.name for path in (tmp_path / 'out' / 'data').iterdir())
    assert written == ['a.png', 'c.png', 'd.png']


def test_a_frame_that_the_model_fails_on_stays_in_the_video(folder, tmp_path):
    write_video(folder / 'clip.mp4', 8)
    out = tmp_path / 'out'
    summary = run_over(folder, out, FakeModel(bad_number=3))
    assert summary.failed == [(str(folder / 'clip.mp4'), 'frame 3: out of memory')]
    (record,) = read_records(out).values()
    assert record['frames'] == 7
    with VideoReader(out / record['drawn']) as reader:
        assert [frame.index for frame in reader] == list(range(8))
    names = sorted(path.name for path in (out / record['data']).iterdir())
    assert names == [f'{index:06d}.png' for index in range(8) if index != 3]


def test_a_file_that_cannot_be_written_fails_alone(folder, tmp_path):
    """A folder has the name of the drawing."""
    for name in 'ab':
        write_grey(folder / f'{name}.png', 80)
    (tmp_path / 'out' / 'drawn' / 'a.jpg').mkdir(parents=True)
    summary = run_over(folder, tmp_path / 'out', FakeModel())
    assert summary.done == 1
    assert 'its results cannot be written: Is a directory' in summary.failed[0][1]


def test_names_as_long_as_file_systems_take(folder, tmp_path):
    long = 'ä' * 120
    for ending in ('1.png', '2.png'):
        write_grey(folder / f'{long}{ending}', 80)
    summary = run_over(folder, tmp_path / 'out', FakeModel())
    assert summary.done == 2 and not summary.failed
    assert len(list((tmp_path / 'out' / 'drawn').iterdir())) == 2


def test_pictures_under_way_stay_within_the_budget(folder, tmp_path, monkeypatch):
    """The model waits for its first picture until no more are read."""
    for number in range(40):
        write_grey(folder / f'{number}.png', 80)
    most = 4
    monkeypatch.setattr(pipeline, 'PICTURE_BUDGET', most * 2 * 40 * 60 * 3)
    lock, counts = threading.Lock(), {'now': 0, 'most': 0}
    budget_is_used = threading.Event()
    read, finish = reading.ImageFile.read, Writer.finish

    def counted_read(picture):
        with lock:
            counts['now'] += 1
            counts['most'] = max(counts['most'], counts['now'])
            if counts['most'] == most:
                budget_is_used.set()
        return read(picture)

    def counted_finish(writer, predicted):
        result = finish(writer, predicted)
        with lock:
            counts['now'] -= 1
        return result

    monkeypatch.setattr(reading.ImageFile, 'read', counted_read)
    monkeypatch.setattr(Writer, 'finish', counted_finish)
    model = FakeModel()
    predict = model.predict
    model.predict = lambda prepared: budget_is_used.wait(60) and predict(prepared)
    summary = run_over(folder, tmp_path / 'out', model)
    assert summary.done == 40
    assert counts['most'] == most


def test_a_picture_of_144_megapixels(folder, tmp_path, shapes):
    side = 12_000
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
    summary = run_over(folder, out, inferencer.model)
    assert summary.done == 1 and not summary.failed
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


def test_a_picture_that_is_too_thin_for_the_networks_size_fails_alone(folder, tmp_path, shapes):
    write_grey(folder / 'line.png', 80, (1, 3000))
    write_grey(folder / 'picture.png', 80)
    inferencer = Inferencer(*write_trained(tmp_path, 'retinanet', shapes))
    summary = run_over(folder, tmp_path / 'out', inferencer.model)
    assert summary.done == 1
    assert [path for path, _ in summary.failed] == [str(folder / 'line.png')]


class TestSlurm:
    @pytest.fixture(autouse=True)
    def step(self, monkeypatch) -> None:
        """The third of four processes that srun has started on two machines."""
        for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'):
            # Set first, so that what the function sets is taken back afterwards.
            monkeypatch.setenv(name, '')
            monkeypatch.delenv(name)
        monkeypatch.setenv('SLURM_PROCID', '2')
        monkeypatch.setenv('SLURM_LOCALID', '0')
        monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '4')
        monkeypatch.setenv('SLURM_STEP_NODELIST', 'gpu[07-08]')

    def test_the_first_machine_is_where_they_meet(self, monkeypatch, tmp_path):
        scontrol = tmp_path / 'scontrol'
        scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames gpu[07-08]" ] && echo gpu07 gpu08')
        scontrol.chmod(0o755)
        monkeypatch.setenv('PATH', f'{tmp_path}:/usr/bin:/bin')
        sharding.set_variables_from_slurm()
        names = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')
        values = [sharding.os.environ[name] for name in names]
        assert values == ['2', '4', '0', 'gpu07', sharding.DEFAULT_PORT]

    def test_an_address_of_ones_own(self, monkeypatch):
        monkeypatch.setenv('MASTER_ADDR', '10.0.0.7')
        monkeypatch.setenv('MASTER_PORT', '1234')
        sharding.set_variables_from_slurm()
        assert sharding.os.environ['MASTER_ADDR'] == '10.0.0.7'
        assert sharding.os.environ['MASTER_PORT'] == '1234'

    def test_no_scontrol(self, monkeypatch, tmp_path):
        monkeypatch.setenv('PATH', str(tmp_path))
        with pytest.raises(ConfigError, match='set MASTER_ADDR to its name'):
            sharding.connect()


class TestRecords:
    def test_a_strangers_file_is_not_taken_for_ours(self, tmp_path):
        (tmp_path / 'predictions.jsonl').write_text('{"image": 1}\n{"image": 2}\n')
        with pytest.raises(ConfigError, match='line 1, was not written by this tool'):
            read_records(tmp_path)

    def test_half_a_line_at_the_end_is_what_a_killed_process_leaves(self, tmp_path):
        whole = {'input': 'a', 'name': 'a', 'status': 'done'}
        (tmp_path / 'predictions.part0.jsonl').write_text(json.dumps(whole) + '\n{"input": "b')
        assert read_records(tmp_path) == {'a': whole}

    def test_half_a_letter_at_the_end_too(self, tmp_path):
        # U+2028 is the end of a line for Python's text files, but not for JSON.
        whole = {'input': 'stra\u2028ße', 'name': 'a', 'status': 'done'}
        lines = json.dumps(whole, ensure_ascii=False) + '\n{"input": "straß'
        (tmp_path / 'predictions.jsonl').write_bytes(lines.encode()[:-1])
        assert read_records(tmp_path) == {'stra\u2028ße': whole}

    def test_a_file_that_is_no_text_is_not_taken_for_ours(self, tmp_path):
        (tmp_path / 'predictions.jsonl').write_bytes(b'\xff\xfe\n{}\n')
        with pytest.raises(ConfigError, match='line 1, was not written by this tool'):
            read_records(tmp_path)


def test_drawings_are_added_to_data_that_were_made_alone(folder, tmp_path):
    out = tmp_path / 'out'
    write_grey(folder / 'a.png', 80)
    write_grey(folder / 'b.png', 255)
    listed = list_inputs([str(folder)], False, None)
    run_over(folder, out, FakeModel())
    done = len(listed) - len(plan_jobs(listed, out, 'skip')[0])
    assert done > 0
    for drawing in (out / 'drawn').iterdir():
        drawing.unlink()
    assert len(plan_jobs(listed, out, 'skip', ['data'])[0]) == len(listed) - done
    assert len(plan_jobs(listed, out, 'skip')[0]) == len(listed)
