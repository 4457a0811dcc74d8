"""Feeding an exported file, and files that are none."""

import dataclasses

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from backbones.engine.errors import ConfigError
from backbones.export.description import Description
from backbones.export.errors import ExportError
from backbones.export.onnx_model import OnnxModel

DESCRIPTION = Description(
    task='detection',
    model='a_config',
    classes=('cat', 'dog'),
    palette=[[1, 2, 3], [4, 5, 6]],
    size=(80, 134),
    min_size=1,
    batch=1,
    resize=dict(scale=[133, 80], keep_ratio=True),
    mean=(10.0, 20.0, 30.0),
    std=(1.0, 1.0, 1.0),
    pad_pixel=(30.0, 20.0, 10.0),
    outputs={'boxes': '', 'scores': '', 'labels': ''},
)


def picture(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 200, np.uint8)


def test_a_description_survives_its_file():
    assert Description.from_json(DESCRIPTION.to_json()) == DESCRIPTION


@pytest.mark.parametrize('text', ['', '{}', '[1]', '{"task": "detection"}', 'null'])
def test_other_text_is_no_description(text):
    with pytest.raises(ValueError):
        Description.from_json(text)


@pytest.mark.parametrize(
    ('size', 'inside'),
    [
        pytest.param((48, 64), (80, 107), id='lying'),
        pytest.param((64, 48), (80, 60), id='standing, smaller than the scale says'),
        pytest.param((10, 400), (3, 133), id='very wide'),
    ],
)
def test_a_picture_keeps_its_proportions_in_a_fixed_size(size, inside):
    fitted = DESCRIPTION.fit(picture(*size))
    assert fitted.inputs.shape == (3, 80, 134) and fitted.size == inside
    assert (fitted.inputs[:, : inside[0], : inside[1]] == 200).all()
    assert fitted.inputs[:, -1, -1].tolist() == [30, 20, 10]


def test_a_picture_is_padded_only_to_the_least_size_where_any_is_taken():
    any_size = dataclasses.replace(DESCRIPTION, size=None, min_size=65, resize=None)
    assert any_size.fit(picture(90, 101)).inputs.shape == (3, 90, 101)
    assert any_size.fit(picture(90, 20)).inputs.shape == (3, 90, 65)


def test_a_file_that_is_missing_or_none_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        OnnxModel(tmp_path / 'none.onnx')
    (tmp_path / 'text.onnx').write_text('no model')
    with pytest.raises(ExportError, match='cannot be read as an ONNX model'):
        OnnxModel(tmp_path / 'text.onnx')


def test_a_model_from_elsewhere_is_an_error(tmp_path):
    value = helper.make_tensor_value_info('x', TensorProto.FLOAT, [1])
    out = helper.make_tensor_value_info('y', TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node('Relu', ['x'], ['y'])], 'g', [value], [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 18)], ir_version=9)
    onnx.save(model, tmp_path / 'other.onnx')
    with pytest.raises(ExportError, match=r'was not written by tools/export\.py'):
        OnnxModel(tmp_path / 'other.onnx')
    with pytest.raises(ConfigError, match="device 'tpu'"):
        OnnxModel(tmp_path / 'other.onnx', 'tpu')
