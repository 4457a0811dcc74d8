"""Imported folders hold the annotations that they were made from."""

import errno
import json
import math
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import import_dataset
import mmcv
import numpy as np
import pytest
from mmdet.datasets import CocoDataset
from PIL import Image, ImageOps
from pycocotools.coco import COCO

from backbones.data import check_dataset
from backbones.data.importing import FORMATS, choose_format, open_source, write_dataset
from backbones.data.importing.masks import parse_legend
from backbones.data.importing.records import Record, measure, rotate_points
from backbones.data.importing.write import Written, config_text
from backbones.engine.config import load_config
from backbones.errors import ConfigError, DataError

COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
NAMES = ['disc', 'old star', 'ring']
# Of each image, (width, height) and its objects: the class, and a polygon of whole pixels.
IMAGES = {
    'clip_a_001': ((40, 30), [(0, [2, 3, 20, 3, 20, 13, 2, 13]), (1, [22, 20, 38, 20, 30, 28])]),
    'clip_a_002': ((40, 30), [(2, [5, 6, 25, 6, 25, 26, 5, 26])]),
    'clip_b_001': ((32, 48), [(1, [0, 0, 12, 0, 12, 40, 0, 40]), (0, [14, 2, 30, 2, 30, 46])]),
    'clip_b_002': ((32, 48), [(2, [3, 3, 9, 3, 9, 9, 3, 9])]),
    'clip_c_001': ((50, 20), [(0, [10, 5, 44, 5, 44, 15, 10, 15])]),
}  # fmt: skip
POLYGONS = ('yolo', 'labelme', 'cvat', 'coco')


def box_of(polygon: Sequence[float]) -> list[float]:
    return [min(polygon[::2]), min(polygon[1::2]), max(polygon[::2]), max(polygon[1::2])]


