"""Predictions as files that other programs read."""

import io
import json
import re

import numpy as np
import pytest
from mmdet.datasets import CocoDataset
from PIL import Image
from pycocotools import mask as coco_mask
from tiny import ROOT

from backbones.inference import CroppedMask, Detections, Segmentation
from backbones.inference.results import (
    categories_of,
    coco_results,
    encode_seg_map,
    image_id_of,
)


def test_cocos_own_category_ids():
    """As in COCO's annotation files: 80 of the numbers from 1 to 90."""
    by_name = {
        category['name']: category['id']
        for category in categories_of(CocoDataset.METAINFO['classes'], 'detection')
    }
    assert len(set(by_name.values())) == 80
    some = ('person', 'fire hydrant', 'stop sign', 'backpack', 'dining table', 'toilet', 'tv')
    assert [by_name[name] for name in some] == [1, 11, 13, 27, 67, 70, 72]
    assert [by_name[name] for name in ('refrigerator', 'book', 'toothbrush')] == [82, 84, 90]


@pytest.mark.parametrize(('task', 'ids'), [('detection', [1, 2]), ('segmentation', [0, 1])])
def test_other_category_ids(task, ids):
    """Of a segmentation those are the values in its PNGs."""
    categories = categories_of(('disc', 'ring'), task)
    assert [category['id'] for category in categories] == ids
    assert [category['name'] for category in categories] == ['disc', 'ring']


def test_image_ids_are_unique_integers():
    assert image_id_of('val/000000000139.jpg') == 139
    names = ['a/000001.jpg', 'b/000001.jpg', 'a/1.jpg', 'a/1.png', '².jpg', '12a.jpg', '\udce4.jpg']
    ids = [image_id_of(name) for name in names]
    ids += [image_id_of('000000000139.mp4', frame) for frame in range(3)]
    assert len(set(ids)) == len(ids)
    assert all(type(each) is int and 2**31 < each < 2**53 for each in ids)
    assert image_id_of('a/000001.jpg') == ids[0]


def test_the_documentation_maps_results_to_annotations_with_other_ids(tmp_path, monkeypatch):
    """Category ids from 0 on are those of Roboflow's and Label Studio's files."""
    page = (ROOT / 'docs' / 'inference.md').read_text(encoding='utf-8')
    (code,) = re.findall(r'```python\n(import json.*?)```', page, re.DOTALL)
    categories = [{'id': 0, 'name': 'ring'}, {'id': 7, 'name': 'disc'}]
    images = [{'id': n, 'file_name': f'{n}.jpg'} for n in range(2)]
    files = {
        'annotations.json': dict(images=images, categories=categories),
        'outputs/mask_rcnn_effv2_s2/categories.json': categories_of(('disc', 'ring'), 'detection'),
    }
    boxes = np.array([[2, 1, 5, 3], [0, 0, 4, 4]], np.float32)
    found = Detections(boxes, None, np.arange(2), None)
    for number in range(2):
        name = f'photos/{number}.jpg'
        image = {'image_id': image_id_of(name), 'file_name': name}
        results = coco_results(found, (6, 8), image, categories_of(('disc', 'ring'), 'detection'))
        files[f'outputs/mask_rcnn_effv2_s2/data/photos/{number}.json'] = results
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    variables = {}
    exec(code, variables)
    mapped = [(one['image_id'], one['category_id'], one['bbox'][0]) for one in variables['results']]
    # Discs are the boxes that begin at 2.
    assert sorted(mapped) == [(0, 0, 0), (0, 7, 2), (1, 0, 0), (1, 7, 2)]


def test_detections_in_cocos_format():
    pixels = np.array([[True, False, True], [True, True, True]])
    detections = Detections(
        boxes=np.array([[2, 1, 5, 3]], np.float32),
        scores=np.array([0.75], np.float32),
        labels=np.array([1]),
        masks=[CroppedMask(2, 1, pixels)],
    )
    categories = categories_of(('disc', 'ring'), 'detection')
    (result,) = coco_results(detections, (6, 8), {'image_id': 7}, categories)
    assert result['image_id'] == 7 and result['category_id'] == 2
    assert result['bbox'] == [2, 1, 3, 2] and result['score'] == 0.75
    whole = np.zeros((6, 8), bool)
    whole[1:3, 2:5] = pixels
    np.testing.assert_array_equal(coco_mask.decode(result['segmentation']), whole)


@pytest.mark.parametrize(
    ('seg_map', 'mode'),
    [
        (np.array([[0, 1], [2, 255]], np.uint8), 'P'),
        (np.array([[0, 255], [256, 65535]], np.uint16), 'I;16'),
    ],
)
def test_a_segmentation_map_as_png(seg_map, mode):
    content = encode_seg_map(Segmentation(seg_map), [(1, 2, 3), (4, 5, 6), (7, 8, 9)])
    with Image.open(io.BytesIO(content)) as image:
        assert image.mode == mode
        np.testing.assert_array_equal(np.array(image), seg_map)
        if mode == 'P':
            colors = np.array(image.convert('RGB')).reshape(-1, 3).tolist()
            assert colors == [[1, 2, 3], [4, 5, 6], [7, 8, 9], [0, 0, 0]]
