"""mmcv with its compiled operators: from a ready wheel where one fits, else from source."""

import os
import shutil
import sysconfig
import tarfile
from pathlib import Path

from _install.environment import Environment

DISTRIBUTION = 'onedl-mmcv'


def find_wheel(wheelhouse: Path | None, version: str, python: tuple[int, int]) -> Path | None:
    """Look for a wheel of this version for a Python and this machine."""
    if wheelhouse is None:
        return None
    tag = 'cp{}{}'.format(*python)
    platform, _, machine = sysconfig.get_platform().partition('-')
    machine = machine.rpartition('-')[2]
    name = DISTRIBUTION.replace('-', '_')
    for wheel in sorted(wheelhouse.glob(f'{name}-{version}-{tag}-*.whl')):
        if platform in wheel.stem and wheel.stem.endswith(machine):
            return wheel
    return None


def why_broken(environment: Environment) -> str | None:
    """Return why the operators cannot be imported, None if they can."""
    return environment.try_code('import mmcv.ops')


def unpack_source(archive_folder: Path, torch_version: str) -> Path:
    """Unpack the downloaded source where its objects outlive an interruption.

    pip builds a folder in place, and ninja skips what is compiled already. Objects of another torch
    must not be mixed in, so each torch has its own folder.
    """
    target = archive_folder / f'torch-{torch_version}'
    if not target.is_dir():
        (archive,) = archive_folder.glob('*.tar.gz')
        unpacked = archive_folder / 'unpacked'
        shutil.rmtree(unpacked, ignore_errors=True)
        with tarfile.open(archive) as source:
            source.extractall(unpacked, **_safely())
        (folder,) = unpacked.iterdir()
        folder.rename(target)
    return target


def build_variables() -> dict[str, str]:
    """Variables of the build: with operators, and no more compilers than the machine can feed."""
    return {'MMCV_WITH_OPS': '1', 'MAX_JOBS': os.environ.get('MAX_JOBS') or str(_jobs())}


def _jobs() -> int:
    cores = os.cpu_count() or 1
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    # A compiler takes up to 2 GB on the files that instantiate most of torch's templates.
    return max(1, min(cores, int(memory / 2e9)))


def _safely() -> dict[str, str]:
    # Python's security releases before 3.12 brought the argument, their first releases lack it.
    return {'filter': 'data'} if hasattr(tarfile, 'data_filter') else {}
