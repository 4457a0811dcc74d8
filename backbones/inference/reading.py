"""Every input as frames: pictures, animations, videos and live sources alike."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from backbones.errors import InputError

from .addresses import without_password
from .frame import Frame, Timing
from .live import LiveReader
from .pictures import Picture
from .sources import NotMedia, Source, look_at
from .video_reader import VideoReader

MILLISECOND = Fraction(1, 1000)

Kind = Literal['picture', 'animation', 'video', 'live']


@dataclass(frozen=True)
class Job:
    """An input and what its results are called.

    Attributes:
        path: The input: a path or an address.
        stem: Name of its output files, without ending, below the output folder.
        problem: Why it cannot even be looked at, or None.
        is_found: Whether it was found in a folder rather than named by the user. What is neither
            picture nor video is then left out.
    """

    path: str
    stem: str
    problem: str | None = None
    is_found: bool = False

    @property
    def shown(self) -> str:
        """The input as it is shown and recorded."""
        return without_password(self.path)


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
        job: The input.
        stream: What is read.
    """

    job: Job
    stream: 'Stream'


@dataclass(frozen=True)
class Closed:
    """There is no more of an input.

    Attributes:
        job: The input.
        stream: What was read, or None where nothing could be.
        problem: What could not be read, or None.
        was_interrupted: Whether reading was stopped before the end.
        was_left_out: Whether it is a file beside pictures that is neither picture nor video.
    """

    job: Job
    stream: 'Stream | None' = None
    problem: str | None = None
    was_interrupted: bool = False
    was_left_out: bool = False


@dataclass
class Stream:
    """What is known of a video, an animation or a live source.

    Attributes:
        kind: 'animation', 'video' or 'live'.
        width: Of its frames, upright.
        height: Of its frames, upright.
        frame_rate: Frames a second, where there is one.
        time_base: Seconds; the unit of its frames' times.
        num_frames: How many frames are to be expected, where that is known.
        sound: What its sound can be read from, if that may have some.
        live: The reader of a live source, which counts what it drops.
    """

    kind: Kind
    width: int
    height: int
    time_base: Fraction = MILLISECOND
    frame_rate: Fraction | None = None
    num_frames: int | None = None
    sound: str | Path | None = None
    live: LiveReader | None = field(default=None, repr=False)


def read_jobs(
    jobs: Iterable[Job], clip: Clip, stop: threading.Event
) -> Iterator[Frame | Opened | Closed]:
    """The frames of all inputs.

    Args:
        jobs: The inputs.
        clip: Which part of videos is taken.
        stop: Once it is set, nothing more is read.

    Yields:
        For a picture a frame whose ``origin`` is the job. For anything with several frames
        ``Opened``, its frames with that as their origin, and ``Closed``. For what cannot be
        looked at ``Closed`` alone.
    """
    for job in jobs:
        if stop.is_set():
            return
        if job.problem:
            yield Closed(job, problem=job.problem)
            continue
        try:
            source = look_at(job.path)
        except NotMedia as error:
            yield Closed(job, problem=str(error), was_left_out=job.is_found)
        except InputError as error:
            yield Closed(job, problem=str(error))
        else:
            if source.kind == 'picture':
                yield picture_frame(job, source)
            else:
                yield from read_stream(job, source, clip, stop)


def picture_frame(job: Job, source: Source) -> Frame:
    """A picture as a frame that is read when its turn comes."""

    def load() -> np.ndarray:
        with Picture(source.file) as picture:
            return picture.read()

    height, width = source.size
    return Frame(origin=job, load=load, num_bytes=height * width * 3)


def read_stream(
    job: Job, source: Source, clip: Clip, stop: threading.Event
) -> Iterator[Frame | Opened | Closed]:
    """Everything with several frames."""
    stream = problem = None
    try:
        with closing(STREAM_READERS[source.kind](source, clip)) as parts:
            stream = next(parts)
            opened = Opened(job, stream)
            yield opened
            for index, timing, picture in parts:
                if stop.is_set():
                    break
                load = partial(np.asarray, picture)
                yield Frame(opened, load, picture.nbytes, index, timing)
    except InputError as error:
        problem = str(error)
    yield Closed(job, stream, problem, was_interrupted=stop.is_set())


# Readers of streams give the stream itself, then its frames, and raise InputError at the end where
# something was lost on the way.
StreamParts = Iterator[Stream | tuple[int, Timing, np.ndarray]]


def read_video(source: Source, clip: Clip) -> StreamParts:
    """A video file."""
    with VideoReader(source.file, every=clip.every, start=clip.start, end=clip.end) as reader:
        yield Stream(
            'video',
            reader.width,
            reader.height,
            reader.time_base,
            reader.frame_rate,
            reader.frames,
            sound=source.file,
        )
        for frame in reader:
            yield frame.index, Timing(frame.time, frame.pts, frame.duration), frame.picture
        if reader.problem:
            raise InputError(reader.problem)


def read_animation(source: Source, clip: Clip) -> StreamParts:
    """An animated picture: the times of its frames are whole milliseconds."""
    with Picture(source.file) as picture:
        height, width = picture.size
        yield Stream('animation', width, height, num_frames=picture.num_frames)
        for index, (time, duration, pixels) in enumerate(picture.frames()):
            if index % clip.every == 0 and clip.start <= time and (not clip.end or time < clip.end):
                milliseconds = round(time * 1000), round(duration * 1000)
                yield index, Timing(time, *milliseconds), pixels


def read_live(source: Source, clip: Clip) -> StreamParts:
    """A camera or a stream of the network, until it ends or ``clip.end`` seconds have passed."""
    with LiveReader(source.file, clip.policy) as reader:
        yield Stream('live', reader.width, reader.height, live=reader)
        for number, frame in enumerate(reader):
            if clip.end is not None and frame.time >= clip.end:
                return
            if number % clip.every == 0 and frame.time >= clip.start:
                yield frame.index, Timing(frame.time, round(frame.time * 1000)), frame.picture


STREAM_READERS = {'video': read_video, 'animation': read_animation, 'live': read_live}
