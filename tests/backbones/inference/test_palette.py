"""Colours of classes: saved with a model, in a file, or made."""

import cv2
import numpy as np
import pytest
from mmdet.datasets import CocoDataset
from mmseg.datasets import ADE20KDataset, BaseSegDataset

from backbones.errors import ConfigError
from backbones.inference.palette import choose_palette

THREE = ['cat', 'dog', 'größe']
COLORS = [(1, 2, 3), (40, 50, 60), (255, 254, 253)]


@pytest.mark.parametrize(
    'saved',
    [
        [list(color) for color in COLORS],
        np.array(COLORS, np.uint8),
    ],
)
def test_takes_the_palette_saved_with_the_model(saved):
    palette = choose_palette(None, THREE, saved)
    assert palette == COLORS
    assert all(type(value) is int for color in palette for value in color)


@pytest.mark.parametrize(
    'saved',
    [
        *(None, [], 'random', (1, 2, 3), COLORS[:2], [*COLORS, (9, 9, 9)]),
    ],
)
def test_makes_colors_where_the_saved_ones_do_not_do(saved):
    assert choose_palette(None, THREE, saved) == choose_palette(None, THREE, None)


def test_a_saved_color_of_two_classes_stays_with_the_first():
    """As of road and skyscraper in ADE20K's palette."""
    saved = [(1, 2, 3), (140, 140, 140), (4, 5, 6), (140, 140, 140), (140, 140, 140)]
    palette = choose_palette(None, ['x'] * 5, saved)
    assert palette[:3] == saved[:3]
    assert len(set(palette)) == 5


def test_one_saved_color_is_that_of_a_single_class():
    assert choose_palette(None, ['cell'], (1, 2, 3)) == [(1, 2, 3)]


@pytest.mark.parametrize('count', [1, 2, 9, 80, 150, 300])
def test_made_colors_differ_and_stay_when_classes_are_added(count):
    palette = choose_palette(None, ['x'] * count, None)
    assert len(set(palette)) == count
    assert all(0 <= value <= 255 for color in palette for value in color)
    assert choose_palette(None, ['x'] * (count + 1), None)[:count] == palette


def test_background_is_gray_and_takes_no_color_of_others():
    background, *others = choose_palette(None, ['background', *THREE], None)
    assert max(background) - min(background) < 10
    assert others == choose_palette(None, THREE, None)


def test_mmsegs_random_palette_is_not_taken_for_a_chosen_one():
    """It made CamVid's sky, building and pavement green."""
    dataset = BaseSegDataset(metainfo=dict(classes=['x'] * 11), lazy_init=True)
    saved = dataset.metainfo['palette']
    assert choose_palette(None, ['x'] * 11, saved) == choose_palette(None, ['x'] * 11, None)


def test_a_known_sets_colors_are_those_of_its_own_classes():
    """mmdet keeps COCO's 80 for other classes: two of three kinds of cells were dark red."""

    def colors(kind, classes):
        saved = kind(metainfo=dict(classes=classes), lazy_init=True).metainfo['palette']
        return choose_palette(None, classes, saved)

    coco, ade = CocoDataset.METAINFO, ADE20KDataset.METAINFO
    assert colors(CocoDataset, coco['classes']) == coco['palette']
    assert colors(CocoDataset, THREE) == choose_palette(None, THREE, None)
    assert len({*colors(ADE20KDataset, ade['classes'])} & {*map(tuple, ade['palette'])}) > 140
    # mmseg picks those of the named classes.
    assert colors(ADE20KDataset, ['sky', 'wall']) == [(6, 230, 230), (120, 120, 120)]


def test_the_first_colors_differ_strongly():
    colors = np.float32(choose_palette(None, ['x'] * 11, None))[None] / 255
    lab = cv2.cvtColor(colors, cv2.COLOR_RGB2LAB)[0]
    distances = np.linalg.norm(lab[:, None] - lab, axis=2)
    assert distances[~np.eye(11, dtype=bool)].min() > 40


def test_reads_a_file(tmp_path):
    path = tmp_path / 'colors.txt'
    path.write_text('230 80 50\n\n#0a0B0c\n 1, 2,3 \n9 9 9\n')
    assert choose_palette(str(path), THREE, COLORS) == [(230, 80, 50), (10, 11, 12), (1, 2, 3)]


@pytest.mark.parametrize('line', ['230 80', '1 2 3 4', '256 0 0', '-1 0 0', '#12345', 'rot', '#'])
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / 'colors.txt'
    path.write_text(f'1 2 3\n{line}\n4 5 6\n')
    with pytest.raises(ConfigError, match=r'colors\.txt, line 2: .* is not a color'):
        choose_palette(str(path), THREE, None)


def test_files_that_do_not_do(tmp_path):
    short, binary = tmp_path / 'colors.txt', tmp_path / 'image.png'
    short.write_text('1 2 3\n4 5 6\n')
    binary.write_bytes(b'\x89PNG\xff\xfe\x00')
    for path, reason in ((short, 'has 2 colors'), (binary, 'utf-8'), ('none', 'No such file')):
        with pytest.raises(ConfigError, match=reason):
            choose_palette(str(path), THREE, None)
