"""Drawings and data as files: those of an image at once, those of a video frame by frame."""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple
from uuid import uuid4

import cv2
import numpy as np

from backbones.errors import ConfigError, OutputError, raise_output_errors
from backbones.files import atomic_write

from .inferencer import Inferencer
from .inputs import Input
from .legend import SteadyClasses
from .output_paths import mirrored_path
from .pipeline import describe
from .reading import Clip, Closed, Frame, Stream
from .results import (
    Segmentation,
    categories_of,
    coco_results,
    image_id_of,
    to_json,
    write_json,
    write_seg_map,
)

if TYPE_CHECKING:
    from .video_writer import VideoWriter

JPEG_QUALITY = 95
# JPEG's limit along a side is 65,535; larger drawings are PNGs.
MAX_JPEG_SIDE = 65_000


class Finished(NamedTuple):
    """What :meth:`Writer.finish` makes of a frame.

    Attributes:
        frame: The frame, without its image and prediction.
        drawing: The image with the prediction drawn over it, or None.
        record: An image's line in ``predictions.jsonl``.
        shares: Of a video's segmentation: the share of the image that each class covers.
        data: Of a video's detections: the frame's line in the data file.
    """

    frame: Frame
    drawing: np.ndarray | None = None
    record: dict[str, Any] | None = None
    shares: dict[int, float] | None = None
    data: bytes | None = None


class CannotWriteError(Exception):
    """The files of one input cannot be written; those of others may be."""


@contextmanager
def writing() -> Iterator[None]:
    """Tell errors that end a run, OutputError, from those of one input, CannotWriteError."""
    try:
        with raise_output_errors():
            yield
    except OutputError:
        raise
    except OSError as error:
        problem = f'its results cannot be written: {error.strerror or error}'
        raise CannotWriteError(problem) from error


