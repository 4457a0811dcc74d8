"""Imports of every tool: they fail with one plain line instead of a traceback."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def wait_passively() -> None:
    """Let OpenMP's threads sleep while they wait; call this before torch is imported.

    Otherwise they spin, and take the cores from reading, drawing and other programs. Beside other
    jobs, inference then takes many times as long.
    """
    os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')


@contextmanager
def explain_missing() -> Iterator[None]:
    """End the program with one line if an import in the block fails.

    mmdet and mmseg raise AssertionError for an unsupported mmcv; a library built for another torch
    raises OSError. Within the block, `backbones` is found in a clone too.
    """
    if importlib.util.find_spec('backbones') is None:
        sys.path.insert(0, str(ROOT))
    try:
        yield
    except (ImportError, AssertionError, OSError) as error:
        reason = ' '.join(str(error).split()) or type(error).__name__
        venv = ROOT / '.venv'
        if venv.is_dir() and Path(sys.prefix).resolve() != venv.resolve():
            advice = f'Use {venv}/bin/python: this is {sys.executable}'
        else:
            advice = 'Run `make install`'
        sys.exit(f'{reason}. {advice}; `python tools/doctor.py` says what does not fit.')
