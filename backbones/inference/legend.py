"""The legend of a segmentation, below its image or inside it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

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
PALE_INK: BGR = (140, 134, 130)
PANEL: BGR = (28, 24, 22)
PANEL_OPACITY = 165
PANEL_INK: BGR = (255, 255, 255)


@dataclass(frozen=True)
class Entry:
    """A line of a legend: a swatch of a color, (B, G, R), if there is one, a name, and a note."""

    name: str
    color: BGR | None
    note: str = ''


class SteadyClasses:
    """Keeps a video's legend from flickering.

    Args:
        hold: For how many frames a class stays listed after its last one. Default: 60.
        min_share: The share of the image from which on a class is listed. Default: 0.002.
    """

    def __init__(self, hold: int = 60, min_share: float = 0.002) -> None:
        self.hold = hold
        self.min_share = min_share
        self.frames_left: dict[int, int] = {}

    def update(self, shares: dict[int, float]) -> list[int]:
        """The classes to list in the next frame, whose classes cover these shares of it."""
        left = {index: frames - 1 for index, frames in self.frames_left.items() if frames > 1}
        left |= {
            index: self.hold
            for index, share in shares.items()
            if share >= self.min_share or index in left
        }
        self.frames_left = left
        return sorted(left)


def legend_band(entries: Sequence[Entry], width: int, height: int, size: int) -> np.ndarray:
    """A legend for below an image, in as many columns as fit its width.

    Args:
        entries: The most important first. Where not all fit, the last line says how many more.
        width: Of the image, and so of the band.
        height: Of the image; the band is at most half as high.
        size: Height of the font.

    Returns:
        (rows, width, 3), uint8, BGR; no rows where not one entry fits.
    """
    row_height, margin = line_height(size) + round(size * 0.4), round(size * 0.8)
    rows = int(height * HEIGHT_SHARE - 2 * margin) // row_height
    columns = arrange(entries, rows, width - 2 * margin, size)
    if sum(map(len, columns)) < len(entries):
        # More names matter more than their notes.
        entries = [replace(entry, note='') for entry in entries]
        columns = arrange(entries, rows, width - 2 * margin, size)
    used = max(map(len, columns), default=0)
    band = np.full((2 * margin + used * row_height if used else 0, width, 3), PAPER, np.uint8)
    x = margin
    for column in columns:
        for row, entry in enumerate(column):
            draw_entry(band, entry, x, margin + row * row_height, row_height, size, INK, PALE_INK)
        x += column_width(column, size)
    return band


def draw_panel(image: np.ndarray, entries: Sequence[Entry], size: int) -> None:
    """Draw a half transparent legend over the lower left corner of an image, in place.

    Where not all entries fit, the last line says how many more there are.
    """
    height, width = image.shape[:2]
    row_height, padding, margin = line_height(size) + round(size * 0.35), size // 2, size // 2
    rows = int(height * HEIGHT_SHARE - 2 * padding) // row_height
    columns = arrange(entries, rows, int(width * PANEL_WIDTH_SHARE), size, max_columns=1)
    if not columns:
        return
    (column,) = columns
    panel_width = column_width(column, size) - column_gap(size) + 2 * padding
    panel_height = len(column) * row_height + 2 * padding
    x, y = margin, height - margin - panel_height
    panel = half_transparent(rounded_box(panel_width, panel_height, size // 2))
    paint(image, panel, x, y, PANEL)
    for row, entry in enumerate(column):
        top = y + padding + row * row_height
        draw_entry(image, entry, x + padding, top, row_height, size, PANEL_INK, PANEL_INK)


def arrange(
    entries: Sequence[Entry], rows: int, width: int, size: int, max_columns: int | None = None
) -> list[list[Entry]]:
    """Columns of entries, read from top to bottom; none where not one fits."""
    max_columns = max(min(max_columns or width // (3 * size), len(entries)), 1)
    shown = []
    for entry in entries[: max(rows, 0) * max_columns]:
        room = width - entry_width(replace(entry, name=''), size)
        shown.append(replace(entry, name=fit_text(entry.name, size, room)))
    if not shown or not all(entry.name for entry in shown):
        return []
    for count in range(max_columns, 0, -1):
        fitting = shown
        if len(entries) > count * rows:
            more = Entry(f'+{len(entries) - count * rows + 1} more', color=None)
            fitting = [*shown[: count * rows - 1], more]
        length = -(-len(fitting) // count)
        columns = [fitting[start : start + length] for start in range(0, len(fitting), length)]
        if sum(column_width(column, size) for column in columns) - column_gap(size) <= width:
            return columns
    return []


def column_width(column: list[Entry], size: int) -> int:
    return max(entry_width(entry, size) for entry in column) + column_gap(size)


def column_gap(size: int) -> int:
    return round(size * 1.6)


@lru_cache(maxsize=4096)
def entry_width(entry: Entry, size: int) -> int:
    swatch = 0 if entry.color is None else size + swatch_gap(size)
    note = text_width(entry.note, size) + swatch_gap(size) if entry.note else 0
    return swatch + text_width(entry.name, size) + note


def swatch_gap(size: int) -> int:
    return round(size * 0.45)


def draw_entry(
    image: np.ndarray, entry: Entry, x: int, y: int, height: int, size: int, ink: BGR, pale: BGR
) -> None:
    """A swatch of the color, the name, and the note in a paler ink, centered in a row."""
    name = render_text(entry.name, size)
    top = y + (height - name.shape[0]) // 2
    if entry.color is not None:
        swatch = rounded_box(size, size, max(size // 4, 1))
        # Keeps a swatch visible on its own color.
        paint(image, half_transparent(swatch), x, y + (height - size) // 2, pale)
        inner = rounded_box(size - 2, size - 2, max(size // 4 - 1, 1))
        paint(image, inner, x + 1, y + (height - size) // 2 + 1, entry.color)
        x += size + swatch_gap(size)
    paint(image, name, x, top, ink)
    if entry.note:
        x += name.shape[1] + swatch_gap(size)
        paint(image, render_text(entry.note, size), x, top, pale)


def half_transparent(bitmap: np.ndarray) -> np.ndarray:
    return cv2.convertScaleAbs(bitmap, alpha=PANEL_OPACITY / 255)
