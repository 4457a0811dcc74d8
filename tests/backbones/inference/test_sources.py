"""What users give is found, listed in a sensible order, and taken for what is in it."""

import base64
import errno
import io
import os
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np
import pytest
import skimage
from PIL import Image

from backbones.errors import InputError
from backbones.inference import download
from backbones.inference.download import open_address
from backbones.inference.listing import Listed, expand_inputs
from backbones.inference.pictures import read_picture
from backbones.inference.sources import NotMedia, look_at, looks_like_media_name

PHOTOGRAPHS = Path(skimage.data_dir)


def write_video(path: Path, codec: str = 'mpeg4', format: str | None = None) -> None:
    with av.open(str(path), 'w', format=format) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, 'yuv420p'
        if codec == 'mjpeg':
            stream.pix_fmt = 'yuvj420p'
        for value in range(0, 250, 25):
            pixels = np.full((48, 64, 3), value, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format='bgr24')
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_sound(path: Path) -> None:
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('aac', rate=44100, layout='mono')
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format='fltp', layout='mono'
        )
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def expand(*inputs: object, recursive: bool = False, stdin: str = '') -> list[Listed]:
    return expand_inputs([str(given) for given in inputs], recursive, io.StringIO(stdin))


def relatives(items: list[Listed]) -> list[str]:
    assert [item.problem for item in items] == [None] * len(items)
    return [item.relative for item in items]


def problem_of(items: list[Listed]) -> str:
    (item,) = items
    assert item.problem
    return item.problem


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


TOP = ['a.png', 'B.png', 'frame_1.jpg', 'frame_2.jpg', 'frame_10.jpg', 'notes.txt', 'odd[1].jpg']


def test_folder_is_listed_as_people_sort_it(tree: Path):
    items = expand(tree)
    assert relatives(items) == [*TOP, 'Ünï cödé 写真.jpg']
    assert all(item.found for item in items)
    assert all(Path(item.path) == tree / item.relative for item in items)


def test_folders_below_on_request(tree: Path):
    below = ['day_1/c.jpg', 'day_1/deep/d.jpg', 'day_2/c.jpg']
    assert relatives(expand(tree, recursive=True)) == [*TOP, 'Ünï cödé 写真.jpg', *below]


def test_file_that_is_named(tree: Path):
    (item,) = expand(tree / '.hidden.jpg')
    assert item == Listed(str(tree / '.hidden.jpg'), '.hidden.jpg')


def test_order_is_that_of_the_inputs_and_nothing_comes_twice(
    tree: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tree)
    items = expand('frame_2.jpg', './frame_2.jpg', tree / 'frame_2.jpg', 'day_1', '.', 'day_2')
    names = [os.path.relpath(item.path) for item in items]
    assert names[:3] == ['frame_2.jpg', 'day_1/c.jpg', 'a.png']
    assert names[-1] == 'day_2/c.jpg'
    assert len(set(names)) == len(names)
    assert not items[0].found


def test_pattern(tree: Path):
    assert relatives(expand(tree / 'frame_*.jpg')) == ['frame_1.jpg', 'frame_2.jpg', 'frame_10.jpg']
    assert relatives(expand(tree / '*' / 'c.jpg')) == ['day_1/c.jpg', 'day_2/c.jpg']
    assert relatives(expand(tree / 'day_?')) == ['day_1/c.jpg', 'day_2/c.jpg']
    everything = relatives(expand(tree / '**'))
    assert 'day_1/deep/d.jpg' in everything and 'a.png' in everything
    assert not any(part.startswith('.') for name in everything for part in name.split('/'))


def test_what_exists_is_no_pattern(tree: Path):
    assert relatives(expand(tree / 'odd[1].jpg')) == ['odd[1].jpg']


def test_problems_do_not_stop_the_others(tree: Path, tmp_path: Path):
    (tmp_path / 'nothing').mkdir()
    (tmp_path / 'broken.jpg').symlink_to('gone.jpg')
    inputs = [
        *(tmp_path / 'missing.jpg', tmp_path / '*.tif', tmp_path / 'nothing', 'file:///etc/*'),
        *('webcam:front', tmp_path / 'broken.jpg', tree / 'a.png' / 'b.jpg', '', tree / 'a.png'),
    ]
    items = expand(*inputs)
    problems = [item.problem for item in items]
    assert [item.path for item in items] == [str(given) for given in inputs]
    assert problems[0] == 'does not exist'
    assert 'fits no file' in problems[1]
    assert 'without files' in problems[2] and '--recursive' in problems[2]
    assert 'file:// is no address' in problems[3]
    assert 'webcam:0' in problems[4]
    assert 'link' in problems[5]
    assert problems[6:] == ['does not exist', 'does not exist', None]


