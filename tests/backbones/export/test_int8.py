"""Files in 8-bit integers: what is in them, what they cost, and when they are refused.

They are made by the tool in a process of its own: a library that crashes there fails one test only.
"""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from exporting import FEWER_BLOCKS, needs_export
from tool_process import TOOLS, run_tool
from trained_tiny import write_trained

from backbones.errors import ConfigError, DataError, ExportError
from backbones.export import export as export_module
from backbones.export.export import Options, export
from backbones.export.int8 import by_added_error, points
from backbones.inference.exported_file import INPUT_NAME, ExportedModel

pytestmark = needs_export
# Not imported: the tool does so in a process of its own.
needs_nncf = pytest.mark.skipif(find_spec('nncf') is None, reason='nncf is not installed')

SIZES = {'fpn': '64x64', 'ham': '64x64', 'retinanet': '160x160'}


@pytest.fixture(scope='module')
def model_of(tmp_path_factory, shapes):
    """Writes config and checkpoint of a task, once."""
    done = {}

    def write(task: str) -> tuple[Path, Path]:
        if task not in done:
            folder = tmp_path_factory.mktemp(task)
            done[task] = write_trained(folder, task, shapes, FEWER_BLOCKS)
        return done[task]

    return write


@pytest.fixture(scope='module')
def made(model_of):
    """Makes an int8 file of a task and a suffix, once: the file, and what was said."""
    done = {}

    def make(task: str, suffix: str) -> tuple[Path, str]:
        if (task, suffix) not in done:
            config, checkpoint = model_of(task)
            out = checkpoint.with_name(f'{task}{suffix}')
            ended = quantize(out.parent, 'export.py', config, checkpoint, out, SIZES[task], 100)
            assert ended.returncode == 0, ended.stderr[-3000:]
            done[task, suffix] = out, ended.stdout
        return done[task, suffix]

    return make


def quantize(
    folder: Path, tool: object, config: Path, model: Path, out: Path, size: str, drop: int
):
    """Run the tool; random networks react to noise much more than trained ones do."""
    options = ['--int8', '--size', size, '--calibration-images', 4, '--max-drop', drop]
    return run_tool(folder, tool, config, model, out, *options)


def int8_of(path: Path) -> dict:
    return ExportedModel(path, 'cpu').description.int8


@pytest.mark.parametrize(
    'task, suffix', [pytest.param('fpn', '.xml', marks=needs_nncf), ('retinanet', '.onnx')]
)
def test_the_drop_is_what_test_py_measures(task, suffix, made, model_of, tmp_path):
    path, said = made(task, suffix)
    about = int8_of(path)
    done = run_tool(tmp_path, 'test.py', model_of(task)[0], path, '--out', 'metrics.json')
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / 'metrics.json').read_text())
    (name, (before, after)), scale = *about['metrics'].items(), 100 if task == 'retinanet' else 1
    assert after == pytest.approx(found[name] * scale, abs=0.011)
    assert about['drop'] == pytest.approx(before - after, abs=0.011)
    assert f'drop of {about["drop"]:.2f}' in said
    assert name == {'fpn': 'mIoU', 'retinanet': 'coco/bbox_mAP'}[task]


@pytest.mark.parametrize(
    'metrics, scale, expected',
    [
        # mmdet's are shares, mmseg's per cent.
        (
            {'coco/bbox_mAP': 0.4, 'coco/segm_mAP': 0.3},
            100,
            {'coco/bbox_mAP': 40, 'coco/segm_mAP': 30},
        ),
        (
            {'coco/bbox_mAP_50': 0.5, 'coco/segm_mAP_50': 0.4},
            100,
            {'coco/bbox_mAP_50': 50, 'coco/segm_mAP_50': 40},
        ),
        ({'lvis/bbox_AP': 0.3, 'lvis/segm_AP': 0.2}, 100, {'lvis/bbox_AP': 30, 'lvis/segm_AP': 20}),
        ({'pascal_voc/mAP': 0.6, 'pascal_voc/AP50': 0.6}, 100, {'pascal_voc/mAP': 60}),
        ({'aAcc': 90, 'mIoU': 45.2, 'mAcc': 60}, 1, {'mIoU': 45.2}),
        ({'aAcc': 90, 'mDice': 50, 'mAcc': 60}, 1, {'mDice': 50}),
    ],
)
def test_what_is_compared(metrics, scale, expected):
    assert points(metrics, scale) == pytest.approx(expected)


@pytest.mark.parametrize('suffix', [pytest.param('.xml', marks=needs_nncf), '.onnx'])
def test_layers_become_float_again_and_a_drop_that_is_too_large_leaves_no_file(
    suffix, model_of, tmp_path
):
    config, checkpoint = model_of('fpn')
    tool, out = tmp_path / 'two_rounds.py', tmp_path / 'out' / f'fpn{suffix}'
    tool.write_text(
        'import runpy, sys\nimport backbones.export.int8 as int8\nint8.SHARES = (0, 1 / 4)\n'
        # NNCF is for .xml alone.
        f"{suffix!r} == '.xml' or sys.modules.update(nncf=None)\n"
        f"runpy.run_path('{TOOLS / 'export.py'}', run_name='__main__')\n"
    )
    # Even a metric that stays would have to rise.
    done = quantize(tmp_path, tool, config, checkpoint, out, SIZES['fpn'], -100)
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert '--max-drop' in done.stderr and not list(out.parent.iterdir())
    counts = [int(count) for count in re.findall(r'(\d+) layers in float', done.stdout)]
    assert counts[0] == 0 and len(counts) == 2 and counts[1] > 5


