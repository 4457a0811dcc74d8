"""An upload: its predictions are made once, then drawn and written as often as asked for."""

import pickle
import threading
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from backbones.errors import InputError
from backbones.inference import Clip, Detections, Inferencer, Segmentation
from backbones.inference.drawing import Visualizer
from backbones.inference.images import read_image
from backbones.inference.inferencer import labels_of
from backbones.inference.inputs import Input
from backbones.inference.output import StreamWriter, Writer
from backbones.inference.output_paths import without_suffix
from backbones.inference.pipeline import Pipeline
from backbones.inference.reading import Closed, Frame, Stream, identify, read_inputs

# Called with how many frames are done, and of how many where that is known.
Report = Callable[[int, int | None], None]

BOX = 'left, top, width, height'


@dataclass(frozen=True)
class Limits:
    """What an upload may be.

    Attributes:
        megapixels: Of an image or a frame; larger ones are refused.
        seconds: Of a video; what comes later is left out.
    """

    megapixels: float = 50.0
    seconds: float = 60.0


@dataclass(frozen=True)
class Settings:
    """What of the predictions is shown, and how.

    Attributes:
        score_thr: Detections below this score are left out.
        classes: Names of the classes to show; none: all.
        opacity: Of masks and regions, 0 to 1.
    """

    score_thr: float = 0.3
    classes: tuple[str, ...] = ()
    opacity: float = 0.5


@dataclass(frozen=True)
class Predicted:
    """What a model predicts for an upload.

    Attributes:
        frames: Of each frame the compressed prediction, or why there is none.
        seconds: What reading an image took (of a video that overlaps), and the model.
        problem: What could not be read, or was left out.
    """

    frames: list[bytes | InputError]
    seconds: tuple[float, float]
    problem: str | None


@dataclass(frozen=True)
class Drawn:
    """A drawing as a file, a table of what is in it, and the seconds that took."""

    path: Path
    header: list[str]
    rows: list[list[Any]]
    seconds: float


class Upload:
    """An image or a video that somebody uploaded; InputError where it cannot be read.

    Attributes:
        num_frames: How many frames will be read, where that is known.
        problem: What of it will not be.
        stopping: Set it to end :meth:`predict`; for the other models, too, the video ends there.
    """

    def __init__(self, path: Path, limits: Limits) -> None:
        self.path = path
        self.clip = Clip()
        self.num_frames: int | None = None
        self.problem: str | None = None
        self.stopping = threading.Event()
        with self._naming():
            source = identify(str(path))
            self.kind = source.kind
            height, width = source.size or self._probe_video(limits.seconds)
            if height * width > limits.megapixels * 1e6:
                raise InputError(
                    f'has {height * width / 1e6:.1f} megapixels ({width}x{height}); at most '
                    f'{limits.megapixels:g} are taken here'
                )

    def _probe_video(self, max_seconds: float) -> tuple[int, int]:
        """Height and width of a video; sets how much of it will be read."""
        # Imports PyAV.
        from backbones.inference.video_reader import find_video, open_container

        with open_container(self.path) as container:
            stream = find_video(container)
            seconds = (container.duration or 0) / 1e6
            if not seconds:
                # What a browser has recorded does not say it.
                times = [packet.pts or 0 for packet in container.demux(stream)]
                seconds = float(max(times) * stream.time_base)
            if seconds > max_seconds:
                # Not else, where audio may go on after the last frame.
                self.clip = Clip(end=max_seconds)
                self.problem = (
                    f'lasts {seconds:.1f} s; only the first {max_seconds:g} s are taken here'
                )
            rate = stream.average_rate or 0
            self.num_frames = round(min(seconds, max_seconds) * rate) or None
            return stream.height, stream.width

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """Put the file's name in front of what is wrong with it."""
        try:
            yield
        except InputError as error:
            raise InputError(f'{self.path.name} {error}') from error

    def predict(self, model: Inferencer, report: Report) -> Predicted:
        """Run a model on every frame; InputError where there is no prediction at all."""
        frames, problem = [], None
        start = read = time.perf_counter()
        with self._naming():
            given = str(self.path)
            if self.kind == 'image':
                given = read_image(self.path)
                read = time.perf_counter()
            with closing(model(given, self.clip)) as results:
                for result in results:
                    if result.frame is None:
                        problem = result.problem
                        break
                    frames.append(pack(result.prediction) or InputError(result.problem))
                    report(len(frames), self.num_frames)
                    if self.stopping.is_set() and result.time is not None:
                        self.stopping.clear()
                        self.clip = Clip(end=result.time + 1e-3)
                        self.problem = f'was stopped at {result.time:.1f} s'
                        break
            if not any(isinstance(frame, bytes) for frame in frames):
                raise InputError(str(frames[0]) if frames else problem)
        return Predicted(frames, (read - start, time.perf_counter() - read), problem)

    def draw(
        self,
        model: Inferencer,
        predicted: Predicted,
        settings: Settings,
        folder: Path,
        report: Report,
    ) -> Drawn:
        """Write drawing and data into a folder, as tools/infer.py does for a file of that name."""
        start = time.perf_counter()
        replay = Replay(model, predicted, settings)
        name = self.path.name
        job = Input(str(self.path), without_suffix(name), file_name=name)
        writer = Writer(folder, replay)
        stream_writer, record = None, {}
        try:
            items = read_inputs([job], self.clip)
            with self._naming(), closing(Pipeline(replay).run(items, writer.finish)) as finished:
                for item in finished:
                    match item:
                        case Stream():
                            stream_writer = StreamWriter(writer, item, self.clip)
                        case Frame(stream=None):
                            record = item.record
                        case Frame():
                            stream_writer.write(item)
                            report(item.index + 1, self.num_frames)
                        case Closed(stream=None):
                            raise InputError(item.problem)
                        case Closed():
                            record = stream_writer.close(item)
                if 'drawn' not in record:
                    raise InputError(record['problem'])
        finally:
            if stream_writer is not None:
                stream_writer.discard()
            writer.close()
        header, rows = replay.table(is_video=stream_writer is not None)
        return Drawn(folder / record['drawn'], header, rows, time.perf_counter() - start)


