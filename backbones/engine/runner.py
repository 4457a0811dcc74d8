"""A training that loses nothing when it is stopped, and stops when its numbers go wrong."""

import copy
from typing import Any

from mmengine.optim import OptimWrapper
from mmengine.registry import LOOPS
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch import nn
from torch.utils.data import DataLoader

from backbones.data.dataset_guard import GuardsDatasets
from backbones.deploy import expect_contiguous

from .checkpointing import DURABLE
from .draws import shield_workers
from .loops import ResumableEpochLoop, ResumableIterLoop
from .numerics import NO_CLIPPING, NumericsHook

LOOPS_FOR = {EpochBasedTrainLoop: ResumableEpochLoop, IterBasedTrainLoop: ResumableIterLoop}


class ReliableRunner(Runner):
    """mmengine's Runner with other parts in the place of some of its own.

    The config stays as it is, so that every tool of mmdet and mmseg takes the one that is saved.
    Parts of which the config has its own kind (a train loop, a storage for checkpoints) stay too.
    """

    def build_model(self, model: nn.Module | dict) -> nn.Module:
        """The model, of which mmcv's operators get the memory that they expect."""
        return expect_contiguous(super().build_model(model))

    @staticmethod
    def build_dataloader(*args: Any, **kwargs: Any) -> DataLoader:
        """A loader whose workers outlive the SIGTERM that their process is sent."""
        return shield_workers(Runner.build_dataloader(*args, **kwargs))

    def build_train_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """A loop that resumes exactly, in the place of mmengine's of the same kind."""
        if isinstance(loop, dict):
            loop = dict(loop)
            by_epoch = loop.pop('by_epoch', None)
            default = EpochBasedTrainLoop if by_epoch else IterBasedTrainLoop
            kind = loop.get('type', default)
            kind = LOOPS.get(kind) if isinstance(kind, str) else kind
            loop['type'] = LOOPS_FOR[kind].__name__ if kind in LOOPS_FOR else loop['type']
        return super().build_train_loop(loop)

    def build_optim_wrapper(self, optim_wrapper: OptimWrapper | dict) -> OptimWrapper:
        """An optimizer wrapper that logs the norm of the gradient, clipped or not."""
        if isinstance(optim_wrapper, dict) and 'optimizer' in optim_wrapper:
            optim_wrapper = copy.deepcopy(optim_wrapper)
            if not optim_wrapper.get('clip_grad'):
                optim_wrapper['clip_grad'] = {'max_norm': NO_CLIPPING}
        return super().build_optim_wrapper(optim_wrapper)

    def register_default_hooks(self, hooks: dict | None = None) -> None:
        """mmengine's, the checkpoint's with a storage that loses nothing, and NumericsHook."""
        hooks = dict(hooks or {})
        checkpoint = hooks.get('checkpoint', {'type': 'CheckpointHook', 'interval': 1})
        if isinstance(checkpoint, dict) and is_local(checkpoint):
            hooks['checkpoint'] = {**checkpoint, 'backend_args': DURABLE}
        super().register_default_hooks(hooks)
        self.register_hook(NumericsHook())


class TrainRunner(GuardsDatasets, ReliableRunner):
    """What tools/train.py runs: also names the picture when one cannot be read, or skips it."""


def is_local(checkpoint_hook: dict) -> bool:
    """Whether a CheckpointHook writes to files, and is not told how."""
    storage = checkpoint_hook.get('backend_args') or checkpoint_hook.get('file_client_args')
    return not storage and '://' not in str(checkpoint_hook.get('out_dir'))
