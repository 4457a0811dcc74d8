"""An upload: models predict once, then predictions are drawn and written for any settings."""

import json
import pickle
import threading
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from backbones.errors import InputError
from backbones.inference import Clip, Detections, Inferencer, Segmentation
from backbones.inference.drawing import Visualizer
from backbones.inference.images import read_image
from backbones.inference.inferencer import labels_of
from backbones.inference.inputs import RECORDS_NAME, Input
from backbones.inference.output import Writer
from backbones.inference.output_paths import without_suffix
from backbones.inference.reading import identify
from backbones.inference.run import Run
from backbones.progress import ProgressBar

BOX = 'left, top, width, height'


@dataclass(frozen=True)
class Predicted:
    """The predictions of a model for an upload."""

    # For each frame the compressed prediction, or why there is none.
    frames: list[bytes | InputError]
    # Spent on reading an image, and on the model; for a video, the latter includes reading.
    seconds: tuple[float, float]
    # What could not be read.
    problem: str | None


@dataclass(frozen=True)
class Drawn:
    """A drawing as a file, a table of what is in it, and the seconds that took."""

    path: Path
    header: list[str]
    rows: list[list[Any]]
    seconds: float


class Upload:
    """An uploaded image or video; InputError if it cannot be read.

    Images and frames of more than ``megapixels`` are refused; a video ends after ``seconds``.
    ``source`` is the page's path of it, ``is_replaced`` whether the page shows another upload now,
    ``problem`` what was left out, ``predicted`` the predictions by the models' names. Setting
    ``stopping`` ends :meth:`predict`; for the models after it, the video ends at the same time.
    """

    def __init__(self, path: Path, megapixels: float, seconds: float) -> None:
        self.path, self.seconds = path, seconds
        # Without an end unless one is needed: audio would end with the clip.
        self.clip, self.num_frames = Clip(), None
        self.source: str | None = None
        self.is_replaced = False
        self.problem: str | None = None
        self.predicted: dict[str, Predicted] = {}
        self.stopping = threading.Event()
        source = identify(str(path))
        self.kind = source.kind
        height, width = source.size or self._open_video()
        if height * width > megapixels * 1e6:
            raise InputError(
                f'has {height * width / 1e6:.1f} megapixels ({width}x{height}); at most '
                f'{megapixels:g} are accepted here'
            )

    def _open_video(self) -> tuple[int, int]:
        """Return height and width; set how many frames to read, if the file has a duration."""
        # Imports PyAV.
        from backbones.inference.video_reader import find_video, open_container

        with open_container(self.path) as container:
            stream = find_video(container)
            seconds = min((container.duration or 0) / 1e6, self.seconds)
            self.num_frames = round(seconds * (stream.average_rate or 0)) or None
            return stream.height, stream.width

    def predict(self, model: Inferencer, title: str) -> Predicted:
        """Run a model on every frame; InputError if there is no prediction at all."""
        frames, problem = [], None
        start = read = time.perf_counter()
        given = str(self.path)
        if self.kind == 'image':
            given = read_image(self.path)
            read = time.perf_counter()
        with (
            closing(model(given, self.clip)) as results,
            ProgressBar(results, title, self.num_frames, unit='frames') as bar,
        ):
            for result in bar:
                if result.frame is None:
                    problem = result.problem
                    break
                is_video = result.time is not None
                if frames and is_video and (self.stopping.is_set() or result.time >= self.seconds):
                    self.stopping.clear()
                    self.clip = Clip(end=min(result.time, self.seconds))
                    self.problem = f'was read up to {self.clip.end:.1f} s'
                    break
                frames.append(pack(result.prediction) or InputError(result.problem))
        if not any(isinstance(frame, bytes) for frame in frames):
            raise InputError(str(frames[0]) if frames else problem)
        return Predicted(frames, (read - start, time.perf_counter() - read), problem)

    def draw(
        self,
        model: Inferencer,
        predicted: Predicted,
        folder: Path,
        score_thr: float = 0.3,
        classes: Sequence[str] = (),
        opacity: float = 0.5,
    ) -> Drawn:
        """Write drawing and data into a folder, as tools/infer.py does for a file of that name.

        Without ``classes``, all are drawn; ``opacity`` is for masks and regions.
        """
        start, name = time.perf_counter(), self.path.name
        replay = Replay(model, predicted, score_thr, classes, opacity)
        job = Input(str(self.path), without_suffix(name), file_name=name)
        Run(replay, Writer(folder, replay), self.clip)([job])
        record = json.loads((folder / RECORDS_NAME).read_bytes())
        (folder / RECORDS_NAME).unlink()
        if 'drawn' not in record:
            raise InputError(record['problem'])
        header, rows = replay.table(is_video='frames' in record)
        return Drawn(folder / record['drawn'], header, rows, time.perf_counter() - start)


