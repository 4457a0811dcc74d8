"""The frames of a video file, upright and with their exact times."""

import os
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import cv2
import fsspec
import numpy as np
from av import error as av_error
from av.format import Flags as FormatFlags
from av.sidedata.sidedata import Type as SideDataType
from av.stream import Disposition
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from backbones.errors import InputError, reason_of

from .images import TimedImage
from .inputs import WEB_SCHEMES, find_scheme

# ffmpeg's formats that hold videos; others draw texts, or follow a list of files.
FORMATS = (
    'asf,av1,avi,dv,flv,gxf,h261,h263,h264,hevc,ivf,m4v,matroska,mjpeg,mov,mpeg,mpegts,mpegvideo,'
    'mxf,nut,obu,ogg,rm,vc1,vvc,webm,wtv,yuv4mpegpipe'
)

# Their header has the duration, so a shorter file has lost something.
FORMATS_WITH_DURATION = ('mov,mp4,m4a,3gp,3g2,mj2', 'matroska,webm', 'avi')

# Each thread of the decoder holds a frame; with many cores and a 4K video that adds up.
MAX_DECODER_THREADS = 8

# A demuxer that fails this often in a row has reached the end of the readable data.
MAX_READ_ERRORS = 100

# Seconds to seek before the start; from there, the seek goes back to a key frame.
SEEK_LEAD = 10

# Seconds that headers may be wrong by.
TOLERANCE = 0.5

# ITU-T H.273's number for a color coding that the file does not specify.
UNSPECIFIED = 2

# With swscale's SWS_ACCURATE_RND, for which PyAV has a name since 18. Without it, saturated colors
# are off by four levels instead of two after writing and reading.
INTERPOLATION = int(Interpolation.BILINEAR) | 1 << 18


