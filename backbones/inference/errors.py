"""What can be wrong with one input while the others go on, and what ends a run."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

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
