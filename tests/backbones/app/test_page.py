"""What a tab shows when something changes while a model runs or results are drawn."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

gr = pytest.importorskip('gradio', reason='gradio is not installed')
from backbones.app import page as page_module  # noqa: E402
from backbones.app.page import Page  # noqa: E402
from backbones.app.upload import Drawn, Limits, Predicted  # noqa: E402

TAB = SimpleNamespace(session_hash='tab')


class FakeUpload:
    """Instead of models and drawings what a test wants to happen meanwhile."""

    meanwhile_predict = meanwhile_draw = staticmethod(lambda: None)

    def __init__(self, path: Path, limits: Limits) -> None:
        self.path, self.problem = path, None
        self.stopping = SimpleNamespace(set=lambda: None)

    def predict(self, model, report) -> Predicted:
        self.meanwhile_predict()
        return Predicted([b''], (1.0, 1.0), None)

    def draw(self, model, predicted, settings, folder, report) -> Drawn:
        folder.mkdir(parents=True)
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / 'image.png')
        meanwhile, self.meanwhile_draw = self.meanwhile_draw, lambda: None
        meanwhile()
        return Drawn(folder / 'image.png', ['score'], [[settings.score_thr]], 1.0)


@pytest.fixture
def page(tmp_path, monkeypatch) -> Page:
    monkeypatch.setattr(page_module, 'Upload', FakeUpload)
    (tmp_path / 'photo.jpg').touch()
    model = SimpleNamespace(task='detection', classes=('cat',))
    return Page({'model': model}, Limits(), 0.3, tmp_path)


def show(page: Page, score_thr: float) -> dict:
    event = SimpleNamespace(target=None)
    return page.show(str(page.folder / 'photo.jpg'), score_thr, [], 0.5, TAB, event)


def redraw(page: Page, score_thr: float) -> dict:
    return page.redraw(score_thr, [], 0.5, TAB)


def shown(page: Page, updates: dict) -> float | None:
    """The threshold of the results that are shown, if there are any."""
    table = updates.get(page.panels['model'].table)
    return table and table.value['data'][0][0]


def results(page: Page) -> list[str]:
    return [path.name for path in page.folder.rglob('*.zip')]


def test_settings_changed_while_a_model_runs_are_drawn(page, monkeypatch):
    monkeypatch.setattr(FakeUpload, 'meanwhile_predict', lambda _: redraw(page, 0.9))
    assert shown(page, show(page, 0.3)) == 0.9
    page.leave(TAB)
    monkeypatch.setattr(FakeUpload, 'meanwhile_predict', lambda _: None)
    assert shown(page, show(page, 0.4)) == 0.4


def test_of_two_drawings_at_once_the_later_is_shown(page, monkeypatch):
    later = []
    monkeypatch.setattr(FakeUpload, 'meanwhile_draw', lambda _: later.append(redraw(page, 0.9)))
    earlier = show(page, 0.3)
    assert [shown(page, updates) for updates in (earlier, *later)] == [None, 0.9]
    assert results(page) == ['photo.zip']
    # Nothing was emptied, either.
    assert page.download not in earlier


def test_an_upload_that_is_replaced_while_it_is_drawn_empties_nothing(page, monkeypatch):
    monkeypatch.setattr(FakeUpload, 'meanwhile_draw', lambda _: page.leave(TAB))
    assert page.download not in show(page, 0.3)
    assert results(page) == []
