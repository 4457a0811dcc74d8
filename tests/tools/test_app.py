"""tools/app.py in a browser: images and videos of two models, and what must not be reachable.

One page for all tests, which run in this order.
"""

import importlib.util
import io
import json
import os
import re
import shutil
import signal
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import pytest
import skimage
from browser import open_browser
from PIL import Image
from tool_process import TOOLS, Started, run_tool
from trained_tiny import write_trained
from videos import numbered_image, truncate, write_video

MODELS = ('fpn', 'mask_rcnn')
MAX_MEGABYTES, MAX_SECONDS = 1, 0.5
# Of the page and of everything that it asks for.
TIMEOUT = 120
# Of the drawings on the page.
LINKS = """() =>
    [...document.querySelectorAll('[data-testid="download-link"]')].map(link => link.href)"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory, shapes) -> Path:
    """Models, and the files to upload."""
    folder = tmp_path_factory.mktemp('app')
    for task in MODELS:
        write_trained(folder, task, shapes)
    shutil.copy(Path(skimage.data_dir) / 'rocket.jpg', folder / 'rocket.jpg')
    shutil.copy(folder / 'rocket.jpg', folder / 'cut.jpg')
    truncate(folder / 'cut.jpg', 0.5)
    write_video(folder / 'short.mp4', 6, audio=True)
    cv2.imwrite(str(folder / 'slow.png'), numbered_image(1, (3000, 2500)))
    (folder / 'large.png').write_bytes(bytes(MAX_MEGABYTES * 2**20 + 1))
    return folder


@pytest.fixture(scope='module')
def url(folder) -> Iterator[str]:
    """The URL of its page."""
    if not importlib.util.find_spec('gradio'):
        pytest.skip('gradio is not installed')
    models = [
        f'{part}{task}.{end}' for task in MODELS for part, end in (('saved_', 'py'), ('', 'pth'))
    ]
    limits = ('--max-megabytes', MAX_MEGABYTES, '--max-seconds', MAX_SECONDS)
    command = [TOOLS / 'app.py', *models, *limits, '--device', 'cpu']
    process = Started(folder, command, TMPDIR=str(folder))
    while process.is_alive() and '\n' not in process.said():
        time.sleep(0.1)
    assert process.is_alive(), process.wait(1).stderr
    yield process.said().split()[2]
    # While a model is running.
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(TIMEOUT).returncode == 0
    assert not list(folder.glob('app-*')), 'uploads are left behind'


@pytest.fixture(scope='module')
def asked() -> set[str]:
    """What the browser asked for."""
    return set()


@pytest.fixture(scope='module')
def page(url, asked) -> Iterator[Any]:
    with open_browser() as browser:
        page = browser.new_page()
        page.set_default_timeout(TIMEOUT * 1000)
        page.on('request', lambda request: asked.add(request.url.removeprefix('blob:')))
        page.goto(url)
        page.get_by_text('Score threshold').wait_for()
        yield page


@contextmanager
def redrawn(page: Any) -> Iterator[None]:
    """Waits until the page has another drawing of each model."""
    before = page.evaluate(f'({LINKS})()')
    yield
    page.wait_for_function(
        f"""before => {{
            const links = ({LINKS})();
            return links.length === 2 && !links.some(link => before.includes(link));
        }}""",
        arg=before,
    )


def upload(page: Any, path: Path) -> None:
    if path.suffix == '.mp4':
        page.get_by_role('tab', name='Video').click()
        page.locator('input[type=file][accept*="video"]').set_input_files(path)
        return
    page.get_by_role('tab', name='Image').click()
    if page.get_by_label('Remove Image').count():
        page.get_by_label('Remove Image').click()
    page.locator('input[type=file][accept="image/*"]').set_input_files(path)


def rows_of(page: Any) -> list[list[str]]:
    """The cells of each model's table, row by row."""
    return page.evaluate(
        """() => [...document.querySelectorAll('.table-wrap')].map(table =>
            [...table.querySelectorAll('[data-testid^="cell-"]')].map(cell => cell.innerText))"""
    )


def fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
        return answer.read()


def download(page: Any, model: str) -> dict[str, bytes]:
    """What the ZIP file has of a model, by path."""
    with page.expect_download() as started:
        page.get_by_role('button', name='Download results').click()
    with zipfile.ZipFile(started.value.path()) as archive:
        return {
            name.removeprefix(f'saved_{model}/'): archive.read(name)
            for name in archive.namelist()
            if name.startswith(f'saved_{model}/')
        }


def infer(folder: Path, model: str, name: str, *options: object) -> dict[str, bytes]:
    """What tools/infer.py writes for a file, by path."""
    out = folder / f'{model} {name}'
    parts = [f'saved_{model}.py', f'{model}.pth', name, '--out-dir', out, '--device', 'cpu']
    process = run_tool(folder, 'infer.py', *parts, *options)
    assert process.returncode == 0, process.stderr
    files = (path for path in out.rglob('*') if path.is_file())
    written = {path.relative_to(out).as_posix(): path.read_bytes() for path in files}
    del written['predictions.jsonl']
    return written


def test_an_image_in_two_models(page, folder):
    with redrawn(page):
        upload(page, folder / 'rocket.jpg')
    shown = page.evaluate(f'({LINKS})()')
    for model, link in zip(MODELS, shown, strict=True):
        expected = infer(folder, model, 'rocket.jpg')
        assert download(page, model) == expected
        assert fetch(link) == expected['drawn/rocket.jpg']
    assert page.get_by_text('read').count() == page.get_by_text('draw').count() == 2


