"""The order of an installation, and which parts of it are still to be done."""

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

from _install import checks, mmcv
from _install.environment import Environment
from _install.errors import InstallError
from _install.requirements import (
    choose_torch,
    constraints_for_torch,
    lowest_versions,
    read_pins,
    replace_pins,
)
from _install.run import run
from _install.state import State, digest

OPENMMLAB = ('onedl-mmengine', mmcv.DISTRIBUTION, 'onedl-mmdetection', 'onedl-mmsegmentation')


def install(
    root: Path,
    wheelhouse: Path | None,
    torch: str = '',
    repair: bool = False,
    oldest: bool = False,
) -> None:
    """Bring `root`/.venv to the state that requirements/ describes.

    Args:
        root: The checkout.
        wheelhouse: Folder of ready wheels.
        torch: Requirement of another torch, with pip's options.
        repair: Check every part again, whatever earlier runs recorded.
        oldest: Make `root`/.venv-oldest instead, with the lowest versions that requirements/ allow.
    """
    Installation(root, wheelhouse, torch, repair, oldest).run()


class Installation:
    """One run of the installer; a step is a method with a matching `needs_...`."""

    def __init__(
        self, root: Path, wheelhouse: Path | None, torch: str, repair: bool, oldest: bool
    ) -> None:
        self.root = root
        self.wheelhouse = wheelhouse
        self.torch = torch
        self.environment = Environment(root / ('.venv-oldest' if oldest else '.venv'))
        self.state = State(self.environment.folder / 'install-state.json')
        self.repair = repair
        if repair:
            self.state.forget(except_for='torch')
        self.constraints = self._read('requirements/constraints.txt')
        if oldest:
            files = ('runtime.txt', 'export.txt', 'tests.txt')
            lowest = lowest_versions(''.join(self._read(f'requirements/{name}') for name in files))
            # Like any other torch, this one has limits of its own on what the pinned one needs.
            lowest_torch = f'torch=={lowest.pop("torch")}'
            self.torch = torch or lowest_torch
            self.constraints = replace_pins(self.constraints, lowest)
        self.pins = read_pins(self.constraints)
        self.title = ''

    def run(self) -> None:
        """Do what is not done."""
        steps: list[tuple[str, Callable[[], bool], Callable[[], None]]] = [
            ('torch', self.needs_torch, self.install_torch),
            ('build tools', self.needs_build_tools, self.install_build_tools),
            ('mmcv with its operators', self.needs_mmcv, self.install_mmcv),
            ('OpenMMLab and the rest', self.needs_packages, self.install_packages),
            ('this project', self.needs_project, self.install_project),
        ]
        if self.environment.python.exists() and not any(needed() for _, needed, _ in steps):
            print(f'{self.environment.folder.name} is up to date.')
            return
        self.check_machine()
        self.make_environment()
        for number, (title, needed, do) in enumerate(steps, start=1):
            # Asked again: a step may have changed what the next ones depend on.
            if needed():
                self.title = f'[{number}/{len(steps)}] {title}'
                do()
        print(f'Installed; `{self.environment.folder.name}/bin/python tools/doctor.py` shows what.')

    def check_machine(self) -> None:
        """Say what is missing now rather than after a long download."""
        building = self.needs_mmcv() and self._wheel() is None
        large = building or self._torch_to_install()
        checks.require_space(self.root, checks.GIGABYTES if large else checks.GIGABYTES_TO_UPDATE)
        if building:
            checks.require_compiler()

    def make_environment(self) -> None:
        """Make .venv, or make it anew where an interruption left half of it."""
        environment = self.environment
        if environment.works():
            environment.drop_half_installed()
            return
        checks.require_venv_module()
        environment.clear()
        self.state.forget()
        run(environment.make_command(), environment.log, f'Making {environment.folder.name}')

    def needs_torch(self) -> bool:
        """Whether the torch that is wanted is not the one that was installed."""
        never_looked = self.repair or self.state.get('torch') is None
        return never_looked or self._torch_to_install() is not None

    def install_torch(self) -> None:
        """Install torch, or keep the one that is there."""
        record = self.state.get('torch') or {'requirement': '', 'default': False}
        requirement = self._torch_to_install()
        if requirement is None and self.environment.try_code('import torch') is not None:
            requirement = record['requirement'] or self._default_torch()
        if requirement is None:
            print(f'Keeping torch {self._torch_version()}, which is in .venv already.', flush=True)
        else:
            self._fetch_torch(requirement)
            default = requirement == self._default_torch()
            record = {'requirement': requirement, 'default': default}
        self.state.set('torch', {**record, 'version': self._torch_version()})

    def needs_build_tools(self) -> bool:
        """Whether the tools of the mmcv build are missing or outdated."""
        return self.state.get('build') != self._build_key()

    def install_build_tools(self) -> None:
        """Install what building without isolation expects to find."""
        self._pip(['install', *self._limits(), '-r', self._path('requirements/build.txt')])
        self.state.set('build', self._build_key())

    def needs_mmcv(self) -> bool:
        """Whether mmcv is missing, or was built for another torch."""
        return (
            self.environment.version(mmcv.DISTRIBUTION) != self.pins[mmcv.DISTRIBUTION]
            or self.state.get('mmcv') != self._torch_version()
        )

    def install_mmcv(self) -> None:
        """Install mmcv from a ready wheel where one fits this torch, else from source."""
        self._install_mmcv_requirements()
        installed = self.environment.version(mmcv.DISTRIBUTION) == self.pins[mmcv.DISTRIBUTION]
        if not (installed and mmcv.why_broken(self.environment) is None):
            wheel = self._wheel()
            if wheel is None or not self._mmcv_from_wheel(wheel):
                self._mmcv_from_source()
        shutil.rmtree(self._build_folder(), ignore_errors=True)
        self.state.set('mmcv', self._torch_version())

    def needs_packages(self) -> bool:
        """Whether requirements/ changed, or one of the four OpenMMLab packages did."""
        return self.state.get('packages') != self._packages_key() or any(
            self.environment.version(name) != self.pins[name] for name in OPENMMLAB
        )

    def install_packages(self) -> None:
        """Install everything else that the toolkit and its tests need."""
        files = [self._path(f'requirements/{name}.txt') for name in ('runtime', 'tests')]
        arguments = [argument for file in files for argument in ('-r', file)]
        self._pip(['install', '--no-build-isolation', *self._limits(), *arguments])
        self.state.set('packages', self._packages_key())

    def needs_project(self) -> bool:
        """Whether the checkout was not installed, has moved or has other metadata now."""
        return self.state.get('project') != self._project_key()

    def install_project(self) -> None:
        """Install the checkout itself, editable."""
        self._pip(['install', '--no-deps', '--no-build-isolation', '--editable', str(self.root)])
        self.state.set('project', self._project_key())

    def _fetch_torch(self, requirement: str) -> None:
        wanted = shlex.split(requirement)
        if self._torch_version() is not None:
            # pip takes any build of the same version for the right one.
            self._pip(['install', '--force-reinstall', '--no-deps', *wanted], 'replacing')
        # Another torch has limits of its own on what it needs.
        pinned = requirement == self._default_torch()
        limits = ['--constraint', self._path('requirements/constraints.txt')] if pinned else []
        self._pip(['install', *limits, *wanted])

    def _install_mmcv_requirements(self) -> None:
        # Importing mmcv, which is how a build is checked, needs them; mmcv itself comes after.
        names = ('onedl-mmengine', 'opencv-python', 'opencv-python-headless')
        limits = self._limits()
        self._pip(['install', '--no-build-isolation', *limits, *names], 'what it imports')
        if self.environment.try_code('import cv2') is not None:
            # The other build opens windows and needs graphics libraries that servers often lack.
            replace = ['install', '--force-reinstall', '--no-deps', *limits]
            self._pip([*replace, 'opencv-python-headless'], 'OpenCV without windows')
        reason = self.environment.try_code('import cv2, mmengine')
        if reason is not None:
            # Not mmcv's fault, so compiling it would not help.
            raise InstallError(f'what mmcv needs cannot be imported: {reason}; remove .venv')

    def _mmcv_from_wheel(self, wheel: Path) -> bool:
        self._pip(['install', '--force-reinstall', '--no-deps', str(wheel)], wheel.name)
        reason = mmcv.why_broken(self.environment)
        if reason is not None:
            print(f'{wheel.name} does not fit torch {self._torch_version()}: {reason}')
        return reason is None

    def _mmcv_from_source(self) -> None:
        checks.require_compiler()
        checks.require_space(self.root, checks.GIGABYTES)
        requirement = f'{mmcv.DISTRIBUTION}=={self.pins[mmcv.DISTRIBUTION]}'
        folder = self._build_folder()
        if not list(folder.glob('*.tar.gz')):
            from_source = ['--no-build-isolation', '--no-binary', mmcv.DISTRIBUTION]
            self._pip(
                ['download', '--no-deps', *from_source, '--dest', str(folder), requirement],
                'source',
            )
        replace = ['install', '--force-reinstall', '--no-deps']
        source = mmcv.unpack_source(folder, self._torch_version())
        print(
            'mmcv is compiled for this torch now: about a quarter of an hour on two cores. '
            'Interrupted, it goes on where it stopped.',
            flush=True,
        )
        self._pip(
            [*replace, '--verbose', '--no-build-isolation', str(source)],
            'compiling',
            mmcv.build_variables(),
        )
        reason = mmcv.why_broken(self.environment)
        if reason is not None:
            raise InstallError(
                f'mmcv was built for torch {self._torch_version()} but cannot be imported: '
                f'{reason}; choose another TORCH'
            )

    def _torch_to_install(self) -> str | None:
        return choose_torch(
            self.torch, self._default_torch(), self._torch_version(), self.state.get('torch')
        )

    def _default_torch(self) -> str:
        return f'torch=={self.pins["torch"]}'

    def _torch_version(self) -> str | None:
        return self.environment.version('torch')

    def _wheel(self) -> Path | None:
        version = self.pins[mmcv.DISTRIBUTION]
        return mmcv.find_wheel(self.wheelhouse, version, self.environment.python_version())

    def _limits(self) -> list[str]:
        version = self._torch_version()
        required = self.environment.requires('torch')
        file = self.environment.folder / 'constraints.txt'
        file.write_text(constraints_for_torch(self.constraints, version, required))
        return ['--constraint', str(file)]

    def _build_folder(self) -> Path:
        return self.environment.folder / 'build'

    def _build_key(self) -> str:
        return digest(
            self._read('requirements/build.txt'), self.constraints, str(self._torch_version())
        )

    def _packages_key(self) -> str:
        files = (f'requirements/{name}.txt' for name in ('runtime', 'export', 'tests'))
        return digest(*map(self._read, files), self.constraints, str(self._torch_version()))

    def _project_key(self) -> str:
        return digest(self._read('pyproject.toml'), str(self.root))

    def _path(self, name: str) -> str:
        return str(self.root / name)

    def _read(self, name: str) -> str:
        return (self.root / name).read_text()

    def _pip(
        self, arguments: list[str], what: str = '', variables: dict[str, str] | None = None
    ) -> None:
        command, *rest = arguments
        # Beside the user's own configuration, never instead of it: it may be what has torch.
        places = ['--find-links', str(self.wheelhouse)] if self.wheelhouse else []
        pip = [str(self.environment.python), '-m', 'pip', command, '--no-input']
        run(
            [*pip, '--progress-bar', 'off', *places, *rest],
            self.environment.log,
            f'{self.title}: {what}' if what else self.title,
            variables,
        )
