import errno
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
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
from backbones.inference.video_reader import VideoReader
from backbones.inference.video_writer import VideoWriter

INDEX_IN_FRONT = {'movflags': '+faststart'}

SATURATED = [
    (0, 0, 255),
    (0, 255, 0),
    (255, 0, 0),
    (255, 255, 0),
    (255, 0, 255),
    (0, 255, 255),
    (255, 255, 255),
    (0, 0, 0),
]


def read(path: Path, **arguments) -> list:
    with VideoReader(path, **arguments) as reader:
        frames = list(reader)
        assert reader.problem is None
    return frames


def numbers(frames: list) -> list[int]:
    return [read_number(frame.picture) for frame in frames]


def copy(source: Path, out: Path, whole_audio: bool = True, **cut) -> VideoWriter:
    """What a program does that changes nothing in the pictures."""
    span = {key: cut[key] for key in ('start', 'end') if key in cut}
    with (
        VideoReader(source, **cut) as reader,
        VideoWriter(
            out,
            reader.width,
            reader.height,
            time_base=reader.time_base,
            frame_rate=reader.frame_rate,
            source=source,
            **span,
        ) as writer,
    ):
        for frame in reader:
            writer.write(frame.picture, frame.pts, frame.duration)
        writer.close(whole_audio=whole_audio)
    return writer


def picture_duration(path: Path) -> float:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return float(stream.duration * stream.time_base)


def heard(path: Path) -> tuple[float, np.ndarray, int]:
    """When the sound of a file begins, in seconds, its left channel, and samples a second."""
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        frames = list(container.decode(stream))
        samples = np.concatenate([frame.to_ndarray()[0] for frame in frames])
        return float(frames[0].pts * stream.time_base), samples, stream.rate


def pitch_of(samples: np.ndarray, rate: int) -> float:
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(spectrum.argmax()) * rate / len(samples)


