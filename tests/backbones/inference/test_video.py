"""Videos are read as a player shows them, and written as browsers play them, with their audio."""

import errno
import os
import resource
from contextlib import closing
from fractions import Fraction
from pathlib import Path

import av
import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFile
from videos import (
    TONE,
    corrupt,
    numbered_image,
    read_number,
    truncate,
    white_corner,
    write_video,
)

from backbones.errors import InputError
from backbones.inference.images import TimedImage
from backbones.inference.inputs import Input
from backbones.inference.reading import Clip, Frame, Stream, read_inputs
from backbones.inference.video_reader import VideoReader
from backbones.inference.video_writer import VideoWriter

INDEX_IN_FRONT = {'movflags': '+faststart'}
UNEVEN_TIMES = [0, 0.04, 0.3, 0.333, 1.001, 1.5, 1.502]

SATURATED = np.array(
    [
        *[(0, 0, 255), (0, 255, 0), (255, 0, 0), (255, 255, 0)],
        *[(255, 0, 255), (0, 255, 255), (255, 255, 255), (0, 0, 0)],
    ],
    np.uint8,
)


def read(path: Path, **options) -> list[TimedImage]:
    with closing(VideoReader(path, **options)) as reader:
        frames = list(reader)
        assert reader.problem is None
    return frames


def read_corrupt(path: Path) -> tuple[list[int], str]:
    """The numbers of the frames that can be read, and what is said of the others."""
    with closing(VideoReader(path)) as reader:
        assert reader.problem is None
        found = numbers(reader)
        assert f'{len(found)} of about' in reader.problem
        return found, reader.problem


def numbers(frames) -> list[int]:
    return [read_number(frame.image) for frame in frames]


def times(frames: list[TimedImage]) -> list[float]:
    return [frame.time for frame in frames]


def ends(path: Path, frames: list[TimedImage]) -> list[float]:
    with closing(VideoReader(path)) as reader:
        ticks = float(reader.time_base)
    return [frame.time + frame.duration * ticks for frame in frames]


def copy(
    source: Path, out: Path, whole_audio: bool = True, count: int = 1000, **cut
) -> VideoWriter:
    """What a program does that changes nothing in the images."""
    stream, *frames = read_inputs([Input(str(source))], Clip(**cut))
    writer = VideoWriter(out, stream, Clip(**cut), frames[0].pts)
    for frame in frames[:count]:
        if isinstance(frame, Frame):
            writer.write(frame.image, frame.pts, frame.duration)
    writer.close(whole_audio)
    return writer


def write_to(out: Path, width: int, height: int, time_base: Fraction, source: Path | None = None):
    """A writer that is closed at the end."""
    stream = Stream(Input('a'), 'video', width, height, time_base, audio=source)
    return closing(VideoWriter(out, stream, Clip(), 0))


def video_duration(path: Path) -> float:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return float(stream.duration * stream.time_base)


def hear(path: Path) -> tuple[float, np.ndarray, int]:
    """When the audio of a file begins, in seconds, its left channel, and samples a second."""
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        frames = list(container.decode(stream))
        samples = np.concatenate([frame.to_ndarray()[0] for frame in frames])
        # By the last frame, since what is missing before it has no samples.
        last = float(frames[-1].pts * stream.time_base) + frames[-1].samples / stream.rate
        return last - len(samples) / stream.rate, samples, stream.rate