@pytest.mark.parametrize('kind', ['mask_rcnn', 'mask_rcnn_xml'])
def test_layers_of_the_second_stages_boxes_become_float_first(kind, exported):
    """A Mask R-CNN lost 1.8 points with half of its other layers in float."""
    path = exported(kind).path
    image = np.full((1, 3, 512, 512), 114, np.float32)
    order = by_added_error(path, path, [{INPUT_NAME: image}])
    assert all('roi_head.bbox_head' in name for name in order[:4])
    later = ' '.join(order[4:])
    assert 'backbone' in later and 'rpn_head' in later and 'roi_head' not in later


def readers(path: Path) -> tuple[dict[str, str], list[str]]:
    """Types, by name, of the operators that read 8-bit activations, in ONNX of those that write
    some too, as its integer kernels do; names of all in their order."""
    if path.suffix == '.onnx':
        nodes = pytest.importorskip('onnx').load(str(path)).graph.node
        written = {node.input[0] for node in nodes if node.op_type == 'QuantizeLinear'}
        inputs = {node.name: set(node.input) for node in nodes if node.output[0] in written}
        of_8_bits = {node.output[0] for node in nodes if node.op_type == 'DequantizeLinear'}
        types = {node.name: node.op_type for node in nodes}
    else:
        model = pytest.importorskip('openvino').Core().read_model(str(path))
        types = {each.get_friendly_name(): each.get_type_name() for each in model.get_ordered_ops()}
        of_8_bits = {name for name, kind in types.items() if kind == 'FakeQuantize'}
        inputs = {
            each.get_friendly_name(): {
                one.get_source_output().get_node().get_friendly_name() for one in each.inputs()
            }
            for each in model.get_ordered_ops()
        }
    return {name: types[name] for name in inputs if inputs[name] & of_8_bits}, list(types)


@pytest.mark.parametrize(
    'task, suffix',
    [
        pytest.param('fpn', '.xml', marks=needs_nncf),
        pytest.param('ham', '.xml', marks=needs_nncf),
        pytest.param('fpn', '.onnx', marks=pytest.mark.slow),
        ('retinanet', '.onnx'),
    ],
)
def test_only_the_network_is_in_8_bits(task, suffix, made):
    """Boxes decoded in 8 bits would be whole cells of the image away."""
    found, names = readers(made(task, suffix)[0])
    convolutions = {'Conv', 'Convolution', 'GroupConvolution', 'ConvTranspose'}
    assert any('backbone' in name for name, kind in found.items() if kind in convolutions)
    assert any('head' in name for name, kind in found.items() if kind in convolutions)
    forbidden = {'Softmax', 'TopK', 'ArgMax', 'NonMaxSuppression', 'Exp', 'Div', 'Divide', 'Gather'}
    assert not forbidden & set(found.values())
    talking_heads = {name for name in names if 'bmm' in name}
    assert talking_heads and not talking_heads & set(found)
    head = min(names.index(name) for name in names if 'head' in name and name in found)
    later = {found[name] for name in names[head:] if name in found}
    # The matrix decomposition of the light head, and how boxes are decoded.
    assert later <= convolutions | {'Resize', 'Interpolate', 'Concat', 'Add', 'Relu', 'ReLU'}


def test_predictions(made, tmp_path, shapes):
    path, _ = made('retinanet', '.onnx')
    image = next((shapes / 'coco' / 'val2017').iterdir())
    done = run_tool(tmp_path, 'infer.py', path, image, '--out-dir', 'out')
    assert done.returncode == 0, done.stderr[-2000:]
    assert list((tmp_path / 'out' / 'drawn').rglob('*.*'))


@pytest.mark.parametrize('split', ['train', 'val'])
@pytest.mark.parametrize('task', ['fpn', 'retinanet'])
def test_missing_data_are_found_before_anything_is_written(
    task, split, model_of, tmp_path, monkeypatch
):
    monkeypatch.setattr(export_module, 'write', lambda *model: pytest.fail('a file was written'))
    missing = {f'{split}_dataloader.dataset.data_root': 'nowhere'}
    options = Options(int8=True), missing, lambda line: None
    with pytest.raises((DataError, FileNotFoundError), match='nowhere'):
        export(*model_of(task), tmp_path / 'a.onnx', *options)


@pytest.mark.parametrize('split', ['train', 'val'])
def test_a_config_without_data_is_refused(split, model_of, tmp_path):
    parts = [f'{split}_dataloader', *(['test_dataloader'] if split == 'val' else [])]
    with pytest.raises(ConfigError, match='--int8'):
        export(*model_of('fpn'), tmp_path / 'a.onnx', Options(int8=True), dict.fromkeys(parts))


def test_what_cannot_be_quantized(tmp_path):
    for name, options in (('a.mlpackage', {}), ('a.onnx', {'backbone_only': True})):
        with pytest.raises(ExportError, match='--int8'):
            export('none.py', 'none.pth', tmp_path / name, Options(int8=True, **options))
