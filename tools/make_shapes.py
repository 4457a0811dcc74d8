"""Draw the shapes dataset: small synthetic images to train and try the models on.

Each image shows two to six textured shapes that overlap on a muted background. The six classes
differ in outline, texture and hue: a small network learns them from scratch in minutes, but not
trivially. The same images are in COCO's layout in ``OUT/coco`` and in ADE20K's in ``OUT/ade``,
whose PNGs have 1 for the background and 2, 3, ... for the classes. Beside them are ``classes.txt``
and ``parameters.json``, which tells datasets apart.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from _requirements import explain_missing

with explain_missing():
    import cv2
    import numpy as np
    from _arguments import image_size, make_parser, positive
    from pycocotools import mask as coco_mask

    from backbones.progress import ProgressBar

EXAMPLES = """\
examples:
  python tools/make_shapes.py
      400 + 80 images of 160x160 in data/shapes
  python tools/make_shapes.py /tmp/shapes --train 2000 --val 5 --size 96x128
      images 96 high and 128 wide; a larger dataset begins with the images of a smaller one
"""
# Raise it with every change to the drawings, so that an older dataset is not taken for a current.
VERSION = 1
# The names of a split: ours, in COCO's layout, in ADE20K's.
SPLITS = (('train', 'train2017', 'training'), ('val', 'val2017', 'validation'))
# Everything is drawn on a canvas this many times finer, and averaged down. It is odd, so that one
# fine pixel is at the center of every pixel: the segmentation map takes that one.
SUPERSAMPLING = 3
OBJECTS_PER_IMAGE = (2, 6)
# Diameters as fractions of the image's shorter side.
OBJECT_SIZES = (1 / 6, 1 / 2)
# The part of an object that must stay visible, neither cut off nor hidden by later objects.
MIN_VISIBLE = 0.35
PLACEMENT_TRIES = 20

# Ranges in degrees. Neighbors overlap, so that color alone does not tell the class.
HUES = {
    'disc': (-25, 35),
    'square': (195, 255),
    'triangle': (75, 155),
    'star': (25, 80),
    'cross': (245, 335),
    'ring': (145, 205),
}
CLASSES = tuple(HUES)
# Which points (u, v) belong to the unit shape, about 2 in diameter.
OUTLINES = {
    'disc': lambda u, v: np.hypot(u, v) < 1,
    'square': lambda u, v: np.maximum(np.abs(u), np.abs(v)) < 0.85,
    'triangle': lambda u, v: fold(u, v, 3)[0] < 0.62,
    'star': lambda u, v: star(*fold(u, v, 5)),
    'cross': lambda u, v: (np.minimum(abs(u), abs(v)) < 0.4) & (np.maximum(abs(u), abs(v)) < 1.05),
    'ring': lambda u, v: (np.hypot(u, v) < 1.05) & (np.hypot(u, v) > 0.45),
}
# The share of the second color, 0 to 1, at the points (u, v); ``how`` is period and phase (in
# periods).
TEXTURES = {
    'disc': lambda u, v, *how: bars(np.hypot(u, v), *how),
    'square': lambda u, v, *how: np.abs(bars(u, *how) - bars(v, *how)),
    'triangle': lambda u, v, *how: bars(v, *how),
    'star': lambda u, v, *how: dots(u, v, *how),
    'cross': lambda u, v, *how: (bars(u, *how) + bars(v, *how)) / 2,
    # A whole number of sectors, so that they meet where the circle closes.
    'ring': lambda u, v, period, phase: bars(
        np.arctan2(v, u) / (2 * np.pi), 1 / round(3 / period), phase
    ),
}


def fold(u: np.ndarray, v: np.ndarray, times: int) -> tuple[np.ndarray, np.ndarray]:
    """Fold all sectors of a symmetric shape onto half of one: (along its axis, across >= 0)."""
    sector = 2 * np.pi / times
    angle = np.abs((np.arctan2(v, u) + sector / 2) % sector - sector / 2)
    radius = np.hypot(u, v)
    return radius * np.cos(angle), radius * np.sin(angle)


def star(along: np.ndarray, across: np.ndarray) -> np.ndarray:
    # A folded star is one edge, from the tip on the axis to the notch beside it.
    tip, notch_u, notch_v = 1.2, 0.66 * np.cos(np.pi / 5), 0.66 * np.sin(np.pi / 5)
    return (along - tip) * notch_v < across * (notch_u - tip)


def bars(distance: np.ndarray, period: float, phase: float) -> np.ndarray:
    return ((distance / period + phase) % 1 < 0.5).astype(np.float32)


def dots(u: np.ndarray, v: np.ndarray, period: float, phase: float) -> np.ndarray:
    to_u, to_v = (u / period + phase) % 1 - 0.5, (v / period + phase) % 1 - 0.5
    return (np.hypot(to_u, to_v) < 0.32).astype(np.float32)


def draw_image(
    rng: np.random.Generator, height: int, width: int, background: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, list[tuple[int, np.ndarray]]]:
    """Draw an image of overlapping shapes on a background, (height, width, 3) float32 BGR, 0 to 1.

    Returns the image, uint8; its segmentation map, uint8, with 0 for the background and 1, 2, ...
    for ``CLASSES``; and from the rearmost to the foremost object its class and visible mask.
    """
    # The background has no edges that would need anti-aliasing. A margin around the image saves
    # clipping objects at the border.
    margin = round(OBJECT_SIZES[1] * SUPERSAMPLING * min(height, width))
    background = draw_background(rng, height, width) if background is None else background
    canvas = background.repeat(SUPERSAMPLING, 0).repeat(SUPERSAMPLING, 1)
    canvas = np.pad(canvas, ((margin, margin), (margin, margin), (0, 0)))
    # The visible object at each pixel, counted from 1 in the order of drawing; 0 for none.
    owner = np.zeros(canvas.shape[:2], np.uint8)
    inside = (slice(margin, -margin), slice(margin, -margin))
    labels, areas = [], []
    light = rng.uniform(0, 2 * np.pi)
    # A deck that holds every class twice keeps classes balanced even in small datasets.
    deck = rng.permutation(np.repeat(np.arange(len(CLASSES)) + 1, 2))
    for label in deck[: rng.integers(OBJECTS_PER_IMAGE[0], OBJECTS_PER_IMAGE[1] + 1)].tolist():
        size = rng.uniform(*OBJECT_SIZES) * SUPERSAMPLING * min(height, width)
        color, mask, shadow = draw_object(rng, CLASSES[label - 1], size, light)
        area, side = np.count_nonzero(mask), len(mask)
        for _ in range(PLACEMENT_TRIES):
            center = rng.uniform(0.05, 0.95, 2) * owner[inside].shape + margin
            window = tuple(slice(first := round(c - side / 2), first + side) for c in center)
            after = owner.copy()
            after[window][mask] = len(labels) + 1
            visible = np.bincount(after[inside].ravel(), minlength=len(labels) + 2)[1:]
            if (visible >= MIN_VISIBLE * np.array([*areas, area])).all():
                canvas[window] *= 1 - shadow[..., None]
                canvas[window][mask] = color[mask]
                owner = after
                labels.append(label)
                areas.append(area)
                break

    canvas, owner = canvas[inside], owner[inside]
    image = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA)
    # The effects of a camera: brightness, color cast, noise.
    image = image * rng.uniform(0.75, 1.15) * rng.uniform(0.95, 1.05, 3)
    image += rng.uniform(0.01, 0.03) * rng.standard_normal(image.shape)
    image = np.clip(image * 255, 0, 255).round().astype(np.uint8)
    center = SUPERSAMPLING // 2
    owner = owner[center::SUPERSAMPLING, center::SUPERSAMPLING]
    segmentation_map = np.array([0, *labels], np.uint8)[owner]
    return image, segmentation_map, [(label, owner == i) for i, label in enumerate(labels, 1)]


def draw_background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Blend two muted colors by a gradient and by noise: (height, width, 3) float32 BGR, 0 to 1."""
    first, second = (
        bgr(rng.uniform(0, 360), rng.uniform(0.05, 0.3), rng.uniform(0.3, 0.8)) for _ in range(2)
    )
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, width, dtype=np.float32)
    gradient, _ = rotate(x, y, rng.uniform(0, 2 * np.pi))
    # As many cells down as across look like clouds, many more of one of them like brushed stripes.
    cells = np.exp(rng.uniform(np.log(2), np.log(20), 2)).astype(int)
    noise = fractal_noise(rng, (height, width), cells)
    blend = 0.5 + 0.5 * np.tanh(gradient + np.float32(rng.uniform(0.8, 4)) * noise)
    return first + (second - first) * blend[..., None]


