"""Segmentation maps as PNGs: which image each belongs to, and which class each value is."""

import os
import re
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from backbones.data.images import PILLOW_ERRORS
from backbones.errors import DataError
from backbones.progress import ProgressBar

from .records import Record, Source, measure

LEGENDS = (
    *('classes.txt', 'labelmap.txt', 'class_dict.csv', '_classes.csv', 'label_colors.txt'),
    *('labels.txt', 'class_names.txt'),
)
# What the names of maps end in, and of images.
MAP_SUFFIX = re.compile(r'((_gtFine)?_label(Train)?Ids|_labels?|_masks?|_seg|_L)$')
IMAGE_SUFFIX = '_leftImg8bit'
OTHER_MAPS = re.compile(r'_(instanceIds|color|instanceTrainIds)$|/SegmentationObject/')
MAP_FOLDER = re.compile(r'mask|label|annot|^gt|segmentationclass|segmap|^seg$', re.I)
FOLDER_WORDS = re.compile(
    r'^(jpegimages|leftimg8bit|gtfine|gtcoarse|segmentationclass|segmaps?|seg|gt|.*_full)$'
    r'|annot(ation)?s?|masks?|labels?|labeled|images?',
    re.I,
)
COMPARED = 200  # maps whose palettes are compared
UNLABELED = {'void', 'unlabeled', 'unlabelled', 'ignore', 'ignored'}
# Cityscapes' labelIds of its 19 classes.
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
RGB = r'(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\d{1,3})'
# The head of a legend, or a remark in it.
HEAD = re.compile(
    r'#|(name|class|pixel value)\s*,|((name|class|label|red|green|blue|r|g|b)\b[\s,:]*){3,}$', re.I
)


def paired_maps(source: Source) -> list[tuple[Path, Path]]:
    """Images with their segmentation maps: of the same name, beside them or in other folders."""
    shared = os.path.commonpath([path.parent for path in source.images] or [source.root])
    # A folder of all images and maps may be called annotated_cells.
    return pairs_below(source.root, source) or pairs_below(Path(shared), source)


def pairs_below(root: Path, source: Source) -> list[tuple[Path, Path]]:
    """The pairs, by the names of folders below ``root``."""
    maps: dict[tuple, tuple] = {}
    images: dict[tuple, Path] = {}
    for path in source.images:
        relative, is_png = path.relative_to(root), path.suffix.lower() == '.png'
        if is_png and OTHER_MAPS.search(f'/{relative.with_suffix("")}'):
            continue
        suffix = MAP_SUFFIX.search(path.stem)
        if is_png and (suffix or any(map(MAP_FOLDER.search, relative.parent.parts))):
            key = key_of(relative, MAP_SUFFIX.sub('', path.stem))
            # Of several maps of an image the best.
            rank = ('TrainIds' not in path.stem, not suffix, path)
            maps[key] = min(maps.get(key, rank), rank)
        else:
            images[key_of(relative, path.stem.removesuffix(IMAGE_SUFFIX))] = path
    by_stem: dict[str, list[Path]] = {}
    for (_, stem), (*_, path) in maps.items():
        by_stem.setdefault(stem, []).append(path)
    pairs = []
    for key, image in images.items():
        alone = [path for path in by_stem.get(key[1], ()) if not source.are_apart(image, path)]
        found = maps[key][-1] if key in maps else alone[0] if len(alone) == 1 else None
        if found:
            pairs.append((image, found))
    return pairs


def key_of(relative: Path, stem: str) -> tuple[str, str]:
    """What an image and its map have in common."""
    folders = [FOLDER_WORDS.sub('', part.lower()).strip('_- ') for part in relative.parent.parts]
    return '/'.join(filter(None, folders)), stem


def read_maps(source: Source, _: list[Path]) -> list[Record]:
    """The records of a source of maps, whose legend the source then has."""
    pairs = paired_maps(source)
    paired = {path for pair in pairs for path in pair}
    for image in source.images:
        in_maps = OTHER_MAPS.search(f'/{image.relative_to(source.root).with_suffix("")}')
        if image not in paired and not in_maps:
            source.note('images and maps that have no other half, left out', image)
    splits = source.listed_splits('Segmentation')
    legend = next((p for name in LEGENDS for p in source.files if p.name == name), None)
    source.in_color = are_in_color([path for _, path in pairs[:COMPARED]], legend)
    records, found = [], {}
    for image, path in ProgressBar(pairs, 'reading maps', unit=' maps', leave=False, disable=None):
        with source.leaving_out(image, 'segmentation maps that cannot be used'):
            values = read_values(path, source.in_color)
            stored, upright, _ = measure(image)
            if values.shape[::-1] not in (stored, upright):
                text = '{}x{}, its image {}x{}'.format(*values.shape[::-1], *upright)
                raise DataError(f'{path} is {text}')
            for value in np.unique(values).tolist():
                found.setdefault(value, path)
            split = splits.get(image) or source.split(image) or source.split(path)
            records.append(Record(image, split, seg_map=path))
        if len(found) > 300:
            raise DataError(f'{path}: more than 300 colors: no classes, but a photograph or JPEG')
    if records:
        read_legend(source, legend, records[0].seg_map, found)
    for value, path in found.items():
        if value not in source.values and (value != 255 or source.in_color):
            what = f'color {color_of(value)}' if source.in_color else f'value {value}'
            source.note('values that are no class, ignored', f'{path}: {what}')
    return records


def color_of(value: int) -> tuple[int, int, int]:
    """(R, G, B) of a value of a map in color."""
    return value >> 16, value >> 8 & 255, value & 255


