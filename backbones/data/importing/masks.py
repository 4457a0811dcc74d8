"""Segmentation maps as PNGs: which image each belongs to, and which class each value is."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from backbones.data.images import PILLOW_ERRORS
from backbones.errors import DataError

from .records import Notes, Record, Source, is_annotated_unrotated, measure

LEGENDS = (
    *('classes.txt', 'labelmap.txt', 'class_dict.csv', '_classes.csv', 'label_colors.txt'),
    *('labels.txt', 'class_names.txt'),
)
# What the names of maps end in, the best of one image first.
MAP_SUFFIXES = (
    '_gtFine_labelTrainIds',
    '_gtFine_labelIds',
    '_labelTrainIds',
    '_labelIds',
    '_label',
    '_labels',
    '_mask',
    '_masks',
    '_seg',
    '_L',
    '',
)
OTHER_MAPS = re.compile(r'_(instanceIds|color|instanceTrainIds)$|/SegmentationObject/')
MAP_FOLDER = re.compile(r'mask|label|annot|^gt|segmentationclass|segmap|^seg$', re.I)
FOLDER_WORDS = re.compile(
    r'^(images?|jpegimages|leftimg8bit|gtfine|gtcoarse|segmentationclass|segmaps?|seg|gt|.*_full)$'
    r'|annot(ation)?s?|masks?|labels?|labeled',
    re.I,
)
UNLABELED = {'void', 'unlabeled', 'unlabelled', 'ignore', 'ignored'}
# Cityscapes' labelIds of its 19 classes.
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


@dataclass
class Legend:
    """What the values of maps mean: an index, or a color as 65536 R + 256 G + B."""

    classes: list[str]
    values: dict[int, int]  # the class of each value; others are ignored
    colors: list[tuple[int, int, int]] | None = None


def paired_maps(source: Source) -> list[tuple[Path, Path]]:
    """Images with their segmentation maps: of the same name, beside them or in other folders."""
    maps: dict[tuple, tuple[int, Path]] = {}
    images: dict[tuple, Path] = {}
    for path in source.images:
        relative = path.relative_to(source.root)
        if path.suffix.lower() != '.png' or OTHER_MAPS.search(f'/{relative.with_suffix("")}'):
            if path.suffix.lower() != '.png':
                images[key_of(relative, path.stem.removesuffix('_leftImg8bit'))] = path
            continue
        in_map_folder = any(MAP_FOLDER.search(part) for part in relative.parent.parts)
        rank = next(i for i, suffix in enumerate(MAP_SUFFIXES) if path.stem.endswith(suffix))
        if in_map_folder or (MAP_SUFFIXES[rank] and rank < len(MAP_SUFFIXES) - 1):
            key = key_of(relative, path.stem.removesuffix(MAP_SUFFIXES[rank]))
            maps[key] = min(maps.get(key, (99, path)), (rank, path))
        else:
            images[key_of(relative, path.stem.removesuffix('_leftImg8bit'))] = path
    by_stem: dict[str, list[Path]] = {}
    for (_, stem), (_, path) in maps.items():
        by_stem.setdefault(stem, []).append(path)
    pairs = []
    for key, image in images.items():
        alone = by_stem.get(key[1], [])
        found = maps[key][1] if key in maps else alone[0] if len(alone) == 1 else None
        if found:
            pairs.append((image, found))
    return pairs


def key_of(relative: Path, stem: str) -> tuple[str, str]:
    """What an image and its map have in common."""
    folders = [FOLDER_WORDS.sub('', part.lower()) for part in relative.parent.parts]
    return '/'.join(filter(None, folders)), stem


def read_maps(source: Source, notes: Notes, names: Sequence[str]) -> tuple[list[Record], Legend]:
    """The records of a source of maps, and their legend; ``names`` where the source has none."""
    pairs = paired_maps(source)
    paired = {path for pair in pairs for path in pair}
    for image in source.images:
        in_maps = OTHER_MAPS.search(f'/{image.relative_to(source.root).with_suffix("")}')
        if image not in paired and not in_maps:
            notes.add('images and maps that have no other half, left out', image)
    splits = source.listed_splits('Segmentation')
    counts: dict[int, Path] = {}
    for _, path in tqdm(pairs, 'reading maps', unit=' maps', leave=False, disable=None):
        for value in np.unique(read_values(path)).tolist():
            counts.setdefault(value, path)
        if len(counts) > 300:
            raise DataError(f'{path}: more than 300 colors: no classes, but a photograph or JPEG')
    legend = make_legend(source, pairs, counts, names)
    for value, path in counts.items():
        if value not in legend.values and value != 255:
            color = f'color {divmod(value, 65536)[0], value // 256 % 256, value % 256}'
            what = f'value {value}' if value < 256 else color
            notes.add('values that are no class, ignored', f'{path}: {what}')
    records = [
        Record(
            image,
            seg_map=path,
            split=splits.get(image.stem) or source.split(image) or source.split(path),
        )
        for image, path in pairs
    ]
    return records, legend


def read_values(path: Path) -> np.ndarray:
    """The values of a map, (height, width): its indices, or its colors as numbers."""
    try:
        with Image.open(path) as image:
            mode = image.mode
            pixels = np.asarray(image.convert('RGB') if mode == 'RGBA' else image).astype(np.int32)
    except PILLOW_ERRORS as error:
        raise DataError(f'{path} is no segmentation map that can be read: {error}') from error
    if mode in ('RGB', 'RGBA'):
        return pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]
    if mode not in ('P', 'L', 'I', 'I;16', '1'):
        raise DataError(f'{path} is of mode {mode}: not indices and not colors')
    return pixels


def make_legend(
    source: Source,
    pairs: Sequence[tuple[Path, Path]],
    counts: dict[int, Path],
    names: Sequence[str],
) -> Legend:
    first = pairs[0][1]
    with Image.open(first) as image:
        in_color = image.mode in ('RGB', 'RGBA')
        palette = image.getpalette() if image.mode == 'P' else None
    path = next((p for name in LEGENDS for p in source.files if p.name == name), None)
    entries = parse_legend(path) if path else []
    if entries and in_color and entries[0][1] is not None and entries[0][1] >= 0:
        classes = [name for name, _ in entries]
        values = {value: i for i, (_, value) in enumerate(entries)}
        colors = [(v >> 16, v >> 8 & 255, v & 255) for _, v in entries]
        return Legend(classes, values, colors)
    if in_color:
        found = sorted(counts)
        if names and len(names) != len(found):
            raise DataError(f'the maps have {len(found)} colors, --classes names {len(names)}')
        classes = list(names) or [f'{value:06x}' for value in found]
        colors = [(v >> 16, v >> 8 & 255, v & 255) for v in found]
        return Legend(classes, {v: i for i, v in enumerate(found)}, colors)
    largest = max((value for value in counts if value != 255), default=0)
    if first.stem.endswith(('labelTrainIds', 'labelIds')):
        from mmseg.datasets import CityscapesDataset as Known

        ids = range(19) if first.stem.endswith('TrainIds') else CITYSCAPES_IDS
        values = {value: i for i, value in enumerate(ids)}
        return Legend(
            list(Known.METAINFO['classes']), values, [tuple(c) for c in Known.METAINFO['palette']]
        )
    if not entries and palette and 'SegmentationClass' in first.parts and largest < 21:
        from mmseg.datasets import PascalVOCDataset as Known

        return Legend(
            list(Known.METAINFO['classes']),
            {i: i for i in range(21)},
            [tuple(c) for c in Known.METAINFO['palette']],
        )
    if not entries and set(counts) == {0, 255}:
        classes = list(names) or ['background', 'foreground']
        if len(classes) != 2:
            raise DataError(
                f'the maps are black and white, --classes names {len(classes)}: name both, the '
                'class of black pixels first'
            )
        return Legend(classes, {0: 0, 255: 1})
    listed = (
        [name for name, _ in entries] or list(names) or [f'class_{i}' for i in range(largest + 1)]
    )
    if entries and path.name == '_classes.csv':
        return Legend(listed, {value: i for i, (_, value) in enumerate(entries)})
    # In ADE20K's layout 0 is what is not labeled.
    is_ade20k = 'annotations/training' in first.relative_to(source.root).as_posix()
    offset = int(largest == len(listed) or is_ade20k)
    return Legend(listed, {i + offset: i for i in range(len(listed))})


def parse_legend(path: Path) -> list[tuple[str, int | None]]:
    """Names with a color, with an index or alone, one a line."""
    entries: list[tuple[str, int | None]] = []
    for line in path.read_text(encoding='utf-8-sig').split('\n'):
        text = line.strip()
        if (
            not text
            or text.startswith('#')
            or re.match(r'(name|class|pixel value)\s*,', text, re.I)
        ):
            continue
        rgb = r'(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\d{1,3})'
        if found := re.match(rf'{rgb}[\s,:]+(.+)$', text):
            *color, name = found.groups()
        elif found := re.match(rf'(.+?)\s*[,:\s]\s*{rgb}[\s,:]*$', text):
            name, *color = found.groups()
        elif found := re.match(r'(\d+)\s*,\s*(.+)$', text):
            entries.append((found[2], int(found[1])))
            continue
        else:
            entries.append((text, None))
            continue
        red, green, blue = map(int, color)
        entries.append((name, red << 16 | green << 8 | blue))
    return entries


def encode_map(record: Record, legend: Legend, chosen: dict[int, int], notes: Notes) -> np.ndarray:
    """A map in ADE20K's way, (height, width), uint8: 0 for what is ignored, k + 1 for class k.

    ``chosen`` has the new number of each class of the legend that is taken.
    """
    values = read_values(record.seg_map)
    _, upright, orientation = measure(record.image)
    if is_annotated_unrotated(record.image, values.shape[::-1]):
        notes.add('annotations rotated as EXIF rotates their image', record.image)
        values = np.asarray(rotate_map(Image.fromarray(values, 'I'), orientation))
    if values.shape[::-1] != upright:
        text = '{}x{}, its image {}x{}'.format(*values.shape[::-1], *upright)
        raise DataError(f'{record.seg_map} is {text}')
    labels = np.zeros(values.shape, np.uint8)
    for value, old in legend.values.items():
        if old in chosen:
            labels[values == value] = chosen[old] + 1
    return labels


def rotate_map(image: Image.Image, orientation: int) -> Image.Image:
    """A map on the stored pixels, as EXIF's orientation rotates its image."""
    names = {5: 'TRANSPOSE', 6: 'ROTATE_270', 7: 'TRANSVERSE', 8: 'ROTATE_90'}
    return image.transpose(Image.Transpose[names[orientation]])
