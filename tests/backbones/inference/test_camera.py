"""Live sources: a camera that a test controls, and real streams over loopback."""

import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from rtsp_server import RtspServer

from backbones.errors import ConfigError, InputError
from backbones.inference.camera import CameraReader, StreamClock
from backbones.inference.window import Window, fit


class Camera:
    """Stands in for cv2.VideoCapture; gives a picture for each one that the test releases."""

    def __init__(self) -> None:
        self.ready = threading.Semaphore(0)
        self.released = False
        self.unplugged = False

    def __call__(self, number: int) -> 'Camera':
        return self

    def isOpened(self) -> bool:
        return True

    def read(self) -> tuple[bool, np.ndarray | None]:
        # Waits in steps, so that no thread is left behind when a test has ended.
        while not self.ready.acquire(timeout=0.02):
            if self.unplugged:
                return False, None
        return True, np.zeros((6, 8, 3), np.uint8)

    def release(self) -> None:
        self.released = True


@pytest.fixture
def camera(monkeypatch: pytest.MonkeyPatch) -> Iterator[Camera]:
    camera = Camera()
    camera.ready.release()
    monkeypatch.setattr(cv2, 'VideoCapture', camera)
    yield camera
    camera.unplugged = True


# Seconds that only what hangs takes.
PATIENCE = 60


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here goes through a proxy that the machine may have."""
    monkeypatch.setenv('no_proxy', '*')


def wait_until(condition) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, 'what the test waits for has not happened'
        time.sleep(0.005)


class TestPolicies:
    def test_latest_gives_the_newest_and_counts_the_dropped(self, camera: Camera) -> None:
        with CameraReader('webcam:0') as reader:
            camera.ready.release(5)
            wait_until(lambda: reader.captured == 6)
            assert next(reader).index == 5
            assert reader.dropped == 5
            camera.ready.release()
            assert next(reader).index == 6
            assert (reader.captured, reader.dropped) == (7, 5)

    def test_all_waits_and_drops_nothing(self, camera: Camera) -> None:
        camera.ready.release(29)
        with CameraReader('webcam:0', policy='all', queue_size=3) as reader:
            for index in range(30):
                wait_until(lambda: reader.captured >= min(30, index + 4))  # noqa: B023
                assert reader.captured <= index + 4  # three wait, one is in the thread's hand
                assert next(reader).index == index
            assert reader.dropped == 0

    def test_unknown_policy(self) -> None:
        with pytest.raises(ValueError, match="'newest'"):
            CameraReader('webcam:0', policy='newest')


class TestClosing:
    def test_while_the_consumer_waits(self, camera: Camera) -> None:
        reader = CameraReader('webcam:0')
        seen = []
        consumer = threading.Thread(target=lambda: seen.extend(reader))
        consumer.start()
        wait_until(lambda: seen)
        reader.close()
        consumer.join(PATIENCE)
        assert not consumer.is_alive()
        assert [frame.index for frame in seen] == [0]

    def test_while_the_queue_is_full(self, camera: Camera) -> None:
        camera.ready.release(9)
        reader = CameraReader('webcam:0', policy='all', queue_size=2)
        wait_until(lambda: reader.captured == 3)
        reader.close()
        wait_until(lambda: camera.released)
        assert list(reader) == []

    def test_while_a_server_is_silent(self) -> None:
        with (
            RtspServer('tcp', num_frames=10, hang_up=False) as server,
            CameraReader(server.url, policy='all', timeout=PATIENCE) as reader,
        ):
            assert next(reader).index == 0
            closer = threading.Timer(1.0, reader.close)
            closer.start()
            assert len(list(reader)) < 10  # an error, were it not closed
            closer.join()

    def test_twice(self, camera: Camera) -> None:
        reader = CameraReader('webcam:0')
        reader.close()
        reader.close()
        assert list(reader) == []


class TestCamera:
    def test_gives_what_it_sees(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / 'camera.avi'
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'MJPG'), 25, (64, 48))
        for level in range(0, 200, 20):
            writer.write(np.full((48, 64, 3), (level, 100, 30), np.uint8))
        writer.release()
        open_video = cv2.VideoCapture
        monkeypatch.setattr(cv2, 'VideoCapture', lambda number: open_video(str(path)))

        frames = []
        with (
            CameraReader('webcam:0', policy='all') as reader,
            pytest.raises(InputError, match=r'camera 0 gives no more pictures'),
        ):
            for frame in reader:
                frames.append(frame)
        assert (reader.width, reader.height) == (64, 48)
        assert [frame.index for frame in frames] == list(range(10))
        for frame in frames:
            colour = frame.picture.reshape(-1, 3).mean(axis=0)
            assert np.allclose(colour, (20 * frame.index, 100, 30), atol=6)
        assert np.all(np.diff([frame.time for frame in frames]) > 0)
        assert reader.capture_rate > 0

    def test_missing(self, capfd: pytest.CaptureFixture) -> None:
        with pytest.raises(InputError, match='there is no camera 63'):
            CameraReader('webcam:63')
        assert capfd.readouterr().err == ''

    def test_not_a_number(self) -> None:
        with pytest.raises(InputError, match='webcam:0'):
            CameraReader('webcam:front')

    def test_in_use_by_another_program(self, camera: Camera) -> None:
        camera.ready.acquire()
        camera.unplugged = True
        with pytest.raises(InputError, match='another program'):
            CameraReader('webcam:0')
        assert camera.released

    def test_freezes(self, camera: Camera) -> None:
        with CameraReader('webcam:0') as reader:
            assert next(reader).index == 0
            reader.timeout = 0.3
            with pytest.raises(InputError, match=r'camera 0 gave no picture for 0\.3 s'):
                next(reader)
            assert list(reader) == []


@pytest.mark.parametrize('transport', ['tcp', 'udp'])
def test_rtsp(transport: str) -> None:
    with (
        RtspServer(transport, num_frames=20) as server,
        CameraReader(server.url, policy='all', timeout=PATIENCE) as reader,
    ):
        frames = list(reader)
    assert [frame.index for frame in frames] == list(range(20))
    for frame in frames:
        assert frame.picture.shape == (48, 64, 3)
        assert abs(frame.picture.mean() - (20 + 4 * frame.index)) < 4
    # By the stream's stamps: after the first, which has none, to the millisecond.
    steps = np.diff([frame.time for frame in frames])
    assert np.allclose(steps[1:], 0.04, atol=0.001)


@pytest.mark.parametrize('first', ['consumer', 'ffmpeg'])
def test_rtsp_that_falls_silent(first: str) -> None:
    """Whichever of the two threads is the first to give up."""
    with (
        RtspServer('tcp', num_frames=10, hang_up=False) as server,
        CameraReader(server.url, policy='all', timeout=5, queue_size=20) as reader,
    ):
        assert next(reader).index == 0
        if first == 'ffmpeg':
            reader._thread.join()
        else:
            reader.timeout = 0.5
        says = rf'127\.0\.0\.1:\d+ gave no picture for {reader.timeout:g} s'
        with pytest.raises(InputError, match=says):
            list(reader)


def test_udp() -> None:
    address = find_udp_address()
    stopped = threading.Event()
    sender = threading.Thread(target=send_udp, args=(address, stopped))
    sender.start()
    try:
        with CameraReader(address, timeout=PATIENCE) as reader:
            first, second = next(reader), next(reader)
    finally:
        stopped.set()
        sender.join()
    assert first.picture.shape == (48, 64, 3)
    assert second.time > first.time


def find_udp_address() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(('127.0.0.1', 0))
        return f'udp://127.0.0.1:{free.getsockname()[1]}'


def send_udp(address: str, stopped: threading.Event) -> None:
    with av.open(f'{address}?pkt_size=1316', 'w', format='mpegts') as container:
        stream = container.add_stream('mpeg2video', rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, 'yuv420p'
        pts = 0
        while not stopped.wait(0.02):
            frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format='bgr24')
            frame.pts, frame.time_base = pts, Fraction(1, 25)
            # Nobody may be listening yet.
            try:
                container.mux(stream.encode(frame))
            except ConnectionRefusedError:
                continue
            pts += 1


NUM_JPEGS = 12


class Pages(BaseHTTPRequestHandler):
    """An http camera, and what else may stand behind an address."""

    movie = b''

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        match self.path:
            case '/private':
                self.send_error(401)
            case '/page':
                self.send(b'<html>A page, not a video.</html>', 'text/html')
            case '/movie.mp4':
                self.send(self.movie, 'video/mp4')
            case '/camera' | '/broken':
                self.send_pictures()
            case _:
                self.send_error(404)
        if self.path == '/broken':  # ends with a reset, as a machine does that is switched off
            linger = b'\1\0\0\0' + b'\0\0\0\0'
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()

    def send(self, content: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header('Content-Type', kind)
        self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def send_pictures(self) -> None:
        self.send_response(200)
        self.send_header('Content-Type', 'multipart/x-mixed-replace; boundary=next')
        self.end_headers()
        for index in range(NUM_JPEGS):
            picture = np.full((48, 64, 3), (10 * index, 60, 200), np.uint8)
            jpeg = cv2.imencode('.jpg', picture)[1].tobytes()
            head = f'--next\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n'
            self.wfile.write(head.encode() + jpeg + b'\r\n')
            time.sleep(0.02)


@pytest.fixture(scope='module')
def site() -> Iterator[str]:
    server = ThreadingHTTPServer(('127.0.0.1', 0), Pages)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    server.server_close()


class TestHttp:
    def test_mjpeg(self, site: str) -> None:
        with CameraReader(f'{site}/camera', policy='all') as reader:
            frames = list(reader)
        assert [frame.index for frame in frames] == list(range(NUM_JPEGS))
        for frame in frames:
            colour = frame.picture.reshape(-1, 3).mean(axis=0)
            assert np.allclose(colour, (10 * frame.index, 60, 200), atol=4)

    def test_a_recording_is_read_whole(
        self, site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / 'movie.mp4'
        with av.open(str(path), 'w') as container:
            stream = container.add_stream('mpeg4', rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 48, 'yuv420p'
            for _ in range(25):
                picture = np.zeros((48, 64, 3), np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format='bgr24')))
            container.mux(stream.encode())
        monkeypatch.setattr(Pages, 'movie', path.read_bytes())
        with CameraReader(f'{site}/movie.mp4', queue_size=2) as reader:
            frames = list(reader)
        assert np.allclose([frame.time for frame in frames], np.arange(25) / 10)

    @pytest.mark.parametrize(
        ('page', 'says'),
        [
            ('missing', 'no stream of this path'),
            ('private', 'http://NAME:PASSWORD@HOST/PATH'),
            ('page', 'not a video stream'),
        ],
    )
    def test_no_stream(self, site: str, page: str, says: str) -> None:
        with pytest.raises(InputError, match=says):
            CameraReader(f'{site}/{page}')

    def test_connection_lost(self, site: str) -> None:
        frames = []
        with (
            CameraReader(f'{site}/broken', policy='all') as reader,
            pytest.raises(InputError, match=r'connection to the server at .* was lost'),
        ):
            for frame in reader:
                frames.append(frame)
        assert len(frames) >= NUM_JPEGS - 1


class TestNoServer:
    @pytest.mark.parametrize('scheme', ['rtsp', 'rtmp', 'http'])
    def test_refuses(self, scheme: str) -> None:
        with socket.socket() as taken:  # bound, but nobody listens
            taken.bind(('127.0.0.1', 0))
            port = taken.getsockname()[1]
            with pytest.raises(InputError, match=f'127.0.0.1:{port} refuses') as error:
                CameraReader(f'{scheme}://me:secret@127.0.0.1:{port}/live/1')
        assert 'secret' not in str(error.value)

    @pytest.mark.parametrize('scheme', ['rtsp', 'rtmp', 'http'])
    def test_accepts_and_never_answers(self, scheme: str) -> None:
        with socket.create_server(('127.0.0.1', 0)) as silent:
            port = silent.getsockname()[1]
            with pytest.raises(InputError, match=r'did not answer with a picture within 0\.3 s'):
                CameraReader(f'{scheme}://127.0.0.1:{port}/live/1', timeout=0.3)

    @pytest.mark.parametrize('scheme', ['rtsp', 'rtsps', 'rtmp', 'http'])
    def test_ffmpegs_thread_is_the_first_to_give_up(
        self, scheme: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wait = CameraReader._wait_for_first

        def wait_for_thread_first(reader: CameraReader) -> None:
            reader._thread.join()
            wait(reader)

        monkeypatch.setattr(CameraReader, '_wait_for_first', wait_for_thread_first)
        self.test_accepts_and_never_answers(scheme)

    def test_nobody_sends(self) -> None:
        with pytest.raises(InputError, match=r'the sender to 127\.0\.0\.1:\d+ did not answer'):
            CameraReader(find_udp_address(), timeout=0.3)

    @pytest.mark.parametrize(
        ('address', 'says'),
        [
            ('file:///movie.mp4', 'rtsp, rtsps, rtmp'),
            ('http://', 'http://HOST/PATH'),
            ('rtsp:camera', 'neither webcam:N nor an address'),
            ('RTSP://127.0.0.1:1/live', 'refuses the connection'),
            ('rtsp://127.0.0.1:99999/live', 'not a valid address'),
        ],
    )
    def test_addresses_that_cannot_work(self, address: str, says: str) -> None:
        with pytest.raises(InputError, match=says):
            CameraReader(address)


class TestStreamClock:
    def test_stamps_count_even_when_pictures_come_in_a_burst(self) -> None:
        clock = StreamClock()
        assert [clock(stamp, 5.0) for stamp in (7.0, 7.5, 9.0)] == [0.0, 0.5, 2.0]

    @pytest.mark.parametrize('stamp', [None, 3.0, 7.0, 5000.0])
    def test_else_the_time_that_it_took(self, stamp: float | None) -> None:
        clock = StreamClock()
        times = [clock(7.0, 50.0), clock(stamp, 50.25)]
        times.append(clock(None if stamp is None else stamp + 0.5, 50.5))
        assert times == [0.0, 0.25, 0.5 if stamp is None else 0.75]


# In a process of its own: OpenCV ends the one in which its screen goes away.
USE_WINDOW = """
import cv2, numpy as np
from backbones.inference.window import Window

