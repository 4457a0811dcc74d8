"""tools/infer.py with a file of tools/export.py in place of config and checkpoint."""

import json
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import cv2
import infer
import numpy as np
import onnx
import openvino
import pytest
import torch
from exporting import needs_export
from PIL import Image
from pycocotools import mask as coco_mask

from backbones import weights as checkpoint_file
from backbones.inference.masks import encode_mask

pytestmark = needs_export

KINDS = {'.onnx': 'mask_rcnn', '.xml': 'openvino', '.pt2': 'pt2'}


@pytest.fixture(scope='module')
def photograph(tmp_path_factory, pictures) -> Path:
    """One of the pictures as a file, of a size that all files take as it is."""
    path = tmp_path_factory.mktemp('pictures') / 'drawn.png'
    cv2.imwrite(str(path), cv2.resize(pictures[1], (160, 160)))
    return path


@pytest.fixture
def call(monkeypatch, capsys, tmp_path) -> Callable[..., tuple[int, str, Path]]:
    """Runs the tool in this process; returns exit code, what was said and the output folder."""
    monkeypatch.setattr(checkpoint_file, '_trusted', False)
    monkeypatch.setattr(infer.signal, 'signal', lambda number, handler: None)

    def run(*arguments: object) -> tuple[int, str, Path]:
        out = tmp_path / f'out{len(list(tmp_path.iterdir()))}'
        monkeypatch.setattr(sys, 'argv', ['infer.py', *map(str, arguments), '--out-dir', str(out)])
        try:
            code = infer.main()
        except SystemExit as error:
            code = error.code
        return code, ''.join(capsys.readouterr()), out

    return run


@pytest.mark.parametrize('ending', ['.onnx', '.pt2'])
def test_detections_are_those_of_the_model(ending, exported, predict, photograph, call):
    made = exported(KINDS[ending])
    code, said, out = call(made.path, photograph, '--score-thr', 0, '--trust-checkpoint')
    assert code == 0, said
    assert (out / 'drawn' / 'drawn.jpg').is_file()
    found = json.loads((out / 'data' / 'drawn.json').read_text())
    picture = cv2.imread(str(photograph))
    (expected,) = predict(made.model, [picture])
    assert len(found) == len(expected.scores) > 0
    for index, each in enumerate(found):
        left, top, width, height = each['bbox']
        box = [left, top, left + width, top + height]
        assert each['category_id'] == expected.labels[index] + 1
        assert each['score'] == pytest.approx(expected.scores[index], abs=1e-3)
        assert box == pytest.approx(expected.boxes[index].tolist(), abs=0.05)
        if ending == '.onnx':
            mask = coco_mask.decode(encode_mask(expected.masks[index], picture.shape[:2]))
            assert np.mean(coco_mask.decode(each['segmentation']) == mask) >= 0.999


@pytest.mark.parametrize(('option', 'share'), [((), 0.999), (('--amp',), 0.95)])
def test_label_maps_are_those_of_the_model(option, share, exported, predict, photograph, call):
    made = exported('openvino')
    code, said, out = call(made.path, photograph, *option)
    assert code == 0, said
    found = np.array(Image.open(out / 'data' / 'drawn.png'))
    (expected,) = predict(made.model, [cv2.imread(str(photograph))])
    assert np.mean(found == expected.seg_map) >= share
    assert len(np.unique(found)) > 1


