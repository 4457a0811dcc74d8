"""A video's drawings and data as files, frame by frame."""

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np

from backbones.errors import OutputError, raise_output_errors

from .inputs import Input
from .legend import SteadyClasses
from .reading import Clip, Closed, Stream
from .writing import FinishedFrame, Writer, describe

if TYPE_CHECKING:
    from .video_writer import VideoWriter


class StreamWriter:
    """The files of one video: its frames come in order.

    Args:
        writer: What all inputs have in common.
        job: The input.
        stream: What is known of it.
        clip: The part of it that is taken.
    """

    def __init__(self, writer: Writer, job: Input, stream: Stream, clip: Clip) -> None:
        self.writer = writer
        self.job = job
        self.stream = stream
        self.clip = clip
        self.num_frames = 0
        self.problems: list[str] = []
        self._legend = SteadyClasses()
        self._start = time.perf_counter()
        self._video: VideoWriter | None = None
        self._lines: IO[str] | None = None
        self._is_given_up = False
        self._lines_path = writer.folder / 'data' / f'{job.name}.jsonl'

    def write(self, frame: FinishedFrame) -> np.ndarray | None:
        """Append a frame.

        Returns:
            Its drawing, complete, or None where nothing is drawn.

        Raises:
            OutputError: Nothing more can be written.
        """
        if self._is_given_up:
            return None
        if frame.problem:
            self.problems.append(f'frame {frame.index}: {frame.problem}')
        try:
            with raise_output_errors():
                drawing = self._write(frame)
        except OutputError:
            raise
        except OSError as error:
            self.problems.append(f'its results cannot be written: {describe(error)}')
            self._is_given_up = True
            self.discard()
            return None
        self.num_frames += not frame.problem
        return drawing

    def _write(self, frame: FinishedFrame) -> np.ndarray | None:
        if frame.data is not None:
            self._open_lines().write(frame.data + '\n')
        if frame.drawing is None:
            return None
        if frame.shares is not None:
            self.writer.artist.draw_legend(frame.drawing, self._legend.update(frame.shares))
        self._open_video().write(frame.drawing, frame.timing.pts, frame.timing.duration)
        return frame.drawing

    def close(self, closed: Closed) -> dict[str, Any]:
        """Finish the files, and say what has become of the input."""
        record = {
            'input': self.job.shown,
            'name': self.job.name,
            'kind': self.stream.kind,
            'status': 'done',
            'width': self.stream.width,
            'height': self.stream.height,
            'frames': self.num_frames,
        }
        if self.stream.live:
            record['dropped'] = self.stream.live.dropped
        problems = [closed.problem, *self.problems[:3]]
        if len(self.problems) > 3:
            problems.append(f'and {len(self.problems) - 3} more frames')
        try:
            with raise_output_errors():
                problems.append(self._finish(closed, record))
        except OutputError:
            raise
        except OSError as error:
            problems.append(f'its results cannot be written: {describe(error)}')
            self.discard()
        record['seconds'] = round(time.perf_counter() - self._start, 3)
        # A live source has no other end than this.
        if closed.was_interrupted and not self.stream.live:
            record['status'] = 'interrupted'
        if any(problems):
            record['status'] = 'failed'
            record['problem'] = '; '.join(problem for problem in problems if problem)
        return record

    def discard(self) -> None:
        """Leave nothing of the files that are not finished."""
        if self._video is not None:
            self._video.discard()
        if self._lines is not None:
            with suppress(OSError):  # of lines that had no room
                self._lines.close()
            Path(self._lines.name).unlink(missing_ok=True)
        shutil.rmtree(self.writer.partial_frames_folder(self.job), ignore_errors=True)

    def _finish(self, closed: Closed, record: dict[str, Any]) -> str | None:
        """Give the files their names, and say in the record what they are.

        Returns:
            What of the sound was lost.
        """
        if self._is_given_up:
            self.discard()
            return None
        problem = None
        if self._video is not None:
            # Where the pictures end early, the sound ends with them.
            is_whole = not (closed.was_interrupted or closed.problem or self.clip.end)
            self._video.close(whole_audio=is_whole)
            record['drawn'] = self.writer.relative(self._video.path)
            problem = self._video.problem
        frames = self.writer.partial_frames_folder(self.job)
        if self._lines is not None:
            self._lines.close()
            os.replace(self._lines.name, self._lines_path)
            record['data'] = self.writer.relative(self._lines_path)
        elif frames.is_dir():
            path = self.writer.folder / 'data' / f'{self.job.name}.frames'
            # Of an earlier run, which may have taken other frames.
            if path.is_dir():
                shutil.rmtree(path)
            frames.rename(path)
            record['data'] = self.writer.relative(path)
        return problem

    def _open_video(self) -> 'VideoWriter':
        if self._video is None:
            from .video_writer import VideoWriter

            self._video = VideoWriter(
                self.writer.folder / 'drawn' / f'{self.job.name}.mp4',
                self.stream.width,
                self.stream.height,
                time_base=self.stream.time_base,
                frame_rate=self.stream.frame_rate,
                source=self.stream.audio,
                start=self.clip.start or None,
                end=self.clip.end,
            )
        return self._video

    def _open_lines(self) -> IO[str]:
        if self._lines is None:
            path = self._lines_path
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lines = path.with_name(f'.{path.name[:40]}.{uuid4().hex[:8]}.partial').open(
                'w', encoding='utf-8'
            )
        return self._lines
