"""tools/export.py says what cannot be done, before anything is written."""

import sys

import pytest
from exporting import needs_export
from trained_tiny import write_trained

from backbones.export import formats

pytestmark = needs_export


@pytest.fixture(scope='module')
def retinanet(tmp_path_factory, shapes):
    """Config and checkpoint of a tiny RetinaNet."""
    return write_trained(tmp_path_factory.mktemp('retinanet'), 'retinanet', shapes)


@pytest.fixture
def run_export(call_tool, retinanet, tmp_path):
    """Runs the tool with OUT and options; returns exit code and what was said."""

    def run(out: str, *options: str) -> tuple[int, str]:
        ended = call_tool('export.py', *retinanet, tmp_path / out, *options)
        assert not list(tmp_path.iterdir())
        return ended

    return run


@pytest.mark.parametrize(
    ('out', 'options', 'message'),
    [
        ('model.tflite', (), '.onnx, .xml, .mlpackage'),
        ('model.onnx', ('--size', '0x640'), 'is not HEIGHTxWIDTH'),
        ('model.onnx', ('--batch', 'many'), "nor 'dynamic'"),
        ('model.onnx', ('--dynamic', '--size', '64x64'), 'not both'),
        ('model.mlpackage', ('--dynamic',), 'fixed size'),
        ('model.mlpackage', (), '--backbone-only'),
        ('model.onnx', ('--logits',), 'this is a detector'),
        ('model.onnx', ('--logits', '--backbone-only'), 'feature maps'),
        ('model.onnx', ('--image', 'none.jpg'), 'there is no image none.jpg'),
        (
            'model.onnx',
            ('--cfg-options', 'model.test_cfg.nms.type=soft_nms'),
            "only 'nms' can be exported",
        ),
    ],
)
def test_requests_that_cannot_be_met(run_export, out, options, message):
    code, said = run_export(out, *options)
    assert code != 0
    assert message in said


def test_what_has_to_be_installed_is_said(run_export, monkeypatch):
    with monkeypatch.context() as without:
        without.setitem(sys.modules, 'onnxscript', None)
        code, said = run_export('model.onnx')
    assert code == 1 and 'pip install -r requirements/export.txt' in said
    monkeypatch.setattr(formats, 'MIN_TORCH', '99.0')
    code, said = run_export('model.onnx')
    assert code == 1 and 'torch 99.0 or later' in said
