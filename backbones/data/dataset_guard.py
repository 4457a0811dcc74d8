"""A sample that cannot be used is named, or replaced by another one.

mmengine lets whatever a dataset's pipeline raises end the run with a traceback, often one that
names no picture, and some faults end the process without any: pycocotools on a polygon with NaN.
"""

import io
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from mmengine.dataset import BaseDataset
from mmengine.dist import is_main_process
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader

from backbones.errors import DataError

from .check_files import content_fault, header_size
from .config_datasets import unwrap_dataset
from .findings import count
from .masks import box_fault, mask_fault
from .paths import annotation_file

# So many in a row are no matter of single pictures, but of the pipeline or of the whole set.
MOST_IN_A_ROW = 100
NAMED_IN_LOG = 20


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
    Validation and testing cannot draw others, for every picture counts there.
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
            raise DataError(
                f'the data set of {", ".join(sources_of(dataloader))} cannot be built: '
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
        content['skipped_in_training'] = skipped
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
        lines = [f'{one["file"]} ({one["times"]}x): {one["reason"]}' for one in skipped]
        if len(lines) > NAMED_IN_LOG:
            lines = [*lines[:NAMED_IN_LOG], f'... and {len(lines) - NAMED_IN_LOG} more']
        # mmengine's info goes to the log file alone.
        self.logger.warning(
            '\n  '.join(
                [f'--skip-bad: {count(len(skipped), "picture")} replaced by others; {path}', *lines]
            )
        )


def sources_of(dataloader: dict) -> list[str]:
    """What the datasets of a loader's config are read from."""
    return [
        str(annotation_file(dataset) if dataset.get('ann_file') else dataset.get('data_root'))
        for dataset in unwrap_dataset(dataloader['dataset'])
    ]


def base_datasets(dataset: object) -> Iterator[BaseDataset]:
    """The datasets inside of wrappers such as RepeatDataset and ConcatDataset."""
    if isinstance(dataset, BaseDataset):
        yield dataset
        return
    inner = [getattr(dataset, 'dataset', None), *getattr(dataset, 'datasets', [])]
    for part in inner:
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
        try:
            fault = sample_fault(info, self.reads_masks())
            if fault is None:
                # Not the bound method, which this object takes the place of.
                data = type(self.dataset).prepare_data(self.dataset, index)
                self.skipped_in_a_row = 0
                return data
        except MemoryError:
            raise
        except Exception as error:
            fault, cause = f'{type(error).__name__}: {error}', error
        file, fault = str(info.get('img_path')), ' '.join(fault.split())
        if self.skip_record is None:
            raise SampleError(
                f'{name_files(info)}: {fault}. tools/check_dataset.py CONFIG lists all that is '
                'wrong with the data; train.py --skip-bad trains on the rest'
            ) from cause
        self.skip(file, fault)
        return None

    def reads_masks(self) -> bool:
        transforms = getattr(self.dataset.pipeline, 'transforms', [])
        return any(getattr(transform, 'with_mask', False) for transform in transforms)

    def skip(self, file: str, reason: str) -> None:
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > MOST_IN_A_ROW:
            raise SampleError(
                f'--skip-bad: {MOST_IN_A_ROW} pictures in a row cannot be used, so it is not the '
                f'pictures; the last is {file}: {reason}'
            )
        line = json.dumps({'file': file, 'reason': reason}, ensure_ascii=False) + '\n'
        # One write to the end of the file, so that processes do not mix their lines.
        record = os.open(self.skip_record, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(record, line.encode())
        finally:
            os.close(record)


def sample_fault(info: dict, reads_masks: bool) -> str | None:
    """What the pipeline would not notice, or not survive; None if there is nothing.

    Args:
        info: What the dataset knows of the sample.
        reads_masks: Whether the pipeline loads the masks of objects.
    """
    for instance in info.get('instances', []):
        fault = box_fault(instance['bbox']) if 'bbox' in instance else None
        if not fault and reads_masks and 'height' in info:
            fault = mask_fault(instance.get('mask'), info['height'], info['width'])
        if fault:
            return fault
    path, label_map = info.get('img_path'), info.get('seg_map_path')
    if not isinstance(path, str) or not os.path.isfile(path):
        return None  # elsewhere than on a disk, or missing, which the pipeline says
    content = Path(path).read_bytes()
    fault = content_fault(content)
    if fault or not label_map or not os.path.isfile(label_map):
        return fault
    return label_map_fault(content, label_map)


def label_map_fault(content: bytes, label_map: str) -> str | None:
    """Whether a label map, by its header, does not belong to the picture."""
    try:
        with Image.open(io.BytesIO(content)) as picture, Image.open(label_map) as labels:
            size, bands = header_size(picture), labels.getbands()
            if len(bands) > 1:
                return f'the label map is a colour picture ({"".join(bands)})'
            # Random crops of both would show different places.
            if labels.size != size:
                return (
                    f'the label map is {labels.size[0]}x{labels.size[1]}, the picture '
                    f'{size[0]}x{size[1]} (width x height)'
                )
    except UnidentifiedImageError:
        pass  # of a format that the pipeline's decoder may know
    return None


def name_files(info: dict) -> str:
    """The files of a sample."""
    label_map = info.get('seg_map_path')
    return f'{info.get("img_path")}' + (f' with label map {label_map}' if label_map else '')


def read_record(path: Path) -> list[dict]:
    """What was skipped: file, reason and how many times, the most frequent first."""
    if not path.is_file():
        return []
    times: dict[tuple[str, str], int] = defaultdict(int)
    for line in path.read_text(encoding='utf-8').splitlines():
        entry = json.loads(line)
        times[entry['file'], entry['reason']] += 1
    ordered = sorted(times.items(), key=lambda item: (-item[1], item[0]))
    return [{'file': file, 'reason': reason, 'times': number} for (file, reason), number in ordered]
