"""Hooks of the tools: patience in checkpoints, the best checkpoint, the validation loss."""

import copy
from collections import defaultdict
from typing import Any

import torch
from mmengine import dist
from mmengine.config import Config
from mmengine.dataset import DefaultSampler
from mmengine.hooks import CheckpointHook, EarlyStoppingHook, Hook
from mmengine.runner import Runner
from torch.nn import functional

from backbones.data.config_datasets import datasets_of

from .distributed import unwrap
from .metrics import MAIN, main_metrics


class PatienceHook(Hook):
    """Saves the patience of mmengine's EarlyStoppingHook in every checkpoint.

    mmengine counts validations without a better result in memory only, so that a training that is
    often stopped and resumed would never end.
    """

    # It runs after mmengine's EarlyStoppingHook, which is registered before it.
    priority = 'LOWEST'

    def stoppers(self, runner: Runner) -> list[EarlyStoppingHook]:
        return [hook for hook in runner.hooks if isinstance(hook, EarlyStoppingHook)]

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        checkpoint['early_stopping'] = [
            (hook.wait_count, float(hook.best_score)) for hook in self.stoppers(runner)
        ]

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        saved = checkpoint.get('early_stopping', []) if runner._resume else []
        for hook, (wait_count, best_score) in zip(self.stoppers(runner), saved, strict=False):
            hook.wait_count, hook.best_score = wait_count, best_score

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        if runner.train_loop.stop_training:
            for hook in self.stoppers(runner):
                runner.logger.warning(
                    f'the training ends early: {hook.monitor} was not better than '
                    f'{hook.best_score:.4g} in the last {hook.wait_count} validations'
                )


class BestMetricHook(Hook):
    """Chooses the best checkpoint by the main metric if the config's was not measured.

    For example, ``save_best`` may come from a base with another evaluator. mmengine then ends the
    training with a KeyError.
    """

    # Before mmengine's CheckpointHook, after all hooks that add metrics.
    priority = 'LOW'

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        for hook in runner.hooks:
            if metrics and isinstance(hook, CheckpointHook) and hook.save_best:
                self.choose(runner, hook, metrics)

    def choose(self, runner: Runner, hook: CheckpointHook, metrics: dict) -> None:
        """Let a hook use the metrics that it names, else the main metric of those measured."""
        info, is_auto = runner.message_hub.runtime_info, hook.save_best == ['auto']
        missing = [name for name in hook.save_best if name not in metrics]
        # Losses of --val-loss choose only if save_best names them.
        measured = [name for name in metrics if not name.startswith('val/')]
        if missing and not measured:
            # Some metrics have no values for a validation without detections.
            hook.key_indicators = []
            return
        if not missing:
            hook.key_indicators = hook.save_best
        elif hook.key_indicators != [main := main_metrics(measured)[0]]:
            if not is_auto:
                runner.logger.warning(f'{missing} not measured: the best checkpoint is by {main}')
            # mmengine has no rule for some of these metrics.
            hook.greater_keys = [*hook.greater_keys, *MAIN]
            hook._init_rule(hook.rules if is_auto else ['greater'], [main])
            # With several metrics in save_best, the hook has not read this entry.
            hook.best_ckpt_path = info.get('best_ckpt')
        # Scores of two different metrics must not be compared.
        if len(hook.key_indicators) == 1 and info.get('best_metric') != hook.key_indicators[0]:
            if 'best_metric' in info:
                hook.best_ckpt_path = None
                info.pop('best_score', None)
            runner.message_hub.update_info('best_metric', hook.key_indicators[0])


class ValLossHook(Hook):
    """Adds the mean of every loss over the validation images to the metrics, as ``val/NAME``.

    Losses are means over a batch, so they are weighted by its number of images. If the images do
    not divide evenly among processes, mmengine's sampler repeats some; these count once.
    """

    # Before mmengine's RuntimeInfoHook, which passes the metrics to the loggers.
    priority = 'HIGHEST'

    def __init__(self, resize: bool = False) -> None:
        self.resize = resize

    def before_val_epoch(self, runner: Runner) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self.seen = self.counted = 0

    @torch.no_grad()
    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict, outputs: Any = None
    ) -> None:
        size = len(data_batch['inputs'])
        count = min(size, max(self.images_of_process(runner) - self.seen, 0))
        self.seen += size
        # Repeated images are the last ones. A batch of these alone runs all the same: some losses
        # sum over all processes, and the others would wait for this one.
        batch = {key: value[: count or size] for key, value in data_batch.items()}
        if self.resize:
            batch['data_samples'] = [resize_ground_truth(one) for one in batch['data_samples']]
        model = unwrap(runner.model)
        losses = model(**model.data_preprocessor(batch, False), mode='loss')
        for name, value in model.parse_losses(losses)[1].items():
            self.sums[name] += float(value) * count
        self.counted += count

    def images_of_process(self, runner: Runner) -> int:
        """Return how many images this process validates, without repeated ones."""
        loader = runner.val_dataloader
        if not isinstance(loader.sampler, DefaultSampler):
            return len(loader.sampler)
        return len(range(dist.get_rank(), len(loader.dataset), dist.get_world_size()))

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        totals = {'images': self.counted, **self.sums}
        totals = {name: torch.tensor(float(value)) for name, value in totals.items()}
        dist.all_reduce_dict(totals)
        images = totals.pop('images')
        if metrics is not None:
            for name, total in totals.items():
                metrics[f'val/{name}'] = float(total / images)


def is_annotated_after_resizing(config: Config) -> bool:
    """Return whether a detector's validation loads annotations after resizing the image.

    mmdet's configs do, because metrics need the original size; the loss needs the model's.
    """
    if config.default_scope != 'mmdet':
        return False
    names = [str(step.type) for step in next(datasets_of(config, ('val',))).pipeline]
    resized = next((i for i, name in enumerate(names) if 'Resize' in name), len(names))
    return any('LoadAnnotations' in name for name in names[resized:])


def resize_ground_truth(sample: Any) -> Any:
    """Return a copy of a DetDataSample with its ground truth at the size of the model's input."""
    sample = copy.deepcopy(sample)
    for instances in (sample.get('gt_instances'), sample.get('ignored_instances')):
        if instances is not None and len(instances):
            instances.bboxes.rescale_(sample.scale_factor)
            if 'masks' in instances:
                instances.masks = instances.masks.resize(sample.img_shape)
    if 'gt_sem_seg' in sample:
        # PixelData refuses another size beside the map that it has.
        labels = sample.gt_sem_seg.pop('sem_seg')
        resized = functional.interpolate(labels[None].float(), sample.img_shape, mode='nearest')[0]
        sample.gt_sem_seg.sem_seg = resized.to(labels.dtype)
    return sample
