"""Command line of tools/install.py: options, signals, and errors as one line."""

import argparse
import errno
import fcntl
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from _install.errors import InstallError
from _install.steps import install

ROOT = Path(__file__).resolve().parents[2]
AGAIN = 'run the same command again to go on'


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the options; `make` passes WHEELHOUSE and TORCH through the environment."""
    parser = argparse.ArgumentParser(description='Make .venv and install what is missing there.')
    parser.add_argument(
        '--wheelhouse',
        default=os.environ.get('WHEELHOUSE', ''),
        metavar='FOLDER',
        help='folder of ready wheels, beside what pip is configured for (default: $WHEELHOUSE)',
    )
    parser.add_argument(
        '--torch',
        default=os.environ.get('TORCH', ''),
        metavar='REQUIREMENT',
        help="another torch, with pip's options: 'torch==2.6.0 --index-url URL' (default: $TORCH)",
    )
    parser.add_argument(
        '--repair',
        action='store_true',
        help='trust no earlier run: check every part again and install what does not fit',
    )
    parser.add_argument(
        '--oldest',
        action='store_true',
        help='make .venv-oldest instead, with the lowest versions that requirements/ allow',
    )
    return parser.parse_args(arguments)


def find_wheelhouse(folder: str) -> Path | None:
    """Turn the option into a folder that exists."""
    if not folder:
        return None
    wheelhouse = Path(folder).expanduser().resolve()
    if not wheelhouse.is_dir():
        raise InstallError(f'WHEELHOUSE={folder} is not a folder; correct it or leave it away')
    return wheelhouse


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other installation works in this checkout."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print('Another installation is at work here; waiting for it.', flush=True)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Install, and end with one line on stderr where that fails."""
    options = parse_arguments()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        wheelhouse = find_wheelhouse(options.wheelhouse)
        with alone(ROOT):
            install(ROOT, wheelhouse, options.torch.strip(), options.repair, options.oldest)
    except InstallError as error:
        sys.exit(f'Installation stopped: {error}')
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        sys.exit(f'Installation stopped: no space left under {ROOT}; free some, then {AGAIN}')
    except KeyboardInterrupt:
        print(f'\nInstallation interrupted; {AGAIN}.', file=sys.stderr)
        sys.exit(130)
