"""From Python: the same predictions as mmdet's and mmseg's own inference, for any input."""

import inspect
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from trained_tiny import write_trained
from videos import corrupt, read_number, write_video

from backbones.engine.config import load_config
from backbones.errors import ConfigError, InputError
from backbones.inference import Detections, Inferencer, Segmentation
from backbones.inference.model import TorchModel, classes_and_palette

ROOT = Path(__file__).resolve().parents[3]
PHOTOGRAPHS = [Path(skimage.data_dir) / name for name in ('coffee.png', 'rocket.jpg')]
TASKS = ('fpn', 'retinanet', 'mask_rcnn')


@pytest.fixture(scope='module', params=TASKS)
def trained(request, tmp_path_factory, shapes) -> tuple[str, Path, Path]:
    """A task, a config and a checkpoint."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, *write_trained(folder, request.param, shapes)


@pytest.fixture(scope='module')
def segmentor(tmp_path_factory, shapes) -> Inferencer:
    return Inferencer(*write_trained(tmp_path_factory.mktemp('fpn'), 'fpn', shapes))


def test_predictions_are_the_libraries_own(trained):
    task, config, checkpoint = trained
    ours = [
        result.prediction for result in Inferencer(config, checkpoint, score_thr=0)(PHOTOGRAPHS)
    ]
    if task == 'fpn':
        from mmseg.apis import inference_model, init_model

        model = init_model(str(config), str(checkpoint), device='cpu')
        for photograph, prediction in zip(PHOTOGRAPHS, ours, strict=True):
            expected = inference_model(model, str(photograph)).pred_sem_seg.data[0].numpy()
            assert len(np.unique(expected)) > 2
            assert isinstance(prediction, Segmentation)
            # Where two classes are as likely, the order of the sums decides.
            assert (prediction.seg_map == expected).mean() > 0.9999
        return
    from mmdet.apis import inference_detector, init_detector

    model = init_detector(str(config), str(checkpoint), device='cpu')
    for photograph, prediction in zip(PHOTOGRAPHS, ours, strict=True):
        expected = inference_detector(model, str(photograph)).pred_instances.numpy()
        assert isinstance(prediction, Detections)
        assert len(expected.scores) == 10
        np.testing.assert_allclose(prediction.scores, expected.scores, atol=1e-5)
        np.testing.assert_array_equal(prediction.labels, expected.labels)
        np.testing.assert_allclose(prediction.boxes, expected.bboxes, atol=1e-2)
        if task == 'mask_rcnn':
            for mask, whole in zip(prediction.masks, expected.masks, strict=True):
                height, width = mask.pixels.shape
                found = np.zeros_like(whole)
                found[mask.y : mask.y + height, mask.x : mask.x + width] = mask.pixels
                assert (found == whole).mean() > 0.9999


def test_batches_change_nothing(trained):
    task, config, checkpoint = trained
    images = [cv2.imread(str(path)) for path in PHOTOGRAPHS]
    # Three of one size, then another: the batch has to be cut.
    given = [images[0], images[0][:, ::-1].copy(), images[0][::-1].copy(), images[1]]
    one = Inferencer(config, checkpoint, score_thr=0)
    three = Inferencer(config, checkpoint, score_thr=0, batch_size=3)
    for alone, together in zip(one(given), three(given), strict=True):
        if task == 'fpn':
            same = alone.prediction.seg_map == together.prediction.seg_map
            assert same.mean() > 0.9999
        else:
            np.testing.assert_allclose(alone.prediction.boxes, together.prediction.boxes, atol=1e-2)
            np.testing.assert_array_equal(alone.prediction.labels, together.prediction.labels)


def test_everything_that_can_be_given(segmentor, tmp_path):
    video = write_video(tmp_path / 'clip.mp4', 4)
    folder = tmp_path / 'photographs'
    folder.mkdir()
    cv2.imwrite(str(folder / 'a.png'), np.full((20, 30, 3), 7, np.uint8))
    (folder / 'notes.txt').write_text('not a image')
    array = np.zeros((10, 12, 3), np.uint8)
    results = list(segmentor([str(video), folder, array]))
    assert [(Path(r.source).name, r.frame) for r in results] == [
        ('clip.mp4', 0), ('clip.mp4', 1), ('clip.mp4', 2), ('clip.mp4', 3),
        ('a.png', 0), ('array 2', 0),
    ]  # fmt: skip
    assert [read_number(result.image) for result in results[:4]] == [0, 1, 2, 3]
    assert [result.time for result in results] == [0, 0.1, 0.2, pytest.approx(0.3), None, None]
    assert results[4].image.tolist() == np.full((20, 30, 3), 7).tolist()
    for result in results:
        assert result.prediction.seg_map.shape == result.image.shape[:2]
        assert result.draw().shape[1:] == result.image.shape[1:]


def test_an_endless_iterator_can_be_left(segmentor):
    drawn = []

    def endless():
        while True:
            drawn.append(np.zeros((16, 16, 3), np.uint8))
            yield drawn[-1]

    for number, _ in enumerate(segmentor(endless())):
        if number == 5:
            break
    assert len(drawn) < 50


def test_a_bad_input_has_a_problem_and_stops_no_other(segmentor, tmp_path):
    damaged = corrupt(write_video(tmp_path / 'damaged.mp4', 60), 0.67)
    flat, floats = np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)
    results = list(segmentor(['nowhere.jpg', flat, floats, __file__, damaged, PHOTOGRAPHS[0]]))
    problems = [result for result in results if result.problem]
    said = ['No such file', r'shape (4, 4)', 'float32', 'neither', 'corrupt']
    assert len(problems) == len(said)
    for result, part in zip(problems, said, strict=True):
        assert part in result.problem
        assert result.prediction is None and result.frame is None
        with pytest.raises(InputError, match=re.escape(result.source)):
            result.draw()
    good = [result for result in results if not result.problem]
    assert 30 < len(good) < 61 and good[-1].source == str(PHOTOGRAPHS[0])


def test_an_image_as_small_as_a_masks_cells(tmp_path, shapes):
    """28x28 probabilities were taken for masks of the image's size, all true."""
    from mmdet.apis import inference_detector, init_detector

    config, checkpoint = write_trained(tmp_path, 'mask_rcnn', shapes)
    image = cv2.resize(cv2.imread(str(PHOTOGRAPHS[0])), (28, 28))
    result = next(Inferencer(config, checkpoint, score_thr=0)(image))
    model = init_detector(str(config), str(checkpoint), device='cpu')
    expected = inference_detector(model, image).pred_instances.masks.numpy()
    assert 0 < expected.mean() < 0.9
    areas = [mask.pixels.sum() for mask in result.prediction.masks]
    np.testing.assert_allclose(areas, expected.sum(axis=(1, 2)), atol=1)


