"""``--skip-bad``: a training on what is left of a dataset without what is wrong in it.

What annotations and segmentation maps show, and all of validation, is left out before the training.
Images of a detector's training, which would take long to read twice, are skipped when they turn out
to be unreadable. Without ``--skip-bad`` such an image ends the run with its name.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.dist import is_main_process
from torch.utils.data import DataLoader

from backbones.errors import DataError
from backbones.files import atomic_write

from .check import check_dataset
from .coco import read_coco, without_images
from .config_datasets import annotation_file, data_folder, datasets_of, option, walk
from .findings import ERROR, LINES_PER_KIND, CheckedDataset, count
from .images import content_fault


def leave_out_bad(config: Config, splits: tuple[str, ...]) -> None:
    """Let a config read lists without the images that have errors, and skip what fails later.

    The lists are written to ``without_bad`` in the work folder, and what is not in them, with the
    reason, to ``skipped.json``. Datasets and metrics of the config, whose classes are set, then
    read the new lists.

    Raises:
        DataError: What is wrong is not a matter of single images, or nothing is left.
    """
    config.skip_bad = True
    report = check_dataset(config, splits, decode=('val', 'test'))
    errors = report.of(ERROR)
    for found in errors:
        if found.image is None:
            raise DataError(f'--skip-bad leaves out images, and this is none: {found}')
    work_dir = Path(config.work_dir).resolve()
    for number, checked in enumerate(report.datasets):
        bad = {found.image for found in checked.findings if found.severity == ERROR}
        # Of other layouts they are skipped in training.
        if bad and checked.layout != 'other':
            suffix = '.json' if checked.layout == 'coco' else '.txt'
            path = work_dir / 'without_bad' / f'{checked.split}_{number}{suffix}'
            write(path, text_without(checked, bad))
            read_instead(config, checked, path)
    left_out = len({(found.split, found.image) for found in errors if found.image})
    path = work_dir / 'skipped.json'
    record = {'left_out_before_training': left_out, 'reasons': [asdict(one) for one in errors]}
    write(path, json.dumps(record, indent=1, ensure_ascii=False))
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


def write(path: Path, text: str) -> None:
    with atomic_write(path) as partial:
        partial.write_text(text + '\n', encoding='utf-8')


class SampleError(DataError):
    """A sample that cannot be used; the message names its file.

    A loader's worker process hands its traceback over as the message, which is in the last line.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f'{type(self).__name__}: ')[2].strip())


class GuardsDatasets:
    """A base of a runner, before mmengine's: its datasets name the file of an unusable sample.

    With ``skip_bad = True`` in its config a training draws another sample instead, and names and
    counts at its end what was skipped: in the log, and in ``skipped.json`` in its work folder.
    Validation and testing cannot draw others, for every image counts there.
    """

    def build_dataloader(
        self, dataloader: DataLoader | dict, seed: int | None = None, diff_rank_seed: bool = False
    ) -> DataLoader:
        """Build a loader whose datasets are guarded."""
        loader = super().build_dataloader(dataloader, seed, diff_rank_seed)
        for dataset in base_datasets(loader.dataset):
            skips = bool(self.cfg.get('skip_bad')) and not dataset.test_mode
            guard(dataset, self.skip_record if skips else None)
        return loader

    @property
    def skip_record(self) -> Path:
        """Where all processes of a run note what they skip, one JSON object a line."""
        return Path(self.work_dir) / self.timestamp / 'skipped.jsonl'

    def train(self) -> object:
        """Train, then say what was skipped; returns the model."""
        try:
            return super().train()
        except Exception as error:
            # mmengine's, after a thousand draws; a worker process hands it over with its traceback.
            if 'Cannot find valid image' not in str(error):
                raise
            raise DataError(
                '--skip-bad: a thousand images in a row cannot be used, so that it is not the '
                f'images; {self.work_dir}/skipped.json has the reasons'
            ) from error
        finally:
            if self.cfg.get('skip_bad') and is_main_process():
                self.report_skipped()

    def report_skipped(self) -> None:
        skipped = read_record(self.skip_record)
        path = Path(self.work_dir) / 'skipped.json'
        record = json.loads(path.read_text(encoding='utf-8')) if path.is_file() else {}
        record['skipped_in_training'] = skipped
        write(path, json.dumps(record, indent=1, ensure_ascii=False))
        lines = [f'--skip-bad: {count(len(skipped), "image")} replaced by others; {path}']
        for one in skipped[:LINES_PER_KIND]:
            lines.append(f'{one["file"]} ({one["times"]}x): {one["reason"]}')
        # mmengine's info goes to the log file alone.
        self.logger.warning('\n  '.join(lines))


def base_datasets(dataset: object) -> Iterator[BaseDataset]:
    """The datasets inside of wrappers such as RepeatDataset and ConcatDataset."""
    if isinstance(dataset, BaseDataset):
        yield dataset
        return
    for part in (getattr(dataset, 'dataset', None), *getattr(dataset, 'datasets', [])):
        if part is not None:
            yield from base_datasets(part)


def guard(dataset: BaseDataset, skip_record: Path | None = None) -> None:
    """Let a dataset name the file of an unusable sample, or skip it if there is a record for it."""
    dataset.prepare_data = partial(prepare_guarded, dataset, skip_record)


def prepare_guarded(dataset: BaseDataset, skip_record: Path | None, index: int) -> object:
    """What a dataset makes of a sample; None where it is skipped, and mmengine draws another."""
    fault, cause = None, None
    info = dataset.get_data_info(index)
    path = str(info.get('img_path'))
    try:
        # What decoders may fill in, or not survive. Not on this disk or missing: theirs to say.
        fault = content_fault(Path(path).read_bytes()) if os.path.isfile(path) else None
        if fault is None:
            # Not the bound method, which this function takes the place of.
            return type(dataset).prepare_data(dataset, index)
    except MemoryError:
        raise
    except Exception as error:
        fault, cause = f'{type(error).__name__}: {error}', error
    fault = ' '.join(fault.split())
    if skip_record is not None:
        line = json.dumps({'file': path, 'reason': fault}, ensure_ascii=False) + '\n'
        # Processes do not mix their lines: each is one write to the end of the file.
        with open(skip_record, 'ab', buffering=0) as record:
            record.write(line.encode())
        return None
    seg_map = info.get('seg_map_path')
    files = f'{path} with segmentation map {seg_map}' if seg_map else path
    raise SampleError(
        f'{files}: {fault}. tools/check_dataset.py CONFIG lists all that is wrong with the '
        'data; train.py --skip-bad trains on the rest'
    ) from cause


def read_record(path: Path) -> list[dict]:
    """What was skipped: file, reason and how many times, the most frequent first."""
    times = Counter(path.read_text(encoding='utf-8').splitlines() if path.is_file() else ())
    return [{**json.loads(line), 'times': number} for line, number in times.most_common()]
