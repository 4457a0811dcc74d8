"""tools/install.py: what it decides, with a pip that only pretends; errors on the command line."""

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import install
import pytest
from install import Installation, InstallError, choose_torch

ROOT = Path(__file__).resolve().parents[2]
MAKE, TORCH, NEEDS = 'Making .venv', '[1/4] torch', '[2/4] what mmcv needs'
SOURCE, COMPILE, REST = '[3/4] mmcv: source', '[3/4] mmcv: compiling', '[4/4] everything else'
WHEEL = f'[3/4] mmcv: onedl_mmcv-2.3.6-cp3{sys.version_info.minor}-none-{os.uname().machine}.whl'


class FakePip:
    """Stands for `run`: remembers the commands and leaves the metadata that pip would leave."""

    def __init__(self) -> None:
        self.titles: list[str] = []
        self.stop_at = ''
        # What importing mmcv's operators answers, call by call; then they work.
        self.broken: list[str | None] = []

    def try_code(self, installation: Installation, code: str) -> str | None:
        if not installation.python.exists():
            return 'there is no Python'
        return self.broken.pop(0) if code == install.TRY_MMCV and self.broken else None

    def __call__(self, command: list[str], log: Path, title: str, **variables: str) -> None:
        if title == self.stop_at:
            self.stop_at = ''
            raise KeyboardInterrupt
        self.titles.append(title)
        self.site = log.parent / 'lib' / f'python3.{sys.version_info.minor}' / 'site-packages'
        if 'venv' in command:
            (log.parent / 'bin').mkdir()
            (log.parent / 'bin' / 'python').touch()
            self.site.mkdir(parents=True)
        options = dict(
            part.split('=', 1) for part in command if part.startswith('--') and '=' in part
        )
        if 'download' in command:
            source = Path(options['--dest'])
            source.mkdir(parents=True)
            (source / 'setup.py').write_text("cxx=['-std=c++17']")
            with tarfile.open(source / 'onedl_mmcv-2.3.6.tar.gz', 'w:gz') as archive:
                archive.add(source / 'setup.py', 'onedl_mmcv-2.3.6/setup.py')
        elif 'wheel' in command:
            assert variables['CFLAGS'].endswith('-g0') and variables['MMCV_WITH_OPS'] == '1'
            self.setup = Path(command[-1], 'setup.py').read_text()
            folder = Path(options['--wheel-dir'])
            folder.mkdir(parents=True, exist_ok=True)
            (folder / WHEEL.split()[-1]).touch()
        for part in command if 'install' in command else ():
            if part.startswith('torch=='):
                self.put('torch', part.partition('==')[2])
        if title.endswith('.whl'):
            self.put('onedl-mmcv', '2.3.6')
        if title == REST:
            for name in ('onedl-mmengine', 'onedl-mmdetection', 'onedl-mmsegmentation'):
                self.put(name, '1')

    def put(self, name: str, version: str) -> None:
        stem = name.replace('-', '_')
        for old in self.site.glob(f'{stem}-*'):
            shutil.rmtree(old)
        folder = self.site / f'{stem}-{version}.dist-info'
        folder.mkdir()
        (folder / 'METADATA').write_text(
            f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n'
        )
        (folder / 'INSTALLER').touch()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what the installer reads."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    folder = tmp_path / 'checkout'
    shutil.copytree(ROOT / 'requirements', folder / 'requirements')
    (folder / 'tools').mkdir()
    shutil.copy(ROOT / 'tools' / 'install.py', folder / 'tools')
    shutil.copy(ROOT / 'pyproject.toml', folder)
    return folder


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> FakePip:
    fake = FakePip()
    monkeypatch.setattr(install, 'run', fake)
    monkeypatch.setattr(Installation, 'try_code', lambda self, code: fake.try_code(self, code))
    monkeypatch.setattr(install, 'require_compiler', lambda: None)
    return fake


@pytest.fixture
def run(checkout: Path, pip: FakePip) -> Callable[..., list[str]]:
    """Runs the installer; returns the titles of its commands."""

    def run(*arguments: object, root: Path = checkout, **options: object) -> list[str]:
        pip.titles = []
        Installation(root, *arguments, **options).run()
        return pip.titles

    return run


def test_order_and_nothing_twice(run: Callable) -> None:
    assert run() == [MAKE, TORCH, NEEDS, SOURCE, COMPILE, WHEEL, REST]
    assert run() == []
    assert run(repair=True) == [NEEDS, REST]


