"""Make .venv and install everything into it, in the right order; done work is not done again.

This file only looks at the Python that runs it, and has to start on one that is too old to say so;
the work is in `_install`, which may use what newer ones have.
"""

import os
import sys

OLDEST_PYTHON = (3, 10)
VENV_PYTHON = os.path.join(
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))), '.venv', 'bin', 'python'
)


def wrong_python(version_info: tuple) -> str:
    """Say what is wrong with a Python of this version; nothing if it will do."""
    if tuple(version_info[:2]) >= OLDEST_PYTHON:
        return ''
    return (
        'Python {}.{} or later is needed, this is {}.{}; choose another one, for example: '
        'make install PYTHON=python3.12'
    ).format(*(OLDEST_PYTHON + tuple(version_info[:2])))


def main() -> None:
    """Check the Python, then install."""
    reason = wrong_python(sys.version_info)
    if reason:
        # A .venv made with PYTHON=... keeps serving where the system's python3 is too old.
        in_venv = os.path.dirname(os.path.dirname(VENV_PYTHON)) == sys.prefix
        if os.access(VENV_PYTHON, os.X_OK) and not in_venv:
            os.execv(VENV_PYTHON, [VENV_PYTHON, *sys.argv])
        sys.exit(reason)

    from _install.cli import main as install

    install()


if __name__ == '__main__':
    main()
