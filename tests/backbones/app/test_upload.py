"""Uploads: limits, predictions that are made once, and what is written of them."""

import json

import av
import cv2
import numpy as np
import pytest
from PIL import Image
from trained_tiny import write_trained
from videos import numbered_image, write_video

from backbones.app.upload import Limits, Settings, Upload
from backbones.errors import InputError
from backbones.inference import Inferencer


def ignore(done: int, total: int | None) -> None:
    """Reports progress to nobody."""


@pytest.fixture(scope='module')
def models(tmp_path_factory, shapes) -> dict[str, Inferencer]:
    folder = tmp_path_factory.mktemp('models')
    return {
        task: Inferencer(*write_trained(folder, task, shapes), score_thr=0.0, device='cpu')
        for task in ('fpn', 'mask_rcnn')
    }


@pytest.fixture
def image(tmp_path):
    path = tmp_path / 'image.png'
    cv2.imwrite(str(path), numbered_image(77))
    return path


@pytest.fixture
def video(tmp_path):
    return write_video(tmp_path / 'video.mp4', 20, rate=10)


@pytest.mark.parametrize('kind', ['image', 'video'])
def test_too_many_pixels_are_refused(kind, request):
    path = request.getfixturevalue(kind)
    with pytest.raises(InputError, match='128x96'):
        Upload(path, Limits(megapixels=0.01))


def test_what_is_no_image_is_refused_by_name(tmp_path):
    (tmp_path / 'text.jpg').write_text('no image')
    with pytest.raises(InputError, match=r'^text\.jpg '):
        Upload(tmp_path / 'text.jpg', Limits())


def test_a_long_video_is_cut_and_that_is_said(video, models, tmp_path):
    upload = Upload(video, Limits(seconds=0.5))
    assert '2.0 s' in upload.problem and upload.num_frames == 5
    predicted = upload.predict(models['fpn'], ignore)
    assert len(predicted.frames) == 5
    drawn = upload.draw(models['fpn'], predicted, Settings(), tmp_path / 'out', ignore)
    assert count_frames(drawn.path) == 5
    assert Upload(video, Limits(seconds=5)).problem is None


def test_a_stopped_video_ends_there_for_every_model(video, models, tmp_path):
    upload = Upload(video, Limits())
    first = upload.predict(models['fpn'], lambda done, _: done == 7 and upload.stopping.set())
    second = upload.predict(models['mask_rcnn'], ignore)
    assert len(first.frames) == len(second.frames) == 7
    for task, predicted in (('fpn', first), ('mask_rcnn', second)):
        drawn = upload.draw(models[task], predicted, Settings(), tmp_path / task, ignore)
        assert count_frames(drawn.path) == 7
    assert 'stopped' in upload.problem


def test_audio_that_is_longer_than_the_frames_is_kept(models, tmp_path):
    upload = Upload(write_video(tmp_path / 'v.mp4', 10, audio=True, audio_duration=2.0), Limits())
    predicted = upload.predict(models['fpn'], ignore)
    drawn = upload.draw(models['fpn'], predicted, Settings(), tmp_path / 'out', ignore)
    with av.open(str(drawn.path)) as container:
        (audio,) = container.streams.audio
        assert float(audio.duration * audio.time_base) == pytest.approx(2, abs=0.1)


def test_an_image_that_is_replaced_is_predicted_to_its_end(image, models):
    upload = Upload(image, Limits())
    upload.stopping.set()
    assert len(upload.predict(models['fpn'], ignore).frames) == 1


def count_frames(path) -> int:
    return int(cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FRAME_COUNT))


def test_settings_apply_without_the_model(image, models, tmp_path, monkeypatch):
    model = models['mask_rcnn']
    upload = Upload(image, Limits())
    predicted = upload.predict(model, ignore)
    monkeypatch.setattr(model, 'predict', None)

    def draw(**settings):
        folder = tmp_path / f'{len(list(tmp_path.iterdir()))}'
        return upload.draw(model, predicted, Settings(**settings), folder, ignore)

    rows = draw(score_thr=0.0).rows
    scores = [row[1] for row in rows]
    middle = (min(scores) + max(scores)) / 2
    fewer = draw(score_thr=middle)
    assert [row[:3] for row in fewer.rows] == [row[:3] for row in rows if row[1] >= middle]
    data = json.loads((fewer.path.parents[1] / 'data' / 'image.json').read_text())
    assert len(data) == len(fewer.rows) < len(rows)
    assert {each['file_name'] for each in data} == {'image.png'}
    name = rows[0][0]
    chosen = draw(score_thr=0.0, classes=(name, 'of another model')).rows
    assert chosen == [row for row in rows if row[0] == name]
    assert draw(score_thr=0.0, classes=('of another model',)).rows == []


def test_opacity_0_leaves_the_pixels(image, models, tmp_path):
    model, upload = models['fpn'], Upload(image, Limits())
    predicted = upload.predict(model, ignore)
    pixels = cv2.imread(str(image)).astype(int)
    differences = []
    for opacity in (0.0, 1.0):
        settings = Settings(opacity=opacity)
        drawn = upload.draw(model, predicted, settings, tmp_path / f'{opacity}', ignore)
        drawing = cv2.imread(str(drawn.path))[: len(pixels)]
        differences.append(np.abs(drawing - pixels).mean())
    assert differences[0] < 5 < differences[1]


def test_shares_of_classes(image, models, tmp_path):
    model, upload = models['fpn'], Upload(image, Limits())
    predicted = upload.predict(model, ignore)
    drawn = upload.draw(model, predicted, Settings(), tmp_path / 'out', ignore)
    with Image.open(drawn.path.parents[1] / 'data' / 'image.png') as file:
        seg_map = np.asarray(file)
    assert {row[0]: row[2] for row in drawn.rows} == {
        model.classes[label]: count
        for label, count in zip(*np.unique(seg_map, return_counts=True), strict=True)
    }
    assert sum(row[1] for row in drawn.rows) == pytest.approx(100, abs=0.5)
