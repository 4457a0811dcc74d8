"""mmdet is imported for detectors only, mmseg for segmentors only."""

import pytest
from exporting import needs_export
from tool_process import start

pytestmark = needs_export

EXPORT = """
import sys
for name in [*sys.modules, {unwanted!r}]:
    if name.partition('.')[0] == {unwanted!r}:
        sys.modules[name] = None
from backbones.export.export import Options, export
export({config!r}, {checkpoint!r}, {out!r}, Options(size=(64, 64)), {options!r})
"""


@pytest.mark.parametrize(
    ('task', 'unwanted'),
    [('fpn', 'mmdet'), pytest.param('retinanet', 'mmseg', marks=pytest.mark.slow)],
)
def test_export_needs_one_library(task, unwanted, tiny_model, tmp_path):
    tiny = tiny_model(task)
    code = EXPORT.format(
        unwanted=unwanted,
        config=tiny.config,
        checkpoint=tiny.checkpoint,
        out=str(tmp_path / 'model.onnx'),
        options=tiny.cfg_options,
    )
    (tmp_path / 'export_alone.py').write_text(code)
    ended = start(tmp_path, [tmp_path / 'export_alone.py'])(600)
    assert ended.returncode == 0, ended.stderr[-1500:]
    assert (tmp_path / 'model.onnx').is_file()
