"""Live sources: a camera that a test controls, and real streams over loopback."""

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, nullcontext
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from rtsp_server import RtspServer
from web import Handler, serve

from backbones.errors import ConfigError, InputError
from backbones.inference import camera, run
from backbones.inference.camera import QUEUE_SIZE, CameraReader, StreamClock
from backbones.inference.inputs import Input
from backbones.inference.reading import Clip, Frame, read_inputs

# Seconds that only what hangs takes.
PATIENCE = 60


class Camera:
    """Stands in for cv2.VideoCapture; gives a frame for each one that the test allows."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.num_asked = 0
        self.num_allowed = 1
        self.is_unplugged = self.is_released = False

    def __call__(self, number: int) -> 'Camera':
        return self

    def isOpened(self) -> bool:
        return True

    def read(self) -> tuple[bool, np.ndarray | None]:
        with self.changed:
            self.num_asked += 1
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.num_asked <= self.num_allowed or self.is_unplugged)
            is_given = self.num_asked <= self.num_allowed
        return is_given, np.zeros((6, 8, 3), np.uint8) if is_given else None

    def release(self) -> None:
        with self.changed:
            self.is_released = True
            self.changed.notify_all()

    def allow(self, count: int) -> None:
        """Let it give more frames."""
        with self.changed:
            self.num_allowed += count
            self.changed.notify_all()

    def unplug(self) -> None:
        with self.changed:
            self.is_unplugged = True
            self.changed.notify_all()

    def wait_until(self, condition) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, PATIENCE)


@pytest.fixture
def webcam(monkeypatch: pytest.MonkeyPatch) -> Iterator[Camera]:
    webcam = Camera()
    monkeypatch.setattr(cv2, 'VideoCapture', webcam)
    monkeypatch.setattr(camera, 'CLOSE_TIMEOUT', 0.05)
    yield webcam
    webcam.unplug()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here goes through a proxy that the machine may have."""
    monkeypatch.setenv('no_proxy', '*')


def test_latest_gives_the_newest_and_counts_the_dropped(webcam: Camera):
    with closing(CameraReader('webcam:0')) as reader:
        for more, newest in ((5, 5), (1, 6), (3, 9)):
            webcam.allow(more)
            # Who asks for another frame has handed on the one before.
            webcam.wait_until(lambda: webcam.num_asked > webcam.num_allowed)
            assert next(reader).index == newest
        assert (reader.num_captured, reader.dropped) == (10, 7)


def test_all_waits_and_drops_nothing(webcam: Camera):
    webcam.allow(29)
    with closing(CameraReader('webcam:0', policy='all')) as reader:
        for index in range(30):
            frame = next(reader)
            assert frame.index == index
            # Some wait, one is in the thread's hand, one was just taken.
            assert webcam.num_asked <= index + QUEUE_SIZE + 2
        assert reader.dropped == 0


def test_closing_while_the_queue_is_full(webcam: Camera):
    webcam.allow(29)
    reader = CameraReader('webcam:0', policy='all')
    webcam.wait_until(lambda: webcam.num_asked == QUEUE_SIZE + 1)
    reader.close()
    webcam.wait_until(lambda: webcam.is_released)
    assert list(reader) == []


def test_camera_that_is_unplugged(webcam: Camera):
    with closing(CameraReader('webcam:0')) as reader:
        assert next(reader).index == 0
        webcam.unplug()
        with pytest.raises(InputError, match='unplugged'):
            next(reader)
    assert webcam.is_released


def test_camera_that_freezes(webcam: Camera):
    with closing(CameraReader('webcam:0')) as reader:
        assert next(reader).index == 0
        reader.timeout = 0.05
        with pytest.raises(InputError, match=r'no frame for 0\.05 s'):
            next(reader)
        assert list(reader) == []


def test_camera_that_is_missing():
    with pytest.raises(InputError, match='does not exist'):
        CameraReader('webcam:63')


