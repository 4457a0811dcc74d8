"""Write the audio of one video file into another."""

from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
from av import error as av_error
from av.filter import Graph

from backbones.errors import InputError, reason_of

from .video_reader import find_origin, open_container

# Audio that every browser plays in an MP4; Chrome and Firefox do not play AC-3, for example.
COPIED_CODECS = ('aac', 'mp3', 'mp3float')
AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)
BITS_PER_CHANNEL = 80_000

# Seconds to seek back: a decoder of audio needs packets before the first one that is heard.
LEAD = Fraction(1, 2)

# Longer gaps, in seconds, are not caused by rounding.
HOLE = Fraction(1, 4)
CORRUPT = 'the audio is corrupt or has holes'

# A packet for the output, and when it begins there, in seconds.
Timed = tuple[Fraction, av.Packet]


class AudioTrack:
    """Writes the audio of a file or URL into an open MP4, packet by packet.

    AAC and MP3 are copied as they are, other codecs become AAC in mono or stereo. ``origin`` is the
    source's time that is 0 in the output, ``end`` the end in the output, both in seconds. If audio
    cannot be read, the video is still written, and :attr:`problem` says what is missing.
    """

    def __init__(
        self,
        source: str | Path,
        output: av.container.OutputContainer,
        origin: Fraction,
        end: Fraction | None = None,
    ) -> None:
        self._output, self._end, self._is_cut = output, end, origin > 0
        # What is missing of the audio.
        self.problem: str | None = None
        self._packets: Iterator[Timed] = iter(())
        self._written = Fraction(-1)
        self._input: av.container.InputContainer | None = None
        try:
            self._input = open_container(source)
            self._source = self._input.streams.best('audio')
            if self._source is not None:
                self._add_audio()
                self._origin = origin + Fraction(find_origin(self._input))
                self._packets = self._read()
        # FFmpeg and each storage have errors of their own.
        except Exception as error:
            self.problem = f'the audio is missing: {reason_of(error)}'

    def _add_audio(self) -> None:
        context = self._source.codec_context
        if context is None or not context.sample_rate or not context.layout.nb_channels:
            raise InputError('it is corrupt, or this build of ffmpeg cannot decode it')
        # Otherwise noise may pass for audio.
        context.options = {'err_detect': 'crccheck'}
        self._is_copied = context.name in COPIED_CODECS and (
            context.name == 'aac' or context.sample_rate >= 16_000
        )
        if self._is_copied:
            self._target = self._output.add_stream_from_template(self._source)
            return
        rate = context.sample_rate if context.sample_rate in AAC_RATES else 48_000
        num_channels = min(context.layout.nb_channels, 2)
        self._target = self._output.add_stream('aac', rate=rate)
        self._target.codec_context.layout = 'mono' if num_channels == 1 else 'stereo'
        self._target.codec_context.bit_rate = BITS_PER_CHANNEL * num_channels

    def write_until(self, time: Fraction | None) -> None:
        """Write the packets up to a time in the output, or all of them for None."""
        while time is None or self._written < time:
            following = next(self._packets, None)
            if following is None:
                break
            self._written, packet = following
            self._output.mux(packet)

    def close(self) -> None:
        if self._input is not None:
            self._input.close()

    def _read(self) -> Iterator[Timed]:
        """Yield packets for the output, from the start of the cut on."""
        try:
            if self._is_cut:
                offset = round((self._origin - LEAD) / self._source.time_base)
                # A source that cannot seek is read from the beginning.
                with suppress(Exception):
                    self._input.seek(max(offset, 0), stream=self._source)
            yield from self._copy() if self._is_copied else self._transcode()
        except Exception as error:
            self.problem = f'the audio ends early: {reason_of(error)}'

    def _decode(self) -> Iterator[tuple[Fraction | None, av.Packet, list[av.AudioFrame]]]:
        """Yield good packets with their times in the output and their decoded frames."""
        has_begun, following = False, None
        for packet in self._input.demux(self._source):
            if packet.pts is None:
                packet.pts = packet.dts
            time = None
            if packet.pts is not None:
                time = packet.pts * Fraction(packet.time_base) - self._origin
                if self._end is not None and time >= self._end:
                    return
                if following is not None and time - following > HOLE:
                    self.problem = CORRUPT
                following = time + (packet.duration or 0) * Fraction(packet.time_base)
            try:
                frames = packet.decode()
            except av_error.FFmpegError:
                # After a seek, MP3 starts with packets that refer to earlier ones.
                if has_begun:
                    self.problem = CORRUPT
                continue
            has_begun |= bool(frames)
            if not packet.is_corrupt:
                yield time, packet, frames

    def _copy(self) -> Iterator[Timed]:
        last: int | None = None
        for time, packet, _ in self._decode():
            if time is None or not packet.size:
                continue
            ticks = Fraction(packet.time_base)
            # Keep one packet before the first that is heard, for the decoder.
            if self._is_cut and time + 2 * (packet.duration or 0) * ticks <= 0:
                continue
            packet.pts = packet.dts = round(time / ticks)
            if last is not None and packet.dts <= last:
                self.problem = CORRUPT
                continue
            last = packet.dts
            packet.stream = self._target
            yield time, packet

    def _transcode(self) -> Iterator[Timed]:
        for frame in self._resample():
            for packet in self._target.encode(frame):
                yield packet.pts * Fraction(packet.time_base), packet

    def _resample(self) -> Iterator[av.AudioFrame | None]:
        """Yield frames in the encoder's format, then None, which flushes the encoder."""
        graph = form = None
        for _, _, frames in self._decode():
            for frame in frames:
                if frame.pts is None:
                    continue
                # A broadcast may change its audio format at any time.
                if form != (frame.format.name, frame.layout.name, frame.sample_rate):
                    form = (frame.format.name, frame.layout.name, frame.sample_rate)
                    graph = self._build_graph(frame)
                frame.pts -= round(self._origin / frame.time_base)
                with suppress(av_error.EOFError):  # after the end
                    graph.push(frame)
                yield from _pull(graph)
        if graph is not None:
            graph.push(None)
            yield from _pull(graph)
            yield None

    def _build_graph(self, frame: av.AudioFrame) -> Graph:
        """Build a filter that fills gaps with silence, and cuts to the exact sample."""
        context = self._target.codec_context
        graph = Graph()
        source = graph.add_abuffer(
            sample_rate=frame.sample_rate,
            format=frame.format.name,
            layout=frame.layout.name,
            time_base=frame.time_base,
        )
        end = '' if self._end is None else f':end={float(self._end)}'
        graph.link_nodes(
            source,
            graph.add('aresample', f'{context.sample_rate}:async=1'),
            graph.add('atrim', f'start=0{end}'),
            graph.add('aformat', f'fltp:channel_layouts={context.layout.name}'),
            graph.add('abuffersink'),
        ).configure()
        return graph


def _pull(graph: Graph) -> Iterator[av.AudioFrame]:
    with suppress(av_error.BlockingIOError, av_error.EOFError):
        while True:
            yield graph.pull()
