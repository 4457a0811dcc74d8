"""Frames from a camera or a stream, as they come."""

import errno
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import Literal
from urllib.parse import urlsplit

import cv2
import numpy as np

from backbones.errors import InputError

from .frame import TimedImage, Timing

STREAM_OPTIONS = {
    # Over TCP no packet is lost on the way, and none stops at a firewall; servers without get UDP.
    'rtsp_flags': 'prefer_tcp',
    # The first frame need not wait for a guess of the frame rate, nor 5 s for audio to be found.
    'fpsprobesize': '0',
    'analyzeduration': '1000000',  # microseconds
    # A consumer who is slow for a moment loses datagrams, but not the stream.
    'overrun_nonfatal': '1',
}

# Seconds to wait before each try to reconnect, until an image comes.
RETRY_DELAYS = (1, 2, 4, 8, 16)

# With the policy 'all', how many frames may wait.
QUEUE_SIZE = 8

# Seconds by which a time stamp may leap ahead of the time that has passed.
MAX_LEAP = 10.0

# A frame as it comes: its time stamp in seconds, or None, and (height, width, 3), uint8, BGR.
Stamped = tuple[float | None, np.ndarray]


class CameraReader:
    """Reads a camera or a stream in a thread of its own; iterating gives :class:`TimedImage`.

    Once constructed, the first frame has arrived. Iteration ends where the stream ends and after
    :meth:`close`, which any thread may call at any time. A connection that is lost is opened again,
    after longer and longer waits.

    Args:
        source: ``webcam:N``, or a URL with rtsp, rtmp, udp, http or https in front.
        policy: ``'latest'``: the consumer always gets the newest frame, and those that it had no
            time for are dropped. ``'all'``: the source is read no faster than the frames are
            taken, so that none is dropped here; a camera or a server may still do so itself.
        timeout: Seconds without a frame after which a connection is given up.

    Attributes:
        width: In pixels.
        height: In pixels.
        num_captured: Frames that have come.
        dropped: Frames that nobody had time for.

    Raises:
        InputError: There is no such camera or server, or it gives no frame. While iterating: the
            connection is lost and cannot be opened again, or a camera gives no more frames.
    """

    def __init__(
        self, source: str, policy: Literal['latest', 'all'] = 'latest', timeout: float = 10.0
    ) -> None:
        self.policy = policy
        self.timeout = timeout
        self.width = self.height = 0
        self.num_captured = self.dropped = 0
        self._source = source
        self._arrivals: deque[float] = deque(maxlen=30)
        self._clock = StreamClock()
        self._waiting: deque[TimedImage] = deque()
        self._changed = threading.Condition()
        self._is_closed = self._has_ended = self._is_reconnecting = False
        self._error: Exception | None = None
        # Here and not in the thread: macOS asks the user for permission in the main one alone.
        self._camera = open_webcam(source) if source.startswith('webcam:') else None
        # A daemon, since a read of the network that gets no answer cannot be interrupted.
        self._thread = threading.Thread(target=self._capture, daemon=True)
        self._thread.start()
        with self._changed:
            self._wait_until(lambda: self.num_captured or self._has_ended)
            has_frame = self.num_captured
            error = self._error or InputError(f'gave no frame for {timeout:g} s')
        if not has_frame:
            self.close()
            raise error

    @property
    def capture_rate(self) -> float:
        """Frames a second that the source gives, over the last 30; 0 before the second one."""
        with self._changed:
            arrivals = list(self._arrivals)
        seconds = arrivals[-1] - arrivals[0] if arrivals else 0.0
        return (len(arrivals) - 1) / seconds if seconds > 0 else 0.0

    def __iter__(self) -> Iterator[TimedImage]:
        return self

    def __next__(self) -> TimedImage:
        with self._changed:
            self._wait_until(lambda: self._waiting or self._has_ended or self._is_closed)
            if self._waiting:
                frame = self._waiting.popleft()
                self._changed.notify_all()
                return frame
            has_ended = self._has_ended or self._is_closed
            error, self._error = self._error, None
        if not has_ended:
            self.close()
            raise InputError(f'gave no frame for {self.timeout:g} s')
        if error:
            raise error
        raise StopIteration

    def close(self) -> None:
        """Stop reading; whoever waits for a frame is told that there are no more."""
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
            self._waiting.clear()
            self._error = None
            self._changed.notify_all()
        # Time for a camera to be free again. A read that gets no answer ends by itself, later.
        self._thread.join(1.0)

    def __enter__(self) -> 'CameraReader':
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait_until(self, condition) -> None:
        # Longer than ffmpeg waits, so that its own timeout can lead to a new connection.
        while not self._changed.wait_for(condition, 1.5 * self.timeout):
            if not self._is_reconnecting:
                return

    def _capture(self) -> None:
        """What the thread does."""
        delays = iter(RETRY_DELAYS)
        error = None
        while True:
            try:
                with closing(self._frames()) as frames:
                    for stamp, image in frames:
                        if not self._put(stamp, image):
                            break
                        delays = iter(RETRY_DELAYS)
                error = None
                break
            except Exception as caught:
                error = caught
            delay = next(delays, None)
            if self._camera is not None or not self.num_captured or delay is None:
                break
            with self._changed:
                self._is_reconnecting = True
                if self._changed.wait_for(lambda: self._is_closed, delay):
                    break
        with self._changed:
            self._has_ended = True
            # Of no interest to who has closed the reader: closing may be what caused it.
            self._error = None if self._is_closed else error
            self._changed.notify_all()

    def _put(self, stamp: float | None, image: np.ndarray) -> bool:
        """Hand a frame on; returns False when nobody wants more."""
        with self._changed:
            now = time.monotonic()
            seconds = self._clock(stamp, now)
            timing = Timing(seconds, round(seconds * 1000))
            frame = TimedImage(self.num_captured, timing, image)
            self.num_captured += 1
            self._is_reconnecting = False
            self.height, self.width = image.shape[:2]
            self._arrivals.append(now)
            if self.policy == 'latest':
                self.dropped += len(self._waiting)
                self._waiting.clear()
            else:
                self._changed.wait_for(lambda: self._is_closed or len(self._waiting) < QUEUE_SIZE)
            if self._is_closed:
                return False
            self._waiting.append(frame)
            self._changed.notify_all()
            return True

    def _frames(self) -> Iterator[Stamped]:
        if self._camera is not None:
            return read_webcam(self._camera)
        return read_stream(self._source, self.timeout)