@pytest.mark.parametrize(
    ('stamps', 'arrivals', 'times'),
    [
        # Stamps count even when frames come in a burst.
        ([7.0, 7.5, 9.0], [5.0, 5.0, 5.0], [0, 0.5, 2]),
        # Without, after a clock that was set and after a leap, the time that it took.
        ([None, None, None], [50, 50.25, 50.5], [0, 0.25, 0.5]),
        ([7.0, 3.0, 3.5], [50, 50.25, 50.5], [0, 0.25, 0.75]),
        ([7.0, 5000.0, 5000.5], [50, 50.25, 50.5], [0, 0.25, 0.75]),
    ],
)
def test_times_of_frames(stamps: list, arrivals: list[float], times: list[float]):
    assert list(map(StreamClock(), stamps, arrivals)) == times


@pytest.mark.parametrize(('connections', 'comes_back'), [([3, 0, 0, 2], True), ([3], False)])
def test_a_lost_connection_is_opened_again(
    monkeypatch: pytest.MonkeyPatch, connections: list[int], comes_back: bool
):
    """How many frames each connection gives before it breaks off; the last one ends well."""
    opened = []

    def read_stream(url: str, timeout: float) -> Iterator:
        number = len(opened)
        opened.append(url)
        for _ in range(connections[number] if number < len(connections) else 0):
            yield None, np.zeros((6, 8, 3), np.uint8)
        if not comes_back or number < len(connections) - 1:
            raise InputError('cannot be read')

    monkeypatch.setattr(camera, 'read_stream', read_stream)
    monkeypatch.setattr(camera, 'RETRY_DELAYS', (0, 0, 0))
    indices = []
    end = nullcontext() if comes_back else pytest.raises(InputError, match='cannot be read')
    with closing(CameraReader('rtsp://host/1', policy='all')) as reader, end:
        for frame in reader:
            indices.append(frame.index)
    assert indices == list(range(sum(connections)))
    assert len(opened) == 4


def test_frames_of_another_size_after_a_new_connection(monkeypatch: pytest.MonkeyPatch):
    """They go into one video."""
    sizes = [(48, 64), (24, 32)]
    frames = [(None, np.full((*size, 3), 9, np.uint8)) for size in sizes]
    monkeypatch.setattr(camera, 'read_stream', lambda *_: (frame for frame in frames))
    items = read_inputs([Input('rtsp://host/1')], Clip(policy='all'), threading.Event())
    shapes = [item.image.shape for item in items if isinstance(item, Frame)]
    assert shapes == [(48, 64, 3)] * 2


def test_a_part_of_a_live_source(monkeypatch: pytest.MonkeyPatch):
    frames = [(float(second), np.full((6, 8, 3), second, np.uint8)) for second in range(8)]
    monkeypatch.setattr(camera, 'read_stream', lambda *_: iter(frames))
    clip = Clip(every=2, start=1.0, end=5.0, policy='all')
    items = read_inputs([Input('rtsp://host/1')], clip, threading.Event())
    assert [item.image[0, 0, 0] for item in items if isinstance(item, Frame)] == [2, 4]


def test_a_camera_can_be_stopped_before_the_start(monkeypatch: pytest.MonkeyPatch):
    stop = threading.Event()

    def read_stream(url: str, timeout: float) -> Iterator:
        for second in range(PATIENCE):
            if second == 3:
                stop.set()
            yield float(second), np.zeros((6, 8, 3), np.uint8)

    monkeypatch.setattr(camera, 'read_stream', read_stream)
    clip = Clip(start=3600.0, policy='all')
    stream, closed = read_inputs([Input('rtsp://host/1')], clip, stop)
    assert closed.stream is stream and closed.was_interrupted
    assert stream.live.num_captured < PATIENCE


def test_rtsp():
    with (
        RtspServer(num_frames=20) as server,
        closing(CameraReader(server.url, policy='all', timeout=PATIENCE)) as reader,
    ):
        frames = list(reader)
    assert [frame.index for frame in frames] == list(range(20))
    for frame in frames:
        assert frame.image.shape == (48, 64, 3)
        assert abs(frame.image.mean() - (20 + 4 * frame.index)) < 4
    # By the stream's stamps: after the first, which has none, to the millisecond.
    steps = np.diff([frame.time for frame in frames])
    assert np.allclose(steps[1:], 0.04, atol=0.001)


def test_closing_while_a_server_is_silent():
    with RtspServer(num_frames=10, hang_up=False) as server:
        reader = CameraReader(server.url, policy='all', timeout=PATIENCE)
        assert next(reader).index == 0
        reader.close()
        assert list(reader) == []


