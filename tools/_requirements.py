"""What every tool begins with: imports that fail with one plain line instead of a traceback."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def wait_passively() -> None:
    """Let threads of OpenMP, which torch is about to load, sleep while they wait for others.

    They would spin, and take the cores from reading, drawing and whatever else runs: beside other
    jobs a model infers in a small part of the time.
    """
    os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')


@contextmanager
def explain_missing() -> Iterator[None]:
    """End the program with one line where an import in the block fails.

    mmdet and mmseg raise AssertionError for an mmcv that they refuse, and a library built for
    another torch OSError. In the block, `backbones` is found even in a clone.
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