def save_image(path: Path, size: tuple[int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, (90, 120, 60)).save(path)


def save_rotated(path: Path, orientation: int = 6) -> None:
    """An image stored as 40x30 that EXIF rotates, by 6 clockwise."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new('RGB', (40, 30)).save(path, exif=exif)


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def to_voc(root: Path, masks: bool) -> None:
    for name, (size, objects) in IMAGES.items():
        save_image(root / 'JPEGImages' / f'{name}.jpg', size)
        items = ''
        for label, polygon in objects:
            x1, y1, x2, y2 = box_of(polygon)
            corners = (
                f'<xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>'
            )
            items += f'<object><name>{NAMES[label]}</name><bndbox>{corners}</bndbox></object>'
        sides = f'<size><width>{size[0]}</width><height>{size[1]}</height></size>'
        text = f'<annotation><filename>{name}.jpg</filename>{sides}{items}</annotation>'
        write(root / 'Annotations' / f'{name}.xml', text)


def to_yolo(root: Path, masks: bool) -> None:
    for name, ((width, height), objects) in IMAGES.items():
        save_image(root / 'images' / f'{name}.png', (width, height))
        lines = []
        for label, polygon in objects:
            x1, y1, x2, y2 = box_of(polygon)
            numbers = [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]
            numbers = [
                v / (height if i % 2 else width)
                for i, v in enumerate(polygon if masks else numbers)
            ]
            lines.append(f'{label} {" ".join(map(str, numbers))}')
        write(root / 'labels' / f'{name}.txt', '\n'.join(lines) + '\n')
    write(root / 'data.yaml', f'train: images\nnames: {NAMES}\n')


def to_labelme(root: Path, masks: bool) -> None:
    for name, (size, objects) in IMAGES.items():
        save_image(root / f'{name}.jpg', size)
        shapes = []
        for label, polygon in objects:
            box = box_of(polygon)
            flat, kind = (polygon, 'polygon') if masks else (box, 'rectangle')
            points = np.reshape(flat, (-1, 2)).tolist()
            shapes.append(dict(label=NAMES[label], points=points, shape_type=kind))
        about = dict(imagePath=f'{name}.jpg', imageWidth=size[0], imageHeight=size[1])
        write(root / f'{name}.json', dict(shapes=shapes, **about))


def to_cvat(root: Path, masks: bool) -> None:
    text = ''.join(f'<label><name>{name}</name></label>' for name in NAMES)
    text = f'<annotations><meta><task><labels>{text}</labels></task></meta>'
    for name, ((width, height), objects) in IMAGES.items():
        save_image(root / 'images' / f'{name}.jpg', (width, height))
        text += f'<image name="{name}.jpg" width="{width}" height="{height}">'
        for label, polygon in objects:
            x1, y1, x2, y2 = box_of(polygon)
            points = ';'.join(f'{x},{y}' for x, y in zip(polygon[::2], polygon[1::2], strict=True))
            text += (
                f'<polygon label="{NAMES[label]}" points="{points}"/>' if masks
                else f'<box label="{NAMES[label]}" xtl="{x1}" ytl="{y1}" xbr="{x2}" ybr="{y2}"/>'
            )  # fmt: skip
        text += '</image>'
    write(root / 'annotations.xml', text + '</annotations>')


def to_coco(root: Path, masks: bool) -> None:
    content = dict(images=[], annotations=[])
    # As Roboflow does it, with the project's name as a category.
    parent = dict(id=0, name='shapes', supercategory='none')
    categories = [dict(id=i, name=n, supercategory='shapes') for i, n in enumerate(NAMES, 1)]
    for number, (name, ((width, height), objects)) in enumerate(IMAGES.items()):
        save_image(root / 'photos' / f'{name}.jpg', (width, height))
        entry = dict(id=number, file_name=f'{name}.jpg', width=width, height=height)
        content['images'].append(entry)
        for label, polygon in objects:
            x1, y1, x2, y2 = box_of(polygon)
            one = dict(id=len(content['annotations']), image_id=number, category_id=label + 1)
            one['bbox'] = [x1, y1, x2 - x1, y2 - y1]
            content['annotations'].append({**one, **({'segmentation': [polygon]} if masks else {})})
    write(root / 'labels' / 'all.json', dict(content, categories=[parent, *categories]))


WRITERS = {name: globals()[f'to_{name}'] for name in ('voc', *POLYGONS)}


def run(
    source: Path, out: Path, name: str | None = None, **options
) -> tuple[Written, dict[str, list[str]]]:
    """Import a folder; returns what was written, and what was said."""
    with mock.patch('sys.argv', ['import_dataset.py', str(source), '--out', str(out)]):
        args = import_dataset.parse_args()
    vars(args).update(format=name, **options)
    with open_source(args) as opened:
        return write_dataset(opened, *choose_format(opened)), opened.notes


def said(notes: dict[str, list[str]]) -> str:
    return '\n'.join(line for kind in notes for line in (kind, *notes[kind]))


def read_back(out: Path) -> dict[str, list]:
    """The size and objects of every image in COCO's layout, with masks where there are some."""
    found = {}
    for path in (out / 'annotations').glob('instances_*.json'):
        coco = COCO(str(path))
        for entry in coco.dataset['images']:
            image = out / path.stem.removeprefix('instances_') / entry['file_name']
            assert Image.open(image).size == (entry['width'], entry['height'])
            objects = []
            for one in coco.imgToAnns[entry['id']]:
                x, y, w, h = one['bbox']
                mask = coco.annToMask(one) if 'segmentation' in one else None
                # By which COCO's metrics tell small objects from large ones.
                assert one['area'] == pytest.approx(w * h if mask is None else mask.sum())
                label = coco.cats[one['category_id']]['name']
                objects.append((label, [x, y, x + w, y + h], mask))
            found[image.stem] = objects
    return found


def polygon_mask(polygon: Sequence[float], size: tuple[int, int]) -> np.ndarray:
    from pycocotools import mask

    return mask.decode(mask.merge(mask.frPyObjects([polygon], *size[::-1])))


@pytest.mark.parametrize(
    ('name', 'masks'), [*((n, False) for n in WRITERS), *((n, True) for n in POLYGONS)]
)
def test_objects_come_back(name, masks, tmp_path):
    WRITERS[name](tmp_path / 'source', masks)
    written, notes = run(tmp_path / 'source', tmp_path / 'out')
    assert (written.task, written.classes) == ('instances' if masks else 'detection', NAMES)
    assert {split: len(part) for split, part in written.splits.items()} == {'train': 4, 'val': 1}
    assert not notes
    found = read_back(tmp_path / 'out')
    assert found.keys() == IMAGES.keys()
    for image, (size, objects) in IMAGES.items():
        for (label, box, mask), (number, polygon) in zip(found[image], objects, strict=True):
            assert label == NAMES[number]
            np.testing.assert_allclose(box, box_of(polygon), atol=0.01)
            assert (mask is not None) == masks
            assert not masks or np.array_equal(mask, polygon_mask(polygon, size))


def seg_map(size: tuple[int, int], objects: list) -> np.ndarray:
    """Indices, 0 the background and k + 1 class k."""
    labels = np.zeros(size[::-1], np.uint8)
    for number, polygon in objects:
        labels[polygon_mask(polygon, size) == 1] = number + 1
    return labels


def to_maps(root: Path, kind: str) -> None:
    for index, (name, (size, objects)) in enumerate(IMAGES.items()):
        labels = seg_map(size, objects)
        split = 'val' if index > 2 else 'train'
        if kind == 'camvid':  # SegNet's folders, and colors by a table
            image, path = root / split / f'{name}.png', root / f'{split}annot' / f'{name}_L.png'
            pixels = Image.fromarray(np.uint8([(0, 0, 0), *COLORS])[labels])
            write(
                root / 'class_dict.csv',
                'name,r,g,b\nVoid,0,0,0\n'
                + ''.join(f'{n},{r},{g},{b}\n' for n, (r, g, b) in zip(NAMES, COLORS, strict=True)),
            )
        elif kind == 'cityscapes':
            image = root / 'leftImg8bit' / split / 'ulm' / f'{name}_leftImg8bit.png'
            path = root / 'gtFine' / split / 'ulm' / f'{name}_gtFine_labelTrainIds.png'
            pixels = Image.fromarray(np.where(labels == 0, 255, labels - 1).astype(np.uint8))
            save_image(path.with_name(f'{name}_gtFine_color.png'), size)
        elif kind == 'roboflow':
            image, path = root / split / f'{name}.jpg', root / split / f'{name}_mask.png'
            pixels = Image.fromarray(labels)
            lines = [f'{i}, {n}\n' for i, n in enumerate(['unlabeled', *NAMES])]
            write(root / split / '_classes.csv', 'Pixel Value, Class\n' + ''.join(lines))
        elif kind == 'ade20k':  # With a class that no pixel has
            folder = 'validation' if index > 2 else 'training'
            image, path = (
                root / 'images' / folder / f'{name}.jpg',
                root / 'annotations' / folder / f'{name}.png',
            )
            pixels = Image.fromarray(labels)
            write(root / 'classes.txt', '\n'.join([*NAMES, 'moon']))
        else:  # PASCAL VOC's: indices with a palette, splits in lists
            image, path = (
                root / 'JPEGImages' / f'{name}.jpg',
                root / 'SegmentationClass' / f'{name}.png',
            )
            pixels = Image.fromarray(np.where(labels == 0, 255, labels), 'P')
            pixels.putpalette([v % 256 for v in range(768)])
            lists = root / 'ImageSets/Segmentation'
            lists.mkdir(parents=True, exist_ok=True)
            with (lists / f'{split}.txt').open('a') as file:
                file.write(f'{name}\n')
        save_image(image, size)
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels.save(path)


@pytest.mark.parametrize('kind', ['camvid', 'cityscapes', 'roboflow', 'ade20k', 'voc'])
def test_segmentation_maps_come_back_exactly(kind, tmp_path):
    to_maps(tmp_path / 'source', kind)
    options = {'classes': []} if kind in ('cityscapes', 'voc') else {}
    written, _ = run(tmp_path / 'source', tmp_path / 'out', **options)
    assert {split: len(part) for split, part in written.splits.items()} == {'train': 3, 'val': 2}
    # VOC's index 0 is a class of its own, which no pixel has here.
    shift = 1 if kind == 'voc' else 0
    known = {'cityscapes': ['road', 'sidewalk'], 'voc': ['background', 'aeroplane']}
    assert written.classes[:2] == known.get(kind, NAMES[:2])
    for index, (name, (size, objects)) in enumerate(IMAGES.items()):
        folder = 'validation' if index > 2 else 'training'
        labels = seg_map(size, objects).astype(int)
        (path,) = (tmp_path / f'out/annotations/{folder}').glob(f'{name}*.png')
        found = np.asarray(Image.open(path))
        assert np.array_equal(found, np.where(labels > 0, labels + shift, 0))
        assert len(list((tmp_path / f'out/images/{folder}').glob(f'{name}*'))) == 1
    config = load_config(str(tmp_path / 'out/out.py'))
    assert config.train_dataloader.dataset.data_root == f'{tmp_path}/out/'


@pytest.mark.parametrize(
    ('images', 'maps', 'names'),
    [
        ('{}', '{}_labels', ('train', 'val')),
        ('{}_images', '{}-masks', ('monday', 'tuesday')),
        ('{}/photos', '{}/masks', ('train', 'val')),
    ],
)
def test_maps_of_equal_names_belong_to_the_images_of_their_folder(images, maps, names, tmp_path):
    source = tmp_path / 'source'
    for name, width in zip(names, (40, 41), strict=True):
        save_image(source / images.format(name) / '0.png', (width, 30))
        path = source / maps.format(name) / '0.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(seg_map((width, 30), [(1, [2, 3, 20, 3, 20, 13])])).save(path)
    written, notes = run(source, tmp_path / 'out')
    assert {name: len(part) for name, part in written.splits.items()} == {'train': 1, 'val': 1}
    assert not notes


def test_the_folder_of_all_may_be_named_as_those_of_maps_are(tmp_path):
    to_two_values(tmp_path / 'zip/annotated_cells', 1)
    for path in (tmp_path / 'zip/annotated_cells/images').iterdir():
        Image.open(path).save(path.with_suffix('.png'))
        path.unlink()
    written, notes = run(tmp_path / 'zip', tmp_path / 'out')
    assert sum(map(len, written.splits.values())) == len(IMAGES) and not notes


def test_no_map_of_another_split_takes_the_place_of_a_missing_one(tmp_path):
    to_maps(tmp_path / 'source', 'ade20k')
    name = 'clip_a_001'
    save_image(tmp_path / f'source/images/validation/{name}.jpg', IMAGES[name][0])
    written, notes = run(tmp_path / 'source', tmp_path / 'out')
    assert {split: len(part) for split, part in written.splits.items()} == {'train': 3, 'val': 2}
    assert f'validation/{name}.jpg' in said(notes)


def test_without_names_there_are_as_many_classes_as_values(tmp_path):
    to_maps(tmp_path / 'source', 'ade20k')
    (tmp_path / 'source/classes.txt').unlink()
    assert len(run(tmp_path / 'source', tmp_path / 'ade20k')[0].classes) == len(NAMES)
    (tmp_path / 'source/annotations').rename(tmp_path / 'source/masks')
    assert len(run(tmp_path / 'source', tmp_path / 'others')[0].classes) == len(NAMES) + 1


@pytest.mark.parametrize(
    ('head', 'line', 'end'),
    [
        ('', '{} {} {} {}', 'nothing'),
        ('r,g,b,name', '{},{},{},{}', ''),
        ('r g b Label', '{} {} {} {}', ''),
    ],
)
def test_a_legend_may_have_a_head_and_lines_without_a_color(head, line, end, tmp_path):
    to_maps(tmp_path / 'maps', 'camvid')
    lines = [line.format(*color, name) for name, color in zip(NAMES, COLORS, strict=True)]
    legend = tmp_path / 'maps/class_dict.csv'
    legend.write_text('\n'.join([head, *lines, end]))
    assert run(tmp_path / 'maps', tmp_path / 'out')[0].classes == NAMES
    # Of maps of indices each line is a class, the head is none.
    found = [(name, None) for name in [*NAMES, *end.split()]]
    assert parse_legend(legend, in_color=False) == found


@pytest.mark.parametrize('head', ['', 'id,name\n', '# of 4\n'])
def test_the_values_in_a_legend_count_not_the_order_of_its_lines(head, tmp_path):
    to_maps(tmp_path / 'maps', 'ade20k')
    shutil.move(tmp_path / 'maps/annotations', tmp_path / 'maps/masks')
    (tmp_path / 'maps/classes.txt').unlink()
    write(tmp_path / 'maps/labels.txt', f'{head}3,ring\n1,disc\n2,old star\n0,ground\n')
    written, notes = run(tmp_path / 'maps', tmp_path / 'out')
    assert written.classes == ['ring', 'disc', 'old star', 'ground'] and not notes
    for name, (size, objects) in IMAGES.items():
        (path,) = (tmp_path / 'out/annotations').rglob(f'{name}.png')
        expected = np.array([4, 2, 3, 1])[seg_map(size, objects)]
        assert np.array_equal(np.asarray(Image.open(path)), expected)


@pytest.mark.parametrize(
    ('has_legend', 'shifts'), [(True, (0, 1, 2, 3, 0)), (True, (2,) * 5), (False, (0, 1, 2, 3, 0))]
)
def test_palettes_of_maps_count_if_their_indices_mean_nothing(has_legend, shifts, tmp_path):
    """ImageMagick stores maps of few colors so, each with a palette of its own."""
    to_maps(tmp_path / 'source', 'camvid')
    if not has_legend:
        (tmp_path / 'source/class_dict.csv').unlink()
    table = np.array([(0, 0, 0), *COLORS], np.uint8)
    for (size, objects), name, shift in zip(IMAGES.values(), IMAGES, shifts, strict=True):
        (path,) = (tmp_path / 'source').rglob(f'{name}_L.png')
        image = Image.fromarray((seg_map(size, objects) + shift) % 4, 'P')
        image.putpalette(np.roll(table, shift, axis=0).tobytes())
        image.save(path)
    written, _ = run(tmp_path / 'source', tmp_path / 'out')
    assert written.classes == (NAMES if has_legend else ['000000', '0000ff', '00ff00', 'ff0000'])
    assert written.colors == (COLORS if has_legend else [(0, 0, 0), *reversed(COLORS)])
    for name, (size, objects) in IMAGES.items():
        (path,) = (tmp_path / 'out/annotations').rglob(f'{name}*.png')
        expected = np.array([0, 1, 2, 3] if has_legend else [1, 4, 3, 2])[seg_map(size, objects)]
        assert np.array_equal(np.asarray(Image.open(path)), expected)


def test_what_has_one_name_is_one_class(tmp_path):
    to_maps(tmp_path / 'maps', 'camvid')
    path = tmp_path / 'maps/class_dict.csv'
    path.write_text(path.read_text().replace('ring', 'disc'))
    to_coco(tmp_path / 'coco', masks=True)
    path = tmp_path / 'coco/labels/all.json'
    path.write_text(path.read_text().replace('"ring"', '"disc"'))
    for source in ('maps', 'coco'):
        written, _ = run(tmp_path / source, tmp_path / f'of_{source}')
        assert written.classes == NAMES[:2]
    config = load_config(str(tmp_path / 'of_maps/of_maps.py'))
    assert [tuple(color) for color in config.palette] == COLORS[:2]
    for name, (size, objects) in IMAGES.items():
        (path,) = (tmp_path / 'of_maps/annotations').rglob(f'{name}.png')
        labels = seg_map(size, objects)
        assert np.array_equal(np.asarray(Image.open(path)), np.where(labels == 3, 1, labels))
    boxes = read_back(tmp_path / 'of_coco')
    assert [one[0] for one in boxes['clip_a_002']] == ['disc']


def test_polygons_become_maps(tmp_path):
    to_labelme(tmp_path / 'source', masks=True)
    written, _ = run(tmp_path / 'source', tmp_path / 'out', task='segmentation', ignore=['ring'])
    assert written.classes == ['background', *NAMES[:2]]
    size, objects = IMAGES['clip_a_001']
    (path,) = (tmp_path / 'out').glob('annotations/*/clip_a_001.png')
    assert np.array_equal(np.asarray(Image.open(path)), seg_map(size, objects) + 1)


@pytest.mark.parametrize(
    ('options', 'classes', 'values'),
    [
        (dict(classes=['disc']), ['background', 'disc'], {0: 1, 1: 2, 2: 1}),
        (dict(classes=['background', 'disc']), ['background', 'disc'], {0: 1, 1: 2, 2: 1}),
        (dict(classes=['disc', 'background']), ['disc', 'background'], {0: 2, 1: 1, 2: 2}),
        (dict(ignore=['background', 'ring']), NAMES[:2], {0: 0, 1: 1, 2: 2}),
    ],
)
def test_the_background_of_polygons_is_a_class_like_others(options, classes, values, tmp_path):
    to_labelme(tmp_path / 'source', masks=True)
    written, _ = run(tmp_path / 'source', tmp_path / 'out', task='segmentation', **options)
    assert written.classes == classes
    (path,) = (tmp_path / 'out').glob('annotations/*/clip_a_001.png')
    expected = np.array([values[i] for i in range(3)])[seg_map(*IMAGES['clip_a_001'])]
    assert np.array_equal(np.asarray(Image.open(path)), expected)


@pytest.mark.parametrize('by_annotation', ['upright', 'stored'])
def test_annotations_follow_what_exif_does_to_the_image(by_annotation, tmp_path):
    source = tmp_path / 'source'
    to_labelme(source, masks=True)
    save_rotated(source / 'clip_a_001.jpg')
    path = source / 'clip_a_001.json'
    content = json.loads(path.read_text())
    points = (
        [[2, 3], [20, 3], [20, 13], [2, 13]]
        if by_annotation == 'stored'
        else [[17, 2], [27, 2], [27, 20], [17, 20]]
    )
    size = (40, 30) if by_annotation == 'stored' else (30, 40)
    content.update(imageWidth=size[0], imageHeight=size[1])
    content['shapes'] = [dict(label='disc', points=points, shape_type='polygon')]
    write(path, content)
    run(source, tmp_path / 'out')
    (path,) = (tmp_path / 'out/annotations').glob('*_train.json')
    found = {}
    for path in (tmp_path / 'out/annotations').glob('*.json'):
        coco = COCO(str(path))
        for entry in coco.dataset['images']:
            found[entry['file_name']] = (entry['width'], coco.imgToAnns[entry['id']][0]['bbox'])
    assert found['clip_a_001.jpg'] == (30, [17, 2, 10, 18])


@pytest.mark.parametrize('suffix', ['jpg', 'png', 'tif', 'webp'])
def test_images_are_measured_as_mmcv_reads_them(suffix, tmp_path):
    path = tmp_path / f'photo.{suffix}'
    save_rotated(path)
    assert measure(path)[1] == mmcv.imread(path).shape[1::-1]


@pytest.mark.parametrize('orientation', [5, 6, 7, 8])
def test_maps_and_points_move_as_pillow_rotates_the_pixels(orientation, tmp_path):
    to_maps(tmp_path / 'source', 'roboflow')
    photo = tmp_path / 'source/train/clip_a_001.jpg'
    save_rotated(photo, orientation)
    run(tmp_path / 'source', tmp_path / 'out')
    stored = Image.fromarray(seg_map(*IMAGES['clip_a_001']))
    stored.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(stored))
    (path,) = (tmp_path / 'out').glob('annotations/*/clip_a_001.png')
    assert np.array_equal(np.asarray(Image.open(path)), expected)
    rows, columns = np.nonzero(expected == 1)
    box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert box_of(rotate_points([2, 3, 20, 13], photo)) == box


