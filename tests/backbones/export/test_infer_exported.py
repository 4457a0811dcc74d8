"""tools/infer.py with a file of tools/export.py in place of config and checkpoint."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import onnx
import openvino
import pytest
from exporting import needs_export
from PIL import Image
from pycocotools import mask as coco_mask

from backbones.app.models import open_models, pair_up
from backbones.app.upload import Upload
from backbones.inference.exported_file import ExportedModel
from backbones.inference.masks import encode_mask
from backbones.inference.tiles import TiledModel

pytestmark = needs_export

KINDS = {'.onnx': 'mask_rcnn', '.xml': 'logits'}


@pytest.fixture(scope='module')
def photograph(tmp_path_factory, images) -> Path:
    """An image file of a size that all files take as it is."""
    path = tmp_path_factory.mktemp('images') / 'drawn.png'
    cv2.imwrite(str(path), cv2.resize(images[1], (160, 160)))
    return path


@pytest.fixture
def call(call_tool, tmp_path) -> Callable[..., tuple[int, str, Path]]:
    """Runs infer.py in this process; returns exit code, what was said and the output folder."""

    def run(*arguments: object) -> tuple[int, str, Path]:
        out = tmp_path / f'out{len(list(tmp_path.iterdir()))}'
        return *call_tool('infer.py', *arguments, '--out-dir', out), out

    return run


def test_detections_are_those_of_the_model(exported, predict, photograph, call):
    made = exported('mask_rcnn')
    code, said, out = call(made.path, photograph, '--score-thr', '0')
    assert code == 0, said
    found = json.loads(next(out.rglob('drawn.json')).read_text())
    image = cv2.imread(str(photograph))
    (expected,) = predict(made.model, [image])
    assert len(found) == len(expected.scores) > 0
    for index, each in enumerate(found):
        left, top, width, height = each['bbox']
        box = [left, top, left + width, top + height]
        assert each['category_id'] == expected.labels[index] + 1
        assert each['score'] == pytest.approx(expected.scores[index], abs=1e-3)
        assert box == pytest.approx(expected.boxes[index].tolist(), abs=0.05)
        mask = coco_mask.decode(encode_mask(expected.masks[index], image.shape[:2]))
        assert np.mean(coco_mask.decode(each['segmentation']) == mask) >= 0.999


@pytest.mark.parametrize(('option', 'share'), [((), 0.999), (('--amp',), 0.95)])
def test_segmentation_maps_are_those_of_the_model(
    option, share, exported, predict, photograph, call
):
    made = exported('logits')
    code, said, out = call(made.path, photograph, *option)
    assert code == 0, said
    found = np.array(Image.open(next((out / 'data').rglob('drawn.png'))))
    (expected,) = predict(made.model, [cv2.imread(str(photograph))])
    assert np.mean(found == expected.seg_map) >= share
    assert len(np.unique(found)) > 1


@pytest.mark.parametrize(
    'kind',
    [
        *('logits', 'fpn', 'single', 'mask_rcnn'),
        pytest.param('mask_rcnn_open', marks=pytest.mark.slow),
    ],
)
def test_large_images_in_tiles_are_those_of_the_model(kind, exported, images, predict):
    made = exported(kind)
    # Square, so that a file of a fixed size pads the whole image as little as the model does.
    large = cv2.resize(np.hstack(images), (400, 400))
    # A file of class indices takes them from the tile whose border is farthest away.
    made.model.gives_logits = kind != 'fpn'
    (expected,) = predict(TiledModel(made.model, 160), [large])
    (found,) = predict(TiledModel(ExportedModel(made.path), 160), [large])
    if kind in ('logits', 'fpn'):
        assert np.mean(found.seg_map == expected.seg_map) >= 0.999
        assert len(np.unique(found.seg_map)) > 1
        return
    assert len(found.boxes) == len(expected.boxes) > 3
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=0.5)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-3)
    for one, other in zip(found.masks or (), expected.masks or (), strict=True):
        pixels = [coco_mask.decode(encode_mask(each, large.shape[:2])) for each in (one, other)]
        assert np.mean(pixels[0] == pixels[1]) >= 0.999


def test_batches_of_which_the_last_is_not_full(exported, images, predict):
    """Three images for a file of batches of two."""
    in_file = ExportedModel(exported('logits').path)
    for image, together in zip(images, predict(in_file, images), strict=True):
        (alone,) = predict(in_file, [image])
        assert np.mean(together.seg_map == alone.seg_map) >= 0.999


def test_tiles_on_the_command_line(exported, photograph, call):
    code, said, out = call(exported('logits').path, photograph, '--tile', '96', '--overlap', '0.5')
    assert code == 0, said
    assert np.array(Image.open(next((out / 'data').rglob('drawn.png')))).shape == (160, 160)
    code, said, _ = call(exported('logits').path, photograph, '--tile', '10')
    assert code == 1 and 'too small' in said


@pytest.mark.parametrize('kind', KINDS.values())
def test_the_page_shows_what_infer_writes(kind, exported, photograph, call, tmp_path):
    path = exported(kind).path
    _, _, out = call(path, photograph, '--score-thr', '0')
    (model,) = open_models(pair_up([str(path)]), device='cpu').values()
    upload = Upload(photograph, 50, 60)
    predicted = upload.predict(model, '')
    drawn = upload.draw(model, predicted, tmp_path / 'page', score_thr=0.0)
    assert drawn.rows and drawn.path.read_bytes() == next(out.rglob('drawn.jpg')).read_bytes()


def corrupt(path: Path, folder: Path) -> Path:
    (folder / f'corrupt{path.suffix}').write_bytes(path.read_bytes()[:-4000])
    (folder / 'corrupt.bin').touch()
    return folder / f'corrupt{path.suffix}'


def of_others(path: Path, folder: Path) -> Path:
    write_other(folder / f'other{path.suffix}')
    return folder / f'other{path.suffix}'


@pytest.mark.parametrize('suffix', KINDS)
@pytest.mark.parametrize(
    ('make', 'words'), [(corrupt, 'error'), (of_others, 'has no metadata that describes')]
)
def test_files_that_cannot_be_used(make, words, suffix, exported, photograph, call, tmp_path):
    path = make(exported(KINDS[suffix]).path, tmp_path)
    code, said, _ = call(path, photograph)
    assert code == 1 and f'{path} ' in said and words in said


def test_files_that_are_incomplete_or_run_elsewhere(exported, photograph, call, tmp_path):
    alone = shutil.copy(exported('logits').path, tmp_path / 'alone.xml')
    code, said, _ = call(alone, photograph)
    assert code == 1 and f'{alone} cannot be opened' in said and 'bin file' in said
    for name in ('model.mlpackage', 'none.xml'):
        code, said, _ = call(tmp_path / name, photograph)
        assert code == 1 and name in said


@pytest.mark.parametrize(
    ('suffix', 'options', 'words'),
    [
        ('.onnx', ('--device', 'tpu'), "'tpu'"),
        ('.xml', ('--device', 'tpu'), '"TPU"'),
        ('.xml', ('--no-deploy',), 'exported'),
        ('.xml', ('--cfg-options', 'model.test_cfg.score_thr=0.5'), 'exported'),
        ('.onnx', ('--amp',), 'exported'),
    ],
)
def test_options_that_a_file_cannot_follow(suffix, options, words, exported, photograph, call):
    code, said, _ = call(exported(KINDS[suffix]).path, photograph, *options)
    assert code == 1 and words in said


@pytest.mark.parametrize(('suffix', 'package'), [('.onnx', 'onnxruntime'), ('.xml', 'openvino')])
def test_a_missing_package(suffix, package, exported, photograph, call, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    code, said, _ = call(exported(KINDS[suffix]).path, photograph)
    assert code == 1 and f'package {package}: pip install -r' in said


def write_other(path: Path) -> None:
    """A file of a format that says nothing about itself."""
    value = onnx.helper.make_tensor_value_info('x', onnx.TensorProto.FLOAT, [1])
    out = onnx.helper.make_tensor_value_info('y', onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node('Relu', ['x'], ['y'])
    graph = onnx.helper.make_graph([node], 'g', [value], [out])
    opset = onnx.helper.make_opsetid('', 18)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9)
    onnx.save(model, path.with_suffix('.onnx'))
    if path.suffix == '.xml':
        openvino.save_model(openvino.convert_model(str(path.with_suffix('.onnx'))), str(path))
