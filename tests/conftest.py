"""Threads that do not fight, and the small images, checkpoints and commands that tests share."""

import os
import sys
from pathlib import Path

# Before torch is imported: workers of pytest-xdist and processes of torchrun share two cores.
os.environ.setdefault('OMP_NUM_THREADS', '1')
# Linux has ended long-lived test processes by SIGSEGV as they returned from a handler of SIGCHLD,
# with no fault of their own; processors with AMX are where it was seen.
os.environ.setdefault('ONEDNN_MAX_CPU_ISA', 'AVX512_CORE_BF16')
# All but `pytest tests/gpu` runs on the CPU, where results are the same on every machine.
os.environ.update(
    {}
    if 'PYTEST_XDIST_WORKER' in os.environ or any('gpu' in Path(arg).parts for arg in sys.argv)
    else {'CUDA_VISIBLE_DEVICES': ''}
)
# The libraries look for a GPU as they are imported; processes that are forked later could not use
# it if they did so in CUDA's own way.
os.environ['PYTORCH_NVML_BASED_CUDA_CHECK'] = '1'

import gc
import importlib
import io
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import tool_process
import torch
from mmengine.runner import CheckpointLoader
from mmengine.runner import checkpoint as mmengine_checkpoint
from tiny import draw_shapes, write_tiny_config

from backbones import weights

torch.set_num_threads(1)

# What one process runs with --dist loadfile: the tests of exporting, which share what they write,
EXPORTING = 'tests/backbones/export/'
# and files of few but long tests, for what has the most tests is begun first.
TRAININGS = (
    'test_killed',
    'test_search',
    'test_search_find',
    'test_supernet',
    'test_two_processes',
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """With --dist loadfile: what one process runs, see above."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = super()._split_scope(nodeid)
            if Path(path).stem in TRAININGS:
                return 'trainings'
            return EXPORTING if path.startswith(EXPORTING) else path

    return Scheduling(config, log) if config.option.dist == 'loadfile' else None


def pytest_collection_finish() -> None:
    """Leave what is imported out of the garbage that every dataset collects as it is built."""
    gc.freeze()


@pytest.fixture(autouse=True)
def no_handler_of_sigchld():
    """Take away what torch's DataLoader leaves behind, see above."""
    yield
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


@pytest.fixture(scope='session')
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny set of drawn shapes, in COCO's layout (``coco``) and ADE20K's (``ade``)."""
    return draw_shapes(tmp_path_factory.mktemp('data') / 'shapes')


@pytest.fixture
def data(shapes: Path, tmp_path: Path) -> Path:
    """The shapes, to corrupt."""
    return Path(shutil.copytree(shapes, tmp_path / 'shapes'))


@pytest.fixture
def run_tool(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Runs one of our tools as a user would, in an empty folder; returns the finished process."""
    return partial(tool_process.run_tool, tmp_path)


SCHEMES = CheckpointLoader._schemes.copy()
LOADERS = {
    name: getattr(mmengine_checkpoint, name) for name in ('load_from_http', '_safe_torch_load')
}


@pytest.fixture(autouse=True)
def default_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin each test without safe loading and trust, which are set for a whole process."""
    monkeypatch.setattr(weights, '_trusted', False)
    monkeypatch.setattr(CheckpointLoader, '_schemes', SCHEMES.copy())
    for name, loader in LOADERS.items():
        monkeypatch.setattr(mmengine_checkpoint, name, loader)


@pytest.fixture
def call_tool(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Iterator[Callable[..., tuple[int, str]]]:
    """Runs one of our tools in this process; returns its exit code and what was said."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def call(tool: str, *arguments: object, stdin: str = '') -> tuple[int, str]:
        monkeypatch.setattr(sys, 'argv', [tool, *map(str, arguments)])
        monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(stdin.encode())))
        try:
            code = importlib.import_module(tool.removesuffix('.py')).main() or 0
        except SystemExit as error:
            code = error.code
        return code, ''.join(capsys.readouterr())

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def tiny_config(tmp_path: Path, shapes: Path) -> Callable[..., Path]:
    """Writes a tiny config: ``tiny_config(task, extra='', shapes=...)``."""

    def write(task: str, extra: str = '', shapes: Path = shapes) -> Path:
        return write_tiny_config(tmp_path, task, shapes, extra)

    return write
