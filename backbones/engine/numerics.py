"""Losses and gradients that are no longer numbers: found in the step in which they appear."""

import math
from collections.abc import Iterator

from mmengine.dist import get_world_size
from mmengine.hooks import Hook
from mmengine.runner import Runner

from backbones.errors import ConfigError

# Larger than any norm that float32 gradients of a training can have: measures, never clips.
NO_CLIPPING = 1e38

# Below float16's smallest normal number a scaled loss has no precision left; where gradients still
# overflow there, the scale is not the reason.
SMALLEST_LOSS_SCALE = 2.0**-14

PICTURES_NAMED = 16


class DivergenceError(ConfigError):
    """A loss or a gradient became NaN or infinite."""


class NumericsHook(Hook):
    """Stops a training whose loss or gradient is NaN or infinite, before that is saved.

    Costs no synchronization with a GPU: mmengine's RuntimeInfoHook, which runs first, has fetched
    every loss for the logs already, and its optimizer wrapper the gradient's norm.
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
        spoilt = {name: value for name, value in losses.items() if not math.isfinite(value)}
        if len(spoilt) > 1:
            # The sum says nothing that its parts do not.
            spoilt.pop('loss', None)
        if not spoilt and 'train/grad_norm' in runner.message_hub.log_scalars:
            norm = runner.message_hub.get_scalar('train/grad_norm').current()
            if not math.isfinite(norm) and not is_overflow(runner):
                spoilt['the gradient norm'] = norm
        if spoilt:
            raise DivergenceError(describe(runner, spoilt, data_batch))


def is_overflow(runner: Runner) -> bool:
    """Whether a gradient that is not finite is loss scaling at work.

    Mixed precision in float16 raises the scale of the loss until gradients overflow, leaves that
    step out and lowers the scale: part of the method, and no harm done.
    """
    scaler = getattr(runner.optim_wrapper, 'loss_scaler', None)
    return scaler is not None and scaler.get_scale() >= SMALLEST_LOSS_SCALE


def describe(runner: Runner, spoilt: dict[str, float], data_batch: dict | None) -> str:
    """What became of which number, on which pictures, and what remains."""
    values = ', '.join(f'{name} is {value}' for name, value in spoilt.items())
    paths = list(picture_paths(data_batch))
    more = f' and {len(paths) - PICTURES_NAMED} more' if len(paths) > PICTURES_NAMED else ''
    rate = next(iter(runner.optim_wrapper.get_lr().values()))[0]
    last = runner.message_hub.get_info('last_ckpt')
    elsewhere = ' of this process (the cause may be in another)' if get_world_size() > 1 else ''
    return (
        f'{values} at iteration {runner.iter + 1}, where the learning rate is {rate:.3g}. '
        f'The pictures{elsewhere}: {", ".join(paths[:PICTURES_NAMED]) or "unknown"}{more}. '
        'This step is not saved; '
        + (f'the last good checkpoint is {last}' if last else 'there is no checkpoint before it')
        + '. Look at these pictures and their annotations (tools/check_dataset.py), lower the '
        'learning rate, or clip gradients: --cfg-options optim_wrapper.clip_grad.max_norm=1'
    )


def picture_paths(data_batch: object) -> Iterator[str]:
    """The files of a batch, as far as its data samples name them."""
    samples = data_batch.get('data_samples') if isinstance(data_batch, dict) else None
    for sample in samples or []:
        path = getattr(sample, 'img_path', None)
        if path is not None:
            yield str(path)