def draw_object(
    rng: np.random.Generator, name: str, size: float, light: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw an object of a class, at a random angle and in random colors, in fine pixels.

    ``size`` is its diameter, ``light`` the direction of its shadow in radians. Returns its colors,
    float32 BGR, about 0 to 1; its mask; and its shadow, the share of light that it takes away.
    """
    # The unit shapes reach out to 1.25 radii; the rest is room for the shadow.
    x = np.linspace(-1.6, 1.6, round(1.6 * size), dtype=np.float32)
    y = x[:, None]
    u, v = rotate(x, y, rng.uniform(0, 2 * np.pi))
    mask = OUTLINES[name](u, v / rng.uniform(0.8, 1))
    pattern = TEXTURES[name](u, v, rng.uniform(0.45, 0.75), rng.uniform())
    hue, saturation, value = (
        rng.uniform(*limits) for limits in (HUES[name], (0.6, 0.95), (0.65, 0.95))
    )
    # A vivid color, and a much paler or darker one of the same hue.
    first = bgr(hue, saturation, value)
    pale = rng.uniform() < 0.5
    second = bgr(hue, 0.3 * saturation, 0.97) if pale else bgr(hue, saturation, 0.45 * value)
    grain = fractal_noise(rng, mask.shape, (8, 8))
    brightness = 0.95 - 0.15 * rotate(x, y, light)[0] + 0.25 * grain
    color = (first + (second - first) * pattern[..., None]) * brightness[..., None]

    offset = 0.06 * size
    move = np.float32([[1, 0, offset * np.cos(light)], [0, 1, offset * np.sin(light)]])
    moved = cv2.warpAffine(mask.astype(np.float32), move, mask.shape[::-1])
    return color, mask, 0.5 * cv2.GaussianBlur(moved, (0, 0), 0.04 * size)


def rotate(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the coordinates of the points (x, y) along axes rotated by ``angle`` radians."""
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return x * cos + y * sin, y * cos - x * sin


def fractal_noise(
    rng: np.random.Generator, shape: tuple[int, int], cells: Sequence[int]
) -> np.ndarray:
    """Sum smooth noise of four scales; the coarsest has ``cells`` random values down and across.
    The sum is float32, with a mean near 0 and most values from -0.5 to 0.5."""
    total = np.zeros(shape, np.float32)
    for octave in range(4):
        values = rng.random([int(count) << octave for count in cells], np.float32) - 0.5
        total += 0.6**octave * cv2.resize(values, shape[::-1], interpolation=cv2.INTER_CUBIC)
    return total


def bgr(hue: float, saturation: float, value: float) -> np.ndarray:
    """Convert a color from HSV (hue in degrees, the others 0 to 1) to float32 BGR, 0 to 1."""
    return cv2.cvtColor(np.float32([[[hue % 360, saturation, value]]]), cv2.COLOR_HSV2BGR)[0, 0]


def write_dataset(out: Path, parameters: dict[str, int]) -> None:
    """Write the dataset; its folder appears when it is complete."""
    # A rename would replace a symbolic link to the folder, not the folder.
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{out.name}-', dir=out.parent) as temporary:
        # Other users cannot read the temporary folder; one inside it has the usual permissions.
        root = Path(temporary, 'new')
        root.mkdir()
        for number in range(len(SPLITS)):
            write_split(root, number, parameters)
        (root / 'classes.txt').write_text('\n'.join(['background', *CLASSES]) + '\n')
        (root / 'parameters.json').write_text(json.dumps(parameters, indent=2) + '\n')
        root.rename(out)


def write_split(root: Path, number: int, parameters: dict[str, int]) -> None:
    split, coco, ade = SPLITS[number]
    images, copies = root / 'coco' / coco, root / 'ade' / 'images' / ade
    maps, annotation_folder = root / 'ade' / 'annotations' / ade, root / 'coco' / 'annotations'
    for folder in (images, copies, maps, annotation_folder):
        folder.mkdir(parents=True, exist_ok=True)
    height, width = parameters['height'], parameters['width']
    entries, annotations = [], []
    # disable=None: no progress bar in a log file.
    for index in ProgressBar(range(parameters[split]), split, disable=None):
        # A generator for each image: a larger dataset begins with the images of a smaller one.
        rng = np.random.default_rng((0, number, index))
        image, segmentation_map, objects = draw_image(rng, height, width)
        stem = f'{split}_{index + 1:06d}'
        # cv2.imwrite reports a full disk only by returning False.
        jpeg = cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, 92])[1]
        for folder in (images, copies):
            (folder / f'{stem}.jpg').write_bytes(jpeg)
        (maps / f'{stem}.png').write_bytes(cv2.imencode('.png', segmentation_map + 1)[1])
        entries.append(dict(id=index + 1, file_name=f'{stem}.jpg', height=height, width=width))
        annotations += [
            dict(
                # COCOeval takes an id of 0 for "none".
                id=len(annotations) + order,
                image_id=index + 1,
                category_id=label,
                bbox=list(cv2.boundingRect(mask.astype(np.uint8))),
                area=int(mask.sum()),
                segmentation=coco_segmentation(mask),
                iscrowd=0,
            )
            for order, (label, mask) in enumerate(objects, 1)
        ]
    document = dict(
        info=dict(description='Synthetic textured shapes', version=str(VERSION)),
        categories=[dict(id=i, name=name) for i, name in enumerate(CLASSES, 1)],
        images=entries,
        annotations=annotations,
    )
    (annotation_folder / f'instances_{coco}.json').write_text(json.dumps(document))


