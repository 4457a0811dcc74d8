"""Errors that a user can fix: each says what is wrong, where, and what to do."""

import errno
import os
import struct
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType


class ConfigError(ValueError):
    """Error in a config, or in an option on the command line."""


class DataError(ValueError):
    """Error for images or annotations that are missing, unreadable or do not fit the config."""


class CheckpointError(RuntimeError):
    """Error for a checkpoint that cannot be read, or does not fit the model."""


class ExportError(ConfigError):
    """Error for a model that cannot be exported, or whose file computes other results."""


class InputError(ValueError):
    """Error for an image or video that cannot be read; the run continues with other inputs."""


class NotMediaError(InputError):
    """Error for a file that is neither an image nor a video."""


class StorageError(InputError):
    """Error of a storage, not of a file in it, such as no answer; later the file may be read."""


class OutputError(OSError):
    """Error after which nothing more can be written, such as a full disk; the run ends."""


# Errors of a path that a user gave.
PATH_ERRORS = (
    *(FileExistsError, FileNotFoundError, PermissionError),
    *(IsADirectoryError, NotADirectoryError),
)

# Errors that Pillow's decoders raise on corrupt bytes.
IMAGE_DECODE_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, AttributeError),
    *(struct.error, ArithmeticError, RuntimeError),
)

# With these errors, writing the next file would fail as well.
FATAL_OUTPUT_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def in_one_line(error: BaseException) -> str:
    """Return an error's message, or its type if it has none; at most 500 characters."""
    return ' '.join(str(error).split())[:500] or type(error).__name__


def reason_of(error: Exception) -> str:
    """Return :func:`in_one_line`, without the number and the path of an OSError."""
    return getattr(error, 'strerror', None) or in_one_line(error)


def first_of(names: Sequence[str], max_names: int = 6) -> str:
    """Return the first names and the number of the others: 'a, b and 3 more'."""
    shown = ', '.join(names[:max_names]) or 'nothing'
    return shown if len(names) <= max_names else f'{shown} and {len(names) - max_names} more'


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """End the program on a user's error: with a message and exit code 1, without a traceback."""
    try:
        yield
    except (ConfigError, DataError, CheckpointError, OutputError, *PATH_ERRORS) as error:
        rank = int(os.environ.get('RANK', 0))
        where = f' (rank {rank})' if int(os.environ.get('WORLD_SIZE', 1)) > 1 else ''
        print(f'\nerror{where}: {error}', file=sys.stderr, flush=True)
        sys.exit(1)


@contextmanager
def raise_output_errors(advice: str = '') -> Iterator[None]:
    """Raise OutputError, with ``advice``, for an OSError that the next file would raise as well."""
    try:
        yield
    except OSError as error:
        if error.errno not in FATAL_OUTPUT_ERRNOS:
            raise
        place = f' to {error.filename}' if error.filename else ''
        reason = os.strerror(error.errno)
        raise OutputError(
            error.errno, f'nothing more can be written{place}: {reason}{advice}'
        ) from error


def import_optional(package: str, purpose: str, requirements: str = 'export') -> ModuleType:
    """Import a package; raise ConfigError if it is missing, with the ``purpose`` that needs it.

    ``requirements`` is the file in ``requirements/`` that lists the package.
    """
    try:
        return import_module(package)
    except (ImportError, OSError) as error:
        wanted = f'-r requirements/{requirements}.txt'
        if requirements == 'runtime':
            # It also lists OpenMMLab, whose other line may be installed here.
            wanted = package.partition('.')[0]
        raise ConfigError(
            f'{purpose} needs the package {package}: pip install {wanted} ({in_one_line(error)})'
        ) from error
