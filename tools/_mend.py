"""From the error of an import to the command that mends the environment."""

# The doctor has to start on a Python that is too old, to say so.
from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Import name -> distribution of the maintained line, of the original line.
OPENMMLAB = {
    'mmengine': ('onedl-mmengine', 'mmengine'),
    'mmcv': ('onedl-mmcv', 'mmcv'),
    'mmdet': ('onedl-mmdetection', 'mmdet'),
    'mmseg': ('onedl-mmsegmentation', 'mmsegmentation'),
}
# The newest of the original line that accept each other.
ORIGINAL_LIMITS = {'mmcv': 'mmcv>=2.0.0,<2.2.0', 'mmdet': 'mmdet==3.3.0'}

_BUILT_FOR_ANOTHER_TORCH = re.compile(
    r'undefined symbol|symbol not found|libtorch|libc10|mmcv\._ext|mmcv/_ext', re.IGNORECASE
)
_WINDOW = re.compile(r'install (?P<name>mm\w+)\s*(?P<limits>[<>=][^\s,]+(?:\s*,\s*[<>=][^\s,]+)*)')
_MISSING = re.compile(r"No module named '(?P<name>[^'.]+)")
_DISTRIBUTIONS = {
    'cv2': 'opencv-python',
    'huggingface_hub': 'huggingface-hub',
    'PIL': 'pillow',
    'yaml': 'pyyaml',
}


@dataclass(frozen=True)
class Mender:
    """Knows how packages get into the environment that is looked at.

    Attributes:
        versions: Installed version of every distribution.
        own: Whether it is the project's own .venv, which tools/install.py looks after.
        python: The interpreter of the environment.
    """

    versions: Mapping[str, str]
    own: bool
    python: str = sys.executable

    def pip(self, *arguments: str) -> str:
        """Return a pip command for this environment."""
        return shlex.join([self.python, '-m', 'pip', *arguments])

    def repair(self) -> str:
        """Return the command that brings the project's own .venv in order."""
        return shlex.join(['python3', str(ROOT / 'tools' / 'install.py'), '--repair'])

    def distribution(self, module: str) -> str:
        """Return the distribution that has a module, on the line that is in use here."""
        if module not in OPENMMLAB:
            return _DISTRIBUTIONS.get(module, module)
        maintained, original = OPENMMLAB[module]
        uses_original = any(
            old in self.versions and new not in self.versions for new, old in OPENMMLAB.values()
        )
        return original if uses_original else maintained

    def install(self, module: str) -> str:
        """Return the command that installs a missing module."""
        if self.own:
            return self.repair()
        if module == 'mmcv':
            return self.build_mmcv()
        if module == 'backbones':
            return self.pip('install', '--no-deps', '--editable', str(ROOT))
        distribution = self.distribution(module)
        isolation = ['--no-build-isolation'] if module in OPENMMLAB else []
        return self.pip('install', *isolation, ORIGINAL_LIMITS.get(distribution, distribution))

    def reinstall(self, module: str) -> str:
        """Return the command that replaces the files of an installed module."""
        distribution = self.distribution(module)
        version = self.versions.get(distribution)
        requirement = f'{distribution}=={version}' if version else distribution
        isolation = ['--no-build-isolation'] if module in OPENMMLAB else []
        return self.pip('install', '--force-reinstall', '--no-deps', *isolation, requirement)

    def build_mmcv(self) -> str:
        """Return the command that compiles mmcv for the torch that is installed."""
        if self.own:
            return self.repair()
        distribution = self.distribution('mmcv')
        version = self.versions.get(distribution)
        requirement = (
            f'{distribution}=={version}'
            if version
            else ORIGINAL_LIMITS.get(distribution, distribution)
        )
        # pip keeps what it built, for whatever torch that was.
        fresh = ['--force-reinstall', '--no-deps', '--no-cache-dir'] if version else []
        source = ['--no-build-isolation', '--no-binary', distribution]
        tools = self.pip('install', '--requirement', str(ROOT / 'requirements' / 'build.txt'))
        build = self.pip('install', *fresh, *source, requirement)
        return f'{tools} && MMCV_WITH_OPS=1 {build}'

    def for_error(self, module: str, error: str) -> str:
        """Return the command against the error that importing a module raised."""
        if _BUILT_FOR_ANOTHER_TORCH.search(error):
            return self.build_mmcv()
        if window := _WINDOW.search(error):
            limits = re.sub(r'\s', '', window['limits']).rstrip('.')
            return self.pip('install', '--no-build-isolation', window['name'] + limits)
        if missing := _MISSING.search(error):
            return self.install(missing['name'])
        if 'libGL' in error or 'libgthread' in error:
            # The build without windows needs no graphics libraries of the system.
            version = self.versions.get('opencv-python', '')
            headless = 'opencv-python-headless' + (f'=={version}' if version else '')
            return self.pip('install', '--force-reinstall', '--no-deps', headless)
        if 'NumPy 1' in error or 'numpy.core.multiarray' in error:
            return self.pip('install', 'numpy<2')
        return self.reinstall(module.partition('.')[0])
