"""What a machine must have before anything is downloaded."""

import importlib.util
import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

from _install.errors import InstallError

# The whole environment takes 2 GB with a CPU build of torch and several more with a CUDA build;
# pip's temporary copies and the objects of the mmcv build come on top.
GIGABYTES = 6
GIGABYTES_TO_UPDATE = 1


def require_space(folder: Path, gigabytes: float, free_bytes: int | None = None) -> None:
    """Refuse to start what would fill the disk."""
    if free_bytes is None:
        free_bytes = shutil.disk_usage(folder).free
    free = free_bytes / 1e9
    if free < gigabytes:
        raise InstallError(
            f'about {gigabytes} GB of disk space are needed under {folder}, {free:.1f} GB are '
            'free; free some and run the same command again'
        )


def require_compiler() -> None:
    """Refuse to start a build that has no C++ compiler or no Python headers."""
    chosen = shlex.split(os.environ.get('CXX', ''))
    candidates = chosen[:1] or ['c++', 'g++', 'clang++']
    if not any(shutil.which(name) for name in candidates):
        raise InstallError(
            f'building mmcv needs a C++ compiler and there is none ({", ".join(candidates)}); '
            + _system_package('build-essential', 'xcode-select --install')
            + ', or give a folder with a ready wheel as WHEELHOUSE'
        )
    if not Path(sysconfig.get_paths()['include'], 'Python.h').is_file():
        version = f'{sys.version_info.major}.{sys.version_info.minor}'
        raise InstallError(
            f'building mmcv needs the headers of Python {version} (Python.h) and they are missing; '
            + _system_package(f'python{version}-dev', 'brew install python')
        )


def require_venv_module() -> None:
    """Refuse a Python whose distributor took the `venv` module apart."""
    if importlib.util.find_spec('venv') and importlib.util.find_spec('ensurepip'):
        return
    version = f'{sys.version_info.major}.{sys.version_info.minor}'
    raise InstallError(
        f'{sys.executable} cannot make virtual environments; '
        + _system_package(f'python{version}-venv', 'brew install python')
    )


def _system_package(debian: str, macos: str) -> str:
    if sys.platform == 'darwin':
        return f'install it with: {macos}'
    if shutil.which('apt-get'):
        return f'install it with: sudo apt-get install {debian}'
    return f"install it with your system's package manager ({debian} on Debian)"