def coco_segmentation(mask: np.ndarray) -> dict:
    """Encode a mask, (H, W) bool, in COCO's run-length encoding."""
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return dict(size=rle['size'], counts=rle['counts'].decode('ascii'))


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(
        'Draw a small synthetic dataset of textured shapes, in COCO and ADE20K layout.', EXAMPLES
    )
    add = parser.add_argument
    add('out', nargs='?', type=Path, default=Path('data/shapes'), metavar='OUT', help='data/shapes')
    add('--train', type=positive, default=400, metavar='N', help='training images (400)')
    add('--val', type=positive, default=80, metavar='N', help='validation images (80)')
    add('--size', type=image_size, default=(160, 160), metavar='HEIGHTxWIDTH', help='160x160')
    args = parser.parse_args(argv)
    height, width = args.size
    if min(args.size) < 32:
        parser.error('--size: images must be at least 32x32')
    parameters = dict(train=args.train, val=args.val, height=height, width=width, version=VERSION)
    file = args.out / 'parameters.json'
    if file.is_file() and file.read_text() == json.dumps(parameters, indent=2) + '\n':
        print(f'{args.out} is already there, with the same parameters; nothing to do')
        return
    if args.out.exists():
        sys.exit(
            f'error: {args.out} exists and is another dataset: remove it, or choose another OUT'
        )
    try:
        write_dataset(args.out, parameters)
    except OSError as error:
        sys.exit(f'error: {error}')
    except KeyboardInterrupt:
        sys.exit('interrupted; nothing was written')
    print(f'{args.train} training and {args.val} validation images were written to {args.out}')


if __name__ == '__main__':
    main()
