"""Write drawings and data as files: an image's at once, a video's frame by frame."""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from uuid import uuid4

import cv2
import numpy as np

from backbones.errors import ConfigError, InputError, OutputError, in_one_line, raise_output_errors
from backbones.files import write_bytes

from .inferencer import Inferencer
from .inputs import Input
from .legend import SteadyClasses
from .reading import Clip, Closed, Frame, Stream
from .results import (
    Segmentation,
    categories_of,
    coco_results,
    encode_seg_map,
    image_id_of,
    to_json,
)

if TYPE_CHECKING:
    from .video_writer import VideoWriter

# JPEG's limit along a side is 65,535; larger drawings are PNGs.
MAX_JPEG_SIDE = 65_000
# The possible results of a video.
VIDEO_RESULTS = (('drawn', '.mp4'), ('data', '.jsonl'), ('data', '.frames'))


@contextmanager
def writing() -> Iterator[None]:
    """Raise OutputError for errors that end a run, InputError for those of one input."""
    try:
        with raise_output_errors():
            yield
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise InputError(f'its results cannot be written: {error.strerror or error}') from error


class Writer:
    """Writes drawings and data of every input below one folder.

    ``parts`` selects 'drawn', 'data' or both. Raises ConfigError if the folder has data of a model
    with other classes. All methods raise OutputError if nothing more can be written.
    """

    def __init__(
        self,
        folder: Path,
        inferencer: Inferencer,
        parts: Sequence[str] = ('drawn', 'data'),
        legend: bool = True,
    ) -> None:
        self.folder = folder
        # The folder of unfinished files.
        self.partial = folder / f'.{uuid4().hex[:8]}.partial'
        self.visualizer = inferencer.visualizer
        self.categories = categories_of(inferencer.classes, inferencer.task)
        self.draws, self.writes_data = 'drawn' in parts, 'data' in parts
        self.legend = legend
        if self.writes_data:
            path = folder / 'categories.json'
            if path.exists() and path.read_bytes() != to_json(self.categories):
                raise ConfigError(
                    f'{path} has other classes than this model; use another --out-dir for its data'
                )
            with raise_output_errors():
                write_bytes(path, to_json(self.categories))

    def finish(self, frame: Frame) -> None:
        """Draw and write a prediction; may run in several threads."""
        try:
            with writing():
                if frame.stream:
                    self._finish_frame(frame)
                else:
                    self._finish_image(frame)
        except (InputError, MemoryError) as error:
            frame.problem = in_one_line(error)
        if frame.record and frame.problem:
            frame.record['problem'] = frame.problem
        frame.image = frame.prediction = frame.load = None

    def _finish_image(self, frame: Frame) -> None:
        record = {'input': frame.input.shown, 'kind': 'image', 'status': 'failed'}
        frame.record = record
        if frame.problem:
            return
        record['height'], record['width'] = frame.image.shape[:2]
        if self.draws:
            frame.drawing = self.visualizer.draw(frame.image, frame.prediction, self.legend)
            suffix, encoded = encode_drawing(frame.drawing)
            path = self.path('drawn', frame.input, suffix)
            write_bytes(path, encoded)
            record['drawn'] = self.relative(path)
        if self.writes_data:
            is_segmentation = isinstance(frame.prediction, Segmentation)
            path = self.path('data', frame.input, '.png' if is_segmentation else '.json')
            if is_segmentation:
                content = encode_seg_map(frame.prediction, self.visualizer.palette)
            else:
                name = frame.input.file_name
                image = {'image_id': image_id_of(name), 'file_name': name}
                content = to_json(self._coco_results(frame, image))
            write_bytes(path, content)
            record['data'] = self.relative(path)
        seconds = round(time.perf_counter() - frame.started, 3)
        record |= {'status': 'done', 'seconds': seconds}

    def _finish_frame(self, frame: Frame) -> None:
        if frame.problem:
            frame.drawing = frame.image if self.draws else None
            return
        is_segmentation = isinstance(frame.prediction, Segmentation)
        if self.draws:
            # The legend needs the frames before this one: StreamWriter adds it.
            frame.drawing = self.visualizer.draw(frame.image, frame.prediction, legend=False)
            if is_segmentation and self.legend:
                frame.shares = self.visualizer.class_shares(frame.prediction.seg_map)
        if self.writes_data and is_segmentation:
            folder = self.partial / 'data' / f'{frame.input.name}.frames'
            path = folder / f'{frame.index:06d}.png'
            write_bytes(path, encode_seg_map(frame.prediction, self.visualizer.palette))
        elif self.writes_data:
            image = {'image_id': image_id_of(frame.input.file_name, frame.index)}
            results = self._coco_results(frame, image)
            frame.line = to_json({'frame': frame.index, 'time': frame.time, 'detections': results})

    def _coco_results(self, frame: Frame, image: dict[str, Any]) -> list[dict[str, Any]]:
        return coco_results(frame.prediction, frame.image.shape[:2], image, self.categories)

    def path(self, part: str, job: Input, suffix: str) -> Path:
        """Return the path of a file or folder with results of an input."""
        return self.folder / part / f'{job.name}{suffix}'

    def relative(self, path: Path) -> str:
        """Return a path as ``predictions.jsonl`` has it."""
        return path.relative_to(self.folder).as_posix()

    def close(self) -> None:
        """Remove unfinished files."""
        shutil.rmtree(self.partial, ignore_errors=True)


