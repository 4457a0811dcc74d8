"""The pictures of a video file, upright and with their exact times."""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import cv2
import numpy as np
from av import error as av_error
from av.format import Flags as FormatFlags
from av.sidedata.sidedata import Type as SideDataType
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from backbones.errors import InputError

from .video_file import find_origin, find_video, open_container

# Each thread of the decoder holds a picture; with many cores and a 4K video that adds up.
MAX_DECODER_THREADS = 8

# These say in their header how long they are, so that a shorter one has lost something.
FORMATS_WITH_DURATION = ('mov,mp4,m4a,3gp,3g2,mj2', 'matroska,webm', 'avi')

# A demuxer that fails this often in a row has reached the end of what there is.
MAX_READ_ERRORS = 100

# Seconds that headers may be wrong by.
TOLERANCE = 0.5

# ITU-T H.273's number for a file that does not say how its colours are coded.
UNSPECIFIED = 2

# With swscale's SWS_ACCURATE_RND, for which PyAV has a name since 18. Without it, saturated colours
# are off by four levels instead of two after writing and reading.
INTERPOLATION = int(Interpolation.BILINEAR) | 1 << 18


@dataclass(frozen=True)
class VideoFrame:
    """One picture of a video.

    Attributes:
        index: Which of the frames from ``start`` on, the first is 0; ``every=3`` gives 0, 3, 6.
        time: When it is shown, in seconds after the beginning of the file.
        pts: The same, exact, in units of ``time_base``.
        duration: For how long it is shown, in units of ``time_base``: until the next frame that is
            given out, or for the last one, until the end of the pictures.
        time_base: Seconds.
        picture: (height, width, 3), uint8, BGR, upright. It may be drawn on.
    """

    index: int
    time: float
    pts: int
    duration: int
    time_base: Fraction
    picture: np.ndarray


