"""What a user can get wrong, said in one message instead of a traceback."""

import errno
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# What Pillow's readers raise on damaged bytes.
DAMAGED_PICTURE = (
    *(OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, AttributeError),
    *(struct.error, ArithmeticError, RuntimeError),
)


class ConfigError(ValueError):
    """A config, or an option on the command line, that cannot work."""


class DataError(ValueError):
    """Pictures or annotations that are missing, unreadable or at odds with the config."""


@contextmanager
def clear_errors() -> Iterator[None]:
    """End the program with a message and exit code 1 on an error that the user can mend."""
    try:
        yield
    except (ConfigError, DataError, CheckpointError, FileNotFoundError) as error:
        rank = int(os.environ.get('RANK', 0))
        where = f' (rank {rank})' if int(os.environ.get('WORLD_SIZE', 1)) > 1 else ''
        print(f'\nerror{where}: {error}', file=sys.stderr, flush=True)
        sys.exit(1)


class CheckpointError(RuntimeError):
    """A checkpoint that does not hold the backbone it is loaded into."""


class ExportError(ConfigError):
    """What was asked for cannot be exported, or a file's results are not the model's."""


# Errors that the next input would meet as well.
LASTING_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


class InputError(ValueError):
    """A picture or video that cannot be read; the message says why, its caller knows which."""


class OutputError(OSError):
    """Nothing more can be written, to a full disk for instance."""


@contextmanager
def lasting_errors() -> Iterator[None]:
    """Tell the errors that end a run from those of a single file.

    Raises:
        OutputError: In the place of an OSError that the next file would meet as well.
    """
    try:
        yield
    except OSError as error:
        if error.errno in LASTING_ERRORS:
            raise OutputError(
                error.errno, f'nothing more can be written: {os.strerror(error.errno)}'
            ) from error
        raise
