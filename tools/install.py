"""Make .venv and install everything into it; steps that are done are skipped.

It needs only the standard library. The steps: the virtual environment; torch; what building mmcv
needs; mmcv with its operators (from a wheel that works with this torch, else compiled once, which
takes minutes); everything else in requirements/ and this project.
"""

import argparse
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# The code above and here has to run on older versions of Python, or the message is lost.
if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit(
        'Python 3.10 or later is needed, this is {}.{}; choose another one, for example: '
        'make install PYTHON=python3.12'.format(*sys.version_info)
    )

MMCV = 'onedl-mmcv'
OPENMMLAB = (MMCV, 'onedl-mmengine', 'onedl-mmdetection', 'onedl-mmsegmentation')
# Fails if the operators were built for another torch, or without CUDA for a torch with CUDA.
TRY_MMCV = """
import torch
from mmcv.ops import nms
devices = ['cpu', 'cuda'] if torch.cuda.is_available() else ['cpu']
for device in devices:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30]], device=device)
    kept = nms(boxes, torch.tensor([0.9, 0.8, 0.7], device=device), 0.5)[1].tolist()
    assert kept == [0, 2], f'nms on {device} returns {kept} instead of [0, 2]'
print('nms runs on', ' and '.join(devices))
"""
# Patterns in the output of a failed command, and what helps.
HINTS = {
    'Killed signal|out of memory|virtual memory': 'memory ran out: try again with MAX_JOBS=1',
    'No space left|Disk quota': 'free some disk space (or set TMPDIR), then try again',
    'connection|name resolution|unreachable|Timeout|ProxyError|versions: none': (
        'check the network, the proxy and `pip config list`, then try again'
    ),
    'CUDA_HOME environment|CUDA version': (
        'install the compiler of the same CUDA as torch, and set CUDA_HOME'
    ),
    r'#error C\+\+20|option .-std=c\+\+20': (
        'this torch needs a C++20 compiler: set CXX to GCC 11 or Clang 13, for example'
    ),
}


class InstallError(Exception):
    """Says what stopped the installation and what to do about it."""


def normalized_name(requirement: str) -> str:
    """Return the distribution's name in a requirement, normalized as registries do."""
    match = re.match(r'[A-Za-z0-9][\w.-]*', requirement.strip())
    return re.sub(r'[-_.]+', '-', match.group()).lower() if match else ''


def replace_pins(constraints: str, versions: dict[str, str | None]) -> str:
    """Replace versions in a list of pins; None drops a pin."""
    lines = [line for line in constraints.splitlines() if normalized_name(line) not in versions]
    pins = [f'{name}=={version}' for name, version in versions.items() if version]
    return '\n'.join([*lines, *pins]) + '\n'


def choose_torch(asked: str, pinned: str, version: str | None, state: dict) -> str | None:
    """Return the requirement of the torch to install; None keeps the installed one.

    ``asked`` is the user's TORCH, ``version`` the installed one; ``state`` has ``torch``,
    ``torch_pin`` (the pin at that time) and ``versions`` of the last run.
    """
    # Our own choice follows the pin; a choice of the user, by TORCH or pip, stays.
    followed = state.get('torch') == state.get('torch_pin')
    wanted = asked or (pinned if followed else state['torch'])
    if version is None:
        return wanted or pinned
    if state.get('versions', {}).get('torch') != version:
        return asked or None
    return wanted if wanted != state['torch'] else None


def run(command: list[str], log: Path, title: str, **variables: str) -> None:
    """Run a command; write its output to a log, and show its progress in one line."""
    terminal, began = sys.stdout.isatty(), time.monotonic()
    with log.open('a+', errors='replace') as sink:
        print(f'\n$ {shlex.join(command)}', file=sink, flush=True)
        start, output, environment = sink.tell(), '', {**os.environ, **variables}
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, env=environment
        )
        try:
            while process.returncode is None:
                show_progress(title, time.monotonic() - began, output, terminal)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(1 if terminal else 30)
                sink.seek(start)
                output = sink.read()
        finally:
            process.terminate()
            process.wait()
    if terminal:
        print()
    if process.returncode:
        hint = next((h for words, h in HINTS.items() if re.search(words, output, re.I)), '')
        lines = output.strip().splitlines()
        # A compiler's errors stand far above its last lines, which only say that it failed.
        errors = [line for line in lines if re.search(r'\berror: ', line)]
        tail = '\n'.join([*errors[:3], *lines[-8:]])
        raise InstallError(f'{title} failed:\n{tail}\n{hint or "see the log"} (log: {log})')


