"""Pictures from a camera or a stream of the network, as they come."""

import errno
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import av
import av.error
import cv2
import numpy as np
from av.video.reformatter import VideoReformatter

from backbones.errors import InputError

from .inputs import STREAM_SCHEMES, WEB_SCHEMES, find_scheme

STREAM_OPTIONS = {
    # Over TCP no packet is lost on the way, and none stops at a firewall; servers without get UDP.
    'rtsp_flags': 'prefer_tcp',
    # The first picture need not wait for a guess of the frame rate, nor 5 s for sound to be found.
    'fpsprobesize': '0',
    'analyzeduration': '1000000',  # microseconds
    # A consumer who is slow for a moment loses datagrams, but not the stream.
    'overrun_nonfatal': '1',
}


@dataclass(frozen=True)
class CameraFrame:
    """One picture of a live source.

    Attributes:
        index: Which of the captured pictures, from 0; what is missing between two was dropped.
        time: Seconds since the first one.
        picture: (height, width, 3), uint8, BGR.
    """

    index: int
    time: float
    picture: np.ndarray


class CameraReader:
    """Reads a camera or a stream in a thread of its own; iterating gives :class:`CameraFrame`.

    Once constructed, the first picture has arrived. Iteration ends where the stream ends and after
    :meth:`close`, which any thread may call at any time.

    Args:
        source: ``webcam:N``, or an address with rtsp, rtmp, udp, http or https in front.
        policy: ``'latest'``: the consumer always gets the newest picture, and those that it had no
            time for are dropped. ``'all'``: the source is read no faster than the pictures are
            taken, so that none is dropped here; a camera or a server may still do so itself. A
            recording behind http, which does not run away, is always read with ``'all'``.
        timeout: Seconds without a picture, at the start or later, after which we give up.
        queue_size: With ``'all'``, how many pictures may wait.

    Raises:
        InputError: There is no such camera or server, or it gives no picture. While iterating: the
            connection is lost, or no picture has come for ``timeout`` seconds.
    """

    def __init__(
        self, source: str, policy: str = 'latest', timeout: float = 10.0, queue_size: int = 8
    ) -> None:
        if policy not in ('latest', 'all'):
            raise ValueError(f"policy must be 'latest' or 'all', not {policy!r}")
        self.policy = policy
        self.timeout = timeout
        self.queue_size = queue_size
        self.captured = 0
        self.dropped = 0
        self.width = 0
        self.height = 0
        self._giver = describe_giver(source)
        self._clock = StreamClock()
        self._arrivals: deque[float] = deque(maxlen=30)
        self._waiting: deque[CameraFrame] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._ended = False
        self._error: Exception | None = None
        if source.startswith('webcam:'):
            # Here and not in the thread: macOS asks the user for permission in the main one alone.
            pictures = read_camera(open_camera(source), self._giver)
        else:
            scheme, _, rest = source.partition('://')
            pictures = self._read_stream(f'{scheme.lower()}://{rest}')  # FFmpeg knows no RTSP://
        # A daemon, since a read of the network that gets no answer cannot be interrupted.
        self._thread = threading.Thread(target=self._capture, args=(pictures,), daemon=True)
        self._thread.start()
        self._wait_for_first()

    @property
    def capture_rate(self) -> float:
        """Pictures a second that the source gives, over the last 30; 0 before the second one."""
        with self._changed:
            arrivals = list(self._arrivals)
        seconds = arrivals[-1] - arrivals[0] if arrivals else 0.0
        return (len(arrivals) - 1) / seconds if seconds > 0 else 0.0

    def __iter__(self) -> Iterator[CameraFrame]:
        return self

    def __next__(self) -> CameraFrame:
        with self._changed:
            in_time = self._changed.wait_for(
                lambda: self._waiting or self._ended or self._closed, self.timeout
            )
            if self._waiting:
                frame = self._waiting.popleft()
                self._changed.notify_all()
                return frame
            error, self._error = self._error, None
        if not in_time:
            self.close()
            raise InputError(f'{self._giver} gave no picture for {self.timeout:g} s')
        if error:
            raise error
        raise StopIteration

    def close(self) -> None:
        """Stops reading; whoever waits for a picture is told that there are no more."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._waiting.clear()
            self._error = None
            self._changed.notify_all()
        # Time for a camera to be free again. A read that gets no answer ends by itself, later.
        self._thread.join(1.0)

    def __enter__(self) -> 'CameraReader':
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait_for_first(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.captured or self._ended, self.timeout)
            captured, ended, error = self.captured, self._ended, self._error
        if captured:
            return
        self.close()
        if error:
            raise error
        if ended:
            raise InputError(f'{self._giver} ended the stream before the first picture')
        raise InputError(self._no_answer())

    def _no_answer(self) -> str:
        return f'{self._giver} did not answer with a picture within {self.timeout:g} s'

    def _capture(self, pictures: Iterator[tuple[float | None, np.ndarray]]) -> None:
        """What the thread does."""
        error = None
        try:
            with closing(pictures):
                for stamp, picture in pictures:
                    if not self._put(stamp, picture):
                        break
        except Exception as caught:
            error = caught
        with self._changed:
            self._ended = True
            # Of no interest to who has closed the reader: closing may be what caused it.
            self._error = None if self._closed else error
            self._changed.notify_all()

    def _put(self, stamp: float | None, picture: np.ndarray) -> bool:
        """Hands a picture on; returns False when nobody wants more."""
        with self._changed:
            now = time.monotonic()
            frame = CameraFrame(self.captured, self._clock(stamp, now), picture)
            self.captured += 1
            self.height, self.width = picture.shape[:2]
            self._arrivals.append(now)
            if self.policy == 'latest':
                self.dropped += len(self._waiting)
                self._waiting.clear()
            else:
                self._changed.wait_for(lambda: self._closed or len(self._waiting) < self.queue_size)
            if self._closed:
                return False
            self._waiting.append(frame)
            self._changed.notify_all()
            return True

    def _read_stream(self, url: str) -> Iterator[tuple[float | None, np.ndarray]]:
        """Pictures with their time stamps, in seconds, or None where the stream has none."""
        start = time.monotonic()
        try:
            container = av.open(url, options=STREAM_OPTIONS, timeout=self.timeout)
        except av.FFmpegError as error:
            # What FFmpeg calls a wait that it gave up depends on where it was waiting.
            if time.monotonic() - start >= self.timeout:
                raise InputError(self._no_answer()) from error
            raise InputError(explain_open(error, self._giver, url)) from error
        with container:
            stream = next(iter(container.streams.video), None)
            if stream is None or stream.codec_context is None:
                raise InputError(f'{self._giver} sends no video that can be decoded')
            if url.startswith('http') and container.duration:
                self.policy = 'all'
            # FFmpeg makes stamps up, 25 a second, where the format has none.
            has_stamps = not container.format.flags & av.format.Flags.no_timestamps.value
            to_bgr = VideoReformatter()
            try:
                for packet in container.demux(stream):
                    for frame in decode(packet):
                        picture = to_bgr.reformat(frame, format='bgr24', threads=1).to_ndarray()
                        yield frame.time if has_stamps else None, picture
            except av.FFmpegError as error:
                # How FFmpeg's reader of MJPEG over http says that the server has ended the stream.
                if container.format.name == 'mpjpeg' and is_unreadable(error):
                    return
                raise InputError(explain_loss(error, self._giver, self.timeout)) from error


class StreamClock:
    """Seconds since the first picture, from time stamps as far as they can be believed.

    A stamp that is missing, goes back or leaps ahead (a camera sets its clock, a server starts its
    film again) counts for as long as it took to come.
    """

    MAX_LEAP = 10.0

    def __init__(self) -> None:
        self.seconds = 0.0
        self.last_stamp: float | None = None
        self.last_now: float | None = None

    def __call__(self, stamp: float | None, now: float) -> float:
        """The time of a picture.

        Args:
            stamp: Its time stamp in seconds, or None.
            now: When it came, in seconds of a clock that only goes forward.
        """
        if self.last_now is not None:
            step = elapsed = now - self.last_now
            if stamp is not None and self.last_stamp is not None:
                stamped = stamp - self.last_stamp
                if 0 < stamped < elapsed + self.MAX_LEAP:
                    step = stamped
            self.seconds += step
        self.last_stamp, self.last_now = stamp, now
        return self.seconds


def open_camera(source: str) -> cv2.VideoCapture:
    """The camera of ``webcam:N``."""
    number = source.removeprefix('webcam:')
    if not re.fullmatch('[0-9]{1,4}', number):
        raise InputError('a camera is given by its number, as in webcam:0')
    level = cv2.getLogLevel()
    cv2.setLogLevel(0)  # we say ourselves what is wrong
    try:
        capture = cv2.VideoCapture(int(number))
    finally:
        cv2.setLogLevel(level)
    if not capture.isOpened():
        capture.release()
        raise InputError(f'there is no camera {number}, or we may not open it')
    return capture


def read_camera(capture: cv2.VideoCapture, giver: str) -> Iterator[tuple[None, np.ndarray]]:
    """Pictures without time stamps, since what drivers say of them differs."""
    try:
        given = False
        while True:
            given_now, picture = capture.read()
            if not given_now:
                break
            given = True
            yield None, picture
    finally:
        capture.release()
    if given:
        raise InputError(f'{giver} gives no more pictures: is it still plugged in?')
    raise InputError(f'{giver} gives no pictures: is another program using it?')


def decode(packet: av.Packet) -> list[av.VideoFrame]:
    """The frames of a packet; none from one that is damaged or needs an earlier one."""
    try:
        return packet.decode()
    except av.FFmpegError:
        return []


def describe_giver(source: str) -> str:
    """Who gives the pictures, without a password that may be in the address."""
    if source.startswith('webcam:'):
        return f'camera {source.removeprefix("webcam:")}'
    scheme = find_scheme(source)
    schemes = STREAM_SCHEMES + WEB_SCHEMES
    if scheme not in schemes:
        raise InputError(
            f'is neither webcam:N nor an address that begins with {", ".join(schemes)} and ://'
        )
    host = find_host(source)
    if not host:
        raise InputError(f'names no server: {scheme}://HOST/PATH')
    return f'the sender to {host}' if scheme == 'udp' else f'the server at {host}'


def find_host(url: str) -> str:
    """Host and port of an address, without user name and password."""
    return re.match(r'\w+://(?:[^/?]*@)?([^/?]*)', url)[1]


def explain_open(error: av.FFmpegError, giver: str, url: str) -> str:
    """Why a stream cannot be opened, and what to do."""
    match error:
        case ConnectionRefusedError():
            return f'{giver} refuses the connection: is it running, and is the port right?'
        case av.error.HTTPUnauthorizedError():
            scheme = url.partition(':')[0]
            return (
                f'{giver} wants a user name and a password, and the right ones: '
                f'{scheme}://NAME:PASSWORD@HOST/PATH'
            )
        case av.error.HTTPForbiddenError():
            return f'{giver} forbids it'
        case av.error.HTTPNotFoundError():
            return f'{giver} has no stream of this path'
        case av.error.HTTPError() | av.error.HTTPClientError():
            return f'{giver} says: {error.strerror}'
        case av.error.ArgumentError():
            return 'is not a valid address'
    host = find_host(url).rpartition(':')[0] or find_host(url)
    if isinstance(error, OSError) and not has_address(host):
        return f'there is no server of the name {host}, or no network'
    if is_unreadable(error):
        return f'{giver} sends something that is not a video stream'
    return f'{giver} cannot be reached ({error.strerror})'


def explain_loss(error: av.FFmpegError, giver: str, timeout: float) -> str:
    """Why a stream that was being read broke off."""
    if isinstance(error, (av.error.ExitError, TimeoutError)):
        return f'{giver} gave no picture for {timeout:g} s'
    return f'the connection to {giver} was lost ({error.strerror})'


def is_unreadable(error: av.FFmpegError) -> bool:
    """Whether FFmpeg got an answer, and found in it nothing, or nothing more, that it can read."""
    return isinstance(error, av.error.InvalidDataError) or error.errno == errno.EIO


def has_address(host: str) -> bool:
    try:
        socket.getaddrinfo(host.strip('[]'), None)
    except OSError:
        return False
    return True
