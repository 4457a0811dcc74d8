"""Exported files say what the models say, in every format, and carry what it takes to use them."""

import json
from pathlib import Path

import cv2
import numpy as np
import onnx
import openvino
import pytest
import torch
from exporting import needs_export
from pycocotools import mask as coco_mask

from backbones.errors import ExportError
from backbones.export import export as export_module
from backbones.export.description import METADATA_KEY
from backbones.export.export import Options, export
from backbones.export.exported_model import ExportedModel
from backbones.export.runner import Runner
from backbones.inference.masks import encode_mask

pytestmark = needs_export


@pytest.mark.parametrize('task', ['retinanet', 'mask_rcnn'])
def test_detections_of_an_onnx_file_are_those_of_the_model(exported, predict, pictures, task):
    made = exported(task)
    in_file = ExportedModel(str(made.path), 'cpu')
    assert in_file.task == 'detection'
    shapes = {(128, 128): pictures}
    if task == 'mask_rcnn':
        shapes[(150, 211)] = [cv2.resize(picture, (211, 150)) for picture in pictures]
    count = 0
    for shape, batch in shapes.items():
        for expected, found in zip(
            predict(made.model, batch), predict(in_file, batch), strict=True
        ):
            np.testing.assert_allclose(found.boxes, expected.boxes, atol=0.02)
            np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
            np.testing.assert_array_equal(found.labels, expected.labels)
            count += len(found.scores)
            if task == 'mask_rcnn':
                masks = [
                    coco_mask.decode([encode_mask(mask, shape) for mask in each.masks])
                    for each in (expected, found)
                ]
                assert np.mean(masks[0] == masks[1]) >= 0.999
    assert count >= 3


@pytest.mark.parametrize('task', ['retinanet', 'mask_rcnn'])
def test_a_picture_without_objects_has_no_detection(exported, predict, task):
    made = exported(task)
    blank = np.random.default_rng(0).normal(114, 8, (128, 128, 3)).astype(np.uint8)
    (found,) = predict(ExportedModel(str(made.path), 'cpu'), [blank])
    assert len(found.boxes) == len(found.scores) == len(found.labels) == 0
    assert any('no detection, as in PyTorch' in line for line in made.lines)


@pytest.mark.parametrize('size', [(128, 128), (97, 203)])
def test_label_maps_of_an_onnx_file_are_those_of_the_model(exported, predict, pictures, size):
    made = exported('fpn')
    in_file = ExportedModel(str(made.path), 'cpu')
    batch = [cv2.resize(picture, size[::-1]) for picture in pictures]
    expected, found = predict(made.model, batch), predict(in_file, batch)
    for one, other in zip(expected, found, strict=True):
        assert other.seg_map.dtype == np.uint8
        assert np.mean(one.seg_map == other.seg_map) >= 0.999
    assert len(np.unique(found[0].seg_map)) > 1


def test_an_onnx_file_says_how_it_is_used(exported):
    path = exported('mask_rcnn').path
    model = ExportedModel(str(path), 'cpu')
    described = model.description
    assert model.classes == tuple(exported('mask_rcnn').model.classes)
    assert model.palette[0] == [230, 80, 50]
    assert described.resize == {'scale': [160, 160], 'keep_ratio': True}
    assert described.mean == pytest.approx((123.675, 116.28, 103.53))
    assert described.pad_pixel == pytest.approx((103.53, 116.28, 123.675))
    assert described.size is None
    graph = onnx.load(path).graph
    sizes = [size.dim_param for size in graph.output[0].type.tensor_type.shape.dim]
    assert sizes[1] == 'detections'
    assert [output.name for output in graph.output] == ['boxes', 'scores', 'labels', 'masks']


def test_nothing_of_this_machine_is_in_an_onnx_file(exported):
    content = exported('retinanet').path.read_bytes()
    assert str(Path(export_module.__file__).parents[2]).encode() not in content
    assert b'stack_trace' not in content


def test_an_openvino_file_was_compared_and_carries_its_description(exported):
    made = exported('openvino')
    assert made.path.with_suffix('.bin').is_file()
    assert any('logits within' in line for line in made.lines)
    model = openvino.Core().read_model(str(made.path))
    described = json.loads(model.get_rt_info([METADATA_KEY]).astype(str))
    assert described['task'] == 'segmentation' and described['size'] == [160, 160]


def test_a_pt2_file_was_compared_and_carries_its_description(exported):
    made = exported('pt2')
    assert any('IoU at least' in line for line in made.lines)
    extra = {f'{METADATA_KEY}.json': ''}
    torch.export.load(str(made.path), extra_files=extra)
    assert json.loads(extra[f'{METADATA_KEY}.json'])['outputs'].keys() >= {'boxes', 'scores'}


def test_a_core_ml_package_is_written_and_says_that_it_was_not_compared(exported):
    coremltools = pytest.importorskip('coremltools')
    made = exported('core_ml')
    assert any('not compared' in line for line in made.lines)
    model = coremltools.models.MLModel(str(made.path), skip_model_load=True)
    assert model.get_spec().description.input[0].type.WhichOneof('Type') == 'imageType'
    assert json.loads(model.user_defined_metadata[METADATA_KEY])['task'] == 'segmentation'


def test_where_results_differ_no_file_is_left(tmp_path, tiny_model, monkeypatch):
    tiny = tiny_model('fpn')
    open_exported = export_module.open_exported

    def open_wrongly(path):
        runner = open_exported(path)
        return Runner(runner.description, lambda x: [values + 1 for values in runner(x).values()])

    monkeypatch.setattr(export_module, 'open_exported', open_wrongly)
    earlier = tmp_path / 'model.pt2'
    earlier.write_text('an earlier export')
    options = Options(size=(64, 64))
    with pytest.raises(ExportError, match=r'label pixels'):
        export(tiny.config, tiny.checkpoint, earlier, options, report=lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == ['model.pt2']
    assert earlier.read_text() == 'an earlier export'
