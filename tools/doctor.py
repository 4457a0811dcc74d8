"""Print what is installed, whether it works together, and if not, the command that repairs it.

The exit status is 1 if something does not fit. It needs nothing but Python.
"""

from install import MMCV, ROOT, TRY_MMCV, normalized_name  # isort: skip  (exits if Python is too old)

import argparse
import importlib.metadata
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

TRY_TORCH = """
import torch
names = [torch.cuda.get_device_name(gpu) for gpu in range(torch.cuda.device_count())]
gpus = ', '.join(names) or ("Apple's GPU" if torch.backends.mps.is_available() else 'no GPU')
build = torch.version.cuda or torch.version.hip
print(f'built {"for CUDA " + build if build else "without CUDA"}, sees {gpus}')
"""
# Each depends on those before it, so the first failure is the cause. Each runs in its own process,
# since a library built for another torch may crash the interpreter.
CHECKS = {
    'torch': TRY_TORCH,
    'mmengine': 'import mmengine',
    'mmcv': TRY_MMCV,
    'mmdet': 'import mmdet',
    'mmseg': 'import mmseg',
    'backbones': 'import backbones; print(backbones.__path__[0])',
    'tools': 'import av, fsspec, huggingface_hub, jinja2, pycocotools, safetensors, scipy, tqdm',
    'pip check': None,
}
# The maintained and the original line of OpenMMLab, which install into the same folders, and the
# versions of the original that work here.
LINES = {
    'mmengine': ('onedl-mmengine', 'mmengine', ''),
    'mmcv': (MMCV, 'mmcv', '2.1.0'),
    'mmdet': ('onedl-mmdetection', 'mmdet', '3.3.0'),
    'mmseg': ('onedl-mmsegmentation', 'mmsegmentation', '1.2.2'),
}


def installed_versions() -> dict[str, str]:
    """Return the version of each distribution, by its normalized name."""
    found = ((d.metadata['Name'], d.version) for d in importlib.metadata.distributions())
    return {normalized_name(name): version for name, version in found if name}


def run_checks() -> dict[str, tuple[bool, str]]:
    """Return for each check whether it passed, and the last line that it printed."""
    processes = {
        name: subprocess.Popen(
            [sys.executable, *(['-c', code] if code else ['-m', 'pip', 'check'])],
            # So that `backbones` is found as the tools find it.
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, code in CHECKS.items()
    }
    results = {}
    for name, process in processes.items():
        lines = process.communicate()[0].strip().splitlines()
        if process.returncode < 0:
            lines = [f'ends the interpreter (signal {-process.returncode})']
        results[name] = process.returncode == 0, lines[-1] if lines else ''
    return results


def command_that_helps(first: str, versions: dict[str, str], own: bool) -> str:
    """Return the command that repairs ``first``, a key of ``CHECKS`` or 'two lines'; ``own`` is
    whether this is the project's own .venv, which tools/install.py makes."""
    pip = shlex.join([sys.executable, '-m', 'pip'])
    if first == 'two lines':
        # Removing one line alone breaks the other, so both go.
        both = [name for names in LINES.values() for name in names if name in versions]
        then = 'make install' if own else f'install one of the two again: {ROOT}/docs/install.md'
        return f'{pip} uninstall --yes {" ".join(both)}    and then: {then}'
    if own:
        return (
            'python3 tools/install.py --repair    (or, from scratch: rm -r .venv && make install)'
        )
    if 'torch' not in versions:
        return 'make install    (or, in an environment of your own: see docs/install.md)'
    if first == 'backbones':
        return f'{pip} install --no-deps -e {ROOT}'
    if first == 'tools':
        return f'{pip} install -e {shlex.quote(f"{ROOT}[tools]")}'
    if first == 'torch':
        return 'install torch again, in a build that fits your machine: see pytorch.org'
    if first == 'pip check':
        return f'{pip} check    (lists the conflicts; all that this project needs can be imported)'
    maintained, original, version = LINES[first]
    has_original = any(name in versions for _, name, _ in LINES.values())
    name, version = (original, version) if has_original else (maintained, versions.get(maintained))
    wanted = f'{name}=={version}' if version else name
    if first == 'mmcv':
        return (
            f'{pip} install -r requirements/build.txt && MMCV_WITH_OPS=1 {pip} install --no-deps '
            f'--force-reinstall --no-build-isolation --no-cache-dir --no-binary {name} {wanted}'
        )
    if has_original:
        return f'{pip} install {wanted}'
    return f'{pip} install --no-build-isolation -r requirements/runtime.txt'


def main() -> int:
    """Print the report; return 1 if something does not fit."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    versions, own = installed_versions(), Path(sys.prefix).resolve() == (ROOT / '.venv').resolve()
    rows = [('ok', 'Python', f'{platform.python_version()}, {sys.executable}')]
    if (ROOT / '.venv').is_dir() and not own:
        rows.append(('note', 'environment', "not the project's: .venv/bin/python is"))
    two = [name for name, pair in LINES.items() if all(each in versions for each in pair[:2])]
    broken = ['two lines'] if two else []
    if two:
        rows.append(('FAIL', 'OpenMMLab', f'two distributions in one folder: {", ".join(two)}'))
    for name, (passed, line) in run_checks().items():
        names = LINES.get(name, (name,))[:2]
        version = ' '.join(f'{each} {versions[each]}' for each in names if each in versions)
        if passed or version or own or name not in ('mmdet', 'mmseg'):
            rows.append(('ok' if passed else 'FAIL', name, f'{version}  {line}'.strip()))
            broken += [] if passed else [name]
        else:
            # Detection does not need mmseg, and segmentation does not need mmdet.
            rows.append(('note', name, 'not installed'))
    if shutil.which('nvidia-smi') and any('no GPU' in detail for _, _, detail in rows):
        helps = "make install TORCH='torch==VERSION --index-url URL' (see pytorch.org)"
        rows.append(('note', 'GPU', f'there is an NVIDIA driver, but torch sees no GPU: {helps}'))
    for status, name, detail in rows:
        print(f'{status:<5} {name:<12} {detail}')
    print(f'\n{command_that_helps(broken[0], versions, own)}' if broken else '\nEverything fits.')
    return 1 if broken else 0


if __name__ == '__main__':
    sys.exit(main())