def test_the_threshold_changes_table_and_data(page, folder):
    slider = page.get_by_label('range slider for Score threshold')
    with redrawn(page):
        slider.press('Home')
    segmentation, all_objects = rows_of(page)
    scores = sorted(float(score) for score in all_objects[1::4])
    with redrawn(page):
        page.get_by_label('number input for Score threshold').fill(f'{scores[-3] - 0.004:.2f}')
    same, objects = rows_of(page)
    assert same == segmentation and 0 < len(objects) < len(all_objects) == 4 * len(scores)
    data = json.loads(download(page, 'mask_rcnn')['data/rocket.json'])
    assert len(data) == len(objects) // 4
    with redrawn(page):
        slider.press('Home')


def test_a_video_plays(page, folder):
    with redrawn(page):
        upload(page, folder / 'short.mp4')
    for model in MODELS:
        expected = infer(folder, model, 'short.mp4', '--end', MAX_SECONDS, '--score-thr', 0)
        assert download(page, model) == expected
    page.wait_for_function(
        """() => [...document.querySelectorAll('video')].filter(
            video => video.src.includes('/drawn/') && video.currentTime > 0).length === 2"""
    )
    assert page.locator('.problem').inner_text().startswith('short.mp4 was read up to 0.5 s')
    assert 'frames' in page.locator('.table-wrap').first.inner_text()


def test_the_results_of_a_removed_upload_stay(page):
    shown = page.evaluate(f'({LINKS})()')
    page.get_by_label('Clear').click()
    page.wait_for_timeout(1000)
    assert page.evaluate(f'({LINKS})()') == shown and len(shown) == 2


def test_a_bad_image_is_one_plain_message(page, folder):
    upload(page, folder / 'cut.jpg')
    page.get_by_text('cut short').wait_for()
    assert page.locator('.problem').inner_text().startswith('cut.jpg is cut short')
    assert page.evaluate(f'({LINKS})()') == []
    assert page.get_by_role('button', name='Download results').is_disabled()


def test_a_large_file_is_refused(page, folder):
    upload(page, folder / 'large.png')
    page.get_by_text('maximum allowed size').first.wait_for()
    assert page.evaluate(f'({LINKS})()') == []


@pytest.mark.parametrize('path', ['/etc/passwd', 'fpn.pth', 'rocket.jpg', 'https://example.org/a'])
def test_no_other_file_can_be_read(path, url, folder):
    """Neither by its address nor as an upload."""
    path = path if '://' in path else str(folder / path)
    for route in ('file=', 'file/', 'proxy='):
        with pytest.raises(urllib.error.HTTPError) as caught:
            fetch(f'{url}gradio_api/{route}{path}')
        assert caught.value.code == 403
    page = json.loads(fetch(f'{url}config'))
    # An image or a video is what models run on.
    number, _ = (
        each['id'] for each in page['dependencies'] if len(each['inputs']) == 1 and each['outputs']
    )
    given = {'path': path, 'url': path, 'meta': {'_type': 'gradio.FileData'}}
    body = {'data': [given], 'fn_index': number, 'session_hash': 'other'}
    join = urllib.request.Request(
        f'{url}gradio_api/queue/join',
        json.dumps(body).encode(),
        {'Content-Type': 'application/json'},
    )
    fetch(join)
    answer = fetch(f'{url}gradio_api/queue/data?session_hash=other').decode()
    assert '"success":false' in answer and '"success":true' not in answer


def start_camera(page: Any) -> None:
    """Waits for its first frame: until then, Gradio takes a click for a photo and drops it."""
    page.get_by_text('Click to Access Webcam').click()
    page.wait_for_function(
        "[...document.querySelectorAll('video')].some(video => video.srcObject && video.videoWidth)"
    )


def test_the_camera(page):
    """A photo, then a recording."""
    page.get_by_role('tab', name='Image').click()
    page.get_by_label('Capture from camera').first.click()
    start_camera(page)
    with redrawn(page):
        page.get_by_label('capture photo').click()
    with Image.open(io.BytesIO(download(page, 'fpn')['data/image.png'])) as image:
        assert image.size == (1280, 720)
    page.get_by_role('tab', name='Video').click()
    page.get_by_label('Capture from camera').last.click()
    start_camera(page)
    with redrawn(page):
        page.get_by_label('start recording').click()
        page.wait_for_timeout(6000 * MAX_SECONDS)
        page.get_by_label('start recording').click()
    assert page.locator('.problem').inner_text().startswith('sample.webm was read up to')
    lines = download(page, 'mask_rcnn')['data/sample.jsonl'].splitlines()
    assert len(lines) > 1 and json.loads(lines[-1])['time'] < MAX_SECONDS


def test_nothing_is_asked_of_another_host(page, url, asked):
    assert asked and all(each.startswith(url.rstrip('/')) for each in asked)


def test_a_port_that_is_taken_is_named(folder, url):
    port = url.rstrip('/').rpartition(':')[2]
    process = run_tool(folder, 'app.py', 'saved_fpn.py', 'fpn.pth', '--port', port)
    assert process.returncode == 1 and 'Traceback' not in process.stderr
    assert 'port' in process.stderr


def test_it_ends_while_a_model_runs(page, folder):
    """Which the end of this module does."""
    page.reload()
    page.get_by_text('Score threshold').wait_for()
    upload(page, folder / 'slow.png')
    page.get_by_text(re.compile('processing|frames')).first.wait_for()
