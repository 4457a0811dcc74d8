"""Frames from a camera or a stream, as they come."""

import errno
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from functools import partial
from queue import Empty, Full, Queue
from typing import Literal

import av
import cv2
import numpy as np
from av.video.reformatter import VideoReformatter

from backbones.errors import InputError

from .images import TimedImage

STREAM_OPTIONS = {
    # TCP loses no packets and passes firewalls; servers without it are read over UDP.
    'rtsp_flags': 'prefer_tcp',
    # So that the first frame does not wait for a guess of the frame rate, or 5 s for audio.
    'fpsprobesize': '0',
    'analyzeduration': '1000000',  # microseconds
    # If the consumer is slow for a moment, datagrams are lost, but not the stream.
    'overrun_nonfatal': '1',
}

# Seconds to wait before each try to reconnect, until an image comes.
RETRY_DELAYS = (1, 2, 4, 8, 16)

# Seconds to wait until a camera is released. A read without an answer ends by itself, later.
CLOSE_TIMEOUT = 1.0

# With the policy 'all', at most this many frames wait.
QUEUE_SIZE = 8

# Seconds by which a time stamp may jump ahead of the time that has passed.
MAX_LEAP = 10.0

# A frame as it comes: its time stamp in seconds, or None, and (height, width, 3), uint8, BGR.
Stamped = tuple[float | None, np.ndarray]


class CameraReader:
    """Reads a camera or a stream in a thread of its own; iterating yields :class:`TimedImage`.

    Raises InputError if there is no such source, or if it gives no frame for ``timeout`` seconds
    and cannot be reopened.

    Args:
        source: ``webcam:N``, or an rtsp, rtmp, udp, http or https URL.
        policy: ``'latest'``: the consumer gets the newest frame; frames that it had no time for
            are dropped and counted. ``'all'``: the source is read no faster than frames are taken.
    """

    def __init__(
        self, source: str, policy: Literal['latest', 'all'] = 'latest', timeout: float = 10.0
    ) -> None:
        self.timeout = timeout
        self.num_captured = self.dropped = 0
        self._drops = policy == 'latest'
        self._queue: Queue[TimedImage | Exception] = Queue(1 if self._drops else QUEUE_SIZE)
        self._is_closed = threading.Event()
        self._is_reconnecting = False
        # Opened here, since macOS asks the user for permission only in the main thread.
        self._is_webcam = source.startswith('webcam:')
        if self._is_webcam:
            self._frames = partial(read_webcam, open_webcam(source))
        else:
            self._frames = partial(read_stream, source, timeout)
        # A daemon, since a network read without an answer cannot be interrupted.
        self._thread = threading.Thread(target=self._capture, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[TimedImage]:
        return self

    def __next__(self) -> TimedImage:
        item = None
        while item is None and not self._is_closed.is_set():
            try:
                # Longer than ffmpeg waits, so that its own timeout can lead to a reconnection.
                item = self._queue.get(timeout=1.5 * self.timeout)
            except Empty:
                if not self._is_reconnecting:
                    item = InputError(f'gave no frame for {self.timeout:g} s')
        if isinstance(item, TimedImage):
            return item
        self.close()
        raise item or StopIteration

    def close(self) -> None:
        """Stop reading."""
        self._is_closed.set()
        self._thread.join(CLOSE_TIMEOUT)

    def _capture(self) -> None:
        """Run the thread: pass on frames, and reopen a lost connection."""
        clock, delays = StreamClock(), iter(RETRY_DELAYS)
        while True:
            try:
                with closing(self._frames()) as frames:
                    for stamp, image in frames:
                        seconds = clock(stamp, time.monotonic())
                        frame = TimedImage(
                            self.num_captured, seconds, round(seconds * 1000), None, image
                        )
                        self.num_captured += 1
                        self._is_reconnecting = False
                        if not self._put(frame):
                            return
                        delays = iter(RETRY_DELAYS)
                end: Exception = StopIteration()
                break
            except Exception as error:
                end, delay = error, next(delays, None)
                if self._is_webcam or not self.num_captured or delay is None:
                    break
                self._is_reconnecting = True
                if self._is_closed.wait(delay):
                    return
        self._put(end)

    def _put(self, item: TimedImage | Exception) -> bool:
        """Pass on a frame or the end; return False if the reader was closed."""
        while not self._is_closed.is_set():
            if self._drops and isinstance(item, TimedImage):
                with suppress(Empty):
                    self._queue.get_nowait()
                    self.dropped += 1
            with suppress(Full):
                self._queue.put(item, timeout=0.1)
                return True
        return False


class StreamClock:
    """Computes seconds since the first frame, from time stamps if they are plausible.

    If a stamp is missing, goes back or jumps ahead (a camera sets its clock, a connection is new),
    the time since the last frame came is added instead.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._last: tuple[float | None, float] | None = None

    def __call__(self, stamp: float | None, now: float) -> float:
        """Return the time of a frame that came at ``now``; all in seconds, the stamp or None."""
        if self._last is not None:
            last_stamp, last_now = self._last
            step = elapsed = now - last_now
            if None not in (stamp, last_stamp) and 0 < stamp - last_stamp < elapsed + MAX_LEAP:
                step = stamp - last_stamp
            self._seconds += step
        self._last = (stamp, now)
        return self._seconds


def open_webcam(source: str) -> cv2.VideoCapture:
    """Open the camera of ``webcam:N``."""
    capture = cv2.VideoCapture(int(source.removeprefix('webcam:')))
    if not capture.isOpened():
        raise InputError('does not exist, or may not be opened by this user')
    return capture


def read_webcam(capture: cv2.VideoCapture) -> Generator[Stamped, None, None]:
    """Yield frames without time stamps, since these differ between drivers."""
    try:
        while True:
            is_given, image = capture.read()
            if not is_given:
                raise InputError('gives no frames: is it unplugged, or used by another program?')
            yield None, image
    finally:
        capture.release()


def read_stream(url: str, timeout: float) -> Generator[Stamped, None, None]:
    """Yield frames with their time stamps."""
    scheme, _, rest = url.partition('://')
    last, is_mjpeg = time.monotonic(), False
    try:
        # FFmpeg does not know RTSP:// in capitals.
        container = av.open(f'{scheme.lower()}://{rest}', options=STREAM_OPTIONS, timeout=timeout)
        with container:
            stream = next(iter(container.streams.video), None)
            if stream is None or stream.codec_context is None:
                raise InputError('contains no video that can be decoded')
            # If the format has no time stamps, FFmpeg makes them up, 25 per second.
            has_stamps = not container.format.flags & av.format.Flags.no_timestamps.value
            to_bgr, is_mjpeg = VideoReformatter(), container.format.name == 'mpjpeg'
            for packet in container.demux(stream):
                # Packets that are corrupt or need an earlier one are left out.
                with suppress(av.FFmpegError):
                    for frame in packet.decode():
                        image = to_bgr.reformat(frame, format='bgr24', threads=1).to_ndarray()
                        yield frame.time if has_stamps else None, image
                        last = time.monotonic()
    except av.FFmpegError as error:
        # FFmpeg's error for a timeout depends on where it was waiting.
        if time.monotonic() - last >= timeout:
            raise InputError(f'gave no frame for {timeout:g} s') from error
        # FFmpeg's reader of MJPEG over http gives EIO when the server has ended the stream.
        if not (is_mjpeg and error.errno == errno.EIO):
            raise InputError(
                f'gives no video ({error.strerror}): is the URL right, with NAME:PASSWORD@ before '
                'the host if the server needs a login, and is the server running?'
            ) from error
