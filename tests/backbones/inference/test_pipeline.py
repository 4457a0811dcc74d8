"""The background map keeps order, stays bounded, hands errors on and can be stopped."""

import itertools
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from backbones.inference import pipeline
from backbones.inference.inputs import Input
from backbones.inference.pipeline import Overlapped, Pipeline
from backbones.inference.reading import Frame, Stream


@pytest.fixture
def executor():
    with ThreadPoolExecutor(3) as pool:
        yield pool


def test_results_come_in_order_though_calls_end_out_of_order(executor):
    def slow_for_even(number: int) -> int:
        time.sleep(0.01 * (number % 2 == 0))
        return number * 10

    assert list(Overlapped(slow_for_even, range(20), executor, 5)) == [n * 10 for n in range(20)]


def test_it_never_draws_far_ahead(executor):
    drawn = []

    def items():
        for number in range(100):
            drawn.append(number)
            yield number

    overlapped = Overlapped(lambda number: number, items(), executor, ahead=4)
    for taken in range(1, 10):
        next(overlapped)
        time.sleep(0.01)
        # One more may have been drawn that waits for room.
        assert len(drawn) <= taken + 5
    overlapped.close()
    assert len(drawn) < 20


def test_frames_of_a_camera_are_not_old_when_they_come_out():
    """Each step has one at most, however many others it takes."""
    model = SimpleNamespace(
        preprocess=lambda image: {'inputs': image},
        predict=lambda batch: batch,
        postprocess=lambda raw, size: raw,
    )
    image, captured = np.zeros((6, 8, 3), np.uint8), []
    stream = Stream(Input('webcam:0'), 'live', 8, 6, live=object())

    def items():
        for index in range(100):
            captured.append(index)
            yield Frame(stream.input, image.nbytes, image, None, stream, index)

    finished = Pipeline(model, batch_size=8).run(items())
    for frame in itertools.islice(finished, 10):
        time.sleep(0.02)
        assert captured[-1] - frame.index <= 4
    finished.close()
    assert len(captured) < 20


def test_frames_larger_than_the_budget_are_alone(monkeypatch):
    monkeypatch.setattr(pipeline, 'IMAGE_BUDGET', 4)
    image, preprocessed = np.zeros((6, 8, 3), np.uint8), []
    model = SimpleNamespace(
        preprocess=lambda image: preprocessed.append(image) or {'inputs': image},
        predict=lambda batch: batch,
        postprocess=lambda raw, size: raw,
    )
    finished = Pipeline(model).run(Frame(Input('a'), 2**30, image) for _ in range(9))
    for number in range(1, 4):
        next(finished)
        time.sleep(0.02)
        assert len(preprocessed) == number
    # One waits for memory.
    finished.close()
    assert len(preprocessed) <= 4


@pytest.mark.parametrize('where', ['items', 'function'])
def test_errors_come_where_the_result_would(executor, where):
    def items():
        yield from (1, 2)
        if where == 'items':
            raise KeyError('third')
        yield 3

    def function(number: int) -> int:
        if number == 3:
            raise KeyError('third')
        return number

    overlapped = Overlapped(function, items(), executor, 2)
    assert next(overlapped) == 1
    assert next(overlapped) == 2
    with pytest.raises(KeyError, match='third'):
        next(overlapped)


def test_what_is_ready_does_not_wait(executor):
    gate = threading.Event()

    def items():
        yield 1
        gate.wait()
        yield 2

    overlapped = Overlapped(lambda number: number, items(), executor, 5)
    assert next(overlapped) == 1
    assert not overlapped.is_next_ready()
    gate.set()
    assert next(overlapped) == 2
    with pytest.raises(StopIteration):
        next(overlapped)
    assert not overlapped.is_next_ready()


# A program that ends while the model runs on what it did not wait for.
OPEN_AT_EXIT = """
import time
from types import SimpleNamespace

import numpy as np
import torch

from backbones.inference.inputs import Input
from backbones.inference.pipeline import Pipeline
from backbones.inference.reading import Frame


def predict(batch):
    for _ in range(20):
        torch.nn.functional.conv2d(torch.rand(1, 32, 128, 128), torch.rand(32, 32, 3, 3))
    return batch


model = SimpleNamespace(
    preprocess=lambda image: {'inputs': image},
    predict=predict,
    postprocess=lambda raw, size: raw,
)
frames = (Frame(Input('a'), 3, np.zeros((1, 1, 3), np.uint8)) for _ in range(50))
results = Pipeline(model).run(frames)
next(results)
"""


def test_a_program_may_end_before_the_results():
    done = subprocess.run([sys.executable, '-c', OPEN_AT_EXIT], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, '')
