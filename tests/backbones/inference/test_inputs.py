"""What users give is found, listed in a sensible order, and taken for what is in it."""

import base64
import errno
import io
import os
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import av
import fsspec
import numpy as np
import pytest
import skimage
from PIL import Image
from tool_process import Started
from videos import read_number, write_video
from web import Handler, serve

from backbones.errors import InputError, NotMediaError
from backbones.inference import reading
from backbones.inference.images import read_image
from backbones.inference.inputs import Input, list_inputs, without_password
from backbones.inference.reading import Clip, Closed, Frame, identify, read_inputs

PHOTOGRAPHS = Path(skimage.data_dir)


def listed(*inputs: object, recursive: bool = False, stdin: str = '') -> list[Input]:
    return list_inputs([str(given) for given in inputs], recursive, io.StringIO(stdin))


def names(items: list[Input], folder: Path | str) -> list[str]:
    """Paths below a folder, of inputs without a problem."""
    assert [item.problem for item in items] == [None] * len(items)
    return [os.path.relpath(item.path, folder) for item in items]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder as users have them."""
    folder = tmp_path / 'photos'
    for name in (
        *('frame_10.jpg', 'frame_2.jpg', 'frame_1.jpg', 'B.png', 'a.png', 'notes.txt'),
        *('.hidden.jpg', 'predictions.jsonl', 'coco.json', 'day_1/c.jpg', 'day_1/deep/d.jpg'),
        *('day_2/c.jpg', '.git/e.jpg', 'Ünï cödé 写真.jpg', 'odd[1].jpg'),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


TOP = [
    *('a.png', 'B.png', 'frame_1.jpg', 'frame_2.jpg', 'frame_10.jpg', 'notes.txt', 'odd[1].jpg'),
    'Ünï cödé 写真.jpg',
]
BELOW = ['day_1/c.jpg', 'day_1/deep/d.jpg', 'day_2/c.jpg']


@pytest.mark.parametrize(('recursive', 'expected'), [(False, TOP), (True, [*TOP, *BELOW])])
def test_folder_is_listed_as_people_sort_it(tree: Path, recursive: bool, expected: list[str]):
    items = listed(tree, recursive=recursive)
    assert names(items, tree) == expected
    assert all(item.found for item in items)


def test_all_ways_to_write_a_path_are_one_input(tree: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tree.parent)
    plain = listed('photos', recursive=True)
    for given in ('./photos', 'photos/', './/photos'):
        assert listed(given, recursive=True) == plain
    (tree.parent / 'linked').symlink_to('photos')
    for given in (tree, 'photos/../photos', 'linked'):
        same = listed(given, recursive=True)
        assert [item.key for item in same] == [item.key for item in plain]
    items = listed('photos/frame_2.jpg', './photos/frame_2.jpg', tree / 'frame_2.jpg', 'photos')
    assert names(items, 'photos') == [
        'frame_2.jpg',
        *(name for name in TOP if name != 'frame_2.jpg'),
    ]
    assert items[0] == Input('photos/frame_2.jpg')


@pytest.mark.parametrize(
    ('glob', 'expected'),
    [
        ('frame_*.jpg', ['frame_1.jpg', 'frame_2.jpg', 'frame_10.jpg']),
        ('*/c.jpg', ['day_1/c.jpg', 'day_2/c.jpg']),
        ('day_?', ['day_1/c.jpg', 'day_2/c.jpg']),
        ('**/?.jpg', BELOW),
        ('odd[1].jpg', ['odd[1].jpg']),  # what exists is no glob
        ('.hid*', ['.hidden.jpg']),
    ],
)
def test_globs(tree: Path, glob: str, expected: list[str]):
    assert names(listed(tree / glob), tree) == expected


def test_problems_do_not_stop_the_others(tree: Path, tmp_path: Path):
    (tmp_path / 'nothing').mkdir()
    (tmp_path / 'broken.jpg').symlink_to('gone.jpg')
    problems = {
        str(tmp_path / 'missing.jpg'): 'No such file',
        str(tmp_path / '*.tif'): 'matches no file',
        str(tmp_path / 'nothing'): '--recursive',
        'gopher://host/a.jpg': 'gopher',
        'webcam:front': 'No such file',
        str(tmp_path / 'broken.jpg'): 'No such file',
        str(tree / 'a.png' / 'b.jpg'): 'Not a directory',
        '': 'No such file',
    }
    *bad, good = listed(*problems, tree / 'a.png')
    assert [item.path for item in bad] == list(problems)
    for item in bad:
        assert problems[item.path] in item.problem
    assert good.problem is None


def test_folder_that_may_not_be_read(tree: Path, monkeypatch: pytest.MonkeyPatch):
    scandir = os.scandir

    def refuse(path: str):
        if Path(path).name == 'day_1':
            raise PermissionError(errno.EACCES, 'Permission denied', path)
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refuse)
    for given, found in ((tree / 'day_1', []), (tree, [*TOP, 'day_2/c.jpg'])):
        *items, bad = listed(given, recursive=True)
        assert 'Permission denied' in bad.problem and bad.path == str(tree / 'day_1')
        assert names(items, tree) == found


def test_links_in_circles(tree: Path):
    (tree / 'day_1' / 'up').symlink_to(tree)
    (tree / 'day_1' / 'up_too').symlink_to(tree)
    (tree / 'self.jpg').symlink_to('self.jpg')
    (tree / 'again.jpg').symlink_to('a.png')
    for given in (tree, tree / '**'):
        found = names(listed(given, recursive=True), tree)
        assert found.count('day_1/c.jpg') == 1 and len(found) < 20
        # Two names for one image are two inputs, each with its results.
        assert 'again.jpg' in found and 'a.png' in found


def test_results_are_no_inputs(tree: Path):
    """Of a run whose output folder lies among its inputs, or is that folder."""
    before = listed(tree, recursive=True)
    for name in ('out/predictions.jsonl', 'out/drawn/a.jpg', 'data/day_1/c.png', 'drawn/a.jpg'):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).touch()
    assert listed(tree, recursive=True) == before
    assert names(listed(tree / 'out' / 'drawn'), tree) == ['out/drawn/a.jpg']
    (tree / 'out' / 'predictions.jsonl').unlink()
    assert 'out/drawn/a.jpg' in names(listed(tree, recursive=True), tree)


def test_list_on_standard_input(tree: Path):
    # With the mark that Windows' editors put in front of UTF-8.
    lines = f'\ufeff{tree / "frame_2.jpg"}\r\n\n{tree / "Ünï cödé 写真.jpg"}\n{tree}/no\u2028ne.jpg'
    items = listed(tree / 'a.png', '-', stdin=lines)
    assert [Path(item.path).name for item in items] == [
        *('a.png', 'frame_2.jpg', 'Ünï cödé 写真.jpg', 'no\u2028ne.jpg')
    ]
    assert [item.problem for item in items] == [
        None,
        None,
        None,
        'cannot be read: No such file or directory',
    ]
    (nothing,) = listed('-', stdin='\n')
    assert 'no paths' in nothing.problem


@pytest.mark.parametrize(
    'url', ['webcam:0', 'rtsp://me:secret@camera/1', 'RTMP://h/app', 'udp://239.0.0.1:1234?ttl=1*']
)
def test_live_sources_are_not_opened(url: str):
    assert listed(url, url) == [Input(url)]
    assert identify(url)[:2] == ('live', url)
    assert 'secret' not in listed(url)[0].shown


@pytest.mark.parametrize(
    ('name', 'kind', 'size'),
    [
        ('chelsea.png', 'image', (300, 451)),
        ('no_time_for_that_tiny.gif', 'animation', (25, 14)),
        ('multipage.tif', 'image', (15, 10)),
    ],
)
def test_images_are_recognized_whatever_their_suffix(
    tmp_path: Path, name: str, kind: str, size: tuple[int, int]
):
    path = tmp_path / 'a.mp4'
    path.write_bytes((PHOTOGRAPHS / name).read_bytes())
    assert identify(str(path)) == (kind, str(path), size)


@pytest.mark.parametrize(
    ('name', 'codec', 'format'),
    [
        *[('a.mp4', 'mpeg4', 'mp4'), ('a.webm', 'libvpx', 'webm'), ('a.avi', 'mpeg4', 'avi')],
        *[('a.jpg', 'mpeg4', 'mp4'), ('a.jpg', 'mpeg4', 'avi'), ('a.png', 'mpeg2video', 'mpegts')],
        *[('no suffix', 'mpeg4', 'matroska'), ('a.mjpeg', 'mjpeg', 'mjpeg')],
        *[('a:b 写真.mp4', 'mpeg4', 'mp4'), ('a.txt', 'mpeg2video', 'vob')],
    ],
)
def test_videos_are_recognized_whatever_their_suffix(
    tmp_path: Path, name: str, codec: str, format: str
):
    path = tmp_path / name
    pixel_format = 'yuvj420p' if codec == 'mjpeg' else 'yuv420p'
    write_video(path, 10, rate=25, codec=codec, pixel_format=pixel_format, format=format)
    assert identify(str(path))[:2] == ('video', str(path))


@pytest.mark.parametrize(
    'content',
    [
        *(b'', b'Hello\n' * 50, b'BMW is a make\n', 'é'.encode() * 5000, bytes(9000)),
        *(bytes(range(256)) * 40, b'#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n'),
    ],
)
def test_neither_image_nor_video(tmp_path: Path, content: bytes):
    """Left out of a folder in silence unless its name promises something."""
    for name in ('other.dat', 'video.mp4'):
        (tmp_path / name).write_bytes(content)
    closed = list(read_inputs(listed(tmp_path), Clip(), Event()))
    assert [(Path(item.input.path).name, item.was_left_out) for item in closed] == [
        *[('other.dat', True), ('video.mp4', False)]
    ]
    with pytest.raises(NotMediaError):
        identify(str(tmp_path / 'other.dat'))


def test_where_a_list_of_inputs_goes(tmp_path: Path):
    """batch_infer.py takes the file itself."""
    path = tmp_path / 'list.txt'
    path.write_text('a.jpg\nb.jpg\n')
    with pytest.raises(NotMediaError, match='standard input'):
        identify(str(path))


def test_audio_alone_is_no_video(tmp_path: Path):
    path = tmp_path / 'a.mp4'
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('aac', rate=44100, layout='mono')
        samples = np.zeros((1, 1024), np.float32)
        frame = av.AudioFrame.from_ndarray(samples, format='fltp', layout='mono')
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(InputError, match='contains no video'):
        identify(str(path))


def test_what_is_not_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    os.mkfifo(tmp_path / 'pipe.jpg')
    for name, reason in (('pipe.jpg', 'pipe'), ('', 'folder'), ('none.jpg', 'No such file')):
        with pytest.raises(InputError, match=reason):
            identify(str(tmp_path / name))

    def refuse(path: str) -> None:
        raise PermissionError(errno.EACCES, 'Permission denied', path)

    monkeypatch.setattr(os, 'stat', refuse)
    with pytest.raises(InputError, match='Permission'):
        identify('secret.jpg')


def test_a_bad_input_stops_no_other(tmp_path: Path):
    write_video(tmp_path / 'b.mp4', 2)
    (tmp_path / 'b.mp4').rename(tmp_path / 'b.jpg')
    (tmp_path / 'c.mp4').write_bytes(b'no video')
    good = PHOTOGRAPHS / 'chelsea.png'
    items = read_inputs(listed(tmp_path / 'a.png', tmp_path, good), Clip(), Event())
    seen = []
    for item in items:
        if isinstance(item, Frame):
            seen.append(item.input.path[-4:] if item.stream else 'image')
        else:
            problem = getattr(item, 'problem', None)
            seen.append((type(item).__name__, Path(item.input.path).name, problem is not None))
    assert seen == [
        ('Closed', 'a.png', True),
        *[('Stream', 'b.jpg', False), '.jpg', '.jpg', ('Closed', 'b.jpg', False)],
        ('Closed', 'c.mp4', True),
        'image',
    ]


@pytest.mark.parametrize('kind', ['gif', 'mp4'])
def test_frames_are_counted_from_the_start_on(kind: str, tmp_path: Path):
    """At 10 frames a second, in animations as in videos."""
    path = tmp_path / f'a.{kind}'
    if kind == 'mp4':
        write_video(path, 8, rate=10)
    else:
        first, *others = [Image.new('L', (32, 32), 30 * number) for number in range(8)]
        first.save(path, save_all=True, append_images=others, duration=100)

    def read(clip: Clip) -> list:
        return list(read_inputs([Input(str(path))], clip, Event()))

    stream, *frames, _ = read(Clip(every=3))
    assert len(frames) == 3
    assert stream.num_frames == (3 if kind == 'mp4' else None)
    stream, *frames, closed = read(Clip(every=2, start=0.3, end=0.7))
    assert stream.num_frames in (2, None)
    assert [(frame.index, round(frame.time, 3)) for frame in frames] == [(0, 0.3), (2, 0.5)]
    assert closed.problem is None
    for clip, reason in ((Clip(start=5.0), ''), (Clip(start=0.31, end=0.39), 'no frame between')):
        (closed,) = read(clip)
        assert closed.stream is None and reason in closed.problem


def test_without_pyav_images_are_read_and_videos_say_what_is_missing(tmp_path: Path):
    folder = tmp_path / 'in'
    folder.mkdir()
    write_video(folder / 'a.mp4', 2)
    (folder / 'notes.txt').touch()
    (folder / 'b.png').write_bytes((PHOTOGRAPHS / 'chelsea.png').read_bytes())
    (tmp_path / 'read.py').write_text("""
