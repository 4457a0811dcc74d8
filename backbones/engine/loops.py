"""mmengine's training loops, resumed at any step as if they had not been stopped.

mmengine's own save the model and what belongs to it. What is missing there: random numbers, the
place in the data within an epoch, and a validation that was due when the run was killed.
"""

from contextlib import closing
from pathlib import Path
from typing import Any

from mmengine import dist
from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.registry import LOOPS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch import nn

from backbones.errors import ConfigError

from .checkpointing import DURABLE, write_durably
from .draws import STEP, VALIDATION, DrawLoader, seed_randomness
from .preemption import (
    Preempted,
    PreemptionHook,
    StopRequested,
    is_agreement_due,
    leave_note,
    may_save,
)


class Resumable:
    """What both loops share; comes before one of mmengine's in the bases.

    Attributes:
        first_iter: The step with which the current epoch begins.
    """

    endless: bool

    def __init__(self, runner: Runner, dataloader: dict, **kwargs: Any) -> None:
        different = runner.cfg.get('randomness', {}).get('diff_rank_seed', False)
        loader = runner.build_dataloader(dataloader, runner.seed, different)
        super().__init__(runner, DrawLoader(loader, runner.seed, self.endless), **kwargs)
        self.first_iter = 0
        self.preemption = PreemptionHook()
        runner.register_hook(self.preemption)
        runner.register_hook(PlaceHook(self), 'LOW')

    def run(self) -> nn.Module:
        """Train from where the loop is to the end.

        Raises:
            Preempted: SIGTERM asked to stop; the training is saved.
            ConfigError: The processes have not resumed the same checkpoint.
        """
        iterations = set(dist.all_gather_object(self._iter))
        if len(iterations) > 1:
            raise ConfigError(
                f'the processes are at different iterations, {sorted(iterations)}: all machines '
                'have to see the same work folder'
            )
        with self.preemption.watch():
            self.runner.call_hook('before_train')
            self.train()
            self.runner.call_hook('after_train')
        return self.runner.model

    def run_iter(self, *batch: Any) -> None:
        """Train one step, with the random numbers of its place in the run."""
        seed_randomness(self.runner.seed, STEP, dist.get_rank(), self._iter)
        super().run_iter(*batch)
        if may_save(self.runner) and is_agreement_due(self._iter) and self.preemption.agreed():
            self.save_and_leave()

    def validate_if_due(self) -> None:
        """Validate where the interval says so."""
        self._decide_current_val_interval()
        if not self.is_validation_due():
            return
        seed_randomness(self.runner.seed, VALIDATION, dist.get_rank(), self._iter)
        try:
            self.runner.val_loop.run()
        except StopRequested:
            for hook in self.runner.hooks:
                if isinstance(hook, EMAHook):
                    # The average stands in for the model during validation.
                    hook.after_val_epoch(self.runner)
            self.save_and_leave()

    def catch_up_validation(self) -> None:
        """Validate what a killed training has saved and not come to validate.

        Checkpoints that mmengine's own loops wrote do not tell.
        """
        validated = self.runner.message_hub.get_info('validated_at')
        if self._iter == 0:
            self.runner.message_hub.update_info('validated_at', 0)
        elif self._iter == self.first_iter and validated not in (None, self._iter):
            self.validate_if_due()

    def save_and_leave(self) -> None:
        """Save the training as it is, and end it.

        Raises:
            Preempted: Always.
        """
        runner = self.runner
        hooks = [hook for hook in runner.hooks if isinstance(hook, CheckpointHook)]
        folder = getattr(hooks[0], 'out_dir', None) if hooks else None
        backend = getattr(hooks[0], 'backend_args', DURABLE) if hooks else DURABLE
        path = f'{folder or runner.work_dir}/preempted.pth'
        runner.save_checkpoint(
            folder or runner.work_dir,
            'preempted.pth',
            meta={'epoch': self._epoch, 'iter': self._iter},
            backend_args=backend,
        )
        if dist.is_main_process():
            write_durably(Path(runner.work_dir) / 'last_checkpoint', path.encode())
            leave_note()
        dist.barrier()
        raise Preempted(path)


@LOOPS.register_module()
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

    def is_validation_due(self) -> bool:
        return (
            self.runner.val_loop is not None
            and self._iter >= self.val_begin
            and (self._iter % self.val_interval == 0 or self._iter == self._max_iters)
        )


@LOOPS.register_module()
class ResumableEpochLoop(Resumable, EpochBasedTrainLoop):
    """mmengine's EpochBasedTrainLoop, resumed exactly, in the middle of an epoch too."""

    endless = False

    def train(self) -> None:
        self.catch_up_validation()
        while self._epoch < self._max_epochs and not self.stop_training:
            self.run_epoch()
            self.validate_if_due()

    def run_epoch(self) -> None:
        """Train what is left of the epoch."""
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

    def is_validation_due(self) -> bool:
        return (
            self.runner.val_loop is not None
            and self._epoch >= self.val_begin
            and (self._epoch % self.val_interval == 0 or self._epoch == self._max_epochs)
        )


class PlaceHook(Hook):
    """Keeps in every checkpoint how far its epoch is, and when it was validated.

    Args:
        loop: The loop whose place it is.
    """

    def __init__(self, loop: Resumable) -> None:
        self.loop = loop

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        # Before mmengine's CheckpointHook, which saves again what has turned out the best.
        runner.message_hub.update_info('validated_at', runner.iter)

    def before_val_epoch(self, runner: Runner) -> None:
        """Validate the model that is saved, the first process's, in all of them.

        Their weights are the same; running means and variances are not.
        """
        if dist.get_world_size() > 1:
            for buffer in runner.model.buffers():
                dist.broadcast(buffer)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if self.loop.endless:
            return
        meta = checkpoint['meta']
        # At the end of an epoch mmengine's CheckpointHook saves the begin of the next one.
        begun = meta['epoch'] == self.loop.epoch
        checkpoint['place_in_epoch'] = {
            'batch': meta['iter'] - self.loop.first_iter if begun else 0,
            'batches': len(self.loop.dataloader),
        }

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if self.loop.endless:
            return
        place = checkpoint.get('place_in_epoch', {'batch': 0, 'batches': 0})
        batch, batches = place['batch'], len(self.loop.dataloader)
        if batch and place['batches'] != batches:
            runner.logger.warning(
                f'an epoch had {place["batches"]} batches and has {batches} now: the epoch that '
                'was stopped in the middle starts again'
            )
            batch = 0
        self.loop.first_iter = checkpoint['meta']['iter'] - batch
