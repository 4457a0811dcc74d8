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
from collections.abc import Callable
from pathlib import Path

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
    return start(folder, [TOOLS / tool, *arguments])(timeout)


def run_in_two(
    folder: Path, script: Path, *arguments: object
) -> tuple[subprocess.CompletedProcess, subprocess.CompletedProcess]:
    """Run a script in two processes that find each other as those of torchrun do."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    address = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), WORLD_SIZE='2')
    ranks = [{**address, 'RANK': rank, 'LOCAL_RANK': rank} for rank in '01']
    first, second = [start(folder, [script, *arguments], **rank) for rank in ranks]
    return first(600), second(600)


def start(
    folder: Path, command: list[object], **environment: str
) -> Callable[[float], subprocess.CompletedProcess]:
    """Start a Python script with its arguments; call what is returned to wait for its end."""
    command = list(map(str, command))
    outputs = tempfile.TemporaryDirectory()
    paths = [Path(outputs.name) / name for name in ('stdout', 'stderr')]
    environment = {**os.environ, **environment}
    process = CONTEXT.Process(target=_run, args=(command, folder, environment, paths))
    process.start()

    def finish(timeout: float) -> subprocess.CompletedProcess:
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
        with outputs:
            stdout, stderr = (path.read_text(errors='replace') for path in paths)
        if process.exitcode == -9:
            raise subprocess.TimeoutExpired(command, timeout, stdout, stderr)
        return subprocess.CompletedProcess(command, process.exitcode, stdout, stderr)

    return finish


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


def _run(command: list[str], folder: Path, environment: dict[str, str], paths: list[Path]) -> None:
    for descriptor, path in zip((1, 2), paths, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
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
