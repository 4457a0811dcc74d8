"""tools/install.py: decisions with a pip that only pretends, errors through the command line."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from _install import checks, mmcv, steps
from _install import run as running
from _install.environment import Environment
from _install.errors import InstallError
from _install.requirements import (
    choose_torch,
    constraints_for_torch,
    lowest_versions,
    read_pins,
    replace_pins,
)
from install import wrong_python

ROOT = Path(__file__).resolve().parents[2]
PINS = read_pins((ROOT / 'requirements' / 'constraints.txt').read_text())
DEFAULT_TORCH = f'torch=={PINS["torch"]}'

# What the last run recorded about torch: the pinned one, one pinned before, one asked for.
OURS = {'requirement': DEFAULT_TORCH, 'default': True, 'version': '2.13.0+cpu'}
OLDER = {'requirement': 'torch==2.12.0', 'default': True, 'version': '2.12.0'}
THEIRS = {'requirement': 'torch==2.6.0 -i X', 'default': False, 'version': '2.6.0+cu124'}

# Goes on until it has been seen at work.
COMPILER = """
import pathlib, sys, time
print('  [3/7] c++ a.cpp', flush=True)
while not pathlib.Path(sys.argv[1]).exists():
    time.sleep(0.01)
"""

EVERYTHING = [
    'Making .venv',
    '[1/5] torch',
    '[2/5] build tools',
    '[3/5] mmcv with its operators: what it imports',
    '[3/5] mmcv with its operators: source',
    '[3/5] mmcv with its operators: compiling',
    '[4/5] OpenMMLab and the rest',
    '[5/5] this project',
]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the installer reads."""
    folder = tmp_path / 'checkout'
    shutil.copytree(ROOT / 'requirements', folder / 'requirements')
    ignore = shutil.ignore_patterns('__pycache__')
    shutil.copytree(ROOT / 'tools' / '_install', folder / 'tools' / '_install', ignore=ignore)
    shutil.copy(ROOT / 'tools' / 'install.py', folder / 'tools')
    limits = folder / 'tools' / '_install' / 'checks.py'
    # Nothing is installed here, so a disk that is almost full will do.
    limits.write_text(limits.read_text().replace('\nGIGABYTES = 6\n', '\nGIGABYTES = 0\n'))
    shutil.copy(ROOT / 'pyproject.toml', folder)
    return folder


@pytest.fixture
def wheelhouse(tmp_path: Path) -> Path:
    """A folder with a file that is named like an mmcv wheel for this Python and machine."""
    folder = tmp_path / 'wheels'
    folder.mkdir()
    tag = f'cp{sys.version_info.major}{sys.version_info.minor}'
    platform = mmcv.sysconfig.get_platform().replace('-', '_').replace('.', '_')
    (folder / f'onedl_mmcv-{PINS["onedl-mmcv"]}-{tag}-{tag}-{platform}.whl').touch()
    return folder


def run_installer(checkout: Path, **variables: str) -> subprocess.CompletedProcess:
    dropped = ('PIP_', 'WHEELHOUSE', 'TORCH', 'CXX')
    environment = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    return subprocess.run(
        [sys.executable, str(checkout / 'tools' / 'install.py')],
        env={**environment, **variables},
        capture_output=True,
        text=True,
    )


def assert_one_line(done: subprocess.CompletedProcess, *parts: str) -> None:
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for part in parts:
        assert part in done.stderr


class TestPython:
    @pytest.mark.parametrize('version', [(3, 6, 15), (3, 9, 18)])
    def test_too_old(self, version: tuple[int, ...]) -> None:
        assert 'Python 3.10 or later is needed' in wrong_python(version)
        assert 'PYTHON=' in wrong_python(version)

    @pytest.mark.parametrize('version', [(3, 10, 0), (3, 13, 1), (4, 0, 0)])
    def test_new_enough(self, version: tuple[int, ...]) -> None:
        assert wrong_python(version) == ''


