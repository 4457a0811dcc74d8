"""``--skip-bad``: a training on what is left of a dataset without what is wrong in it.

What annotations and segmentation maps show, and all of validation, is left out before the training.
Training images, which would take long to read twice, are skipped when they turn out to be
unreadable. Without ``--skip-bad`` such an image ends the run with its name.
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

# Findings for which something was left out, in the work folder: a JSON object a line.
SKIPPED = 'skipped.jsonl'
IN_TRAINING = 'skipped in training'


def leave_out_bad(config: Config, splits: tuple[str, ...], folder: str = '') -> None:
    """Let a config read lists without the images that have errors, and skip what fails later.

    The lists go to ``without_bad`` in that ``folder`` of the work folder, what is not in them to
    ``skipped.jsonl`` beside it. The classes of the config have to be set. DataError where more than
    single images are wrong.
    """
    config.skip_bad = True
    report = check_dataset(config, splits, decode=('val', 'test'))
    errors = report.of(ERROR)
    for found in errors:
        if found.image is None:
            raise DataError(f'--skip-bad leaves out images, and this is none: {found}')
    work_dir = Path(config.work_dir, folder).resolve()
    for number, checked in enumerate(report.datasets):
        bad = {found.image for found in checked.findings if found.severity == ERROR}
        # Of other layouts they are skipped in training.
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
    """A COCO file, or a list of names, without images that have errors; DataError if all have."""
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
    """Let all datasets and metrics that read what a dataset reads take a new list."""
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
    """How many images a training has skipped, by its ``skipped.jsonl``, if there is one."""
    if not path.is_file():
        return 0
    with path.open(encoding='utf-8') as lines:
        found = [json.loads(line) for line in lines]
    return len({one['file'] for one in found if one['kind'] == IN_TRAINING})


class SampleError(DataError):
    """A sample that cannot be used; the message names its file.

    A loader's worker process hands its traceback over as the message, which is in the last line.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f'{type(self).__name__}: ')[2].strip())


def base_datasets(dataset: object) -> Iterator[BaseDataset]:
    """The datasets inside of wrappers such as RepeatDataset and ConcatDataset."""
    if isinstance(dataset, BaseDataset):
        yield dataset
        return
    for part in (getattr(dataset, 'dataset', None), *getattr(dataset, 'datasets', [])):
        if part is not None:
            yield from base_datasets(part)


def guard(dataset: BaseDataset, skip_record: Path | None = None) -> None:
    """Let a dataset name the file of an unusable sample, or skip it if there is a record for it.

    The processes of a run share the record.
    """
    dataset.prepare_data = partial(prepare_guarded, dataset, skip_record)


def prepare_guarded(dataset: BaseDataset, skip_record: Path | None, index: int) -> object:
    """What a dataset makes of a sample; None where it is skipped, and mmengine draws another."""
    info = dataset.get_data_info(index)
    path = str(info.get('img_path'))
    try:
        # What decoders may fill in, or not survive. Not on this disk or missing: theirs to say.
        if os.path.isfile(path) and (fault := content_fault(Path(path).read_bytes())):
            raise DataError(fault)
        # Not the bound method, which this function takes the place of.
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
                f'{files}: {fault}. tools/check_dataset.py CONFIG lists all that is wrong with the '
                'data; train.py --skip-bad trains on the rest'
            ) from error
    found = Finding(ERROR, IN_TRAINING, path, fault, split='train')
    # Processes do not mix their lines: each is one write to the end of the file.
    with open(skip_record, 'ab', buffering=0) as record:
        record.write(line_of(found).encode())
    return None
