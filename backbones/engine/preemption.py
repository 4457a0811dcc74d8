"""SIGTERM, by which a scheduler announces that a job has to stop: save, then end with code 75."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from mmengine import dist
from mmengine.hooks import Hook
from mmengine.runner import Runner

# sysexits.h: "temporary failure; the user is invited to retry".
PREEMPTED = 75

# SIGTERM does not reach all processes at the same step, so they have to agree on one. Asking every
# tenth step costs nothing and still leaves most of the notice for saving.
STEPS_BETWEEN_AGREEMENTS = 10

# torchrun and srun replace the exit code by their own. The launchers name a file in this variable,
# which the training creates once it is saved.
NOTE_VARIABLE = 'PREEMPTION_NOTE'


class Preempted(Exception):
    """The training was asked to stop, and is saved in ``path``."""

    def __init__(self, path: str) -> None:
        super().__init__(f'SIGTERM: the training is saved in {path}; continue with --resume')
        self.path = path


class StopRequested(Exception):
    """All processes have agreed to stop here; nothing is saved yet."""


class PreemptionHook(Hook):
    """Catches SIGTERM while a training runs, and stops a validation for it."""

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Remember SIGTERM instead of ending by it."""

        process = os.getpid()

        def remember(*_: object) -> None:
            # A forked process inherits this; the pool of VOCMetric ends its own by SIGTERM.
            if os.getpid() != process:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGTERM)
            self.requested = True

        previous = signal.signal(signal.SIGTERM, remember)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)

    def agreed_at(self, step: int) -> bool:
        """Whether a process was asked to stop; all have to call this, with the same step from 0."""
        if dist.get_world_size() == 1:
            return self.requested
        if step % STEPS_BETWEEN_AGREEMENTS:
            return False
        requested = torch.tensor(int(self.requested))
        dist.all_reduce(requested, 'max')
        return bool(requested)

    def before_val(self, runner: Runner) -> None:
        # Processes may have different numbers of batches; all of them reach this many.
        shared = torch.tensor(len(runner.val_dataloader))
        dist.all_reduce(shared, 'min')
        self.shared_batches = int(shared)

    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: object = None
    ) -> None:
        if may_save(runner) and batch_idx < self.shared_batches and self.agreed_at(batch_idx):
            raise StopRequested


def may_save(runner: Runner) -> bool:
    """Whether a checkpoint would be complete: accumulated gradients are not part of it."""
    return runner.optim_wrapper.should_update()


def leave_note() -> None:
    """Tell the launcher that the training is saved, if it asked."""
    if NOTE_VARIABLE in os.environ:
        Path(os.environ[NOTE_VARIABLE]).touch()
