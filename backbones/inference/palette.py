"""The color of each class."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import ImageColor

from backbones.errors import ConfigError

Color = tuple[int, int, int]

# A strong color of the background would cover most of the image.
BACKGROUND_NAMES = {'background', '_background_', '__background__'}
BACKGROUND_COLOR = (118, 120, 124)
# Chosen by eye, since most models have few classes; the others are computed.
FIRST_COLORS = [
    (235, 64, 72),
    (36, 140, 255),
    (40, 190, 100),
    (255, 184, 0),
    (164, 92, 245),
    (0, 200, 215),
    (255, 110, 185),
]


def choose_palette(path: str | None, class_names: Sequence[str], saved: Any) -> list[Color]:
    """Return a color for every class, (R, G, B).

    They are in the text file ``path``. None: the palette ``saved`` with the model if it has a color
    for every class; otherwise, and for repeated colors, distinct colors.
    """
    count = len(class_names)
    if path is None:
        usable = saved_palette(saved, count)
        return without_repeats(usable) if usable else distinct_palette(class_names)
    palette = read_palette(path)
    if len(palette) < count:
        raise ConfigError(
            f"the palette '{path}' has {len(palette)} colors, the model {count} classes"
        )
    return palette[:count]


def saved_palette(saved: Any, count: int) -> list[Color] | None:
    """Return a checkpoint's palette, or None if it was not chosen for these classes."""
    try:
        colors = np.asarray(saved, dtype=float)
    except (TypeError, ValueError):  # mmdet saves 'random' for a dataset without a palette
        return None
    # mmdet gives a single class one color, (R, G, B).
    colors = colors[None] if colors.shape == (3,) else colors
    # mmdet keeps COCO's 80 colors for the classes of other data.
    if colors.shape[1:] != (3,) or len(colors) != count:
        return None
    # The colors that mmseg draws by chance for a dataset without a palette.
    if np.array_equal(colors, np.random.RandomState(42).randint(0, 255, colors.shape)):
        return None
    return as_colors(colors)


def without_repeats(palette: list[Color]) -> list[Color]:
    """Return a palette in which colors that an earlier class also has are replaced."""
    spare = (color for color in farthest_colors(2 * len(palette)) if color not in palette)
    return [
        next(spare) if color in palette[:index] else color for index, color in enumerate(palette)
    ]


def read_palette(path: str) -> list[Color]:
    """Read the colors in a text file, one per line; empty lines are ignored."""
    try:
        lines = Path(path).read_text(encoding='utf-8-sig').splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the palette '{path}' is no text file that can be read: {error}"
        ) from None
    colors = []
    for number, line in enumerate(lines, start=1):
        numbers = line.replace(',', ' ').split()
        if not numbers:
            continue
        try:
            text = f'rgb({",".join(numbers)})' if len(numbers) > 1 else numbers[0]
            red, green, blue = ImageColor.getrgb(text)
            if max(red, green, blue) > 255:
                raise ValueError
        except ValueError:
            raise ConfigError(
                f"{path}, line {number}: '{line.strip()[:40]}' is not a color; write red, green "
                "and blue from 0 to 255 as '230 80 50', or '#e65032'"
            ) from None
        colors.append((red, green, blue))
    return colors


def distinct_palette(class_names: Sequence[str]) -> list[Color]:
    """Return colors that are easy to tell apart, on photographs and paper; background is gray."""
    colors = iter(farthest_colors(len(class_names)))
    return [
        BACKGROUND_COLOR if name.strip().lower() in BACKGROUND_NAMES else next(colors)
        for name in class_names
    ]


@lru_cache
def farthest_colors(count: int) -> tuple[Color, ...]:
    """Return the chosen colors, then each time the one farthest in CIELAB from all before it.

    So a class keeps its color when others are added after it.
    """
    steps = np.linspace(0, 255, 22)
    grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(-1, 3)
    colors = np.concatenate([FIRST_COLORS, grid]).astype(np.uint8)
    lab = cv2.cvtColor(colors[None].astype(np.float32) / 255, cv2.COLOR_RGB2LAB)[0]
    lightness, chroma = lab[:, 0], np.hypot(lab[:, 1], lab[:, 2])
    # Visible in shadows and on white paper, and unlike a photograph's own grays.
    usable = (lightness > 42) & (lightness < 88) & (chroma > 38) & (chroma < 92)
    # Since the photograph shines through, lightness differs less clearly than hue.
    lab = lab * np.float32([0.7, 1, 1])
    distance = np.where(usable, np.inf, -1)
    chosen: list[int] = []
    while len(chosen) < count:
        following = len(chosen) if len(chosen) < len(FIRST_COLORS) else int(distance.argmax())
        chosen.append(following)
        distance = np.minimum(distance, np.linalg.norm(lab - lab[following], axis=1))
    return tuple(as_colors(colors[chosen]))


def as_colors(colors: Any) -> list[Color]:
    return [tuple(int(value) for value in color) for color in colors]
