"""Every input as frames: images, animations, videos and live sources alike."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import cv2
import numpy as np

from backbones.errors import InputError, NotMediaError

from .images import TimedImage, count_frames, open_image, read_frames, read_image
from .inputs import Input
from .results import Detections, Segmentation
from .sources import Kind, Source, identify

if TYPE_CHECKING:
    from .camera import CameraReader


@dataclass(frozen=True)
class Clip:
    """Which part of videos and how much of live sources is taken.

    Attributes:
        every: Every so many frames one is taken.
        start: Seconds from which on frames are taken.
        end: Seconds before which frames are taken; None: to the end.
        policy: Of live sources: 'latest' drops what there was no time for, 'all' drops nothing.
    """

    every: int = 1
    start: float = 0.0
    end: float | None = None
    policy: Literal['latest', 'all'] = 'latest'


@dataclass
class Stream:
    """A video, an animation or a live source, whose frames follow."""

    input: Input
    kind: Kind
    # Of upright frames.
    width: int
    height: int
    # Seconds; the unit of its frames' times.
    time_base: Fraction = Fraction(1, 1000)
    # Frames a second, and how many there will be, where that is known.
    frame_rate: Fraction | None = None
    num_frames: int | None = None
    # What its audio can be read from, if that may have some.
    audio: str | None = None
    # The reader of a live source, which counts what it drops.
    live: 'CameraReader | None' = field(default=None, repr=False)


@dataclass(frozen=True)
class Closed:
    """There is no more of an input."""

    input: Input
    # None where nothing could be read.
    stream: Stream | None = None
    # What could not be read.
    problem: str | None = None
    # Whether reading was stopped before the end.
    was_interrupted: bool = False
    # Whether it was found beside images and is neither image nor video.
    was_left_out: bool = False


@dataclass
class Frame:
    """An image, or a frame of a video, on its way from reading to writing."""

    input: Input
    # Of the image in memory.
    num_bytes: int
    # (height, width, 3), uint8, BGR; or what loads it.
    image: np.ndarray | None = None
    load: Callable[[], np.ndarray] | None = None
    # Of a video: the video, which of its frames, when that is shown in seconds, and the same and
    # for how long in units of the video's time base.
    stream: Stream | None = None
    index: int = 0
    time: float | None = None
    pts: int = 0
    duration: int | None = None
    # When the work on it began, by time.perf_counter.
    started: float = 0.0
    # For the model, and what the model returned.
    inputs: dict[str, Any] | None = None
    raw: Any = None
    # What that means, or why there is no prediction.
    prediction: Detections | Segmentation | None = None
    problem: str | None = None
    # Of output.Writer: the image with the prediction drawn over it, an image's line in
    # predictions.jsonl, the share of each class in a video's frame, and the frame's line of data.
    drawing: np.ndarray | None = None
    record: dict[str, Any] | None = None
    shares: dict[int, float] | None = None
    line: bytes | None = None


def read_inputs(
    inputs: Iterable[Input], clip: Clip, stop: threading.Event
) -> Iterator[Frame | Stream | Closed]:
    """The frames of all inputs; a bad one stops no other.

    Args:
        inputs: What was listed.
        clip: Which part of videos is taken.
        stop: Once it is set, nothing more is read.

    Yields:
        For an image its frame. For anything with several frames the ``Stream``, its frames, and
        ``Closed``. For what cannot be read ``Closed`` alone, with its ``problem``.
    """
    for item in inputs:
        if stop.is_set():
            return
        try:
            if item.problem:
                raise InputError(item.problem)
            source = identify(item.path)
        except InputError as error:
            is_left_out = item.found and isinstance(error, NotMediaError)
            yield Closed(item, problem=str(error), was_left_out=is_left_out)
            continue
        if source.kind == 'image':
            height, width = source.size
            yield Frame(item, height * width * 3, load=partial(read_image, source.file))
        else:
            yield from _read_stream(item, source, clip, stop)


def _read_stream(
    item: Input, source: Source, clip: Clip, stop: threading.Event
) -> Iterator[Frame | Stream | Closed]:
    stream = problem = None
    try:
        with closing(STREAM_READERS[source.kind](item, source, clip)) as parts:
            stream = next(parts)
            yield stream
            for index, time, pts, duration, image in parts:
                if stop.is_set():
                    break
                yield Frame(item, image.nbytes, image, None, stream, index, time, pts, duration)
    except InputError as error:
        problem = str(error)
    yield Closed(item, stream, problem, was_interrupted=stop.is_set())


# Readers of streams give the stream itself, then its frames, and raise InputError at the end where
# something was lost on the way.
StreamParts = Iterator[Stream | TimedImage]


def _read_video(item: Input, source: Source, clip: Clip) -> StreamParts:
    from .video_reader import VideoReader

    with VideoReader(source.file, clip.every, clip.start, clip.end) as reader:
        yield Stream(
            *(item, 'video', reader.width, reader.height),
            *(reader.time_base, reader.frame_rate, reader.num_frames),
            audio=source.file,
        )
        yield from reader
        if reader.problem:
            raise InputError(reader.problem)


def _read_animation(item: Input, source: Source, clip: Clip) -> StreamParts:
    with open_image(source.file) as image:
        height, width = source.size
        yield Stream(item, 'animation', width, height, num_frames=count_frames(image))
        for frame in read_frames(image):
            is_inside = clip.start <= frame.time and (not clip.end or frame.time < clip.end)
            if frame.index % clip.every == 0 and is_inside:
                yield frame


def _read_live(item: Input, source: Source, clip: Clip) -> StreamParts:
    """A camera or a stream, until it ends or ``clip.end`` seconds have passed."""
    from .camera import CameraReader

    with CameraReader(source.file, clip.policy) as reader:
        first = next(reader, None)
        if first is None:
            raise InputError('ended before the first frame')
        height, width = first.image.shape[:2]
        yield Stream(item, 'live', width, height, live=reader)
        for number, frame in enumerate(chain([first], reader)):
            if clip.end is not None and frame.time >= clip.end:
                return
            if number % clip.every == 0 and frame.time >= clip.start:
                # After a new connection it may be of another size.
                image = frame.image
                if image.shape != first.image.shape:
                    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
                yield frame._replace(image=image)


STREAM_READERS = {'video': _read_video, 'animation': _read_animation, 'live': _read_live}