def assert_is_the_tone(path: Path, duration: float, is_mixed: bool = False) -> None:
    begin, samples, rate = hear(path)
    assert begin == pytest.approx(0, abs=0.03)
    assert len(samples) / rate == pytest.approx(duration, abs=0.05)
    inside = samples[rate // 10 : -rate // 10]
    spectrum = np.abs(np.fft.rfft(inside * np.hanning(len(inside))))
    assert spectrum.argmax() * rate / len(inside) == pytest.approx(TONE, rel=0.02)
    # A sine of 0.5, or louder where channels with the same tone are mixed.
    assert is_mixed or inside.std() == pytest.approx(0.5 / np.sqrt(2), rel=0.07)


# ------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize('every', [1, 3, 7])
def test_a_video_says_what_it_is_and_gives_its_frames(tmp_path, every):
    path = write_video(tmp_path / 'a.mp4', 30, rate=10, size=(128, 96))
    expected = list(range(0, 30, every))
    with closing(VideoReader(path, every=every)) as reader:
        assert (reader.width, reader.height, reader.frame_rate) == (128, 96, 10)
        assert reader.num_frames == len(expected)
        frames = list(reader)
    assert numbers(frames) == [frame.index for frame in frames] == expected
    assert times(frames) == pytest.approx([number / 10 for number in expected])
    # Each frame is shown until the next.
    assert ends(path, frames) == pytest.approx([*times(frames)[1:], 3.0])
    image = frames[0].image
    assert (image.shape, image.dtype, image.flags.writeable) == ((96, 128, 3), np.uint8, True)


@pytest.mark.parametrize(
    ('name', 'codec', 'audio'),
    [
        *[('a.mkv', 'libx264', 'libopus'), ('a.webm', 'libvpx', 'libopus')],
        *[
            ('a.avi', 'mpeg4', 'libmp3lame'),
            ('a.ts', 'libx264', True),
            ('a.h264', 'libx264', False),
        ],
    ],
)
def test_other_containers(tmp_path, name, codec, audio):
    path = write_video(tmp_path / name, 20, rate=10, codec=codec, audio=audio)
    frames = read(path)
    assert numbers(frames) == list(range(20))
    assert times(frames)[0] == pytest.approx(0, abs=0.1)
    # MPEG-4 in AVI begins with a frame that is shown twice.
    assert np.diff(times(frames))[1:] == pytest.approx(0.1)
    inside = numbers(frame for frame in frames if 0.75 <= frame.time < 1.55)
    assert numbers(read(path, start=0.75, end=1.55)) == inside


@pytest.mark.parametrize('rotation', [90, 180, 270])
@pytest.mark.parametrize('mirrored', [False, True])
def test_images_are_upright(tmp_path, rotation, mirrored):
    upright = numbered_image(5, (128, 96))
    # As a camera stores it that asks to be rotated counter-clockwise, then mirrored.
    stored = upright[:, ::-1] if mirrored else upright
    stored = np.ascontiguousarray(np.rot90(stored, -rotation // 90))
    path = write_video(tmp_path / 'a.mp4', [stored] * 3, rotation=rotation, mirrored=mirrored)
    with closing(VideoReader(path)) as reader:
        assert (reader.width, reader.height) == (128, 96)
        images = [frame.image for frame in reader]
    assert [white_corner(image) for image in images] == ['top left'] * 3
    assert [read_number(image) for image in images] == [5] * 3


@pytest.mark.parametrize(('aspect', 'size'), [((4, 3), (171, 96)), ((2, 3), (128, 144))])
def test_oblong_pixels_are_stretched(tmp_path, aspect, size):
    path = write_video(tmp_path / 'a.mp4', 3, sample_aspect_ratio=Fraction(*aspect))
    with closing(VideoReader(path)) as reader:
        assert (reader.width, reader.height) == size
        frames = list(reader)
    assert frames[0].image.shape == (size[1], size[0], 3)
    assert numbers(frames) == [0, 1, 2]


@pytest.mark.parametrize('name', ['a.mp4', 'a.mkv'])
def test_variable_rates_survive_reading_and_writing(tmp_path, name):
    path = write_video(tmp_path / name, len(UNEVEN_TIMES), rate=4, times=UNEVEN_TIMES)
    out = tmp_path / 'out.mp4'
    copy(path, out)
    for each in (path, out):
        frames = read(each)
        assert times(frames) == pytest.approx(UNEVEN_TIMES, abs=1e-6)
        assert ends(each, frames)[:-1] == pytest.approx(UNEVEN_TIMES[1:], abs=1e-6)
    # Matroska does not keep how long the last one lasts, MP4 does.
    if name == 'a.mp4':
        assert video_duration(out) == pytest.approx(1.752)


@pytest.mark.parametrize('name', ['a.mp4', 'a.mkv', 'a.ts'])
@pytest.mark.parametrize('keyframe_every', [5, 100])
def test_start_and_end_are_exact(tmp_path, name, keyframe_every):
    path = write_video(tmp_path / name, 40, rate=10, keyframe_every=keyframe_every)
    whole = read(path)
    begin, end = times(whole)[17], times(whole)[31]
    with closing(VideoReader(path, start=begin - 0.001, end=end - 0.001)) as reader:
        assert reader.num_frames == 14
        cut = list(reader)
    assert numbers(cut) == list(range(17, 31))
    assert times(cut) == times(whole)[17:31]
    assert cut[0].index == 0
    # A frame that begins at the very end is left out.
    assert numbers(read(path, end=end)) == list(range(31))


@pytest.mark.parametrize(
    ('span', 'message'),
    [({'start': 5}, r'ends at 1\.0 s'), ({'start': 0.51, 'end': 0.59}, r'between 0\.51 and 0\.59')],
)
def test_a_span_without_a_frame(tmp_path, span, message):
    path = write_video(tmp_path / 'a.mp4', 10, rate=10)
    with pytest.raises(InputError, match=message):
        VideoReader(path, **span)


@pytest.mark.parametrize('pixel_format', ['yuv420p', 'yuv444p', 'yuv420p10le'])
@pytest.mark.parametrize(
    ('size', 'colorspace', 'full_range'),
    [((128, 96), None, False), ((128, 96), 1, False), ((128, 96), 6, True), ((1280, 64), 1, False)],
)
def test_colors(tmp_path, pixel_format, size, colorspace, full_range):
    stripes = np.broadcast_to(SATURATED.repeat(size[0] // 8, 0), (size[1], size[0], 3))
    path = write_video(
        tmp_path / 'a.mp4',
        [np.ascontiguousarray(stripes)] * 2,
        pixel_format=pixel_format,
        colorspace=colorspace,
        full_range=full_range,
    )
    seen = read(path)[1].image[size[1] // 2, size[0] // 16 :: size[0] // 8]
    assert np.abs(seen.astype(int) - SATURATED).max() <= 8


def test_untagged_hd_is_bt709(tmp_path):
    patch = np.full((64, 1280, 3), (20, 200, 40), np.uint8)
    path = write_video(tmp_path / 'tagged.avi', [patch] * 2, codec='mpeg4', colorspace=1)
    # AVI keeps no tag, so only the size can tell.
    with av.open(str(path)) as container:
        assert next(container.decode(video=0)).colorspace == 2
    assert np.abs(read(path)[1].image[32, 640].astype(int) - (20, 200, 40)).max() <= 8


# ------------------------------------------------------------------------------ corrupt videos


def test_a_corrupt_last_third_gives_the_rest(tmp_path):
    found, problem = read_corrupt(corrupt(write_video(tmp_path / 'a.mp4', 60), 2 / 3))
    assert 20 <= len(found) <= 45 and found == list(range(len(found)))
    assert 'corrupt from' in problem


def test_corruption_in_the_middle_does_not_end_a_video(tmp_path):
    found, problem = read_corrupt(corrupt(write_video(tmp_path / 'a.mp4', 60), 0.4, 0.5))
    assert found[0] == 0 and found[-20:] == list(range(40, 60)) and len(found) < 60
    assert 'corrupt from' in problem


def test_half_corrupt_images_are_left_out(tmp_path):
    noise = list(np.random.default_rng(0).integers(0, 256, (20, 96, 128, 3), np.uint8))
    path = write_video(tmp_path / 'a.mp4', noise, keyframe_every=1)
    whole = {frame.pts: frame.image for frame in read(path)}
    corrupt(path, 0.52, 0.521)
    with closing(VideoReader(path)) as reader:
        frames = list(reader)
        assert '19 of about 20' in reader.problem
    assert len(frames) == 19
    assert all((frame.image == whole[frame.pts]).all() for frame in frames)


@pytest.mark.parametrize(
    ('name', 'options', 'audio'),
    [('a.mp4', INDEX_IN_FRONT, True), ('a.mkv', {}, True), ('a.mp4', INDEX_IN_FRONT, False)],
)
def test_a_video_that_is_cut_short_gives_what_is_there(tmp_path, name, options, audio):
    path = truncate(write_video(tmp_path / name, 60, audio=audio, options=options), 0.6)
    found, problem = read_corrupt(path)
    assert 8 <= len(found) <= 45 and found[:-3] == list(range(len(found) - 3))
    assert 'cut short' in problem


@pytest.mark.parametrize(
    ('break_file', 'message'),
    [
        (lambda path: truncate(path, 0.5), 'cut short'),
        (lambda path: truncate(path, 0), 'neither'),
        (lambda path: path.write_text('Dear diary, ' * 99), 'neither'),
        (lambda path: path.unlink(), 'No such file'),
        (lambda path: (path.unlink(), path.mkdir()), 'Is a directory'),
        (lambda path: corrupt(path, 0), 'no frame that can be read'),
    ],
)
def test_what_cannot_be_read_at_all(tmp_path, break_file, message):
    path = write_video(tmp_path / 'a.mp4', 30)
    break_file(path)
    with pytest.raises(InputError, match=message):
        VideoReader(path)


def test_a_name_with_a_colon_is_no_url(tmp_path, monkeypatch):
    write_video(tmp_path / 'a.mp4', 3, audio=True).rename(tmp_path / 'http:a%03d.mp4')
    monkeypatch.chdir(tmp_path)
    copy(Path('http:a%03d.mp4'), Path('http:b%03d.mp4'))
    assert numbers(read(Path('http:b%03d.mp4'))) == [0, 1, 2]


def test_a_connection_to_a_storage_that_breaks(tmp_path, monkeypatch):
    noise = list(np.random.default_rng(0).integers(0, 256, (30, 96, 128, 3), np.uint8))
    content = write_video(tmp_path / 'a.mkv', noise, audio=True).read_bytes()
    fsspec.filesystem('memory').pipe('/breaks/a.mkv', content)
    read_all, good = MemoryFile.read, len(content) // 2

    def read_some(file: MemoryFile, size: int = -1) -> bytes:
        if file.tell() > good:
            raise TimeoutError('too slow')
        return read_all(file, size)

    monkeypatch.setattr(MemoryFile, 'read', read_some)
    source = [Input('memory://breaks/a.mkv')]
    stream, *frames, closed = read_inputs(source, Clip())
    assert 'breaks off at' in closed.problem and 'too slow' in closed.problem
    writer = VideoWriter(tmp_path / 'out.mp4', stream, Clip(), 0)
    for frame in frames:
        writer.write(frame.image, frame.pts, frame.duration)
    writer.close(whole_audio=True)
    assert 'too slow' in writer.problem
    assert 5 < len(read(tmp_path / 'out.mp4')) == len(frames) < 25
    good = -1
    (closed,) = read_inputs(source, Clip())
    assert 'too slow' in closed.problem


# ------------------------------------------------------------------------------------- writing


def test_browsers_play_what_is_written(tmp_path):
    source = write_video(tmp_path / 'a.mkv', 20, audio='libopus')
    out = tmp_path / 'out.mp4'
    copy(source, out)
    with av.open(str(out)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert video.codec_context.name == 'h264'
        assert video.pix_fmt == 'yuv420p'
        frame = next(container.decode(video))
        assert (frame.colorspace, frame.color_primaries, frame.color_trc) == (1, 1, 1)
        assert frame.color_range == 1
        assert audio.codec_context.name == 'aac'
    content = out.read_bytes()
    assert content.index(b'moov') < content.index(b'mdat')
    assert sorted(tmp_path.iterdir()) == [source, out]


@pytest.mark.parametrize('rate', [Fraction(10), Fraction(30000, 1001)])
@pytest.mark.parametrize('every', [1, 7])
def test_rate_size_times_and_duration_are_kept(tmp_path, rate, every):
    source = write_video(tmp_path / 'a.mp4', 31, rate=rate, size=(128, 96), audio=True)
    out = tmp_path / 'out.mp4'
    copy(source, out, every=every)
    with closing(VideoReader(out)) as reader:
        assert (reader.width, reader.height) == (128, 96)
        assert every > 1 or reader.frame_rate == rate
        frames = list(reader)
    assert numbers(frames) == list(range(0, 31, every))
    assert times(frames) == pytest.approx([number / rate for number in range(0, 31, every)])
    assert video_duration(out) == pytest.approx(31 / rate)
    assert_is_the_tone(out, 31 / rate)


@pytest.mark.parametrize('size', [(127, 96), (128, 95), (127, 95), (1, 1)])
def test_odd_sizes_repeat_the_last_row_and_column(tmp_path, size):
    width, height = size
    with write_to(tmp_path / 'out.mp4', width, height, Fraction(1, 10)) as writer:
        for pts in range(3):
            writer.write(np.full((height, width, 3), 200, np.uint8), pts)
    image = read(tmp_path / 'out.mp4')[2].image
    assert image.shape == (height + height % 2, width + width % 2, 3)
    assert np.abs(image.astype(int) - 200).max() <= 3


def test_colors_survive_writing(tmp_path):
    image = np.tile(SATURATED.repeat(32, 0), (96, 1, 1))
    for _ in range(2):
        with write_to(tmp_path / 'out.mp4', 256, 96, Fraction(1, 10)) as writer:
            writer.write(image, 0)
            writer.write(image, 1)
        image = read(tmp_path / 'out.mp4')[1].image
    # Away from the edges between the stripes.
    stripes = image[8:-8].reshape(80, 8, 32, 3)[:, :, 8:24]
    assert np.abs(stripes.astype(int) - SATURATED[:, None]).max() <= 6


def test_times_that_do_not_rise_are_nudged(tmp_path):
    with write_to(tmp_path / 'out.mp4', 128, 96, Fraction(1, 1000)) as writer:
        for number, pts in enumerate([0, 100, 100, 90, 200]):
            writer.write(numbered_image(number), pts, 50)
    frames = read(tmp_path / 'out.mp4')
    assert numbers(frames) == [0, 1, 2, 3, 4]
    assert times(frames) == pytest.approx([0, 0.1, 0.101, 0.102, 0.2])


# -------------------------------------------------------------------------------------- audio


@pytest.mark.parametrize(
    ('name', 'audio', 'layout', 'codec'),
    [
        *[('a.mp4', True, 'stereo', 'aac'), ('a.ts', True, 'stereo', 'aac')],
        *[('a.mkv', 'libmp3lame', 'stereo', 'mp3float'), ('a.mkv', 'libopus', 'stereo', 'aac')],
        *[('a.mkv', 'flac', 'mono', 'aac'), ('a.mkv', 'ac3', '5.1', 'aac')],
    ],
)
@pytest.mark.parametrize('cut', [{}, {'start': 0.75, 'end': 2.05}])
def test_audio_is_kept(tmp_path, name, audio, layout, codec, cut):
    source = write_video(tmp_path / name, 30, rate=10, audio=audio, audio_layout=layout)
    out = tmp_path / 'out.mp4'
    assert copy(source, out, **cut).problem is None
    with av.open(str(out)) as container:
        context = container.streams.audio[0].codec_context
        assert context.name == codec
        assert context.layout.name == ('mono' if layout == 'mono' else 'stereo')
    duration = video_duration(out)
    assert duration == pytest.approx(1.25 if cut else 3.0, abs=0.06)
    assert_is_the_tone(out, duration, is_mixed=layout == '5.1')


@pytest.mark.parametrize('audio', [True, 'libmp3lame', 'libopus', 'flac'])
@pytest.mark.parametrize(('start', 'begin'), [(0.0, 1.0), (0.5, 0.5)])
def test_audio_keeps_its_place(tmp_path, audio, start, begin):
    source = write_video(tmp_path / 'a.mkv', 30, rate=10, audio=audio, audio_start=1.0)
    copy(source, tmp_path / 'out.mp4', start=start)
    first, samples, rate = hear(tmp_path / 'out.mp4')
    loud = np.flatnonzero(np.abs(samples) > 0.3)[0] / rate
    assert first + loud == pytest.approx(begin, abs=0.03)


@pytest.mark.parametrize(
    ('duration', 'whole_audio', 'heard'), [(3.0, True, 3.0), (3.0, False, 2.0), (1.0, True, 1.0)]
)
@pytest.mark.parametrize('audio', [True, 'ac3'])
def test_audio_longer_or_shorter_than_the_video(tmp_path, duration, whole_audio, heard, audio):
    name = 'a.mp4' if audio is True else 'a.mkv'
    source = write_video(tmp_path / name, 20, rate=10, audio=audio, audio_duration=duration)
    out = tmp_path / 'out.mp4'
    assert copy(source, out, whole_audio).problem is None
    assert numbers(read(out)) == list(range(20))
    assert video_duration(out) == pytest.approx(2.0)
    assert_is_the_tone(out, heard)


@pytest.mark.parametrize('audio', [True, 'ac3'])
def test_corrupt_audio_leaves_the_images_alone(tmp_path, audio):
    name = 'a.mp4' if audio is True else 'a.mkv'
    source = corrupt(write_video(tmp_path / name, 60, audio=audio), 0.5, 0.6)
    good, out = write_video(tmp_path / 'good.mp4', 60), tmp_path / 'out.mp4'
    with closing(VideoReader(good)) as reader:
        size = reader.width, reader.height
        with write_to(out, *size, reader.time_base, source) as writer:
            for frame in reader:
                writer.write(frame.image, frame.pts, frame.duration)
    assert 'the audio is corrupt' in writer.problem
    assert numbers(read(out)) == list(range(60))
    begin, samples, rate = hear(out)
    # What comes after the hole is heard when it should be.
    assert begin + len(samples) / rate == pytest.approx(6.0, abs=0.1)
    assert np.abs(samples[-rate // 2 :]).max() > 0.3


def test_audio_that_cannot_be_opened(tmp_path):
    (tmp_path / 'a.mp4').write_bytes(b'')
    with write_to(tmp_path / 'out.mp4', 128, 96, Fraction(1, 10), tmp_path / 'a.mp4') as writer:
        writer.write(numbered_image(1), 0)
    assert 'the audio is missing' in writer.problem
    assert numbers(read(tmp_path / 'out.mp4')) == [1]


# ------------------------------------------------------------------------ finishing and failing


def test_closing_in_the_middle_gives_a_whole_file(tmp_path):
    source = write_video(tmp_path / 'a.mp4', 30, rate=10, audio=True)
    out = tmp_path / 'out.mp4'
    copy(source, out, whole_audio=False, count=12)
    assert numbers(read(out)) == list(range(12))
    assert video_duration(out) == pytest.approx(1.2)
    assert_is_the_tone(out, 1.2)


def test_a_disk_that_takes_no_more(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (20, 96, 128, 3), np.uint8)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, limits[1]))
    try:
        with (
            pytest.raises(OSError) as caught,
            write_to(tmp_path / 'out.mp4', 128, 96, Fraction(1, 10)) as writer,
        ):
            for pts, image in enumerate(noise):
                writer.write(image, pts)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG


def test_a_place_that_cannot_be_written_to(tmp_path):
    (tmp_path / 'file').write_text('')
    (tmp_path / 'folder.mp4').mkdir()
    for path in [tmp_path / 'file' / 'out.mp4', tmp_path / 'folder.mp4']:
        with pytest.raises(OSError):
            write_to(path, 128, 96, Fraction(1))
    assert sorted(os.listdir(tmp_path)) == ['file', 'folder.mp4']
