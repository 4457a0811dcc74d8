"""A picture to compare results on."""

from pathlib import Path

import numpy as np

from backbones.errors import DataError


def example_picture(path: str | None = None) -> np.ndarray:
    """A picture from a file, else scikit-image's astronaut, else a drawn one.

    Args:
        path: Of a picture. Default: none.

    Returns:
        (height, width, 3), uint8, BGR.

    Raises:
        DataError: The file is no picture.
    """
    if path is not None:
        return read(path)
    try:
        from skimage.data import astronaut
    except ImportError:
        return draw()
    return np.ascontiguousarray(astronaut()[:, :, ::-1])


def read(path: str) -> np.ndarray:
    """Read a picture.

    Raises:
        DataError: There is none, or it cannot be read.
    """
    import cv2

    if not Path(path).is_file():
        raise DataError(f'there is no picture {path}')
    picture = cv2.imread(path, cv2.IMREAD_COLOR)
    if picture is None:
        raise DataError(f'{path} cannot be read as a picture')
    return picture


def draw(size: int = 512) -> np.ndarray:
    """Discs on a gradient with some noise: edges, flat parts and texture."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size]
    picture = np.stack([x, y, (x + y) / 2], axis=-1) * (255 / size)
    for _ in range(12):
        centre, radius = generator.uniform(0, size, 2), generator.uniform(size / 20, size / 6)
        disc = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2
        picture[disc] = generator.uniform(0, 255, 3)
    picture += generator.normal(0, 8, picture.shape)
    return picture.clip(0, 255).astype(np.uint8)
