"""Uploads: limits, predictions that are made once, and what is written of them."""

import json

import av
import cv2
import numpy as np
import pytest
from PIL import Image
from trained_tiny import write_trained
from videos import numbered_image, write_video

from backbones.app.upload import Upload
from backbones.errors import InputError
from backbones.inference import Inferencer

# Megapixels and seconds.
LIMITS = (50, 60)


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
        Upload(path, 0.01, 60)


def test_what_is_no_image_is_refused(tmp_path):
    (tmp_path / 'text.jpg').write_text('no image')
    with pytest.raises(InputError):
        Upload(tmp_path / 'text.jpg', *LIMITS)


def test_a_long_video_is_cut_and_that_is_said(video, models, tmp_path):
    upload = Upload(video, 50, 0.45)
    predicted = upload.predict(models['fpn'], '')
    assert len(predicted.frames) == 5 and '0.5 s' in upload.problem
    drawn = upload.draw(models['fpn'], predicted, tmp_path / 'out')
    assert count_frames(drawn.path) == 5
    whole = Upload(video, 50, 5)
    assert len(whole.predict(models['fpn'], '').frames) == whole.num_frames == 20
    assert whole.problem is None


@pytest.mark.parametrize(('stop', 'frames'), [(0, 1), (7, 7)])
def test_a_stopped_video_ends_there_for_every_model(stop, frames, video, models, tmp_path):
    upload = Upload(video, *LIMITS)

    def stopped(*given):
        for result in models['fpn'](*given):
            if result.frame == stop:
                upload.stopping.set()
            yield result

    first = upload.predict(stopped, '')
    second = upload.predict(models['mask_rcnn'], '')
    assert len(first.frames) == len(second.frames) == frames
    for task, predicted in (('fpn', first), ('mask_rcnn', second)):
        drawn = upload.draw(models[task], predicted, tmp_path / task)
        assert count_frames(drawn.path) == frames
    assert 'was read up to' in upload.problem


def test_audio_that_is_longer_than_the_frames_is_kept(models, tmp_path):
    upload = Upload(write_video(tmp_path / 'v.mp4', 10, audio=True, audio_duration=2.0), *LIMITS)
    predicted = upload.predict(models['fpn'], '')
    drawn = upload.draw(models['fpn'], predicted, tmp_path / 'out')
    with av.open(str(drawn.path)) as container:
        (audio,) = container.streams.audio
        assert float(audio.duration * audio.time_base) == pytest.approx(2, abs=0.1)


def test_an_image_that_is_replaced_is_predicted_to_its_end(image, models):
    upload = Upload(image, *LIMITS)
    upload.stopping.set()
    assert len(upload.predict(models['fpn'], '').frames) == 1


def count_frames(path) -> int:
    return int(cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FRAME_COUNT))


def test_settings_apply_without_the_model(image, models, tmp_path, monkeypatch):
    model = models['mask_rcnn']
    upload = Upload(image, *LIMITS)
    predicted = upload.predict(model, '')
    monkeypatch.setattr(model, 'predict', None)

    def draw(**settings):
        folder = tmp_path / f'{len(list(tmp_path.iterdir()))}'
        return upload.draw(model, predicted, folder, **settings)

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
    model, upload = models['fpn'], Upload(image, *LIMITS)
    predicted = upload.predict(model, '')
    pixels = cv2.imread(str(image)).astype(int)
    differences = []
    for opacity in (0.0, 1.0):
        drawn = upload.draw(model, predicted, tmp_path / f'{opacity}', opacity=opacity)
        drawing = cv2.imread(str(drawn.path))[: len(pixels)]
        differences.append(np.abs(drawing - pixels).mean())
    assert differences[0] < 5 < differences[1]


def test_shares_of_classes(image, models, tmp_path):
    model, upload = models['fpn'], Upload(image, *LIMITS)
    predicted = upload.predict(model, '')
    drawn = upload.draw(model, predicted, tmp_path / 'out')
    with Image.open(drawn.path.parents[1] / 'data' / 'image.png') as file:
        seg_map = np.asarray(file)
    assert {row[0]: row[2] for row in drawn.rows} == {
        model.classes[label]: count
        for label, count in zip(*np.unique(seg_map, return_counts=True), strict=True)
    }
    assert sum(row[1] for row in drawn.rows) == pytest.approx(100, abs=0.5)
