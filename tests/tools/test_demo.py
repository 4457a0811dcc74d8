"""The demo's sheet takes drawings of any size; its search goes on where it stopped."""

import sys

import cv2
import demo
import numpy as np
import pytest
from demo import draw_sheet
from searching import write_latency

from backbones.engine.config import load_config


def test_a_sheet_of_images_of_different_heights(tmp_path):
    folder = tmp_path / 'drawn'
    folder.mkdir()
    for number, height in enumerate((40, 56, 40)):
        cv2.imwrite(str(folder / f'{number}.jpg'), np.zeros((height, 60, 3), np.uint8))
    draw_sheet(folder, tmp_path / 'sheet.png')
    sheet = cv2.imread(str(tmp_path / 'sheet.png'))
    dark = (sheet < 128).all(axis=2).sum()
    assert dark == 60 * (40 + 56 + 40)


@pytest.mark.parametrize(('noise', 'measured'), [(0.0, 1), (3.0, 4)])
def test_a_search_is_not_measured_again_once_it_can_be_trusted(
    tmp_path, monkeypatch, noise, measured
):
    """Else a second call may find another network, and resume the training of the first."""
    config, ran = load_config(str(demo.ROOT / demo.SEARCH_CONFIG)), []
    folder = tmp_path / 'work_dirs' / 'demo_search'

    def run(title, tool, command='', *arguments):
        ran.append((tool, command))
        if command == 'latency':
            write_latency(config, folder, noise)
        elif tool == 'train.py':
            sys.exit('interrupted')

    monkeypatch.setattr(demo, 'run', run)
    monkeypatch.setattr(demo, 'ROOT', tmp_path)
    monkeypatch.setattr(demo, 'SEARCH_CONFIG', config.filename)
    for _ in range(2):
        with pytest.raises(SystemExit):
            demo.demonstrate_search()
    assert ran.count(('search.py', 'latency')) == measured
