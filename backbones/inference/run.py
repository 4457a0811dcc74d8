"""A run over many inputs: each is read, predicted, drawn and recorded; a bad one stops no other."""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .inputs import Input
from .pipeline import Model, Pipeline
from .progress import Progress
from .reading import Clip, Closed, Opened, read_inputs
from .records import RecordFile
from .stream_writing import StreamWriter
from .writing import FinishedFrame, FinishedPicture, Writer


@dataclass
class Summary:
    """What a run has done, and how fast.

    Attributes:
        done: Inputs without a problem.
        failed: Inputs with a problem, with the reason of each.
        interrupted: Inputs that were stopped before their end.
        left_out: Files in the folders that are neither picture nor video.
        frames: Pictures and frames of videos that were predicted.
        seconds: From the first input to the last.
        model_rate: Pictures a second of the model alone, while it works.
        finishing_rate: The same of drawing and writing, for one thread.
        capture_rate: Pictures a second that a live source gave; 0 without one.
        dropped: Pictures of a live source that there was no time for.
    """

    done: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    interrupted: int = 0
    left_out: int = 0
    frames: int = 0
    seconds: float = 0.0
    model_rate: float = 0.0
    finishing_rate: float = 0.0
    capture_rate: float = 0.0
    dropped: int = 0


class Run:
    """Puts inputs through a model and writes what comes out.

    Args:
        model: Turns pictures into predictions.
        writer: Makes files of predictions.
        records: Gets a line for every input.
        clip: Which part of videos is taken.
        batch_size: Pictures that go through the model at once.
        progress: Told what happens.
        show: Called with every drawing, for a window; returns whether to go on.
    """

    def __init__(
        self,
        model: Model,
        writer: Writer,
        records: RecordFile,
        clip: Clip,
        batch_size: int,
        progress: Progress,
        show: Callable[[np.ndarray], bool] | None = None,
    ) -> None:
        self.model = model
        self.writer = writer
        self.records = records
        self.clip = clip
        self.batch_size = batch_size
        self.progress = progress
        self.show = show
        self.stopping = threading.Event()
        self.summary = Summary()
        self._open_stream: StreamWriter | None = None

    def stop(self) -> None:
        """Read no more; what has been read is still finished and written."""
        self.stopping.set()

    def __call__(self, jobs: Sequence[Input], is_live: bool) -> Summary:
        """Work through the inputs.

        Args:
            jobs: The inputs.
            is_live: Whether there are live sources, where nothing is worked on ahead of time.

        Raises:
            OutputError: Nothing more can be written. What is finished is whole and recorded.
        """
        pipeline = Pipeline(self.model, self.batch_size, ahead=1 if is_live else None)
        items = read_inputs(jobs, self.clip, self.stopping)
        start = time.perf_counter()
        try:
            with closing(pipeline.run(items, self.writer.finish)) as finished:
                for item in finished:
                    self._take(item)
        except BaseException:
            if self._open_stream is not None:
                self._open_stream.discard()
            self.writer.remove_partial()
            raise
        finally:
            self.summary.seconds = time.perf_counter() - start
            self.summary.frames = pipeline.model_clock.count
            self.summary.model_rate = pipeline.model_clock.rate
            self.summary.finishing_rate = pipeline.finishing_clock.rate
        return self.summary

    def _take(self, item: FinishedPicture | FinishedFrame | Opened | Closed) -> None:
        match item:
            case FinishedPicture(record, drawing):
                self._record(record)
                self._show(drawing)
            case Opened(job, stream):
                self.progress.open_stream(job, stream)
                self._open_stream = StreamWriter(self.writer, job, stream, self.clip)
            case FinishedFrame():
                self._show(self._open_stream.write(item))
                self.progress.add_frame()
            case Closed() if item.was_left_out:
                self.records.write({'input': item.input.shown, 'status': 'left out'})
                self.summary.left_out += 1
                self.progress.leave_out()
            case Closed(stream=None):
                record = {'input': item.input.shown, 'name': item.input.name}
                self._record({**record, 'status': 'failed', 'problem': item.problem})
            case Closed():
                stream_writer, self._open_stream = self._open_stream, None
                self.progress.close_stream()
                if item.stream.live:
                    self.summary.capture_rate = item.stream.live.capture_rate
                    self.summary.dropped = item.stream.live.dropped
                self._record(stream_writer.close(item))

    def _record(self, record: dict[str, Any]) -> None:
        self.records.write(record)
        match record['status']:
            case 'done':
                self.summary.done += 1
            case 'interrupted':
                self.summary.interrupted += 1
            case 'failed':
                self.summary.failed.append((record['input'], record['problem']))
        self.progress.finish_input(record)

    def _show(self, drawing: np.ndarray | None) -> None:
        if self.show and drawing is not None and not self.show(drawing):
            self.stop()
