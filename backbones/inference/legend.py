"""The legend of a segmentation, below its image or inside it."""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from .text import fit_text, line_height, paint, render_text, rounded_box, text_width

BGR = tuple[int, int, int]

# A legend takes at most this share of the image's height.
HEIGHT_SHARE = 0.5
# Inside the image, wider names are shortened to this share of its width.
PANEL_WIDTH_SHARE = 0.4

PAPER: BGR = (255, 255, 255)
INK: BGR = (38, 34, 32)
PANEL: BGR = (28, 24, 22)
PANEL_OPACITY = 165
PANEL_INK: BGR = (255, 255, 255)


class Entry(NamedTuple):
    """A line of a legend: a text, and a swatch of a color if there is one."""

    text: str
    color: BGR | None = None


class SteadyClasses:
    """Lists a class for ``hold`` frames after it covered ``min_share``, so it does not flicker."""

    def __init__(self, hold: int = 60, min_share: float = 0.002) -> None:
        self.hold, self.min_share = hold, min_share
        self.frames_left: dict[int, int] = {}

    def update(self, shares: dict[int, float]) -> list[int]:
        """Return the classes to list in the next frame; ``shares`` are those of its classes."""
        left = {index: frames - 1 for index, frames in self.frames_left.items() if frames > 1}
        left |= {
            index: self.hold
            for index, share in shares.items()
            if share >= self.min_share or index in left
        }
        self.frames_left = left
        return sorted(left)


def legend_band(entries: Sequence[Entry], width: int, height: int, size: int) -> np.ndarray:
    """Return a legend to go below an image of this size, in columns; no rows if nothing fits.

    The most important ``entries`` come first. ``size`` is the height of the font.
    """
    row_height, margin = line_height(size) + round(size * 0.4), round(size * 0.8)
    rows = int(height * HEIGHT_SHARE - 2 * margin) // row_height
    columns = arrange(entries, rows, width - 2 * margin, size)
    band_height = 2 * margin + len(columns[0]) * row_height if columns else 0
    band = np.full((band_height, width, 3), PAPER, np.uint8)
    draw_columns(band, columns, margin, margin, row_height, size, INK)
    return band


def draw_panel(image: np.ndarray, entries: Sequence[Entry], size: int) -> None:
    """Draw a half transparent legend over the lower left corner of an image, in place."""
    height, width = image.shape[:2]
    row_height, margin = line_height(size) + round(size * 0.35), size // 2
    rows = int(height * HEIGHT_SHARE - 2 * margin) // row_height
    columns = arrange(entries, rows, int(width * PANEL_WIDTH_SHARE), size, max_columns=1)
    if not columns:
        return
    panel_width = column_width(columns[0], size) - column_gap(size) + 2 * margin
    panel_height = len(columns[0]) * row_height + 2 * margin
    top = height - margin - panel_height
    box = rounded_box(panel_width, panel_height, size // 2)
    paint(image, cv2.convertScaleAbs(box, alpha=PANEL_OPACITY / 255), margin, top, PANEL)
    draw_columns(image, columns, 2 * margin, top + margin, row_height, size, PANEL_INK)


def arrange(
    entries: Sequence[Entry], rows: int, width: int, size: int, max_columns: int | None = None
) -> list[list[Entry]]:
    """Arrange entries in columns, read from top to bottom, the longest first; [] if none fits."""
    max_columns = max(min(max_columns or width // (3 * size), len(entries)), 1)
    room = width - swatch_width(size)
    shown = [
        Entry(fit_text(entry.text, size, room), entry.color)
        for entry in entries[: max(rows, 0) * max_columns]
    ]
    if not shown or not all(entry.text for entry in shown):
        return []
    for count in range(max_columns, 0, -1):
        fitting = shown
        if len(entries) > count * rows:
            fitting = shown[: count * rows - 1]
            fitting = [*fitting, Entry(f'+{len(entries) - len(fitting)} more')]
        length = -(-len(fitting) // count)
        columns = [fitting[start : start + length] for start in range(0, len(fitting), length)]
        if sum(column_width(column, size) for column in columns) - column_gap(size) <= width:
            return columns
    return []


def column_width(column: list[Entry], size: int) -> int:
    widths = [
        text_width(entry.text, size) + (swatch_width(size) if entry.color else 0)
        for entry in column
    ]
    return max(widths) + column_gap(size)


def column_gap(size: int) -> int:
    return round(size * 1.6)


def swatch_width(size: int) -> int:
    """Return the width of a swatch and the gap to its text."""
    return size + round(size * 0.45)


def draw_columns(
    image: np.ndarray,
    columns: list[list[Entry]],
    x: int,
    y: int,
    row_height: int,
    size: int,
    ink: BGR,
) -> None:
    for column in columns:
        for row, entry in enumerate(column):
            left, middle = x, y + row * row_height + row_height // 2
            if entry.color is not None:
                swatch = rounded_box(size, size, max(size // 4, 1))
                paint(image, swatch, left, middle - size // 2, entry.color)
                left += swatch_width(size)
            text = render_text(entry.text, size)
            paint(image, text, left, middle - text.shape[0] // 2, ink)
        x += column_width(column, size)
