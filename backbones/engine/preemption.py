"""Handle SIGTERM, by which a scheduler asks a job to stop: save, then exit with code 75."""

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

# SIGTERM does not reach all processes at the same step, so they have to agree on one. Every tenth
# step costs almost nothing, and leaves most of the remaining time for saving.
STEPS_BETWEEN_AGREEMENTS = 10

# torchrun and srun replace the exit code. So our launchers name a file in this variable, which the
# training creates after saving.
NOTE_VARIABLE = 'PREEMPTION_NOTE'


class Preempted(Exception):
    """The training was asked to stop, and is saved."""


class StopRequested(Exception):
    """All processes have agreed to stop here; nothing is saved yet."""


class PreemptionHook(Hook):
    """Catches SIGTERM while a training runs, and interrupts a validation."""

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Remember a SIGTERM instead of ending."""

        process = os.getpid()

        def remember(*_: object) -> None:
            # Forked processes inherit this handler; VOCMetric ends those of its pool by SIGTERM.
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
        """Whether a process was asked to stop; all must call it, with the same step from 0."""
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
    """Return whether a checkpoint would be complete; it does not save accumulated gradients."""
    return runner.optim_wrapper.should_update()


def leave_note() -> None:
    """Tell the launcher that the training is saved, if it set a file for this."""
    if NOTE_VARIABLE in os.environ:
        Path(os.environ[NOTE_VARIABLE]).touch()
