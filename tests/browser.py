"""Pages in headless Chromium, without network; the camera is a drawn one."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser')
OPTIONS = (
    *('--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run'),
    *('--disable-background-networking', '--disable-component-update', '--disable-sync'),
    *('--use-fake-device-for-media-stream', '--use-fake-ui-for-media-stream'),
)


@contextmanager
def open_browser() -> Iterator[Any]:
    """playwright's browser; skips the test where there is none."""
    sync_api = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    if CHROMIUM is None:
        pytest.skip('there is no Chromium: apt-get install chromium')
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield browser
        browser.close()
