"""tools/doctor.py: through the command line, in this environment and in ones broken on purpose."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from _mend import Mender
from doctor import (
    check_devices,
    check_environment,
    check_lines,
    check_loading,
    check_opencv,
    check_operators,
    check_python,
)

DOCTOR = Path(__file__).resolve().parents[2] / 'tools' / 'doctor.py'
MAINTAINED = {
    'onedl-mmengine': '0.10.12',
    'onedl-mmcv': '2.3.6',
    'onedl-mmdetection': '3.5.1',
    'onedl-mmsegmentation': '1.4.2',
}
ORIGINAL = {'mmengine': '0.10.7', 'mmcv': '2.1.0', 'mmdet': '3.3.0', 'mmsegmentation': '1.2.2'}


def run_doctor(
    *options: str, python: str = sys.executable, first_on_path: Path | None = None
) -> subprocess.CompletedProcess:
    environment = dict(os.environ)
    if first_on_path:
        environment['PYTHONPATH'] = str(first_on_path)
    command = [python, str(DOCTOR), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def findings_of(done: subprocess.CompletedProcess) -> dict[str, dict]:
    return {finding['part']: finding for finding in json.loads(done.stdout)['findings']}


def fake_module(folder: Path, name: str, code: str) -> None:
    (folder / name).mkdir()
    (folder / name / '__init__.py').write_text(code)


def test_healthy_environment() -> None:
    done = run_doctor()
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert any(line.startswith('OK    mmcv operators') for line in lines)
    assert lines[-1] == 'Everything fits.'


def test_mmcv_of_another_torch(tmp_path: Path) -> None:
    fake_module(
        tmp_path, 'mmcv', "raise ImportError('mmcv/_ext.so: undefined symbol: _ZN2at4_ops')"
    )
    done = run_doctor('--json', first_on_path=tmp_path)
    assert done.returncode == 1
    broken = findings_of(done)['mmcv operators']
    assert broken['status'] == 'FAIL'
    assert 'undefined symbol' in broken['detail']
    assert 'MMCV_WITH_OPS=1' in broken['mend'] or '--repair' in broken['mend']


def test_module_that_ends_the_interpreter(tmp_path: Path) -> None:
    fake_module(tmp_path, 'mmseg', 'import os; os.abort()')
    found = findings_of(run_doctor('--json', first_on_path=tmp_path))
    assert 'ends the interpreter' in found['mmseg']['detail']
    assert found['mmseg']['mend']
    assert found['backbones']['status'] != 'FAIL'


def test_nothing_installed(tmp_path: Path) -> None:
    venv.create(tmp_path / 'empty', with_pip=False)
    done = run_doctor('--json', python=str(tmp_path / 'empty' / 'bin' / 'python'))
    assert done.returncode == 1
    found = findings_of(done)
    for part in ('torch', 'mmengine', 'mmcv', 'mmcv operators', 'mmdet', 'mmseg'):
        assert found[part]['status'] == 'FAIL'
        assert found[part]['mend']
    # The tools add the checkout to the path by themselves.
    assert found['backbones']['status'] == 'WARN'
    assert found['CPU']['status'] == 'OK'


def test_python_too_old() -> None:
    assert check_python((3, 9, 1)).status == 'FAIL'
    assert check_python((3, 10, 0)).status == 'OK'


def test_another_environment_than_the_project_s() -> None:
    assert check_environment(own=True) == []
    for finding in check_environment(own=False):
        assert finding.status == 'WARN'
        assert '.venv/bin/python' in finding.mend


class TestTwoLines:
    def test_one_line_is_fine(self) -> None:
        assert check_lines(Mender(MAINTAINED, own=False)) == []
        assert check_lines(Mender(ORIGINAL, own=False)) == []

    def test_both_at_once(self) -> None:
        (finding,) = check_lines(Mender({**MAINTAINED, **ORIGINAL}, own=False, python='python'))
        assert finding.status == 'FAIL'
        assert 'onedl-mmcv and mmcv' in finding.detail
        assert finding.mend.startswith(
            'python -m pip uninstall --yes onedl-mmengine mmengine onedl-mmcv mmcv'
        )
        assert 'onedl-mmdetection' in finding.mend.partition('&&')[2]

    def test_project_s_own_environment_is_repaired_by_the_installer(self) -> None:
        (finding,) = check_lines(Mender({**MAINTAINED, 'mmcv': '2.1.0'}, own=True))
        assert finding.mend.endswith('tools/install.py --repair')


class TestMend:
    def test_version_window(self) -> None:
        error = 'MMCV==2.2.0 is used but incompatible. Please install mmcv>=2.0.0rc4, <2.2.0.'
        mend = Mender(ORIGINAL, own=False, python='python').for_error('mmdet', error)
        assert mend == "python -m pip install --no-build-isolation 'mmcv>=2.0.0rc4,<2.2.0'"

    @pytest.mark.parametrize(
        'error',
        [
            '/x/mmcv/_ext.cpython-311.so: undefined symbol: _ZN3c10',
            'libtorch_cuda.so: cannot open shared object file',
            "No module named 'mmcv._ext'",
        ],
    )
    @pytest.mark.parametrize(
        ('versions', 'wanted'), [(MAINTAINED, 'onedl-mmcv==2.3.6'), (ORIGINAL, 'mmcv==2.1.0')]
    )
    def test_mmcv_is_built_again(self, error: str, versions: dict, wanted: str) -> None:
        mend = Mender(versions, own=False).for_error('mmcv', error)
        assert 'MMCV_WITH_OPS=1' in mend
        assert '--no-cache-dir' in mend
        assert mend.endswith(f' {wanted}')

    def test_missing_part_of_the_line_in_use(self) -> None:
        mender = Mender({'mmengine': '0.10.7', 'mmcv': '2.1.0'}, own=False)
        assert mender.for_error('mmdet', "No module named 'mmdet'").endswith(' mmdet==3.3.0')

    def test_graphics_libraries(self) -> None:
        mender = Mender({'opencv-python': '4.12.0.88'}, own=False)
        error = 'libGL.so.1: cannot open shared object file: No such file or directory'
        assert mender.for_error('cv2', error).endswith('opencv-python-headless==4.12.0.88')


def test_original_mmengine_with_a_new_torch() -> None:
    (finding,) = check_loading(Mender({**ORIGINAL, 'torch': '2.6.0+cu124'}, own=False))
    assert finding.status == 'FAIL'
    assert "'torch<2.6'" in finding.mend
    assert check_loading(Mender({**ORIGINAL, 'torch': '2.1.0'}, own=False)) == []
    assert check_loading(Mender({**MAINTAINED, 'torch': '2.13.0'}, own=False)) == []


def test_two_builds_of_opencv() -> None:
    same = {'opencv-python': '4.12.0.88', 'opencv-python-headless': '4.12.0.88'}
    assert check_opencv(Mender(same, own=False)) == []
    other = {**same, 'opencv-python-headless': '5.0.0.1'}
    (finding,) = check_opencv(Mender(other, own=False))
    assert finding.status == 'WARN'
    assert 'opencv-python-headless==4.12.0.88' in finding.mend


def test_operators_that_lack_cuda() -> None:
    failures = {'cuda': 'nms_impl: implementation for device cuda:0 not found.'}
    answer = {'error': None, 'devices': ['cpu', 'cuda'], 'failures': failures}
    finding = check_operators(answer, Mender(MAINTAINED, own=False))
    assert finding.status == 'FAIL'
    assert 'device cuda:0 not found' in finding.detail
    assert 'MMCV_WITH_OPS=1' in finding.mend


def test_gpu_that_torch_does_not_see() -> None:
    torch = {'error': None, 'cuda': None, 'gpus': [], 'mps': False, 'threads': 2}
    findings = check_devices(torch, nvidia_driver=True)
    assert [finding.status for finding in findings] == ['OK', 'WARN']
    assert 'TORCH=' in findings[1].mend


def test_gpus_are_listed() -> None:
    gpu = {'name': 'Some GPU', 'memory': 8 * 2**30}
    torch = {'error': None, 'cuda': '12.6', 'gpus': [gpu], 'mps': False, 'threads': 2}
    assert check_devices(torch, nvidia_driver=True)[1].detail == 'Some GPU, 8 GiB of memory'
