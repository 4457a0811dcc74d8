"""Frames in, results out, in order: reading, the model and finishing work at the same time."""

import atexit
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from queue import Queue
from typing import Any, Protocol

import cv2
import numpy as np

from backbones.errors import in_one_line

from .reading import Frame
from .results import Detections, Segmentation

# MiB that all images in the pipeline, decoded and drawn, may take.
IMAGE_BUDGET = 1024

# Seconds to wait for a thread when the program ends; it may wait for an item that never comes.
EXIT_TIMEOUT = 3.0

# What a transform or the network may raise on an image that it cannot process, for example one so
# thin that nothing is left of it after resizing. InputError is a ValueError.
IMAGE_ERRORS = (ValueError, RuntimeError, MemoryError, cv2.error)


class Model(Protocol):
    """What a pipeline runs: a TorchModel, an ExportedModel or an Inferencer."""

    def preprocess(self, image: np.ndarray) -> dict[str, Any]: ...

    def predict(self, batch: list[dict[str, Any]]) -> list[Any]: ...

    def postprocess(self, raw: Any, size: tuple[int, int]) -> Detections | Segmentation: ...


class Pipeline:
    """Runs a model while other threads read, preprocess and finish, in order, in bounded memory.

    At most ``ahead`` frames are preprocessed before the model, and as many are finished after it;
    only one of a live source.
    """

    def __init__(self, model: Model, batch_size: int = 1) -> None:
        self.model = model
        self.batch_size = batch_size
        self.threads = max(2, min(8, os.cpu_count() or 1))
        self.ahead = 2 * batch_size + self.threads
        # Frames that the model and finishing processed, and the seconds of all threads for that.
        self.counts, self.seconds = Counter(), Counter()
        self._lock = threading.Lock()

    def run(
        self, items: Iterable, finish: Callable[[Frame], None] = lambda frame: None
    ) -> Generator[Any, None, None]:
        """Put the frames among ``items`` through the model; all items come out in order.

        ``finish`` is called for each frame, in several threads and out of order.
        """
        budget = threading.Semaphore(IMAGE_BUDGET)
        with ThreadPoolExecutor(self.threads, thread_name_prefix='frames') as executor:
            inputs = Overlapped(self._preprocess, _within(budget, items), executor, self.ahead)
            outputs = self._predict(inputs)
            finished = Overlapped(
                partial(self._finish, finish=finish), outputs, executor, self.ahead
            )

            def close(timeout: float | None = None) -> None:
                # In this order: no stage may wait for one that is closed already. Once stopped, one
                # more frame may wait for memory.
                inputs.stop()
                budget.release(IMAGE_BUDGET)
                inputs.close(timeout)
                finished.close(timeout)

            # If the program ends before this generator, a thread in torch's code would abort it.
            atexit.register(close, EXIT_TIMEOUT)
            try:
                for item in finished:
                    yield item
                    if isinstance(item, Frame):
                        budget.release(mib_of(item))
            finally:
                atexit.unregister(close)
                close()

    def rate(self, what: str) -> float:
        """Return frames per second; 0 before the first."""
        return self.counts[what] / self.seconds[what] if self.counts[what] else 0.0

    @contextmanager
    def _timed(self, what: str, count: int = 1) -> Iterator[None]:
        start = time.perf_counter()
        yield
        with self._lock:
            self.seconds[what] += time.perf_counter() - start
            self.counts[what] += count

    def _preprocess(self, frame: Any) -> Any:
        if isinstance(frame, Frame):
            frame.started = time.perf_counter()
            try:
                if frame.image is None:
                    frame.image = frame.load()
                frame.inputs = self.model.preprocess(frame.image)
            except IMAGE_ERRORS as error:
                frame.problem = in_one_line(error)
        return frame

    def _predict(self, items: 'Overlapped') -> Iterator[Any]:
        """Batch what is ready; nothing waits for a batch to fill."""
        batch: list[Frame] = []
        for item in items:
            joins = isinstance(item, Frame) and not item.problem
            if batch and not (
                joins and item.inputs['inputs'].shape == batch[0].inputs['inputs'].shape
            ):
                yield from self._predict_batch(batch)
                batch = []
            if not joins:
                yield item
                continue
            batch.append(item)
            if len(batch) == self.batch_size or not items.is_next_ready():
                yield from self._predict_batch(batch)
                batch = []

    def _predict_batch(self, batch: list[Frame]) -> Iterator[Frame]:
        try:
            with self._timed('model', len(batch)):
                raws = self.model.predict([frame.inputs for frame in batch])
        except IMAGE_ERRORS as error:
            if len(batch) > 1:
                # Memory may be short, or a single image at fault.
                for frame in batch:
                    yield from self._predict_batch([frame])
                return
            raws, batch[0].problem = [None], in_one_line(error)
        for frame, raw in zip(batch, raws, strict=True):
            frame.inputs, frame.raw = None, raw
            yield frame

    def _finish(self, frame: Any, finish: Callable[[Frame], None]) -> Any:
        if not isinstance(frame, Frame):
            return frame
        with self._timed('finishing'):
            try:
                if not frame.problem:
                    frame.prediction = self.model.postprocess(frame.raw, frame.image.shape[:2])
            except IMAGE_ERRORS as error:
                frame.problem = in_one_line(error)
            frame.raw = None
            finish(frame)
        return frame


