"""Running a long command: its output in a log, signs of life on screen, its errors in words."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from _install.errors import InstallError

SECONDS_ON_TERMINAL = 2
SECONDS_IN_LOG = 30

_NINJA = re.compile(r'^\s*\[(\d+)/(\d+)\]', re.MULTILINE)

# Checked in this order: what fills a disk or cuts a network makes other messages too.
_CAUSES = (
    (
        r'No space left on device|Errno 28|Disk quota exceeded',
        'no disk space left; free some (or point TMPDIR to a folder that has it) '
        'and run the same command again',
    ),
    (
        r'NewConnectionError|Failed to establish a new connection|name resolution|'
        r'Name or service not known|nodename nor servname|ConnectTimeoutError|ReadTimeoutError|'
        r'Network is unreachable|ProxyError|Connection(?: was)? (?:refused|reset|aborted)|'
        r'SSLError|IncompleteRead|from versions: none',
        'packages cannot be fetched; check the network, the proxy and `pip config list`, '
        'then run the same command again',
    ),
    (
        r'No matching distribution found for (?P<what>\S+)',
        'there is no {what} for this Python and machine; choose another PYTHON or TORCH',
    ),
    (
        r'ResolutionImpossible',
        'the versions asked for exclude each other; without TORCH the tested set is installed',
    ),
    (
        r'CUDA_HOME environment variable is not set',
        "torch has a GPU here but the CUDA compiler is missing; install torch's CUDA toolkit "
        'and set CUDA_HOME, or choose a CPU build with TORCH',
    ),
    (
        r'detected CUDA version \((?P<have>[\d.]+)\) mismatches .*?\((?P<want>[\d.]+)\)',
        'torch was built for CUDA {want}, the CUDA compiler is {have}; set CUDA_HOME to a toolkit '
        '{want} or choose another build with TORCH',
    ),
    (
        r'Killed signal|out of memory allocating|virtual memory exhausted',
        'memory ran out while compiling; run the same command again with MAX_JOBS=1',
    ),
    (
        r'fatal error: Python\.h',
        "the headers of Python are missing; install your system's python3-dev package",
    ),
)


def explain(output: str) -> str:
    """Say in words what made a command fail, judged by what it printed."""
    for pattern, advice in _CAUSES:
        if match := re.search(pattern, output):
            return advice.format(**match.groupdict())
    return 'the command failed; its output says why'


def compiled(output: str) -> str:
    """Say how far a build is, judged by ninja's counters."""
    counters = _NINJA.findall(output)
    return '{} of {} files compiled'.format(*counters[-1]) if counters else ''


def run(
    command: Sequence[str],
    log: Path,
    title: str,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run a command to its end while the screen shows that it lives.

    Args:
        command: Program and arguments.
        log: File that the whole output is appended to.
        title: What the screen calls the work.
        environment: Variables that the command gets on top of ours.

    Raises:
        InstallError: With the cause in words, when the command fails.
    """
    with log.open('ab') as sink:
        start = sink.tell()
        sink.write(f'\n$ {" ".join(command)}\n'.encode())
        sink.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        try:
            _watch(process, log, start, title)
        except BaseException:
            _stop(process)
            raise
    if process.returncode != 0:
        raise InstallError(f'{title}: {explain(_output_since(log, start))} (log: {log})')


def _watch(process: subprocess.Popen, log: Path, start: int, title: str) -> None:
    terminal = sys.stdout.isatty()
    began = time.monotonic()
    if not terminal:
        print(title, flush=True)
    while True:
        line = _status(title, time.monotonic() - began, compiled(_output_since(log, start)))
        if terminal:
            # A line that wraps could not be written over.
            print(f'\r\033[K{line[: shutil.get_terminal_size().columns - 1]}', end='', flush=True)
        elif time.monotonic() - began >= SECONDS_IN_LOG:
            print(line, flush=True)
        try:
            process.wait(SECONDS_ON_TERMINAL if terminal else SECONDS_IN_LOG)
        except subprocess.TimeoutExpired:
            continue
        if terminal:
            print(f'\r\033[K{_status(title, time.monotonic() - began, "")}', flush=True)
        return


def _status(title: str, seconds: float, detail: str) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return '  '.join(part for part in (title, f'{minutes:d}:{seconds:02d}', detail) if part)


def _output_since(log: Path, start: int) -> str:
    with log.open('rb') as source:
        source.seek(start)
        return source.read().decode(errors='replace')


def _stop(process: subprocess.Popen) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        _signal_group(process, number)
        try:
            process.wait(5)
            break
        except subprocess.TimeoutExpired:
            continue
    # pip starts compilers of its own, which may outlive it.
    _signal_group(process, signal.SIGKILL)
    process.wait()


def _signal_group(process: subprocess.Popen, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
