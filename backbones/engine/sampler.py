"""The order of images and their random numbers, from the seed and the place in the run alone.

A loader with a state can be resumed in the middle of an epoch only by reading the epoch again. This
one has no state: the random numbers of every image and every training step depend only on the seed
and on the place in the run. So a resumed training continues exactly as if it had not been stopped,
with any number of workers and without reading an image twice.
"""

import itertools
import random
import signal
import threading
from collections.abc import Callable, Iterator
from os import _exit, getppid
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.dist import get_dist_info
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from backbones.errors import DataError

# Purposes of random numbers, so that a step and an image with the same number differ.
STEP, IMAGE, VALIDATION = range(3)


def seed_randomness(*place: int) -> None:
    """Seed Python's, NumPy's and torch's random numbers by a place in the run, integers >= 0."""
    first, second = np.random.SeedSequence(place).generate_state(2, np.uint64)
    random.seed(int(first))
    np.random.seed(int(first) % 2**32)
    torch.manual_seed(int(second) >> 1)


class SampleIndex(NamedTuple):
    """An image of the dataset and its place in the run."""

    index: int  # of the image in the dataset
    epoch: int  # whole passes through the dataset before
    number: int  # position within the epoch, counted over all processes


SAME_OPTIONS = (
    *('num_workers', 'collate_fn', 'pin_memory', 'timeout', 'worker_init_fn', 'generator'),
    *('multiprocessing_context', 'prefetch_factor', 'persistent_workers'),
)


class ResumableLoader(DataLoader):
    """A loader that starts at any batch, and whose images depend only on their place in the run.

    ``endless``: starts again when the sampler ends, instead of yielding one epoch at a time.
    """

    batch_sampler: 'ResumableSampler'

    def __init__(self, loader: DataLoader, seed: int, endless: bool) -> None:
        super().__init__(
            SeededDataset(loader.dataset, seed),
            batch_sampler=ResumableSampler(loader.batch_sampler, endless),
            **{name: getattr(loader, name) for name in SAME_OPTIONS},
        )

    def __iter__(self) -> Iterator[Any]:
        # A generator: workers must not read ahead before start_at() has been called.
        try:
            yield from super().__iter__()
        except GeneratorExit:
            # End the workers now; after an error, garbage collection would wait for them.
            self._iterator = None
            raise


class ResumableSampler(Sampler[list[SampleIndex]]):
    """The batches of another sampler, from any batch on; each sample has its place in the run."""

    def __init__(self, batches: BatchSampler, endless: bool) -> None:
        self.batches = batches
        # mmengine's hooks look for it here.
        self.sampler = batches.sampler
        self.endless = endless
        self.rank, self.world_size = get_dist_info()
        self.start_at(0, 0)

    def start_at(self, epoch: int, batch: int) -> None:
        """Start the next iteration at this batch of this epoch, both counted from 0."""
        self.epoch, self.start = epoch, batch

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[SampleIndex]]:
        skipped = 0
        for epoch in itertools.count(self.epoch) if self.endless else (self.epoch,):
            if hasattr(self.sampler, 'set_epoch'):
                self.sampler.set_epoch(epoch)
            seen = 0
            for batch in self.batches:
                places = itertools.count(seen * self.world_size + self.rank, self.world_size)
                seen += len(batch)
                if skipped < self.start:
                    skipped += 1
                    continue
                yield [
                    SampleIndex(index, epoch, n) for index, n in zip(batch, places, strict=False)
                ]
            if not seen:
                raise DataError(
                    'there is not one whole batch of training images: add images or lower '
                    'train_dataloader.batch_size'
                )


class SeededDataset(Dataset):
    """A wrapped dataset, whose random transforms depend only on the place in the run."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getattr__(self, name: str) -> Any:
        # Python and torch use such names to find out what this object itself supports.
        if name.startswith('__'):
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Hooks of mmdet change a dataset's pipeline for the last epochs.
        if name in ('dataset', 'seed'):
            super().__setattr__(name, value)
        else:
            setattr(self.dataset, name, value)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, sample: SampleIndex | int) -> Any:
        if not isinstance(sample, SampleIndex):
            return self.dataset[sample]
        seed_randomness(self.seed, IMAGE, sample.epoch, sample.number)
        return self.dataset[sample.index]


def ignore_foreign_sigterm(worker_id: int, initialize: Callable[[int], None] | None) -> None:
    """Let a worker survive a SIGTERM that a scheduler sends to every process of a job.

    The training needs its workers until it has saved. Then their parent ends them, also by SIGTERM
    if the program ends before the loader is closed.
    """
    # macOS lacks it, and has no such schedulers.
    if hasattr(signal, 'sigwaitinfo'):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=wait_for_parent, args=(getppid(),), daemon=True).start()
    if initialize is not None:
        initialize(worker_id)


def wait_for_parent(parent: int) -> None:
    """End this process once its parent sends SIGTERM."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    _exit(0)