def test_folders_that_may_not_be_read(tree: Path, monkeypatch: pytest.MonkeyPatch):
    scandir = os.scandir

    def refuse(path: str):
        if Path(path).name == 'day_1':
            raise PermissionError(errno.EACCES, 'Permission denied', path)
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refuse)
    assert 'Permission denied' in problem_of(expand(tree / 'day_1'))
    items = {item.relative: item for item in expand(tree, recursive=True)}
    assert 'Permission denied' in items.pop('day_1').problem
    assert 'day_2/c.jpg' in items
    assert not any(item.problem for item in items.values())


def test_links_in_circles(tree: Path):
    (tree / 'day_1' / 'up').symlink_to(tree)
    (tree / 'day_1' / 'up_too').symlink_to(tree)
    (tree / 'self.jpg').symlink_to('self.jpg')
    (tree / 'again.jpg').symlink_to('a.png')
    for given in (tree, tree / '**'):
        names = relatives(expand(given, recursive=True))
        assert names.count('day_1/c.jpg') == 1
        assert len(names) < 20
        # Two names for one picture are two pictures, each with its result.
        assert 'again.jpg' in names and 'a.png' in names


def test_list_on_standard_input(tree: Path):
    lines = f'{tree / "frame_2.jpg"}\r\n\n{tree / "Ünï cödé 写真.jpg"}\n{tree / "none.jpg"}'
    items = expand(tree / 'a.png', '-', stdin=lines)
    assert [item.relative for item in items] == [
        *('a.png', 'frame_2.jpg', 'Ünï cödé 写真.jpg', 'none.jpg')
    ]
    assert [item.problem for item in items] == [None, None, None, 'does not exist']
    assert 'no paths' in problem_of(expand('-', stdin='\n'))


def test_list_that_is_no_text():
    stdin = io.TextIOWrapper(io.BytesIO(b'\xff\xfe\x00'), encoding='utf-8')
    assert 'no list of paths' in problem_of(expand_inputs(['-'], False, stdin))


@pytest.mark.parametrize(
    'address', ['webcam:0', 'rtsp://camera/1', 'RTMP://h/app', 'udp://239.0.0.1:1234?ttl=1*']
)
def test_live_addresses_are_not_opened(address: str):
    assert expand(address, address) == [Listed(address, address)]
    source = look_at(address)
    assert (source.kind, source.file) == ('live', address)


def test_pictures_and_animations():
    picture = look_at(str(PHOTOGRAPHS / 'chelsea.png'))
    assert (picture.kind, picture.size) == ('picture', (300, 451))
    assert look_at(str(PHOTOGRAPHS / 'no_time_for_that_tiny.gif')).kind == 'animation'
    assert look_at(str(PHOTOGRAPHS / 'multipage.tif')).kind == 'picture'


@pytest.mark.parametrize(
    ('name', 'codec', 'format'),
    [
        *[('a.mp4', 'mpeg4', 'mp4'), ('a.webm', 'libvpx', 'webm'), ('a.avi', 'mpeg4', 'avi')],
        *[('a.jpg', 'mpeg4', 'mp4'), ('a.jpg', 'mpeg4', 'avi'), ('a.png', 'mpeg2video', 'mpegts')],
        *[('no ending', 'mpeg4', 'matroska'), ('a.mjpeg', 'mjpeg', 'mjpeg')],
        *[('a:b 写真.mp4', 'mpeg4', 'mp4'), ('a.txt', 'mpeg2video', 'vob')],
    ],
)
def test_videos_by_what_is_in_them(tmp_path: Path, name: str, codec: str, format: str):
    write_video(tmp_path / name, codec, format)
    source = look_at(str(tmp_path / name))
    assert (source.kind, source.file) == ('video', str(tmp_path / name))


def test_picture_that_is_named_like_a_video(tmp_path: Path):
    path = tmp_path / 'a.mp4'
    path.write_bytes((PHOTOGRAPHS / 'rocket.jpg').read_bytes())
    assert look_at(str(path)).kind == 'picture'


