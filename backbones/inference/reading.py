"""Identify inputs by their content, and read each as frames."""

import base64
import io
import os
import stat
import string
import threading
import urllib.request
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from itertools import chain, dropwhile, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from urllib.parse import quote, unquote_to_bytes, urlsplit

import cv2
import fsspec
import numpy as np

from backbones.errors import (
    PATH_ERRORS,
    InputError,
    NotMediaError,
    StorageError,
    in_one_line,
    reason_of,
)

from . import images
from .inputs import MEDIA_SUFFIXES, WEB_SCHEMES, Input, find_scheme, is_live
from .results import Detections, Segmentation

if TYPE_CHECKING:
    from .camera import CameraReader

# Give up on a server after this many seconds without a byte, or bytes of an image.
WEB_TIMEOUT = 10.0
MAX_DOWNLOAD = 2**28

# A camera's sequence of JPEGs, which begins like one JPEG.
ROW_SUFFIXES = ('.mjpeg', '.mjpg')

Kind = Literal['image', 'animation', 'video', 'live']


class Source(NamedTuple):
    """What an input turned out to be."""

    kind: Kind
    # What to open: a path, a URL, webcam:N, or an image that was downloaded.
    file: str | io.BytesIO
    # (height, width) of an image or animation.
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Clip:
    """The part of videos, animations and live sources to read.

    Attributes:
        every: Read every N-th frame, counted from ``start`` on.
        start, end: Read frames that begin from ``start`` on and before ``end``, in seconds.
        policy: Of live sources: 'latest' drops frames when the model is slow, 'all' drops none.
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
    # The unit of its frames' times, in seconds.
    time_base: Fraction = Fraction(1, 1000)
    # Frames per second, and how many there will be, if that is known.
    frame_rate: Fraction | None = None
    num_frames: int | None = None
    # The file or URL that may contain audio.
    audio: str | None = None
    # The reader of a live source, which counts what it drops.
    live: 'CameraReader | None' = field(default=None, repr=False)


@dataclass(frozen=True)
class Closed:
    """The end of an input."""

    input: Input
    # None if nothing could be read.
    stream: Stream | None = None
    # What could not be read.
    problem: str | None = None
    # Whether reading was stopped before the end.
    was_interrupted: bool = False
    # Whether it was found beside images and is neither image nor video, nor named like one.
    was_left_out: bool = False
    # Whether its storage is to blame, so that it may be read later.
    is_temporary: bool = False


@dataclass
class Frame:
    """An image, or a frame of a video, on its way from reading to writing."""

    input: Input
    # Of the image in memory.
    num_bytes: int
    # (height, width, 3), uint8, BGR; or the function that loads it.
    image: np.ndarray | None = None
    load: Callable[[], np.ndarray] | None = None
    # Of a video: the video, the number of the frame from the clip's start on, when it is shown, in
    # seconds, and when and for how long in units of the video's time base.
    stream: Stream | None = None
    index: int = 0
    time: float | None = None
    pts: int = 0
    duration: int | None = None
    # When the work on it began, by time.perf_counter.
    started: float = 0.0
    # The model's input and output.
    inputs: dict[str, Any] | None = None
    raw: Any = None
    # The prediction, or why there is none.
    prediction: Detections | Segmentation | None = None
    problem: str | None = None
    # Of output.Writer: the image with the prediction drawn over it, an image's line in
    # predictions.jsonl, the share of each class in a video's frame, and the frame's line of data.
    drawing: np.ndarray | None = None
    record: dict[str, Any] | None = None
    shares: dict[int, float] | None = None
    line: bytes | None = None


def read_inputs(
    inputs: Iterable[Input], clip: Clip, stop: threading.Event | None = None
) -> Iterator[Frame | Stream | Closed]:
    """Yield the frames of all inputs, until ``stop`` is set; a bad input does not stop others.

    Frames of a video come between its ``Stream`` and ``Closed``; an unreadable input is ``Closed``.
    """
    stop = stop or threading.Event()
    for item in inputs:
        if stop.is_set():
            return
        try:
            if item.problem:
                raise InputError(item.problem)
            if isinstance(item.data, np.ndarray):
                yield Frame(item, item.data.nbytes, item.data)
                continue
            encoded = None if item.data is None else io.BytesIO(item.data)
            source = _identify_image(encoded) if encoded else identify(item.path)
        except InputError as error:
            is_named_as_media = Path(item.path).suffix.lower() in MEDIA_SUFFIXES
            is_left_out = item.found and isinstance(error, NotMediaError) and not is_named_as_media
            is_temporary = isinstance(error, StorageError)
            yield Closed(
                item, problem=str(error), was_left_out=is_left_out, is_temporary=is_temporary
            )
            continue
        if source.kind == 'image':
            height, width = source.size
            yield Frame(item, height * width * 3, load=partial(images.read_image, source.file))
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
            for frame in parts:
                if stop.is_set():
                    break
                if frame is not None:
                    index, time, pts, duration, image = frame
                    yield Frame(item, image.nbytes, image, None, stream, index, time, pts, duration)
    except InputError as error:
        problem = str(error)
    yield Closed(item, stream, problem, was_interrupted=stop.is_set())


# Readers of streams yield the stream itself, then its frames, and raise InputError at the end if
# something was lost on the way. In a long wait for a frame they yield None, to be stopped there.
StreamParts = Generator[Stream | images.TimedImage | None, None, None]


def _read_video(item: Input, source: Source, clip: Clip) -> StreamParts:
    from .video_reader import VideoReader

    with closing(VideoReader(source.file, clip.every, clip.start, clip.end)) as reader:
        yield Stream(
            *(item, 'video', reader.width, reader.height),
            *(reader.time_base, reader.frame_rate, reader.num_frames),
            audio=source.file,
        )
        yield from reader
        if reader.problem:
            raise InputError(reader.problem)


def _read_animation(item: Input, source: Source, clip: Clip) -> StreamParts:
    with images.open_image(source.file) as image:
        frames = dropwhile(lambda frame: frame.time < clip.start, images.read_frames(image))
        if clip.end is not None:
            frames = takewhile(lambda frame: frame.time < clip.end, frames)
        first = next(frames, None)
        if first is None:
            span = f'from {clip.start:g} s on'
            if clip.end is not None:
                span = f'between {clip.start:g} and {clip.end:g} s'
            raise InputError(f'has no frame {span}')
        height, width = source.size
        yield Stream(item, 'animation', width, height)
        for index, frame in enumerate(chain([first], frames)):
            if index % clip.every == 0:
                yield frame._replace(index=index)


def _read_live(item: Input, source: Source, clip: Clip) -> StreamParts:
    """Read a camera or a stream, until it ends or ``clip.end`` seconds have passed."""
    try:
        from .camera import CameraReader
    except ImportError as error:
        raise InputError('is a camera or a stream, which needs PyAV: pip install av') from error
    with closing(CameraReader(source.file, clip.policy)) as reader:
        first = next(reader, None)
        if first is None:
            raise InputError('ended before the first frame')
        height, width = first.image.shape[:2]
        yield Stream(item, 'live', width, height, live=reader)
        for number, frame in enumerate(chain([first], reader)):
            if clip.end is not None and frame.time >= clip.end:
                return
            if number % clip.every or frame.time < clip.start:
                yield None
                continue
            # After a reconnection, frames may have another size.
            image = frame.image
            if image.shape != first.image.shape:
                image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
            yield frame._replace(image=image)


STREAM_READERS = {'video': _read_video, 'animation': _read_animation, 'live': _read_live}


def identify(path: str) -> Source:
    """Identify a file, a URL or ``webcam:N``; NotMediaError if it is neither image nor video."""
    if is_live(path):
        return Source('live', path)
    return _identify_url(path) if find_scheme(path) else _identify_file(path)


def _identify_file(path: str) -> Source:
    try:
        # Before it is opened: opening a pipe waits for somebody to write into it.
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise NotMediaError(f'cannot be read: {reason_of(error)}') from error
    if not stat.S_ISREG(status.st_mode):
        raise NotMediaError('is not a file but a folder, a device or a pipe')
    if not status.st_size:
        raise NotMediaError('is empty (0 bytes)')
    if Path(path).suffix.lower() not in ROW_SUFFIXES:
        with suppress(NotMediaError):
            return _identify_image(path)
    return _identify_video(path)


def _identify_image(file: str | io.BytesIO) -> Source:
    with images.open_image(file) as image:
        kind = 'animation' if images.is_animation(image) else 'image'
        return Source(kind, file, images.upright_size(image))


def _identify_video(path: str) -> Source:
    try:
        from .video_reader import find_video, open_container
    except ImportError as error:
        raise NotMediaError('is not an image, and videos need PyAV: pip install av') from error
    try:
        with open_container(path) as container:
            find_video(container)
    except InputError as error:
        hint = '; give - to read a list from standard input' if path.endswith('.txt') else ''
        raise NotMediaError(f'{error}{hint}') from error
    return Source('video', path)


def _identify_url(url: str) -> Source:
    """Identify a URL; an image is downloaded, of a video FFmpeg reads only what it needs."""
    is_web = find_scheme(url) in WEB_SCHEMES
    try:
        opened = _open_web(url) if is_web else fsspec.open(url, 'rb')
        with opened as file:
            content_type = file.headers.get_content_type() if is_web else ''
            if content_type == 'multipart/x-mixed-replace':
                return Source('live', url)
            data = file.read(images.SIGNATURE_BYTES)
            is_row = Path(url.partition('?')[0]).suffix.lower() in ROW_SUFFIXES
            may_be_image = images.begins_like_image(data) and not is_row
            if may_be_image or content_type.startswith('image/'):
                data += file.read(MAX_DOWNLOAD)
                if len(data) > MAX_DOWNLOAD:
                    raise InputError(f'is too large: more than {MAX_DOWNLOAD / 2**20:g} MiB')
                return _identify_image(io.BytesIO(data))
    except InputError:
        raise
    # Each storage has errors of its own.
    except Exception as error:
        # On the web, a server that does not answer may never do so again.
        is_lost = not is_web and not isinstance(error, (*PATH_ERRORS, ValueError))
        kind = StorageError if is_lost else InputError
        raise kind(f'cannot be read: {in_one_line(error)}') from error
    return _identify_video(url)


def _open_web(url: str) -> Any:
    # Quotes letters of other alphabets and spaces; what is quoted already stays.
    parts = urlsplit(quote(url, safe=string.punctuation))
    login, _, host = parts.netloc.rpartition('@')
    request = urllib.request.Request(
        parts._replace(netloc=host, fragment='').geturl(),
        headers={'User-Agent': 'efficientformer-v2-dense'},
    )
    if login:
        encoded = base64.b64encode(unquote_to_bytes(login)).decode()
        # Unredirected: another server that we are sent to must not get the password.
        request.add_unredirected_header('Authorization', f'Basic {encoded}')
    return urllib.request.urlopen(request, timeout=WEB_TIMEOUT)