class TestCommandLine:
    def test_no_network_then_the_same_environment_again(
        self, checkout: Path, wheelhouse: Path
    ) -> None:
        venv = checkout / '.venv'
        (venv / 'bin').mkdir(parents=True)
        (venv / 'bin' / 'python').write_text('left by an interruption')

        variables = {
            'PIP_NO_INDEX': '1',
            'PIP_CONFIG_FILE': os.devnull,
            'WHEELHOUSE': str(wheelhouse),
        }
        assert_one_line(run_installer(checkout, **variables), 'network', str(venv / 'install.log'))
        marker = venv / 'marker'
        marker.touch()
        again = run_installer(checkout, **variables)
        assert_one_line(again, 'network')
        assert marker.exists()
        assert 'Making .venv' not in again.stdout

    def test_no_compiler(self, checkout: Path) -> None:
        done = run_installer(checkout, PATH='')
        assert_one_line(done, 'C++ compiler', 'install it with', 'WHEELHOUSE')
        assert not (checkout / '.venv').exists()

    def test_wheelhouse_that_is_not_there(self, checkout: Path) -> None:
        done = run_installer(checkout, WHEELHOUSE='/nowhere')
        assert_one_line(done, 'WHEELHOUSE=/nowhere is not a folder')


def test_no_space(tmp_path: Path) -> None:
    with pytest.raises(InstallError, match=r'6 GB of disk space.*1\.0 GB are free'):
        checks.require_space(tmp_path, 6, free_bytes=10**9)
    checks.require_space(tmp_path, 6, free_bytes=7 * 10**9)