def show_progress(title: str, seconds: float, output: str, terminal: bool) -> None:
    """Print how long a command has been running, and how many files it has compiled."""
    counters = re.findall(r'^\s*\[(\d+)/(\d+)\]', output, re.MULTILINE)
    compiled = '  {} of {} files compiled'.format(*counters[-1]) if counters else ''
    line = f'{title}  {int(seconds) // 60}:{int(seconds) % 60:02d}{compiled}'
    if terminal:
        # A line that wraps could not be overwritten.
        line = f'\r\033[K{line[: shutil.get_terminal_size().columns - 1]}'
    print(line, end='' if terminal else '\n', flush=True)


def require_compiler() -> None:
    """Raise an InstallError if mmcv cannot be compiled."""
    version = f'{sys.version_info.major}.{sys.version_info.minor}'
    compilers = shlex.split(os.environ.get('CXX', ''))[:1] or ['c++', 'g++', 'clang++']
    if not any(map(shutil.which, compilers)):
        what, package = f'a C++ compiler ({", ".join(compilers)})', 'build-essential'
    elif not Path(sysconfig.get_paths()['include'], 'Python.h').is_file():
        what, package = f'the headers of Python {version}', f'python{version}-dev'
    else:
        return
    raise InstallError(
        f'building mmcv needs {what}: install it (Debian: sudo apt-get install {package}; '
        'macOS: xcode-select --install), or set WHEELHOUSE to a folder with a ready wheel'
    )