def test_a_run_length_mask_of_an_image_that_exif_rotates_is_left_out(tmp_path):
    source = tmp_path / 'source'
    spoil_coco(source, segmentation=dict(size=[30, 40], counts=[62, 10, 1128]))
    save_rotated(source / 'photos/clip_a_001.jpg')
    written, notes = run(source, tmp_path / 'out')
    found = {record.image.stem: record for part in written.splits.values() for record in part}
    assert found.keys() == IMAGES.keys()
    assert [one.label for one in found['clip_a_001'].instances] == ['old star']
    assert any('run-length' in kind and 'clip_a_001.jpg' in notes[kind][0] for kind in notes)


def test_parts_of_one_object_and_circles_of_labelme(tmp_path):
    to_labelme(tmp_path / 'source', masks=True)
    path = tmp_path / 'source/clip_a_001.json'
    corners = [(2, 3), (8, 3), (8, 9), (2, 9)]
    first, second, other = (np.add(corners, shift) for shift in ((0, 0), (18, 0), (0, 17)))
    shapes = [
        dict(label=label, points=points.tolist(), group_id=1)
        for label, points in (('disc', first), ('ring', other), ('disc', second))
    ]
    # Its center, and a point of it.
    shapes.append(dict(label='old star', points=[[30, 20], [30, 26]], shape_type='circle'))
    write(path, {**json.loads(path.read_text()), 'shapes': shapes})
    run(tmp_path / 'source', tmp_path / 'out')
    disc, ring, star = read_back(tmp_path / 'out')['clip_a_001']
    assert (disc[0], disc[1], disc[2].sum()) == ('disc', [2, 3, 26, 9], 72)
    assert (ring[0], ring[1], ring[2].sum()) == ('ring', [2, 20, 8, 26], 36)
    assert star[:2] == ('old star', [24, 14, 36, 26])
    assert star[2].sum() == pytest.approx(math.pi * 36, rel=0.05)