class VideoReader:
    """Reads a video; iterating, once, gives :class:`VideoFrame` in the order they are shown.

    Pictures come as a player shows them: turned and mirrored as the file asks for, with square
    pixels (a picture with others is stretched, never shrunk), and all in the size of the first.
    Interlaced ones stay interlaced. HDR is not mapped to the range of a normal screen.

    A damaged video gives what is good in it; :attr:`problem` then says what was lost.

    Use it from one thread at a time. Decoding and conversion release the GIL.

    Args:
        source: A file, or an address that ffmpeg understands.
        every: Give out only every N-th frame. All are decoded, as they build on each other.
        start: Seconds; frames that begin earlier are left out. Reading begins at the key frame
            before it.
        end: Seconds; frames that begin then or later are left out.

    Attributes:
        source: As given.
        width: In pixels, upright.
        height: In pixels, upright.
        frame_rate: Frames a second of the file, the average where it varies; None if unknown.
        time_base: Seconds; unit of the frames' ``pts``.
        duration: Seconds that will be read; None if unknown.
        frames: How many will be given out, an estimate unless the file knows; None if unknown.

    Raises:
        InputError: It is missing, empty, cut short so that nothing can be read, no video, or has
            no frame between ``start`` and ``end``.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        every: int = 1,
        start: float | None = None,
        end: float | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f'every must be 1 or more, not {every}')
        if (start or 0) < 0 or (end is not None and end <= (start or 0)):
            raise ValueError(f'start ({start}) must be 0 or more, and end ({end}) after it')
        self.source = source
        self._every = every
        self._start = start or 0.0
        self._end = end
        self._open()
        try:
            self._prepare()
        except BaseException:
            self._container.close()
            raise

    def _open(self) -> None:
        self._container = open_container(self.source)
        try:
            self._stream = find_video(self._container)
        except InputError:
            self._container.close()
            raise
        self._stream.thread_type = 'AUTO'
        threads = min(os.cpu_count() or 1, MAX_DECODER_THREADS)
        self._stream.codec_context.thread_count = threads

    def _prepare(self) -> None:
        self.time_base = Fraction(self._stream.time_base)
        self.frame_rate = find_frame_rate(self._stream)
        self._origin = find_origin(self._container)
        self._end_pts = None
        if self._end is not None:
            self._end_pts = round(Fraction(self._end) / self.time_base)
        stated = self._container.duration
        has_header = self._container.format.name in FORMATS_WITH_DURATION
        self._stated_end = stated / av.time_base if stated and has_header else None
        whole = stated / av.time_base if stated and stated > 0 else None
        self.duration = cut_duration(whole, self._start, self._end)
        self._source_frames = self._estimate_frames()
        self.frames = -(-self._source_frames // self._every) if self._source_frames else None

        self._reformatter = VideoReformatter()
        self._num_read = 0
        self._read_until = self._start
        self._packets_until = self._video_until = 0.0
        self._num_packets = 0
        self._damaged_at: float | None = None
        self._lost_connection: str | None = None
        self._exhausted = False

        frames = self._seek()
        first = next(frames, None)
        if first is None:
            raise InputError(self._explain_no_frame())
        if self._end_pts is not None and first[1] >= self._end_pts:
            raise InputError(f'has no frame between {self._start:g} and {self._end:g} s')
        self._timed = chain([first], frames)
        frame = first[0]
        self._orientation = find_orientation(frame)
        self._scaled_size = square_pixels(
            frame.width, frame.height, self._stream.sample_aspect_ratio
        )
        self.width, self.height = self._orientation.turn_size(*self._scaled_size)

    def __enter__(self) -> 'VideoReader':
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    @property
    def problem(self) -> str | None:
        """What of the video was lost, as far as it has been read; None when nothing was."""
        read = f'{self._num_read}'
        if self._source_frames:
            read += f' of about {max(self._source_frames, self._num_read)}'
        read += ' frames read'
        if self._lost_connection is not None:
            return f'breaks off at {self._read_until:.1f} s ({self._lost_connection}): {read}'
        if self._exhausted and self._is_cut_short():
            return f'is cut short or damaged after {self._read_until:.1f} s: {read}'
        if self._damaged_at is None:
            return None
        if self._exhausted and self._read_until < self._video_until - TOLERANCE:
            return f'is damaged from {self._read_until:.1f} s on: {read}'
        return f'is damaged in places, first at {self._damaged_at:.1f} s: {read}'

    def __iter__(self) -> Iterator[VideoFrame]:
        # A frame is given out when the next one is known, for its duration reaches that far.
        waiting: tuple[int, av.VideoFrame, int] | None = None
        until = 0
        for frame, pts in self._cut():
            if self._num_read % self._every == 0:
                if waiting is not None:
                    yield self._convert(*waiting, until=pts)
                waiting = (self._num_read, frame, pts)
            self._num_read += 1
            until = pts + self._ticks_of(frame)
            self._read_until = float(until * self.time_base)
        if waiting is not None:
            if self._end_pts is not None:
                until = min(until, self._end_pts)
            yield self._convert(*waiting, until=until)

    def _cut(self) -> Iterator[tuple[av.VideoFrame, int]]:
        """Frames from start to end."""
        for frame, pts in self._timed:
            if self._end_pts is not None and pts >= self._end_pts:
                return
            yield frame, pts
        self._exhausted = True

    def _seek(self) -> Iterator[tuple[av.VideoFrame, int]]:
        """Frames with their times, from ``start`` on."""
        begin = round(Fraction(self._start) / self.time_base)
        can_seek = not self._container.format.flags & FormatFlags.no_timestamps.value
        # Some formats only guess where a time is, and may end up behind it.
        for back in (0, 10) if begin and can_seek else ():
            offset = round((max(self._start - back, 0) + self._origin) / self.time_base)
            # One that cannot seek is read from the beginning.
            with suppress(av_error.FFmpegError):
                self._container.seek(offset, stream=self._stream)
            frames = self._frames()
            found = next(frames, None)
            if found is not None and found[1] <= begin:
                break
        else:
            if begin and can_seek:
                self._container.close()
                self._open()
            frames = self._frames()
            found = next(frames, None)
        if found is None:
            return
        if found[1] >= begin:
            yield found
        for frame, pts in frames:
            if pts >= begin:
                yield frame, pts

    def _frames(self) -> Iterator[tuple[av.VideoFrame, int]]:
        """Undamaged frames, and their times after the beginning in ticks of the time base."""
        origin = round(Fraction(self._origin) / self.time_base)
        second = round(1 / self.time_base)
        counts = self._container.format.name == 'avi'  # AVI numbers frames as they are stored.
        following: int | None = None
        for frame in self._decode():
            stamp = frame.dts if counts or frame.pts is None else frame.pts
            pts = (following or 0) if stamp is None else stamp - origin
            if following is not None and pts < following - second:
                # A recording that starts its clock anew: go on where we are.
                origin -= following - pts
                pts = following
            if self._stated_end is not None and pts * self.time_base > self._stated_end + 1:
                self._note_damage()
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
                self._note_damage()
                continue
            for frame in frames:
                if frame.is_corrupt:
                    self._note_damage()
                else:
                    yield frame

    def _demux(self) -> Iterator[av.Packet | None]:
        """Packets of the video, then None, which empties the decoder."""
        failures = 0
        while failures < MAX_READ_ERRORS:
            try:
                # Of all streams, because a file ends where the longest of them does.
                for packet in self._container.demux():
                    failures = 0
                    is_video = packet.stream_index == self._stream.index
                    self._note_packet(packet, is_video)
                    # An empty one, which AVI has for a repeated frame, would empty the decoder.
                    if is_video and packet.size:
                        yield packet
                break
            except av_error.InvalidDataError:
                self._note_damage()
                failures += 1
            except av_error.FFmpegError as error:
                self._lost_connection = error.strerror
                break
        yield None

    def _note_damage(self) -> None:
        # After a seek, a decoder starts with frames whose references it has not seen.
        if self._start and self._num_read == 0:
            return
        if self._damaged_at is None:
            self._damaged_at = self._read_until

    def _note_packet(self, packet: av.Packet, is_video: bool) -> None:
        self._num_packets += is_video
        if packet.pts is None:
            return
        end = float((packet.pts + (packet.duration or 0)) * packet.time_base) - self._origin
        self._packets_until = max(self._packets_until, end)
        if is_video:
            self._video_until = max(self._video_until, end)

    def _is_cut_short(self) -> bool:
        """Whether there was less in the file than its header says."""
        expected = self._stream.frames if not self._start else 0
        if self._num_packets < 0.98 * expected - 1:
            return True
        return self._packets_until < 0.99 * (self._stated_end or 0) - TOLERANCE

    def _explain_no_frame(self) -> str:
        if self._packets_until and self._start >= self._packets_until:
            return f'ends at {self._packets_until:.1f} s, before the start at {self._start:g} s'
        if self._start:
            return f'has no frame that can be read from {self._start:g} s on'
        return 'has a video in it, but none of its frames can be read: it is damaged or cut short'

    def _estimate_frames(self) -> int | None:
        if self._stream.frames and not self._start and self._end is None:
            return self._stream.frames
        if self.duration and self.frame_rate:
            return max(round(self.duration * self.frame_rate), 1)
        return None

    def _ticks_of(self, frame: av.VideoFrame) -> int:
        """For how long the file says that a frame is shown."""
        if frame.duration > 0:
            return frame.duration
        return max(round(1 / (self.frame_rate or 25) / self.time_base), 1)

    def _convert(self, index: int, frame: av.VideoFrame, pts: int, until: int) -> VideoFrame:
        width, height = self._scaled_size
        converted = self._reformatter.reformat(
            frame,
            width,
            height,
            'bgr24',
            src_colorspace=guess_colorspace(frame),
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.JPEG,
            interpolation=INTERPOLATION,
            threads=1,
        )
        picture = converted.to_ndarray()
        if converted is frame:
            picture = picture.copy()  # The decoder may still need its own.
        return VideoFrame(
            index=index,
            time=float(pts * self.time_base),
            pts=pts,
            duration=max(until - pts, 1),
            time_base=self.time_base,
            picture=self._orientation.turn(picture),
        )


@dataclass(frozen=True)
class Orientation:
    """How to make a picture upright: swap the axes first, then flip."""

    swap_axes: bool
    flip_horizontally: bool
    flip_vertically: bool

    def turn_size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after turning."""
        return (height, width) if self.swap_axes else (width, height)

    def turn(self, picture: np.ndarray) -> np.ndarray:
        """A picture made upright, contiguous in memory."""
        if self.swap_axes:
            picture = cv2.transpose(picture)
        if self.flip_horizontally or self.flip_vertically:
            both = self.flip_horizontally and self.flip_vertically
            picture = cv2.flip(picture, -1 if both else int(self.flip_horizontally))
        return np.ascontiguousarray(picture)