class TestMistakes:
    def test_a_pt2_may_run_code(self, exported, photograph, call):
        path = exported('pt2').path
        code, said, _ = call(path, photograph)
        assert code == 1 and 'runs code that is in the file' in said
        assert '--trust-checkpoint' in said

    @pytest.mark.parametrize('ending', KINDS)
    def test_damaged_files(self, ending, exported, photograph, call, tmp_path):
        path = exported(KINDS[ending]).path
        damaged = tmp_path / f'damaged{ending}'
        damaged.write_bytes(path.read_bytes()[:-4000])
        damaged.with_suffix('.bin').touch()
        code, said, _ = call(damaged, photograph, '--trust-checkpoint')
        assert code == 1 and f'error: {damaged} ' in said
        assert 'cannot be read as ' in said or 'is damaged' in said

    def test_an_xml_without_its_weights(self, exported, photograph, call, tmp_path):
        path = exported('openvino').path
        alone = shutil.copy(path, tmp_path / 'alone.xml')
        code, said, _ = call(alone, photograph)
        assert code == 1 and f'{alone} needs {tmp_path / "alone.bin"}' in said
        (tmp_path / 'alone.bin').write_bytes(path.with_suffix('.bin').read_bytes()[:1000])
        code, said, _ = call(alone, photograph)
        assert code == 1 and f'{alone} cannot be read as an OpenVINO model' in said

    @pytest.mark.parametrize('ending', KINDS)
    def test_files_of_others(self, ending, photograph, call, tmp_path):
        path = tmp_path / f'other{ending}'
        write_other(path)
        code, said, _ = call(path, photograph, '--trust-checkpoint')
        assert code == 1 and f'{path} does not say what its inputs and outputs mean' in said

    @pytest.mark.parametrize('ending', KINDS)
    def test_devices_that_are_not_there(self, ending, exported, photograph, call):
        code, said, _ = call(
            exported(KINDS[ending]).path, photograph, '--trust-checkpoint', '--device', 'tpu'
        )
        assert code == 1 and "device 'tpu' cannot be used here" in said

    @pytest.mark.parametrize(
        ('ending', 'package'), [('.onnx', 'onnxruntime'), ('.xml', 'openvino')]
    )
    def test_a_missing_package(self, ending, package, exported, photograph, call, monkeypatch):
        path = exported(KINDS[ending]).path
        monkeypatch.setitem(sys.modules, package, None)
        code, said, _ = call(path, photograph)
        assert code == 1 and f'{path} needs the package {package}: pip install -r' in said

    @pytest.mark.parametrize(
        'option',
        [('--no-deploy',), ('--cfg-options', 'model.test_cfg.score_thr=0.5')],
    )
    def test_what_was_settled_when_it_was_exported(self, option, exported, photograph, call):
        code, said, _ = call(exported('openvino').path, photograph, *option)
        assert code == 1 and 'were settled then' in said

    @pytest.mark.parametrize('ending', ['.onnx', '.pt2'])
    def test_mixed_precision_is_openvinos(self, ending, exported, photograph, call):
        path = exported(KINDS[ending]).path
        code, said, _ = call(path, photograph, '--amp', '--trust-checkpoint')
        assert code == 1 and 'mixed precision (--amp) is for .xml files' in said

    def test_what_no_machine_here_runs(self, photograph, call, tmp_path):
        code, said, _ = call(tmp_path / 'model.mlpackage', photograph)
        assert code == 1 and 'model.mlpackage cannot be run here: .onnx, .xml, .pt2' in said
        code, said, _ = call(tmp_path / 'none.xml', photograph)
        assert code == 1 and f'there is no model {tmp_path / "none.xml"}' in said


def write_other(path: Path) -> None:
    """A file of a format that says nothing about itself."""
    if path.suffix == '.pt2':
        program = torch.export.export(torch.nn.ReLU(), (torch.ones(1),))
        torch.export.save(program, str(path))
        assert zipfile.is_zipfile(path)
        return
    value = onnx.helper.make_tensor_value_info('x', onnx.TensorProto.FLOAT, [1])
    out = onnx.helper.make_tensor_value_info('y', onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node('Relu', ['x'], ['y'])
    graph = onnx.helper.make_graph([node], 'g', [value], [out])
    opset = onnx.helper.make_opsetid('', 18)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9)
    onnx.save(model, path.with_suffix('.onnx'))
    if path.suffix == '.xml':
        openvino.save_model(openvino.convert_model(str(path.with_suffix('.onnx'))), str(path))