def add_to_cvat(path: Path, shape: str) -> None:
    """One more shape, the last of the first image."""
    path.write_text(path.read_text().replace('</image>', f'{shape}</image>', 1))


def test_masks_of_cvat_and_what_lies_above_them(tmp_path):
    to_cvat(tmp_path / 'source', masks=True)
    shape = 'label="ring" left="5" top="7" width="4" height="2" rle="1, 2, 1, 4" z_order="-1"'
    add_to_cvat(tmp_path / 'source/annotations.xml', f'<mask {shape}/>')
    run(tmp_path / 'source', tmp_path / 'out')
    label, box, pixels = read_back(tmp_path / 'out')['clip_a_001'][0]
    assert (label, box) == ('ring', [5, 7, 9, 9])
    places = list(zip(*np.nonzero(pixels), strict=True))
    assert places == [(7, 6), (7, 7), *((8, x) for x in range(5, 9))]
    run(tmp_path / 'source', tmp_path / 'maps', task='segmentation')
    (path,) = (tmp_path / 'maps').glob('annotations/*/clip_a_001.png')
    assert np.array_equal(np.asarray(Image.open(path)), seg_map(*IMAGES['clip_a_001']) + 1)


def test_rotated_boxes_of_cvat(tmp_path):
    to_cvat(tmp_path / 'source', masks=False)
    for angle in (90, 30):
        box = f'<box label="ring" xtl="10" ytl="10" xbr="30" ybr="14" rotation="{angle}"/>'
        add_to_cvat(tmp_path / 'source/annotations.xml', box)
    run(tmp_path / 'source', tmp_path / 'out')
    upright, tilted = [one[1] for one in read_back(tmp_path / 'out')['clip_a_001'][-2:]]
    assert upright == [18, 2, 22, 22]
    # Half of 20 cos 30 + 4 sin 30 on either side, and of 20 sin 30 + 4 cos 30.
    assert tilted == pytest.approx([20 - 9.66, 12 - 6.73, 20 + 9.66, 12 + 6.73], abs=0.01)


@pytest.mark.parametrize(('task', 'size'), [('detection', 288), ('segmentation', 192)])
def test_objects_are_sized_by_the_longer_side_and_maps_by_the_shorter(task, size, tmp_path):
    save_image(tmp_path / 'a.jpg', (300, 200))
    source = SimpleNamespace(options=SimpleNamespace(source='source', out='out'))
    records = {'train': [Record(tmp_path / 'a.jpg', name='a.jpg')]}
    assert f'image_size = {size}\n' in config_text(Written(task, ['a'], None, records), source)


def test_objects_without_a_class_are_left_out(tmp_path):
    to_labelme(tmp_path / 'source', masks=True)
    path = tmp_path / 'source/clip_a_001.json'
    content = json.loads(path.read_text())
    content['shapes'][0]['label'] = None
    write(path, content)
    written, notes = run(tmp_path / 'source', tmp_path / 'out')
    assert written.classes == NAMES and 'clip_a_001' in said(notes)
    assert [one[0] for one in read_back(tmp_path / 'out')['clip_a_001']] == ['old star']


def test_splits_are_seeded_and_groups_stay_together(tmp_path):
    to_voc(tmp_path / 'source', masks=False)

    def val(out: str, **options) -> set[str]:
        written, _ = run(tmp_path / 'source', tmp_path / out, **options)
        return {record.image.stem for record in written.splits['val']}

    assert val('a', val=0.4) == val('b', val=0.4)
    assert len({frozenset(val(f'seed{seed}', seed=seed)) for seed in range(5)}) > 1
    for seed in range(4):
        chosen = val(f'video{seed}', val=0.4, group='video', seed=seed)
        assert chosen in (
            {'clip_a_001', 'clip_a_002'},
            {'clip_b_001', 'clip_b_002'},
            {'clip_c_001'},
        )
    with pytest.raises(DataError, match='--group folder'):
        val('folder', group='folder')


@pytest.mark.parametrize(
    'line', ['{}  1', '{}', '{}.jpg', 'JPEGImages/{}.jpg', 'sub\\{}', '"{}" -1']
)
def test_images_in_no_list_of_voc_are_left_out(line, tmp_path):
    """VOC2012 has more of them, with some of their objects, for tasks of other lists."""
    to_voc(tmp_path / 'source', masks=False)
    lists = dict(train=[0, 1], val=[2], disc_val=[2], trainval=[0, 1, 2, 3])
    for name, numbers in lists.items():
        lines = ''.join(f'{line.format(list(IMAGES)[i])}\n' for i in numbers)
        write(tmp_path / f'source/ImageSets/Main/{name}.txt', lines)
    written, notes = run(tmp_path / 'source', tmp_path / 'out')
    found = {name: [r.image.stem for r in part] for name, part in written.splits.items()}
    assert found == {
        'train': ['clip_a_001', 'clip_a_002', 'clip_b_002'],
        'val': ['clip_b_001'],
    }
    assert 'clip_c_001' in said(notes)


@pytest.mark.parametrize(
    ('lists', 'train'),
    [(dict(trainval=[0, 1, 2], test=[3]), [0, 1, 2]), (dict(val=[3]), [0, 1, 2, 4])],
)
def test_images_for_testing_are_never_trained_on(lists, train, tmp_path):
    """Even if the others are in no list called train."""
    to_voc(tmp_path / 'source', masks=False)
    names = list(IMAGES)
    for name, numbers in lists.items():
        text = ''.join(f'{names[i]}\n' for i in numbers)
        write(tmp_path / f'source/ImageSets/Main/{name}.txt', text)
    written, _ = run(tmp_path / 'source', tmp_path / 'out')
    found = {name: [r.image.stem for r in part] for name, part in written.splits.items()}
    assert found == {'train': sorted(names[i] for i in train), 'val': [names[3]]}


def test_lists_of_voc_name_images_in_folders_and_with_spaces(tmp_path):
    source, names = tmp_path / 'source', ('one/img 0', 'one/img 1', 'two/img 0', 'two/img 1', 'img')
    box = '<xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax>'
    item = f'<object><name>cat</name><bndbox>{box}</bndbox></object>'
    for name in names:
        save_image(source / f'JPEGImages/{name}.jpg', (40, 30))
        write(source / f'Annotations/{name}.xml', f'<annotation>{item}</annotation>')
    write(source / 'ImageSets/Main/train.txt', 'one/img 0\none/img 1\nimg\n')
    write(source / 'ImageSets/Main/val.txt', 'two/img 0\ntwo/img 1\n')
    write(source / 'ImageSets/Main/test.txt', '\n')
    written, _ = run(source, tmp_path / 'out')
    images = source / 'JPEGImages'
    found = {
        name: {record.image.relative_to(images).with_suffix('').as_posix() for record in part}
        for name, part in written.splits.items()
    }
    assert found == {'train': {'one/img 0', 'one/img 1', 'img'}, 'val': {'two/img 0', 'two/img 1'}}


