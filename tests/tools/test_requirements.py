"""tools/_requirements.py: imports that fail with one line, seen from a tool's side."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = f"""
import sys
sys.path.insert(0, {str(ROOT / 'tools')!r})
from _requirements import explain_missing
with explain_missing():
    {{body}}
print('went on')
"""


def run_tool(folder: Path, body: str, python: str = sys.executable) -> subprocess.CompletedProcess:
    script = folder / 'tool.py'
    script.write_text(TOOL.format(body=body))
    environment = {**os.environ, 'PYTHONPATH': str(folder)}
    command = [python, str(script)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)


@pytest.mark.parametrize(
    ('failure', 'words'),
    [
        ("ImportError('x/_ext.so: undefined symbol: _ZN2at4_ops')", 'undefined symbol'),
        ('ModuleNotFoundError("No module named \'mmengine\'")', "No module named 'mmengine'"),
        ("AssertionError('MMCV==2.2.0 is used but\\nincompatible.')", 'is used but incompatible'),
        ("OSError('libtorch.so: cannot open shared object file')", 'libtorch.so'),
    ],
)
def test_one_line_that_points_to_the_doctor(tmp_path: Path, failure: str, words: str) -> None:
    (tmp_path / 'mmcv.py').write_text(f'raise {failure}')
    done = run_tool(tmp_path, 'import mmcv')
    assert done.returncode == 1
    assert done.stdout == ''
    assert len(done.stderr.strip().splitlines()) == 1
    assert words in done.stderr
    assert 'python tools/doctor.py' in done.stderr


def test_says_nothing_when_all_is_there(tmp_path: Path) -> None:
    done = run_tool(tmp_path, 'import json')
    assert (done.returncode, done.stdout, done.stderr) == (0, 'went on\n', '')


def test_other_errors_keep_their_traceback(tmp_path: Path) -> None:
    (tmp_path / 'mmcv.py').write_text('1 / 0')
    assert 'Traceback' in run_tool(tmp_path, 'import mmcv').stderr


def test_backbones_from_a_plain_clone(tmp_path: Path) -> None:
    venv.create(tmp_path / 'empty', with_pip=False)
    body = 'import importlib.util; print(importlib.util.find_spec("backbones").origin)'
    done = run_tool(tmp_path, body, python=str(tmp_path / 'empty' / 'bin' / 'python'))
    assert Path(done.stdout.splitlines()[0]) == ROOT / 'backbones' / '__init__.py'


def test_installed_backbones_go_first(tmp_path: Path) -> None:
    (tmp_path / 'backbones.py').write_text('')
    done = run_tool(tmp_path, 'import backbones; print(backbones.__file__)')
    assert Path(done.stdout.splitlines()[0]) == tmp_path / 'backbones.py'
