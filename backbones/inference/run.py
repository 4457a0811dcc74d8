"""A run over many inputs: read, predict, draw and record each; a bad one does not stop others."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from backbones.errors import ConfigError, raise_output_errors
from backbones.progress import ProgressBar

from .inputs import RECORDS_NAME, Input
from .output import StreamWriter, Writer
from .pipeline import Model, Pipeline
from .reading import Clip, Closed, Frame, Stream, read_inputs
from .results import to_json

if TYPE_CHECKING:
    from .camera import CameraReader

WINDOW_TITLE = 'predictions'
MAX_WINDOW_WIDTH, MAX_WINDOW_HEIGHT = 1280, 720
# q and Esc.
KEYS_THAT_CLOSE = (ord('q'), ord('Q'), 27)


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
        self.writer, self.clip, self.show = writer, clip, show
        self.pipeline = Pipeline(model, batch_size)
        # When set, no more is read; what has been read is still finished and written.
        self.stopping = threading.Event()
        # How many inputs have each status, and (input, problem) of those that failed.
        self.counts = Counter(done=0, failed=0)
        self.failed: list[tuple[str, str]] = []
        self._seconds = 0.0
        self._live: CameraReader | None = None
        self._stream_writer: StreamWriter | None = None
        self._inputs_bar = self._frames_bar = None

    def __call__(self, jobs: Sequence[Input]) -> None:
        """Work through the inputs."""
        items = read_inputs(jobs, self.clip, self.stopping)
        self._inputs_bar = ProgressBar(total=len(jobs), unit='input')
        start = time.perf_counter()
        try:
            with closing(self.pipeline.run(items, self.writer.finish)) as finished:
                for item in finished:
                    self._take(item)
        finally:
            if self._stream_writer is not None:
                self._stream_writer.discard()
            self.writer.close()
            self._inputs_bar.close()
        self._seconds = time.perf_counter() - start

    def describe(self, num_skipped: int) -> str:
        """Return a few lines for the user; ``num_skipped`` inputs had results before the run."""
        counts = {**self.counts, 'skipped, done earlier': num_skipped}
        parts = [f'{count} {what}' for what, count in counts.items() if count or what == 'done']
        lines = [f'inputs:  {", ".join(parts)}']
        lines += [f'         failed: {path}: {problem}' for path, problem in self.failed[:10]]
        if len(self.failed) > 10:
            lines.append(f'         ... and {len(self.failed) - 10} more')
        if count := self.pipeline.counts['model']:
            model, finishing = map(self.pipeline.rate, ('model', 'finishing'))
            lines.append(
                f'speed:   {count} frames in {self._seconds:.1f} s, '
                f'{count / self._seconds:.2f} a second (model alone {model:.2f}, '
                f'drawing and writing alone {finishing:.1f})'
            )
        if self._live:
            rate = self._live.num_captured / self._seconds
            lines.append(f'capture: {rate:.1f} frames a second, {self._live.dropped} dropped')
        return '\n'.join(lines)

    def stop_on_signals(self) -> None:
        """Let Ctrl-C and SIGTERM stop the run; a second one ends it at once."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._interrupt)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.stopping.is_set():
            raise KeyboardInterrupt
        # Not print, which may be what was interrupted.
        os.write(sys.stderr.fileno(), b'\nfinishing what has begun; Ctrl-C again ends at once\n')
        self.stopping.set()

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
                options = dict(desc=title, unit='frame', leave=False)
                self._frames_bar = ProgressBar(total=item.num_frames, **options)
                self._stream_writer = StreamWriter(self.writer, item, self.clip)
            case Closed() if item.was_left_out:
                self.counts['left out, neither image nor video'] += 1
                self._inputs_bar.update()
            case Closed(stream=None):
                record = {'input': item.input.shown, 'status': 'failed', 'problem': item.problem}
                self._record(record)
            case Closed():
                stream_writer, self._stream_writer = self._stream_writer, None
                self._frames_bar.close()
                self._live = item.stream.live
                self._record(stream_writer.close(item))

    def _record(self, record: dict[str, Any]) -> None:
        append_line(self.writer.folder / RECORDS_NAME, to_json(record))
        self.counts[record['status']] += 1
        if record['status'] == 'failed':
            self.failed.append((record['input'], record['problem']))
            ProgressBar.write(f'{record["input"]}: {record["problem"]}', file=sys.stderr)
        self._inputs_bar.update()

    def _show(self, drawing: np.ndarray | None) -> None:
        if self.show and drawing is not None and not self.show(drawing):
            self.stopping.set()


def append_line(path: Path, line: bytes) -> None:
    """Append a line to a file, whole or not at all."""
    with raise_output_errors(), path.open('ab', buffering=0) as file:
        size = file.tell()
        if file.write(line) < len(line):
            file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Window:
    """A window that shows one image after the other; ConfigError if there is no screen."""

    def __init__(self) -> None:
        # In another process, since OpenCV ends the process if it gets no screen.
        trial = [sys.executable, '-c', 'import cv2; cv2.namedWindow("trial")']
        if subprocess.run(trial, capture_output=True).returncode != 0:
            raise ConfigError(
                'no window can be opened: there is no screen (see DISPLAY), or this OpenCV '
                '(opencv-python-headless) has no windows; then run `pip uninstall '
                'opencv-python-headless; pip install --force-reinstall opencv-python`. Or '
                'leave out --show and open the written file'
            )
        cv2.namedWindow(WINDOW_TITLE, cv2.WINDOW_AUTOSIZE | cv2.WINDOW_GUI_NORMAL)

    def show(self, image: np.ndarray) -> bool:
        """Show an image, reduced if it is large; return False once the user has closed it."""
        if self._is_visible():
            scale = min(MAX_WINDOW_WIDTH / image.shape[1], MAX_WINDOW_HEIGHT / image.shape[0])
            if scale < 1:
                size = [max(1, round(side * scale)) for side in image.shape[1::-1]]
                image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
            cv2.imshow(WINDOW_TITLE, image)
            if cv2.waitKey(1) & 0xFF not in KEYS_THAT_CLOSE:
                return True
            cv2.destroyWindow(WINDOW_TITLE)
        return False

    def _is_visible(self) -> bool:
        try:
            return cv2.getWindowProperty(WINDOW_TITLE, cv2.WND_PROP_VISIBLE) > 0
        except cv2.error:  # how some of OpenCV's builds say that the window is gone
            return False
