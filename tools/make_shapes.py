"""Draw the shapes set: small synthetic pictures to train and try the models on.

Every picture shows two to six textured shapes that overlap on a muted, textured background. The
six classes differ in outline, texture and hue, and vary in hue, size, rotation, texture and light,
so that a small network learns them from nothing in minutes while there is still something to learn.

The same pictures are written in two layouts, so that mmdet and mmseg read them with the dataset
types they already have::

    OUT/parameters.json                            what the set was drawn with
    OUT/classes.txt                                background, then the classes, one a line
    OUT/coco/annotations/instances_{train,val}2017.json
    OUT/coco/{train,val}2017/*.jpg
    OUT/ade/images/{training,validation}/*.jpg
    OUT/ade/annotations/{training,validation}/*.png

The PNGs follow ADE20K: 0 would be "unlabelled", 1 is the background and 2, 3, ... are the classes,
so that mmseg's ``reduce_zero_label=True`` turns them into the lines of classes.txt counted from 0.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NoReturn

import cv2
import numpy as np
from pycocotools import mask as coco_mask
from tqdm import tqdm

EXAMPLES = """\
examples:
  python tools/make_shapes.py
      400 + 80 pictures of 160x160 in data/shapes
  python tools/make_shapes.py /tmp/shapes --train 20 --val 5 --size 96x128
      a tiny set of pictures 96 high and 128 wide
  python tools/make_shapes.py --train 2000 --overwrite
      a larger set in place of the first; its first 400 pictures stay the same
"""

# Raise it with every change to what is drawn, so that an older set is not taken for a current one.
VERSION = 1
JPEG_QUALITY = 92
SIDE_LIMITS = (32, 2048)

# Everything is drawn on a canvas this many times finer than the picture. Averaging it down
# anti-aliases the colours; it is odd so that one fine pixel lies on the centre of every pixel,
# which gives the label map its crisp borders.
SUPERSAMPLING = 3

OBJECTS_PER_PICTURE = (2, 6)
# Diameters as fractions of the shorter side of the picture.
OBJECT_SIZES = (1 / 6, 1 / 2)
# The part of an object that must stay in sight, neither cut off nor hidden by later objects.
MIN_VISIBLE = 0.35
PLACEMENT_TRIES = 20


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameters:
    """All that decides what a set holds: equal parameters give equal files."""

    train: int
    val: int
    height: int
    width: int
    seed: int
    version: int = VERSION


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit code: 0 if the set is there, 2 on an error, 130 on Ctrl-C."""
    args = parse_args(argv)
    height, width = args.size
    parameters = Parameters(args.train, args.val, height, width, args.seed)
    try:
        if is_already_there(args.out, parameters, args.overwrite):
            print(f'{args.out} is already there, with the same parameters; nothing to do')
            return 0
        objects = write_dataset(args.out, parameters)
    except OSError as error:
        print(f'make_shapes.py: error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('make_shapes.py: interrupted; nothing was written', file=sys.stderr)
        return 130
    print_summary(args.out, parameters, objects)
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineErrorParser(
        prog='make_shapes.py',
        description='Draw a small synthetic set of textured shapes, in COCO and ADE20K layout.',
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        'out',
        nargs='?',
        type=Path,
        default=Path('data/shapes'),
        metavar='OUT',
        help='folder to write (default: data/shapes)',
    )
    parser.add_argument(
        '--train', type=picture_count, default=400, metavar='N', help='training pictures (400)'
    )
    parser.add_argument(
        '--val', type=picture_count, default=80, metavar='N', help='validation pictures (80)'
    )
    parser.add_argument(
        '--size',
        type=image_size,
        default=(160, 160),
        metavar='SIDE|HxW',
        help='picture size in pixels, 32 to 2048 a side (160)',
    )
    parser.add_argument(
        '--seed', type=seed_number, default=0, metavar='N', help='another seed, another set (0)'
    )
    parser.add_argument(
        '--overwrite', action='store_true', help='replace a set that OUT already holds'
    )
    return parser.parse_args(argv)


class OneLineErrorParser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose errors are not preceded by the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'{self.prog}: error: {message}\n')


def picture_count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not a number of pictures, 1 or more')
    return int(text)


def image_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r'(\d+)(?:x(\d+))?', text)
    if not match:
        raise argparse.ArgumentTypeError(f'{text!r} is neither a side such as 160 nor HxW')
    height = int(match[1])
    width = int(match[2] or height)
    low, high = SIDE_LIMITS
    if not (low <= height <= high and low <= width <= high):
        raise argparse.ArgumentTypeError(f'{text!r} is not within {low} to {high} pixels a side')
    return height, width


