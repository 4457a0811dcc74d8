"""What the demo's model is shown at the end: two photographs with shapes on them, and a clip."""

import math
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import skimage
from make_shapes import CLASSES, SUPERSAMPLING, Sprite, draw_sprite, paste, window_around

from backbones.inference.video_writer import VideoWriter

PHOTOGRAPHS = ('chelsea.png', 'camera.png')
CLIP_PHOTOGRAPH = 'rocket.jpg'
SIZE = (320, 214)
# Diameters as fractions of the height.
SHAPE_SIZES = (0.28, 0.4)
# Vivid colours are what the model knows the shapes by; the set's backgrounds have little of them.
SATURATION = 0.3
CLIP_SECONDS, CLIP_RATE = 4, 10
LIGHT = math.pi / 4


def draw_scenes(folder: Path, seed: int = 7) -> list[Path]:
    """Draw two pictures and a clip, on photographs that scikit-image brings.

    Args:
        folder: Where they go.
        seed: Decides which shapes there are, and where.

    Returns:
        Their paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    paths = []
    for name in PHOTOGRAPHS:
        places = [(0.22, 0.3), (0.72, 0.55), (0.46, 0.85)]
        shapes = draw_shapes(rng, [int(number) for number in rng.permutation(len(CLASSES))[:3]])
        scene = put_on(read_photograph(name), list(zip(shapes, places, strict=True)))
        paths.append(folder / name)
        cv2.imwrite(str(paths[-1]), scene)
    paths.append(folder / 'clip.mp4')
    write_clip(paths[-1], read_photograph(CLIP_PHOTOGRAPH), draw_shapes(rng, range(len(CLASSES))))
    return paths


def read_photograph(name: str) -> np.ndarray:
    """A photograph in muted colours, fine pixels for the shapes, float BGR from 0 to 1."""
    photograph = cv2.imread(str(Path(skimage.data_dir) / name)).astype(np.float32) / 255
    gray = photograph.mean(axis=2, keepdims=True)
    muted = gray + SATURATION * (photograph - gray)
    size = tuple(SUPERSAMPLING * side for side in SIZE)
    return cv2.resize(muted, size, interpolation=cv2.INTER_AREA)


def draw_shapes(rng: np.random.Generator, labels: list[int] | range) -> list[Sprite]:
    """A shape of each of the classes."""
    height = SUPERSAMPLING * SIZE[1]
    return [
        draw_sprite(rng, CLASSES[label], rng.uniform(*SHAPE_SIZES) * height, LIGHT)
        for label in labels
    ]


def put_on(photograph: np.ndarray, placed: list[tuple[Sprite, tuple[float, float]]]) -> np.ndarray:
    """Put shapes on a photograph.

    Args:
        photograph: As :func:`read_photograph` returns it; not changed.
        placed: Shapes and the centres of each, (x, y) as fractions of the picture.

    Returns:
        The scene, (height, width, 3), uint8, BGR.
    """
    canvas = photograph.copy()
    height, width = canvas.shape[:2]
    owner = np.zeros((height, width), np.uint8)
    for number, (sprite, (x, y)) in enumerate(placed, start=1):
        window = window_around(y * height, x * width, sprite.mask.shape, owner.shape)
        paste(canvas, owner, sprite, window, number)
    scene = cv2.resize(canvas, SIZE, interpolation=cv2.INTER_AREA)
    return (scene.clip(0, 1) * 255).round().astype(np.uint8)


def write_clip(path: Path, photograph: np.ndarray, shapes: list[Sprite]) -> None:
    """Write a clip in which shapes go round, each on a path of its own."""
    with VideoWriter(path, *SIZE, time_base=Fraction(1, CLIP_RATE), frame_rate=CLIP_RATE) as video:
        for frame in range(CLIP_SECONDS * CLIP_RATE):
            angle = 2 * math.pi * frame / (CLIP_SECONDS * CLIP_RATE)
            placed = [
                (shape, circling(angle, number / len(shapes)))
                for number, shape in enumerate(shapes)
            ]
            video.write(put_on(photograph, placed), frame)


def circling(angle: float, share: float) -> tuple[float, float]:
    """A place on a flat figure of eight that is a share of the way ahead."""
    angle += 2 * math.pi * share
    return 0.5 + 0.38 * math.cos(angle), 0.5 + 0.3 * math.sin(2 * angle)