class Writer:
    """Writes drawings and data of every input below one folder.

    Args:
        folder: The output folder.
        inferencer: Whose predictions are written.
        parts: Which of 'drawn' and 'data' to write.
        legend: Whether segmentations get a legend.

    Raises:
        ConfigError: The folder has data of a model with other classes.
        OutputError: Nothing more can be written. From here on, and from all methods.
    """

    def __init__(
        self,
        folder: Path,
        inferencer: Inferencer,
        parts: Sequence[str] = ('drawn', 'data'),
        legend: bool = True,
    ) -> None:
        self.folder = folder
        self.visualizer = inferencer.visualizer
        self.categories = categories_of(inferencer.classes, inferencer.task)
        self.draws, self.writes_data = 'drawn' in parts, 'data' in parts
        self.legend = legend
        self._partial = f'.{uuid4().hex[:8]}.partial'
        if self.writes_data:
            path = folder / 'categories.json'
            if path.exists() and path.read_bytes() != to_json(self.categories):
                raise ConfigError(
                    f'{path} has other classes than this model; take another --out-dir for its data'
                )
            with raise_output_errors():
                write_json(path, self.categories)

    def path(self, part: str, job: Input, suffix: str) -> Path:
        """A file or folder with results of an input."""
        return self.folder / part / f'{job.name}{suffix}'

    def relative(self, path: Path) -> str:
        """A path as ``predictions.jsonl`` has it."""
        return path.relative_to(self.folder).as_posix()

    def partial_frames(self, job: Input) -> Path:
        """Where the segmentation maps of a video are until the video is finished."""
        return self.path('data', job, f'.frames{self._partial}')

    def remove_partial(self) -> None:
        """Remove the segmentation maps of videos that will not be finished."""
        for folder in list((self.folder / 'data').rglob(f'*{self._partial}')):
            shutil.rmtree(folder, ignore_errors=True)

    def finish(self, frame: Frame) -> Finished:
        """Draw and write a prediction; may run in several threads."""
        try:
            return self._finish_frame(frame) if frame.stream else self._finish_image(frame)
        finally:
            frame.image = frame.prediction = frame.load = None

    def _finish_image(self, frame: Frame) -> Finished:
        record = {'input': frame.input.shown, 'kind': 'image', 'status': 'failed'}
        if frame.problem:
            return Finished(frame, record={**record, 'problem': frame.problem})
        height, width = frame.image.shape[:2]
        record |= {'width': width, 'height': height}
        drawing = None
        try:
            with writing():
                if self.draws:
                    drawing = self.visualizer.draw(frame.image, frame.prediction, self.legend)
                    record['drawn'] = self.relative(self._write_drawing(frame.input, drawing))
                if self.writes_data:
                    record['data'] = self.relative(self._write_data(frame))
        except (CannotWriteError, MemoryError) as error:
            return Finished(frame, record={**record, 'problem': describe(error)})
        seconds = round(time.perf_counter() - frame.started, 3)
        return Finished(frame, drawing, {**record, 'status': 'done', 'seconds': seconds})

    def _finish_frame(self, frame: Frame) -> Finished:
        if frame.problem:
            return Finished(frame, frame.image if self.draws else None)
        is_segmentation = isinstance(frame.prediction, Segmentation)
        drawing = shares = data = None
        if self.draws:
            # The legend needs the frames before this one: StreamWriter adds it.
            drawing = self.visualizer.draw(frame.image, frame.prediction, legend=False)
            if is_segmentation and self.legend:
                shares = self.visualizer.class_shares(frame.prediction.seg_map)
        if self.writes_data and is_segmentation:
            path = self.partial_frames(frame.input) / f'{frame.index:06d}.png'
            try:
                with writing():
                    write_seg_map(path, frame.prediction, self.visualizer.palette)
            except CannotWriteError as error:
                frame.problem = str(error)
        elif self.writes_data:
            image = {'image_id': image_id_of(mirrored_path(frame.input.path), frame.index)}
            results = self._coco_results(frame, image)
            data = to_json({'frame': frame.index, 'time': frame.time, 'detections': results})
        return Finished(frame, drawing, None, shares, data)

    def _write_drawing(self, job: Input, drawing: np.ndarray) -> Path:
        suffix, options = '.jpg', [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
        if max(drawing.shape) > MAX_JPEG_SIDE:
            suffix, options = '.png', []
        path = self.path('drawn', job, suffix)
        encoded = cv2.imencode(suffix, drawing, options)[1]
        with atomic_write(path) as temporary:
            # Not encoded.tofile, which ignores a full disk.
            temporary.write_bytes(encoded)
        return path

    def _write_data(self, frame: Frame) -> Path:
        if isinstance(frame.prediction, Segmentation):
            path = self.path('data', frame.input, '.png')
            write_seg_map(path, frame.prediction, self.visualizer.palette)
        else:
            path = self.path('data', frame.input, '.json')
            name = mirrored_path(frame.input.path)
            image = {'image_id': image_id_of(name), 'file_name': name}
            write_json(path, self._coco_results(frame, image))
        return path

    def _coco_results(self, frame: Frame, image: dict[str, Any]) -> list[dict[str, Any]]:
        return coco_results(frame.prediction, frame.image.shape[:2], image, self.categories)


class StreamWriter:
    """Writes the files of one video, whose frames come in order.

    Until it is closed, they have other names.

    Args:
        writer: What all inputs have in common.
        stream: What is known of the video.
        clip: Which part of it is read.
    """

    def __init__(self, writer: Writer, stream: Stream, clip: Clip) -> None:
        self.writer = writer
        self.job = stream.input
        self.stream = stream
        self.clip = clip
        self.num_frames = 0
        self.problems: list[str] = []
        self._legend = SteadyClasses()
        self._start = time.perf_counter()
        self._video: VideoWriter | None = None
        self._lines: BinaryIO | None = None
        self._has_failed = False

    def write(self, finished: Finished) -> np.ndarray | None:
        """Append a frame.

        Returns:
            Its complete drawing, or None where nothing is drawn.

        Raises:
            OutputError: Nothing more can be written.
        """
        if self._has_failed:
            return None
        frame = finished.frame
        if frame.problem:
            self.problems.append(f'frame {frame.index}: {frame.problem}')
        try:
            with writing():
                self._write(finished)
        except CannotWriteError as error:
            self._fail(error)
            return None
        self.num_frames += not frame.problem
        return finished.drawing

    def _write(self, finished: Finished) -> None:
        frame, drawing = finished.frame, finished.drawing
        if finished.data is not None:
            if self._lines is None:
                self._lines = self._partial('data').open('wb')
            self._lines.write(finished.data)
        if drawing is not None:
            if finished.shares is not None:
                labels = self._legend.update(finished.shares)
                self.writer.visualizer.draw_legend(drawing, labels)
            if self._video is None:
                self._video = self._open_video()
            self._video.write(drawing, frame.pts, frame.duration)

    def close(self, closed: Closed) -> dict[str, Any]:
        """Finish the files.

        Returns:
            The input's line in ``predictions.jsonl``.
        """
        record = {
            'input': self.job.shown,
            'kind': self.stream.kind,
            'status': 'done',
            'width': self.stream.width,
            'height': self.stream.height,
            'frames': self.num_frames,
        }
        if self.stream.live:
            record['dropped'] = self.stream.live.dropped
        # To stop a live source is the normal way to end it.
        elif closed.was_interrupted:
            record['status'] = 'interrupted'
        audio_problem = None
        if not self._has_failed:
            try:
                with writing():
                    audio_problem = self._finish(closed, record)
            except CannotWriteError as error:
                self._fail(error)
        problems = [closed.problem, *self.problems[:3], audio_problem]
        if len(self.problems) > 3:
            problems.append(f'and {len(self.problems) - 3} more')
        record['seconds'] = round(time.perf_counter() - self._start, 3)
        if any(problems):
            record |= {'status': 'failed', 'problem': '; '.join(filter(None, problems))}
        return record

    def discard(self) -> None:
        """Remove the files that are not finished."""
        if self._video is not None:
            self._video.discard()
            # Finished, but not renamed.
            self._video.path.unlink(missing_ok=True)
        if self._lines is not None:
            with suppress(OSError):  # of buffered lines, on a full disk
                self._lines.close()
            Path(self._lines.name).unlink(missing_ok=True)
        shutil.rmtree(self.writer.partial_frames(self.job), ignore_errors=True)

    def _finish(self, closed: Closed, record: dict[str, Any]) -> str | None:
        """Rename the files to their final names and record them; returns what audio was lost."""
        # Not the name of a finished result, so that --skip-existing does it again.
        mark = '.interrupted' if record['status'] == 'interrupted' else ''
        problem = None
        if self._video is not None:
            # Where the frames end early, the audio ends with them.
            is_whole = not (closed.was_interrupted or closed.problem or self.clip.end)
            self._video.close(whole_audio=is_whole)
            self._rename(self._video.path, 'drawn', f'{mark}.mp4', record)
            problem = self._video.problem
        frames = self.writer.partial_frames(self.job)
        if self._lines is not None:
            self._lines.close()
            self._rename(self._lines.name, 'data', f'{mark}.jsonl', record)
        elif frames.is_dir():
            # An earlier run may have taken other frames.
            shutil.rmtree(self._path('data', f'{mark}.frames'), ignore_errors=True)
            self._rename(frames, 'data', f'{mark}.frames', record)
        if not mark:
            self._path('drawn', '.interrupted.mp4').unlink(missing_ok=True)
            self._path('data', '.interrupted.jsonl').unlink(missing_ok=True)
            shutil.rmtree(self._path('data', '.interrupted.frames'), ignore_errors=True)
        return problem

    def _rename(self, source: str | Path, part: str, suffix: str, record: dict[str, Any]) -> None:
        path = self._path(part, suffix)
        os.replace(source, path)
        record[part] = self.writer.relative(path)

    def _fail(self, error: CannotWriteError) -> None:
        self.problems.insert(0, str(error))
        self._has_failed = True
        self.discard()

    def _path(self, part: str, suffix: str) -> Path:
        return self.writer.path(part, self.job, suffix)

    def _partial(self, part: str) -> Path:
        path = self._path(part, '')
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.with_name(f'.{path.name[:40]}.{uuid4().hex[:8]}.partial')

    def _open_video(self) -> 'VideoWriter':
        # Imports PyAV.
        from .video_writer import VideoWriter

        return VideoWriter(
            self._partial('drawn'),
            self.stream.width,
            self.stream.height,
            time_base=self.stream.time_base,
            frame_rate=self.stream.frame_rate,
            source=self.stream.audio,
            start=self.clip.start or None,
            end=self.clip.end,
        )