def seed_number(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number from 0 to 2**32 - 1')
    return int(text)


def print_summary(out: Path, parameters: Parameters, objects: dict[str, Counter[str]]) -> None:
    print(f'{"objects":>10}' + ''.join(f'{shape.name:>10}' for shape in CLASSES))
    for split, counts in objects.items():
        print(f'{split:>10}' + ''.join(f'{counts[shape.name]:>10}' for shape in CLASSES))
    print(
        f'{parameters.train} training and {parameters.val} validation pictures '
        f'of {parameters.height}x{parameters.width} written to {out}'
    )


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """A part of the set and the names that the two layouts have for it."""

    name: str
    coco: str
    ade: str


SPLITS = (Split('train', 'train2017', 'training'), Split('val', 'val2017', 'validation'))


def is_already_there(out: Path, parameters: Parameters, overwrite: bool) -> bool:
    """Tell whether ``out`` holds the wanted set, so that nothing is to be written.

    Raises:
        NotADirectoryError: ``out``, or a folder it should lie in, is a file.
        FileExistsError: ``out`` holds something else: files that are no shapes set, which are never
            replaced, or a set with other parameters while ``overwrite`` is not given.
    """
    for path in (out, *out.parents):
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(f'{path} is not a folder')
    if not out.exists() or not any(out.iterdir()):
        return False
    found = read_parameters(out)
    if found is None:
        raise FileExistsError(f'{out} holds files that are no shapes set; choose another folder')
    if overwrite:
        return False
    if found == asdict(parameters):
        return True
    raise FileExistsError(
        f'{out} is a shapes set with other parameters; choose another folder or add --overwrite'
    )


def read_parameters(out: Path) -> dict[str, int] | None:
    """Read what the set in ``out`` was drawn with; None if ``out`` is not the work of this tool."""
    try:
        found = json.loads((out / 'parameters.json').read_text())
    except (FileNotFoundError, ValueError):
        return None
    names = {field.name for field in fields(Parameters)}
    return found if isinstance(found, dict) and found.keys() == names else None


def write_dataset(out: Path, parameters: Parameters) -> dict[str, Counter[str]]:
    """Write a whole set to ``out``, in place of a set that is there.

    The files are written to a temporary folder beside ``out``, which is renamed when all of them
    are there: an interrupted run leaves nothing that could pass for a set.

    Returns:
        For each split ('train', 'val') the number of objects of each class, by class name.

    Raises:
        OSError: ``out`` cannot be written.
    """
    # A rename would replace a link to the folder, not the folder.
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{out.name}-', dir=out.parent) as temporary:
        # mkdtemp's folder is closed to other users; one made inside has the usual permissions.
        root = Path(temporary, 'new')
        root.mkdir()
        objects = {split.name: write_split(root, split, parameters) for split in SPLITS}
        names = ['background', *(shape.name for shape in CLASSES)]
        (root / 'classes.txt').write_text('\n'.join(names) + '\n')
        (root / 'parameters.json').write_text(json.dumps(asdict(parameters), indent=2) + '\n')
        if out.exists():
            out.rename(Path(temporary, 'old'))
        root.rename(out)
    return objects


def write_split(root: Path, split: Split, parameters: Parameters) -> Counter[str]:
    coco_images = root / 'coco' / split.coco
    ade_images = root / 'ade' / 'images' / split.ade
    ade_labels = root / 'ade' / 'annotations' / split.ade
    coco_annotations = root / 'coco' / 'annotations'
    for folder in (coco_images, ade_images, ade_labels, coco_annotations):
        folder.mkdir(parents=True, exist_ok=True)

    images: list[dict] = []
    annotations: list[dict] = []
    # disable=None: no progress bar in a log file.
    for index in tqdm(range(getattr(parameters, split.name)), split.name, disable=None):
        # A generator for each picture: a larger set begins with the pictures of a smaller one.
        rng = np.random.default_rng((parameters.seed, SPLITS.index(split), index))
        image, label_map, instances = draw_picture(rng, parameters.height, parameters.width)

        stem = f'{split.name}_{index + 1:06d}'
        image_path = coco_images / f'{stem}.jpg'
        write_image(image_path, image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        link_or_copy(image_path, ade_images / image_path.name)
        write_image(ade_labels / f'{stem}.png', label_map + 1)

        images.append(coco_image(index + 1, image_path.name, image))
        for instance in instances:
            annotations.append(coco_annotation(len(annotations) + 1, index + 1, instance))

    document = coco_document(images, annotations)
    (coco_annotations / f'instances_{split.coco}.json').write_text(json.dumps(document))
    return Counter(CLASSES[annotation['category_id'] - 1].name for annotation in annotations)


def write_image(path: Path, image: np.ndarray, options: Sequence[int] = ()) -> None:
    # cv2.imwrite would report a full disk only by returning False.
    _, data = cv2.imencode(path.suffix, image, options)
    path.write_bytes(data)


def link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


# ------------------------------------------------------------------------------------------------
# COCO annotations
# ------------------------------------------------------------------------------------------------


def coco_document(images: list[dict], annotations: list[dict]) -> dict:
    return {
        'info': {'description': 'Synthetic textured shapes', 'version': str(VERSION)},
        'licenses': [
            {
                'id': 1,
                'name': 'CC0 1.0',
                'url': 'https://creativecommons.org/publicdomain/zero/1.0/',
            }
        ],
        'categories': [
            {'id': label, 'name': shape.name, 'supercategory': 'shape'}
            for label, shape in enumerate(CLASSES, start=1)
        ],
        'images': images,
        'annotations': annotations,
    }


def coco_image(image_id: int, file_name: str, image: np.ndarray) -> dict:
    height, width = image.shape[:2]
    return {
        'id': image_id,
        'file_name': file_name,
        'height': height,
        'width': width,
        'license': 1,
    }


def coco_annotation(annotation_id: int, image_id: int, instance: Instance) -> dict:
    """Describe the visible part of one object; ids count from 1, as COCOeval takes 0 for "none"."""
    x, y, width, height = cv2.boundingRect(instance.mask.astype(np.uint8))
    return {
        'id': annotation_id,
        'image_id': image_id,
        'category_id': instance.label,
        'bbox': [x, y, width, height],
        'area': int(instance.mask.sum()),
        'segmentation': coco_segmentation(instance.mask),
        'iscrowd': 0,
    }


def coco_segmentation(mask: np.ndarray) -> list[list[float]] | dict:
    """Encode a mask as COCO does: as polygons, or as compressed RLE if it has holes.

    Args:
        mask: ``(H, W)`` bool.

    Returns:
        ``[[x0, y0, x1, y1, ...], ...]``, one polygon for each part, in pixels from the upper left
        corner of the picture; or ``{'size': [H, W], 'counts': str}``.
    """
    # OpenCV leads a contour through the centres of the border pixels, so that it would be undecided
    # whether these belong to the polygon. At twice the resolution it runs a quarter of a pixel
    # outside of their centres, and the polygon holds exactly the pixels of the mask.
    doubled = mask.astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    contours, hierarchy = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    parents = hierarchy[0, :, 3]
    if (parents >= 0).any():
        rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
        return {'size': rle['size'], 'counts': rle['counts'].decode('ascii')}
    return [((contour + 0.5) / 2).ravel().tolist() for contour in contours]


# ------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instance:
    """One object of a picture.

    Attributes:
        label: Class, counted from 1 in the order of ``CLASSES``.
        mask: ``(H, W)`` bool, the pixels in which the object is visible.
    """

    label: int
    mask: np.ndarray


def draw_picture(
    rng: np.random.Generator, height: int, width: int
) -> tuple[np.ndarray, np.ndarray, list[Instance]]:
    """Draw one picture of overlapping shapes.

    Args:
        rng: Decides everything about the picture.
        height: Height of the picture in pixels.
        width: Width of the picture in pixels.

    Returns:
        The picture, ``(height, width, 3)`` uint8 in BGR order; its label map, ``(height, width)``
        uint8, in which 0 is the background and 1, 2, ... are ``CLASSES``; and its objects from the
        rearmost to the foremost. The masks of the objects are disjoint, and together they are the
        label map.
    """
    # The background has no edges that would need anti-aliasing.
    canvas = draw_background(rng, height, width)
    canvas = canvas.repeat(SUPERSAMPLING, axis=0).repeat(SUPERSAMPLING, axis=1)
    # Which object is in sight, 0 for none: the number of the object, counted from 1 as it is drawn.
    owner = np.zeros(canvas.shape[:2], np.uint8)
    labels: list[int] = []
    areas: list[int] = []
    light = rng.uniform(0, 2 * np.pi)

    for label in choose_labels(rng):
        size = rng.uniform(*OBJECT_SIZES) * min(owner.shape)
        sprite = draw_sprite(rng, CLASSES[label - 1], size, light)
        window = find_place(rng, sprite, owner, areas)
        if window is not None:
            labels.append(label)
            areas.append(np.count_nonzero(sprite.mask))
            paste(canvas, owner, sprite, window, number=len(labels))

    image = develop(rng, cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA))
    centre = SUPERSAMPLING // 2
    owner = owner[centre::SUPERSAMPLING, centre::SUPERSAMPLING]
    label_map = np.array([0, *labels], np.uint8)[owner]
    instances = [Instance(label, owner == number) for number, label in enumerate(labels, start=1)]
    return image, label_map, instances


def choose_labels(rng: np.random.Generator) -> list[int]:
    # Dealt from a deck that holds every class twice, the classes are balanced even in small sets,
    # and a picture may still show two objects of a class.
    deck = np.repeat(np.arange(len(CLASSES)) + 1, 2)
    low, high = OBJECTS_PER_PICTURE
    return rng.permutation(deck)[: rng.integers(low, high + 1)].tolist()


def develop(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Turn a drawn picture, float BGR in 0..1, into a "photo": brightness, colour cast, noise."""
    brightness = rng.uniform(0.75, 1.15)
    cast = rng.uniform(0.95, 1.05, 3)
    noise = rng.uniform(0.01, 0.03) * rng.standard_normal(image.shape)
    return np.clip((image * brightness * cast + noise) * 255, 0, 255).round().astype(np.uint8)


# ------------------------------------------------------------------------------------------------
# Placing
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sprite:
    """An object by itself, not yet in a picture: square arrays of ``S`` fine pixels a side.

    Attributes:
        colour: ``(S, S, 3)`` float32 in BGR order, about 0..1.
        mask: ``(S, S)`` bool, the fine pixels that are the object's.
        shadow: ``(S, S)`` float32, how much of the light it takes from what lies behind, 0..1.
    """

    colour: np.ndarray
    mask: np.ndarray
    shadow: np.ndarray


@dataclass(frozen=True)
class Window:
    """Where a sprite and the canvas overlap: the same rows and columns, as seen by each."""

    canvas: tuple[slice, slice]
    sprite: tuple[slice, slice]


def find_place(
    rng: np.random.Generator, sprite: Sprite, owner: np.ndarray, areas: list[int]
) -> Window | None:
    """Look for a place where enough of the sprite and of all earlier objects stays visible.

    Args:
        rng: Chooses the places to try.
        sprite: What to place.
        owner: ``(H, W)`` uint8, the number of the object in sight in each fine pixel, 0 for none.
        areas: For each earlier object all its fine pixels, hidden ones included.

    Returns:
        The place, or None if ``PLACEMENT_TRIES`` tries found none.
    """
    visible = np.bincount(owner.ravel(), minlength=len(areas) + 1)[1:]
    needed = MIN_VISIBLE * np.array(areas)
    for _ in range(PLACEMENT_TRIES):
        centre_y, centre_x = rng.uniform(0.05, 0.95, 2) * owner.shape
        window = window_around(centre_y, centre_x, sprite.mask.shape, owner.shape)
        mask = sprite.mask[window.sprite]
        if np.count_nonzero(mask) < MIN_VISIBLE * np.count_nonzero(sprite.mask):
            continue
        hidden = np.bincount(owner[window.canvas][mask], minlength=len(areas) + 1)[1:]
        if (visible - hidden >= needed).all():
            return window
    return None


def window_around(
    centre_y: float, centre_x: float, sprite_shape: tuple[int, int], canvas_shape: tuple[int, int]
) -> Window:
    on_canvas: list[slice] = []
    on_sprite: list[slice] = []
    for centre, sprite_side, canvas_side in zip(
        (centre_y, centre_x), sprite_shape, canvas_shape, strict=True
    ):
        first = round(centre - sprite_side / 2)
        start, stop = max(first, 0), min(first + sprite_side, canvas_side)
        on_canvas.append(slice(start, stop))
        on_sprite.append(slice(start - first, stop - first))
    return Window(tuple(on_canvas), tuple(on_sprite))


def paste(
    canvas: np.ndarray, owner: np.ndarray, sprite: Sprite, window: Window, number: int
) -> None:
    """Draw a sprite and its shadow over what is on the canvas, and note it in ``owner``."""
    behind = canvas[window.canvas]
    mask = sprite.mask[window.sprite]
    behind *= 1 - sprite.shadow[window.sprite][..., None]
    behind[mask] = sprite.colour[window.sprite][mask]
    owner[window.canvas][mask] = number


# ------------------------------------------------------------------------------------------------
# Background and objects
# ------------------------------------------------------------------------------------------------


def draw_background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Blend two muted colours by a gradient across the picture and by noise.

    Returns:
        ``(height, width, 3)`` float32 in BGR order, 0..1.
    """
    first, second = (
        bgr(rng.uniform(0, 360), rng.uniform(0.05, 0.3), rng.uniform(0.3, 0.8)) for _ in range(2)
    )
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, width, dtype=np.float32)
    gradient, _ = turn(x, y, rng.uniform(0, 2 * np.pi))
    # As many cells down as across look like clouds, many more of the one like brushed stripes.
    cells = tuple(np.exp(rng.uniform(np.log(2), np.log(20), 2)).astype(int))
    noise = fractal_noise(rng, (height, width), cells)
    blend = 0.5 + 0.5 * np.tanh(gradient + np.float32(rng.uniform(0.8, 4)) * noise)
    return first + (second - first) * blend[..., None]


def draw_sprite(rng: np.random.Generator, shape: ShapeClass, size: float, light: float) -> Sprite:
    """Draw one object of a class: at a random angle, in random colours and texture.

    Args:
        rng: Decides how the object looks.
        shape: Its class.
        size: Its diameter in fine pixels.
        light: The direction in which its shadow falls, in radians.
    """
    # The unit shapes reach out to 1.25 radii; the rest is room for the shadow.
    x = np.linspace(-1.6, 1.6, round(1.6 * size), dtype=np.float32)
    y = x[:, None]
    u, v = turn(x, y, rng.uniform(0, 2 * np.pi))
    mask = shape.contains(u, v / rng.uniform(0.8, 1))

    pattern = shape.texture(u, v, rng.uniform(0.45, 0.75), rng.uniform())
    first, second = choose_colours(rng, shape.hues)
    away_from_light, _ = turn(x, y, light)
    grain = fractal_noise(rng, mask.shape, (8, 8))
    brightness = 0.95 - 0.15 * away_from_light + 0.25 * grain
    colour = (first + (second - first) * pattern[..., None]) * brightness[..., None]
    return Sprite(colour, mask, cast_shadow(mask, size, light))


def turn(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Give the coordinates of the points (x, y) along axes turned by ``angle`` radians."""
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return x * cos + y * sin, y * cos - x * sin


def choose_colours(
    rng: np.random.Generator, hues: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Choose a vivid colour in a range of hues, and a much paler or darker one to go with it."""
    hue = rng.uniform(*hues)
    saturation = rng.uniform(0.6, 0.95)
    value = rng.uniform(0.65, 0.95)
    if rng.uniform() < 0.5:
        return bgr(hue, saturation, value), bgr(hue, 0.3 * saturation, 0.97)
    return bgr(hue, saturation, value), bgr(hue, saturation, 0.45 * value)


def cast_shadow(mask: np.ndarray, size: float, light: float) -> np.ndarray:
    offset = 0.06 * size
    move = np.float32([[1, 0, offset * np.cos(light)], [0, 1, offset * np.sin(light)]])
    moved = cv2.warpAffine(mask.astype(np.float32), move, mask.shape[::-1])
    return 0.5 * cv2.GaussianBlur(moved, (0, 0), 0.04 * size)


def fractal_noise(
    rng: np.random.Generator, shape: tuple[int, int], cells: tuple[int, int]
) -> np.ndarray:
    """Sum smooth noise of four scales, each twice as fine and 0.6 times as strong as the last.

    Args:
        rng: Source of the noise.
        shape: Height and width of the result in pixels.
        cells: How many random values the coarsest noise has down and across.

    Returns:
        float32 of the given shape, with mean near 0 and most values within -0.5..0.5.
    """
    height, width = shape
    total = np.zeros(shape, np.float32)
    for octave in range(4):
        values = rng.random([count << octave for count in cells], np.float32) - 0.5
        total += 0.6**octave * cv2.resize(values, (width, height), interpolation=cv2.INTER_CUBIC)
    return total


def bgr(hue: float, saturation: float, value: float) -> np.ndarray:
    """Convert a colour from HSV (hue in degrees, the others 0..1) to float32 BGR, 0..1."""
    hsv = np.float32([[[hue % 360, saturation, value]]])
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0, 0]


# ------------------------------------------------------------------------------------------------
# Outlines: which points (u, v) of the plane belong to the unit shape, about 2 in diameter
# ------------------------------------------------------------------------------------------------


def disc(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.hypot(u, v) < 1


def square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(u), np.abs(v)) < 0.85


def triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    along, _ = fold(u, v, 3)
    return along < 0.62


def star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # Folded, a star of five points is one edge: from the tip on the axis to the notch beside it.
    tip, notch = 1.2, 0.66
    notch_u, notch_v = notch * np.cos(np.pi / 5), notch * np.sin(np.pi / 5)
    along, across = fold(u, v, 5)
    return (along - tip) * notch_v < across * (notch_u - tip)


def cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    near, far = np.minimum(np.abs(u), np.abs(v)), np.maximum(np.abs(u), np.abs(v))
    return (near < 0.4) & (far < 1.05)


def ring(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    radius = np.hypot(u, v)
    return (radius < 1.05) & (radius > 0.45)


def fold(u: np.ndarray, v: np.ndarray, times: int) -> tuple[np.ndarray, np.ndarray]:
    """Lay all sectors of a shape with rotational and mirror symmetry over the half of one.

    Returns:
        The coordinates along the axis of the sector and, never negative, across it.
    """
    sector = 2 * np.pi / times
    angle = np.abs((np.arctan2(v, u) + sector / 2) % sector - sector / 2)
    radius = np.hypot(u, v)
    return radius * np.cos(angle), radius * np.sin(angle)


# ------------------------------------------------------------------------------------------------
# Textures: the share of the second colour, 0..1, at the points (u, v) of the unit shape. A texture
# repeats after ``period`` and is shifted by ``phase`` periods, 0..1.
# ------------------------------------------------------------------------------------------------


def ripples(u: np.ndarray, v: np.ndarray, period: float, phase: float) -> np.ndarray:
    return bars(np.hypot(u, v), period, phase)


def checks(u: np.ndarray, v: np.ndarray, period: float, phase: float) -> np.ndarray:
    return np.abs(bars(u, period, phase) - bars(v, period, phase))


def stripes(u: np.ndarray, v: np.ndarray, period: float, phase: float) -> np.ndarray:
    return bars(v, period, phase)


def dots(u: np.ndarray, v: np.ndarray, period: float, phase: float) -> np.ndarray:
    to_dot_u = (u / period + phase) % 1 - 0.5
    to_dot_v = (v / period + phase) % 1 - 0.5
    return (np.hypot(to_dot_u, to_dot_v) < 0.32).astype(np.float32)


def plaid(u: np.ndarray, v: np.ndarray, period: float, phase: float) -> np.ndarray:
    return (bars(u, period, phase) + bars(v, period, phase)) / 2


def sectors(u: np.ndarray, v: np.ndarray, period: float, phase: float) -> np.ndarray:
    # A whole number of sectors, so that they meet where the circle closes.
    return bars(np.arctan2(v, u) / (2 * np.pi), 1 / round(3 / period), phase)


def bars(distance: np.ndarray, period: float, phase: float) -> np.ndarray:
    return ((distance / period + phase) % 1 < 0.5).astype(np.float32)


# ------------------------------------------------------------------------------------------------
# Classes
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShapeClass:
    """What the objects of a class have in common.

    Attributes:
        name: Name of the class.
        contains: Tells which points of the plane belong to the unit shape.
        texture: Blends the two colours of an object.
        hues: Range of its hues in degrees; those of neighbouring classes overlap a little, so that
            colour alone does not tell the class.
    """

    name: str
    contains: Callable[[np.ndarray, np.ndarray], np.ndarray]
    texture: Callable[[np.ndarray, np.ndarray, float, float], np.ndarray]
    hues: tuple[float, float]


CLASSES = (
    ShapeClass('disc', disc, ripples, (-25, 35)),
    ShapeClass('square', square, checks, (195, 255)),
    ShapeClass('triangle', triangle, stripes, (75, 155)),
    ShapeClass('star', star, dots, (25, 80)),
    ShapeClass('cross', cross, plaid, (245, 335)),
    ShapeClass('ring', ring, sectors, (145, 205)),
)


if __name__ == '__main__':
    sys.exit(main())