def are_in_color(maps: Iterable[Path], legend: Path | None) -> bool:
    """Whether the classes of maps are colors, not indices.

    Programs that edit maps in color store few colors with a palette, each map with its own.
    """
    shown: dict[int, set[int]] = {}
    for number, path in enumerate(maps):
        with suppress(*PILLOW_ERRORS), Image.open(path) as image:
            if number == 0 and image.mode in ('RGB', 'RGBA'):
                return True
            if image.mode == 'P':
                palette = np.reshape(image.getpalette(), (-1, 3)) @ (65536, 256, 1)
                for _, index in image.getcolors():
                    shown.setdefault(index, set()).update(palette[index : index + 1].tolist())
    colors = set().union(*shown.values())
    listed = {value for _, value in parse_legend(legend, in_color=True)} if legend else set()
    differ = any(len(several) > 1 for several in shown.values())
    return differ or (bool(colors) and colors <= listed)


def read_values(path: Path, in_color: bool) -> np.ndarray:
    """The values of a map, (height, width): its indices, or its colors as 65536 R + 256 G + B."""
    try:
        with Image.open(path) as image:
            mode = image.mode
            if mode == 'RGBA' or (in_color and mode in ('P', 'L', '1')):
                image, mode = image.convert('RGB'), 'RGB'
            pixels = np.asarray(image).astype(np.int32)
    except PILLOW_ERRORS as error:
        raise DataError(f'{path} is no segmentation map that can be read: {error}') from error
    if mode == 'RGB':
        return pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]
    if mode not in ('P', 'L', 'I', 'I;16', '1'):
        raise DataError(f'{path} is of mode {mode}: not indices and not colors')
    return pixels


def read_legend(source: Source, path: Path | None, first: Path, found: Collection[int]) -> None:
    """Give a source the names of its classes, their values in its maps, and colors.

    ``path`` is its legend; ``found`` has all values in its maps, of which ``first`` is one.
    """
    with Image.open(first) as image:
        has_palette = image.mode == 'P'
    entries = parse_legend(path, source.in_color) if path else []
    # If others have one, of a line without a value no map has pixels.
    entries = [entry for entry in entries if entry[1] is not None] or entries
    listed, values = [name for name, _ in entries], [value for _, value in entries]
    has_values = bool(entries) and None not in values
    names = list(source.options.classes)
    largest = max((value for value in found if value != 255), default=0)
    if source.in_color:
        if not has_values:
            listed, values = names or [f'{value:06x}' for value in sorted(found)], sorted(found)
            if len(listed) != len(values):
                raise DataError(f'the maps have {len(values)} colors, --classes names {len(names)}')
        source.colors = [color_of(value) for value in values]
    elif first.stem.endswith(('labelTrainIds', 'labelIds')):
        values = range(19) if first.stem.endswith('TrainIds') else CITYSCAPES_IDS
        listed, source.colors = known_legend('cityscapes')
    elif not entries and has_palette and 'SegmentationClass' in first.parts and largest < 21:
        values = range(21)
        listed, source.colors = known_legend('voc')
    elif set(found) == {0, 255} and len(listed) < 3 and 255 not in values:
        listed, values = listed or names or ['background', 'foreground'], (0, 255)
        if len(listed) != 2:
            raise DataError(
                f'the maps are black and white, {path if entries else "--classes"} names '
                f'{len(listed)}: name both, the class of black pixels first'
            )
    elif not has_values:
        # In ADE20K's layout 0 is what is not labeled.
        is_ade20k = 'annotations/training' in first.relative_to(source.root).as_posix()
        number = largest if is_ade20k else largest + 1
        listed = listed or names or [f'class_{i}' for i in range(number)]
        offset = int(largest == len(listed) or is_ade20k)
        values = range(offset, offset + len(listed))
    source.names, source.values = listed, {value: i for i, value in enumerate(values)}


def known_legend(dataset: str) -> tuple[list[str], list[tuple[int, int, int]]]:
    """The classes and colors of a dataset that mmseg knows."""
    from mmseg.utils import get_classes, get_palette

    return get_classes(dataset), list(map(tuple, get_palette(dataset)))


def parse_legend(path: Path, in_color: bool) -> list[tuple[str, int | None]]:
    """The names in a legend, one a line, with their values in maps of colors or of indices."""
    entries: list[tuple[str, int | None]] = []
    for line in path.read_text(encoding='utf-8-sig').split('\n'):
        text = line.strip()
        if not text or HEAD.match(text):
            continue
        if found := re.match(rf'{RGB}[\s,:]+(.+)$', text):
            *color, name = found.groups()
        elif found := re.match(rf'(.+?)\s*[,:\s]\s*{RGB}[\s,:]*$', text):
            name, *color = found.groups()
        else:
            found = re.match(r'(\d+)\s*,\s*(.+)$', text)
            name, index = (found[2], int(found[1])) if found else (text, None)
            entries.append((name, None if in_color else index))
            continue
        red, green, blue = map(int, color)
        entries.append((name, red << 16 | green << 8 | blue if in_color else None))
    return entries


def encode_map(record: Record, source: Source, chosen: dict[int, int]) -> np.ndarray:
    """A map in ADE20K's way, (height, width), uint8: 0 for what is ignored, k + 1 for class k.

    ``chosen`` has the new number of each class of the source that is taken.
    """
    values = read_values(record.seg_map, source.in_color)
    stored, upright, orientation = measure(record.image)
    if values.shape[::-1] == stored != upright:
        source.note('annotations rotated as EXIF rotates their image', record.image)
        image = Image.fromarray(values)
        image.getexif()[0x0112] = orientation
        values = np.asarray(ImageOps.exif_transpose(image))
    labels = np.zeros(values.shape, np.uint8)
    for value, old in source.values.items():
        if old in chosen:
            labels[values == value] = chosen[old] + 1
    return labels
