"""The demo's sheet takes drawings of any size: legends differ in height."""

import cv2
import numpy as np
from demo import draw_sheet


def test_a_sheet_of_images_of_different_heights(tmp_path):
    folder = tmp_path / 'drawn'
    folder.mkdir()
    for number, height in enumerate((40, 56, 40)):
        cv2.imwrite(str(folder / f'{number}.jpg'), np.zeros((height, 60, 3), np.uint8))
    draw_sheet(folder, tmp_path / 'sheet.png')
    sheet = cv2.imread(str(tmp_path / 'sheet.png'))
    dark = (sheet < 128).all(axis=2).sum()
    assert dark == 60 * (40 + 56 + 40)
