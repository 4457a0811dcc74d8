"""Exported files give the models' results, in every format, and carry what it takes to use them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from exporting import needs_export
from mmengine.config import Config
from mmengine.registry import MODELS

from backbones.benchmark.candidates import Candidate
from backbones.benchmark.work import Setting, export_model
from backbones.data.classes import set_classes
from backbones.engine.config import fit_to_device, load_config
from backbones.errors import ExportError
from backbones.export import export as export_module
from backbones.export import formats
from backbones.export.check import example_image
from backbones.export.export import Options, export
from backbones.export.exportable import exportable
from backbones.inference.exported_file import METADATA_KEY, Description, ExportedModel, Runner
from backbones.inference.model import TorchModel

pytestmark = needs_export


def describe(tiny: object, palette: object = None) -> Description:
    """The metadata of a file of a tiny model, for any size."""
    config = load_config(tiny.config, tiny.cfg_options)
    model = MODELS.build(config.model)
    options = Options(dynamic=True)
    return export_module.describe(config, model, options, 'tiny', ('thing',), palette)


@pytest.mark.parametrize(
    'kind',
    [
        *('single', 'mask_rcnn', 'mask_rcnn_xml'),
        pytest.param('mask_rcnn_open', marks=pytest.mark.slow),
        pytest.param('mask_rcnn_open_xml', marks=pytest.mark.slow),
    ],
)
def test_detections_are_the_models(exported, predict, images, kind):
    made = exported(kind)
    in_file = ExportedModel(made.path, 'cpu')
    expected, found = predict(made.model, images), predict(in_file, images)
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_allclose(other.boxes, one.boxes, atol=0.02)
        np.testing.assert_allclose(other.scores, one.scores, atol=1e-4)
        np.testing.assert_array_equal(other.labels, one.labels)
    if expected[0].masks:
        # 512 / 128 of the pixels that the network sees.
        largest = max(
            np.prod(one.boxes[:, 2:] - one.boxes[:, :2], axis=1).max() for one in expected
        )
        assert 4 * largest**0.5 > 224


@pytest.mark.parametrize(
    'kind', ['single', 'mask_rcnn', pytest.param('mask_rcnn_open', marks=pytest.mark.slow)]
)
def test_a_blank_image_has_no_detection(exported, predict, kind):
    blank = np.random.default_rng(0).normal(114, 8, (128, 128, 3)).astype(np.uint8)
    (found,) = predict(ExportedModel(exported(kind).path, 'cpu'), [blank])
    assert len(found.boxes) == len(found.scores) == len(found.labels) == 0


@pytest.mark.parametrize(
    ('kind', 'size'),
    [
        *(('fpn', (128, 128)), ('fpn', (97, 203)), ('ham_fixed', (128, 160))),
        pytest.param('ham', (128, 128), marks=pytest.mark.slow),
        pytest.param('ham', (97, 203), marks=pytest.mark.slow),
        pytest.param('multiples', (97, 203), marks=pytest.mark.slow),
    ],
)
def test_segmentation_maps_are_the_models(exported, predict, images, kind, size):
    made = exported(kind)
    in_file = ExportedModel(made.path, 'cpu')
    batch = [cv2.resize(image, size[::-1]) for image in images]
    expected, found = predict(made.model, batch), predict(in_file, batch)
    for one, other in zip(expected, found, strict=True):
        assert other.seg_map.dtype == np.uint8
        # Class indices are resized to the image, where PyTorch resizes logits.
        assert np.mean(one.seg_map == other.seg_map) >= (0.9 if kind == 'multiples' else 0.999)
    assert len(np.unique(found[0].seg_map)) > 1


def test_aligned_corners(tiny_model, images):
    tiny = tiny_model('fpn')
    config = load_config(tiny.config, {'model.decode_head.align_corners': True})
    fit_to_device(config)
    set_classes(config, ('test',))
    model = MODELS.build(config.model).eval()
    model.load_state_dict(torch.load(tiny.checkpoint)['state_dict'])
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    inputs = model.data_preprocessor({'inputs': list(pixels)}, False)['inputs']
    with torch.no_grad():
        expected = [sample.pred_sem_seg.data[0] for sample in model.predict(inputs)]
        found = exportable(model)(pixels.float())
    assert (found == torch.stack(expected)).float().mean() > 0.999
    assert len(found.unique()) > 1


@pytest.mark.parametrize('task', ['multiples', 'mask_rcnn'])
def test_images_are_prepared_as_in_the_test_pipeline(tiny_model, images, task):
    tiny = tiny_model(task)
    description = describe(tiny)
    assert description.missing_transforms == (['RandomFlip'] if task == 'multiples' else [])
    model = TorchModel(tiny.config, tiny.checkpoint, cfg_options=tiny.cfg_options)
    for size in ((128, 128), (97, 203), (203, 97)):
        image = cv2.resize(images[0], size[::-1])
        expected = model.preprocess(image)['inputs'].numpy()
        np.testing.assert_array_equal(description.fit(image)[0], expected)


def test_arguments_of_resizing_that_a_pipeline_leaves_out():
    steps = [dict(type='Resize', scale=(90, 60)), dict(type='mmseg.ResizeToMultiple')]
    config = Config(dict(test_dataloader=dict(dataset=dict(pipeline=steps))))
    (resize, multiple), missing = export_module.resizing(config)
    assert not resize['keep_ratio'] and multiple['size_divisor'] == 32 and not missing


def test_a_segmentor_with_one_logit(tiny_model, images):
    loss = dict(type='CrossEntropyLoss', use_sigmoid=True)
    head = dict(num_classes=2, out_channels=1, threshold=0.4, loss_decode=loss)
    options = {f'model.decode_head.{name}': value for name, value in head.items()}
    config = load_config(tiny_model('fpn').config, options)
    fit_to_device(config)
    torch.manual_seed(0)
    model = MODELS.build(config.model).eval()
    torch.nn.init.normal_(model.decode_head.conv_seg.weight)
    # About half of the pixels are above the threshold.
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    inputs = model.data_preprocessor({'inputs': list(pixels)}, False)['inputs']
    with torch.no_grad():
        logits = model.decode_head(model.extract_feat(inputs))
        model.decode_head.conv_seg.bias.data.sub_(logits.median() + 0.2)
        expected = [sample.pred_sem_seg.data[0] for sample in model.predict(inputs)]
        found = exportable(model)(pixels.float())
    assert torch.equal(found.long(), torch.stack(expected).long())
    assert len(found.unique()) > 1


def test_another_detector_is_refused_by_what_it_is(tmp_path, images):
    """Not by an entry of test_cfg that it does not have: YOLOX limits no image's detections."""
    config = tmp_path / 'yolox.py'
    config.write_text("_base_ = 'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py'")
    model = MODELS.build(load_config(str(config)).model)
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'yolox.pth')
    cv2.imwrite(str(tmp_path / 'image.png'), images[0])
    options = Options(image=str(tmp_path / 'image.png'))
    with pytest.raises(ExportError, match='YOLOXHead'):
        export(config, tmp_path / 'yolox.pth', tmp_path / 'a.onnx', options, report=str)