@pytest.mark.skipif(sys.platform == 'darwin', reason='macOS has no such names')
def test_names_of_other_bytes_than_utf_8(tmp_path):
    to_yolo(tmp_path / 'source', masks=False)
    for folder, suffix in (('images', '.png'), ('labels', '.txt')):
        path = tmp_path / 'source' / folder / f'clip_a_001{suffix}'
        path.rename(path.with_name(os.fsdecode(b'caf\xe9' + suffix.encode())))
    with (tmp_path / 'source/labels' / os.fsdecode(b'caf\xe9.txt')).open('a') as file:
        file.write('\n7 .5 .5 .1 .1\n')
    _, notes = run(tmp_path / 'source', tmp_path / 'out')
    assert 'caf' in said(notes)
    found = read_back(tmp_path / 'out')
    assert found.pop('caf_') and len(found) == len(IMAGES) - 1
    assert 'caf' in json.loads((tmp_path / 'out/import.json').read_text())['notes'].popitem()[1][0]


@pytest.mark.parametrize('val', [None, 0.4])
def test_it_is_said_that_options_of_a_new_split_do_nothing(val, tmp_path):
    to_maps(tmp_path / 'source', 'camvid')
    _, notes = run(tmp_path / 'source', tmp_path / 'out', group='video', val=val)
    assert ('--val' in said(notes)) == (val is None)


def test_bad_input_is_named_and_left_out(tmp_path):
    source = tmp_path / 'source'
    to_yolo(source, masks=False)
    lines = [
        '1 .5 x .1 .1',
        '7 .5 .5 .1 .1',
        '0 .5 .5 1.2 .5',
        '1 .2 .2 .3 .3 .4',
        '2 1.5 .5 .2 .2',
    ]
    label = source / 'labels/clip_a_001.txt'
    write(label, '\n'.join(lines))
    (source / 'labels/clip_a_002.txt').unlink()
    _, notes = run(source, tmp_path / 'out')
    for number in (1, 2, 4):
        assert f'{label}:{number}' in said(notes)
    assert 'clipped' in said(notes) and 'clip_a_002.png' in said(notes) and 'outside' in said(notes)
    found = read_back(tmp_path / 'out')
    assert [one[:2] for one in found['clip_a_001']] == [('disc', [0, 7.5, 40, 22.5])]
    assert found['clip_a_002'] == []
    for path in source.glob('images/*'):
        path.unlink()
    with pytest.raises(DataError):
        run(source, tmp_path / 'none')


@pytest.mark.parametrize('name', WRITERS)
def test_a_byte_order_mark_is_no_content(name, tmp_path):
    WRITERS[name](tmp_path / 'source', masks=False)
    if name == 'yolo':
        write(tmp_path / 'source/classes.txt', '\n'.join(NAMES))
        (tmp_path / 'source/data.yaml').unlink()
    for path in (tmp_path / 'source').rglob('*'):
        if path.suffix in ('.txt', '.xml', '.json'):
            path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes())
    written, notes = run(tmp_path / 'source', tmp_path / 'out')
    assert written.classes == NAMES and not notes
    assert sum(map(len, read_back(tmp_path / 'out').values())) == 7


def test_several_formats_and_existing_folders_need_a_word(tmp_path):
    source, out = tmp_path / 'source', tmp_path / 'out'
    to_voc(source, masks=False)
    to_labelme(source / 'more', masks=True)
    with pytest.raises(DataError, match='--format'):
        run(source, out)
    run(source, out, 'voc')
    with pytest.raises(ConfigError, match='overwrite'):
        run(source, out, 'labelme')
    assert run(source, out, 'labelme', overwrite=True)[0].task == 'instances'
    (tmp_path / 'mine').mkdir()
    with pytest.raises(ConfigError, match='mine'):
        run(source, tmp_path / 'mine', 'voc', overwrite=True)


def test_a_config_that_was_changed_stays(tmp_path):
    source, out = tmp_path / 'source', tmp_path / 'out'
    to_voc(source, masks=False)
    run(source, out)
    config = out / 'out.py'
    before = config.read_text()
    run(source, out, overwrite=True, val=0.5)
    assert config.read_text() != before and list(out.glob('*.py')) == [config]
    config.write_text(before + "arch = 's2'\n")
    (out / 'mine.py').write_text('# Größe')
    # Twice: the first time leaves nothing that the second one loses.
    for images in ('4 train', '3 train'):
        _, notes = run(source, out, overwrite=True, val=0.2 if images == '4 train' else 0.5)
        assert config.read_text() == before + "arch = 's2'\n"
        assert (out / 'mine.py').read_text() == '# Größe'
        assert images in (out / 'out_new.py').read_text() and len(list(out.glob('*.py'))) == 3
        assert str(config) in said(notes) and 'out_new.py' in said(notes)
    (out / 'out_new.py').write_text('image_size = 96')
    run(source, out, overwrite=True)
    assert (out / 'out_new.py').read_text() == 'image_size = 96'


def test_folders_in_zips_of_windows_are_found(tmp_path):
    to_yolo(tmp_path / 'source', masks=False)
    with zipfile.ZipFile(tmp_path / 'source.zip', 'w') as archive:
        archive.writestr('images\\', '')
        for path in (tmp_path / 'source').rglob('*.*'):
            name = str(path.relative_to(tmp_path / 'source')).replace('/', '\\')
            archive.write(path, name)
    _, notes = run(tmp_path / 'source.zip', tmp_path / 'out')
    assert read_back(tmp_path / 'out').keys() == IMAGES.keys() and not notes


def test_zips_are_unpacked_inside_of_a_folder(tmp_path):
    """What is wrong is named by its place in the zip: the folder is gone then."""
    to_coco(tmp_path / 'source', masks=True)
    write(tmp_path / 'source/empty.png', '')
    with zipfile.ZipFile(tmp_path / 'cells.zip', 'w') as archive:
        for path in (tmp_path / 'source').rglob('*.*'):
            archive.write(path, path.relative_to(tmp_path))
    notes = run(tmp_path / 'cells.zip', tmp_path / 'data/out')[1]
    assert '.unpacked' not in said(notes)
    assert f'{tmp_path}/cells.zip/source/empty.png: cannot' in said(notes)
    assert read_back(tmp_path / 'data/out').keys() == IMAGES.keys()
    assert os.listdir(tmp_path / 'data') == ['out']
    with zipfile.ZipFile(tmp_path / 'cells.zip', 'a') as archive:
        archive.writestr('../evil.txt', 'x')
    run(tmp_path / 'cells.zip', tmp_path / 'data/again')
    assert sorted(os.listdir(tmp_path / 'data')) == ['again', 'out']
    with zipfile.ZipFile(tmp_path / 'cells.zip', 'a') as archive:
        archive.writestr('source/voc.xml', '<annotation>')
    with pytest.raises(DataError, match=re.escape(f'{tmp_path}/cells.zip/source/voc.xml')):
        run(tmp_path / 'cells.zip', tmp_path / 'data/several')


@pytest.mark.parametrize('damage', ['cut', 'encrypted', 'packed otherwise', 'corrupt'])
def test_archives_that_cannot_be_unpacked_are_named(damage, tmp_path):
    path = tmp_path / 'cells.zip'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('a.txt', bytes(range(256)))
    content = bytearray(path.read_bytes())
    entry = content.rindex(b'PK\1\2')
    if damage == 'cut':
        del content[-10:]
    elif damage == 'corrupt':
        content[40] ^= 255
    else:
        content[entry + (8 if damage == 'encrypted' else 10)] = 9  # flags or method
    path.write_bytes(content)
    with pytest.raises(DataError, match=re.escape(str(path))):
        run(path, tmp_path / 'data/out')


def test_only_annotation_files_are_read_alone(tmp_path):
    to_yolo(tmp_path / 'source', masks=False)
    with pytest.raises(DataError, match='yaml'):
        run(tmp_path / 'source/data.yaml', tmp_path / 'out')


def test_a_full_disk_is_no_traceback(tmp_path, monkeypatch, call_tool):
    to_voc(tmp_path / 'source', masks=False)

    def fill(*_: object) -> None:
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(shutil, 'copyfile', fill)
    monkeypatch.setattr(os, 'link', fill)
    code, text = call_tool('import_dataset.py', tmp_path / 'source', '--out', tmp_path / 'out')
    assert code == 1 and 'No space left' in text
    assert not (tmp_path / 'out').exists()


