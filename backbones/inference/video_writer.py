"""Writing an H.264 MP4 with audio that every browser plays."""

import errno
import os
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import cv2
import numpy as np
from av import error as av_error
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from backbones.files import atomic_write

from .audio_track import AudioTrack
from .video_reader import INTERPOLATION

# Measured on one thread at 1280×720: 9 ms a frame. superfast takes as long for up to five times the
# bytes, ultrafast a third of the time for twice the bytes, faster twice the time. B-frames would
# save a fifth of the bytes for a third more time.
ENCODER_OPTIONS = {'preset': 'veryfast', 'crf': '20', 'bf': '0'}

# Most cores are the model's.
CORES_PER_THREAD = 4
MAX_ENCODER_THREADS = 4

# MP4 keeps how long each frame is shown in 32 bits; finer units could not hold a few seconds.
FINEST_TIME_BASE = Fraction(1, 1_000_000)
USUAL_TIME_BASE = Fraction(1, 90_000)

# As ITU-T H.273 numbers BT.709 in matrix, primaries and transfer.
BT709 = 1


class VideoWriter:
    """Writes images, and the audio of the video they come from, to an MP4.

    H.264 in 4:2:0, BT.709, with the index in front so that it plays while it is still loading.
    Frames keep their times, whatever their rate is. An image with an odd width or height gets its
    last column or row twice, because 4:2:0 needs even ones.

    Until it is finished the file has another name, in the same folder, and what was at ``path``
    stays. As a context manager it is finished at the end of the block and also on
    ``KeyboardInterrupt``, with what has been written so far; after any other exception nothing
    is left of it.

    Use it from one thread at a time. Conversion and encoding release the GIL.

    Args:
        path: File to write or to replace.
        width: Of the images, in pixels.
        height: Of the images, in pixels.
        time_base: Seconds; the unit of ``pts``.
        frame_rate: Frames a second, for the encoder to share out bits by; about is good enough.
        source: File or URL with the audio, or None for a video without audio.
        start: Where the source was cut, in seconds, as given to the reader. The first frame then
            is the beginning of the new video, else the beginning of the source is.
        end: Likewise; audio ends there at the latest.

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
        self._frame_rate = Fraction(frame_rate or 25)
        self._is_cut = bool(start)
        self._end = None if end is None else Fraction(end)
        self._origin = Fraction(0)
        self._last_pts = -1
        self._last_duration = 1
        self._audio: AudioTrack | None = None
        self._output: av.container.OutputContainer | None = None
        self._reformatter = VideoReformatter()
        self._is_closed = False
        self._file = atomic_write(self.path)
        try:
            if self.path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            partial = self._file.__enter__()
            # Without "file:" in front, a colon in a name would make a URL of it.
            self._output = av.open(
                f'file:{partial}', 'w', format='mp4', container_options={'movflags': '+faststart'}
            )
            self._stream = self._add_video()
            if source is not None:
                self._audio = AudioTrack(source, self._output)
            self._output.start_encoding()
        except BaseException as error:
            self.discard()
            raise self._explained(error) from error

    def _add_video(self) -> av.VideoStream:
        # Given as a rate, ffmpeg takes no more than 32 bits for each part.
        rate = self._frame_rate.limit_denominator(1001)
        stream = self._output.add_stream('libx264', rate=rate, options=ENCODER_OPTIONS)
        width, height = self._size
        stream.width, stream.height = width + width % 2, height + height % 2
        stream.pix_fmt = 'yuv420p'
        context = stream.codec_context
        context.time_base = Fraction(1, self._time_base.denominator)
        if context.time_base < FINEST_TIME_BASE:
            context.time_base = USUAL_TIME_BASE
        self._ticks = Fraction(context.time_base)
        threads = (os.cpu_count() or 1) // CORES_PER_THREAD
        context.thread_count = min(max(threads, 1), MAX_ENCODER_THREADS)
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
        """What of the audio was lost; None when nothing was."""
        return self._audio.problem if self._audio is not None else None

    def write(self, image: np.ndarray, pts: int, duration: int | None = None) -> None:
        """Append a frame.

        Args:
            image: (height, width, 3), uint8, BGR. It is not kept.
            pts: When it is shown, in units of ``time_base`` after the beginning of the source. One
                that is not after the frame before is shown as soon after it as can be.
            duration: For how long, in the same units. Counts for the last frame only, as others are
                shown until the next.

        Raises:
            OSError: See the class.
            ValueError: The image has another size.
        """
        width, height = self._size
        if image.shape != (height, width, 3) or image.dtype != np.uint8:
            raise ValueError(
                f'expected an image of shape {(height, width, 3)} and type uint8, '
                f'not {image.shape} and {image.dtype}'
            )
        time = pts * self._time_base
        if self.num_frames == 0:
            self._origin = time if self._is_cut else self._origin
            if self._audio is not None:
                self._audio.begin(self._origin, self._is_cut, self._end)
        try:
            frame = self._convert(image)
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
        except BaseException as error:
            self.discard()
            raise self._explained(error) from error

    def _convert(self, image: np.ndarray) -> av.VideoFrame:
        height, width = image.shape[:2]
        if height % 2 or width % 2:
            image = cv2.copyMakeBorder(image, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
        frame = av.VideoFrame.from_numpy_buffer(np.ascontiguousarray(image), 'bgr24')
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
            if self._audio is not None:
                self._audio.write_until(packet.pts * self._ticks)
            self._output.mux(packet)

    def close(self, whole_audio: bool = False) -> None:
        """Finish the file; without a single frame there is none. Calling it again does nothing.

        Args:
            whole_audio: Audio goes on after the last frame as it does in the source; by default it
                ends with the images.

        Raises:
            OSError: See the class.
        """
        if self._is_closed or self.num_frames == 0:
            self.discard()
            return
        try:
            self._encode(None)
            if self._audio is not None:
                until = (self._last_pts + self._last_duration) * self._ticks
                self._audio.write_until(None if whole_audio else until)
                self._audio.close()
            self._output.close()
            self._is_closed = True
            self._file.__exit__(None, None, None)
        except BaseException as error:
            self.discard()
            raise self._explained(error) from error

    def discard(self) -> None:
        """Leave nothing of the file; after :meth:`close` this does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._audio is not None:
            self._audio.close()
        # What cannot be finished was not to be kept.
        with suppress(av_error.FFmpegError, OSError, ValueError):
            if self._output is not None:
                self._output.close()
        discarded = InterruptedError()
        with suppress(InterruptedError):
            self._file.__exit__(InterruptedError, discarded, None)

    def _explained(self, error: BaseException) -> BaseException:
        """An error of the file system or of ffmpeg, about the file that is written."""
        if not isinstance(error, (OSError, av_error.FFmpegError)):
            return error
        reason = error.strerror or str(error)
        return OSError(error.errno, f'{reason}; the video is not written', str(self.path))
