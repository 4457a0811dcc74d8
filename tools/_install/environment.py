"""The virtual environment: making it, mending it, asking what is in it."""

import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path


class Environment:
    """A folder made by `python -m venv`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / 'bin' / 'python'
        self.log = folder / 'install.log'

    def works(self) -> bool:
        """Tell whether its Python starts and has pip, which a half-made one does not."""
        if not self.python.exists() or self.try_code('') is not None:
            return False
        if self.try_code('import pip._internal.cli.main') is None:
            return True
        # Other tools make environments without pip; theirs must not be thrown away for that.
        return self.try_code('import ensurepip; ensurepip.bootstrap()') is None

    def clear(self) -> None:
        """Empty the folder, log included, so that it can be made anew."""
        if self.folder.is_dir():
            shutil.rmtree(self.folder)
        self.folder.mkdir()

    def make_command(self) -> list[str]:
        """Return the command that makes the environment."""
        # Run from inside the environment that was just cleared, sys.executable is gone.
        python = getattr(sys, '_base_executable', None) or sys.executable
        return [python, '-m', 'venv', str(self.folder)]

    def python_version(self) -> tuple[int, int]:
        """Return the version of its Python; of the running one where there is none yet."""
        for library in self.folder.glob('lib/python3.*'):
            return 3, int(library.name.partition('.')[2])
        return sys.version_info[:2]

    def version(self, distribution: str) -> str | None:
        """Return the installed version, read from the metadata: no process is started."""
        for found in importlib.metadata.distributions(name=distribution, path=self._site()):
            return found.version
        return None

    def requires(self, distribution: str) -> list[str]:
        """Return what an installed distribution asks for."""
        for found in importlib.metadata.distributions(name=distribution, path=self._site()):
            return found.requires or []
        return []

    def drop_half_installed(self) -> None:
        """Make pip see that what it was interrupted in is not installed."""
        for site in self._site():
            for metadata in Path(site).glob('*.dist-info'):
                # pip writes this file after the last one of the package.
                if not (metadata / 'INSTALLER').exists():
                    shutil.rmtree(metadata)

    def try_code(self, code: str) -> str | None:
        """Run a line of Python in the environment; return its error, None if there is none."""
        command = [str(self.python), '-c', code]
        try:
            done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True)
        except OSError as error:
            return str(error)
        if done.returncode == 0:
            return None
        lines = done.stderr.strip().splitlines()
        return lines[-1] if lines else f'the interpreter ended with status {done.returncode}'

    def _site(self) -> list[str]:
        return [str(path) for path in self.folder.glob('lib/python*/site-packages')]
