"""Print what is installed, whether it fits together, and the command that mends what does not.

The exit status is 1 when something does not fit. Works with nothing installed at all.

examples:
  python tools/doctor.py          a report to read
  python tools/doctor.py --json   the same for a program, or for a bug report
"""

# Evaluated annotations would keep it from starting on a Python that is too old, to say so.
from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _mend import OPENMMLAB, ROOT, Mender

OLDEST_PYTHON = (3, 10)
# In the order in which they depend on each other, so that the first failure is the cause.
MODULES = (
    'torch',
    'numpy',
    'cv2',
    'pycocotools',
    'mmengine',
    'mmcv',
    'mmcv.ops',
    'mmdet',
    'mmseg',
    'huggingface_hub',
    'safetensors',
    'backbones',
)
# Without them everything works but fetching weights by name.
OPTIONAL = ('huggingface_hub', 'safetensors')


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    status: str
    part: str
    detail: str
    mend: str | None = None


def ok(part: str, detail: str) -> Finding:
    """Make a line about something that is as it should be."""
    return Finding('OK', part, detail)


def warn(part: str, detail: str, mend: str | None = None) -> Finding:
    """Make a line about something that works but may surprise."""
    return Finding('WARN', part, detail, mend)


def fail(part: str, detail: str, mend: str) -> Finding:
    """Make a line about something that does not work."""
    return Finding('FAIL', part, detail, mend)


def installed_versions() -> dict[str, str]:
    """Return the version of every distribution, by its name in the registries' spelling."""
    versions: dict[str, str] = {}
    for found in importlib.metadata.distributions():
        name = found.metadata['Name']
        if name:
            versions.setdefault(re.sub(r'[-_.]+', '-', name).lower(), found.version)
    return versions


