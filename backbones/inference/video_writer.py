"""Writing an H.264 MP4 that every browser plays."""

import errno
import os
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from uuid import uuid4

import av
import cv2
import numpy as np
from av import error as av_error
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from .audio_track import AudioTrack
from .video_reader import INTERPOLATION

# Measured on one thread at 1280×720: 9 ms a frame. superfast takes as long for up to five times the
# bytes, ultrafast a third of the time for twice the bytes, faster twice the time. B-frames would
# save a fifth of the bytes for a third more time.
PRESET = 'veryfast'
QUALITY = 20

# Most cores are the model's.
CORES_PER_THREAD = 4
MAX_ENCODER_THREADS = 4

# MP4 keeps how long each frame is shown in 32 bits; finer units could not hold a few seconds.
FINEST_TIME_BASE = Fraction(1, 1_000_000)
USUAL_TIME_BASE = Fraction(1, 90_000)

# As ITU-T H.273 numbers BT.709 in matrix, primaries and transfer.
BT709 = 1


class VideoWriter:
    """Writes pictures, and the sound of the video they come from, to an MP4.

    H.264 in 4:2:0, BT.709, with the index in front so that it plays while it is still loading.
    Frames keep their times, whatever their rate is. A picture with an odd width or height gets its
    last column or row twice, because 4:2:0 needs even ones.

    Until it is finished the file has another name, in the same folder, and what was at ``path``
    stays. As a context manager it is finished at the end of the block and also on
    ``KeyboardInterrupt``, with what has been written so far; after any other exception nothing
    is left of it.

    Use it from one thread at a time. Conversion and encoding release the GIL.

    Args:
        path: File to write or to replace.
        width: Of the pictures, in pixels.
        height: Of the pictures, in pixels.
        time_base: Seconds; the unit of ``pts``.
        frame_rate: Frames a second, for the encoder to share out bits by; about is good enough.
        source: File with the sound, or None for a video without sound.
        start: Where the source was cut, in seconds, as given to the reader. The first frame then
            is the beginning of the new video, else the beginning of the source is.
        end: Likewise; sound ends there at the latest.

    Attributes:
        path: As given.
        num_frames: Frames written so far.

    Raises:
        OSError: The file cannot be written, the disk is full for instance. From here on, and from
            all methods. Nothing is left then.
    """

    def __init__(
        self,
        path: str | Path,
        width: int,
        height: int,
        *,
        time_base: Fraction,
        frame_rate: Fraction | None = None,
        source: str | Path | None = None,
        start: float | None = None,
        end: float | None = None,
    ) -> None:
        self.path = Path(path)
        self.num_frames = 0
        self._size = (width, height)
        self._time_base = Fraction(time_base)
        self._frame_rate = Fraction(frame_rate) if frame_rate else Fraction(25)
        self._start = Fraction(start) if start else None
        self._end = Fraction(end) if end is not None else None
        self._origin = Fraction(0)
        self._last_pts = -1
        self._last_duration = 1
        self._closed = False
        self._sound: AudioTrack | None = None
        self._reformatter = VideoReformatter()
        # Short, because a name has at most 255 bytes.
        self._partial = self.path.with_name(f'.{self.path.stem[:40]}.{uuid4().hex[:8]}.partial')
        self._reserve()
        try:
            self._output = av.open(
                f'file:{self._partial}',
                'w',
                format='mp4',
                container_options={'movflags': '+faststart'},
            )
            self._stream = self._add_video()
            if source is not None:
                self._sound = AudioTrack(source, self._output)
        except BaseException:
            self._partial.unlink(missing_ok=True)
            raise

    def _reserve(self) -> None:
        # So that a place that cannot be written to is an error before any work.
        try:
            if self.path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._partial.touch()
        except OSError as error:
            raise_disk_error(error, self.path)

    def _add_video(self) -> av.VideoStream:
        options = {'preset': PRESET, 'crf': str(QUALITY), 'bf': '0'}
        # Given as a rate, ffmpeg takes no more than 32 bits for each part.
        rate = self._frame_rate.limit_denominator(1001)
        stream = self._output.add_stream('libx264', rate=rate, options=options)
        width, height = self._size
        stream.width, stream.height = width + width % 2, height + height % 2
        stream.pix_fmt = 'yuv420p'
        context = stream.codec_context
        context.time_base = Fraction(1, self._time_base.denominator)
        if context.time_base < FINEST_TIME_BASE:
            context.time_base = USUAL_TIME_BASE
        self._ticks = Fraction(context.time_base)
        cores = os.cpu_count() or 1
        context.thread_count = min(max(cores // CORES_PER_THREAD, 1), MAX_ENCODER_THREADS)
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = ColorRange.MPEG
        return stream

    def __enter__(self) -> 'VideoWriter':
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc_type is None or issubclass(exc_type, KeyboardInterrupt):
            self.close()
        else:
            self.discard()

    @property
    def problem(self) -> str | None:
        """What of the sound was lost; None when nothing was."""
        return self._sound.problem if self._sound is not None else None

    def write(self, picture: np.ndarray, pts: int, duration: int | None = None) -> None:
        """Append a frame.

        Args:
            picture: (height, width, 3), uint8, BGR. It is not kept.
            pts: When it is shown, in units of ``time_base`` after the beginning of the source. One
                that is not after the frame before is shown as soon after it as can be.
            duration: For how long, in the same units. Counts for the last frame only, as others are
                shown until the next.

        Raises:
            OSError: See the class.
            ValueError: The picture has another size.
        """
        width, height = self._size
        if picture.shape != (height, width, 3) or picture.dtype != np.uint8:
            raise ValueError(
                f'expected a picture of shape {(height, width, 3)} and type uint8, '
                f'not {picture.shape} and {picture.dtype}'
            )
        try:
            self._write(picture, pts * self._time_base, duration)
        except Exception as error:
            self.discard()
            raise_disk_error(error, self.path)
            raise

    def _write(self, picture: np.ndarray, time: Fraction, duration: int | None) -> None:
        if self.num_frames == 0:
            if self._start is not None:
                self._origin = time
            if self._sound is not None:
                self._sound.begin(self._origin, self._start, self._end)
        frame = self._convert(picture)
        frame.pts = max(round((time - self._origin) / self._ticks), self._last_pts + 1)
        frame.time_base = self._ticks
        if duration is not None:
            self._last_duration = max(round(duration * self._time_base / self._ticks), 1)
        elif self.num_frames:
            self._last_duration = frame.pts - self._last_pts
        else:
            self._last_duration = max(round(1 / self._frame_rate / self._ticks), 1)
        self._last_pts = frame.pts
        self.num_frames += 1
        self._encode(frame)

    def _convert(self, picture: np.ndarray) -> av.VideoFrame:
        height, width = picture.shape[:2]
        if height % 2 or width % 2:
            picture = cv2.copyMakeBorder(picture, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
        frame = av.VideoFrame.from_numpy_buffer(np.ascontiguousarray(picture), 'bgr24')
        return self._reformatter.reformat(
            frame,
            format='yuv420p',
            dst_colorspace=Colorspace.ITU709,
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.MPEG,
            interpolation=INTERPOLATION,
            threads=1,
        )

    def _encode(self, frame: av.VideoFrame | None) -> None:
        for packet in self._stream.encode(frame):
            # Without B-frames packets come in the order they are shown.
            if packet.pts == self._last_pts:
                packet.duration = self._last_duration
            if self._sound is not None:
                self._sound.write_until(packet.pts * self._ticks)
            self._output.mux(packet)

    def close(self, whole_audio: bool = False) -> None:
        """Finish the file; without a single frame there is none. Calling it again does nothing.

        Args:
            whole_audio: Sound goes on after the last frame as it does in the source; by default
                it ends with the pictures.

        Raises:
            OSError: See the class.
        """
        if self._closed:
            return
        if self.num_frames == 0:
            self.discard()
            return
        try:
            self._finish(whole_audio)
        except BaseException as error:
            self.discard()
            raise_disk_error(error, self.path)
            raise

    def _finish(self, whole_audio: bool) -> None:
        self._encode(None)
        if self._sound is not None:
            until = (self._last_pts + self._last_duration) * self._ticks
            self._sound.write_until(None if whole_audio else until)
            self._sound.close()
        self._output.close()
        # A crash of the machine must not leave an empty file under the real name.
        with open(self._partial, 'rb') as file:
            os.fsync(file.fileno())
        os.replace(self._partial, self.path)
        self._closed = True

    def discard(self) -> None:
        """Leave nothing of the file; after :meth:`close` this does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._sound is not None:
            self._sound.close()
        # What cannot be finished was not to be kept.
        with suppress(av_error.FFmpegError, OSError, ValueError):
            self._output.close()
        self._partial.unlink(missing_ok=True)


def raise_disk_error(error: BaseException, path: Path) -> None:
    """Raise an error of the file system, or another of ffmpeg, again, about the file it is about.

    Raises:
        OSError: If it was one.
    """
    if not isinstance(error, (OSError, av_error.FFmpegError)):
        return
    if error.errno == errno.ENOSPC:
        message = 'no space left on the disk; nothing of the video was kept'
    else:
        message = f'{error.strerror or error}; the video is not written'
    raise OSError(error.errno, message, str(path)) from error
