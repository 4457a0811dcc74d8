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
from pathlib import Path

from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.dist import is_main_process
from torch.utils.data import DataLoader

from backbones.errors import DataError
from backbones.files import atomic_write

from .check import Part, check_parts, report_of
from .coco import read_coco, without_images
from .config_datasets import annotation_file, data_folder, datasets_of, option, unwrap_dataset, walk
from .findings import ERROR, Report, count
from .images import content_fault

FOLDER = 'without_bad'
# So many in a row are no matter of single images, but of the pipeline or of the whole set.
MAX_IN_A_ROW = 100
NAMED_IN_LOG = 20


def leave_out_bad(config: Config, splits: tuple[str, ...]) -> None:
    """Let a config read lists without the images that are wrong, and skip what fails later.

    The lists are written to ``without_bad`` in the work folder, and what is not in them, with the
    reason, to ``skipped.json``.

    Args:
        config: A config whose classes are set. Changed in place: ``skip_bad`` is set, datasets and
            metrics read the new lists.
        splits: Which of 'train', 'val' and 'test' will be read.

    Raises:
        ConfigError: The config names classes or a dataset type that there are not.
        DataError: What is wrong is not a matter of single images, or nothing is left.
    """
    config.skip_bad = True
    parts = check_parts(config, splits, read_images=lambda split: split != 'train')
    report = report_of(parts)
    for found in report.of(ERROR):
        if not found.can_be_left_out:
            raise DataError(f'--skip-bad leaves out images, and this is none: {found}')
    for number, part in enumerate(parts):
        if part.layout == 'other':
            continue  # skipped in training
        suffix = '.json' if part.layout == 'coco' else '.txt'
        path = Path(config.work_dir).resolve() / FOLDER / f'{part.split}_{number}{suffix}'
        bad = {found.image for found in part.findings if found.severity == ERROR}
        with atomic_write(path) as partial:
            partial.write_text(text_without(part, bad), encoding='utf-8')
        read_instead(config, part, path)
    tell(report, config)


def text_without(part: Part, bad: set[str | None]) -> str:
    """A COCO file, or a list of names, without images that are wrong.

    Raises:
        DataError: Nothing is left.
    """
    if part.layout == 'coco':
        content = without_images(read_coco(annotation_file(part.dataset)), bad)
        read_coco.cache_clear()
        left, text = content['images'] and content['annotations'], json.dumps(content)
    else:
        left = [sample.name for sample in part.samples if sample.name not in bad]
        if part.layout == 'segmentation':
            folder, suffix = (
                data_folder(part.dataset, 'img_path'),
                option(part.dataset, 'img_suffix'),
            )
            left = [os.path.relpath(path, folder).removesuffix(suffix) for path in left]
        text = '\n'.join(left) + '\n'
    if not left:
        raise DataError(f'--skip-bad leaves nothing of {part.source}')
    return text


def read_instead(config: Config, part: Part, path: Path) -> None:
    """Let all datasets and metrics that read what a dataset reads take a new list."""
    old = annotation_file(part.dataset), str(part.dataset.get('data_prefix'))
    for other in list(datasets_of(config)):
        if (annotation_file(other), str(other.get('data_prefix'))) == old:
            other.ann_file = str(path)
    for key in ('val_evaluator', 'test_evaluator'):
        for node in walk(config.get(key)):
            if node.get('ann_file') and Path(node.ann_file) == old[0]:
                node.ann_file = str(path)


def tell(report: Report, config: Config) -> None:
    """Say what is left out, and write it to the work folder."""
    path = Path(config.work_dir) / 'skipped.json'
    errors = report.of(ERROR)
    images = {(found.split, found.image) for found in errors if found.image}
    content = {
        'images': report.images,
        'left_out_before_training': len(images),
        'reasons': [asdict(found) for found in errors],
    }
    write_json(path, content)
    print('\n'.join(Report(report.images, errors).lines()))
    print(f'--skip-bad: {count(len(images), "image")} left out; {path} names them', flush=True)


def write_json(path: Path, content: dict) -> None:
    with atomic_write(path) as partial:
        text = json.dumps(content, indent=1, ensure_ascii=False)
        partial.write_text(text + '\n', encoding='utf-8')


