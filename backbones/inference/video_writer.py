"""Writing an H.264 MP4 with audio that every browser plays."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from av import error as av_error
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from .audio_track import AudioTrack
from .reading import Clip, Stream
from .video_reader import INTERPOLATION

# Measured on one thread at 1280×720: 9 ms a frame. superfast takes as long for up to five times the
# bytes, ultrafast a third of the time for twice the bytes, faster twice the time. B-frames would
# save a fifth of the bytes for a third more time.
ENCODER_OPTIONS = {'preset': 'veryfast', 'crf': '20', 'bf': '0'}

# Most cores are left to the model.
CORES_PER_THREAD = 4
MAX_ENCODER_THREADS = 4

# MP4 keeps how long each frame is shown in 32 bits; finer units could not hold a few seconds.
FINEST_TIME_BASE = Fraction(1, 1_000_000)
USUAL_TIME_BASE = Fraction(1, 90_000)

# As ITU-T H.273 numbers BT.709 in matrix, primaries and transfer.
BT709 = 1


@contextmanager
def os_errors() -> Iterator[None]:
    """Raise FFmpeg's errors as OSErrors."""
    try:
        yield
    except av_error.FFmpegError as error:
        raise OSError(error.errno, error.strerror or str(error)) from error


class VideoWriter:
    """Writes images, and the audio of the video they come from, to an H.264 MP4.

    An image with an odd width or height gets its last column or row twice, because 4:2:0 needs even
    ones. All methods raise OSError if the file cannot be written.

    Args:
        path: File to write or to replace; it can be played once it is closed.
        stream: The stream that the images are frames of.
        clip: The part of it to write. If it has a start, the first image is at 0 in the new video.
        begin: When the first image is shown, in units of the stream's time base.
    """

    @os_errors()
    def __init__(self, path: Path, stream: Stream, clip: Clip, begin: int) -> None:
        self._time_base = stream.time_base
        self._frame_rate = stream.frame_rate or Fraction(25)
        self._origin = begin * stream.time_base if clip.start else Fraction(0)
        self._last_pts = -1
        self._last_duration = 1
        self._reformatter = VideoReformatter()
        # Without "file:" in front, a colon in a name would make a URL of it.
        self._output = av.open(
            f'file:{path}', 'w', format='mp4', container_options={'movflags': '+faststart'}
        )
        width, height = stream.width, stream.height
        self._stream = self._add_video(width + width % 2, height + height % 2)
        self._audio: AudioTrack | None = None
        if stream.audio is not None:
            end = None if clip.end is None else Fraction(clip.end) - self._origin
            self._audio = AudioTrack(stream.audio, self._output, self._origin, end)
        self._output.start_encoding()

    def _add_video(self, width: int, height: int) -> av.VideoStream:
        # ffmpeg takes at most 32 bits each for the numerator and denominator of a rate.
        rate = self._frame_rate.limit_denominator(1001)
        stream = self._output.add_stream('libx264', rate=rate, options=ENCODER_OPTIONS)
        stream.width, stream.height, stream.pix_fmt = width, height, 'yuv420p'
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

    @property
    def problem(self) -> str | None:
        """What is missing of the audio; None if nothing is."""
        return self._audio.problem if self._audio is not None else None

    @os_errors()
    def write(self, image: np.ndarray, pts: int, duration: int | None = None) -> None:
        """Append a frame, (height, width, 3), uint8, BGR, with its times in the stream.

        A frame that is not later than the one before is shown directly after it. The duration
        counts only for the last frame; the others are shown until the next.
        """
        frame = self._convert(image)
        time = pts * self._time_base - self._origin
        frame.pts = max(round(time / self._ticks), self._last_pts + 1)
        frame.time_base = self._ticks
        shown = 1 / self._frame_rate if duration is None else duration * self._time_base
        self._last_duration = max(round(shown / self._ticks), 1)
        self._last_pts = frame.pts
        self._encode(frame)

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

    @os_errors()
    def close(self, whole_audio: bool = False) -> None:
        """Finish the file. With ``whole_audio``, audio continues after the last frame."""
        self._encode(None)
        if self._audio is not None:
            until = (self._last_pts + self._last_duration) * self._ticks
            self._audio.write_until(None if whole_audio else until)
        self._output.close()
        self.discard()

    def discard(self) -> None:
        """Close the files, whatever state they are in."""
        if self._audio is not None:
            self._audio.close()
        with suppress(av_error.FFmpegError, OSError, ValueError):
            self._output.close()