def find_udp_url() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(('127.0.0.1', 0))
        return f'udp://127.0.0.1:{free.getsockname()[1]}'


NUM_JPEGS = 12


def send_frames(handler: Handler) -> None:
    """Be an http camera."""
    handler.send_response(200)
    handler.send_header('Content-Type', 'multipart/x-mixed-replace; boundary=next')
    handler.end_headers()
    for index in range(NUM_JPEGS):
        image = np.full((48, 64, 3), (10 * index, 60, 200), np.uint8)
        jpeg = cv2.imencode('.jpg', image)[1].tobytes()
        head = f'--next\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n'
        handler.wfile.write(head.encode() + jpeg + b'\r\n')


@pytest.fixture(scope='module')
def site() -> Iterator[str]:
    """An http camera, and what else may stand behind a URL."""
    page = ('text/html', b'<html>A page, not a video.</html>')
    with serve({'/camera': send_frames, '/page': page, '/private': 401}) as server:
        yield server.url


def test_mjpeg(site: str):
    with closing(CameraReader(f'{site}/camera', policy='all')) as reader:
        frames = list(reader)
    assert [frame.index for frame in frames] == list(range(NUM_JPEGS))
    for frame in frames:
        color = frame.image.reshape(-1, 3).mean(axis=0)
        assert np.allclose(color, (10 * frame.index, 60, 200), atol=4)


@pytest.mark.parametrize(
    ('page', 'says'), [('none', 'URL right'), ('private', 'NAME:PASSWORD'), ('page', 'no video')]
)
def test_pages_without_a_stream(site: str, page: str, says: str):
    with pytest.raises(InputError, match=says):
        next(CameraReader(f'{site}/{page}'))


@pytest.mark.parametrize('scheme', ['rtsp', 'RTSP', 'rtmp', 'http'])
def test_server_that_refuses(scheme: str):
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(('127.0.0.1', 0))
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match='refused') as error:
            next(CameraReader(f'{scheme}://me:secret@127.0.0.1:{port}/live/1'))
    assert 'secret' not in str(error.value)


@pytest.mark.parametrize('scheme', ['rtsp', 'rtsps', 'rtmp', 'http', 'udp'])
def test_server_that_never_answers(scheme: str):
    with socket.create_server(('127.0.0.1', 0)) as silent:
        url = f'{scheme}://127.0.0.1:{silent.getsockname()[1]}/live/1'
        with pytest.raises(InputError, match=r'no frame for 0\.3 s'):
            next(CameraReader(find_udp_url() if scheme == 'udp' else url, timeout=0.3))


# ------------------------------------------------------------------------------------- window


@pytest.mark.parametrize(('key', 'is_visible'), [(ord('q'), True), (-1, False)])
def test_window_is_closed_by_a_key_or_the_user(
    monkeypatch: pytest.MonkeyPatch, key: int, is_visible: bool
):
    state, shown = {'key': -1, 'is_visible': True}, []
    monkeypatch.setattr(run.subprocess, 'run', lambda *_, **__: SimpleNamespace(returncode=0))
    monkeypatch.setattr(cv2, 'namedWindow', lambda *_: None)
    monkeypatch.setattr(cv2, 'destroyWindow', lambda *_: state.update(is_visible=False))
    monkeypatch.setattr(cv2, 'imshow', lambda title, image: shown.append(image.shape))
    monkeypatch.setattr(cv2, 'waitKey', lambda *_: state['key'])
    monkeypatch.setattr(cv2, 'getWindowProperty', lambda *_: float(state['is_visible']))
    screen = run.Window()
    image = np.zeros((1000, 2000, 3), np.uint8)
    assert screen.show(image)
    assert shown == [(640, 1280, 3)]
    state.update(key=key, is_visible=is_visible)
    assert not screen.show(image)
    assert not screen.show(image)
    assert not state['is_visible']


def test_window_without_a_screen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv('WAYLAND_DISPLAY', raising=False)
    monkeypatch.delenv('DISPLAY', raising=False)
    with pytest.raises(ConfigError, match='leave out --show'):
        run.Window()