class VideoReader:
    """Reads a video; iterating, once, yields :class:`TimedImage` as a player shows them.

    All have the size of the first: upright, with square pixels, never shrunk. ``every=3`` gives
    frames 0, 3, 6 of those that begin from ``start`` on and before ``end``; each is shown until the
    next. Of a corrupt video, good frames are read, and :attr:`problem` says what was lost.
    """

    def __init__(
        self, source: str | Path, every: int = 1, start: float = 0.0, end: float | None = None
    ) -> None:
        self._source, self._every, self._start, self._end = source, every, start, end
        self._reformatter = VideoReformatter()
        self._num_read = self._num_packets = 0
        self._read_until = start
        self._packets_until = 0.0
        self._loss: str | None = None
        self._container: av.container.InputContainer | None = None
        try:
            self._open()
            self._read_header()
            self._read_first()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._container is not None:
            self._container.close()

    @property
    def problem(self) -> str | None:
        """What was lost of the video, as far as it has been read; None if nothing was."""
        expected = max(self._num_in_span, self._num_read)
        about = f' of about {expected}' if self._num_in_span else ''
        return self._loss and f'{self._loss}: {self._num_read}{about} frames read'

    def __iter__(self) -> Iterator[TimedImage]:
        # A frame is yielded when the next one is known, because it lasts until then.
        waiting, until = None, 0
        for frame, pts in self._frames:
            if self._num_read % self._every == 0:
                if waiting is not None:
                    yield self._convert(*waiting, until=pts)
                waiting = (self._num_read, frame, pts)
            self._num_read += 1
            until = pts + self._ticks_of(frame)
            self._read_until = float(until * self.time_base)
        if waiting is not None:
            end = until if self._end_pts is None else min(until, self._end_pts)
            yield self._convert(*waiting, until=end)

    def _open(self) -> None:
        self._container = open_container(self._source)
        self._stream = find_video(self._container)
        self._stream.thread_type = 'AUTO'
        threads = min(os.cpu_count() or 1, MAX_DECODER_THREADS)
        self._stream.codec_context.thread_count = threads

    def _read_header(self) -> None:
        self.time_base = Fraction(self._stream.time_base)
        self.frame_rate = self._stream.average_rate or self._stream.guessed_rate or None
        self._origin = find_origin(self._container)
        self._end_pts = None if self._end is None else round(Fraction(self._end) / self.time_base)
        whole = (self._container.duration or 0) / av.time_base
        states_end = whole > 0 and self._container.format.name in FORMATS_WITH_DURATION
        self._stated_end = whole if states_end else None
        end = whole if self._end is None else min(self._end, whole or self._end)
        self._num_in_span = self._stream.frames if not self._start and self._end is None else 0
        if not self._num_in_span and self.frame_rate and end > self._start:
            self._num_in_span = max(round((end - self._start) * self.frame_rate), 1)
        self.num_frames = -(-self._num_in_span // self._every) or None

    def _read_first(self) -> None:
        """Find the first frame, which sets the size of all."""
        frames = self._frames_from_start()
        first = next(frames, None)
        if first is None:
            if self._start and self._start >= self._packets_until > 0:
                raise InputError(
                    f'ends at {self._packets_until:.1f} s, before the start at {self._start:g} s'
                )
            span = '' if self._end is None else f' between {self._start:g} and {self._end:g} s'
            raise InputError(f'has no frame{span} that can be read: is it cut short or corrupt?')
        frame, _ = first
        self._frames = chain([first], frames)
        self._scaled_size = square_pixels(
            frame.width, frame.height, self._stream.sample_aspect_ratio
        )
        self._orientation = find_orientation(frame)
        swap_axes = self._orientation[0]
        self.width, self.height = self._scaled_size[:: -1 if swap_axes else 1]

    def _frames_from_start(self) -> Iterator[tuple[av.VideoFrame, int]]:
        begin = round(Fraction(self._start) / self.time_base)
        frames = self._frames_with_times()
        if begin and not self._container.format.flags & FormatFlags.no_timestamps.value:
            # Some formats only guess where a time is, and the seek may end after it.
            offset = round((max(self._start - SEEK_LEAD, 0) + self._origin) / self.time_base)
            # A file that cannot seek is read from the beginning.
            with suppress(Exception):
                self._container.seek(offset, stream=self._stream)
            found = next(frames, None)
            if found is not None and found[1] <= begin:
                frames = chain([found], frames)
            else:
                self.close()
                self._open()
                frames = self._frames_with_times()
        for frame, pts in frames:
            if self._end_pts is not None and pts >= self._end_pts:
                return
            if pts >= begin:
                yield frame, pts

    def _frames_with_times(self) -> Iterator[tuple[av.VideoFrame, int]]:
        """Yield good frames, and their times from the beginning in ticks of the time base."""
        origin = round(Fraction(self._origin) / self.time_base)
        second = round(1 / self.time_base)
        counts = self._container.format.name == 'avi'  # AVI numbers frames as they are stored.
        following: int | None = None
        for frame in self._decode():
            stamp = frame.dts if counts or frame.pts is None else frame.pts
            pts = (following or 0) if stamp is None else stamp - origin
            if following is not None and pts < following - second:
                # The recording restarted its clock: continue from here.
                origin -= following - pts
                pts = following
            if self._stated_end is not None and pts * self.time_base > self._stated_end + 1:
                self._note_corruption()
                continue
            following = pts + self._ticks_of(frame)
            yield frame, pts

    def _decode(self) -> Iterator[av.VideoFrame]:
        for packet in self._demux():
            try:
                frames = self._stream.codec_context.decode(packet)
            except av_error.EOFError:
                continue
            except av_error.FFmpegError:
                self._note_corruption()
                continue
            for frame in frames:
                if frame.is_corrupt:
                    self._note_corruption()
                else:
                    yield frame
        if self._is_cut_short():
            self._note_corruption()

    def _demux(self) -> Iterator[av.Packet | None]:
        """Yield packets of the video, then None, which flushes the decoder."""
        failures = 0
        while failures < MAX_READ_ERRORS:
            try:
                # Read all streams, because a file ends where the longest of them does.
                for packet in self._container.demux():
                    failures = 0
                    is_video = packet.stream_index == self._stream.index
                    self._num_packets += is_video
                    if packet.pts is not None:
                        end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                        self._packets_until = max(self._packets_until, end - self._origin)
                    # An empty packet, which AVI has for a repeated frame, would flush the decoder.
                    if is_video and packet.size:
                        yield packet
                break
            except av_error.InvalidDataError:
                self._note_corruption()
                failures += 1
            # FFmpeg and each storage have errors of their own.
            except Exception as error:
                self._loss = f'breaks off at {self._read_until:.1f} s ({reason_of(error)})'
                break
        yield None

    def _note_corruption(self) -> None:
        # After a seek, a decoder starts with frames whose references it has not seen.
        if self._loss is None and (self._num_read or not self._start):
            self._loss = f'is cut short, or corrupt from {self._read_until:.1f} s on'

    def _is_cut_short(self) -> bool:
        """Return whether there was less in the file than its header says."""
        expected = self._stream.frames if not self._start else 0
        if self._num_packets < 0.98 * expected - 1:
            return True
        return self._packets_until < 0.99 * (self._stated_end or 0) - TOLERANCE

    def _ticks_of(self, frame: av.VideoFrame) -> int:
        """Return for how long a frame is shown, according to the file."""
        return frame.duration or max(round(1 / (self.frame_rate or 25) / self.time_base), 1)

    def _convert(self, index: int, frame: av.VideoFrame, pts: int, until: int) -> TimedImage:
        converted = self._reformatter.reformat(
            frame,
            *self._scaled_size,
            'bgr24',
            src_colorspace=guess_colorspace(frame),
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.JPEG,
            interpolation=INTERPOLATION,
            threads=1,
        )
        image = converted.to_ndarray()
        if converted is frame:
            image = image.copy()  # The decoder may still need its own.
        image = make_upright(image, *self._orientation)
        return TimedImage(index, float(pts * self.time_base), pts, max(until - pts, 1), image)


def find_orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """Return whether to swap the axes, then to flip left and right, and top and bottom.

    The display matrix [[a, b], [c, d]] takes a pixel (x, y) to (ax + cy, bx + dy). It is rounded to
    a quarter turn here. PyAV's ``frame.rotation`` does not cover mirrored frames.
    """
    matrix = frame.side_data.get(SideDataType.DISPLAYMATRIX)
    if matrix is None:
        return False, False, False
    a, b, _, c, d = (int(number) for number in np.frombuffer(bytes(matrix), np.int32)[:5])
    if abs(b) + abs(c) > abs(a) + abs(d):
        return True, c < 0, b < 0
    return False, a < 0, d < 0


def make_upright(image: np.ndarray, swap_axes: bool, flip_x: bool, flip_y: bool) -> np.ndarray:
    """Return an image as it is shown, contiguous."""
    if swap_axes:
        image = cv2.transpose(image)
    if flip_x or flip_y:
        image = cv2.flip(image, -1 if flip_x and flip_y else int(flip_x))
    return np.ascontiguousarray(image)


def guess_colorspace(frame: av.VideoFrame) -> Colorspace | None:
    """Guess how colors are coded if the file does not say it: by the size, as players do."""
    if frame.colorspace != UNSPECIFIED:
        return None
    is_hd = frame.width >= 1280 or frame.height > 576
    return Colorspace.ITU709 if is_hd else Colorspace.ITU601


def square_pixels(width: int, height: int, aspect: Fraction | None) -> tuple[int, int]:
    """Return the size at which square pixels give the same shape; ignore an absurd aspect."""
    if not aspect or not Fraction(1, 4) <= aspect <= 4:
        return width, height
    if aspect > 1:
        return round(width * aspect), height
    return width, round(height / aspect)


def open_container(source: str | Path) -> av.container.InputContainer:
    """Open a file or URL with FFmpeg, or raise InputError."""
    scheme = find_scheme(str(source))
    # Without "file:" in front, a colon in a name would make a URL of it.
    file, options, timeout = f'file:{source}', {'format_whitelist': FORMATS}, None
    try:
        if scheme in WEB_SCHEMES:
            file, options, timeout = str(source), {}, 30.0
        elif scheme:
            file = fsspec.open(str(source), 'rb').open()
        return av.open(file, options=options, metadata_errors='replace', timeout=timeout)
    # ArgumentError: the format is not in FORMATS.
    except (av_error.InvalidDataError, av_error.ArgumentError) as error:
        raise InputError(
            'is neither an image nor a video that can be read; is it cut short or corrupt?'
        ) from error
    # FFmpeg and each storage have errors of their own.
    except Exception as error:
        raise InputError(f'cannot be read: {reason_of(error)}') from error


def find_video(container: av.container.InputContainer) -> av.VideoStream:
    """Return the video in a container; InputError if there is none that can be decoded."""
    stream = container.streams.best('video')
    # The cover of an album is a stream of one image in an audio file.
    if stream is None or stream.disposition & Disposition.attached_pic:
        raise InputError('contains no video')
    if stream.codec_context is None or not stream.width or not stream.height:
        raise InputError('has a codec that this build of ffmpeg cannot decode')
    return stream


def find_origin(container: av.container.InputContainer) -> float:
    """Return the time stamp of a file's beginning, in seconds; in broadcasts it can be any."""
    # Before 0 there is only audio that a decoder needs.
    return max(container.start_time or 0, 0) / av.time_base
