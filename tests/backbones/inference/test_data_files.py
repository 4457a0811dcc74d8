"""Predictions as files that other programs read."""

import numpy as np
import pytest
from mmdet.datasets import CocoDataset
from PIL import Image
from pycocotools import mask as coco_mask

from backbones.inference import Detections, Segmentation
from backbones.inference.data_files import (
    categories_of,
    coco_results,
    image_id_of,
    write_json,
    write_label_map,
)
from backbones.inference.prediction import CroppedMask


def test_cocos_own_numbers():
    """As in COCO's annotation files: 80 of the numbers from 1 to 90."""
    by_name = {
        category['name']: category['id']
        for category in categories_of(CocoDataset.METAINFO['classes'])
    }
    assert len(set(by_name.values())) == 80
    some = ('person', 'fire hydrant', 'stop sign', 'backpack', 'dining table', 'toilet', 'tv')
    assert [by_name[name] for name in some] == [1, 11, 13, 27, 67, 70, 72]
    assert [by_name[name] for name in ('refrigerator', 'book', 'toothbrush')] == [82, 84, 90]


def test_other_classes_are_counted_from_1():
    assert categories_of(('disc', 'ring')) == [{'id': 1, 'name': 'disc'}, {'id': 2, 'name': 'ring'}]


def test_detections_in_cocos_format():
    pixels = np.array([[True, False, True], [True, True, True]])
    detections = Detections(
        boxes=np.array([[2, 1, 5, 3]], np.float32),
        scores=np.array([0.75], np.float32),
        labels=np.array([1]),
        masks=[CroppedMask(2, 1, pixels)],
    )
    (result,) = coco_results(detections, (6, 8), 'a.jpg', categories_of(('disc', 'ring')))
    assert result['image_id'] == 'a.jpg' and result['category_id'] == 2
    assert result['bbox'] == [2, 1, 3, 2] and result['score'] == 0.75
    whole = np.zeros((6, 8), bool)
    whole[1:3, 2:5] = pixels
    np.testing.assert_array_equal(coco_mask.decode(result['segmentation']), whole)


@pytest.mark.parametrize(
    ('name', 'image_id'),
    [
        ('val/000000000139.jpg', 139),
        ('photos/coffee.png', 'photos/coffee.png'),
        ('12a.jpg', '12a.jpg'),
        ('².jpg', '².jpg'),
    ],
)
def test_picture_numbers(name, image_id):
    assert image_id_of(name) == image_id


def test_a_label_map_is_an_indexed_png(tmp_path):
    label_map = np.array([[0, 1], [2, 255]], np.uint8)
    write_label_map(tmp_path / 'a.png', Segmentation(label_map), [(1, 2, 3), (4, 5, 6), (7, 8, 9)])
    with Image.open(tmp_path / 'a.png') as picture:
        assert picture.mode == 'P'
        np.testing.assert_array_equal(np.array(picture), label_map)
        np.testing.assert_array_equal(
            np.array(picture.convert('RGB')), [[[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [0, 0, 0]]]
        )


def test_more_than_255_classes_are_a_png_of_16_bits(tmp_path):
    label_map = np.array([[0, 255], [256, 65535]], np.uint16)
    write_label_map(tmp_path / 'a.png', Segmentation(label_map), [(1, 2, 3)] * 300)
    with Image.open(tmp_path / 'a.png') as picture:
        assert picture.mode.startswith('I')
        np.testing.assert_array_equal(np.array(picture), label_map)


def test_what_cannot_be_written_leaves_what_was_there(tmp_path):
    write_json(tmp_path / 'a.json', ['ä'])
    with pytest.raises(TypeError):
        write_json(tmp_path / 'a.json', [object()])
    assert (tmp_path / 'a.json').read_text(encoding='utf-8') == '["ä"]\n'
    assert [path.name for path in tmp_path.iterdir()] == ['a.json']