def ask(modules: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Import modules in a process of their own, and in another one after each that ends it."""
    script = Path(__file__).with_name('_probe.py')
    waiting = list(modules)
    answers: dict[str, dict[str, Any]] = {}
    while waiting:
        done = subprocess.run(
            [sys.executable, str(script), *waiting],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for answer in map(json.loads, done.stdout.splitlines()):
            answers[answer['module']] = answer
        waiting = [module for module in waiting if module not in answers]
        if waiting:
            reason = f'importing it ends the interpreter (status {done.returncode})'
            answers[waiting.pop(0)] = {'error': reason, 'raised': 'crash'}
    return answers


def check_python(version: tuple[int, ...]) -> Finding:
    """Check the interpreter."""
    text = '.'.join(map(str, version[:3]))
    if tuple(version[:2]) < OLDEST_PYTHON:
        return fail('Python', f'{text} is too old', 'make install PYTHON=python3.12')
    return ok('Python', f'{text}, {sys.executable}')


def check_environment(own: bool) -> list[Finding]:
    """Check that it is the project's environment that is looked at, where there is one."""
    python = ROOT / '.venv' / 'bin' / 'python'
    if own or not python.exists():
        return []
    mend = shlex.join([str(python), str(ROOT / 'tools' / 'doctor.py')])
    return [warn('environment', "this is another one than the project's .venv", mend)]


def check_module(module: str, answer: dict[str, Any], mender: Mender) -> Finding:
    """Check that a module can be imported, and say which distribution it is."""
    distribution = mender.distribution(module)
    version = mender.versions.get(distribution, '')
    name = f'{distribution} {version}'.strip()
    if answer['error'] is None:
        return ok(module, name)
    detail = f'{name}: {answer["error"]}' if version else answer['error']
    status = warn if module in OPTIONAL else fail
    return status(module, detail, mender.for_error(module, answer['error']))


def check_torch(answer: dict[str, Any], mender: Mender) -> Finding:
    """Check torch and say what it was built for."""
    finding = check_module('torch', answer, mender)
    if finding.status != 'OK':
        return finding
    return ok('torch', f'{finding.detail}, {describe_build(answer["cuda"])}')


def describe_build(cuda: str | None) -> str:
    """Say in words what torch was built for."""
    return f'built for CUDA {cuda}' if cuda else 'built without CUDA'


def check_operators(answer: dict[str, Any], mender: Mender) -> Finding:
    """Check that mmcv's compiled operators run on every device."""
    part = 'mmcv operators'
    if answer['error'] is not None:
        return fail(part, answer['error'], mender.for_error('mmcv', answer['error']))
    if answer['failures']:
        failures = '; '.join(f'{device}: {why}' for device, why in answer['failures'].items())
        return fail(part, failures, mender.build_mmcv())
    return ok(part, f'nms runs on {" and ".join(answer["devices"])}')


def check_lines(mender: Mender) -> list[Finding]:
    """Check that no module comes from both lines of OpenMMLab, which share their folders."""
    both = [pair for pair in OPENMMLAB.values() if all(name in mender.versions for name in pair)]
    if not both:
        return []
    uninstall = mender.pip('uninstall', '--yes', *(name for pair in both for name in pair))
    modules = [module for module, pair in OPENMMLAB.items() if pair in both]
    # What is left of one after the other was removed is not usable: both go, one comes back.
    clean = Mender(
        {name: '' for name in mender.versions if all(name not in pair for pair in both)},
        mender.own,
        mender.python,
    )
    installs = dict.fromkeys(clean.install(module) for module in modules)
    names = ', '.join(f'{new} and {old}' for new, old in both)
    return [
        fail(
            'OpenMMLab',
            f'two lines in the same folders: {names}',
            ' && '.join([uninstall, *installs]),
        )
    ]


def check_loading(mender: Mender) -> list[Finding]:
    """Check that this mmengine can load checkpoints with this torch."""
    torch, mmengine = mender.versions.get('torch'), mender.versions.get('mmengine')
    if not (torch and mmengine and 'onedl-mmengine' not in mender.versions):
        return []
    if release(torch) < (2, 6) or release(mmengine) > (0, 10, 7):
        return []
    detail = f'mmengine {mmengine} cannot load checkpoints with torch {torch}, only before 2.6'
    return [fail('loading', detail, mender.pip('install', 'torch<2.6'))]


def release(version: str) -> tuple[int, ...]:
    """Return the numbers of a version, for comparison."""
    return tuple(int(number) for number in re.match(r'[\d.]*', version)[0].split('.') if number)


def check_opencv(mender: Mender) -> list[Finding]:
    """Check that the builds of OpenCV, which share one folder, are of one version."""
    builds = {
        name: version
        for name, version in sorted(mender.versions.items())
        if name.startswith('opencv-')
    }
    if len(set(builds.values())) < 2:
        return []
    version = builds.get('opencv-python') or min(builds.values(), key=release)
    wanted = [f'{name}=={version}' for name in builds]
    detail = 'several builds in one folder: ' + ', '.join(map(' '.join, builds.items()))
    return [
        warn('OpenCV', detail, mender.pip('install', '--force-reinstall', '--no-deps', *wanted))
    ]


def check_backbones(answer: dict[str, Any], mender: Mender) -> Finding:
    """Check that the project's package can be imported, and say where from."""
    if answer['error'] is None:
        return ok('backbones', answer['folder'])
    if "'backbones'" in answer['error'] and (ROOT / 'backbones').is_dir():
        detail = 'not installed: the tools find it, scripts in other folders do not'
        return warn('backbones', detail, mender.install('backbones'))
    return fail('backbones', answer['error'], mender.for_error('backbones', answer['error']))


def check_devices(torch: dict[str, Any], nvidia_driver: bool) -> list[Finding]:
    """Say what there is to compute with."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30
    machine = f'{cores} cores, {memory:.0f} GiB of memory, {platform.machine()}'
    if torch['error'] is not None:
        return [ok('CPU', machine)]
    findings = [ok('CPU', f'{machine}, torch uses {torch["threads"]} threads')]
    for index, gpu in enumerate(torch['gpus']):
        memory = gpu['memory'] / 2**30
        findings.append(ok(f'GPU {index}', f'{gpu["name"]}, {memory:.0f} GiB of memory'))
    if torch['mps']:
        findings.append(ok('MPS', "Apple's GPU can be used"))
    if nvidia_driver and not torch['gpus']:
        build = describe_build(torch['cuda'])
        mend = (
            'nvidia-smi'
            if torch['cuda']
            else "make install TORCH='torch==VERSION --index-url URL'  (both from pytorch.org)"
        )
        findings.append(warn('GPU', f'NVIDIA driver found, but torch ({build}) sees no GPU', mend))
    return findings


def examine() -> list[Finding]:
    """Make the whole report."""
    own = Path(sys.prefix).resolve() == (ROOT / '.venv').resolve()
    mender = Mender(installed_versions(), own)
    answers = ask(MODULES)
    plain = [module for module in MODULES if module not in ('torch', 'mmcv.ops', 'backbones')]
    return [
        check_python(sys.version_info),
        *check_environment(own),
        check_torch(answers['torch'], mender),
        *(check_module(module, answers[module], mender) for module in plain),
        check_operators(answers['mmcv.ops'], mender),
        check_backbones(answers['backbones'], mender),
        *check_lines(mender),
        *check_loading(mender),
        *check_opencv(mender),
        *check_devices(answers['torch'], shutil.which('nvidia-smi') is not None),
    ]


def as_text(findings: list[Finding]) -> str:
    """Lay the report out for reading."""
    lines = []
    for finding in findings:
        lines.append(f'{finding.status:<5} {finding.part:<16} {finding.detail}')
        if finding.mend:
            lines.append(f'{"":<22} mend: {finding.mend}')
    broken = sum(finding.status == 'FAIL' for finding in findings)
    lines.append(f'{broken} of {len(findings)} do not fit.' if broken else 'Everything fits.')
    return '\n'.join(lines)


def main() -> None:
    """Print the report; exit with 1 when something does not fit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--json', action='store_true', help='print the report as JSON')
    options = parser.parse_args()
    findings = examine()
    fits = all(finding.status != 'FAIL' for finding in findings)
    if options.json:
        print(json.dumps({'fits': fits, 'findings': [asdict(f) for f in findings]}, indent=2))
    else:
        print(as_text(findings))
    sys.exit(0 if fits else 1)


if __name__ == '__main__':
    main()
