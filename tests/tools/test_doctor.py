"""tools/doctor.py, and what tools say when an import fails."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from doctor import command_that_helps

ROOT = Path(__file__).resolve().parents[2]
MAINTAINED = {'torch': '2.13.0', 'onedl-mmengine': '0.10.12', 'onedl-mmcv': '2.3.6'}
ORIGINAL = {'torch': '2.1.0', 'mmengine': '0.10.7', 'mmcv': '2.1.0'}


def run(script: Path, first_on_path: Path, python: object = sys.executable) -> tuple[int, str, str]:
    environment = {**os.environ, 'PYTHONPATH': str(first_on_path)}
    done = subprocess.run([python, script], env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_broken_modules_are_named(tmp_path: Path) -> None:
    (tmp_path / 'mmcv.py').write_text("raise ImportError('_ext.so: undefined symbol: _ZN2at4_ops')")
    (tmp_path / 'mmseg.py').write_text('import os; os.abort()')
    (tmp_path / 'pycocotools.py').write_text('raise ImportError')
    code, output, _ = run(ROOT / 'tools' / 'doctor.py', tmp_path)
    assert code == 1
    rows = {line.split()[1]: line for line in output.splitlines() if len(line.split()) > 2}
    assert rows['torch'].startswith('ok')
    assert rows['mmcv'].startswith('FAIL') and 'undefined symbol' in rows['mmcv']
    assert rows['mmseg'].startswith('FAIL') and 'ends the interpreter' in rows['mmseg']
    assert rows['tools'].startswith('FAIL')
    assert 'MMCV_WITH_OPS=1' in output or '--repair' in output


def test_nothing_installed(tmp_path: Path) -> None:
    venv.create(tmp_path / 'empty', with_pip=False)
    code, output, _ = run(ROOT / 'tools' / 'doctor.py', tmp_path, tmp_path / 'empty/bin/python')
    assert code == 1
    assert output.count('FAIL') >= 4 and output.count('note') >= 2
    assert 'make install' in output


@pytest.mark.parametrize(
    ('broken', 'versions', 'own', 'words'),
    [
        ('mmcv', MAINTAINED, False, ['MMCV_WITH_OPS=1', 'onedl-mmcv==2.3.6']),
        ('mmcv', ORIGINAL, False, ['MMCV_WITH_OPS=1', ' mmcv==2.1.0']),
        ('mmcv', MAINTAINED, True, ['install.py --repair']),
        ('mmdet', ORIGINAL, False, [' mmdet==3.3.0']),
        ('mmdet', MAINTAINED, False, ['requirements/runtime.txt']),
        ('backbones', MAINTAINED, False, ['install --no-deps -e']),
        ('tools', ORIGINAL, False, ['install -e', '[tools]']),
        ('two lines', {**MAINTAINED, **ORIGINAL}, False, ['uninstall', 'onedl-mmcv mmcv']),
        ('torch', {}, False, ['make install']),
        ('torch', ORIGINAL, False, ['pytorch.org']),
        ('pip check', ORIGINAL, False, ['pip check']),
        ('pip check', MAINTAINED, False, ['pip check']),
    ],
)
def test_command_that_helps(broken: str, versions: dict, own: bool, words: list[str]) -> None:
    command = command_that_helps(broken, versions, own)
    for word in words:
        assert word in command
    # It lists the maintained line, which overwrites the original one.
    assert versions is not ORIGINAL or 'runtime.txt' not in command


@pytest.mark.parametrize(
    'failure',
    [
        "ImportError('x/_ext.so: undefined symbol: _ZN2at4_ops')",
        "AssertionError('MMCV==2.2.0 is used but\\nincompatible: undefined symbol')",
        "OSError('libtorch.so: undefined symbol')",
    ],
)
def test_failed_import_ends_a_tool_with_one_line(tmp_path: Path, failure: str) -> None:
    (tmp_path / 'torch.py').write_text(f'raise {failure}')
    code, output, errors = run(ROOT / 'tools' / 'train.py', tmp_path)
    assert (code, output) == (1, '')
    assert len(errors.strip().splitlines()) == 1
    assert 'undefined symbol' in errors and 'doctor.py' in errors