picture = np.zeros((1000, 2000, 3), np.uint8)
window = Window('closed by the user')
assert window.show(picture) and window.show(picture)
assert cv2.getWindowImageRect(window.title)[2:] == (1280, 640)
cv2.destroyWindow(window.title)
assert not window.show(picture)
assert not window.show(picture)
window.close()

window = Window('closed by a key')
assert window.show(picture)
wait_key = cv2.waitKey
cv2.waitKey = lambda delay: wait_key(delay) and ord('q')
assert not window.show(picture)
print('done')
"""


class TestWindow:
    @pytest.mark.skipif(shutil.which('Xvfb') is None, reason='needs Xvfb, a screen in memory')
    def test_on_a_screen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        screen = subprocess.Popen(
            ['Xvfb', '-displayfd', '1', '-screen', '0', '1600x900x24'],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            monkeypatch.setenv('DISPLAY', f':{screen.stdout.readline().strip()}')
            done = subprocess.run(
                [sys.executable, '-c', USE_WINDOW], capture_output=True, text=True, timeout=300
            )
        finally:
            screen.terminate()
            screen.communicate()
        assert done.stdout == 'done\n', done.stderr

    def test_without_a_screen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr('sys.platform', 'linux')
        monkeypatch.setattr(cv2, 'getBuildInformation', lambda: '  GUI:             QT5\n')
        monkeypatch.delenv('DISPLAY', raising=False)
        monkeypatch.delenv('WAYLAND_DISPLAY', raising=False)
        with pytest.raises(ConfigError, match=r'no screen .* leave out --show'):
            Window('test')

    def test_headless_opencv(self, monkeypatch: pytest.MonkeyPatch) -> None:
        information = '  GUI:                           NONE\n'
        monkeypatch.setattr(cv2, 'getBuildInformation', lambda: information)
        with pytest.raises(ConfigError, match='pip uninstall opencv-python-headless'):
            Window('test')

    def test_screen_that_is_gone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr('sys.platform', 'linux')
        monkeypatch.setattr(cv2, 'getBuildInformation', lambda: '  GUI:             QT5\n')
        monkeypatch.setenv('DISPLAY', 'localhost:99')
        with pytest.raises(ConfigError, match='the screen localhost:99 cannot be opened'):
            Window('test')

    @pytest.mark.parametrize(
        ('size', 'shown'),
        [
            ((480, 640), (480, 640)),
            ((1080, 1920), (720, 1280)),
            ((1920, 1080), (720, 405)),
            ((5000, 2), (720, 1)),
        ],
    )
    def test_fits_the_screen(self, size: tuple[int, int], shown: tuple[int, int]) -> None:
        assert fit(np.zeros((*size, 3), np.uint8), 1280, 720).shape == (*shown, 3)
