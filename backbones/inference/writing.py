"""Predictions of pictures as files: drawings and data; those of a video's frames, ready for it."""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import cv2
import numpy as np

from backbones.errors import OutputError, raise_output_errors
from backbones.files import atomic_write

from .data_files import (
    CATEGORIES_NAME,
    categories_of,
    coco_results,
    image_id_of,
    write_json,
    write_label_map,
)
from .drawing import Artist
from .frame import Predicted, Timing
from .inputs import Input
from .palette import Color
from .prediction import Segmentation

JPEG_QUALITY = 95
# What a JPEG can have along a side; larger drawings are PNGs.
LARGEST_JPEG = 65_000


@dataclass(frozen=True)
class FinishedPicture:
    """What has become of a picture.

    Attributes:
        record: Its line in ``predictions.jsonl``.
        drawing: For a window, or None where nothing was drawn.
    """

    record: dict[str, Any]
    drawing: np.ndarray | None = None


@dataclass(frozen=True)
class FinishedFrame:
    """A frame of a video with everything that can be made of it by itself.

    Attributes:
        index: Which frame of the video.
        timing: When it is shown.
        problem: What went wrong with it, or None.
        drawing: The frame with the prediction drawn over it, or None.
        shares: Of a segmentation: the part of the picture that each class present covers.
        data: Of detections: the frame's line in the data file.
    """

    index: int
    timing: Timing
    problem: str | None = None
    drawing: np.ndarray | None = None
    shares: dict[int, float] | None = None
    data: str | None = None


class Writer:
    """Where results go, and what is made of them.

    Args:
        folder: The output folder.
        classes: The model's class names.
        palette: (R, G, B) of each class.
        draws: Whether to write drawings, into ``drawn/``.
        writes_data: Whether to write data, into ``data/``.
    """

    def __init__(
        self,
        folder: Path,
        classes: Sequence[str],
        palette: Sequence[Color],
        draws: bool = True,
        writes_data: bool = True,
    ) -> None:
        self.folder = folder
        self.categories = categories_of(tuple(classes))
        self.palette = palette
        self.artist = Artist(classes, palette)
        self.draws = draws
        self.writes_data = writes_data
        self._partial = f'.{uuid4().hex[:8]}.partial'

    def write_categories(self) -> None:
        """Write ``categories.json``: what the numbers in the data stand for."""
        with raise_output_errors():
            write_json(self.folder / CATEGORIES_NAME, self.categories)

    def partial_frames_folder(self, job: Input) -> Path:
        """Where the label maps of a video's frames are until the video is finished."""
        return self.folder / 'data' / f'{job.name}.frames{self._partial}'

    def remove_partial(self) -> None:
        """Leave no label maps of videos that will not be finished."""
        for folder in list((self.folder / 'data').rglob(f'*{self._partial}')):
            shutil.rmtree(folder, ignore_errors=True)

    def finish(self, predicted: Predicted) -> FinishedPicture | FinishedFrame:
        """Draw and write a prediction; for several threads."""
        if isinstance(predicted.frame.origin, Input):
            return self._finish_picture(predicted)
        return self._finish_frame(predicted)

    def _finish_picture(self, predicted: Predicted) -> FinishedPicture:
        job = predicted.frame.origin
        record = {'input': job.shown, 'name': job.name, 'kind': 'picture', 'status': 'failed'}
        if predicted.problem:
            return FinishedPicture({**record, 'problem': describe(predicted.problem)})
        height, width = predicted.picture.shape[:2]
        record |= {'width': width, 'height': height}
        drawing = None
        try:
            with raise_output_errors():
                if self.draws:
                    drawing = self._draw(predicted, 'below')
                    record['drawn'] = self.relative(self._write_drawing(job, drawing))
                if self.writes_data:
                    record['data'] = self.relative(self._write_data(job, predicted))
        except OutputError:
            raise
        except MemoryError as error:
            return FinishedPicture({**record, 'problem': describe(error)})
        except OSError as error:
            problem = f'its results cannot be written: {error.strerror or error}'
            return FinishedPicture({**record, 'problem': problem})
        seconds = round(time.perf_counter() - predicted.frame.started, 3)
        return FinishedPicture({**record, 'status': 'done', 'seconds': seconds}, drawing)

    def _finish_frame(self, predicted: Predicted) -> FinishedFrame:
        job = predicted.frame.origin.input
        index, timing = predicted.frame.index, predicted.frame.timing
        if predicted.problem:
            drawing = predicted.picture if self.draws else None
            return FinishedFrame(index, timing, describe(predicted.problem), drawing)
        prediction = predicted.prediction
        drawing = shares = data = None
        segments = isinstance(prediction, Segmentation)
        if self.draws:
            drawing = self._draw(predicted, 'none')
            shares = self.artist.class_shares(prediction.label_map) if segments else None
        if self.writes_data and segments:
            with raise_output_errors():
                folder = self.partial_frames_folder(job)
                write_label_map(folder / f'{index:06d}.png', prediction, self.palette)
        elif self.writes_data:
            size = predicted.picture.shape[:2]
            results = coco_results(prediction, size, index, self.categories)
            data = json.dumps({'frame': index, 'time': timing.time, 'detections': results})
        return FinishedFrame(index, timing, None, drawing, shares, data)

    def _draw(self, predicted: Predicted, legend: str) -> np.ndarray:
        if isinstance(predicted.prediction, Segmentation):
            return self.artist.draw_segmentation(predicted.picture, predicted.prediction, legend)
        return self.artist.draw_detections(predicted.picture, predicted.prediction)

    def _write_drawing(self, job: Input, drawing: np.ndarray) -> Path:
        ending, options = '.jpg', [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
        if max(drawing.shape) > LARGEST_JPEG:
            ending, options = '.png', []
        path = self.folder / 'drawn' / f'{job.name}{ending}'
        encoded = cv2.imencode(ending, drawing, options)[1]
        with atomic_write(path) as temporary:
            # Not encoded.tofile: it does not say that the disk is full.
            temporary.write_bytes(encoded)
        return path

    def _write_data(self, job: Input, predicted: Predicted) -> Path:
        path = self.folder / 'data' / job.name
        if isinstance(predicted.prediction, Segmentation):
            path = path.with_name(f'{path.name}.png')
            write_label_map(path, predicted.prediction, self.palette)
        else:
            path = path.with_name(f'{path.name}.json')
            size = predicted.picture.shape[:2]
            image_id = image_id_of(job.path)
            write_json(path, coco_results(predicted.prediction, size, image_id, self.categories))
        return path

    def relative(self, path: Path) -> str:
        """A path as ``predictions.jsonl`` has it."""
        return path.relative_to(self.folder).as_posix()


def describe(problem: Exception) -> str:
    """A problem in one line."""
    if isinstance(problem, MemoryError):
        return 'there is not enough memory for it'
    return str(problem).strip().split('\n')[0]