@pytest.mark.parametrize('stopped', [TORCH, NEEDS, SOURCE, COMPILE, WHEEL, REST])
def test_goes_on_where_it_was_interrupted(run: Callable, pip: FakePip, stopped: str) -> None:
    pip.stop_at = stopped
    with pytest.raises(KeyboardInterrupt):
        run()
    before, again = pip.titles, run()
    assert again[-1] == REST
    # The built wheel is taken from the cache; objects of a build that was stopped are kept.
    assert not {MAKE, TORCH, SOURCE, COMPILE} & set(before) & set(again)
    assert run() == []


def test_second_clone_takes_the_wheel_that_the_first_built(run: Callable, checkout: Path) -> None:
    run()
    second = checkout.with_name('second')
    shutil.copytree(checkout, second, ignore=shutil.ignore_patterns('.venv'))
    assert run(root=second) == [MAKE, TORCH, NEEDS, WHEEL, REST]


@pytest.mark.parametrize('works', [True, False])
def test_wheelhouse(run: Callable, pip: FakePip, tmp_path: Path, works: bool) -> None:
    (tmp_path / 'wheels').mkdir()
    (tmp_path / 'wheels' / WHEEL.split()[-1]).touch()
    pip.broken = [None if works else 'undefined symbol: _ZN3c10']
    titles = run(tmp_path / 'wheels')
    assert titles[3] == WHEEL
    assert (COMPILE in titles) != works


def test_mmcv_follows_torch(run: Callable, pip: FakePip, checkout: Path) -> None:
    run()
    pip.put('torch', '2.9.0+cu126')  # by hand
    pip.broken = ['undefined symbol: _ZN3c10']
    assert run() == [NEEDS, SOURCE, COMPILE, WHEEL, REST]
    # Interrupted after torch was replaced, the run is not taken for a complete one.
    pip.stop_at = NEEDS
    with pytest.raises(KeyboardInterrupt):
        run(torch='torch==2.6.0 --index-url URL')
    assert pip.titles == ['[1/4] torch: replacing', TORCH]
    pip.broken = ['undefined symbol: _ZN3c10']
    assert COMPILE in run()
    limits = (checkout / '.venv' / 'constraints.txt').read_text().splitlines()
    assert 'torch==2.6.0' in limits and 'torch==2.13.0' not in limits


def test_a_torch_that_the_user_installed_stays_when_the_pin_moves(
    run: Callable, pip: FakePip, checkout: Path
) -> None:
    run()
    pip.put('torch', '2.9.0+cu126')  # by hand
    run()
    file = checkout / 'requirements' / 'constraints.txt'
    file.write_text(file.read_text().replace('torch==2.13.0', 'torch==2.13.1'))
    assert not [title for title in run() if TORCH in title]


@pytest.mark.parametrize(
    ('torch', 'standard'), [('2.13.1', 17), ('2.14.0', 20), ('2.9.0', 17), ('2.20.0+cu130', 20)]
)
def test_mmcv_is_compiled_with_the_standard_of_torch(
    run: Callable, pip: FakePip, torch: str, standard: int
) -> None:
    run(torch=f'torch=={torch}')
    assert f'-std=c++{standard}' in pip.setup


def test_what_changed_or_was_removed_is_installed(
    run: Callable, pip: FakePip, checkout: Path
) -> None:
    run()
    with (checkout / 'requirements' / 'tests.txt').open('a') as file:
        file.write('coverage\n')
    assert run() == [NEEDS, REST]
    shutil.rmtree(next(pip.site.glob('onedl_mmdetection-*')))
    (next(pip.site.glob('onedl_mmcv-*')) / 'INSTALLER').unlink()
    assert run() == [NEEDS, WHEEL, REST]


def test_oldest(run: Callable, checkout: Path) -> None:
    assert run(oldest=True)[0] == 'Making .venv-oldest'
    limits = (checkout / '.venv-oldest' / 'constraints.txt').read_text().splitlines()
    assert {'torch==2.6.0', 'onedl-mmengine==0.10.8', 'onnx==1.17', 'ruff==0.6'} <= set(limits)
    assert 'torch==2.13.0' not in limits and 'onedl-mmengine==0.10.12' not in limits
    assert not (checkout / '.venv').exists()