def test_equal_names_in_folders_stay_apart(tmp_path):
    for folder in ('monday', 'tuesday'):
        to_labelme(tmp_path / 'source' / folder, masks=False)
    written, _ = run(tmp_path / 'source', tmp_path / 'out', group='folder', val=0.5)
    assert len(read_back(tmp_path / 'out')) == 2 * len(IMAGES)
    assert {r.image.parent.name for r in written.splits['val']} in ({'monday'}, {'tuesday'})


def test_classes_are_chosen_and_ordered(tmp_path):
    to_voc(tmp_path / 'source', masks=False)
    written, notes = run(tmp_path / 'source', tmp_path / 'out', classes=['ring', 'disc'])
    assert written.classes == ['ring', 'disc'] and 'old star' in said(notes)
    with pytest.raises(DataError, match='square'):
        run(tmp_path / 'source', tmp_path / 'other', classes=['square'])


def to_two_values(root: Path, foreground: int) -> None:
    for name, (size, objects) in IMAGES.items():
        save_image(root / 'images' / f'{name}.jpg', size)
        values = np.where(seg_map(size, objects) > 0, foreground, 0).astype(np.uint8)
        (root / 'masks').mkdir(exist_ok=True)
        Image.fromarray(values).save(root / 'masks' / f'{name}.png')


@pytest.mark.parametrize(
    ('names', 'listed', 'classes'),
    [
        ([], '', ['background', 'foreground']),
        (['outside', 'cell'], '', ['outside', 'cell']),
        ([], 'outside\ncell\n', ['outside', 'cell']),
    ],
)
def test_255_is_a_class_where_maps_are_black_and_white(names, listed, classes, tmp_path):
    source = tmp_path / 'source'
    to_two_values(source, 255)
    write(source / 'classes.txt', listed)
    written, notes = run(source, tmp_path / 'out', classes=names)
    assert written.classes == classes and not notes
    size, objects = IMAGES['clip_a_001']
    (path,) = (tmp_path / 'out').glob('annotations/*/clip_a_001.png')
    assert np.array_equal(np.asarray(Image.open(path)), 1 + (seg_map(size, objects) > 0))
    for listed, names in (('', ['cell']), ('cell', [])):
        write(source / 'classes.txt', listed)
        with pytest.raises(DataError, match='black and white'):
            run(source, tmp_path / 'other', classes=names)


def test_a_class_alone_is_no_segmentation(tmp_path):
    to_two_values(tmp_path / 'maps', 1)
    to_labelme(tmp_path / 'polygons', masks=True)
    for source, ignored in (('maps', ()), ('polygons', ['background'])):
        options = dict(task='segmentation', classes=['disc'], ignore=ignored)
        with pytest.raises(DataError, match='2'):
            run(tmp_path / source, tmp_path / 'out', **options)


def test_no_other_image_takes_the_place_of_a_missing_one(tmp_path):
    """Of its folder, where there is one of that name, and not in two splits."""
    source = tmp_path / 'source'
    to_coco(source, masks=False)
    content = json.loads((source / 'labels/all.json').read_text())
    (source / 'photos').rename(source / 'train')
    (source / 'val').mkdir()
    names = [entry['file_name'] for entry in content['images']]
    (source / 'train' / names[0]).rename(source / 'val' / names[0])
    for split, shown in (('train', [f'train/{name}' for name in names[1:]]), ('val', names)):
        entries = dict(zip(names[-len(shown) :], shown, strict=True))
        part = [e for e in content['images'] if e['file_name'] in entries]
        part = [dict(entry, file_name=entries[entry['file_name']]) for entry in part]
        # Of the last two there is a folder, and none.
        part[-1]['file_name'] = f'{split}/{names[-1]}'
        write(source / f'instances_{split}.json', {**content, 'images': part})
    (source / 'labels/all.json').unlink()
    written, notes = run(source, tmp_path / 'out')
    found = {name: [r.image.name for r in part] for name, part in written.splits.items()}
    assert found == {'train': names[1:], 'val': names[:1]}
    assert f'val/{names[-1]}' in said(notes) and 'two splits' in said(notes)


@pytest.mark.parametrize('name', ['coco', 'cvat'])
def test_equal_names_of_two_splits_stay_apart(name, tmp_path):
    source = tmp_path / 'source'
    WRITERS[name](source, masks=False)
    images = source / ('photos' if name == 'coco' else 'images')
    for split in ('train', 'val'):
        shutil.copytree(images, source / 'images' / split)
    for path in images.glob('*.*'):
        path.unlink()
    path = source / ('labels/all.json' if name == 'coco' else 'annotations.xml')
    text = path.read_text()
    path.unlink()
    if name == 'coco':
        for split in ('train', 'val'):
            write(source / f'annotations/instances_{split}.json', text)
    else:
        start, entries = text.removesuffix('</annotations>').split('<image', 1)
        for split in ('Train', 'Validation'):
            start += f'<image{entries}'.replace('<image', f'<image subset="{split}"')
        write(path, start + '</annotations>')
    written, notes = run(source, tmp_path / 'out')
    assert not notes
    for split in ('train', 'val'):
        records = written.splits[split]
        assert {r.image.relative_to(source).parts[1] for r in records} == {split}
        assert len(records) == len(IMAGES) and sum(len(r.instances) for r in records) == 7


def test_what_is_behind_a_dot_of_a_name_counts(tmp_path):
    source = tmp_path / 'source'
    to_voc(source, masks=False)
    first, *others = sorted((source / 'Annotations').iterdir())
    for number in (1, 2):
        text = first.read_text().replace(f'{first.stem}.jpg', f'{first.stem}.{number}')
        first.with_name(f'{first.stem}.{number}.xml').write_text(text)
    image = next(source.rglob(f'{first.stem}.jpg'))
    shutil.copy(image, image.with_name(f'{first.stem}.1.jpg'))
    written, notes = run(source, tmp_path / 'out')
    found = [record.image for part in written.splits.values() for record in part]
    assert len(set(found)) == len(found) == len(others) + 2
    assert f'{first.stem}.2' in said(notes)


def test_objects_of_one_image_come_together(tmp_path):
    """VOC's files may name another image than their own; COCO's may list one twice."""
    to_voc(tmp_path / 'voc', masks=False)
    for path in (tmp_path / 'voc/Annotations').iterdir():
        path.write_text(path.read_text().replace(f'{path.stem}.jpg', 'clip_a_001.jpg'))
    run(tmp_path / 'voc', tmp_path / 'of_voc')
    to_coco(tmp_path / 'coco', masks=False)
    path = tmp_path / 'coco/labels/all.json'
    content = json.loads(path.read_text())
    content['images'].append({**content['images'][0], 'id': 99})
    content['annotations'][0]['image_id'] = 99
    write(path, content)
    _, notes = run(tmp_path / 'coco', tmp_path / 'of_coco')
    assert 'clip_a_001.jpg' in said(notes)
    for out in ('of_voc', 'of_coco'):
        found = read_back(tmp_path / out)
        assert {name: sorted(one[0] for one in each) for name, each in found.items()} == {
            name: sorted(NAMES[label] for label, _ in each) for name, (_, each) in IMAGES.items()
        }


def test_links_are_followed_to_folders(tmp_path):
    """Images below a link that goes out of the source; others by their own path, and once."""
    source = tmp_path / 'source'
    to_yolo(source, masks=False)
    (source / 'images').rename(tmp_path / 'pool')
    (source / 'images').mkdir()
    (source / 'images/old').symlink_to(tmp_path / 'pool')
    (source / 'images/new').mkdir()
    (tmp_path / 'pool/clip_a_001.png').rename(source / 'images/new/clip_a_001.png')
    for name in ('a', 'z', 'labels/z'):
        (source / name).symlink_to(source)
        (source / f'{name}_new').symlink_to(source / 'images/new')
    write(source / 'data.yaml', f'train: images/new\nval: images/old\nnames: {NAMES}\n')
    written, notes = run(source, tmp_path / 'out')
    assert not notes
    found = {
        n: [r.image.relative_to(source).parts[:2] for r in p] for n, p in written.splits.items()
    }
    assert found == {'train': [('images', 'new')], 'val': [('images', 'old')] * 4}


def test_links_are_followed(tmp_path):
    to_yolo(tmp_path / 'source', masks=False)
    images = tmp_path / 'source/images'
    images.rename(tmp_path / 'pool')
    images.mkdir()
    for path in (tmp_path / 'pool').iterdir():
        (images / path.name).symlink_to(Path('../../pool', path.name))
    run(tmp_path / 'source', tmp_path / 'out')
    assert read_back(tmp_path / 'out').keys() == IMAGES.keys()