def assert_is_the_tone(path: Path, duration: float) -> None:
    _, samples, rate = heard(path)
    assert len(samples) / rate == pytest.approx(duration, abs=0.05)
    inside = samples[rate // 10 : -rate // 10]
    assert pitch_of(inside, rate) == pytest.approx(TONE, rel=0.02)
    # A sine of 0.5.
    assert inside.std() == pytest.approx(0.5 / np.sqrt(2), rel=0.07)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / 'disk'
    folder.mkdir()
    mount = shutil.which('mount')
    arguments = [mount, '-t', 'tmpfs', '-o', 'size=64k', 'tmpfs', str(folder)]
    if mount is None or subprocess.run(arguments, capture_output=True).returncode:
        pytest.skip('mounting a small disk is not permitted here')
    yield folder
    # Lazily: who has failed may have left a file open.
    subprocess.run(['umount', '--lazy', str(folder)], check=True)


# ------------------------------------------------------------------------------------- reading


def test_a_video_says_what_it_is_and_gives_every_frame(tmp_path):
    path = write_video(tmp_path / 'a.mp4', 30, rate=10, size=(128, 96))
    with VideoReader(path) as reader:
        assert (reader.width, reader.height) == (128, 96)
        assert reader.frame_rate == 10
        assert reader.frames == 30
        assert reader.duration == pytest.approx(3.0)
        frames = list(reader)
    assert numbers(frames) == list(range(30))
    assert [frame.index for frame in frames] == list(range(30))
    assert [frame.time for frame in frames] == pytest.approx([n / 10 for n in range(30)])
    assert all(frame.pts * frame.time_base == Fraction(n, 10) for n, frame in enumerate(frames))
    assert frames[0].picture.shape == (96, 128, 3)
    assert frames[0].picture.dtype == np.uint8
    assert frames[0].picture.flags.writeable


@pytest.mark.parametrize(
    ('name', 'codec', 'sound'),
    [
        ('a.mkv', 'libx264', 'libopus'),
        ('a.webm', 'libvpx', 'libopus'),
        ('a.avi', 'mpeg4', 'libmp3lame'),
        ('a.ts', 'libx264', True),
        ('a.h264', 'libx264', False),
    ],
)
def test_other_containers(tmp_path, name, codec, sound):
    path = write_video(tmp_path / name, 20, rate=10, codec=codec, audio=sound)
    frames = read(path)
    assert numbers(frames) == list(range(20))
    gaps = np.diff([frame.time for frame in frames])
    assert frames[0].time == pytest.approx(0, abs=0.1)
    # MPEG-4 in AVI begins with a frame that is shown twice.
    assert gaps[1:] == pytest.approx(0.1)
    inside = [read_number(frame.picture) for frame in frames if 0.75 <= frame.time < 1.55]
    assert numbers(read(path, start=0.75, end=1.55)) == inside


@pytest.mark.parametrize('rotation', [90, 180, 270])
@pytest.mark.parametrize('mirrored', [False, True])
def test_pictures_are_upright(tmp_path, rotation, mirrored):
    upright = numbered_image(5, (128, 96))
    # As a camera stores it that asks to be turned counter-clockwise, then mirrored.
    stored = upright[:, ::-1] if mirrored else upright
    stored = np.ascontiguousarray(np.rot90(stored, -rotation // 90))
    path = write_video(tmp_path / 'a.mp4', [stored] * 3, rotation=rotation, mirrored=mirrored)
    with VideoReader(path) as reader:
        assert (reader.width, reader.height) == (128, 96)
        pictures = [frame.picture for frame in reader]
    assert [white_corner(picture) for picture in pictures] == ['top left'] * 3
    assert [read_number(picture) for picture in pictures] == [5] * 3


def test_oblong_pixels_are_stretched(tmp_path):
    wide = write_video(tmp_path / 'wide.mp4', 3, sample_aspect_ratio=Fraction(4, 3))
    tall = write_video(tmp_path / 'tall.mp4', 3, sample_aspect_ratio=Fraction(2, 3))
    for path, size in [(wide, (171, 96)), (tall, (128, 144))]:
        with VideoReader(path) as reader:
            assert (reader.width, reader.height) == size
            frames = list(reader)
        assert frames[0].picture.shape == (size[1], size[0], 3)
        assert numbers(frames) == [0, 1, 2]


def test_variable_rates_keep_their_times(tmp_path):
    times = [0, 0.04, 0.3, 0.333, 1.001, 1.5, 1.502]
    path = write_video(tmp_path / 'a.mp4', len(times), rate=4, times=times)
    frames = read(path)
    assert [frame.pts * frame.time_base for frame in frames] == [Fraction(str(t)) for t in times]
    ends = [frame.time + float(frame.duration * frame.time_base) for frame in frames]
    assert ends == pytest.approx([*times[1:], times[-1] + 0.25])


@pytest.mark.parametrize('every', [2, 3, 7])
def test_every_so_manieth_frame_is_shown_until_the_next(tmp_path, every):
    path = write_video(tmp_path / 'a.mp4', 20, rate=10)
    with VideoReader(path, every=every) as reader:
        frames = list(reader)
        assert reader.frames == len(frames)
    assert numbers(frames) == list(range(0, 20, every))
    assert [frame.index for frame in frames] == list(range(0, 20, every))
    ends = [frame.time + float(frame.duration * frame.time_base) for frame in frames]
    assert ends == pytest.approx([*(frame.time for frame in frames[1:]), 2.0])


@pytest.mark.parametrize('name', ['a.mp4', 'a.mkv', 'a.ts'])
@pytest.mark.parametrize('keyframe_every', [5, 100])
def test_start_and_end_are_exact(tmp_path, name, keyframe_every):
    path = write_video(tmp_path / name, 40, rate=10, keyframe_every=keyframe_every)
    whole = read(path)
    begin, end = whole[17].time, whole[31].time
    cut = read(path, start=begin - 0.001, end=end - 0.001)
    assert numbers(cut) == list(range(17, 31))
    assert [frame.pts for frame in cut] == [frame.pts for frame in whole[17:31]]
    assert cut[0].index == 0
    with VideoReader(path, start=begin - 0.001, end=end - 0.001) as reader:
        assert reader.duration == pytest.approx(1.4)
        assert reader.frames == 14


def test_a_start_after_the_end_of_the_video(tmp_path):
    path = write_video(tmp_path / 'a.mp4', 10)
    with pytest.raises(InputError, match=r'ends at 1\.0 s, before the start at 5 s'):
        VideoReader(path, start=5)


@pytest.mark.parametrize('pixel_format', ['yuv420p', 'yuv422p', 'yuv444p', 'yuv420p10le'])
@pytest.mark.parametrize(
    ('size', 'colorspace', 'full_range'),
    [
        ((128, 96), None, False),
        ((128, 96), 1, False),
        ((128, 96), 6, True),
        ((1280, 64), 1, False),
    ],
)
def test_colours(tmp_path, pixel_format, size, colorspace, full_range):
    width, height = size
    patches = np.zeros((height, width, 3), np.uint8)
    for index, colour in enumerate(SATURATED):
        patches[:, index * width // 8 : (index + 1) * width // 8] = colour
    path = write_video(
        tmp_path / 'a.mp4',
        [patches] * 2,
        pixel_format=pixel_format,
        colorspace=colorspace,
        full_range=full_range,
    )
    picture = read(path)[1].picture.astype(int)
    for index, colour in enumerate(SATURATED):
        seen = picture[height // 2, (2 * index + 1) * width // 16]
        assert np.abs(seen - colour).max() <= 8, colour


def test_untagged_hd_is_bt709(tmp_path):
    patch = np.full((64, 1280, 3), (20, 200, 40), np.uint8)
    path = write_video(tmp_path / 'tagged.avi', [patch] * 2, codec='mpeg4', colorspace=1)
    # AVI keeps no tag, so only the size can tell.
    with av.open(str(path)) as container:
        assert next(container.decode(video=0)).colorspace == 2
    assert np.abs(read(path)[1].picture[32, 640].astype(int) - (20, 200, 40)).max() <= 8


def test_a_span_without_a_frame(tmp_path):
    path = write_video(tmp_path / 'a.mp4', 10, rate=10)
    with pytest.raises(InputError, match=r'has no frame between 0\.51 and 0\.59 s'):
        VideoReader(path, start=0.51, end=0.59)


@pytest.mark.parametrize('end', [0.6, 1.1])
def test_a_frame_at_the_very_end_is_left_out(tmp_path, end):
    path = write_video(tmp_path / 'a.mp4', 20, rate=10)
    assert read(path, end=end)[-1].time == pytest.approx(end - 0.1)
    assert read(path, start=end)[0].time == pytest.approx(end)


# ------------------------------------------------------------------------- damaged and no videos


def test_a_damaged_last_third_gives_the_rest(tmp_path):
    path = corrupt(write_video(tmp_path / 'a.mp4', 60), 2 / 3)
    with VideoReader(path) as reader:
        assert reader.problem is None
        frames = list(reader)
        problem = reader.problem
    assert 20 <= len(frames) <= 45
    assert numbers(frames) == list(range(len(frames)))
    good = f'{len(frames) / 10:.1f}'
    assert problem == f'is damaged from {good} s on: {len(frames)} of about 60 frames read'


def test_damage_in_the_middle_does_not_end_a_video(tmp_path):
    path = corrupt(write_video(tmp_path / 'a.mp4', 60), 0.4, 0.5)
    with VideoReader(path) as reader:
        frames = list(reader)
        problem = reader.problem
    assert read_number(frames[0].picture) == 0
    assert numbers(frames)[-20:] == list(range(40, 60))
    assert len(frames) < 60
    assert re.fullmatch(
        rf'is damaged in places, first at \d\.\d s: {len(frames)} of about 60 frames read', problem
    )


def test_pictures_that_are_half_damaged_are_left_out(tmp_path):
    random = np.random.default_rng(0)
    noise = [random.integers(0, 256, (96, 128, 3), np.uint8) for _ in range(20)]
    path = write_video(tmp_path / 'a.mp4', noise, keyframe_every=1)
    whole = read(path)
    corrupt(path, 0.52, 0.521)
    with VideoReader(path) as reader:
        frames = list(reader)
        assert reader.problem.endswith('s: 19 of about 20 frames read')
    by_pts = {frame.pts: frame.picture for frame in whole}
    assert all((frame.picture == by_pts[frame.pts]).all() for frame in frames)


@pytest.mark.parametrize(
    ('name', 'options'), [('a.mp4', INDEX_IN_FRONT), ('a.mkv', {}), ('b.mp4', INDEX_IN_FRONT)]
)
def test_a_video_that_is_cut_short_gives_what_is_there(tmp_path, name, options):
    sound = name.startswith('a')
    path = truncate(write_video(tmp_path / name, 60, audio=sound, options=options), 0.6)
    with VideoReader(path) as reader:
        frames = list(reader)
        problem = reader.problem
    assert 8 <= len(frames) <= 45
    assert numbers(frames)[:-3] == list(range(len(frames) - 3))
    assert problem.startswith('is cut short or damaged after ')
    assert problem.endswith(f's: {len(frames)} of about 60 frames read')


def test_an_mp4_without_its_index(tmp_path):
    path = truncate(write_video(tmp_path / 'a.mp4', 30), 0.5)
    with pytest.raises(InputError, match=r'is cut short: its index \(moov\) is missing'):
        VideoReader(path)


@pytest.mark.parametrize(
    ('content', 'message'),
    [(b'', r'is empty \(0 bytes\)'), (b'Dear diary, ' * 99, 'is neither')],
)
def test_no_video_at_all(tmp_path, content, message):
    path = tmp_path / 'a.mp4'
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        VideoReader(path)


def test_what_is_not_a_file(tmp_path):
    with pytest.raises(InputError, match='does not exist'):
        VideoReader(tmp_path / 'none.mp4')
    with pytest.raises(InputError, match='is a folder'):
        VideoReader(tmp_path)


def test_sound_alone_is_no_video(tmp_path):
    video = write_video(tmp_path / 'a.mp4', 5, audio=True)
    path = tmp_path / 'a.m4a'
    with av.open(str(video)) as source, av.open(str(path), 'w', format='mp4') as container:
        stream = container.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(audio=0):
            if packet.size:
                packet.stream = stream
                container.mux(packet)
    with pytest.raises(InputError, match='has no video in it, only audio'):
        VideoReader(path)


def test_a_video_of_which_nothing_can_be_decoded(tmp_path):
    path = corrupt(write_video(tmp_path / 'a.mp4', 10), 0)
    with pytest.raises(InputError, match='none of its frames can be read'):
        VideoReader(path)


def test_a_name_with_a_colon_is_no_address(tmp_path, monkeypatch):
    write_video(tmp_path / 'a.mp4', 3, audio=True).rename(tmp_path / 'http:a%03d.mp4')
    monkeypatch.chdir(tmp_path)
    copy(Path('http:a%03d.mp4'), Path('http:b%03d.mp4'))
    assert numbers(read(Path('http:b%03d.mp4'))) == [0, 1, 2]


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
def test_rate_size_and_duration_are_kept(tmp_path, rate):
    source = write_video(tmp_path / 'a.mp4', 31, rate=rate, size=(128, 96))
    copy(source, tmp_path / 'out.mp4')
    with VideoReader(tmp_path / 'out.mp4') as reader:
        assert (reader.width, reader.height) == (128, 96)
        assert reader.frame_rate == rate
        frames = list(reader)
    assert numbers(frames) == list(range(31))
    assert [frame.time for frame in frames] == pytest.approx([n / rate for n in range(31)])
    assert picture_duration(tmp_path / 'out.mp4') == pytest.approx(31 / rate)


@pytest.mark.parametrize('name', ['a.mp4', 'a.mkv'])
def test_variable_rates_survive_writing(tmp_path, name):
    times = [0, 0.04, 0.3, 0.333, 1.001, 1.5, 1.502]
    source = write_video(tmp_path / name, len(times), rate=4, times=times)
    copy(source, tmp_path / 'out.mp4')
    frames = read(tmp_path / 'out.mp4')
    assert [frame.pts * frame.time_base for frame in frames] == [Fraction(str(t)) for t in times]
    # Matroska does not keep how long the last one lasts, MP4 does.
    if name == 'a.mp4':
        assert picture_duration(tmp_path / 'out.mp4') == pytest.approx(1.752)


def test_left_out_frames_change_neither_times_nor_duration(tmp_path):
    source = write_video(tmp_path / 'a.mp4', 20, rate=10, audio=True)
    copy(source, tmp_path / 'out.mp4', every=7)
    frames = read(tmp_path / 'out.mp4')
    assert numbers(frames) == [0, 7, 14]
    assert [frame.time for frame in frames] == pytest.approx([0, 0.7, 1.4])
    assert picture_duration(tmp_path / 'out.mp4') == pytest.approx(2.0)
    assert_is_the_tone(tmp_path / 'out.mp4', 2.0)


@pytest.mark.parametrize('size', [(127, 96), (128, 95), (127, 95), (1, 1)])
def test_odd_sizes_repeat_the_last_row_and_column(tmp_path, size):
    width, height = size
    picture = np.full((height, width, 3), 200, np.uint8)
    with VideoWriter(tmp_path / 'out.mp4', width, height, time_base=Fraction(1, 10)) as writer:
        for pts in range(3):
            writer.write(picture, pts)
    frames = read(tmp_path / 'out.mp4')
    assert frames[2].picture.shape == (height + height % 2, width + width % 2, 3)
    assert np.abs(frames[2].picture.astype(int) - 200).max() <= 3


def test_colours_survive_writing(tmp_path):
    patches = np.zeros((96, 256, 3), np.uint8)
    for index, colour in enumerate(SATURATED):
        patches[:, index * 32 : (index + 1) * 32] = colour
    path = tmp_path / 'out.mp4'
    for _ in range(2):
        with VideoWriter(path, 256, 96, time_base=Fraction(1, 10)) as writer:
            writer.write(patches, 0)
            writer.write(patches, 1)
        patches = read(path)[1].picture
    for index, colour in enumerate(SATURATED):
        seen = patches[8:-8, index * 32 + 8 : index * 32 + 24].astype(int)
        assert np.abs(seen - colour).max() <= 6, colour


def test_times_that_do_not_rise_are_nudged(tmp_path):
    with VideoWriter(tmp_path / 'out.mp4', 128, 96, time_base=Fraction(1, 1000)) as writer:
        for number, pts in enumerate([0, 100, 100, 90, 200]):
            writer.write(numbered_image(number), pts, 50)
    frames = read(tmp_path / 'out.mp4')
    assert numbers(frames) == [0, 1, 2, 3, 4]
    assert [frame.time for frame in frames] == pytest.approx([0, 0.1, 0.101, 0.102, 0.2])


def test_a_picture_of_another_size_is_refused(tmp_path):
    with VideoWriter(tmp_path / 'out.mp4', 128, 96, time_base=Fraction(1, 10)) as writer:
        with pytest.raises(ValueError, match=r'expected a picture of shape \(96, 128, 3\)'):
            writer.write(np.zeros((128, 96, 3), np.uint8), 0)
        writer.write(numbered_image(7), 0)
    assert numbers(read(tmp_path / 'out.mp4')) == [7]


# -------------------------------------------------------------------------------------- sound


@pytest.mark.parametrize(
    ('name', 'sound', 'codec'),
    [
        ('a.mp4', True, 'aac'),
        ('a.ts', True, 'aac'),
        ('a.mkv', 'libmp3lame', 'mp3float'),
        ('a.mkv', 'libopus', 'aac'),
        ('b.mkv', 'flac', 'aac'),
        ('c.mkv', 'ac3', 'aac'),
    ],
)
@pytest.mark.parametrize('cut', [{}, {'start': 0.75, 'end': 2.05}])
def test_sound_is_kept(tmp_path, name, sound, codec, cut):
    source = write_video(tmp_path / name, 30, rate=10, audio=sound)
    writer = copy(source, tmp_path / 'out.mp4', **cut)
    assert writer.problem is None
    with av.open(str(tmp_path / 'out.mp4')) as container:
        assert container.streams.audio[0].codec_context.name == codec
    pictures = picture_duration(tmp_path / 'out.mp4')
    assert pictures == pytest.approx(1.25 if cut else 3.0, abs=0.06)
    assert_is_the_tone(tmp_path / 'out.mp4', pictures)
    assert heard(tmp_path / 'out.mp4')[0] == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize('sound', [True, 'libopus'])
def test_sound_keeps_its_place(tmp_path, sound):
    source = write_video(tmp_path / 'a.mkv', 30, rate=10, audio=sound, audio_start=1.0)
    copy(source, tmp_path / 'whole.mp4')
    copy(source, tmp_path / 'cut.mp4', start=0.5)
    for name, begin in [('whole.mp4', 1.0), ('cut.mp4', 0.5)]:
        first, samples, rate = heard(tmp_path / name)
        loud = np.flatnonzero(np.abs(samples) > 0.3)[0] / rate
        assert first + loud == pytest.approx(begin, abs=0.03)


def test_sound_that_is_longer_than_the_pictures(tmp_path):
    source = write_video(tmp_path / 'a.mp4', 20, rate=10, audio=True, audio_duration=3.0)
    copy(source, tmp_path / 'out.mp4', whole_audio=True)
    assert_is_the_tone(tmp_path / 'out.mp4', 3.0)
    assert picture_duration(tmp_path / 'out.mp4') == pytest.approx(2.0)
    copy(source, tmp_path / 'out.mp4', whole_audio=False)
    assert_is_the_tone(tmp_path / 'out.mp4', 2.0)


def test_sound_that_is_shorter_than_the_pictures(tmp_path):
    source = write_video(tmp_path / 'a.mp4', 30, rate=10, audio=True, audio_duration=1.0)
    writer = copy(source, tmp_path / 'out.mp4')
    assert writer.problem is None
    assert len(read(tmp_path / 'out.mp4')) == 30
    assert_is_the_tone(tmp_path / 'out.mp4', 1.0)


@pytest.mark.parametrize('name', ['a.mp4', 'a.mkv'])
def test_damaged_sound_leaves_the_pictures_alone(tmp_path, name):
    sound = True if name == 'a.mp4' else 'ac3'
    source = corrupt(write_video(tmp_path / name, 60, audio=sound), 0.5, 0.6)
    good = write_video(tmp_path / 'good.mp4', 60)
    with (
        VideoReader(good) as reader,
        VideoWriter(
            tmp_path / 'out.mp4', 128, 96, time_base=reader.time_base, source=source
        ) as writer,
    ):
        for frame in reader:
            writer.write(frame.picture, frame.pts, frame.duration)
    assert 'the sound is damaged' in writer.problem
    assert numbers(read(tmp_path / 'out.mp4')) == list(range(60))
    _, samples, rate = heard(tmp_path / 'out.mp4')
    assert len(samples) / rate > 4


def test_sound_that_ends_early_is_told(tmp_path):
    source = write_video(tmp_path / 'a.mp4', 60, audio=True, options=INDEX_IN_FRONT)
    good = shutil.copy(source, tmp_path / 'good.mp4')
    truncate(source, 0.5)
    with (
        VideoReader(good) as reader,
        VideoWriter(
            tmp_path / 'out.mp4', 128, 96, time_base=reader.time_base, source=source
        ) as writer,
    ):
        for frame in reader:
            writer.write(frame.picture, frame.pts, frame.duration)
    assert writer.problem.startswith('the sound ends at ')
    assert len(read(tmp_path / 'out.mp4')) == 60


def test_a_source_of_sound_that_cannot_be_opened(tmp_path):
    (tmp_path / 'a.mp4').write_bytes(b'')
    with VideoWriter(
        tmp_path / 'out.mp4', 128, 96, time_base=Fraction(1, 10), source=tmp_path / 'a.mp4'
    ) as writer:
        writer.write(numbered_image(1), 0)
    assert writer.problem == 'the sound is missing: it is empty (0 bytes)'
    assert numbers(read(tmp_path / 'out.mp4')) == [1]


def test_many_channels_become_stereo(tmp_path):
    source = tmp_path / 'a.mkv'
    with av.open(str(source), 'w') as container:
        video = container.add_stream('libx264', rate=10)
        video.width, video.height = 128, 96
        audio = container.add_stream('ac3', rate=48_000)
        audio.codec_context.layout = '5.1'
        for index in range(10):
            container.mux(video.encode(av.VideoFrame.from_ndarray(numbered_image(index), 'bgr24')))
        wave = 0.5 * np.sin(2 * np.pi * TONE * np.arange(48_000) / 48_000)
        frame = av.AudioFrame.from_ndarray(np.stack([wave] * 6).astype(np.float32), 'fltp', '5.1')
        frame.sample_rate, frame.pts, frame.time_base = 48_000, 0, Fraction(1, 48_000)
        for stream, last in [(audio, frame), (audio, None), (video, None)]:
            container.mux(stream.encode(last))
    assert copy(source, tmp_path / 'out.mp4').problem is None
    with av.open(str(tmp_path / 'out.mp4')) as container:
        assert container.streams.audio[0].codec_context.layout.name == 'stereo'
    _, samples, rate = heard(tmp_path / 'out.mp4')
    assert pitch_of(samples, rate) == pytest.approx(TONE, rel=0.02)


# ------------------------------------------------------------------------ finishing and failing


def start_writing(source: Path, out: Path, count: int) -> VideoWriter:
    with VideoReader(source) as reader:
        writer = VideoWriter(
            out, reader.width, reader.height, time_base=reader.time_base, source=source
        )
        for frame in reader:
            if frame.index == count:
                break
            writer.write(frame.picture, frame.pts, frame.duration)
    return writer


def test_closing_in_the_middle_gives_a_whole_file(tmp_path):
    source = write_video(tmp_path / 'a.mp4', 30, rate=10, audio=True)
    writer = start_writing(source, tmp_path / 'out.mp4', 12)
    assert not (tmp_path / 'out.mp4').exists()
    writer.close()
    writer.close()
    assert writer.num_frames == 12
    assert numbers(read(tmp_path / 'out.mp4')) == list(range(12))
    assert picture_duration(tmp_path / 'out.mp4') == pytest.approx(1.2)
    assert_is_the_tone(tmp_path / 'out.mp4', 1.2)


def test_an_interrupt_keeps_what_there_is(tmp_path):
    out = tmp_path / 'out.mp4'
    with pytest.raises(KeyboardInterrupt), VideoWriter(out, 128, 96, time_base=Fraction(1)) as w:
        w.write(numbered_image(3), 0)
        raise KeyboardInterrupt
    assert numbers(read(out)) == [3]


def test_any_other_error_leaves_nothing(tmp_path):
    out = tmp_path / 'out.mp4'
    with pytest.raises(RuntimeError), VideoWriter(out, 128, 96, time_base=Fraction(1)) as writer:
        writer.write(numbered_image(3), 0)
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_discarding_keeps_the_file_that_was_there(tmp_path):
    source = write_video(tmp_path / 'a.mp4', 10)
    (tmp_path / 'out.mp4').write_bytes(b'precious')
    writer = start_writing(source, tmp_path / 'out.mp4', 5)
    writer.discard()
    assert sorted(tmp_path.iterdir()) == [source, tmp_path / 'out.mp4']
    assert (tmp_path / 'out.mp4').read_bytes() == b'precious'


def test_the_file_that_was_there_is_replaced_at_the_end(tmp_path):
    source = write_video(tmp_path / 'a.mp4', 10)
    (tmp_path / 'out.mp4').write_bytes(b'precious')
    writer = start_writing(source, tmp_path / 'out.mp4', 5)
    assert (tmp_path / 'out.mp4').read_bytes() == b'precious'
    writer.close()
    assert numbers(read(tmp_path / 'out.mp4')) == list(range(5))


def test_without_a_frame_there_is_no_file(tmp_path):
    VideoWriter(tmp_path / 'out.mp4', 128, 96, time_base=Fraction(1)).close()
    assert list(tmp_path.iterdir()) == []


def write_noise(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 96, 128, 3), np.uint8)
    with VideoWriter(path, 128, 96, time_base=Fraction(1, 10)) as writer:
        for pts, picture in enumerate(noise):
            writer.write(picture, pts)


def test_a_full_disk(tiny_disk):
    with pytest.raises(OSError, match='no space left on the disk') as caught:
        write_noise(tiny_disk / 'out.mp4')
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tiny_disk / 'out.mp4')
    assert list(tiny_disk.iterdir()) == []


def test_a_disk_that_takes_no_more(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, limits[1]))
    try:
        with pytest.raises(OSError, match='the video is not written') as caught:
            write_noise(tmp_path / 'out.mp4')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_to(tmp_path):
    (tmp_path / 'file').write_text('')
    (tmp_path / 'folder.mp4').mkdir()
    for path in [tmp_path / 'file' / 'out.mp4', tmp_path / 'folder.mp4']:
        with pytest.raises(OSError, match='the video is not written') as caught:
            VideoWriter(path, 128, 96, time_base=Fraction(1))
        assert caught.value.filename == str(path)
    assert sorted(os.listdir(tmp_path)) == ['file', 'folder.mp4']
