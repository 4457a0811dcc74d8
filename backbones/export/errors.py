"""What can be wrong with an export."""

from importlib import import_module
from types import ModuleType

from backbones.errors import ExportError

# As in requirements/export.txt.
INSTALL = 'pip install -r requirements/export.txt'


def need(package: str, purpose: str) -> ModuleType:
    """Import a package that only exported files need.

    Args:
        package: Its import name.
        purpose: What it is for, as the beginning of a sentence.

    Raises:
        ExportError: It is not installed, or does not fit what is.
    """
    try:
        return import_module(package)
    except (ImportError, OSError) as error:
        reason = ' '.join(str(error).split())
        raise ExportError(f'{purpose} needs the package {package}: {INSTALL} ({reason})') from error
