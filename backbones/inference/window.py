"""A window on the screen that shows images while they are made."""

import subprocess
import sys

import cv2
import numpy as np

from backbones.errors import ConfigError

TITLE = 'predictions'
MAX_WIDTH, MAX_HEIGHT = 1280, 720
KEYS_THAT_CLOSE = (ord('q'), ord('Q'), 27)  # 27: Esc


class Window:
    """A window that shows one image after the other; ConfigError where there is no screen."""

    def __init__(self) -> None:
        # In another process, since OpenCV ends its own where it does not get a screen.
        trial = [sys.executable, '-c', 'import cv2; cv2.namedWindow("trial")']
        if subprocess.run(trial, capture_output=True).returncode != 0:
            raise ConfigError(
                'no window can be opened: there is no screen (see DISPLAY), or this OpenCV '
                '(opencv-python-headless) has no windows, where `pip uninstall '
                'opencv-python-headless; pip install --force-reinstall opencv-python` helps. Or '
                'leave out --show and open the written file'
            )
        cv2.namedWindow(TITLE, cv2.WINDOW_AUTOSIZE | cv2.WINDOW_GUI_NORMAL)
        self._is_open = True

    def show(self, image: np.ndarray) -> bool:
        """Show an image, made smaller where the screen is; False once the user wants no more."""
        if self._is_open and self._is_visible():
            scale = min(MAX_WIDTH / image.shape[1], MAX_HEIGHT / image.shape[0])
            if scale < 1:
                size = [max(1, round(side * scale)) for side in image.shape[1::-1]]
                image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
            cv2.imshow(TITLE, image)
            if cv2.waitKey(1) & 0xFF not in KEYS_THAT_CLOSE:
                return True
            cv2.destroyWindow(TITLE)
        self._is_open = False
        return False

    def _is_visible(self) -> bool:
        try:
            return cv2.getWindowProperty(TITLE, cv2.WND_PROP_VISIBLE) > 0
        except cv2.error:  # how some of OpenCV's builds say that the window is gone
            return False
