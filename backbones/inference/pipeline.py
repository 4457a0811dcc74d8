"""Frames in, finished results out: preparing, the model and finishing overlap."""

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import cv2
import numpy as np

from .frame import Frame, Predicted
from .overlap import MemoryBudget, Overlapped

Marker = TypeVar('Marker')
Result = TypeVar('Result')

# Pictures under way, decoded and drawn, may take so many bytes in all.
PICTURE_BUDGET = 2**30

# What a transform, the network or its answer may raise on a picture that they do not suit, one so
# thin that nothing is left of it in the network's size, for instance. InputError is a ValueError.
PICTURE_ERRORS = (ValueError, RuntimeError, MemoryError, cv2.error)


class Model(Protocol):
    """What a pipeline runs, :class:`backbones.inference.torch_model.TorchModel` for one."""

    def prepare(self, picture: np.ndarray) -> dict[str, Any]: ...

    def predict(self, prepared: list[dict[str, Any]]) -> list[Any]: ...

    def finish(self, raw: Any, size: tuple[int, int]) -> Any: ...


@dataclass
class _Prepared:
    frame: Frame
    picture: np.ndarray
    inputs: dict[str, Any]


@dataclass
class _Raw:
    frame: Frame
    picture: np.ndarray
    raw: Any


class Pipeline:
    """A model with everything around it working at the same time, in order, in bounded memory.

    Args:
        model: Turns pictures into predictions.
        batch_size: Pictures that go through the model at once, if so many of one size are ready.
            Their number changes no result.
        ahead: Frames that are prepared ahead of the model, and finished behind it. Default: 2
            batches and as many frames as there are threads.
    """

    def __init__(self, model: Model, batch_size: int = 1, ahead: int | None = None) -> None:
        self.model = model
        self.batch_size = batch_size
        self.threads = max(2, min(8, os.cpu_count() or 1))
        self.ahead = ahead or 2 * batch_size + self.threads
        self.model_clock = Clock()
        self.finishing_clock = Clock()

    def run(
        self, items: Iterable[Frame | Marker], finish: Callable[[Predicted], Result]
    ) -> Iterator[Result | Marker]:
        """Put frames through the model.

        Args:
            items: Frames, drawn in a thread of its own. Anything else among them comes out
                between the results where it went in.
            finish: Called for each frame in one of several threads, out of order, with the
                prediction or with the problem that there was instead.

        Yields:
            What ``finish`` returns, in the order of the frames.
        """
        budget = MemoryBudget(PICTURE_BUDGET)
        with ThreadPoolExecutor(self.threads, thread_name_prefix='frames') as executor:
            prepared = Overlapped(self._prepare, within(budget, items), executor, self.ahead)
            finished = Overlapped(
                lambda item: self._finish(item, finish),
                self._predict(prepared),
                executor,
                self.ahead,
            )
            try:
                for num_bytes, result in finished:
                    yield result
                    if num_bytes is not None:
                        budget.give_back(2 * num_bytes)
            finally:
                # In this order: what is drawn last must not wait for what is drawn first.
                budget.open()
                prepared.close()
                finished.close()

    def _prepare(self, item: Frame | Marker) -> _Prepared | Predicted | Marker:
        if not isinstance(item, Frame):
            return item
        item.started = time.perf_counter()
        picture = None
        try:
            picture = item.load()
            return _Prepared(item, picture, self.model.prepare(picture))
        except PICTURE_ERRORS as error:
            return Predicted(item, picture, problem=error)

    def _predict(self, prepared: Overlapped) -> Iterator[_Raw | Predicted | Marker]:
        """Form batches of what is ready, so that nothing waits for a batch to fill."""
        batch: list[_Prepared] = []
        for item in prepared:
            joins = isinstance(item, _Prepared)
            if batch and not (joins and shape_of(item) == shape_of(batch[0])):
                yield from self._predict_batch(batch)
                batch = []
            if not joins:
                yield item
                continue
            batch.append(item)
            if len(batch) == self.batch_size or not prepared.has_next_at_hand():
                yield from self._predict_batch(batch)
                batch = []

    def _predict_batch(self, batch: list[_Prepared]) -> Iterator[_Raw | Predicted]:
        try:
            with self.model_clock.running(len(batch)):
                raws = self.model.predict([item.inputs for item in batch])
        except PICTURE_ERRORS as error:
            if len(batch) == 1:
                yield Predicted(batch[0].frame, batch[0].picture, problem=error)
            else:
                # Perhaps memory is short, or one of them is at fault.
                for item in batch:
                    yield from self._predict_batch([item])
            return
        for item, raw in zip(batch, raws, strict=True):
            yield _Raw(item.frame, item.picture, raw)

    def _finish(
        self, item: _Raw | Predicted | Marker, finish: Callable[[Predicted], Result]
    ) -> tuple[int | None, Result | Marker]:
        if not isinstance(item, _Raw | Predicted):
            return None, item
        with self.finishing_clock.running():
            if isinstance(item, _Raw):
                item = self._predicted(item)
            return item.frame.num_bytes, finish(item)

    def _predicted(self, item: _Raw) -> Predicted:
        try:
            prediction = self.model.finish(item.raw, item.picture.shape[:2])
        except PICTURE_ERRORS as error:
            return Predicted(item.frame, item.picture, problem=error)
        return Predicted(item.frame, item.picture, prediction)


class Clock:
    """How long something took, over all threads, and how often it was done."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.count = 0
        self._lock = threading.Lock()

    @contextmanager
    def running(self, count: int = 1) -> Iterator[None]:
        """Time what is done inside, which is so many frames."""
        start = time.perf_counter()
        yield
        with self._lock:
            self.seconds += time.perf_counter() - start
            self.count += count

    @property
    def rate(self) -> float:
        """Frames a second; 0 before the first."""
        return self.count / self.seconds if self.seconds else 0.0


def within(budget: MemoryBudget, items: Iterable[Frame | Marker]) -> Iterator[Frame | Marker]:
    """The items, each frame as soon as there is memory for it and for its drawing."""
    for item in items:
        if isinstance(item, Frame):
            budget.take(2 * item.num_bytes)
        yield item


def shape_of(item: _Prepared) -> tuple[int, ...]:
    """Size of what goes into the network."""
    return tuple(item.inputs['inputs'].shape)
