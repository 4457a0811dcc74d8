"""Files in 8-bit integers: what is in them, what they cost, and when they are refused."""

import json
import logging
from pathlib import Path

import pytest
from exporting import needs_export
from tool_process import run_tool
from trained_tiny import write_trained

from backbones.errors import ExportError
from backbones.export.export import Options, export
from backbones.export.int8 import Network, read_model
from backbones.inference.exported_file import ExportedModel

pytestmark = needs_export
pytest.importorskip('nncf')

# Random networks react to noise much more than trained ones do.
INT8 = dict(int8=True, calibration_images=4, max_drop=100.0)
FILES = {'fpn': 'fpn.xml', 'retinanet': 'retinanet.xml', 'mask_rcnn': 'mask_rcnn.onnx'}
SIZES = {'fpn': (128, 128), 'retinanet': (160, 160), 'mask_rcnn': (160, 160)}


@pytest.fixture(scope='module', params=FILES)
def made(request, tmp_path_factory, shapes) -> dict:
    """Config, float and int8 file of a task, and what was said."""
    task, lines = request.param, []
    folder = tmp_path_factory.mktemp(task)
    config, checkpoint = write_trained(folder, task, shapes)
    paths = [folder / f'{precision}_{FILES[task]}' for precision in ('float', 'int8')]
    for path, extra in zip(paths, ({}, INT8), strict=True):
        options = Options(size=SIZES[task], **extra)
        export(config, checkpoint, path, options, report=lines.append)
    logging.getLogger('nncf').setLevel(logging.WARNING)
    return dict(task=task, config=config, float=paths[0], int8=paths[1], lines=lines)


def weight(path: Path) -> int:
    return sum(one.stat().st_size for one in (path, path.with_suffix('.bin')) if one.exists())


def test_the_drop_is_what_test_py_measures(made, tmp_path):
    about = ExportedModel(made['int8'], 'cpu').description.int8
    found = {}
    for key in ('float', 'int8'):
        done = run_tool(tmp_path, 'test.py', made['config'], made[key], '--out', f'{key}.json')
        assert done.returncode == 0, done.stderr[-2000:]
        found[key] = json.loads((tmp_path / f'{key}.json').read_text())
    for name, (before, after) in about['metrics'].items():
        scale = 100 if name.endswith('mAP') else 1
        assert before == pytest.approx(found['float'][name] * scale, abs=0.011)
        assert after == pytest.approx(found['int8'][name] * scale, abs=0.011)
    drops = [before - after for before, after in about['metrics'].values()]
    assert about['drop'] == pytest.approx(max(drops), abs=0.011)
    assert (
        set(about['metrics'])
        == {
            'fpn': {'mIoU'},
            'retinanet': {'coco/bbox_mAP'},
            'mask_rcnn': {'coco/bbox_mAP', 'coco/segm_mAP'},
        }[made['task']]
    )


def fed_by_conversions(network: Network) -> set[str]:
    """Operators that read what is, or could be, converted from 8 bits."""
    kinds = {'FakeQuantize', 'DequantizeLinear', 'Convert'}
    inputs = network.inputs.items()
    return {name for name, sources in inputs if {network.types[one] for one in sources} & kinds}


def test_only_the_network_is_in_8_bits(made):
    """Boxes decoded in 8 bits would be whole cells of the image away."""
    network, int8 = Network(read_model(made['float'])), Network(read_model(made['int8']))
    before, after = map(fed_by_conversions, (network, int8))
    quantized = after - before
    # RoIAlign copies features in between.
    pooled = {'Gather', 'Concat', 'Flatten', 'Reshape', 'RoiAlign', 'ROIAlign'}
    outside = {name for name in network.outside if network.types[name] not in pooled}
    assert quantized & set(network.layers) and not quantized & outside
    inside = {network.types[name] for name in set(network.types) - set(network.outside)}
    assert not inside & {'TopK', 'NonMaxSuppression', 'ArgMax', 'Exp', 'ShapeOf', 'Shape', 'Floor'}
    assert any('backbone' in name for name in network.layers)
    if made['task'] == 'mask_rcnn':
        assert any('roi_head' in name for name in network.behind_rois)


def test_it_is_smaller_and_runs(made, tmp_path, shapes):
    assert weight(made['int8']) < 0.9 * weight(made['float'])
    image = next((shapes / 'coco' / 'val2017').iterdir())
    done = run_tool(tmp_path, 'infer.py', made['int8'], image, '--out-dir', 'out')
    assert done.returncode == 0, done.stderr[-2000:]
    assert list((tmp_path / 'out' / 'drawn').rglob('*.*'))


def test_a_drop_that_is_too_large_leaves_no_file(tmp_path, shapes):
    config, checkpoint = write_trained(tmp_path, 'fpn', shapes)
    out, lines = tmp_path / 'out' / 'model.xml', []
    # Even a metric that stays would have to rise.
    options = Options(size=(128, 128), **INT8 | {'max_drop': -100.0})
    with pytest.raises(ExportError, match='--max-drop'):
        export(config, checkpoint, out, options, report=lines.append)
    assert not list(out.parent.iterdir())
    counts = [int(line.split(', ')[1].split()[0]) for line in lines if 'calibrating' in line]
    assert counts[0] == 0 and counts == sorted(set(counts)) and len(counts) == 5


def test_what_cannot_be_quantized(tmp_path):
    for name, options in (('a.mlpackage', {}), ('a.onnx', {'backbone_only': True})):
        with pytest.raises(ExportError, match='--int8'):
            export('none.py', 'none.pth', tmp_path / name, Options(int8=True, **options))
