"""A window on the screen that shows images while they are made."""

import os
import subprocess
import sys

import cv2
import numpy as np

from backbones.errors import ConfigError

MAX_WIDTH, MAX_HEIGHT = 1280, 720
KEYS_THAT_CLOSE = (ord('q'), ord('Q'), 27)  # 27: Esc


class Window:
    """A window that shows one image after the other.

    Args:
        title: What stands above it; each window needs its own.

    Raises:
        ConfigError: OpenCV cannot open windows, or there is no screen.
    """

    def __init__(self, title: str) -> None:
        if problem := find_problem():
            raise ConfigError(f'{problem}, or leave out --show and open the written file')
        self.title = title
        self._is_open = True
        cv2.namedWindow(title, cv2.WINDOW_AUTOSIZE | cv2.WINDOW_GUI_NORMAL)

    def show(self, image: np.ndarray) -> bool:
        """Show an image, (height, width, 3), uint8, BGR, made smaller where the screen is.

        Returns:
            False once the user has closed the window or pressed q or Esc.
        """
        if self._is_open and self._is_visible():
            cv2.imshow(self.title, fit(image, MAX_WIDTH, MAX_HEIGHT))
            if cv2.waitKey(1) & 0xFF not in KEYS_THAT_CLOSE:
                return True
        self.close()
        return False

    def close(self) -> None:
        """Close the window, if it is still open."""
        if self._is_open and self._is_visible():
            cv2.destroyWindow(self.title)
        self._is_open = False

    def _is_visible(self) -> bool:
        try:
            return cv2.getWindowProperty(self.title, cv2.WND_PROP_VISIBLE) > 0
        except cv2.error:  # how some of OpenCV's builds say that the window is gone
            return False


def find_problem() -> str | None:
    """Why no window can be opened, and what to do; None where it can."""
    lines = cv2.getBuildInformation().splitlines()
    if any(line.split() == ['GUI:', 'NONE'] for line in lines):
        return (
            'this OpenCV (opencv-python-headless) cannot open windows. Run `pip uninstall '
            'opencv-python-headless; pip install --force-reinstall opencv-python`'
        )
    if sys.platform != 'linux':
        return None
    screen = os.environ.get('DISPLAY') or os.environ.get('WAYLAND_DISPLAY')
    if not screen:
        return 'there is no screen: DISPLAY is not set. Log in with one, `ssh -X` for instance'
    # Tried in another process, since OpenCV ends its own where it does not get the screen.
    trial = [sys.executable, '-c', 'import cv2; cv2.namedWindow("trial")']
    if subprocess.run(trial, capture_output=True).returncode != 0:
        return f'the screen {screen} cannot be opened. Check DISPLAY'
    return None


def fit(image: np.ndarray, max_width: int, max_height: int) -> np.ndarray:
    """The image, made smaller where it is larger than that; its proportions stay."""
    height, width = image.shape[:2]
    scale = min(max_width / width, max_height / height)
    if scale >= 1:
        return image
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)
