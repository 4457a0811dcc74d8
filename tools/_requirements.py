"""What every tool begins with: imports that fail with one clear line instead of a traceback."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def explain_missing() -> Iterator[None]:
    """Turn an import that fails into one line on stderr and exit status 1.

    Inside, `backbones` can be imported even from a clone that was not installed. ImportError is
    what a missing package raises, AssertionError what mmdet and mmseg raise for a version of mmcv
    they refuse, OSError what a library built against another torch may raise.
    """
    _make_backbones_importable()
    try:
        yield
    except (ImportError, AssertionError, OSError) as error:
        reason = ' '.join(str(error).split()) or type(error).__name__
        sys.exit(f'{reason}. {_advice()}')


def _make_backbones_importable() -> None:
    if importlib.util.find_spec('backbones') is None:
        sys.path.insert(0, str(ROOT))


def _advice() -> str:
    venv = ROOT / '.venv'
    if (venv / 'bin' / 'python').exists() and Path(sys.prefix).resolve() != venv.resolve():
        return (
            f'This is {sys.executable}, the project is installed in .venv: use .venv/bin/python, '
            'or run `python tools/doctor.py` for the command that mends this environment.'
        )
    return 'Run `python tools/doctor.py`: it says what does not fit and the command that mends it.'