OURS = {'torch': 'torch==2.13.0', 'torch_pin': 'torch==2.13.0', 'versions': {'torch': '2.13.0'}}
OLDER = {'torch': 'torch==2.12.0', 'torch_pin': 'torch==2.12.0', 'versions': {'torch': '2.12.0'}}
THEIRS = {'torch': 'torch==2.6.0 -i X', 'torch_pin': '', 'versions': {'torch': '2.6.0+cu124'}}
KEPT = {'torch': '', 'torch_pin': 'torch==2.13.0', 'versions': {'torch': '2.9.0'}}


@pytest.mark.parametrize(
    ('asked', 'version', 'state', 'chosen'),
    [
        pytest.param('', None, {}, 'torch==2.13.0', id='nothing-there'),
        pytest.param('', '2.13.0', OURS, None, id='done'),
        pytest.param('', '2.12.0', OLDER, 'torch==2.13.0', id='pin-moved'),
        pytest.param('', '2.9.0+cu126', {}, None, id='found-one'),
        pytest.param('', '2.9.0', KEPT, None, id='found-one-before'),
        pytest.param('', '2.9.0+cu126', OURS, None, id='user-replaced-ours'),
        pytest.param('', '2.6.0+cu124', THEIRS, None, id='asked-before'),
        pytest.param('', None, THEIRS, 'torch==2.6.0 -i X', id='asked-before-venv-gone'),
        pytest.param('torch==2.6.0 -i X', '2.6.0+cu124', THEIRS, None, id='same-again'),
        pytest.param('torch==2.6.0 -i Y', '2.6.0+cu124', THEIRS, 'torch==2.6.0 -i Y', id='new'),
        pytest.param('torch==2.6.0 -i X', '2.13.0', OURS, 'torch==2.6.0 -i X', id='other'),
    ],
)
def test_choice_of_torch(asked: str, version: str | None, state: dict, chosen: str | None) -> None:
    assert choose_torch(asked, 'torch==2.13.0', version, state) == chosen


@pytest.mark.parametrize(
    ('output', 'word'),
    [
        ('c++: fatal error: Killed signal terminated program cc1plus', 'MAX_JOBS=1'),
        ('Failed to establish a new connection: [Errno -3]', 'network'),
        ('ERROR: No matching distribution found for torch==9', 'torch==9'),
        ('a.h:9:2: error: #error C++20 is needed' + '\nnote: none of pip' * 9, 'CXX'),
        ('W1 No CUDA runtime is found, using CUDA_HOME=/usr\nmmcv: error: none', 'see the log'),
    ],
)
def test_failure_shows_the_output_the_log_and_what_helps(
    tmp_path: Path, output: str, word: str
) -> None:
    command = [sys.executable, '-c', f'print({output!r}); raise SystemExit(1)']
    with pytest.raises(InstallError) as failure:
        install.run(command, tmp_path / 'log', 'title')
    for part in (output.splitlines()[0], word, str(tmp_path / 'log')):
        assert part in str(failure.value)
    assert output in (tmp_path / 'log').read_text()


def test_progress(capsys) -> None:
    install.show_progress('mmcv', 65.2, '[1/7] c++\n  [3/7] c++ a.cpp\nnote: [9/9]', terminal=False)
    assert capsys.readouterr().out == 'mmcv  1:05  3 of 7 files compiled\n'


NO_NETWORK = {
    'PIP_INDEX_URL': 'http://127.0.0.1:9/simple',
    'PIP_RETRIES': '1',
    'PIP_CONFIG_FILE': os.devnull,
}


@pytest.mark.parametrize(
    ('variables', 'words'),
    [
        ({'PATH': ''}, ['C++ compiler', 'WHEELHOUSE']),
        ({'WHEELHOUSE': '/nowhere'}, ['WHEELHOUSE=/nowhere']),
        (NO_NETWORK, ['network', 'install.log']),
    ],
)
def test_errors_on_the_command_line(checkout: Path, variables: dict, words: list[str]) -> None:
    if variables == NO_NETWORK:
        (checkout / '.venv' / 'bin').mkdir(parents=True)
        (checkout / '.venv' / 'bin' / 'python').write_text('left by an interruption')
    dropped = ('PIP_', 'WHEELHOUSE', 'TORCH', 'CXX')
    environment = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    done = subprocess.run(
        [sys.executable, checkout / 'tools' / 'install.py'],
        env={**environment, **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert 'Traceback' not in done.stderr
    for word in words:
        assert word in done.stderr
