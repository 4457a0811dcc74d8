"""mmengine's training loops, which resume at any step as if they had not been stopped.

mmengine saves the model, the optimizer and the schedule. These loops also restore the random
numbers and the place within the epoch, and catch up on a validation that was due at the stop.
"""

from contextlib import closing
from pathlib import Path
from typing import Any

from mmengine import dist
from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch import nn

from .checkpoints import DURABLE, write_durably
from .preemption import Preempted, PreemptionHook, StopRequested, leave_note, may_save
from .sampler import STEP, VALIDATION, ResumableLoader, seed_randomness

# Not 'validated_at': mmengine logs every entry whose name begins with 'val' as a metric.
LAST_VALIDATION = 'last_validation'


class Resumable:
    """The common part of both loops; it stands before mmengine's loop in the bases."""

    endless: bool
    first_iter = 0  # of the current epoch
    saved_place: dict[str, int] | None = None

    def __init__(self, runner: Runner, dataloader: dict, **kwargs: Any) -> None:
        different = runner.cfg.get('randomness', {}).get('diff_rank_seed', False)
        loader = runner.build_dataloader(dataloader, runner.seed, different)
        super().__init__(runner, ResumableLoader(loader, runner.seed, self.endless), **kwargs)
        self.preemption = PreemptionHook()
        runner.register_hook(self.preemption)
        runner.register_hook(PlaceHook(self), 'LOW')

    def run(self) -> nn.Module:
        """Train to the end, or raise Preempted after a SIGTERM."""
        with self.preemption.watch():
            self.runner.call_hook('before_train')
            self.train()
            self.runner.call_hook('after_train')
        return self.runner.model

    def run_iter(self, *batch: Any) -> None:
        """Train one iteration, with random numbers that depend on its place in the run."""
        seed_randomness(self.runner.seed, STEP, dist.get_rank(), self._iter)
        super().run_iter(*batch)
        if may_save(self.runner) and self.preemption.agreed_at(self._iter):
            self.save_and_stop()

    def validate_if_due(self) -> None:
        """Validate if the interval says so."""
        self._decide_current_val_interval()
        done, end = (
            (self._iter, self._max_iters) if self.endless else (self._epoch, self._max_epochs)
        )
        is_due = done >= self.val_begin and (done % self.val_interval == 0 or done == end)
        if self.runner.val_loop is None or not is_due:
            return
        seed_randomness(self.runner.seed, VALIDATION, dist.get_rank(), self._iter)
        try:
            self.runner.val_loop.run()
        except StopRequested:
            for hook in self.runner.hooks:
                if isinstance(hook, EMAHook):
                    # Restores the model, which the average replaces during validation.
                    hook.after_val_epoch(self.runner)
            self.save_and_stop()

    def catch_up_validation(self) -> None:
        """Validate a resumed checkpoint if the training was killed before its validation."""
        validated = self.runner.message_hub.get_info(LAST_VALIDATION)
        if self._iter == 0:
            self.runner.message_hub.update_info(LAST_VALIDATION, 0)
        # None: a checkpoint of mmengine's own loops, which do not save this.
        elif self._iter == self.first_iter and validated not in (None, self._iter):
            self.validate_if_due()

    def save_and_stop(self) -> None:
        """Save the training beside its other checkpoints, and raise Preempted."""
        runner = self.runner
        hook = next((hook for hook in runner.hooks if isinstance(hook, CheckpointHook)), None)
        folder = getattr(hook, 'out_dir', None) or runner.work_dir
        path = f'{folder}/preempted.pth'
        runner.save_checkpoint(
            folder,
            'preempted.pth',
            meta={'epoch': self._epoch, 'iter': self._iter},
            backend_args=getattr(hook, 'backend_args', DURABLE),
        )
        if dist.is_main_process():
            write_durably(Path(runner.work_dir) / 'last_checkpoint', path.encode())
            leave_note()
        dist.barrier()
        raise Preempted(f'SIGTERM: the training is saved in {path}; continue with --resume')


class ResumableIterLoop(Resumable, IterBasedTrainLoop):
    """mmengine's IterBasedTrainLoop, resumed exactly."""

    endless = True

    def train(self) -> None:
        self.runner.call_hook('before_train_epoch')
        self.dataloader.batch_sampler.start_at(0, self._iter)
        self.first_iter = self._iter
        self.catch_up_validation()
        with closing(iter(self.dataloader)) as batches:
            while self._iter < self._max_iters and not self.stop_training:
                self.runner.model.train()
                self.run_iter(next(batches))
                self.validate_if_due()
        self.runner.call_hook('after_train_epoch')


class ResumableEpochLoop(Resumable, EpochBasedTrainLoop):
    """mmengine's EpochBasedTrainLoop, resumed exactly, also in the middle of an epoch."""

    endless = False

    def train(self) -> None:
        self.first_iter = self._iter - self.batches_done()
        self.catch_up_validation()
        while self._epoch < self._max_epochs and not self.stop_training:
            self.run_epoch()
            self.validate_if_due()

    def batches_done(self) -> int:
        """Return how many batches of its epoch a resumed training has done."""
        # A checkpoint that is loaded, not resumed, also sets saved_place.
        if self._iter == 0 or self.saved_place is None:
            return 0
        done, before = self.saved_place['batch'], self.saved_place['batches']
        now = len(self.dataloader)
        if done and before != now:
            self.runner.logger.warning(
                f'an epoch had {before} batches and has {now} now: the epoch that was interrupted '
                'starts again'
            )
            return 0
        return done

    def run_epoch(self) -> None:
        """Train the rest of the epoch."""
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        done = self._iter - self.first_iter
        self.dataloader.batch_sampler.start_at(self._epoch, done)
        with closing(iter(self.dataloader)) as batches:
            for index, batch in enumerate(batches, done):
                self.run_iter(index, batch)
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1
        self.first_iter = self._iter


class PlaceHook(Hook):
    """Saves the place within the epoch and the last validated iteration in every checkpoint."""

    def __init__(self, loop: Resumable) -> None:
        self.loop = loop

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        # Before mmengine's CheckpointHook, which saves the best checkpoint.
        runner.message_hub.update_info(LAST_VALIDATION, runner.iter)

    def before_val_epoch(self, runner: Runner) -> None:
        """Let all processes validate the first one's model, which is the one that is saved."""
        if dist.get_world_size() > 1:
            for buffer in runner.model.buffers():
                dist.broadcast(buffer)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if self.loop.endless:
            return
        meta = checkpoint['meta']
        # At the end of an epoch mmengine's CheckpointHook saves the start of the next one.
        begun = meta['epoch'] == self.loop.epoch
        checkpoint['place_in_epoch'] = {
            'batch': meta['iter'] - self.loop.first_iter if begun else 0,
            'batches': len(self.loop.dataloader),
        }

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self.loop.saved_place = checkpoint.get('place_in_epoch')