class TestRun:
    @pytest.mark.parametrize(
        ('output', 'words'),
        [
            ('OSError: [Errno 28] No space left on device', 'no disk space left'),
            ('Failed to establish a new connection: [Errno -3] name resolution', 'network'),
            ('ERROR: No matching distribution found for torch==9', 'no torch==9 for this Python'),
            ('(from versions: none)\nNo matching distribution found for torch', 'network'),
            ('OSError: CUDA_HOME environment variable is not set.', 'CUDA_HOME'),
            (
                'The detected CUDA version (11.8) mismatches the version that was used to compile '
                'PyTorch (12.6).',
                'built for CUDA 12.6, the CUDA compiler is 11.8',
            ),
            ('c++: fatal error: Killed signal terminated program cc1plus', 'MAX_JOBS=1'),
            ('something else', 'its output says why'),
        ],
    )
    def test_cause_in_words(self, output: str, words: str) -> None:
        assert words in running.explain(output)

    def test_shows_that_it_lives(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        shown, seen = [], tmp_path / 'seen'

        def show(line: str, **_: object) -> None:
            shown.append(line)
            if '3 of 7' in line:
                seen.touch()

        monkeypatch.setattr(running, 'print', show, raising=False)
        monkeypatch.setattr(running, 'SECONDS_IN_LOG', 0.05)
        running.run([sys.executable, '-c', COMPILER, str(seen)], tmp_path / 'log', 'mmcv')
        assert re.fullmatch(r'mmcv  \d+:\d\d  3 of 7 files compiled', shown[-1])

    def test_failure_names_the_log(self, tmp_path: Path) -> None:
        log = tmp_path / 'log'
        with pytest.raises(InstallError, match=str(log)):
            running.run([sys.executable, '-c', 'raise SystemExit(1)'], log, 'title')


class TestTorch:
    @pytest.mark.parametrize(
        ('asked', 'installed', 'record', 'chosen'),
        [
            pytest.param('', None, None, DEFAULT_TORCH, id='nothing-there'),
            pytest.param('', '2.13.0+cpu', OURS, None, id='done'),
            pytest.param('', '2.12.0', OLDER, DEFAULT_TORCH, id='pin-moved'),
            pytest.param('', '2.9.0+cu126', None, None, id='found-one'),
            pytest.param('', '2.9.0+cu126', OURS, None, id='user-replaced-ours'),
            pytest.param('', '2.6.0+cu124', THEIRS, None, id='user-asked-before'),
            pytest.param('torch==2.6.0 -i X', '2.6.0+cu124', THEIRS, None, id='same-again'),
            pytest.param('torch==2.6.0 -i Y', '2.6.0+cu124', THEIRS, 'torch==2.6.0 -i Y', id='new'),
            pytest.param('torch==2.6.0 -i X', '2.13.0+cpu', OURS, 'torch==2.6.0 -i X', id='other'),
        ],
    )
    def test_choice(
        self, asked: str, installed: str | None, record: dict | None, chosen: str | None
    ) -> None:
        assert choose_torch(asked, DEFAULT_TORCH, installed, record) == chosen

    def test_lowest_versions_take_the_place_of_pins(self) -> None:
        lowest = lowest_versions('# a comment\nonedl-mmcv>=2.3.0,<=2.3.6\nhuggingface_hub>=0.23\n')
        assert lowest == {'onedl-mmcv': '2.3.0', 'huggingface-hub': '0.23'}
        pinned = 'onedl-mmcv==2.3.6\nhuggingface-hub==2.4.0\nnumpy==2.2.6\n'
        assert replace_pins(pinned, lowest).split() == [
            'numpy==2.2.6',
            'onedl-mmcv==2.3.0',
            'huggingface-hub==0.23',
        ]

    def test_limits_follow_another_torch(self) -> None:
        pinned = 'torch==2.13.0\nsympy==1.14.0\ntyping-extensions==4.16.0\nnumpy==2.2.6\n'
        assert constraints_for_torch(pinned, '2.13.0+cpu', ['sympy']) == pinned
        other = constraints_for_torch(pinned, '2.6.0', ['sympy==1.13.1', 'typing_extensions>=4'])
        assert other.split() == ['numpy==2.2.6', 'torch==2.6.0']


class FakePip:
    """Stands for `run`: remembers the commands and leaves the metadata that pip would leave."""

    def __init__(self, checkout: Path) -> None:
        self.checkout = checkout
        self.titles: list[str] = []
        self.stop_at = ''
        self.use('.venv', PINS)

    def use(self, folder: str, pins: dict[str, str]) -> None:
        self.site = self.checkout / folder / 'lib' / 'python3.11' / 'site-packages'
        self.pins = pins

    def __call__(self, command: list[str], log: Path, title: str, variables=None) -> None:
        if self.stop_at and self.stop_at in title:
            self.stop_at = ''
            raise KeyboardInterrupt
        self.titles.append(title)
        if 'venv' in command:
            (log.parent / 'bin').mkdir(parents=True)
            (log.parent / 'bin' / 'python').touch()
        elif 'download' in command:
            self.save_source(Path(command[command.index('--dest') + 1]))
        for argument in command:
            name, _, version = argument.partition('==')
            if version and 'download' not in command:
                self.put(name, version)
        if 'mmcv' in title and 'what it imports' not in title:
            self.put('onedl-mmcv', self.pins['onedl-mmcv'])
        if 'rest' in title:
            for name in steps.OPENMMLAB:
                self.put(name, self.pins[name])

    def put(self, name: str, version: str) -> None:
        stem = name.replace('-', '_')
        for old in self.site.glob(f'{stem}-*.dist-info'):
            shutil.rmtree(old)
        folder = self.site / f'{stem}-{version}.dist-info'
        folder.mkdir(parents=True)
        (folder / 'METADATA').write_text(
            f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n'
        )
        (folder / 'INSTALLER').write_text('pip')

    def save_source(self, folder: Path) -> None:
        source = folder / 'source' / 'onedl_mmcv'
        source.mkdir(parents=True)
        shutil.make_archive(str(folder / 'onedl_mmcv'), 'gztar', folder / 'source')
        shutil.rmtree(folder / 'source')

    def take_titles(self) -> list[str]:
        titles, self.titles = self.titles, []
        return titles


@pytest.fixture
def pip(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    fake = FakePip(checkout)
    monkeypatch.setattr(steps, 'run', fake)
    monkeypatch.setattr(Environment, 'works', lambda self: self.python.exists())
    monkeypatch.setattr(Environment, 'try_code', lambda self, code: None)
    monkeypatch.setattr(checks, 'require_compiler', lambda: None)
    monkeypatch.setattr(checks, 'require_space', lambda *_: None)
    return fake


@pytest.fixture
def install(checkout: Path, pip: FakePip) -> Callable[..., list[str]]:
    """Runs the installer and returns the titles of the commands it ran."""

    def run(wheelhouse: Path | None = None, **options) -> list[str]:
        steps.install(checkout, wheelhouse, **options)
        return pip.take_titles()

    return run


class TestSteps:
    def test_order_and_nothing_twice(self, install: Callable, capsys) -> None:
        assert install() == EVERYTHING
        assert 'a quarter of an hour' in capsys.readouterr().out
        assert install() == []
        assert 'up to date' in capsys.readouterr().out

    @pytest.mark.parametrize('stopped', range(1, 8))
    def test_goes_on_where_it_was_interrupted(
        self, install: Callable, pip: FakePip, stopped: int
    ) -> None:
        pip.stop_at = EVERYTHING[stopped]
        with pytest.raises(KeyboardInterrupt):
            install()
        before = pip.take_titles()
        assert before == EVERYTHING[:stopped]
        again = install()
        assert again[-1] == EVERYTHING[-1]
        assert not {'Making .venv', '[1/5] torch'} & set(again) & set(before)
        assert install() == []

    def test_mmcv_from_a_ready_wheel(self, install: Callable, wheelhouse: Path) -> None:
        titles = install(wheelhouse)
        assert any(title.endswith('.whl') for title in titles)
        assert not any(title.endswith('compiling') for title in titles)

    def test_wheel_of_another_torch_is_replaced_by_a_build(
        self, install: Callable, wheelhouse: Path, monkeypatch: pytest.MonkeyPatch, capsys
    ) -> None:
        reasons = iter(['undefined symbol: _ZN3c10', None])
        monkeypatch.setattr(mmcv, 'why_broken', lambda environment: next(reasons))
        titles = install(wheelhouse)
        assert titles[4].endswith('.whl')
        assert titles[6].endswith('compiling')
        assert 'does not fit torch' in capsys.readouterr().out

    def test_mmcv_is_rebuilt_when_torch_changed(
        self, install: Callable, pip: FakePip, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        install()
        pip.put('torch', '2.9.0+cu126')
        reasons = iter(['undefined symbol: _ZN3c10', None])
        monkeypatch.setattr(mmcv, 'why_broken', lambda environment: next(reasons))
        titles = install()
        assert '[3/5] mmcv with its operators: compiling' in titles
        assert '[1/5] torch' not in titles
        assert install() == []

    def test_another_torch_on_request(self, install: Callable, checkout: Path) -> None:
        install()
        titles = install(torch='torch==2.6.0 --index-url URL')
        assert '[1/5] torch: replacing' in titles
        assert 'torch==2.6.0' in (checkout / '.venv' / 'constraints.txt').read_text()
        assert install() == []

    def test_the_oldest_set_has_a_folder_of_its_own(
        self, install: Callable, checkout: Path, pip: FakePip
    ) -> None:
        files = ('runtime.txt', 'export.txt', 'tests.txt')
        texts = [(ROOT / 'requirements' / name).read_text() for name in files]
        lowest = lowest_versions(''.join(texts))
        assert {'torch', 'onnx', 'pytest'} <= set(lowest)
        pip.use('.venv-oldest', lowest)
        titles = install(oldest=True)
        assert titles == ['Making .venv-oldest', *EVERYTHING[1:]]
        limits = (checkout / '.venv-oldest' / 'constraints.txt').read_text().splitlines()
        assert {f'{name}=={version}' for name, version in lowest.items()} <= set(limits)
        assert not (checkout / '.venv').exists()
        assert install(oldest=True) == []

    def test_repair_looks_at_everything_and_keeps_the_torch_asked_for(
        self, install: Callable
    ) -> None:
        asked = 'torch==2.6.0 --index-url URL'
        install(torch=asked)
        titles = install(repair=True)
        assert not any('torch' in title for title in titles)
        assert titles[-1] == EVERYTHING[-1]
        assert install(torch=asked) == []

    def test_only_what_changed_is_done(self, install: Callable, checkout: Path) -> None:
        install()
        with (checkout / 'requirements' / 'tests.txt').open('a') as file:
            file.write('coverage\n')
        assert install() == ['[4/5] OpenMMLab and the rest']
        with (checkout / 'pyproject.toml').open('a') as file:
            file.write('# changed\n')
        assert install() == ['[5/5] this project']

    def test_package_removed_by_hand_comes_back(self, install: Callable, pip: FakePip) -> None:
        install()
        shutil.rmtree(next(pip.site.glob('onedl_mmsegmentation-*')))
        assert install() == ['[4/5] OpenMMLab and the rest']

    def test_half_installed_package_is_dropped(self, install: Callable, pip: FakePip) -> None:
        install()
        metadata = next(pip.site.glob('onedl_mmcv-*'))
        (metadata / 'INSTALLER').unlink()
        install(repair=True)
        assert (next(pip.site.glob('onedl_mmcv-*')) / 'INSTALLER').exists()