class SampleError(DataError):
    """A sample that cannot be used; the message names its file.

    Args:
        message: One line. A loader's worker process hands its traceback over instead, as text, in
            the last line of which the message is.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f'{type(self).__name__}: ')[2].strip())


class GuardsDatasets:
    """For a runner: its datasets name the file of a sample that cannot be used.

    It comes before the runner's class among the bases: ``class MyRunner(GuardsDatasets, Runner)``.
    With ``skip_bad = True`` in its config a training draws another sample instead, and names and
    counts at its end what was skipped: in the log, and in ``skipped.json`` in its work folder.
    Validation and testing cannot draw others, for every image counts there.
    """

    def build_dataloader(
        self, dataloader: DataLoader | dict, seed: int | None = None, diff_rank_seed: bool = False
    ) -> DataLoader:
        """Build a loader, as mmengine's runner does.

        Raises:
            DataError: The annotations of its dataset cannot be read.
        """
        try:
            loader = super().build_dataloader(dataloader, seed, diff_rank_seed)
        except (KeyError, ValueError, TypeError, AssertionError) as error:
            sources = [
                str(
                    annotation_file(dataset)
                    if dataset.get('ann_file')
                    else dataset.get('data_root')
                )
                for dataset in unwrap_dataset(dataloader['dataset'])
            ]
            raise DataError(
                f'the dataset of {", ".join(sources)} cannot be built: '
                f'{" ".join(str(error).split())} ({type(error).__name__}). '
                'tools/check_dataset.py CONFIG lists what is wrong in its annotations'
            ) from error
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
        finally:
            if self.cfg.get('skip_bad') and is_main_process():
                self.report_skipped()

    def report_skipped(self) -> None:
        """Log what was skipped, and write it to ``skipped.json``."""
        skipped = read_record(self.skip_record)
        path = Path(self.work_dir) / 'skipped.json'
        content = json.loads(path.read_text(encoding='utf-8')) if path.is_file() else {}
        write_json(path, {**content, 'skipped_in_training': skipped})
        lines = [f'{one["file"]} ({one["times"]}x): {one["reason"]}' for one in skipped]
        if len(lines) > NAMED_IN_LOG:
            lines = [*lines[:NAMED_IN_LOG], f'... and {len(lines) - NAMED_IN_LOG} more']
        summary = f'--skip-bad: {count(len(skipped), "image")} replaced by others; {path}'
        # mmengine's info goes to the log file alone.
        self.logger.warning('\n  '.join([summary, *lines]))


def base_datasets(dataset: object) -> Iterator[BaseDataset]:
    """The datasets inside of wrappers such as RepeatDataset and ConcatDataset."""
    if isinstance(dataset, BaseDataset):
        yield dataset
        return
    for part in (getattr(dataset, 'dataset', None), *getattr(dataset, 'datasets', [])):
        if part is not None:
            yield from base_datasets(part)


def guard(dataset: BaseDataset, skip_record: Path | None = None) -> None:
    """Let a dataset name the file of a sample that cannot be used.

    Args:
        dataset: Changed in place; before a loader starts its worker processes.
        skip_record: Where to note what is skipped. Default: nothing is skipped, a
            :class:`SampleError` is raised.
    """
    dataset.prepare_data = GuardedPreparation(dataset, skip_record)


class GuardedPreparation:
    """Stands for a dataset's ``prepare_data``: from an index to what the model gets, or None."""

    def __init__(self, dataset: BaseDataset, skip_record: Path | None) -> None:
        self.dataset = dataset
        self.skip_record = skip_record
        self.skipped_in_a_row = 0

    def __call__(self, index: int) -> object:
        fault, cause = None, None
        info = self.dataset.get_data_info(index)
        path = str(info.get('img_path'))
        try:
            # What decoders may fill in, or not survive. Not on this disk or missing: theirs to say.
            fault = content_fault(Path(path).read_bytes()) if os.path.isfile(path) else None
            if fault is None:
                # Not the bound method, which this object takes the place of.
                data = type(self.dataset).prepare_data(self.dataset, index)
                self.skipped_in_a_row = 0
                return data
        except MemoryError:
            raise
        except Exception as error:
            fault, cause = f'{type(error).__name__}: {error}', error
        fault = ' '.join(fault.split())
        if self.skip_record is None:
            seg_map = info.get('seg_map_path')
            files = f'{path} with segmentation map {seg_map}' if seg_map else path
            raise SampleError(
                f'{files}: {fault}. tools/check_dataset.py CONFIG lists all that is wrong with the '
                'data; train.py --skip-bad trains on the rest'
            ) from cause
        self.skip(path, fault)
        return None

    def skip(self, file: str, reason: str) -> None:
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > MAX_IN_A_ROW:
            raise SampleError(
                f'--skip-bad: {MAX_IN_A_ROW} images in a row cannot be used, so it is not the '
                f'images; the last is {file}: {reason}'
            )
        line = json.dumps({'file': file, 'reason': reason}, ensure_ascii=False) + '\n'
        # One write to the end of the file, so that processes do not mix their lines.
        record = os.open(self.skip_record, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(record, line.encode())
        finally:
            os.close(record)


def read_record(path: Path) -> list[dict]:
    """What was skipped: file, reason and how many times, the most frequent first."""
    if not path.is_file():
        return []
    entries = map(json.loads, path.read_text(encoding='utf-8').splitlines())
    times = Counter((entry['file'], entry['reason']) for entry in entries)
    ordered = sorted(times.items(), key=lambda item: (-item[1], item[0]))
    return [{'file': file, 'reason': reason, 'times': number} for (file, reason), number in ordered]
