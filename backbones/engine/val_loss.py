"""The loss on the validation pictures, next to the metric."""

from collections import defaultdict

import torch
from mmengine.config import Config, ConfigDict
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor

from backbones.data.config_datasets import datasets_of


def enable_val_loss(config: Config) -> None:
    """Let a training compute the validation loss as well.

    mmdet's test pipelines load annotations after resizing, at the picture's first size. The loss
    needs them at the size that the model sees, so they are loaded first; metrics come from the
    annotation file and stay what they are.
    """
    if config.default_scope == 'mmdet':
        for dataset in datasets_of(config, ('val',)):
            dataset.pipeline.sort(key=loading_order)
    config.custom_hooks = [*config.get('custom_hooks', []), ConfigDict(type='ValLossHook')]


def loading_order(transform: ConfigDict) -> int:
    """Sorts annotations behind the picture and before all else."""
    if str(transform.type).endswith('LoadAnnotations'):
        return 1
    return 0 if str(transform.type).rpartition('.')[2].startswith('Load') else 2


@HOOKS.register_module()
class ValLossHook(Hook):
    """Log the mean of every loss over the validation pictures as ``val/NAME``."""

    # Before mmengine's RuntimeInfoHook, which hands the metrics on to the loggers.
    priority = 'HIGHEST'

    def before_val_epoch(self, runner: Runner) -> None:
        self.sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
        self.batches = 0

    @torch.no_grad()
    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict, outputs: object = None
    ) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        data = model.data_preprocessor(data_batch, False)
        losses = model(**data, mode='loss')
        _, logged = model.parse_losses(losses)
        for name, value in logged.items():
            self.sums[name] = self.sums[name] + value.cpu()
        self.batches += 1

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        if metrics is None or not self.batches:
            return
        for name, total in self.sums.items():
            metrics[f'val/{name}'] = float(total) / self.batches
