"""How far a run is, on standard error: rate and time left, and every problem as it happens."""

import sys
import time
from typing import Any

from tqdm import tqdm

from .inputs import Input
from .reading import Stream

# Seconds between two lines where nobody watches, in a log file for instance.
LOG_INTERVAL = 10.0


class Progress:
    """Bars for the inputs, and for the frames of the one that is a video; lines in a log.

    Args:
        total: Number of inputs.
        prefix: What distinguishes this process from others. Default: nothing.
    """

    def __init__(self, total: int, prefix: str = '') -> None:
        self._prefix = prefix
        self._inputs = Bar(f'{prefix}inputs', total, 'input')
        self._frames: Bar | None = None
        self._stream: Stream | None = None

    def open_stream(self, job: Input, stream: Stream) -> None:
        """The frames of a video follow."""
        self._stream = stream
        self._frames = Bar(f'{self._prefix}{job.name}', stream.num_frames, 'frame', leave=False)

    def add_frame(self) -> None:
        """A frame of the video is finished."""
        live, note = self._stream.live, ''
        if live is not None:
            note = f'captured {live.capture_rate:.1f} a second, dropped {live.dropped}'
        self._frames.update(note)

    def close_stream(self) -> None:
        """There are no more frames of the video."""
        self._frames.close()

    def finish_input(self, record: dict[str, Any]) -> None:
        """An input is done, or has failed."""
        if record.get('problem'):
            self._inputs.write(f'{self._prefix}{record["input"]}: {record["problem"]}')
        self._inputs.update()

    def leave_out(self) -> None:
        """A file is neither picture nor video."""
        self._inputs.total -= 1

    def close(self) -> None:
        """Leave the bars as they are."""
        self._inputs.close()


class Bar(tqdm):
    """tqdm's bar in a terminal; elsewhere the same as a line every ten seconds."""

    def __init__(self, title: str, total: int | None, unit: str, leave: bool = True) -> None:
        self._is_watched = sys.stderr.isatty()
        self._next_line = time.monotonic() + LOG_INTERVAL
        super().__init__(
            total=total,
            desc=title,
            unit=unit,
            leave=leave,
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=0.2,
        )

    def update(self, note: str = '') -> None:
        """One more is done."""
        self.postfix = note or None
        super().update()
        if not self._is_watched and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LOG_INTERVAL
            print(self, file=sys.stderr, flush=True)

    def display(self, *args, **kwargs) -> None:
        """Draw the bar, where there is somebody to look at it."""
        if self._is_watched:
            super().display(*args, **kwargs)

    def write(self, line: str) -> None:
        """Print a line above the bars."""
        tqdm.write(line, file=sys.stderr)