def test_masks_of_a_model_without_boxes(tmp_path):
    """SOLOv2's boxes are zeros."""
    from mmdet.apis import inference_detector, init_detector

    config, checkpoint = write_solo(tmp_path)
    image = cv2.resize(cv2.imread(str(PHOTOGRAPHS[0])), (96, 64))
    model = init_detector(str(config), str(checkpoint), device='cpu')
    expected = inference_detector(model, image).pred_instances.masks.numpy()
    prediction = next(Inferencer(config, checkpoint, score_thr=0)(image)).prediction
    assert len(expected) and expected.any(axis=(1, 2)).all()
    for mask, box, whole in zip(prediction.masks, prediction.boxes, expected, strict=True):
        assert mask.pixels.sum() == whole.sum()
        rows, columns = np.nonzero(whole)
        extent = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert box.tolist() == extent


def write_solo(folder: Path) -> tuple[Path, Path]:
    """A config and a checkpoint of a small SOLOv2 with random weights."""
    config = folder / 'solo.py'
    config.write_text("""
_base_ = 'mmdet::solov2/solov2-light_r18_fpn_ms-3x_coco.py'
model = dict(
    backbone=dict(init_cfg=None),
    mask_head=dict(num_classes=2, feat_channels=64, stacked_convs=1,
                   mask_feature_head=dict(feat_channels=32, out_channels=64)),
    test_cfg=dict(score_thr=0.0, filter_thr=0.0, max_per_img=5),
)
test_dataloader = dict(dataset=dict(pipeline=[
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(192, 128), keep_ratio=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape',
         'scale_factor')),
]))
""")
    torch.manual_seed(0)
    model = MODELS.build(load_config(str(config)).model)
    checkpoint = folder / 'solo.pth'
    meta = {'dataset_meta': {'classes': ['a', 'b']}}
    torch.save({'state_dict': model.state_dict(), 'meta': meta}, checkpoint)
    return config, checkpoint


def test_only_what_a_model_needs_is_imported(tmp_path, shapes):
    """The detector first: mmseg imports mmdet by itself."""
    models = [tuple(map(str, write_trained(tmp_path, t, shapes))) for t in ('retinanet', 'fpn')]
    code = f"""
import sys, numpy
from backbones.inference import Inferencer
for model in {models!r}:
    for result in Inferencer(*model)({str(PHOTOGRAPHS[0])!r}):
        result.draw()
    unused = 'mmseg', 'av', 'onnxruntime', 'openvino'
    print(*(name for name in unused if name in sys.modules), sep=', ')
"""
    process = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert process.stdout.splitlines()[-2:] == ['', 'mmseg'], process.stderr


def test_classes_and_scores_are_chosen(tmp_path, shapes):
    config, checkpoint = write_trained(tmp_path, 'retinanet', shapes)
    every = next(Inferencer(config, checkpoint, score_thr=0)(PHOTOGRAPHS[0])).prediction
    label = int(every.labels[0])
    name = Inferencer(config, checkpoint).classes[label]
    some = Inferencer(config, checkpoint, score_thr=float(every.scores[4]), classes=[name])
    kept = next(some(PHOTOGRAPHS[0])).prediction
    assert set(kept.labels) == {label}
    assert kept.scores.min() >= every.scores[4]
    assert len(kept.scores) == (every.labels[:5] == label).sum()
    with pytest.raises(ConfigError, match="no class 'unicorn'; it has 'disc'"):
        Inferencer(config, checkpoint, classes=['unicorn'])