def find_orientation(frame: av.VideoFrame) -> Orientation:
    """What the display matrix of a frame asks for, to the nearest quarter turn.

    The matrix [[a, b], [c, d]] takes a pixel (x, y) to (ax + cy, bx + dy).
    """
    side_data = frame.side_data.get(SideDataType.DISPLAYMATRIX)
    if side_data is None:
        return Orientation(False, False, False)
    a, b, _, c, d = (int(number) for number in np.frombuffer(bytes(side_data), np.int32)[:5])
    if abs(b) + abs(c) > abs(a) + abs(d):
        return Orientation(True, c < 0, b < 0)
    return Orientation(False, a < 0, d < 0)


def guess_colorspace(frame: av.VideoFrame) -> Colorspace | None:
    """How colours are coded where the file does not say it, as players guess: by the size."""
    if frame.colorspace != UNSPECIFIED:
        return None
    is_hd = frame.width >= 1280 or frame.height > 576
    return Colorspace.ITU709 if is_hd else Colorspace.ITU601


def square_pixels(width: int, height: int, aspect: Fraction | None) -> tuple[int, int]:
    """Size at which square pixels give the same shape; an absurd aspect is no aspect."""
    if not aspect or not Fraction(1, 4) <= aspect <= 4:
        return width, height
    if aspect > 1:
        return round(width * aspect), height
    return width, round(height / aspect)


def find_frame_rate(stream: av.VideoStream) -> Fraction | None:
    """Average frames a second, or None if nobody knows."""
    rate = stream.average_rate or stream.guessed_rate
    return Fraction(rate) if rate else None


def cut_duration(whole: float | None, start: float, end: float | None) -> float | None:
    """Seconds between start and end of something that is so many seconds long."""
    if whole is None:
        return end - start if end is not None else None
    return max(min(whole, end if end is not None else whole) - start, 0)
