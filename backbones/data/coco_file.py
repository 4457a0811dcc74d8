"""Reading a COCO annotation file, with an error for everything that keeps it from being one."""

import json
from functools import lru_cache
from pathlib import Path

from backbones.errors import DataError

COCO_SOURCE = (
    'COCO is at https://cocodataset.org/#download: unpack train2017, val2017 and annotations '
    'into data/coco, or link the folder there'
)


@lru_cache(maxsize=4)
def read_coco(path: Path) -> dict:
    """The contents of a COCO annotation file.

    Raises:
        DataError: It is missing, not JSON, or lacks images, annotations or categories.
    """
    if not path.is_file():
        raise DataError(
            f'there is no annotation file {path} (data_root and ann_file say so). {COCO_SOURCE}; '
            'for data of your own set data_root and ann_file'
        )
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    # ValueError: not UTF-8, not JSON, or a number of thousands of digits.
    except (ValueError, RecursionError) as error:
        what = 'empty' if path.stat().st_size == 0 else f'not JSON: {error}'
        raise DataError(f'{path} is {what}') from error
    if not isinstance(content, dict):
        raise DataError(f'{path} is not a COCO file: it holds a {type(content).__name__}')
    for key in ('images', 'annotations', 'categories'):
        if not isinstance(content.get(key), list) or not content[key]:
            raise DataError(f'{path} is not a COCO file to train or test on: it has no {key}')
    return content


def is_text(value: object) -> bool:
    """Whether a name is text that can be printed, written and be the name of a file."""
    if not isinstance(value, str) or '\0' in value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a pair of code units, which JSON can spell
        return False
    return True
