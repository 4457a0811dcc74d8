"""``--skip-bad``: train on a dataset without its images that have errors.

Images with errors in annotations or segmentation maps, and all bad images of validation, are left
out before the training. Reading all training images first would take long, so unreadable ones are
skipped during the training. Without ``--skip-bad``, such an image ends the run with its name.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

from mmengine.config import Config
from mmengine.dataset import BaseDataset

from backbones.errors import DataError
from backbones.files import atomic_write, write_text

from .check import check_dataset
from .coco import read_coco, without_images
from .config_datasets import annotation_file, data_folder, datasets_of, option, walk
from .findings import ERROR, CheckedDataset, Finding, count, printable
from .images import content_fault

# The findings on what was left out, in the work folder: one JSON object per line.
SKIPPED = 'skipped.jsonl'
IN_TRAINING = 'skipped in training'


def leave_out_bad(config: Config, splits: tuple[str, ...], folder: str = '') -> None:
    """Let a config read lists without the images that have errors, and skip images that fail later.

    ``without_bad``, in ``folder`` of the work folder, gets the lists, ``skipped.jsonl`` beside it
    what is left out. The classes of the config must be set. Raises DataError for errors that are
    not of single images.
    """
    config.skip_bad = True
    report = check_dataset(config, splits, decode=('val', 'test'))
    errors = report.of(ERROR)
    for found in errors:
        if found.image is None:
            raise DataError(f'--skip-bad leaves out images, but this error is not of one: {found}')
    work_dir = Path(config.work_dir, folder).resolve()
    for number, checked in enumerate(report.datasets):
        bad = {found.image for found in checked.findings if found.severity == ERROR}
        # Images of other layouts are skipped in training.
        if bad and checked.layout != 'other':
            suffix = '.json' if checked.layout == 'coco' else '.txt'
            path = work_dir / 'without_bad' / f'{checked.split}_{number}{suffix}'
            write_text(path, text_without(checked, bad))
            read_instead(config, checked, path)
    left_out = len({(found.split, found.image) for found in errors if found.image})
    path = work_dir / SKIPPED
    with atomic_write(path) as new:
        new.write_text(''.join(map(line_of, errors)), encoding='utf-8')
    print('\n'.join(report.lines([ERROR])))
    print(f'--skip-bad: {count(left_out, "image")} left out; {path} names them', flush=True)


def text_without(checked: CheckedDataset, bad: set[str | None]) -> str:
    """Return a COCO file, or a list of names, without bad images; raise DataError if all are."""
    dataset = checked.dataset
    if checked.layout == 'coco':
        content = without_images(read_coco(annotation_file(dataset)), bad)
        read_coco.cache_clear()
        left, text = content['images'] and content['annotations'], json.dumps(content)
    else:
        left = [sample.name for sample in checked.samples if sample.name not in bad]
        if checked.layout == 'segmentation':
            folder, suffix = data_folder(dataset, 'img_path'), option(dataset, 'img_suffix')
            left = [os.path.relpath(path, folder).removesuffix(suffix) for path in left]
        text = '\n'.join(left)
    if not left:
        raise DataError(f'--skip-bad leaves nothing of {checked.source}')
    return text


def read_instead(config: Config, checked: CheckedDataset, path: Path) -> None:
    """Let all datasets and metrics that read the same file as a dataset read a new list."""
    file, folders = annotation_file(checked.dataset), checked.dataset.get('data_prefix')
    for dataset in list(datasets_of(config)):
        if annotation_file(dataset) == file and dataset.get('data_prefix') == folders:
            dataset.ann_file = str(path)
    for node in walk([config.get('val_evaluator'), config.get('test_evaluator')]):
        if node.get('ann_file') and Path(node.ann_file).resolve() == file.resolve():
            node.ann_file = str(path)


def line_of(found: Finding) -> str:
    return printable(json.dumps(asdict(found), ensure_ascii=False)) + '\n'


def count_skipped(path: Path) -> int:
    """Return how many images a training has skipped, by its ``skipped.jsonl``, if there is one."""
    if not path.is_file():
        return 0
    with path.open(encoding='utf-8') as lines:
        found = [json.loads(line) for line in lines]
    return len({one['file'] for one in found if one['kind'] == IN_TRAINING})


class SampleError(DataError):
    """Error for a sample that cannot be used; the message names its file.

    A loader's worker process passes its traceback as the message; the last line is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f'{type(self).__name__}: ')[2].strip())


def base_datasets(dataset: object) -> Iterator[BaseDataset]:
    """Yield the datasets inside wrappers such as RepeatDataset and ConcatDataset."""
    if isinstance(dataset, BaseDataset):
        yield dataset
        return
    for part in (getattr(dataset, 'dataset', None), *getattr(dataset, 'datasets', [])):
        if part is not None:
            yield from base_datasets(part)


def guard(dataset: BaseDataset, skip_record: Path | None = None) -> None:
    """Let a dataset raise an error that names the file of an unusable sample.

    With ``skip_record``, which the processes of a run share, it skips and records the sample.
    """
    dataset.prepare_data = partial(prepare_guarded, dataset, skip_record)


def prepare_guarded(dataset: BaseDataset, skip_record: Path | None, index: int) -> object:
    """Prepare a sample; return None if it is skipped, so that mmengine draws another."""
    info = dataset.get_data_info(index)
    path = str(info.get('img_path'))
    try:
        # Decoders may fill in such files, or crash. They report missing files themselves.
        if os.path.isfile(path) and (fault := content_fault(Path(path).read_bytes())):
            raise DataError(fault)
        # Not the bound method, which this function replaces.
        return type(dataset).prepare_data(dataset, index)
    except MemoryError:
        raise
    except Exception as error:
        kind = '' if type(error) is DataError else f'{type(error).__name__}: '
        fault = kind + ' '.join(str(error).split())
        if skip_record is None:
            seg_map = info.get('seg_map_path')
            files = f'{path} with segmentation map {seg_map}' if seg_map else path
            raise SampleError(
                f'{files}: {fault}. tools/check_dataset.py CONFIG lists all errors in the '
                'data; train.py --skip-bad trains on the rest'
            ) from error
    found = Finding(ERROR, IN_TRAINING, path, fault, split='train')
    # One write to the end of the file per line, so that processes do not mix their lines.
    with open(skip_record, 'ab', buffering=0) as record:
        record.write(line_of(found).encode())
    return None