def encode_drawing(drawing: np.ndarray) -> tuple[str, bytes]:
    """Return suffix and content of a drawing's file: a JPEG, or a PNG if it is too large."""
    suffix = '.png' if max(drawing.shape) > MAX_JPEG_SIDE else '.jpg'
    # OpenCV's JPEGs are of quality 95. Not tofile(), which ignores a full disk.
    return suffix, cv2.imencode(suffix, drawing)[1].tobytes()


class StreamWriter:
    """Writes the files of one video, frame by frame; :meth:`close` gives them their final names."""

    def __init__(self, writer: Writer, stream: Stream, clip: Clip) -> None:
        self.writer, self.stream, self.clip = writer, stream, clip
        self.num_frames = 0
        self.problems: list[str] = []
        self._legend = SteadyClasses()
        self._start = time.perf_counter()
        self._video: VideoWriter | None = None
        self._lines: BinaryIO | None = None
        self._has_failed = False

    def write(self, frame: Frame) -> np.ndarray | None:
        """Append a frame; return its complete drawing, or None if nothing is drawn."""
        if self._has_failed:
            return None
        if frame.problem:
            self.problems.append(f'frame {frame.index}: {frame.problem}')
        try:
            with writing():
                self._write(frame)
        except InputError as error:
            self._fail(error)
            return None
        self.num_frames += not frame.problem
        return frame.drawing

    def _write(self, frame: Frame) -> None:
        if frame.line is not None:
            if self._lines is None:
                self._lines = self._new('data', '.jsonl').open('wb')
            self._lines.write(frame.line)
        if frame.drawing is not None:
            if frame.shares is not None:
                labels = self._legend.update(frame.shares)
                self.writer.visualizer.draw_legend(frame.drawing, labels)
            if self._video is None:
                # Imports PyAV.
                from .video_writer import VideoWriter

                path = self._new('drawn', '.mp4')
                self._video = VideoWriter(path, self.stream, self.clip, frame.pts)
            self._video.write(frame.drawing, frame.pts, frame.duration)

    def close(self, closed: Closed) -> dict[str, Any]:
        """Finish the files; return the input's line in ``predictions.jsonl``."""
        record = {
            'input': self.stream.input.shown,
            'kind': self.stream.kind,
            'status': 'done',
            'width': self.stream.width,
            'height': self.stream.height,
            'frames': self.num_frames,
        }
        if self.stream.live:
            record['dropped'] = self.stream.live.dropped
        # Stopping a live source is the normal way to end it.
        elif closed.was_interrupted:
            record['status'] = 'interrupted'
        if not self._has_failed:
            try:
                with writing():
                    self._finish(closed, record)
            except InputError as error:
                self._fail(error)
        problems = [closed.problem, *self.problems[:3], self._video and self._video.problem]
        if len(self.problems) > 3:
            problems.append(f'and {len(self.problems) - 3} more')
        record['seconds'] = round(time.perf_counter() - self._start, 3)
        if any(problems):
            record |= {'status': 'failed', 'problem': '; '.join(filter(None, problems))}
        return record

    def _finish(self, closed: Closed, record: dict[str, Any]) -> None:
        """Give the files their final names and record them."""
        if self._video is not None:
            # If the frames end early, the audio ends with them.
            is_whole = not (closed.was_interrupted or closed.problem or self.clip.end)
            self._video.close(whole_audio=is_whole)
        if self._lines is not None:
            self._lines.close()
        # Not the name of a finished result, so that --skip-existing runs it again.
        mark = '.interrupted' if record['status'] == 'interrupted' else ''
        for part, suffix in VIDEO_RESULTS:
            partial = self._partial(part, suffix)
            if partial.exists():
                path = self.writer.path(part, self.stream.input, f'{mark}{suffix}')
                path.parent.mkdir(parents=True, exist_ok=True)
                if partial.is_dir():
                    # An earlier run may have written other frames.
                    shutil.rmtree(path, ignore_errors=True)
                os.replace(partial, path)
                record[part] = self.writer.relative(path)
            old = self.writer.path(part, self.stream.input, f'.interrupted{suffix}')
            if not mark and old.is_dir():
                shutil.rmtree(old, ignore_errors=True)
            elif not mark:
                old.unlink(missing_ok=True)

    def discard(self) -> None:
        """Close the unfinished files; the Writer removes them."""
        if self._video is not None:
            self._video.discard()
        if self._lines is not None:
            with suppress(OSError):  # buffered lines are written, perhaps to a full disk
                self._lines.close()

    def _fail(self, error: InputError) -> None:
        self.problems.insert(0, str(error))
        self._has_failed = True
        self.discard()

    def _partial(self, part: str, suffix: str) -> Path:
        return self.writer.partial / part / f'{self.stream.input.name}{suffix}'

    def _new(self, part: str, suffix: str) -> Path:
        path = self._partial(part, suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path
