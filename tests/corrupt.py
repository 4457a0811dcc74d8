"""Ways to corrupt a dataset, and a checkpoint."""

import json
import os
from collections.abc import Callable
from pathlib import Path


def cut(path: Path) -> None:
    """Leave half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(path: Path, change: Callable[[dict], object]) -> None:
    """Change the content of a JSON file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def detach(content: dict) -> None:
    """Take all annotations of a COCO file from the first image."""
    content['annotations'] = [a for a in content['annotations'] if a['image_id'] != 1]


class RunsCode:
    """Creates a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)
