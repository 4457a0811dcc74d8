"""Feeding an exported file."""

import dataclasses
import gc
import json
import weakref
from pathlib import Path

import numpy as np
import pytest

from backbones.errors import ConfigError, ExportError
from backbones.inference import exported_file
from backbones.inference.exported_file import Description, Runner, open_exported, read_description

DESCRIPTION = Description(
    task='detection',
    model='a_config',
    classes=('cat', 'dog'),
    palette=[[1, 2, 3], [4, 5, 6]],
    size=(80, 134),
    min_size=1,
    batch=1,
    resize=[dict(type='Resize', scale=[133, 80], keep_ratio=True, interpolation='bilinear')],
    missing_transforms=[],
    mean=(10.0, 20.0, 30.0),
    std=(1.0, 1.0, 1.0),
    pad_pixel=(30.0, 20.0, 10.0),
    outputs=['boxes', 'scores', 'labels'],
)


def image(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 200, np.uint8)


def test_a_description_survives_its_file():
    assert read_description(Path('a.onnx'), DESCRIPTION.to_json()) == DESCRIPTION
    of_a_later_version = json.dumps(json.loads(DESCRIPTION.to_json()) | {'later': 1})
    assert read_description(Path('a.onnx'), of_a_later_version) == DESCRIPTION


@pytest.mark.parametrize('text', [None, '', '{}', '[1]', '{"task": "detection"}', 'null'])
def test_other_text_is_no_description(text):
    with pytest.raises(ExportError, match=r'^a\.onnx has no metadata'):
        read_description(Path('a.onnx'), text)


@pytest.mark.parametrize(
    ('size', 'inside'),
    [
        pytest.param((48, 64), (80, 107), id='landscape'),
        pytest.param((64, 48), (80, 60), id='portrait, made smaller to fit'),
        pytest.param((10, 400), (3, 133), id='very wide'),
    ],
)
def test_a_detectors_image_keeps_its_proportions_in_a_fixed_size(size, inside):
    inputs, fitted = DESCRIPTION.fit(image(*size))
    assert inputs.shape == (3, 80, 134) and fitted == inside
    assert (inputs[:, : inside[0], : inside[1]] == 200).all()
    assert inputs[:, -1, -1].tolist() == [30, 20, 10]


def test_a_segmentors_image_fills_a_fixed_size():
    inputs, fitted = dataclasses.replace(DESCRIPTION, task='segmentation').fit(image(48, 64))
    assert fitted == (80, 134) and (inputs == 200).all()


def test_where_any_size_is_taken_images_are_padded_to_the_minimum_size_only():
    any_size = dataclasses.replace(DESCRIPTION, size=None, min_size=65, resize=[])
    assert any_size.fit(image(90, 101))[0].shape == (3, 90, 101)
    assert any_size.fit(image(90, 20))[0].shape == (3, 90, 65)
    multiple = dict(type='ResizeToMultiple', size_divisor=32, interpolation='bilinear')
    steps = [*DESCRIPTION.resize, multiple]
    inputs, fitted = dataclasses.replace(any_size, resize=steps).fit(image(48, 64))
    assert inputs.shape == (3, 96, 128) and fitted == (96, 128)


def test_threads_are_those_of_the_environment(monkeypatch, tmp_path):
    """As torch's are: several processes on one machine each get some of its cores."""
    onnxruntime = pytest.importorskip('onnxruntime')
    threads = []

    def session(path, options, providers):
        threads.append(options.intra_op_num_threads)
        raise RuntimeError('that is enough')

    monkeypatch.setattr(onnxruntime, 'InferenceSession', session)
    (tmp_path / 'a.onnx').touch()
    for value, given in (('2', None), ('2', 3), ('', None), ('4,2', None), ('auto', None)):
        monkeypatch.setenv('OMP_NUM_THREADS', value)
        with pytest.raises(ExportError, match='enough'):
            open_exported(tmp_path / 'a.onnx', 'cpu', given)
    assert threads == [2, 3, 0, 4, 0]


def test_openvino_is_not_asked_for_a_gpu_of_torch(tmp_path):
    (tmp_path / 'a.xml').touch()
    with pytest.raises(ConfigError, match='--device cpu'):
        open_exported(tmp_path / 'a.xml', 'cuda:0')


def test_a_file_is_closed_with_its_last_use(monkeypatch):
    """Else a forked process may collect it, and wait forever for OpenVINO's threads."""
    opened = []

    def open_file(*args, **options):
        runner = Runner(DESCRIPTION, lambda inputs: [])
        opened.append(weakref.ref(runner))
        return runner

    monkeypatch.setattr(exported_file, 'open_exported', open_file)
    gc.disable()
    try:
        exported_file.ExportedModel('a.xml')
        assert opened[0]() is None
    finally:
        gc.enable()