class Installation:
    """One run of the installer; ``torch`` is TORCH, ``repair`` ignores the last run's notes."""

    def __init__(
        self,
        root: Path,
        wheelhouse: Path | None = None,
        torch: str = '',
        oldest: bool = False,
        repair: bool = False,
    ) -> None:
        self.root, self.wheelhouse, self.asked_torch = root, wheelhouse, torch
        self.venv = root / ('.venv-oldest' if oldest else '.venv')
        self.python = self.venv / 'bin' / 'python'
        # Gradio does not work with the oldest versions.
        self.lists = ['runtime', 'tests'] if oldest else ['runtime', 'tests', 'app']
        self.log, self.state_file = self.venv / 'install.log', self.venv / 'installed.json'
        texts = {path.stem: path.read_text() for path in (root / 'requirements').glob('*.txt')}
        self.constraints = texts['constraints']
        if oldest:
            bounds = '\n'.join(texts[name] for name in ('runtime', 'tests', 'export'))
            bounds = re.findall(r'^([\w.-]+)>=([\w.]+)', bounds, re.MULTILINE)
            lowest = {normalized_name(name): version for name, version in bounds}
            # Like any torch but the pinned one, the oldest has its own limits.
            self.asked_torch = torch or f'torch=={lowest.pop("torch")}'
            self.constraints = replace_pins(self.constraints, lowest)
        self.pins = dict(re.findall(r'^([\w.-]+)==([^\s;]+)$', self.constraints, re.MULTILINE))
        self.pinned_torch = f'torch=={self.pins["torch"]}'
        parts = [*map(texts.get, sorted(texts)), (root / 'pyproject.toml').read_text(), str(root)]
        self.key = hashlib.sha256('\0'.join(parts).encode()).hexdigest()
        self.state = {}
        with suppress(OSError, ValueError):
            self.state = json.loads(self.state_file.read_text())
        if repair:
            self.state['key'] = ''

    def run(self) -> None:
        """Do the steps that are not done."""
        if (
            self.state.get('key') == self.key
            and self.state['versions'] == self.versions()
            and self.torch_to_install() is None
            and self.python.exists()
        ):
            print(f'{self.venv.name} is up to date.')
            return
        if self.version(MMCV) is None and not self.wheels():
            require_compiler()
        self.make_environment()
        self.install_torch()
        limits = self.write_constraints()
        self.install_needs_of_mmcv(limits)
        self.install_mmcv()
        files = [f'--requirement={self.root}/requirements/{name}.txt' for name in self.lists]
        wanted = ['--no-build-isolation', *limits, *files, f'--editable={self.root}']
        self.pip('[4/4] everything else', 'install', *wanted)
        self.save_state(key=self.key)
        print(f'Installed; `{self.venv.name}/bin/python tools/doctor.py` shows what.')

    def make_environment(self) -> None:
        """Make the virtual environment; make it again if an interruption left it incomplete."""
        if self.try_code('import pip') is None:
            # pip writes INSTALLER last; without it a package is incomplete.
            for metadata in self.venv.glob('lib/python*/site-packages/*.dist-info'):
                if not (metadata / 'INSTALLER').exists():
                    shutil.rmtree(metadata)
            return
        if self.try_code('') is not None:
            shutil.rmtree(self.venv, ignore_errors=True)
            self.venv.mkdir()
        # sys.executable may be in the environment that was just removed.
        python = getattr(sys, '_base_executable', None) or sys.executable
        run([python, '-m', 'venv', str(self.venv)], self.log, f'Making {self.venv.name}')

    def torch_to_install(self) -> str | None:
        return choose_torch(self.asked_torch, self.pinned_torch, self.version('torch'), self.state)

    def install_torch(self) -> None:
        """Install torch, or keep the installed one."""
        wanted = self.torch_to_install()
        if wanted is None:
            print(f'Keeping torch {self.version("torch")}.', flush=True)
            # If the user installed another since the last run, it is no longer our choice.
            same = self.state.get('versions', {}).get('torch') == self.version('torch')
            wanted = self.state.get('torch', '') if same else ''
        else:
            requirement = shlex.split(wanted)
            if self.version('torch'):
                # pip accepts any build of a version as the right one.
                replace = ['install', '--force-reinstall', '--no-deps']
                self.pip('[1/4] torch: replacing', *replace, *requirement)
            pinned = wanted == self.pinned_torch
            limits = [f'--constraint={self.root}/requirements/constraints.txt'] if pinned else []
            self.pip('[1/4] torch', 'install', *limits, *requirement)
        # Until the end of the run, nothing else is known to fit this torch.
        self.save_state(key='', torch=wanted, torch_pin=self.pinned_torch)

    def write_constraints(self) -> list[str]:
        """Write the pins that fit the installed torch; return pip's option for them."""
        torch = self.distribution('torch')
        text, version = self.constraints, torch.version
        if version.partition('+')[0] != self.pins['torch']:
            # Another torch needs other versions of its dependencies.
            dropped = dict.fromkeys(map(normalized_name, torch.requires or []))
            text = replace_pins(text, {**dropped, 'torch': version})
        file = self.venv / 'constraints.txt'
        file.write_text(text)
        return [f'--constraint={file}']

    def install_needs_of_mmcv(self, limits: list[str]) -> None:
        """Install what mmcv needs to be built and imported."""
        build = f'--requirement={self.root}/requirements/build.txt'
        headless = 'opencv-python-headless'
        wanted = [build, 'onedl-mmengine', 'opencv-python', headless]
        self.pip('[2/4] what mmcv needs', 'install', *limits, *wanted)
        if self.try_code('import cv2'):
            # The other build needs graphics libraries for windows, which servers often lack.
            replace = ['install', '--force-reinstall', '--no-deps', *limits]
            self.pip('[2/4] OpenCV without windows', *replace, headless)

    def install_mmcv(self) -> None:
        """Install mmcv from the first wheel whose operators run with this torch, or compile it."""
        if self.version(MMCV) == self.pins[MMCV] and self.try_code(TRY_MMCV) is None:
            return
        for wheel in self.wheels():
            reason = self.try_wheel(wheel)
            if reason is None:
                return
            print(f'{wheel} does not fit torch {self.version("torch")}: {reason}', flush=True)
        require_compiler()
        # Outside of pip's temporary folders, so that ninja continues after an interruption; a
        # folder per torch, because objects of two versions must not be mixed.
        build = self.venv / 'build' / f'torch-{self.version("torch")}'
        if not list(build.glob('*/setup.py')):
            source = ['--no-deps', '--no-build-isolation', f'--no-binary={MMCV}', f'--dest={build}']
            wanted = f'{MMCV}=={self.pins[MMCV]}'
            self.pip('[3/4] mmcv: source', 'download', *source, wanted)
            shutil.unpack_archive(str(next(build.glob('*.tar.gz'))), str(build))
        print('mmcv is compiled once, in minutes. If interrupted, run this again.', flush=True)
        setup = next(build.glob('*/setup.py'))
        if re.match(r'2\.(1[4-9]|[2-9]\d)|[3-9]', self.version('torch')):
            # The headers of torch 2.14 and later need C++20; mmcv sets C++17.
            setup.write_text(setup.read_text().replace('-std=c++17', '-std=c++20'))
        options = ['--verbose', '--no-deps', '--no-build-isolation', f'--wheel-dir={self.cache()}']
        title, folder = '[3/4] mmcv: compiling', str(setup.parent)
        self.pip(title, 'wheel', *options, folder, **build_variables())
        reason = self.try_wheel(max(self.cache().glob('*.whl'), key=lambda p: p.stat().st_mtime))
        if reason is not None:
            raise InstallError(f'mmcv was built but does not work: {reason}; choose another TORCH')
        shutil.rmtree(build.parent)

    def try_wheel(self, wheel: Path) -> str | None:
        """Install a wheel of mmcv; return why its operators do not run, None if they do."""
        title = f'[3/4] mmcv: {wheel.name}'
        self.pip(title, 'install', '--force-reinstall', '--no-deps', str(wheel))
        return self.try_code(TRY_MMCV)

    def cache(self) -> Path:
        """Return the folder for built wheels, outside of the checkout, one for each torch."""
        base = Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser()
        return base / 'efficientformer-v2-dense/wheels' / f'torch-{self.version("torch") or "*"}'

    def wheels(self) -> list[Path]:
        """Return ready wheels of mmcv for this Python, machine and (if installed) torch."""
        libraries = [path.name for path in self.venv.glob('lib/python3.*')]
        minor = int(libraries[0].partition('.')[2]) if libraries else sys.version_info.minor
        name = f'{MMCV.replace("-", "_")}-{self.pins[MMCV]}-cp3{minor}-*{platform.machine()}.whl'
        found = list(self.wheelhouse.glob(name)) if self.wheelhouse else []
        return found + list(self.cache().parent.glob(f'{self.cache().name}/{name}'))

    def distribution(self, name: str) -> importlib.metadata.Distribution | None:
        """Return an installed distribution, read from the metadata without a process."""
        site = [str(path) for path in self.venv.glob('lib/python*/site-packages')]
        return next(iter(importlib.metadata.distributions(name=name, path=site)), None)

    def version(self, name: str) -> str | None:
        found = self.distribution(name)
        return found.version if found else None

    def versions(self) -> dict[str, str | None]:
        return {name: self.version(name) for name in ('torch', *OPENMMLAB)}

    def save_state(self, **entries: str) -> None:
        self.state.update(entries, versions=self.versions())
        self.state_file.write_text(json.dumps(self.state, indent=2))

    def try_code(self, code: str) -> str | None:
        """Run Python in the environment; return the last line of its error, None if none."""
        try:
            done = subprocess.run(
                [str(self.python), '-c', code], cwd=self.venv, capture_output=True, text=True
            )
        except OSError as error:
            return str(error)
        lines = done.stderr.strip().splitlines() or [f'it ended with status {done.returncode}']
        return lines[-1] if done.returncode else None

    def pip(self, title: str, command: str, *arguments: str, **variables: str) -> None:
        # Added to the user's configuration of pip, which may be what finds torch.
        places = [f'--find-links={self.wheelhouse}'] if self.wheelhouse else []
        pip = [str(self.python), '-m', 'pip', command, '--no-input', '--progress-bar=off']
        run([*pip, *places, *arguments], self.log, title, **variables)