def pack(prediction: Detections | Segmentation | None) -> bytes | None:
    """Compress a prediction: a minute of video has thousands of them."""
    return prediction and zlib.compress(pickle.dumps(prediction), 1)


class Replay:
    """Takes a model's place in a pipeline, and returns the predictions that it made before."""

    def __init__(
        self,
        model: Inferencer,
        predicted: Predicted,
        score_thr: float,
        classes: Sequence[str],
        opacity: float,
    ) -> None:
        self.task, self.classes = model.task, model.classes
        self.visualizer = Visualizer(self.classes, model.visualizer.palette, opacity)
        self._frames = iter(predicted.frames)
        self._score_thr = score_thr
        # The page also lists classes of other models.
        known = [name for name in classes if name in self.classes]
        self._labels = labels_of(known, self.classes) if classes else None
        self._found: list[list[list[Any]]] = []

    def preprocess(self, image: np.ndarray) -> dict[str, Any]:
        """Return the image as it is: the pipeline needs only its shape."""
        return {'inputs': image}

    def predict(self, batch: list[dict[str, Any]]) -> list[bytes]:
        """Return the next prediction; the pipeline asks for one at a time and in order."""
        packed = next(self._frames)
        if isinstance(packed, InputError):
            raise packed
        return [packed]

    def postprocess(self, raw: bytes, size: tuple[int, int]) -> Detections | Segmentation:
        """Unpack a prediction; select the scores and classes to show."""
        # Safe: this process pickled it.
        prediction = pickle.loads(zlib.decompress(raw))
        if isinstance(prediction, Segmentation):
            prediction = prediction.select(self._labels)
            self._found.append(self._shares(prediction.seg_map))
        else:
            prediction = prediction.select(self._score_thr, self._labels)
            self._found.append(self._objects(prediction))
        return prediction

    def _shares(self, seg_map: np.ndarray) -> list[list[Any]]:
        """Return a row for each class: name, percentage and number of pixels."""
        shares = self.visualizer.class_shares(seg_map).items()
        return [
            [self.classes[label], round(100 * share, 1), round(share * seg_map.size)]
            for label, share in sorted(shares, key=lambda item: -item[1])
        ]

    def _objects(self, found: Detections) -> list[list[Any]]:
        """Return a row for each object: class, score, box and area."""
        rows = []
        for index, box in enumerate(found.boxes.round().astype(int).tolist()):
            left, top, right, bottom = box
            width, height = right - left, bottom - top
            area = width * height if found.masks is None else int(found.masks[index].pixels.sum())
            name, score = self.classes[found.labels[index]], round(float(found.scores[index]), 3)
            rows.append([name, score, f'{left}, {top}, {width}, {height}', area])
        return rows

    def table(self, is_video: bool) -> tuple[list[str], list[list[Any]]]:
        """Return header and rows: an image's objects or classes, or a video's frames by class."""
        if is_video:
            frames = [dict.fromkeys(row[0] for row in rows) for rows in self._found]
            counts = Counter(chain.from_iterable(frames))
            return ['class', 'frames'], [list(item) for item in counts.most_common()]
        is_segmentation = self.task == 'segmentation'
        last = ['% of image', 'pixels'] if is_segmentation else ['score', BOX, 'area']
        return ['class', *last], self._found[0]
