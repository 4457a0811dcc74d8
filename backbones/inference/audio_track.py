"""The sound of one video file for another."""

from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np
from av import error as av_error
from av.stream import Disposition

from backbones.errors import InputError

from .video_file import find_origin, open_container

# What an MP4 may hold and every browser plays; anything else is coded anew as AAC.
COPIED_CODECS = ('aac', 'mp3', 'mp3float')

# Samples a second that AAC has a number for.
AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)

BITS_PER_CHANNEL = 80_000

# A decoder of sound needs the packet before the first one that is heard.
LEAD = Fraction(1, 2)

# Seconds without sound that have a cause other than rounding.
HOLE = Fraction(1, 4)

# Seconds by which the times of packets may be off.
JITTER = Fraction(1, 20)

# An end that is missing is not worth a word when it is shorter.
TOLERANCE = 0.5


class AudioTrack:
    """Brings the sound of a video file into an MP4 that is being written, bit by bit.

    AAC and MP3 are copied as they are, other codecs and more than two channels that must be coded
    anyway become AAC in mono or stereo. Of several tracks it takes the default one. Only the next
    packet is ever held.

    Sound that cannot be read does not stop anything: what there is of it is brought over, and
    :attr:`problem` says what is missing.

    Args:
        source: The file with the sound; none in it is no problem.
        output: The MP4. Nothing may have been written to it yet.
    """

    def __init__(self, source: str | Path, output: av.container.OutputContainer) -> None:
        self._output = output
        self._failures = 0
        self._missing: str | None = None
        self._heard_until = Fraction(0)
        self._wanted_until = Fraction(0)
        self._packets: Iterator[tuple[Fraction, av.Packet]] = iter(())
        self._next: tuple[Fraction, av.Packet] | None = None
        self._input: av.container.InputContainer | None = None
        self._target: av.AudioStream | None = None
        try:
            self._input = open_container(source)
            self._open()
        except InputError as error:
            self._missing = f'the sound is missing: it {error}'
        except (av_error.FFmpegError, ValueError) as error:
            self._missing = f'the sound is missing: {explain(error)}'

    def _open(self) -> None:
        self._source = find_audio(self._input)
        if self._source is None:
            return
        context = self._source.codec_context
        if context is None or not context.sample_rate or not context.layout.nb_channels:
            raise InputError(
                'is damaged, or coded in a way that this build of ffmpeg cannot decode'
            )
        # Noise may pass for sound otherwise.
        context.options = {'err_detect': 'crccheck'}
        self._copied = context.name in COPIED_CODECS and (
            context.name == 'aac' or context.sample_rate >= 16_000
        )
        if self._copied:
            self._target = self._output.add_stream_from_template(self._source)
            return
        rate = context.sample_rate if context.sample_rate in AAC_RATES else 48_000
        mono = context.layout.nb_channels == 1
        self._target = self._output.add_stream('aac', rate=rate)
        self._target.codec_context.layout = 'mono' if mono else 'stereo'
        self._target.codec_context.bit_rate = BITS_PER_CHANNEL * (1 if mono else 2)

    @property
    def problem(self) -> str | None:
        """What of the sound was lost; None when nothing was."""
        if self._missing is not None:
            return self._missing
        if self._heard_until + Fraction(TOLERANCE) < self._wanted_until:
            return f'the sound ends at {float(self._heard_until):.1f} s: it is damaged or cut short'
        if self._failures:
            return f'the sound is damaged or has holes, in {self._failures} places'
        return None

    def begin(self, origin: Fraction, start: Fraction | None, end: Fraction | None) -> None:
        """Go to where the sound begins.

        Args:
            origin: Seconds in the source that are 0 in the output.
            start: Seconds in the source before which no sound is wanted; None if all of it is.
            end: Seconds in the source.
        """
        if self._target is None:
            return
        self._origin = origin
        self._start = start
        self._end = end
        packets = self._demux()
        self._packets = self._copy(packets) if self._copied else self._transcode(packets)
        self._advance()

    def write_until(self, time: Fraction | None) -> None:
        """Write the packets that begin before a time of the output; None writes all.

        Raises:
            av.error.FFmpegError: The output cannot be written.
        """
        while self._next is not None and (time is None or self._next[0] < time):
            begin, packet = self._next
            until = begin + (packet.duration or 0) * Fraction(packet.time_base)
            self._heard_until = max(self._heard_until, until + self._origin)
            self._output.mux(packet)
            self._advance()
        if self._target is not None and self._next is None and self._source.duration:
            stated = self._source.duration * Fraction(self._source.time_base)
            wanted = min(stated, time + self._origin if time is not None else stated)
            self._wanted_until = min(wanted, self._end) if self._end is not None else wanted

    def _advance(self) -> None:
        try:
            self._next = next(self._packets, None)
        except (av_error.FFmpegError, ValueError) as error:
            self._next = None
            self._missing = f'the sound ends at {float(self._heard_until):.1f} s: {explain(error)}'

    def close(self) -> None:
        """Close the source."""
        if self._input is not None:
            self._input.close()

    def _demux(self) -> Iterator[av.Packet]:
        """Packets of the sound with times of the output, in order, from shortly before its 0."""
        time_base = Fraction(self._source.time_base)
        shift = round((self._origin + Fraction(find_origin(self._input))) / time_base)
        if self._start is not None:
            offset = shift - int(LEAD / time_base)
            # One that cannot seek is read from the beginning.
            with suppress(av_error.FFmpegError):
                self._input.seek(max(offset, 0), stream=self._source)
        following = None
        packets = self._input.demux(self._source)
        while True:
            try:
                packet = next(packets, None)
            except av_error.FFmpegError:
                self._failures += 1
                return
            if packet is None:
                return
            if packet.size == 0:
                continue
            if packet.is_corrupt:
                self._failures += 1
                continue
            stamp = packet.pts if packet.pts is not None else packet.dts
            if stamp is not None:
                stamp -= shift
            else:
                stamp = following or 0
            if following is not None and (stamp - following) * time_base > HOLE:
                self._failures += 1
            following = stamp + (packet.duration or 0)
            if self._end is not None and stamp * time_base >= self._end - self._origin:
                return
            packet.pts = packet.dts = stamp
            yield packet

    def _copy(self, packets: Iterator[av.Packet]) -> Iterator[tuple[Fraction, av.Packet]]:
        time_base = Fraction(self._source.time_base)
        before: av.Packet | None = None
        last: int | None = None
        for packet in self._decodable(packets):
            if self._start is not None and packet.pts + (packet.duration or 0) <= 0:
                before = packet
                continue
            for each in (before, packet) if before is not None else (packet,):
                if last is not None and each.dts <= last:
                    self._failures += 1
                    continue
                last = each.dts
                # Packets change their time base when they are written.
                begin = each.pts * time_base
                each.stream = self._target
                yield begin, each
            before = None

    def _decodable(self, packets: Iterator[av.Packet]) -> Iterator[av.Packet]:
        """Packets that can be decoded, because a browser stops at one that cannot."""
        begun = False
        for packet in packets:
            try:
                begun |= bool(self._source.codec_context.decode(packet))
            except av_error.FFmpegError:
                # After a seek, MP3 starts with packets that refer to others.
                self._failures += begun
                continue
            yield packet

    def _transcode(self, packets: Iterator[av.Packet]) -> Iterator[tuple[Fraction, av.Packet]]:
        for frame in self._align(self._resample(packets)):
            yield from self._encode(frame)
        if self._target.codec_context.is_open:
            yield from self._encode(None)

    def _encode(self, frame: av.AudioFrame | None) -> Iterator[tuple[Fraction, av.Packet]]:
        for packet in self._target.codec_context.encode(frame):
            packet.stream = self._target
            yield packet.pts * Fraction(packet.time_base), packet

    def _resample(self, packets: Iterator[av.Packet]) -> Iterator[av.AudioFrame]:
        encoder = self._target.codec_context
        resampler: av.AudioResampler | None = None
        form: tuple | None = None
        for frame in self._decode(packets):
            # A broadcast may change its form at any time.
            if form != (frame.format.name, frame.layout.name, frame.sample_rate):
                form = (frame.format.name, frame.layout.name, frame.sample_rate)
                resampler = av.AudioResampler('fltp', encoder.layout, encoder.sample_rate)
            yield from resampler.resample(frame)

    def _align(self, frames: Iterator[av.AudioFrame]) -> Iterator[av.AudioFrame]:
        """Make samples, in planes, follow each other without a seam, and trim them to the cut.

        Formats round the times of packets; only what is further off is a hole, and stays one.
        """
        following: int | None = None
        for frame in frames:
            rate = frame.sample_rate
            begin = round(frame.pts * frame.time_base * rate)
            if following is not None:
                if begin < following - JITTER * rate:
                    continue
                if begin < following + JITTER * rate:
                    begin = following
            first = max(-begin, 0) if self._start is not None else 0
            last = frame.samples
            if self._end is not None:
                last = min(last, round((self._end - self._origin) * rate) - begin)
            if first >= last:
                continue
            if last - first < frame.samples:
                samples = np.ascontiguousarray(frame.to_ndarray()[:, first:last])
                frame = av.AudioFrame.from_ndarray(samples, frame.format.name, frame.layout.name)
                frame.sample_rate = rate
                begin += first
            frame.time_base = Fraction(1, rate)
            frame.pts = begin
            following = begin + frame.samples
            yield frame

    def _decode(self, packets: Iterator[av.Packet]) -> Iterator[av.AudioFrame]:
        time_base = Fraction(self._source.time_base)
        for packet in chain(packets, [None]):
            try:
                frames = self._source.codec_context.decode(packet)
            except av_error.FFmpegError:
                self._failures += 1
                continue
            for frame in frames:
                if frame.pts is None and packet is not None:
                    frame.pts = packet.pts
                frame.time_base = time_base
                if frame.pts is not None:
                    yield frame


def find_audio(container: av.container.InputContainer) -> av.AudioStream | None:
    """The default sound of a container, else the first, else None."""
    streams = container.streams.audio
    marked = [stream for stream in streams if stream.disposition & Disposition.default]
    return next(iter([*marked, *streams]), None)


def explain(error: Exception) -> str:
    """What ffmpeg says of an error, without its number."""
    return getattr(error, 'strerror', None) or str(error)
