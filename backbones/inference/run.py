"""A run over many inputs: each is read, predicted, drawn and recorded; a bad one stops no other."""

import errno
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from tqdm import tqdm

from backbones.errors import raise_output_errors

from .inputs import Input
from .output import StreamWriter, Writer
from .pipeline import Model, Pipeline
from .reading import Clip, Closed, Frame, Stream, read_inputs
from .results import to_json

RECORDS_NAME = 'predictions.jsonl'


@dataclass
class Summary:
    """What a run did, and how fast."""

    # How many inputs there are of each status.
    counts: Counter[str] = field(default_factory=lambda: Counter(done=0, failed=0))
    # (input, problem).
    failed: list[tuple[str, str]] = field(default_factory=list)
    # Images and frames of videos that were predicted, and the seconds of the whole run.
    frames: int = 0
    seconds: float = 0.0
    # Frames a second of the model alone, and of drawing and writing alone, in one thread.
    model_rate: float = 0.0
    finishing_rate: float = 0.0
    # Frames that a live source gave, and those that there was no time for.
    captured: int = 0
    dropped: int = 0

    def describe(self, num_skipped: int) -> str:
        """A few lines for the user; ``num_skipped`` inputs had results before the run."""
        counts = {**self.counts, 'skipped, done earlier': num_skipped}
        parts = [f'{count} {what}' for what, count in counts.items() if count or what == 'done']
        lines = [f'inputs:  {", ".join(parts)}']
        lines += [f'         failed: {path}: {problem}' for path, problem in self.failed[:10]]
        if len(self.failed) > 10:
            lines.append(f'         ... and {len(self.failed) - 10} more')
        if self.frames:
            lines.append(
                f'speed:   {self.frames} frames in {self.seconds:.1f} s, '
                f'{self.frames / self.seconds:.2f} a second (model alone {self.model_rate:.2f}, '
                f'drawing and writing alone {self.finishing_rate:.1f})'
            )
        if self.captured:
            rate = self.captured / self.seconds
            lines.append(f'capture: {rate:.1f} frames a second, {self.dropped} dropped')
        return '\n'.join(lines)


class Run:
    """Puts inputs through a model and writes the results.

    ``show`` is called with every drawing, for a window, and returns whether to go on.
    """

    def __init__(
        self,
        model: Model,
        writer: Writer,
        clip: Clip,
        batch_size: int = 1,
        show: Callable[[np.ndarray], bool] | None = None,
    ) -> None:
        self.model, self.writer, self.clip = model, writer, clip
        self.batch_size, self.show = batch_size, show
        self.stopping = threading.Event()
        self.was_interrupted = False
        self.summary = Summary()
        self._stream_writer: StreamWriter | None = None
        self._inputs_bar = self._frames_bar = None

    def __call__(self, jobs: Sequence[Input], is_live: bool = False) -> Summary:
        """Work through the inputs; of live sources nothing is read ahead."""
        pipeline = Pipeline(self.model, self.batch_size, ahead=1 if is_live else None)
        items = read_inputs(jobs, self.clip, self.stopping)
        self._inputs_bar = progress_bar(len(jobs), 'input')
        start = time.perf_counter()
        try:
            with closing(pipeline.run(items, self.writer.finish)) as finished:
                for item in finished:
                    self._take(item)
        finally:
            if self._stream_writer is not None:
                self._stream_writer.discard()
            self.writer.close()
            self._inputs_bar.close()
        self.summary.seconds = time.perf_counter() - start
        self.summary.frames = pipeline.model_clock.count
        self.summary.model_rate = pipeline.model_clock.rate
        self.summary.finishing_rate = pipeline.finishing_clock.rate
        return self.summary

    def stop(self) -> None:
        """Read no more; what has been read is still finished and written."""
        self.stopping.set()

    def stop_on_signals(self) -> None:
        """Let Ctrl-C and SIGTERM stop the run; a second one ends it at once."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._interrupt)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.was_interrupted:
            raise KeyboardInterrupt
        self.was_interrupted = True
        # Not print, which may be what was interrupted.
        os.write(sys.stderr.fileno(), b'\nfinishing what is begun; once more ends at once\n')
        self.stop()

    def _take(self, item: Frame | Stream | Closed) -> None:
        match item:
            case Frame(stream=None):
                self._record(item.record)
                self._show(item.drawing)
            case Frame():
                self._show(self._stream_writer.write(item))
                self._frames_bar.update()
            case Stream():
                title = Path(item.input.name).name
                self._frames_bar = progress_bar(item.num_frames, 'frame', title)
                self._stream_writer = StreamWriter(self.writer, item, self.clip)
            case Closed() if item.was_left_out:
                self.summary.counts['left out, neither image nor video'] += 1
                self._inputs_bar.update()
            case Closed(stream=None):
                record = {'input': item.input.shown, 'status': 'failed', 'problem': item.problem}
                self._record(record)
            case Closed():
                stream_writer, self._stream_writer = self._stream_writer, None
                self._frames_bar.close()
                if live := item.stream.live:
                    self.summary.captured, self.summary.dropped = live.num_captured, live.dropped
                self._record(stream_writer.close(item))

    def _record(self, record: dict[str, Any]) -> None:
        append_line(self.writer.folder / RECORDS_NAME, to_json(record))
        self.summary.counts[record['status']] += 1
        if record['status'] == 'failed':
            self.summary.failed.append((record['input'], record['problem']))
            tqdm.write(f'{record["input"]}: {record["problem"]}', file=sys.stderr)
        self._inputs_bar.update()

    def _show(self, drawing: np.ndarray | None) -> None:
        if self.show and drawing is not None and not self.show(drawing):
            self.stop()


def progress_bar(total: int | None, unit: str, title: str = '') -> tqdm:
    """A bar on standard error; in a log file a line of it now and then."""
    return tqdm(
        total=total,
        desc=title or None,
        unit=unit,
        leave=not title,
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 30,
    )


def append_line(path: Path, line: bytes) -> None:
    """Append a line to a file, whole or not at all."""
    with raise_output_errors(), path.open('ab', buffering=0) as file:
        size = file.tell()
        if file.write(line) < len(line):
            file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
