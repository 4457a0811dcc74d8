"""Runs a tool as a user would, but forked from a process that has imported the libraries.

That saves the seconds in which torch, mmdet and mmseg are imported, of which the tests would spend
most of their time otherwise.
"""

import gc
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from mmengine.config import utils
from yapf.yapflib import yapf_api

# What a short run takes most of its time for, here and in what is forked: mmengine formats the text
# of every config, and reads a hundred files to find one of mmdet's.
yapf_api.FormatCode = lambda text, **_: (text, True)
utils.load = cache(utils.load)

TOOLS = Path(__file__).resolve().parents[1] / 'tools'
LIBRARIES = [
    *('matplotlib.pyplot', 'mmdet.evaluation', 'mmdet.models', 'mmseg.evaluation', 'mmseg.models'),
    *('torch._dynamo', 'torch.utils.tensorboard', 'tqdm', 'yapf'),
]

CONTEXT = multiprocessing.get_context('forkserver')
CONTEXT.set_forkserver_preload(LIBRARIES)


def run_tool(
    folder: Path, tool: str, *arguments: object, timeout: int = 600
) -> subprocess.CompletedProcess:
    """Run ``tools/TOOL`` in a folder and return the finished process, with its output as text."""
    return Started(folder, [TOOLS / tool, *arguments]).wait(timeout)


def run_in_two(
    folder: Path, script: Path, *arguments: object
) -> tuple[subprocess.CompletedProcess, subprocess.CompletedProcess]:
    """Run a script in two processes that find each other as those of torchrun do."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    address = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), WORLD_SIZE='2')
    ranks = [{**address, 'RANK': rank, 'LOCAL_RANK': rank} for rank in '01']
    first, second = [Started(folder, [script, *arguments], **rank) for rank in ranks]
    return first.wait(), second.wait()


class Started:
    """A Python script with its arguments, running in a folder.

    Attributes:
        pid: The number of its process.
        is_alive: Whether that has not ended.
    """

    def __init__(
        self,
        folder: Path,
        command: list[object],
        stdin: str = '',
        own_group: bool = False,
        **environment: str,
    ) -> None:
        self.command = list(map(str, command))
        self.streams = tempfile.TemporaryDirectory()
        self.paths = [Path(self.streams.name) / name for name in ('stdin', 'stdout', 'stderr')]
        self.paths[0].write_text(stdin)
        environment = {**os.environ, **environment}
        arguments = (self.command, folder, environment, self.paths, own_group)
        self.process = CONTEXT.Process(target=_run, args=arguments)
        self.process.start()
        self.pid, self.is_alive = self.process.pid, self.process.is_alive

    def said(self) -> str:
        """Its standard output until now."""
        return self.paths[1].read_text(errors='replace') if self.paths[1].exists() else ''

    def wait(self, timeout: float = 600) -> subprocess.CompletedProcess:
        """Wait for its end; it is killed if that takes longer."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        with self.streams:
            stdout, stderr = (path.read_text(errors='replace') for path in self.paths[1:])
        code = self.process.exitcode
        if code == -9:
            raise subprocess.TimeoutExpired(self.command, timeout, stdout, stderr)
        return subprocess.CompletedProcess(self.command, code, stdout, stderr)


def launch(
    script: str, *arguments: object, cwd: Path, **environment: str
) -> subprocess.CompletedProcess:
    """Run one of the launchers with this Python."""
    return subprocess.run(
        [str(part) for part in (TOOLS / script, *arguments)],
        cwd=cwd,
        env={**os.environ, 'PYTHON': sys.executable, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def _run(
    command: list[str],
    folder: Path,
    environment: dict[str, str],
    paths: list[Path],
    own_group: bool,
) -> None:
    if own_group:
        os.setsid()
    modes = (os.O_RDONLY, *[os.O_WRONLY | os.O_CREAT] * 2)
    for descriptor, (path, mode) in enumerate(zip(paths, modes, strict=True)):
        os.dup2(os.open(path, mode), descriptor)
    sys.stdin = os.fdopen(0, closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    # As for users: with the forkserver's own, a tool's processes would import everything again.
    multiprocessing.set_start_method(None, force=True)
    # Datasets collect garbage as they are built, which takes long among all that was imported.
    gc.freeze()
    sys.argv = command
    sys.path[:0] = [str(Path(command[0]).parent)]
    runpy.run_path(command[0], run_name='__main__')
