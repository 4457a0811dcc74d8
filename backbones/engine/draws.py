"""Which picture is drawn when, and with which random numbers: by the seed and the place in the run.

A loader that remembers what it has drawn so far cannot be taken up in the middle without drawing
all of it again. Here nothing is remembered: every picture's random numbers, and every training
step's, follow from the seed and from how far the run is. So a resumed training goes on exactly as
if it had not been stopped, with any number of workers and without reading a picture twice.
"""

import itertools
import random
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from os import _exit, getppid
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.dist import get_dist_info
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from backbones.errors import DataError

# What random numbers are for, so that a step and a picture of the same number differ.
STEP, PICTURE, VALIDATION = range(3)


def seed_randomness(*place: int) -> None:
    """Seed Python's, NumPy's and torch's random numbers by a place in the run.

    Args:
        *place: Numbers from 0, the run's seed among them.
    """
    first, second = np.random.SeedSequence(place).generate_state(2, np.uint64)
    random.seed(int(first))
    np.random.seed(int(first) % 2**32)
    torch.manual_seed(int(second) >> 1)


class Draw(NamedTuple):
    """A picture of a data set that is read at a place of the run.

    Attributes:
        index: Which picture.
        epoch: How many times the data set has been gone through before.
        number: Which draw of this epoch it is, counted over all processes.
    """

    index: int
    epoch: int
    number: int


class DrawLoader(DataLoader):
    """A loader that starts at any batch, and whose pictures depend on their place alone.

    Args:
        loader: A loader of numbered pictures, as ``Runner.build_dataloader`` makes it.
        seed: The run's seed.
        endless: Whether to begin again where the sampler ends. Default: one epoch at a time.
    """

    batch_sampler: 'DrawSampler'

    def __init__(self, loader: DataLoader, seed: int, endless: bool = False) -> None:
        super().__init__(
            SeededDataset(loader.dataset, seed),
            batch_sampler=DrawSampler(loader.batch_sampler, endless),
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=loader.generator,
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.persistent_workers,
        )

    def __iter__(self) -> Iterator[Any]:
        # A generator, so that no worker starts to read before it is known where to start.
        try:
            yield from super().__iter__()
        except GeneratorExit:
            # Ends the workers now; as part of the garbage of an error they would be waited for.
            self._iterator = None
            raise


class DrawSampler(Sampler[list[Draw]]):
    """The batches of another sampler, from any place on, with their places.

    Args:
        batches: What chooses the pictures of a batch.
        endless: Whether to begin again where it ends.
    """

    def __init__(self, batches: BatchSampler, endless: bool) -> None:
        self.batches = batches
        # Where mmengine's hooks look for it.
        self.sampler = batches.sampler
        self.endless = endless
        self.rank, self.world_size = get_dist_info()
        self.start_at(0, 0)

    def start_at(self, epoch: int, batch: int) -> None:
        """Let the next iteration begin with a batch of an epoch, both counted from 0.

        The batches before it are counted, their pictures are not read.
        """
        self.epoch, self.start = epoch, batch

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Draw]]:
        skipped = 0
        for epoch in itertools.count(self.epoch) if self.endless else (self.epoch,):
            if hasattr(self.sampler, 'set_epoch'):
                self.sampler.set_epoch(epoch)
            drawn = 0
            for batch in self.batches:
                places = itertools.count(drawn * self.world_size + self.rank, self.world_size)
                drawn += len(batch)
                if skipped < self.start:
                    skipped += 1
                    continue
                yield [Draw(index, epoch, n) for index, n in zip(batch, places, strict=False)]
            if not drawn:
                raise DataError(
                    'there is not one whole batch of training pictures: add pictures, or lower '
                    'train_dataloader.batch_size'
                )


class SeededDataset(Dataset):
    """A data set whose random transforms follow from the place of the draw.

    Args:
        dataset: The data set; its attributes are found here too.
        seed: The run's seed.
    """

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getattr__(self, name: str) -> Any:
        # Python and torch ask for such names to learn what an object can do by itself.
        if name.startswith('__'):
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: Draw | int) -> Any:
        if not isinstance(draw, Draw):
            return self.dataset[draw]
        seed_randomness(self.seed, PICTURE, draw.epoch, draw.number)
        return self.dataset[draw.index]


def shield_workers(loader: DataLoader) -> DataLoader:
    """Let a loader's workers outlive a SIGTERM that a scheduler sends to every process of a job.

    They are needed until the step is done; then their parent ends them.
    """
    loader.worker_init_fn = partial(obey_parent_only, initialize=loader.worker_init_fn)
    return loader


def obey_parent_only(worker_id: int, initialize: Callable[[int], None] | None) -> None:
    """In a worker: ignore SIGTERM from anybody but the parent process."""
    # Not on macOS, where no scheduler is.
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