@pytest.mark.parametrize(
    ('content', 'reason'),
    [
        *[(b'', 'is empty'), (b'Hello\n' * 50, 'is a text file'), (b'BMW is a make\n', 'text')],
        *[('é'.encode() * 5000, 'is a text file'), (bytes(9000), 'neither a picture nor a video')],
        (bytes(range(256)) * 40, 'neither a picture nor a video'),
        (b'#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n', 'is a text file'),
    ],
)
def test_what_is_nothing_to_see(tmp_path: Path, content: bytes, reason: str):
    """Left out of a folder in silence when its name promises nothing, an error when it does."""
    other, promising = tmp_path / 'other.dat', tmp_path / 'video.mp4'
    other.write_bytes(content)
    promising.write_bytes(content)
    with pytest.raises(NotMedia, match=reason):
        look_at(str(other))
    with pytest.raises(InputError) as caught:
        look_at(str(promising))
    assert not isinstance(caught.value, NotMedia)


def test_sound_is_no_video(tmp_path: Path):
    write_sound(tmp_path / 'a.m4a')
    with pytest.raises(NotMedia, match='only sound'):
        look_at(str(tmp_path / 'a.m4a'))


def test_video_that_is_cut_short(tmp_path: Path):
    path = tmp_path / 'a.mp4'
    write_video(path)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(InputError, match='cut short'):
        look_at(str(path))


def test_damaged_picture_is_an_error_under_any_name(tmp_path: Path):
    path = tmp_path / 'other.dat'
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + bytes(50))
    with pytest.raises(InputError, match='PNG') as caught:
        look_at(str(path))
    assert not isinstance(caught.value, NotMedia)


def test_what_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    os.mkfifo(tmp_path / 'pipe.jpg')
    with pytest.raises(InputError, match='pipe'):
        look_at(str(tmp_path / 'pipe.jpg'))
    with pytest.raises(InputError, match='is a folder'):
        look_at(str(tmp_path))
    with pytest.raises(InputError, match='does not exist'):
        look_at(str(tmp_path / 'none.jpg'))

    def refuse(path: str) -> None:
        raise PermissionError(errno.EACCES, 'Permission denied', path)

    monkeypatch.setattr(os, 'stat', refuse)
    with pytest.raises(InputError, match='permission denied'):
        look_at('secret.jpg')


def test_names_of_media():
    assert looks_like_media_name('a/b.JPG') and looks_like_media_name('c.webp')
    assert looks_like_media_name('d.mkv')
    assert not looks_like_media_name('notes.txt') and not looks_like_media_name('jpg')