class StreamClock:
    """Seconds since the first frame, by time stamps as far as they can be believed.

    A stamp that is missing, goes back or leaps ahead (a camera sets its clock, a connection is new)
    counts for as long as it took to come.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._last: tuple[float | None, float] | None = None

    def __call__(self, stamp: float | None, now: float) -> float:
        """The time of a frame with a stamp, or None, that came at ``now``, all in seconds."""
        if self._last is not None:
            last_stamp, last_now = self._last
            step = elapsed = now - last_now
            if stamp is not None and last_stamp is not None:
                stamped = stamp - last_stamp
                step = stamped if 0 < stamped < elapsed + MAX_LEAP else elapsed
            self._seconds += step
        self._last = (stamp, now)
        return self._seconds


def open_webcam(source: str) -> cv2.VideoCapture:
    """The camera of ``webcam:N``."""
    number = int(source.removeprefix('webcam:'))
    level = cv2.getLogLevel()
    cv2.setLogLevel(0)  # we say ourselves what is wrong
    try:
        capture = cv2.VideoCapture(number)
    finally:
        cv2.setLogLevel(level)
    if not capture.isOpened():
        capture.release()
        raise InputError('is not there, or we may not open it')
    return capture


def read_webcam(capture: cv2.VideoCapture) -> Iterator[Stamped]:
    """Frames without time stamps, since what drivers say of them differs."""
    try:
        while True:
            is_given, image = capture.read()
            if not is_given:
                raise InputError('gives no frames: is it unplugged, or used by another program?')
            yield None, image
    finally:
        capture.release()


def read_stream(url: str, timeout: float) -> Iterator[Stamped]:
    """Frames with their time stamps."""
    try:
        import av
        from av.video.reformatter import VideoReformatter
    except ImportError as error:
        raise InputError('is a stream, which needs PyAV: pip install av') from error

    scheme, _, rest = url.partition('://')
    last = time.monotonic()
    try:
        # FFmpeg knows no RTSP://.
        container = av.open(f'{scheme.lower()}://{rest}', options=STREAM_OPTIONS, timeout=timeout)
        with container:
            stream = next(iter(container.streams.video), None)
            if stream is None or stream.codec_context is None:
                raise InputError('has no video in it that can be decoded')
            # FFmpeg makes stamps up, 25 a second, where the format has none.
            has_stamps = not container.format.flags & av.format.Flags.no_timestamps.value
            to_bgr = VideoReformatter()
            for packet in until_end(container, stream):
                # One that is corrupt or needs an earlier one is left out.
                with suppress(av.FFmpegError):
                    for frame in packet.decode():
                        image = to_bgr.reformat(frame, format='bgr24', threads=1).to_ndarray()
                        yield frame.time if has_stamps else None, image
                        last = time.monotonic()
    except av.FFmpegError as error:
        # What FFmpeg calls a wait that it gave up depends on where it was waiting.
        if time.monotonic() - last >= timeout:
            raise InputError(f'gave no frame for {timeout:g} s') from error
        raise InputError(explain(error, url)) from error


def until_end(container, stream) -> Iterator:
    """Packets of a stream."""
    try:
        yield from container.demux(stream)
    except OSError as error:
        # How FFmpeg's reader of MJPEG over http says that the server has ended the stream.
        if container.format.name != 'mpjpeg' or error.errno != errno.EIO:
            raise


def explain(error: Exception, url: str) -> str:
    """Why a stream cannot be read, and what to do, to stand behind its URL."""
    import av

    match error:
        case ConnectionRefusedError():
            return 'refuses the connection: is the server running, and is the port right?'
        case av.error.HTTPUnauthorizedError():
            return 'wants a user name and a password: SCHEME://NAME:PASSWORD@HOST/PATH'
        case av.error.HTTPNotFoundError():
            return 'has no stream of this path'
        case av.error.ArgumentError():
            return 'is not a valid URL'
    host = urlsplit(url).hostname
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return f'cannot be reached: there is no server of the name {host}, or no network'
    if isinstance(error, av.error.InvalidDataError) or error.errno == errno.EIO:
        return 'is not a video stream'
    return f'cannot be read: {error.strerror}'
