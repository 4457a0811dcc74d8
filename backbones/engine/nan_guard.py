"""Stop a training at the step in which a loss or a gradient becomes NaN or infinite."""

import math

from mmengine.dist import get_world_size
from mmengine.hooks import Hook
from mmengine.runner import Runner

from backbones.errors import ConfigError, first_of

# Larger than any gradient norm of a training in float32, so that it is measured but never clipped.
NO_CLIPPING = 1e38

# float16's smallest normal number. If gradients overflow at a smaller loss scale than this, the
# scale is not the cause.
MIN_LOSS_SCALE = 2.0**-14

MAX_NAMED_IMAGES = 16


class DivergenceError(ConfigError):
    """A loss or a gradient became NaN or infinite."""


class NanGuardHook(Hook):
    """Raises DivergenceError before such a step is saved.

    It needs no synchronization with a GPU: mmengine's RuntimeInfoHook, which runs first, has
    already fetched every loss for the logs, and the optimizer wrapper the gradient norm.
    """

    priority = 'HIGH'

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | None = None,
        outputs: dict | None = None,
    ) -> None:
        losses = {
            name: runner.message_hub.get_scalar(f'train/{name}').current()
            for name in outputs or {}
            if 'loss' in name
        }
        bad = {name: value for name, value in losses.items() if not math.isfinite(value)}
        if len(bad) > 1:
            # The sum says no more than its parts.
            bad.pop('loss', None)
        if not bad and 'train/grad_norm' in runner.message_hub.log_scalars:
            norm = runner.message_hub.get_scalar('train/grad_norm').current()
            if not math.isfinite(norm) and not is_overflow(runner):
                bad['the gradient norm'] = norm
        if bad:
            raise DivergenceError(describe(runner, bad, data_batch))


def is_overflow(runner: Runner) -> bool:
    """Return whether float16's loss scaling, which skips the step, made a gradient infinite."""
    scaler = getattr(runner.optim_wrapper, 'loss_scaler', None)
    return scaler is not None and scaler.get_scale() >= MIN_LOSS_SCALE


def describe(runner: Runner, bad: dict[str, float], data_batch: dict | None) -> str:
    """Say which value is not finite, on which images, and what to do."""
    values = ', '.join(f'{name} is {value}' for name, value in bad.items())
    samples = data_batch.get('data_samples') if isinstance(data_batch, dict) else None
    paths = [str(sample.img_path) for sample in samples or [] if hasattr(sample, 'img_path')]
    images = first_of(paths, MAX_NAMED_IMAGES) if paths else 'unknown'
    rate = next(iter(runner.optim_wrapper.get_lr().values()))[0]
    last = runner.message_hub.get_info('last_ckpt')
    elsewhere = ' of this process (the cause may be in another)' if get_world_size() > 1 else ''
    return (
        f'{values} at iteration {runner.iter + 1}, where the learning rate is {rate:.3g}. '
        f'The images{elsewhere}: {images}. This step is not saved; '
        + (f'the last good checkpoint is {last}' if last else 'there is no checkpoint before it')
        + '. Look at these images and their annotations (tools/check_dataset.py), lower the '
        'learning rate, or clip gradients: --cfg-options optim_wrapper.clip_grad.max_norm=1'
    )
