"""Where a dataset's files lie, by mmengine's rules."""

from pathlib import Path

from mmengine.config import ConfigDict


def annotation_file(dataset: ConfigDict) -> Path:
    """``ann_file``, inside ``data_root`` unless it is absolute."""
    return Path(dataset.get('data_root') or '') / dataset.get('ann_file', '')


def data_folder(dataset: ConfigDict, key: str) -> Path:
    """The folder that ``data_prefix`` has under a key, inside ``data_root`` unless absolute."""
    return Path(dataset.get('data_root') or '') / dataset.get('data_prefix', {}).get(key, '')