def build_variables() -> dict[str, str]:
    """Return variables to build mmcv with operators, without debug information (twice as fast)."""
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    # A compiler takes up to 2 GB.
    jobs = max(1, min(os.cpu_count() or 1, int(memory / 2e9)))
    # Newer setuptools use CFLAGS instead of Python's flags, which include the optimization.
    flags = os.environ.get('CFLAGS') or sysconfig.get_config_var('CFLAGS') or '-O3 -DNDEBUG'
    return {
        'MMCV_WITH_OPS': '1',
        'MAX_JOBS': os.environ.get('MAX_JOBS') or str(jobs),
        'CFLAGS': f'{flags} -g0',
        'CXXFLAGS': f'{os.environ.get("CXXFLAGS") or flags} -g0',
    }


def main() -> None:
    """Install; end with a message on stderr if that fails."""
    parser = argparse.ArgumentParser(
        description='Make .venv and install what is missing in it.',
        epilog='Variables: WHEELHOUSE, a folder of ready wheels; TORCH, another torch and options '
        "for pip, such as 'torch==2.13.0 --index-url URL'.",
    )
    parser.add_argument(
        '--oldest', action='store_true', help='make .venv-oldest with the lowest versions'
    )
    parser.add_argument('--repair', action='store_true', help='check all steps again')
    options = parser.parse_args()
    wheelhouse = os.environ.get('WHEELHOUSE')
    folder = Path(wheelhouse).expanduser().resolve() if wheelhouse else None
    # Two at once (`make test` beside `make demo`) would overwrite each other's files.
    fcntl.flock(os.open(ROOT, os.O_RDONLY), fcntl.LOCK_EX)
    try:
        if folder and not folder.is_dir():
            raise InstallError(f'WHEELHOUSE={wheelhouse} is not a folder')
        torch = os.environ.get('TORCH', '').strip()
        Installation(ROOT, folder, torch, options.oldest, options.repair).run()
    except InstallError as error:
        sys.exit(f'Installation stopped: {error}')
    except KeyboardInterrupt:
        print('\nInterrupted; the same command continues.', file=sys.stderr)
        sys.exit(130)


if __name__ == '__main__':
    main()