@pytest.mark.parametrize('key', ['iou_threshold', 'iou_thr'])
def test_both_names_of_nms_threshold(key, tiny_model):
    tiny = tiny_model('retinanet')
    nms = {'model.test_cfg.nms': {'_delete_': True, 'type': 'nms', key: 0.6}}
    model = TorchModel(tiny.config, tiny.checkpoint, cfg_options=nms)
    assert model.nms_threshold == 0.6
    assert export_module.task_of(model.model, Options())['nms_threshold'] == 0.6


@pytest.mark.parametrize(
    ('saved', 'expected'),
    [((220, 20, 60), [[220, 20, 60]]), ('random', None), ([[1, 2, 3.0]], [[1, 2, 3]])],
)
def test_palettes_that_checkpoints_have(saved, expected, tiny_model):
    """mmdet gives a single class one color, and 'random' where it has none."""
    description = describe(tiny_model('fpn'), saved)
    assert json.loads(description.to_json())['palette'] == expected


def test_a_fixed_size_says_by_how_much_it_changes_scores(exported, predict, images):
    made = exported('single')
    (line,) = [line for line in made.lines if 'the fixed 160x160' in line]
    # In PyTorch 100x128 becomes 125x160, padded to multiples of 32.
    line, _, advice = line.partition(';')
    assert '--size 128x160' in advice
    figures = line.partition('scores differ by up to ')[2]
    worst = float(figures.split()[0])
    before, after = (float(part.strip('()')) for part in figures.split()[1::2])
    image = images[1][:100]
    scores = [predict(each, [image])[0].scores for each in (made.model, ExportedModel(made.path))]
    assert any(abs(before - score) < 2e-3 for score in scores[0])
    assert any(abs(after - score) < 2e-3 for score in scores[1])
    assert worst == pytest.approx(abs(after - before), abs=2e-3) and worst > 1e-3
    assert any('resized as in PyTorch' in line for line in exported('fpn').lines)


