"""A window on the screen that shows pictures while they are made."""

import os
import subprocess
import sys

import cv2
import numpy as np

from backbones.errors import ConfigError

MAX_WIDTH, MAX_HEIGHT = 1280, 720
KEYS_THAT_CLOSE = (ord('q'), ord('Q'), 27)  # 27: Esc


class Window:
    """A window that shows one picture after the other.

    Args:
        title: What stands above it; each window needs its own.

    Raises:
        ConfigError: OpenCV cannot open windows, or there is no screen.
    """

    def __init__(self, title: str) -> None:
        problem = find_problem()
        if problem:
            raise ConfigError(problem)
        self.title = title
        self._is_open = True
        cv2.namedWindow(title, cv2.WINDOW_AUTOSIZE | cv2.WINDOW_GUI_NORMAL)

    def show(self, picture: np.ndarray) -> bool:
        """Shows a picture; one that is too large for the screen is made smaller.

        Args:
            picture: (height, width, 3), uint8, BGR.

        Returns:
            False once the user has closed the window or pressed q or Esc.
        """
        if not self._is_open:
            return False
        if not self._is_visible():
            self.close()
            return False
        cv2.imshow(self.title, fit(picture, MAX_WIDTH, MAX_HEIGHT))
        if cv2.waitKey(1) & 0xFF in KEYS_THAT_CLOSE:
            self.close()
        return self._is_open

    def close(self) -> None:
        """Closes the window, if it is still open."""
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
    without = 'or leave out --show and open the written file'
    if has_no_windows():
        return (
            'this OpenCV (opencv-python-headless) cannot open windows. Run `pip uninstall '
            'opencv-python-headless; pip install --force-reinstall opencv-python`, ' + without
        )
    if sys.platform != 'linux':
        return None
    screen = os.environ.get('DISPLAY') or os.environ.get('WAYLAND_DISPLAY')
    if not screen:
        return (
            'there is no screen (neither DISPLAY nor WAYLAND_DISPLAY is set). Log in with one, '
            '`ssh -X` for instance, ' + without
        )
    # Tried in another process, since OpenCV ends its own where it does not get the screen.
    trial = [sys.executable, '-c', 'import cv2; cv2.namedWindow("trial")']
    if subprocess.run(trial, capture_output=True).returncode != 0:
        return f'the screen {screen} cannot be opened. Check DISPLAY, {without}'
    return None


def has_no_windows() -> bool:
    """Whether this build of OpenCV comes without windows."""
    lines = cv2.getBuildInformation().splitlines()
    return any(line.split() == ['GUI:', 'NONE'] for line in lines)


def fit(picture: np.ndarray, max_width: int, max_height: int) -> np.ndarray:
    """The picture, made smaller where it is larger than that; its proportions stay."""
    height, width = picture.shape[:2]
    scale = min(max_width / width, max_height / height)
    if scale >= 1:
        return picture
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