def test_the_names_of_yolo_are_where_there_are_some(tmp_path):
    to_yolo(tmp_path / 'source', masks=False)
    write(tmp_path / 'source/args.yaml', 'task: detect\n')
    numbered = ''.join(f'  "{i}": {name}\n' for i, name in enumerate(NAMES))
    write(tmp_path / 'source/data.yaml', f'names:\n{numbered}')
    written, _ = run(tmp_path / 'source', tmp_path / 'out')
    assert written.classes == NAMES
    write(tmp_path / 'source/train.txt', '\n'.join(f'images/{name}.png' for name in IMAGES))
    write(tmp_path / 'source/val.txt', 'images/clip_c_001.png')
    write(tmp_path / 'source/data.yaml', 'train: train.txt\nval: val.txt\n')
    write(tmp_path / 'source/classes.txt', '\n'.join(NAMES))
    written, _ = run(tmp_path / 'source', tmp_path / 'again')
    assert written.classes == NAMES
    assert [record.image.stem for record in written.splits['val']] == ['clip_c_001']


@pytest.mark.parametrize('count', [4, 17])
def test_of_yolos_keypoints_the_box_is_read(count, tmp_path):
    to_yolo(tmp_path / 'source', masks=False)
    run(tmp_path / 'source', tmp_path / 'boxes')
    with (tmp_path / 'source/data.yaml').open('a') as file:
        file.write(f'kpt_shape: [{count}, 3]\n')
    for path in tmp_path.glob('source/labels/*.txt'):
        path.write_text(path.read_text().replace('\n', ' 0.2 0.3 2' * count + '\n'))
    _, notes = run(tmp_path / 'source', tmp_path / 'out')
    assert read_back(tmp_path / 'out') == read_back(tmp_path / 'boxes') and not notes


def spoil_coco(root: Path, **fields: object) -> None:
    to_coco(root, masks=True)
    path = root / 'labels/all.json'
    content = json.loads(path.read_text())
    for key, value in fields.items():
        where = 'images' if key in ('width', 'height') else 'annotations'
        content[where][0][key] = value
    write(path, content)


@pytest.mark.parametrize(
    ('fields', 'objects'),
    [
        (dict(segmentation=[2, 3, 20, 3, 20, 13, 2, 13]), 2),
        (dict(segmentation=[[2, 3, 'x', 3, 20, 13]]), 1),
        (dict(segmentation=[[2, 3, float('nan'), 3, 20, 13]]), 1),
        (dict(segmentation=dict(size=[30, 40], counts=[62, 10, 1128])), 2),
        (dict(segmentation=dict(size=[30, 40], counts=[62, 10, 1128]), bbox=None), 1),
        (dict(segmentation=dict(size=[30, 40], counts=[-5, 3])), 1),
        (dict(segmentation=dict(size=[30, 40], counts=[5, 3])), 1),
        (dict(segmentation=dict(size=[48, 32], counts=[62, 10, 1464])), 1),
        (dict(segmentation=dict(size=[30, 40], counts='~~~')), 1),
        (dict(segmentation=dict(size=[30, 40])), 1),
        (dict(height=None), 2),
    ],
)
def test_odd_values_of_coco(fields, objects, tmp_path):
    spoil_coco(tmp_path / 'source', **fields)
    run(tmp_path / 'source', tmp_path / 'out')
    assert len(read_back(tmp_path / 'out')['clip_a_001']) == objects


@pytest.mark.parametrize('key', ['file_name', 'id'])
def test_an_image_of_coco_that_lacks_its_name_or_id_is_left_out(key, tmp_path):
    source = tmp_path / 'source'
    to_coco(source, masks=False)
    path = source / 'labels/all.json'
    content = json.loads(path.read_text())
    del content['images'][0][key]
    write(path, content)
    _, notes = run(source, tmp_path / 'out')
    assert f'{path}, entry 1' in said(notes)
    assert len(read_back(tmp_path / 'out')) == len(content['images']) - 1


def test_objects_of_coco_without_a_box_have_that_of_their_polygons(tmp_path):
    parts = [[2, 3, 8, 3, 8, 9, 2, 9], [20, 3, 26, 3, 26, 12, 20, 12]]
    spoil_coco(tmp_path / 'source', segmentation=parts, bbox=None)
    run(tmp_path / 'source', tmp_path / 'out')
    _, box, mask = read_back(tmp_path / 'out')['clip_a_001'][0]
    assert box == [2, 3, 26, 12] and mask.sum() == 6 * 6 + 6 * 9


@pytest.mark.parametrize('by_cvat', [False, True])
def test_masks_of_cvat_are_no_crowds(by_cvat, tmp_path):
    mask = dict(size=[30, 40], counts=[62, 10, 1128])
    attributes = dict(occluded=False) if by_cvat else dict(color='red')
    spoil_coco(tmp_path / 'source', segmentation=mask, iscrowd=1, attributes=attributes)
    _, notes = run(tmp_path / 'source', tmp_path / 'out')
    assert ('annotation 0' in said(notes)) == by_cvat
    files = (tmp_path / 'out/annotations').glob('*.json')
    written = [one for file in files for one in json.loads(file.read_text())['annotations']]
    assert sum(one['iscrowd'] for one in written) == (not by_cvat)


@pytest.mark.parametrize(
    ('task', 'objects'),
    [(None, NAMES[:2]), ('detection', NAMES[:2]), ('instances', NAMES[1:2])],
)
def test_objects_without_a_mask_among_others(task, objects, tmp_path):
    """The task that was asked for is done without them."""
    spoil_coco(tmp_path / 'source', segmentation=[[2, 3, 20, 3]])
    written, notes = run(tmp_path / 'source', tmp_path / 'out', task=task)
    assert written.task == (task or 'detection')
    assert ('clip_a_001.jpg: disc' in said(notes)) == (task != 'detection')
    assert [one[0] for one in read_back(tmp_path / 'out')['clip_a_001']] == objects


@pytest.mark.parametrize('task', ['instances', 'segmentation'])
def test_boxes_alone_have_no_masks(task, tmp_path):
    to_coco(tmp_path / 'source', masks=False)
    with pytest.raises(DataError, match=task):
        run(tmp_path / 'source', tmp_path / 'out', task=task)


