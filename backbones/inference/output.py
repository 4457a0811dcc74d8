"""Drawings and data as files: those of an image at once, those of a video frame by frame."""

import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple
from uuid import uuid4

import cv2
import numpy as np

from backbones.errors import ConfigError, OutputError, raise_output_errors
from backbones.files import atomic_write

from .frame import Timing
from .inferencer import Inferencer
from .inputs import Input
from .legend import SteadyClasses
from .output_paths import mirrored_path
from .pipeline import Predicted, describe
from .reading import Clip, Closed, Stream
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


class FinishedImage(NamedTuple):
    """An image's line in ``predictions.jsonl``, and its drawing, or None where nothing is drawn."""

    record: dict[str, Any]
    drawing: np.ndarray | None = None


class FinishedFrame(NamedTuple):
    """A frame of a video, ready to be appended to the video's files.

    Attributes:
        index: Which frame of the video.
        timing: When it is shown.
        problem: Why there is no prediction, or None.
        drawing: The frame with the prediction drawn over it, or None.
        shares: Of a segmentation: the share of the image that each class covers.
        data: Of detections: the frame's line in the data file.
    """

    index: int
    timing: Timing
    problem: str | None = None
    drawing: np.ndarray | None = None
    shares: dict[int, float] | None = None
    data: bytes | None = None


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
            self._write_categories()

    def _write_categories(self) -> None:
        path = self.folder / 'categories.json'
        if path.exists() and path.read_bytes() != to_json(self.categories):
            raise ConfigError(
                f'{path} has other classes than this model; take another --out-dir for its data'
            )
        with raise_output_errors():
            write_json(path, self.categories)

    def partial_frames(self, job: Input) -> Path:
        """Where the segmentation maps of a video are until the video is finished."""
        return self.folder / 'data' / f'{job.name}.frames{self._partial}'

    def remove_partial(self) -> None:
        """Remove the segmentation maps of videos that will not be finished."""
        for folder in list((self.folder / 'data').rglob(f'*{self._partial}')):
            shutil.rmtree(folder, ignore_errors=True)

    def finish(self, predicted: Predicted) -> FinishedImage | FinishedFrame:
        """Draw and write a prediction; may run in several threads."""
        if isinstance(predicted.frame.origin, Input):
            return self._finish_image(predicted)
        return self._finish_frame(predicted)

    def _finish_image(self, predicted: Predicted) -> FinishedImage:
        job = predicted.frame.origin
        record = {'input': job.shown, 'kind': 'image', 'status': 'failed'}
        if predicted.problem:
            return FinishedImage({**record, 'problem': predicted.problem})
        height, width = predicted.image.shape[:2]
        record |= {'width': width, 'height': height}
        drawing = None
        try:
            with raise_output_errors():
                if self.draws:
                    drawing = self.visualizer.draw(
                        predicted.image, predicted.prediction, self.legend
                    )
                    record['drawn'] = self.relative(self._write_drawing(job, drawing))
                if self.writes_data:
                    record['data'] = self.relative(self._write_data(job, predicted))
        except OutputError:
            raise
        except MemoryError as error:
            return FinishedImage({**record, 'problem': describe(error)})
        except OSError as error:
            problem = f'its results cannot be written: {error.strerror or error}'
            return FinishedImage({**record, 'problem': problem})
        seconds = round(time.perf_counter() - predicted.frame.started, 3)
        return FinishedImage({**record, 'status': 'done', 'seconds': seconds}, drawing)

    def _finish_frame(self, predicted: Predicted) -> FinishedFrame:
        job = predicted.frame.origin.input
        index, timing = predicted.frame.index, predicted.frame.timing
        if predicted.problem:
            drawing = predicted.image if self.draws else None
            return FinishedFrame(index, timing, predicted.problem, drawing)
        prediction = predicted.prediction
        is_segmentation = isinstance(prediction, Segmentation)
        drawing = shares = data = None
        if self.draws:
            # The legend needs the frames before this one: StreamWriter adds it.
            drawing = self.visualizer.draw(predicted.image, prediction, legend=False)
            if is_segmentation and self.legend:
                shares = self.visualizer.class_shares(prediction.seg_map)
        if self.writes_data and is_segmentation:
            with raise_output_errors():
                path = self.partial_frames(job) / f'{index:06d}.png'
                write_seg_map(path, prediction, self.visualizer.palette)
        elif self.writes_data:
            image = {'image_id': image_id_of(mirrored_path(job.path), index)}
            results = coco_results(prediction, predicted.image.shape[:2], image, self.categories)
            data = to_json({'frame': index, 'time': timing.time, 'detections': results})
        return FinishedFrame(index, timing, None, drawing, shares, data)

    def _write_drawing(self, job: Input, drawing: np.ndarray) -> Path:
        suffix, options = '.jpg', [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
        if max(drawing.shape) > MAX_JPEG_SIDE:
            suffix, options = '.png', []
        path = self.folder / 'drawn' / f'{job.name}{suffix}'
        encoded = cv2.imencode(suffix, drawing, options)[1]
        with atomic_write(path) as temporary:
            # Not encoded.tofile, which ignores a full disk.
            temporary.write_bytes(encoded)
        return path

    def _write_data(self, job: Input, predicted: Predicted) -> Path:
        prediction, stem = predicted.prediction, self.folder / 'data' / job.name
        if isinstance(prediction, Segmentation):
            path = stem.with_name(f'{stem.name}.png')
            write_seg_map(path, prediction, self.visualizer.palette)
        else:
            path = stem.with_name(f'{stem.name}.json')
            name = mirrored_path(job.path)
            image = {'image_id': image_id_of(name), 'file_name': name}
            size = predicted.image.shape[:2]
            write_json(path, coco_results(prediction, size, image, self.categories))
        return path

    def relative(self, path: Path) -> str:
        """A path as ``predictions.jsonl`` has it."""
        return path.relative_to(self.folder).as_posix()


class StreamWriter:
    """Writes the files of one video, whose frames come in order.

    Args:
        writer: What all inputs have in common.
        job: The input.
        stream: What is known of it.
        clip: Which part of it is read.
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
        self._lines: BinaryIO | None = None
        self._has_failed = False

    def write(self, frame: FinishedFrame) -> np.ndarray | None:
        """Append a frame.

        Returns:
            Its complete drawing, or None where nothing is drawn.

        Raises:
            OutputError: Nothing more can be written.
        """
        if self._has_failed:
            return None
        if frame.problem:
            self.problems.append(f'frame {frame.index}: {frame.problem}')
        try:
            with raise_output_errors():
                self._write(frame)
        except OutputError:
            raise
        except OSError as error:
            self._fail(error)
            return None
        self.num_frames += not frame.problem
        return frame.drawing

    def _write(self, frame: FinishedFrame) -> None:
        if frame.data is not None:
            if self._lines is None:
                path = self._path('data', '.jsonl')
                path.parent.mkdir(parents=True, exist_ok=True)
                partial = f'.{path.name[:40]}.{uuid4().hex[:8]}.partial'
                self._lines = path.with_name(partial).open('wb')
            self._lines.write(frame.data)
        if frame.drawing is not None:
            if frame.shares is not None:
                labels = self._legend.update(frame.shares)
                self.writer.visualizer.draw_legend(frame.drawing, labels)
            if self._video is None:
                self._video = self._open_video()
            self._video.write(frame.drawing, frame.timing.pts, frame.timing.duration)

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
        problems = [closed.problem, *self.problems[:3]]
        if len(self.problems) > 3:
            problems.append(f'and {len(self.problems) - 3} more frames')
        if not self._has_failed:
            try:
                with raise_output_errors():
                    problems.append(self._finish(closed, record))
            except OutputError:
                raise
            except OSError as error:
                self._fail(error)
                problems.append(self.problems[-1])
        record['seconds'] = round(time.perf_counter() - self._start, 3)
        if any(problems):
            record['status'] = 'failed'
            record['problem'] = '; '.join(filter(None, problems))
        return record

    def discard(self) -> None:
        """Remove the files that are not finished."""
        if self._video is not None:
            self._video.discard()
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
            path = self._path('drawn', f'{mark}.mp4')
            os.replace(self._video.path, path)
            record['drawn'] = self.writer.relative(path)
            problem = self._video.problem
        frames = self.writer.partial_frames(self.job)
        if self._lines is not None:
            self._lines.close()
            path = self._path('data', f'{mark}.jsonl')
            os.replace(self._lines.name, path)
            record['data'] = self.writer.relative(path)
        elif frames.is_dir():
            path = self._path('data', f'{mark}.frames')
            # An earlier run may have taken other frames.
            if path.is_dir():
                shutil.rmtree(path)
            frames.rename(path)
            record['data'] = self.writer.relative(path)
        if not mark:
            self._path('data', '.interrupted.jsonl').unlink(missing_ok=True)
            shutil.rmtree(self._path('data', '.interrupted.frames'), ignore_errors=True)
        return problem

    def _fail(self, error: OSError) -> None:
        self.problems.append(f'its results cannot be written: {describe(error)}')
        self._has_failed = True
        self.discard()

    def _path(self, part: str, suffix: str) -> Path:
        return self.writer.folder / part / f'{self.job.name}{suffix}'

    def _open_video(self) -> 'VideoWriter':
        # Imports PyAV.
        from .video_writer import VideoWriter

        return VideoWriter(
            self._path('drawn', '.interrupted.mp4'),
            self.stream.width,
            self.stream.height,
            time_base=self.stream.time_base,
            frame_rate=self.stream.frame_rate,
            source=self.stream.audio,
            start=self.clip.start or None,
            end=self.clip.end,
        )
