"""Text of any script as small bitmaps, rendered once and painted as often as needed."""

import string
import warnings
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

DEFAULT_FONT = Path(matplotlib.get_data_path(), 'fonts', 'ttf', 'DejaVuSans.ttf')
ELLIPSIS = '…'
# All its glyphs are boxes that name the missing script.
NO_FONTS = {'Last Resort High-Efficiency'}


@lru_cache(maxsize=1024)
def render_text(text: str, size: int) -> np.ndarray:
    """Render one line of text as a bitmap, (height, width), uint8, read-only: 255 in letters.

    All texts of one size, in pixels, have the same height and base line.
    """
    text = one_line(text)
    font = load_font(font_for(text), size)
    ascent, descent = load_font(str(DEFAULT_FONT), size).getmetrics()
    left, _, right, _ = font.getbbox(text, anchor='ls')
    canvas = Image.new('L', (max(right - min(left, 0), 1), ascent + descent))
    ImageDraw.Draw(canvas).text((-min(left, 0), ascent), text, fill=255, font=font, anchor='ls')
    bitmap = np.array(canvas)
    bitmap.setflags(write=False)
    return bitmap


@lru_cache(maxsize=4096)
def fit_text(text: str, size: int, max_width: int) -> str:
    """Return the text, or as much as fits with an ellipsis; '' if nothing fits."""
    fitting = text = one_line(text)
    while fitting and text_width(fitting, size) > max_width:
        text = text[:-1].rstrip()
        fitting = text + ELLIPSIS if text else ''
    return fitting


@lru_cache(maxsize=4096)
def text_width(text: str, size: int) -> int:
    left, _, right, _ = load_font(font_for(text), size).getbbox(text, anchor='ls')
    return int(right - min(left, 0))


@lru_cache
def line_height(size: int) -> int:
    """Return the height of every text of a font size."""
    return render_text('', size).shape[0]


def paint(
    image: np.ndarray, bitmap: np.ndarray, x: int, y: int, color: tuple[int, int, int]
) -> None:
    """Paint a bitmap in one color over an image, in place; parts outside of it are left out.

    The bitmap's values say how opaque the color is, from 0 to 255; ``x, y`` is its upper left.
    """
    height, width = image.shape[:2]
    left, top = max(x, 0), max(y, 0)
    right, bottom = min(x + bitmap.shape[1], width), min(y + bitmap.shape[0], height)
    if left >= right or top >= bottom:
        return
    region = image[top:bottom, left:right]
    opacity = bitmap[top - y : bottom - y, left - x : right - x, None].astype(np.uint16)
    opaque = opacity * np.uint16(color)
    region[:] = (region * (255 - opacity) + opaque + 127) // 255


@lru_cache(maxsize=1024)
def rounded_box(width: int, height: int, radius: int) -> np.ndarray:
    """Return the bitmap of a filled box with round corners, smooth at the edges; read-only."""
    scale = 8
    canvas = Image.new('L', (width * scale, height * scale))
    corner = width * scale - 1, height * scale - 1
    ImageDraw.Draw(canvas).rounded_rectangle((0, 0, *corner), radius * scale, fill=255)
    box = np.array(canvas.resize((width, height), Image.Resampling.BOX))
    box.setflags(write=False)
    return box


def one_line(text: str) -> str:
    # A name read in a wrong encoding can hold halves of characters, which no font draws.
    return ' '.join(text.encode(errors='replace').decode().split())


@lru_cache(maxsize=1024)
def font_for(text: str) -> str:
    """Return the default font; for letters that it lacks, the installed font with most of them."""
    letters = frozenset(text) - frozenset(string.printable + ELLIPSIS)
    return best_font(letters) if missing_letters(str(DEFAULT_FONT), letters) else str(DEFAULT_FONT)


@lru_cache
def best_font(letters: frozenset[str]) -> str:
    best, fewest = str(DEFAULT_FONT), missing_letters(str(DEFAULT_FONT), letters)
    for entry in font_manager.fontManager.ttflist:
        if entry.name in NO_FONTS or entry.style != 'normal' or entry.weight not in (400, 'normal'):
            continue
        try:
            missing = missing_letters(entry.fname, letters | {'a'})
            if missing < fewest:
                load_font(entry.fname, 12)
                best, fewest = entry.fname, missing
        except (OSError, RuntimeError):  # removed, or not scalable
            continue
        if not fewest:
            return best
    warnings.warn(
        'no installed font has all letters of the names in drawings, which show boxes instead; '
        'fonts such as Noto (on Debian: fonts-noto) have most',
        stacklevel=2,
    )
    return best


def missing_letters(path: str, letters: frozenset[str]) -> int:
    font = font_manager.get_font(path)
    return sum(not font.get_char_index(ord(letter)) for letter in letters)


@lru_cache(maxsize=64)
def load_font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)
