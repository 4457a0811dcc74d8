"""Results for other programs: COCO's own tools, supervision and trackers."""

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from trained_tiny import write_trained
from videos import write_video

from backbones.errors import InputError
from backbones.inference import Inferencer, Result

ROOT = Path(__file__).resolve().parents[3]
TASKS = ('fpn', 'retinanet', 'mask_rcnn')


@pytest.fixture(scope='module', params=TASKS)
def result(request, tmp_path_factory, shapes) -> Result:
    """The prediction for an image in a file, every object with a score."""
    folder = tmp_path_factory.mktemp(request.param)
    model = write_trained(folder, request.param, shapes)
    path = folder / '000000000139.png'
    coarse = np.random.default_rng(0).integers(0, 255, (5, 6, 3), np.uint8)
    cv2.imwrite(str(path), cv2.resize(coarse, (90, 70)))
    return next(Inferencer(*model, score_thr=0)(path))


def whole_masks(result: Result) -> list[np.ndarray]:
    """(70, 90), bool, for every object or class."""
    if hasattr(result.prediction, 'seg_map'):
        return [
            result.prediction.seg_map == label for label in np.unique(result.prediction.seg_map)
        ]
    masks = []
    for mask in result.prediction.masks or ():
        masks.append(np.zeros((70, 90), bool))
        height, width = mask.shape
        masks[-1][mask.y : mask.y + height, mask.x : mask.x + width] = mask.pixels
    return masks


def test_coco_results(result):
    rows = json.loads(json.dumps(result.to_coco()))
    is_segmentation = hasattr(result.prediction, 'seg_map')
    masks = whole_masks(result)
    assert len(rows) == (len(masks) if is_segmentation else len(result.prediction.boxes)) > 0
    assert {row['image_id'] for row in rows} == {139}
    if is_segmentation:
        labels = np.unique(result.prediction.seg_map).tolist()
        assert [row['category_id'] for row in rows] == labels and 'score' not in rows[0]
    else:
        assert [row['category_id'] - 1 for row in rows] == result.prediction.labels.tolist()
        np.testing.assert_allclose(
            [row['score'] for row in rows], result.prediction.scores, atol=1e-5
        )
    for row, mask in zip(rows, masks, strict=bool(masks)):
        np.testing.assert_array_equal(coco_mask.decode(row['segmentation']), mask)


def test_supervisions_detections(result):
    supervision = pytest.importorskip('supervision')
    found, masks = result.to_supervision(), whole_masks(result)
    assert isinstance(found, supervision.Detections)
    names = [result._visualizer.class_names[label] for label in found.class_id]
    assert found['class_name'].tolist() == names
    if masks:
        np.testing.assert_array_equal(np.asarray(found.mask), masks)
    if hasattr(result.prediction, 'seg_map'):
        assert found.confidence is None
        for box, mask in zip(found.xyxy, masks, strict=True):
            rows, columns = np.nonzero(mask)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    else:
        np.testing.assert_array_equal(found.xyxy, result.prediction.boxes)
        np.testing.assert_array_equal(found.confidence, result.prediction.scores)
    drawn = supervision.BoxAnnotator().annotate(result.image.copy(), found)
    if masks:
        drawn = supervision.MaskAnnotator().annotate(drawn, found)
    assert (drawn != result.image).any()


def test_nothing_found(tmp_path, shapes):
    pytest.importorskip('supervision')
    model = write_trained(tmp_path, 'mask_rcnn', shapes)
    result = next(Inferencer(*model, score_thr=1)(np.zeros((70, 90, 3), np.uint8)))
    assert len(result.to_supervision()) == 0 and result.to_coco() == []


def test_a_problem_is_no_prediction():
    for convert in ('to_coco', 'to_supervision'):
        with pytest.raises(InputError, match='does not exist'):
            getattr(Result('nowhere.jpg', problem='does not exist'), convert)()


def test_frames_of_a_video_have_ids_of_their_own(tmp_path, shapes):
    inferencer = Inferencer(*write_trained(tmp_path, 'retinanet', shapes), score_thr=0)
    rows = [result.to_coco()[0] for result in inferencer(write_video(tmp_path / 'a.mp4', 3))]
    assert [row['frame'] for row in rows] == [0, 1, 2]
    assert len({row['image_id'] for row in rows}) == 3


def test_the_tracker_of_the_readme(tmp_path, shapes, monkeypatch):
    """As it stands there, with a tiny model."""
    pytest.importorskip('trackers')
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    (example,) = re.findall('```python\n([^`]*trackers[^`]*)```', text)
    config, checkpoint = write_trained(tmp_path, 'retinanet', shapes)
    (tmp_path / 'det_configs').mkdir()
    config.rename(tmp_path / 'det_configs/retinanet_effv2_s2.py')
    checkpoint.rename(tmp_path / 'retinanet_s2.pth')
    write_video(tmp_path / 'drive.mp4', 8)
    monkeypatch.chdir(tmp_path)
    variables = {}
    exec(example, variables)
    assert variables['result'].frame == 7
    assert len(variables['objects'].tracker_id) == len(variables['objects'])