@pytest.mark.parametrize(
    ('name', 'content'),
    [('data.yaml', b'names:\n\t- a'), ('data.yaml', b'names: 3'), ('classes.txt', b'caf\xe9')],
)
def test_files_that_cannot_be_read_are_named(name, content, tmp_path):
    to_yolo(tmp_path / 'source', masks=False)
    (tmp_path / 'source/data.yaml').unlink()
    (tmp_path / 'source' / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        run(tmp_path / 'source', tmp_path / 'out')


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def enlarge(path: Path) -> None:
    Image.new('P', (90, 90)).save(path)


# The format, the file of an image, and what makes it unreadable.
BAD_FILES = [
    ('voc', 'Annotations/clip_b_002.xml', cut),
    ('voc', 'Annotations/clip_b_002.xml',
     lambda path: write(path, f'<?xml version="1.0" encoding="foo"?>{path.read_text()}')),
    ('yolo', 'labels/clip_b_002.txt', lambda path: path.write_bytes(b'0 .5 .5 .2 .2\n\xff')),
    ('labelme', 'clip_b_002.json', lambda path: path.write_text(path.read_text()[:-1])),
    ('labelme', 'clip_b_002.json', lambda path: write(path, dict(imagePath='a.jpg', shapes=3))),
    ('labelme', 'clip_b_002.json', lambda path: write(path, [dict(imagePath='a', shapes=[])])),
    ('maps', 'SegmentationClass/clip_b_002.png', cut),
    ('maps', 'SegmentationClass/clip_b_002.png', enlarge),
]  # fmt: skip


@pytest.mark.parametrize(('name', 'file', 'spoil'), BAD_FILES)
def test_a_bad_file_is_named_and_its_image_left_out(name, file, spoil, tmp_path):
    source = tmp_path / 'source'
    if name == 'maps':
        to_maps(source, 'voc')
    else:
        WRITERS[name](source, masks=False)
    spoil(source / file)
    written, notes = run(source, tmp_path / 'out')
    images = {record.image.stem for part in written.splits.values() for record in part}
    assert images == IMAGES.keys() - {'clip_b_002'}
    assert str(source / file) in said(notes)


def test_where_nothing_is_left_it_is_said_why(tmp_path, monkeypatch, capsys):
    to_voc(tmp_path / 'source', masks=False)
    for path in (tmp_path / 'source/Annotations').iterdir():
        cut(path)
    paths = [str(tmp_path / 'source'), '--out', str(tmp_path / 'out')]
    monkeypatch.setattr(sys, 'argv', ['import_dataset.py', *paths])
    with pytest.raises(SystemExit):
        import_dataset.main()
    printed = capsys.readouterr()
    assert 'clip_a_001.xml' in printed.out and 'no image is left' in printed.err
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('kind', ['coco', 'yolo', 'maps'])
def test_an_image_that_cannot_be_read_is_left_out(kind, tmp_path):
    source = tmp_path / 'source'
    if kind == 'maps':
        to_maps(source, 'voc')
    else:
        WRITERS[kind](source, masks=False)
    (broken,) = [
        path
        for folder in ('images', 'photos', 'JPEGImages')
        for path in source.glob(f'{folder}/clip_b_002.*')
    ]
    broken.write_bytes(b'')
    written, notes = run(source, tmp_path / 'out')
    assert sum(map(len, written.splits.values())) == len(IMAGES) - 1
    assert str(broken) in said(notes)


def test_one_image_is_too_few(tmp_path):
    to_labelme(tmp_path / 'source', masks=False)
    for name in list(IMAGES)[1:]:
        (tmp_path / 'source' / f'{name}.json').unlink()
    with pytest.raises(DataError, match='validate'):
        run(tmp_path / 'source', tmp_path / 'out')


def test_the_new_folder_may_lie_in_the_source(tmp_path):
    to_voc(tmp_path / 'source', masks=False)
    for _ in range(2):
        written, _ = run(tmp_path / 'source', tmp_path / 'source/out', overwrite=True)
        assert sum(map(len, written.splits.values())) == len(IMAGES)


@pytest.mark.parametrize('kind', ['objects', 'maps'])
def test_a_test_split_is_what_test_py_measures_on(kind, tmp_path):
    source = tmp_path / 'source'
    if kind == 'maps':
        to_maps(source, 'roboflow')
        folder, suffixes = source / 'val', ('.jpg', '_mask.png')
    else:
        to_labelme(source / 'train', masks=False)
        (source / 'val').mkdir()
        folder, suffixes = source / 'train', ('.jpg', '.json')
        for suffix in suffixes:
            (folder / f'clip_b_002{suffix}').rename(source / 'val' / f'clip_b_002{suffix}')
    (source / 'test').mkdir()
    for suffix in suffixes:
        (folder / f'clip_c_001{suffix}').rename(source / 'test' / f'clip_c_001{suffix}')
    if kind == 'maps':
        (source / 'test/_classes.csv').write_bytes((source / 'train/_classes.csv').read_bytes())
    run(source, tmp_path / 'out')
    config = load_config(str(tmp_path / 'out/out.py'))
    report = check_dataset(config, ['train', 'val', 'test'])
    assert not report.of('error')
    assert sorted(report.images.values()) == [1, 1, 3]
    (test,) = [one for one in report.datasets if one.split == 'test']
    assert Path(test.samples[0].path).stem == 'clip_c_001'


@pytest.mark.parametrize('val', [None, 0.4])
def test_a_test_split_without_labels_is_left_out(val, tmp_path):
    source = tmp_path / 'source'
    for split in ('train', 'val', 'test'):
        to_yolo(source / split, masks=False)
        (source / split / 'data.yaml').unlink()
    shutil.rmtree(source / 'test/labels')
    write(source / 'classes.txt', '\n'.join(NAMES))
    written, notes = run(source, tmp_path / 'out', val=val)
    assert {name: len(part) for name, part in written.splits.items()} == (
        {'train': 6, 'val': 4} if val else {'train': 5, 'val': 5}
    )
    assert any(kind.startswith('test images') for kind in notes)
    assert 'test_split =' not in (tmp_path / 'out/out.py').read_text()


def test_classes_may_be_those_of_a_known_dataset(tmp_path, call_tool):
    to_yolo(tmp_path / 'source', masks=False)
    write(tmp_path / 'source/data.yaml', f'names: {list(CocoDataset.METAINFO["classes"])}')
    code, text = call_tool('import_dataset.py', tmp_path / 'source', '--out', tmp_path / 'out')
    assert code == 0 and 'train.py' in text
    assert (tmp_path / 'out/overview.png').is_file()


def test_the_overview_has_room_for_all_classes_whatever_their_names(tmp_path, call_tool):
    to_yolo(tmp_path / 'source', masks=False)
    names = [*NAMES, r'a $\foo$ b', *(f'class {number}' for number in range(60))]
    write(tmp_path / 'source/data.yaml', f'names: {json.dumps(names)}')
    code, text = call_tool('import_dataset.py', tmp_path / 'source', '--out', tmp_path / 'out')
    assert code == 0 and 'train.py' in text
    assert Image.open(tmp_path / 'out/overview.png').size[1] > 12 * len(names) + 640


def test_the_tool_writes_a_config_that_reads_the_data(run_tool: Callable, tmp_path):
    to_coco(tmp_path / 'source', masks=True)
    done = run_tool('import_dataset.py', 'source', '--out', 'data/shapes')
    assert done.returncode == 0, done.stderr + done.stdout
    assert 'tools/train.py data/shapes/shapes.py' in done.stdout
    assert Image.open(tmp_path / 'data/shapes/overview.png').size[0] > 1000
    text = (tmp_path / 'data/shapes/shapes.py').read_text()
    assert len(text.splitlines()) <= 10 and 'mask_rcnn' in text
    done = run_tool('import_dataset.py', 'nowhere', '--out', 'data/other')
    assert done.returncode == 1 and 'nowhere' in done.stderr and 'Traceback' not in done.stderr
    assert set(FORMATS) == {*WRITERS, 'masks'}


def test_the_tool_draws_maps_too(tmp_path, monkeypatch, capsys):
    to_maps(tmp_path / 'source', 'roboflow')
    paths = [str(tmp_path / 'source'), '--out', str(tmp_path / 'out')]
    monkeypatch.setattr(sys, 'argv', ['import_dataset.py', *paths])
    assert import_dataset.main() == 0
    assert Image.open(tmp_path / 'out/overview.png').size[0] > 1000
    assert 'tools/train.py' in capsys.readouterr().out


@pytest.mark.parametrize(
    'task',
    [
        pytest.param('detection', marks=pytest.mark.slow),
        pytest.param('instances', marks=pytest.mark.slow),
        'segmentation',
    ],
)
def test_what_was_imported_is_trained_and_predicts(task, tmp_path, run_tool, call_tool):
    """The three commands of docs/own_data.md, on small images, for one epoch and from nothing."""
    if task == 'segmentation':
        to_maps(tmp_path / 'source', 'roboflow')
    else:
        to_coco(tmp_path / 'source', masks=True)
    written, _ = run(tmp_path / 'source', tmp_path / 'mine', task=task)
    small = ('image_size=64', 'epochs=1', 'batch_size=2', 'num_workers=0', 'pretrained=False')
    done = run_tool('train.py', 'mine/mine.py', '--seed', 0, '--cfg-options', *small)
    assert done.returncode == 0, done.stderr[-3000:]
    work_dir = tmp_path / 'work_dirs/mine'
    (best,) = work_dir.glob('best_*_epoch_1.pth')
    metric = {'detection': 'coco_bbox_mAP', 'instances': 'coco_segm_mAP', 'segmentation': 'mIoU'}
    assert best.name == f'best_{metric[task]}_epoch_1.pth'
    image = next((tmp_path / 'source').rglob('clip_a_001.jpg'))
    out = ('--out-dir', tmp_path / 'out', '--score-thr', 0)
    code, text = call_tool('infer.py', work_dir / 'mine.py', best, image, *out)
    assert code == 0, text
    categories = json.loads((tmp_path / 'out/categories.json').read_text())
    assert [one['name'] for one in categories] == written.classes