import sys, threading
assert 'av' not in sys.modules
sys.modules['av'] = None
from backbones.inference.inputs import list_inputs
from backbones.inference.reading import Clip, read_inputs
video, image, text = read_inputs(
    list_inputs(['in'], False, None), Clip(), threading.Event()
)
assert 'pip install av' in video.problem and not video.was_left_out
assert image.load().shape == (300, 451, 3)
assert text.was_left_out
""")
    done = Started(tmp_path, [tmp_path / 'read.py']).wait()
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------- URLs


def test_storage_that_fsspec_knows(tmp_path: Path):
    storage = fsspec.filesystem('memory')
    image = (PHOTOGRAPHS / 'chelsea.png').read_bytes()
    storage.pipe({'/bucket/b_10.png': image, '/bucket/b_2.png': image, '/bucket/deep/c.png': image})
    storage.pipe('/bucket/a.mp4', write_video(tmp_path / 'a.mp4', 3, audio=True).read_bytes())
    url = 'memory://bucket'
    assert names(listed(url), url) == ['a.mp4', 'b_2.png', 'b_10.png']
    assert names(listed(url, recursive=True), url) == ['a.mp4', 'b_2.png', 'b_10.png', 'deep/c.png']
    assert names(listed(f'{url}/*.png'), url) == ['b_2.png', 'b_10.png']
    assert names(listed(f'{url}/b_2*'), url) == ['b_2.png']
    video, photo = listed(f'{url}/a.mp4', f'{url}/b_2.png')
    stream, *frames, closed = read_inputs([video], Clip(), Event())
    assert [read_number(frame.image) for frame in frames] == [0, 1, 2]
    assert stream.audio == f'{url}/a.mp4' and closed.problem is None
    (frame,) = read_inputs([photo], Clip(), Event())
    np.testing.assert_array_equal(frame.load(), read_image(PHOTOGRAPHS / 'chelsea.png'))
    (missing,) = read_inputs(listed(f'{url}/none.png'), Clip(), Event())
    assert isinstance(missing, Closed) and 'no such file' in missing.problem
    assert missing.input.path == f'{url}/none.png'
    storage.pipe('/bucket/odd[1].png', image)
    assert listed(f'{url}/odd[1].png') == [Input(f'{url}/odd[1].png')]


def test_hidden_files_of_a_storage():
    below = ('a.png', '.raw/b.png', '.raw/c.json', '.raw/.d.png', '.raw/deep/e.png')
    fsspec.filesystem('memory').pipe({f'/hides/{name}': b' ' for name in below})
    url = 'memory://hides'
    assert names(listed(url, recursive=True), url) == ['a.png']
    assert names(listed(f'{url}/.raw', recursive=True), url) == ['.raw/b.png', '.raw/deep/e.png']
    assert names(listed(f'{url}/.raw/*.*'), url) == ['.raw/b.png']
    assert names(listed(f'{url}/.raw/.d*'), url) == ['.raw/.d.png']


@pytest.fixture
def unmarked(tmp_path: Path) -> dict[str, bytes]:
    """Images that only two letters mark, and a video that begins like an image."""
    paths = [tmp_path / name for name in ('scan.bmp', 'scan.ppm', 'row.mjpeg')]
    for path in paths[:2]:
        Image.open(PHOTOGRAPHS / 'chelsea.png').save(path)
    write_video(paths[2], 3, codec='mjpeg', pixel_format='yuvj420p', format='mjpeg')
    return {f'/{path.name}': path.read_bytes() for path in paths}


def test_a_storage_has_what_a_disk_has(unmarked: dict[str, bytes], tmp_path: Path):
    storage = fsspec.filesystem('memory')
    storage.pipe({f'/unmarked{name}': content for name, content in unmarked.items()})
    storage.pipe({'/unmarked/notes.txt': b'BMW is a make', '/unmarked/clip.bmp': b'no image'})
    (tmp_path / 'notes.txt').write_text('BMW is a make')
    (tmp_path / 'clip.bmp').write_text('no image')
    for folder in (tmp_path, 'memory://unmarked'):
        seen = []
        for item in read_inputs(listed(folder), Clip(), Event()):
            kind = 'left out' if getattr(item, 'was_left_out', False) else type(item).__name__
            seen.append((Path(item.input.path).name, kind))
        row = [('row.mjpeg', kind) for kind in ('Stream', *('Frame',) * 3, 'Closed')]
        scans = [('scan.bmp', 'Frame'), ('scan.ppm', 'Frame')]
        assert seen == [('clip.bmp', 'Closed'), ('notes.txt', 'left out'), *row, *scans]


def give_with_login(handler: Handler) -> None:
    """The image, to whom it is for."""
    login = base64.b64encode(b'me:p@ss').decode()
    if handler.headers['Authorization'] == f'Basic {login}':
        handler.give('image/png', (PHOTOGRAPHS / 'chelsea.png').read_bytes())
    else:
        handler.send_error(401)


def send_elsewhere(handler: Handler) -> None:
    """Point to a file of the machine that asks."""
    handler.send_response(302)
    handler.send_header('Location', 'file:///etc/passwd')
    handler.end_headers()


@pytest.fixture
def server(
    unmarked: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The URL of a web server with every kind of answer."""
    monkeypatch.setenv('no_proxy', '*')
    image = (PHOTOGRAPHS / 'chelsea.png').read_bytes()
    has_closed = Event()
    pages = {
        **dict.fromkeys(('/image.png', '/a%20b.png'), ('image/png', image)),
        '/untold': image,
        **unmarked,
        '/animation': ('image/gif', (PHOTOGRAPHS / 'no_time_for_that_tiny.gif').read_bytes()),
        '/video': ('video/mp4', write_video(tmp_path / 'a.mp4', 3, audio=True).read_bytes()),
        '/page': ('text/html; charset=utf-8', b'<html></html>'),
        '/live': ('multipart/x-mixed-replace; boundary=frame', b'--frame\r\n'),
        '/broken': lambda handler: handler.give('image/png', image[:1000], missing=4000),
        '/secret': give_with_login,
        '/elsewhere': send_elsewhere,
        '/silent': lambda handler: has_closed.wait(),
    }
    with serve(pages) as server:
        yield server.url
        has_closed.set()