class Handler(BaseHTTPRequestHandler):
    """A web server with every kind of answer."""

    def __init__(self, folder: Path, *arguments):
        self.folder = folder
        super().__init__(*arguments)

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.partition('?')[0].strip('/').replace('%20', '_')
        getattr(self, f'answer_{name.partition(".")[0]}')(name)

    def send(self, content_type: str, body: bytes, length: int | None = None) -> None:
        self.send_response(200)
        self.send_header('Content-Type', content_type)
        self.send_header('Content-Length', str(length or len(body)))
        self.end_headers()
        self.wfile.write(body)

    def answer_picture(self, _: str) -> None:
        self.send('image/png', (PHOTOGRAPHS / 'chelsea.png').read_bytes())

    def answer_a_b(self, _: str) -> None:
        self.answer_picture(_)

    def answer_untold(self, _: str) -> None:
        self.send('application/octet-stream', (PHOTOGRAPHS / 'chelsea.png').read_bytes())

    def answer_animation(self, _: str) -> None:
        self.send('image/gif', (PHOTOGRAPHS / 'no_time_for_that_tiny.gif').read_bytes())

    def answer_video(self, name: str) -> None:
        self.send('video/mp4', (self.folder / name).read_bytes())

    def answer_page(self, _: str) -> None:
        self.send('text/html; charset=utf-8', b'<html></html>')

    def answer_live(self, _: str) -> None:
        self.send('multipart/x-mixed-replace; boundary=frame', b'--frame\r\n')

    def answer_missing(self, _: str) -> None:
        self.send_error(404)

    def answer_elsewhere(self, _: str) -> None:
        self.send_response(302)
        self.send_header('Location', 'file:///etc/passwd')
        self.end_headers()

    def answer_huge(self, _: str) -> None:
        self.send('image/jpeg', b'\xff\xd8\xff', length=2**40)

    def answer_endless(self, _: str) -> None:
        self.send_response(200)
        self.send_header('Content-Type', 'image/jpeg')
        self.end_headers()
        while True:
            try:
                self.wfile.write(bytes(2**16))
            except OSError:
                return

    def answer_broken(self, _: str) -> None:
        self.send('image/png', (PHOTOGRAPHS / 'chelsea.png').read_bytes()[:1000], length=5000)

    def answer_silent(self, _: str) -> None:
        self.server.has_closed.wait()

    def answer_dripping(self, _: str) -> None:
        self.send('image/png', b'', length=100)
        for _ in range(20):
            try:
                self.wfile.write(b'.')
            except OSError:
                return
            time.sleep(0.05)

    def answer_secret(self, _: str) -> None:
        if self.headers['Authorization'] == f'Basic {base64.b64encode(b"me:p@ss").decode()}':
            self.answer_picture(_)
        else:
            self.send_error(401)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a web server on this computer."""
    monkeypatch.setenv('no_proxy', '*')
    httpd = ThreadingHTTPServer(('127.0.0.1', 0), partial(Handler, tmp_path))
    httpd.daemon_threads = True
    httpd.block_on_close = False
    httpd.has_closed = threading.Event()
    thread = threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f'http://127.0.0.1:{httpd.server_port}'
    httpd.has_closed.set()
    httpd.shutdown()
    httpd.server_close()


@pytest.mark.parametrize('name', ['picture.png', 'picture', 'untold', 'a b.png?size=*'])
def test_picture_of_a_server(server: str, name: str):
    address = f'{server}/{name}'
    assert expand(address) == [Listed(address, address)]
    source = look_at(address)
    assert (source.kind, source.size) == ('picture', (300, 451))
    np.testing.assert_array_equal(
        read_picture(source.file), read_picture(PHOTOGRAPHS / 'chelsea.png')
    )


def test_other_things_of_a_server(server: str, tmp_path: Path):
    write_video(tmp_path / 'video.mp4')
    assert look_at(f'{server}/animation').kind == 'animation'
    assert look_at(f'{server}/live').kind == 'live'
    source = look_at(f'{server}/video.mp4')
    assert (source.kind, source.file) == ('video', f'{server}/video.mp4')


@pytest.mark.parametrize(
    ('name', 'reason'),
    [
        *[('missing', 'answers 404'), ('page', 'is a web page'), ('huge', 'too large')],
        *[('broken', 'is cut short: the server sent 1000 of 5000'), ('elsewhere', 'file:')],
    ],
)
def test_servers_that_do_not_give_a_picture(server: str, name: str, reason: str):
    with pytest.raises(InputError, match=reason):
        look_at(f'{server}/{name}')


def test_server_that_does_not_exist(server: str):
    with pytest.raises(InputError, match='cannot be reached'):
        look_at('http://127.0.0.1:1/picture.png')


def test_server_that_does_not_stop(server: str, monkeypatch: pytest.MonkeyPatch):
    with (
        pytest.raises(InputError, match='too large'),
        open_address(f'{server}/endless', limit=10**6) as answer,
    ):
        answer.download()


def test_servers_that_take_their_time(server: str):
    with (
        pytest.raises(InputError, match='silent'),
        open_address(f'{server}/silent', silence_timeout=0.1),
    ):
        pass
    with (
        pytest.raises(InputError, match='too slowly'),
        open_address(f'{server}/dripping', download_timeout=0.2) as answer,
    ):
        answer.download()


def test_password_in_an_address(server: str):
    with_password = server.replace('//', '//me:p%40ss@')
    assert look_at(f'{with_password}/secret').kind == 'picture'
    with pytest.raises(InputError, match='answers 401'):
        look_at(f'{server}/secret')


def test_downloads_have_limits():
    assert 2**20 < download.MAX_DOWNLOAD < 2**31


def test_found_files_can_be_looked_at(tmp_path: Path):
    Image.new('RGB', (8, 6)).save(tmp_path / '1.png')
    (tmp_path / 'notes.txt').write_text('left out')
    picture, notes = expand(tmp_path)
    assert look_at(picture.path).size == (6, 8)
    with pytest.raises(NotMedia):
        look_at(notes.path)