def pack(prediction: Detections | Segmentation | None) -> bytes | None:
    """A prediction in few bytes: a minute of video has thousands of them."""
    return prediction and zlib.compress(pickle.dumps(prediction), 1)


class Replay:
    """Gives the predictions that a model made before, in a model's place in a pipeline."""

    def __init__(self, model: Inferencer, predicted: Predicted, settings: Settings) -> None:
        self.task, self.classes = model.task, model.classes
        self.visualizer = Visualizer(
            self.classes, model.visualizer.palette, opacity=settings.opacity
        )
        self._frames = iter(predicted.frames)
        self._score_thr = settings.score_thr
        # A class of another model's is none of this one's.
        known = [name for name in settings.classes if name in self.classes]
        self._labels = labels_of(known, self.classes) if settings.classes else None
        self._found: list[list[list[Any]]] = []

    def preprocess(self, image: np.ndarray) -> dict[str, Any]:
        """Nothing is left to be done: the image for its shape."""
        return {'inputs': image}

    def predict(self, batch: list[dict[str, Any]]) -> list[bytes]:
        """The next prediction; the pipeline asks for one at a time and in order."""
        packed = next(self._frames)
        if isinstance(packed, InputError):
            raise packed
        return [packed]

    def postprocess(self, raw: bytes, size: tuple[int, int]) -> Detections | Segmentation:
        """What of it is to be seen."""
        # Only this process has had it.
        prediction = pickle.loads(zlib.decompress(raw))
        if isinstance(prediction, Segmentation):
            prediction = prediction.select(self._labels)
            self._found.append(self._shares(prediction.seg_map))
        else:
            prediction = prediction.select(self._score_thr, self._labels)
            self._found.append(self._objects(prediction))
        return prediction

    def _shares(self, seg_map: np.ndarray) -> list[list[Any]]:
        """A row for each class: name, percentage of the pixels, and how many that are."""
        shares = self.visualizer.class_shares(seg_map).items()
        return [
            [self.classes[label], round(100 * share, 1), round(share * seg_map.size)]
            for label, share in sorted(shares, key=lambda item: -item[1])
        ]

    def _objects(self, found: Detections) -> list[list[Any]]:
        """A row for each object: class, score, box and pixels."""
        rows = []
        for index, box in enumerate(found.boxes.round().astype(int).tolist()):
            left, top, right, bottom = box
            width, height = right - left, bottom - top
            area = width * height if found.masks is None else int(found.masks[index].pixels.sum())
            name, score = self.classes[found.labels[index]], round(float(found.scores[index]), 3)
            rows.append([name, score, f'{left}, {top}, {width}, {height}', area])
        return rows

    def table(self, is_video: bool) -> tuple[list[str], list[list[Any]]]:
        """Head and rows: what is in an image, or which classes are in a video's frames."""
        is_segmentation = self.task == 'segmentation'
        if not is_video:
            last = ['% of image', 'pixels'] if is_segmentation else ['score', BOX, 'area']
            return ['class', *last], self._found[0]
        values = defaultdict(list)
        for rows in self._found:
            for name, *_ in {row[0]: row for row in rows}.values():
                values[name].append([row[1] for row in rows if row[0] == name])
        rows = [
            [name, len(frames), round(sum(map(sum, frames)) / len(self._found), 1)]
            if is_segmentation
            else [name, len(frames), sum(map(len, frames)), max(map(max, frames))]
            for name, frames in values.items()
        ]
        last = ['% of video'] if is_segmentation else ['objects', 'highest score']
        return ['class', 'frames', *last], sorted(rows, key=lambda row: -row[1])
