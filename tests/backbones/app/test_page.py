"""What a tab shows when something changes while a model runs or results are drawn."""

import socket
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

gr = pytest.importorskip('gradio', reason='gradio is not installed')
from backbones.app import page as page_module  # noqa: E402
from backbones.app.page import Page  # noqa: E402
from backbones.app.upload import Drawn, Predicted  # noqa: E402
from backbones.errors import ConfigError  # noqa: E402

TAB = SimpleNamespace(session_hash='tab')


class FakeUpload:
    """Instead of models and drawings what a test wants to happen meanwhile."""

    meanwhile_predict = meanwhile_draw = staticmethod(lambda: None)

    def __init__(self, path: Path, megapixels: float, seconds: float) -> None:
        self.path, self.problem, self.predicted, self.is_replaced = path, None, {}, False
        self.stopping = SimpleNamespace(set=lambda: None)

    def predict(self, model, title) -> Predicted:
        self.meanwhile_predict()
        return Predicted([b''], (1.0, 1.0), None)

    def draw(self, model, predicted, folder, score_thr, classes, opacity) -> Drawn:
        folder.mkdir(parents=True)
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / 'image.png')
        self.meanwhile_draw()
        return Drawn(folder / 'image.png', ['score'], [[score_thr]], 1.0)


@pytest.fixture
def page(tmp_path, monkeypatch) -> Page:
    monkeypatch.setattr(page_module, 'Upload', FakeUpload)
    (tmp_path / 'photo.jpg').touch()
    model = SimpleNamespace(task='detection', classes=('cat',))
    return Page({'model': model}, 50, 60, 0.3, tmp_path)


def show(page: Page) -> dict:
    return page.show(str(page.folder / 'photo.jpg'), TAB)


def draw(page: Page, score_thr: float) -> dict:
    return page.draw(score_thr, [], 0.5, TAB)


def shown(page: Page, updates: dict) -> float | None:
    """The threshold of the results that are shown, if there are any."""
    table = updates.get(page.panels['model'].table)
    return table and table.value['data'][0][0]


def results(page: Page) -> list[str]:
    return [path.name for path in page.folder.rglob('*.zip')]


def test_nothing_is_drawn_before_the_models_are_through(page, monkeypatch):
    early = []
    monkeypatch.setattr(FakeUpload, 'meanwhile_predict', lambda _: early.append(draw(page, 0.9)))
    assert page.shown in show(page)
    assert [shown(page, updates) for updates in early] == [None] and results(page) == []
    assert shown(page, draw(page, 0.9)) == 0.9


def test_a_drawing_replaces_the_last(page):
    show(page)
    assert [shown(page, draw(page, score_thr)) for score_thr in (0.3, 0.9)] == [0.3, 0.9]
    assert results(page) == ['photo.zip']


@pytest.mark.parametrize(('path', 'expected'), [('other.jpg', 1), (None, 2)])
def test_an_upload_that_is_replaced_goes_through_no_other_model(path, expected, page, monkeypatch):
    page.models = {name: page.models['model'] for name in 'ab'}
    monkeypatch.setattr(FakeUpload, 'meanwhile_predict', lambda _: page.change(path, TAB))
    show(page)
    assert len(page.uploads['tab'].predicted) == expected


def test_an_upload_that_is_replaced_while_it_is_drawn_empties_nothing(page, monkeypatch):
    show(page)
    monkeypatch.setattr(FakeUpload, 'meanwhile_draw', lambda _: page.leave(TAB))
    assert page.download not in draw(page, 0.3)
    assert results(page) == []


@pytest.mark.parametrize('host', ['127.0.0.1', '0.0.0.0', '::1', '[::1]'])
def test_it_answers_where_there_is_a_proxy_for_everything_else(host, page, monkeypatch):
    if ':' in host and not socket.has_dualstack_ipv6():
        pytest.skip('this machine has no IPv6')
    # Nothing listens there.
    monkeypatch.setenv('http_proxy', 'http://127.0.0.1:9')
    monkeypatch.setenv('no_proxy', 'example.com')
    try:
        url = page.serve(host, None, 1)
        monkeypatch.delenv('http_proxy')
        with urllib.request.urlopen(url, timeout=60) as answer:
            assert answer.status == 200
    finally:
        page.blocks.close()


@pytest.mark.parametrize(
    ('host', 'port'),
    [('127.0.0.1', 99999), ('203.0.113.1', None), ('no.such.host.invalid', None), ('::2', None)],
)
def test_an_address_that_is_not_ours(host, port, page):
    with pytest.raises(ConfigError, match=str(port or host)):
        page.serve(host, port, 1)