def test_results_are_compared_on_a_validation_image(tiny_model, shapes):
    """In a portrait a model of other things finds nothing that is worth comparing."""
    config = load_config(tiny_model('retinanet').config)
    first = cv2.imread(str(shapes / 'coco' / 'val2017' / 'val_000001.jpg'))
    np.testing.assert_array_equal(example_image(None, config), first)
    config.val_dataloader.dataset.data_root = config.test_dataloader.dataset.data_root = 'none'
    assert example_image(None, config).shape == (600, 512, 3)


PADDED = (103.53 + 2 * 57.375, 230.52, 240.465)


def test_padding_is_the_models_own(tiny_model):
    """Of two standard deviations."""
    options = {'model.data_preprocessor.pad_value': 2}
    description = describe(replace(tiny_model('retinanet'), cfg_options=options))
    assert description.pad_pixel == pytest.approx(PADDED, abs=0.01)


@pytest.mark.slow
def test_a_batch_of_a_size_that_has_to_be_padded(exported):
    description = ExportedModel(exported('retinanet').path, 'cpu').description
    assert description.pad_pixel == pytest.approx(PADDED, abs=0.01)


def test_an_onnx_file_says_how_it_is_used(exported):
    path = exported('mask_rcnn').path
    model = ExportedModel(path, 'cpu')
    described = model.description
    assert model.classes == tuple(exported('mask_rcnn').model.classes)
    assert model.palette[0] == [230, 80, 50]
    (resize,) = described.resize
    assert resize['scale'] == [512, 512] and resize['keep_ratio'] is True
    assert described.mean == pytest.approx((123.675, 116.28, 103.53))
    assert described.pad_pixel == pytest.approx((103.53, 116.28, 123.675))
    assert described.size == (512, 512)
    graph = onnx.load(path).graph
    assert [each.name for each in graph.input] == ['images']
    sizes = [size.dim_value for size in graph.input[0].type.tensor_type.shape.dim]
    assert sizes == [1, 3, 512, 512]
    assert [output.name for output in graph.output] == ['boxes', 'scores', 'labels', 'masks']


def test_an_onnx_file_of_any_size_says_so(exported):
    path = exported('fpn').path
    described = ExportedModel(path, 'cpu').description
    assert described.size is None and described.batch is None and described.min_size == 33
    sizes = [size.dim_param for size in onnx.load(path).graph.input[0].type.tensor_type.shape.dim]
    assert sizes == ['batch', '', 'height', 'width']


