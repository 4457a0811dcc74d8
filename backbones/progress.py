"""Progress bars."""

import shutil
import sys
from typing import Any

from tqdm import tqdm


class ProgressBar(tqdm):
    """tqdm's bar; in a log file it prints a line at most every 30 seconds."""

    def __init__(self, *args: Any, **options: Any) -> None:
        # Left to itself, tqdm shows nothing where the size is not known, as with `docker run -t`.
        size = shutil.get_terminal_size()
        options |= dict(ncols=size.columns, nrows=size.lines)
        is_terminal = options.get('file', sys.stderr).isatty()
        super().__init__(*args, mininterval=0.1 if is_terminal else 30, **options)