@pytest.mark.parametrize(
    ('name', 'kind'),
    [
        *[('image.png', 'image'), ('untold', 'image'), ('a b.png?size=*', 'image')],
        *[('animation', 'animation'), ('live', 'live'), ('video', 'video')],
        *[('scan.bmp', 'image'), ('scan.ppm', 'image'), ('row.mjpeg?size=2', 'video')],
    ],
)
def test_what_a_server_gives(server: str, name: str, kind: str):
    url = f'{server}/{name}'
    assert listed(url) == [Input(url)]
    source = identify(url)
    assert source.kind == kind
    if kind == 'image':
        expected = read_image(PHOTOGRAPHS / 'chelsea.png')
        np.testing.assert_array_equal(read_image(source.file), expected)
    if kind == 'video':
        _, *frames, closed = read_inputs([Input(url)], Clip(), Event())
        assert [read_number(frame.image) for frame in frames] == [0, 1, 2]
        assert closed.problem is None


@pytest.mark.parametrize(
    ('name', 'reason'),
    [
        *[('missing', '404'), ('page', 'neither'), ('image.png', 'too large')],
        *[('broken', 'cut short'), ('elsewhere', 'file:'), ('secret', '401')],
        ('silent', 'timed out'),
    ],
)
def test_servers_that_give_no_image(
    server: str, name: str, reason: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(reading, 'MAX_DOWNLOAD', 10_000)
    monkeypatch.setattr(reading, 'WEB_TIMEOUT', 0.2 if name == 'silent' else 20)
    with pytest.raises(InputError, match=reason):
        identify(f'{server}/{name}')


def test_password_in_a_url(server: str):
    assert identify(f'{server.replace("//", "//me:p%40ss@")}/secret').kind == 'image'


@pytest.mark.parametrize('login', ['', 'me@', 'me:pass@', 'me:p@ss@', 'me:p@s:s@@'])
def test_no_part_of_a_password_is_shown(login: str):
    for rest in ('10.0.0.5:554/ch1', 'host', 'host/a@b.jpg', 'host?q=a@b'):
        assert without_password(f'rtsp://{login}{rest}') == f'rtsp://{rest}'
    assert without_password('photos/a@b.jpg') == 'photos/a@b.jpg'
