"""mmengine's Runner, for trainings that can be stopped at any moment and for tests."""

import copy
import os
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.optim import OptimWrapper
from mmengine.registry import LOOPS
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch import nn
from torch.utils.data import DataLoader

from backbones.data.findings import count
from backbones.data.skip_bad import SKIPPED, base_datasets, count_skipped, guard
from backbones.deploy import expect_contiguous, replace_roi_align
from backbones.errors import ConfigError, first_of, in_one_line

from .checkpoints import DURABLE, StartHook, checkpoint_folder
from .console import ConsoleHook, prints_to, quiet
from .distributed import unwrap
from .hooks import BestMetricHook, PatienceHook
from .loops import ResumableEpochLoop, ResumableIterLoop
from .metrics import add_per_class
from .nan_guard import NO_CLIPPING, NanGuardHook
from .preflight import build
from .sampler import ignore_foreign_sigterm

LOOPS_FOR = {EpochBasedTrainLoop: ResumableEpochLoop, IterBasedTrainLoop: ResumableIterLoop}


class ReliableRunner(Runner):
    """mmengine's Runner, with some of its parts replaced.

    The config does not change, so that every tool of mmdet and mmseg accepts the saved one. Parts
    for which the config names its own type (a train loop, a storage for checkpoints) stay too.
    """

    def __init__(self, *args: Any, cfg: Config, **kwargs: Any) -> None:
        if kwargs.get('resume'):
            # The saved config starts a new training, as that of a training that was never stopped.
            cfg.resume, cfg.load_from = False, cfg.pop('started_from', None)
        super().__init__(*args, cfg=cfg, **kwargs)

    @classmethod
    def from_cfg(cls, cfg: Config) -> 'ReliableRunner':
        """Build a runner of a config, whose text is formatted only once."""
        formatted = FormattedConfig()
        formatted.__setstate__(cfg.__getstate__())
        try:
            return super().from_cfg(formatted)
        except ImportError as error:
            raise ConfigError(f'the config needs a package: {in_one_line(error)}') from error

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        """Build a logger for the log file; warnings and errors go to the console too."""
        logger = super().build_logger(*args, **kwargs)
        quiet(logger)
        return logger

    def build_model(self, model: nn.Module | dict) -> nn.Module:
        """Build the model; its mmcv operators get contiguous tensors, as they expect."""
        model = super().build_model(build(model) if isinstance(model, dict) else model)
        replace_roi_align(model)
        if self._load_from and hasattr(model, 'backbone'):
            # The whole model is loaded, so pretrained weights need not be fetched.
            model.backbone.init_cfg = None
        return expect_contiguous(model)

    def build_dataloader(
        self, dataloader: DataLoader | dict, seed: int | None = None, diff_rank_seed: bool = False
    ) -> DataLoader:
        """Build a loader whose workers survive a SIGTERM to all processes.

        Its datasets raise an error that names the file of an unusable sample. With ``skip_bad =
        True`` in the config, training skips it; validation and testing need every image.
        """
        if isinstance(dataloader, dict) and not dataloader.get('num_workers'):
            # torch raises an error for persistent workers if there are none.
            dataloader = {**dataloader, 'persistent_workers': False}
        with prints_to(self.logger):
            loader = super().build_dataloader(dataloader, seed, diff_rank_seed)
        loader.worker_init_fn = partial(ignore_foreign_sigterm, initialize=loader.worker_init_fn)
        for dataset in base_datasets(loader.dataset):
            skips = self.cfg.get('skip_bad') and not dataset.test_mode
            guard(dataset, Path(self.work_dir, SKIPPED) if skips else None)
        return loader

    def dump_config(self) -> None:
        """Do nothing: the config of a test, with a changed model, would replace the training's."""

    def train(self) -> nn.Module:
        """Save the config and train the model; then report how many images were skipped."""
        super().dump_config()
        try:
            return super().train()
        finally:
            path = Path(self.work_dir, SKIPPED)
            if self.cfg.get('skip_bad') and is_main_process() and (skipped := count_skipped(path)):
                # A warning, since info messages go to the log file only.
                self.logger.warning(
                    f'--skip-bad: {count(skipped, "image")} skipped in training, named in {path}'
                )

    def build_evaluator(self, evaluator: Evaluator | dict | list) -> Evaluator:
        """Build an evaluator whose metrics include the values of every class."""
        with prints_to(self.logger):
            evaluator = super().build_evaluator(evaluator)
        for metric in evaluator.metrics:
            add_per_class(metric)
        evaluate = evaluator.evaluate

        def log_prints(size: int) -> dict:
            with prints_to(self.logger):
                return evaluate(size)

        evaluator.evaluate = log_prints
        return evaluator

    def load_checkpoint(self, filename: str, *args: Any, **kwargs: Any) -> dict:
        """Load a checkpoint, and warn about tensors of the model that it does not set."""
        model = unwrap(self.model)
        # Models rename keys as they load, so the names do not tell; a copy raises `_version`.
        before = {key: tensor._version for key, tensor in model.state_dict().items()}
        checkpoint = super().load_checkpoint(filename, *args, **kwargs)
        missing = [
            key
            for key, tensor in model.state_dict().items()
            if tensor._version == before[key] and not key.endswith('num_batches_tracked')
        ]
        if missing:
            self.logger.warning(
                f'{filename} lacks {count(len(missing), "tensor")} of the model or has other '
                f'shapes for them; they start from random values: {first_of(missing)}'
            )
        return checkpoint

    def load_or_resume(self) -> None:
        """Load or resume the checkpoint that the config names."""
        with prints_to(self.logger):
            super().load_or_resume()
        # mmengine removes the best checkpoint when there is a better one. It must not remove one
        # in another folder, from which this training was resumed or copied.
        for name, value in self.message_hub.runtime_info.items():
            if name.startswith('best_ckpt'):
                path = os.path.join(checkpoint_folder(self.cfg), os.path.basename(value))
                self.message_hub.update_info(name, path)
        # With each validation, mmengine logs all values of earlier ones; drop ValLossHook's.
        scalars = self.message_hub.log_scalars
        for name in [name for name in scalars if name.startswith('val/val/')]:
            del scalars[name]

    def build_train_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """Build a loop that resumes exactly, in place of mmengine's of the same kind."""
        if isinstance(loop, dict):
            loop = dict(loop)
            default = EpochBasedTrainLoop if loop.pop('by_epoch', None) else IterBasedTrainLoop
            kind = loop.setdefault('type', default)
            kind = LOOPS.get(kind) if isinstance(kind, str) else kind
            loop['type'] = LOOPS_FOR.get(kind, loop['type'])
        return super().build_train_loop(loop)

    def build_optim_wrapper(self, optim_wrapper: OptimWrapper | dict) -> OptimWrapper:
        """Build an optimizer wrapper that logs the gradient norm, whether it clips or not."""
        if isinstance(optim_wrapper, dict) and 'optimizer' in optim_wrapper:
            optim_wrapper = copy.deepcopy(optim_wrapper)
            if not optim_wrapper.get('clip_grad'):
                optim_wrapper['clip_grad'] = {'max_norm': NO_CLIPPING}
        return super().build_optim_wrapper(optim_wrapper)

    def scale_lr(self, optim_wrapper: OptimWrapper, auto_scale_lr: dict | None = None) -> None:
        """Scale the learning rate; unlike mmengine, count all accumulated batches of a step."""
        if auto_scale_lr and auto_scale_lr.get('enable'):
            batches = self.cfg.optim_wrapper.get('accumulative_counts', 1)
            base = auto_scale_lr['base_batch_size'] / batches
            auto_scale_lr = {**auto_scale_lr, 'base_batch_size': base}
        super().scale_lr(optim_wrapper, auto_scale_lr)

    def register_default_hooks(self, hooks: dict | None = None) -> None:
        """Register mmengine's hooks and ours, and let checkpoints be written durably."""
        hooks = dict(hooks or {})
        checkpoint = hooks.get('checkpoint', {'type': 'CheckpointHook', 'interval': 1})
        if isinstance(checkpoint, dict) and is_local(checkpoint):
            hooks['checkpoint'] = {**checkpoint, 'backend_args': DURABLE}
        super().register_default_hooks(hooks)
        self.register_hook(NanGuardHook())
        self.register_hook(BestMetricHook())
        if is_main_process():
            self.register_hook(ConsoleHook())
            self.register_hook(StartHook())

    def register_custom_hooks(self, hooks: list[Hook | dict]) -> None:
        """Register the config's hooks, and the one that saves their patience."""
        # Before mmengine's CheckpointHook, which saves a checkpoint again with the best score.
        early = {'priority': 'LOW'}
        super().register_custom_hooks(
            [
                {**early, **hook}
                if isinstance(hook, dict) and 'EarlyStopping' in str(hook['type'])
                else hook
                for hook in hooks
            ]
        )
        self.register_hook(PatienceHook())


class FormattedConfig(Config):
    """A config that caches its text; mmengine would run yapf again for every checkpoint."""

    # A runner's config does not change.
    pretty_text = cached_property(Config.pretty_text.fget)


def is_local(checkpoint_hook: dict) -> bool:
    """Return whether a CheckpointHook writes local files, without a storage of its own."""
    storage = checkpoint_hook.get('backend_args') or checkpoint_hook.get('file_client_args')
    return not storage and '://' not in str(checkpoint_hook.get('out_dir'))
