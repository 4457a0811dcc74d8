"""Tables in, tables out: the predictions that infer.py makes for the same inputs."""

import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import skimage
from PIL import Image
from trained_tiny import write_trained
from videos import write_video

from backbones.inference import Inferencer
from backbones.inference.masks import encode_mask

pa = pytest.importorskip('pyarrow', reason='requirements/scale.txt is not installed')

from backbones.inference.predictor import Predictor  # noqa: E402

PHOTOGRAPH = Path(skimage.data_dir, 'coffee.png')


@pytest.mark.parametrize('task', ['fpn', 'mask_rcnn'])
def test_rows_are_the_predictions(task, tmp_path, shapes):
    model = write_trained(tmp_path, task, shapes)
    write_video(tmp_path / 'video.mp4', 5)
    (tmp_path / 'bad.jpg').write_bytes(b'nothing')
    paths = [str(tmp_path / 'video.mp4'), str(tmp_path / 'bad.jpg'), str(PHOTOGRAPH)]
    inferencer = Inferencer(*model, score_thr=0)
    expected = list(inferencer(paths))
    predictor = Predictor(*model, score_thr=0)

    table = predictor(pa.table({'path': paths, 'other': [1, 2, 3]}))

    assert json.loads(table.schema.metadata[b'classes']) == list(inferencer.classes)
    rows = table.to_pylist()
    assert len(rows) == len(expected) == 7
    for row, result in zip(rows, expected, strict=True):
        assert (row['path'], row['problem'], row['time']) == (
            result.source,
            result.problem,
            result.time,
        )
        if result.problem:
            assert row['path'].endswith('bad.jpg')
            continue
        assert row['frame'] == (None if result.time is None else result.frame)
        size = row['height'], row['width']
        assert size == result.image.shape[:2]
        if task == 'fpn':
            seg_map = Image.open(io.BytesIO(row['seg_map']))
            assert seg_map.mode == 'P'
            np.testing.assert_array_equal(seg_map, result.prediction.seg_map)
            continue
        found = result.prediction
        assert len(found.boxes) == 10
        np.testing.assert_array_equal(np.float32(row['boxes']), found.boxes)
        np.testing.assert_array_equal(np.float32(row['scores']), found.scores)
        assert row['labels'] == found.labels.tolist()
        assert row['masks'] == [encode_mask(mask, size) for mask in found.masks]


@pytest.fixture(scope='module')
def predictor(tmp_path_factory, shapes) -> Predictor:
    return Predictor(*write_trained(tmp_path_factory.mktemp('fpn'), 'fpn', shapes), every=2)


def test_encoded_images_need_no_path(predictor):
    content = PHOTOGRAPH.read_bytes()
    columns = {'bytes': [content, b'nothing', content, None], 'path': ['a', 'b', None, None]}
    rows = predictor(pa.table(columns)).to_pylist()
    assert [row['path'] for row in rows] == ['a', 'b', 'row 2', 'row 3']
    assert [row['problem'] is None for row in rows] == [True, False, True, False]
    expected = predictor(pa.table({'path': [str(PHOTOGRAPH)]})).to_pylist()[0]['seg_map']
    assert rows[0]['seg_map'] == rows[2]['seg_map'] == expected


def test_every_second_frame(predictor, tmp_path):
    write_video(tmp_path / 'video.mp4', 5)
    rows = predictor(pa.table({'path': [str(tmp_path / 'video.mp4')]})).to_pylist()
    assert [row['frame'] for row in rows] == [0, 2, 4]


def test_an_empty_table(predictor):
    table = predictor(pa.table({'path': pa.array([], pa.string())}))
    assert (table.num_rows, table.schema) == (0, predictor.schema)


def test_endless_tables_are_read_as_they_are_used(predictor, monkeypatch):
    monkeypatch.setattr('backbones.inference.predictor.MAX_ROWS', 64)
    image = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), 90, np.uint8)).save(image, 'PNG')
    batch = pa.table({'bytes': [image.getvalue()] * 100})
    stream = predictor.stream(itertools.repeat(batch))
    sizes = [next(stream).num_rows for _ in range(2)]
    stream.close()
    assert sizes == [64, 64]
