"""The code in docs/export.md runs in plain onnxruntime and gives infer.py's results."""

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from exporting import needs_export

from backbones.inference.exported_file import ExportedModel

pytestmark = needs_export

PAGE = Path(__file__).resolve().parents[3] / 'docs' / 'export.md'


@pytest.mark.parametrize(('number', 'name'), [(0, 'retinanet.onnx'), (1, 'fpn.onnx')])
def test_the_page_runs_exported_files(
    number, name, exported, predict, images, tmp_path, monkeypatch, capsys
):
    code = re.findall(r'```python\n(.*?)```', PAGE.read_text(), re.DOTALL)[number]
    assert f"'{name}'" in code and 'backbones' not in code
    path = exported('single' if number == 0 else 'fixed').path
    (tmp_path / name).symlink_to(path)
    # Other proportions than the file's.
    image = images[1][:100]
    # The page reads a .jpg; OpenCV goes by the contents.
    (tmp_path / 'street.jpg').write_bytes(cv2.imencode('.png', image)[1].tobytes())
    monkeypatch.chdir(tmp_path)
    variables = {}
    capsys.readouterr()
    exec(code, variables)
    lines = capsys.readouterr().out.splitlines()
    model = ExportedModel(path, 'cpu')
    (expected,) = predict(model, [image])
    if number == 0:
        assert lines, 'nothing was found'
        assert [line.split()[0] for line in lines] == [model.classes[i] for i in expected.labels]
        assert lines and f'{expected.scores[0]:.2f}' in lines[0]
        found = variables['boxes'][0][: len(lines)] / variables['scale']
        np.testing.assert_allclose(np.clip(found, 0, (128, 100) * 2), expected.boxes, atol=1)
    else:
        assert np.mean(variables['found'] == expected.seg_map) == 1
        assert len(lines) == len(np.unique(variables['found'])) > 1
