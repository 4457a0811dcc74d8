"""What a user can get wrong, said in one message instead of a traceback."""

import os
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from backbones.checkpoint import CheckpointError

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