def test_the_metainfo_may_name_a_file_of_classes(tmp_path):
    (tmp_path / 'names.txt').write_text('disc\nring\n')
    metainfo = dict(classes=str(tmp_path / 'names.txt'))
    config = Config(dict(test_dataloader=dict(dataset=dict(metainfo=metainfo))))
    assert classes_and_palette(config, {'meta': {}})[0] == ('disc', 'ring')


def test_other_classes_are_left_blank(tmp_path, shapes):
    config, checkpoint = write_trained(tmp_path, 'fpn', shapes)
    every = next(Inferencer(config, checkpoint)(PHOTOGRAPHS[0])).prediction.seg_map
    kept = next(Inferencer(config, checkpoint, classes=['background'])(PHOTOGRAPHS[0]))
    np.testing.assert_array_equal(kept.prediction.seg_map, np.where(every == 0, 0, 255))


def test_amp_on_a_cpu(segmentor, tmp_path, shapes):
    config, checkpoint = write_trained(tmp_path, 'fpn', shapes)
    plain = next(segmentor(PHOTOGRAPHS[0])).prediction.seg_map
    mixed = next(Inferencer(config, checkpoint, amp=True)(PHOTOGRAPHS[0])).prediction.seg_map
    assert (plain == mixed).mean() > 0.9


def test_threads_that_share_a_model_in_mixed_precision(tmp_path, shapes):
    model = TorchModel(*map(str, write_trained(tmp_path, 'retinanet', shapes)), 'cpu', amp=True)
    rng = np.random.default_rng(0)
    batches = [
        [model.preprocess(rng.integers(0, 255, (64, width, 3), np.uint8))]
        for width in (64, 80, 96, 112)
    ]
    expected = [model.predict(batch)[0].scores.tolist() for batch in batches] * 2
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(model.predict, batches * 2))
    assert [raw[0].scores.tolist() for raw in found] == expected


def test_a_config_that_builds_no_model(tmp_path, shapes):
    config, checkpoint = write_trained(tmp_path, 'fpn', shapes)
    with pytest.raises(ConfigError, match=r'cannot be built.*bckbone'):
        Inferencer(config, checkpoint, cfg_options={'model.bckbone': 1})


@pytest.mark.parametrize(
    ('part', 'message'), [('panoptic_fusion_head', 'maps'), ('language_model', 'text')]
)
def test_models_that_find_no_objects_in_an_image_alone(part, message, tmp_path, shapes):
    config, checkpoint = write_trained(tmp_path, 'retinanet', shapes)
    with pytest.raises(ConfigError, match=message):
        Inferencer(config, checkpoint, cfg_options={f'model.{part}': {}})


def test_transforms_get_floats_where_the_config_loads_images_so(tmp_path, shapes):
    """CenterNet's takes nothing else."""
    files = map(str, write_trained(tmp_path, 'retinanet', shapes))
    option = 'test_dataloader.dataset.pipeline.0.to_float32'
    model = TorchModel(*files, device='cpu', cfg_options={option: True})
    item = model.preprocess(np.zeros((96, 96, 3), np.uint8))
    assert item['inputs'].dtype == torch.float32


def test_a_config_without_a_checkpoint():
    with pytest.raises(ConfigError, match='and its checkpoint'):
        Inferencer('config.py')


def test_the_example_of_the_docs(tmp_path, shapes, monkeypatch):
    """As it stands there, with the tiny model's files under the names it has."""
    text = (ROOT / 'docs' / 'inference.md').read_text(encoding='utf-8')
    (example,) = re.findall('```python\n(from pathlib .*?)```', text, re.DOTALL)
    config, checkpoint = write_trained(tmp_path, 'fpn', shapes)
    (tmp_path / 'seg_configs').mkdir()
    config.rename(tmp_path / 'seg_configs' / 'fpn_effv2_s2.py')
    checkpoint.rename(tmp_path / 'fpn_s2.pth')
    write_video(tmp_path / 'drive.mp4', 3)
    cv2.imwrite(str(tmp_path / 'street.jpg'), np.full((96, 128, 3), 80, np.uint8))
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert sorted(path.name for path in Path('drawn').iterdir()) == [
        *('drive_000000.jpg', 'drive_000001.jpg', 'drive_000002.jpg', 'street_000000.jpg')
    ]


def test_the_documentation_has_the_signature():
    text = (ROOT / 'docs' / 'inference.md').read_text(encoding='utf-8')
    (written,) = re.findall(r'`Inferencer\((config[^`]*?)\)`', text)
    parameters = list(inspect.signature(Inferencer).parameters.values())
    bare = [each.replace(annotation=each.empty) for each in parameters]
    assert f'({" ".join(written.split())})' == str(inspect.Signature(bare))
