"""Every input as frames: images, animations, videos and live sources alike."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Literal

import numpy as np

from backbones.errors import InputError

from .frame import Frame, TimedImage, Timing
from .images import ImageFile
from .inputs import Input
from .sources import NotMedia, Source, identify

if TYPE_CHECKING:
    from .camera import CameraReader

MILLISECOND = Fraction(1, 1000)

Kind = Literal['animation', 'video', 'live']


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


@dataclass(frozen=True)
class Opened:
    """A video, animation or live source begins: its frames follow.

    Attributes:
        input: What was listed.
        stream: What is read.
    """

    input: Input
    stream: 'Stream'


@dataclass(frozen=True)
class Closed:
    """There is no more of an input.

    Attributes:
        input: What was listed.
        stream: What was read, or None where nothing could be.
        problem: What could not be read, or None.
        was_interrupted: Whether reading was stopped before the end.
        was_left_out: Whether it was found beside images and is neither image nor video.
    """

    input: Input
    stream: 'Stream | None' = None
    problem: str | None = None
    was_interrupted: bool = False
    was_left_out: bool = False


@dataclass
class Stream:
    """What is known of a video, an animation or a live source. Sizes are those of upright frames.

    Attributes:
        kind: 'animation', 'video' or 'live'.
        width: Of its frames, upright.
        height: Of its frames, upright.
        frame_rate: Frames a second, where there is one.
        time_base: Seconds; the unit of its frames' times.
        num_frames: How many frames are to be expected, where that is known.
        audio: What its audio can be read from, if that may have some.
        live: The reader of a live source, which counts what it drops.
    """

    kind: Kind
    width: int
    height: int
    time_base: Fraction = MILLISECOND
    frame_rate: Fraction | None = None
    num_frames: int | None = None
    audio: str | None = None
    live: 'CameraReader | None' = field(default=None, repr=False)


def read_inputs(
    inputs: Iterable[Input], clip: Clip, stop: threading.Event
) -> Iterator[Frame | Opened | Closed]:
    """The frames of all inputs; a bad one stops no other.

    Args:
        inputs: What was listed.
        clip: Which part of videos is taken.
        stop: Once it is set, nothing more is read.

    Yields:
        For an image a frame whose ``origin`` is its :class:`Input`. For anything with several
        frames ``Opened``, its frames with that as their origin, and ``Closed``. For what cannot be
        read ``Closed`` alone, with its ``problem``.
    """
    for item in inputs:
        if stop.is_set():
            return
        try:
            if item.problem:
                raise InputError(item.problem)
            source = identify(item.path)
        except InputError as error:
            is_left_out = item.found and isinstance(error, NotMedia)
            yield Closed(item, problem=str(error), was_left_out=is_left_out)
            continue
        if source.kind == 'image':
            yield read_image_file(item, source)
        else:
            yield from read_stream(item, source, clip, stop)


def read_image_file(item: Input, source: Source) -> Frame:
    """An image as a frame that is read when its turn comes."""

    def load() -> np.ndarray:
        with ImageFile(source.file) as image:
            return image.read()

    height, width = source.size
    return Frame(origin=item, load=load, num_bytes=height * width * 3)


def read_stream(
    item: Input, source: Source, clip: Clip, stop: threading.Event
) -> Iterator[Frame | Opened | Closed]:
    """Everything with several frames."""
    stream = problem = None
    try:
        with closing(STREAM_READERS[source.kind](source, clip)) as parts:
            stream = next(parts)
            opened = Opened(item, stream)
            yield opened
            for index, timing, image in parts:
                if stop.is_set():
                    break
                yield Frame(opened, partial(np.asarray, image), image.nbytes, index, timing)
    except InputError as error:
        problem = str(error)
    yield Closed(item, stream, problem, was_interrupted=stop.is_set())


# Readers of streams give the stream itself, then its frames, and raise InputError at the end where
# something was lost on the way.
StreamParts = Iterator[Stream | TimedImage]


def read_video(source: Source, clip: Clip) -> StreamParts:
    """A video file."""
    from .video_reader import VideoReader

    with VideoReader(source.file, every=clip.every, start=clip.start, end=clip.end) as reader:
        yield Stream(
            *('video', reader.width, reader.height),
            *(reader.time_base, reader.frame_rate, reader.num_frames),
            audio=source.file,
        )
        yield from reader
        if reader.problem:
            raise InputError(reader.problem)


def read_animation(source: Source, clip: Clip) -> StreamParts:
    """An animation: the times of its frames are whole milliseconds."""
    with ImageFile(source.file) as image:
        height, width = image.size
        yield Stream('animation', width, height, num_frames=image.num_frames)
        for index, (time, duration, pixels) in enumerate(image.frames()):
            if index % clip.every == 0 and clip.start <= time and (not clip.end or time < clip.end):
                milliseconds = round(time * 1000), round(duration * 1000)
                yield TimedImage(index, Timing(time, *milliseconds), pixels)


def read_live(source: Source, clip: Clip) -> StreamParts:
    """A camera or a stream, until it ends or ``clip.end`` seconds have passed."""
    from .camera import CameraReader

    with CameraReader(source.file, clip.policy) as reader:
        first = next(reader, None)
        if first is None:
            raise InputError('ended before the first frame')
        height, width = first.image.shape[:2]
        yield Stream('live', width, height, live=reader)
        for number, frame in enumerate(chain([first], reader)):
            if clip.end is not None and frame.timing.time >= clip.end:
                return
            if number % clip.every == 0 and frame.timing.time >= clip.start:
                yield frame


STREAM_READERS = {'video': read_video, 'animation': read_animation, 'live': read_live}