def test_nothing_of_this_machine_is_in_an_onnx_file(exported):
    content = exported('single').path.read_bytes()
    assert str(Path(export_module.__file__).parents[2]).encode() not in content
    assert b'stack_trace' not in content


def test_a_core_ml_package_is_written_and_says_that_it_was_not_compared(exported):
    coremltools = pytest.importorskip('coremltools')
    made = exported('core_ml')
    assert any('not compared' in line for line in made.lines)
    model = coremltools.models.MLModel(str(made.path), skip_model_load=True)
    assert model.get_spec().description.input[0].type.WhichOneof('Type') == 'imageType'
    # The colors of an image from a camera are put in the order that the network was given.
    kind = model.get_spec().description.input[0].type.imageType
    assert kind.colorSpace == kind.BGR
    assert json.loads(model.user_defined_metadata[METADATA_KEY])['task'] == 'segmentation'


def test_what_a_search_writes_for_core_ml_has_no_shapes_that_depend_on_values(
    tiny_model, tmp_path, monkeypatch
):
    pytest.importorskip('coremltools')
    programs = []
    monkeypatch.setattr(formats, 'write_core_ml', lambda program, *_: programs.append(program))
    candidate = Candidate(tiny_model('fpn').config)
    path = tmp_path / 'a.mlpackage'
    export_model(candidate, candidate.build(), Setting(size=(64, 64)), path)
    assert 'conv2d' in str(programs[0].graph) and 'nonzero' not in str(programs[0].graph)


def test_a_config_of_a_model_alone_is_enough(tmp_path, exported, monkeypatch):
    written = exported('fixed')
    monkeypatch.setattr(
        export_module, 'write', lambda model, path, description: shutil.copy(written.path, path)
    )
    out, parts = tmp_path / 'a.onnx', ('train_dataloader', 'val_dataloader', 'test_dataloader')
    without = {'test_pipeline': [], **dict.fromkeys(parts)}
    export(written.tiny.config, written.tiny.checkpoint, out, Options(), without)
    assert out.is_file()


def test_where_results_differ_no_file_is_left(tmp_path, exported, monkeypatch):
    written = exported('fixed')
    open_exported = export_module.open_exported

    def open_wrongly(path):
        runner = open_exported(path)
        return Runner(runner.description, lambda x: [values + 1 for values in runner(x).values()])

    monkeypatch.setattr(export_module, 'open_exported', open_wrongly)
    monkeypatch.setattr(
        export_module, 'write', lambda model, path, description: shutil.copy(written.path, path)
    )
    earlier = tmp_path / 'model.onnx'
    earlier.write_text('an earlier export')
    tiny, lines = written.tiny, []
    # A transform that changes images, which a file does not do.
    steps = ('LoadImageFromFile', 'RandomFlip', 'PackSegInputs')
    pipeline = {'test_dataloader.dataset.pipeline': [dict(type=step) for step in steps]}
    with pytest.raises(ExportError, match=r'pixels are the same'):
        export(tiny.config, tiny.checkpoint, earlier, Options(), pipeline, lines.append)
    assert any(line.startswith('note:') and 'RandomFlip' in line for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == ['model.onnx']
    assert earlier.read_text() == 'an earlier export'


def test_a_folder_in_the_place_of_the_file_is_kept(tmp_path):
    (tmp_path / 'a.onnx').mkdir()
    (tmp_path / 'a.onnx' / 'own.txt').touch()
    with (
        pytest.raises(IsADirectoryError),
        export_module.staged(tmp_path / 'a.onnx') as path,
    ):
        path.write_text('a file')
    assert (tmp_path / 'a.onnx' / 'own.txt').is_file()


def test_a_package_takes_the_place_of_an_earlier_one(tmp_path):
    for name in ('earlier', 'later'):
        with export_module.staged(tmp_path / 'a.mlpackage') as path:
            path.mkdir()
            (path / name).touch()
    assert [each.name for each in (tmp_path / 'a.mlpackage').iterdir()] == ['later']