class Overlapped:
    """``map(function, items)`` in the background: in order, and never far ahead of the reader.

    A thread takes ``items``, at most ``ahead`` more than the results that have been read. An
    exception of an item or a call is raised in place of its result.
    """

    def __init__(
        self, function: Callable[[Any], Any], items: Iterable, executor: Executor, ahead: int
    ) -> None:
        # None is the end.
        self._futures: Queue[Future | None] = Queue()
        self._ahead, self._room = ahead, threading.Semaphore(ahead)
        self._closed = threading.Event()
        draw = partial(self._draw, function, items, executor)
        self._thread = threading.Thread(target=draw, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> Any:
        if self._closed.is_set():
            raise StopIteration
        future = self._futures.get()
        if future is None:
            self.close()
            raise StopIteration
        result = future.result()
        self._room.release()
        return result

    def is_next_ready(self) -> bool:
        """Return whether the next result is there without waiting."""
        queue = self._futures.queue
        # Only one thread takes from the queue, so its first entry stays.
        return bool(queue) and queue[0] is not None and queue[0].done()

    def stop(self) -> None:
        """Take no more items, except one that is waited for."""
        self._closed.set()
        self._room.release(self._ahead)

    def close(self, timeout: float | None = None) -> None:
        """Take no more items, and wait until the thread has ended, at most ``timeout`` seconds."""
        self.stop()
        self._thread.join(timeout)

    def _draw(self, function: Callable, items: Iterable, executor: Executor) -> None:
        last: Future | None = None
        try:
            for item in items:
                # A live frame that waits behind others is old when its turn comes.
                is_live = isinstance(item, Frame) and item.stream and item.stream.live
                room = self._ahead if is_live else 1
                for _ in range(room):
                    self._room.acquire()
                if self._closed.is_set():
                    break
                self._futures.put(executor.submit(function, item))
                for _ in range(room - 1):
                    self._room.release()
        except BaseException as error:
            last = Future()
            last.set_exception(error)
        self._futures.put(last)


def mib_of(frame: Frame) -> int:
    """Return the MiB that a frame and its drawing take of the budget, at most all of it."""
    return min(1 + 2 * frame.num_bytes // 2**20, IMAGE_BUDGET)


def _within(budget: threading.Semaphore, items: Iterable) -> Iterator[Any]:
    """Yield the items, each frame as soon as there is memory for it and its drawing."""
    for item in items:
        if isinstance(item, Frame):
            # No other thread acquires, so holding a part of it blocks no one.
            for _ in range(mib_of(item)):
                budget.acquire()
        yield item
