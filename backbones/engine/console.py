"""What a run prints: a dozen lines at its start, one progress line, and its results.

Everything that mmengine logs (environment, config, hooks, every interval) goes to the log file.
"""

import io
import logging
import math
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
from mmengine.hooks import Hook, LoggerHook
from mmengine.logging import MMLogger
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch.utils.data import DataLoader

from backbones.errors import first_of
from backbones.progress import ProgressBar

from .distributed import unwrap
from .metrics import figure, format_metrics, is_of_size, overall
from .preflight import pretrained_backbone, whole_model

# Warnings of the libraries that the user cannot avoid.
NOISE = (
    'Default ``avg_non_ignore`` is False',
    'The draw is False, it means that the hook for visualization',
    'The prefix is not set in metric class',
    '"FileClient" will be deprecated',
    '"HardDiskBackend" is the alias',
    # Early in a training this is normal; the metrics, all 0, show it.
    'The testing results of the whole dataset is empty',
)
MAX_NAMED_CLASSES = 8
BAR = '{desc} {n_fmt}/{total_fmt} |{bar}| {remaining} left, {rate_fmt}{postfix}'
LINE = BAR.replace(' |{bar}|', ',')


class ConsoleHandler(logging.Handler):
    """Prints warnings and errors without breaking the progress line."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if not message.startswith(NOISE):
            ProgressBar.write(f'{record.levelname.lower()}: {message}', file=sys.stderr)


def quiet(logger: MMLogger) -> None:
    """Show only warnings and errors; the log file gets everything."""
    for index, handler in enumerate(logger.handlers):
        if type(handler) is logging.StreamHandler:
            logger.handlers[index] = ConsoleHandler(max(handler.level, logging.WARNING))
    for message in NOISE:
        warnings.filterwarnings('ignore', re.escape(message))


@contextmanager
def prints_to(logger: MMLogger) -> Iterator[None]:
    """Send what libraries print, such as pycocotools' tables, to the log file."""
    text = io.StringIO()
    try:
        with redirect_stdout(text):
            yield
    finally:
        if text.getvalue().strip():
            logger.info(f'\n{text.getvalue().rstrip()}')


class Progress(ProgressBar):
    """A progress line on a terminal; elsewhere a new line at every ``interval``."""

    def __init__(
        self, description: str, total: int, initial: int = 0, interval: int = 50, leave: bool = True
    ) -> None:
        self.interval = interval
        self.is_terminal = sys.stdout.isatty()
        super().__init__(
            desc=description,
            total=total,
            initial=initial,
            leave=leave,
            file=sys.stdout if self.is_terminal else io.StringIO(),
            bar_format=BAR if self.is_terminal else LINE,
            delay=0 if self.is_terminal else math.inf,
        )

    def step(self, note: str = '') -> None:
        """Count one step."""
        self.set_postfix_str(note, refresh=False)
        self.update()
        is_due = self.n in (self.initial + 1, self.total) or self.n % self.interval == 0
        if is_due and not self.is_terminal:
            print(str(self).replace(',  ', ', '), flush=True)

    def skip(self, number: int) -> None:
        """Count steps that took no time."""
        self.initial += number
        self.n += number


class ConsoleHook(Hook):
    """Prints a run's summary, progress and metrics; registered in the first process only."""

    # It runs after mmengine's CheckpointHook, which finds the best checkpoint.
    priority = 'LOWEST'

    def __init__(self) -> None:
        self.training: Progress | None = None
        self.evaluation: Progress | None = None
        self.metrics: dict[str, Any] = {}

    def before_train(self, runner: Runner) -> None:
        print_summary(runner, is_training=True)
        interval = next((h.interval for h in runner.hooks if isinstance(h, LoggerHook)), 50)
        self.training = Progress('iteration', runner.max_iters, runner.iter, interval)

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        scalars = runner.message_hub.log_scalars
        notes = [
            f'{name} {scalars[f"train/{name}"].current():.4g}'
            for name in ('loss', 'lr')
            if f'train/{name}' in scalars
        ]
        self.training.step(', '.join(notes))

    def before_val(self, runner: Runner) -> None:
        self.evaluation = evaluation_of(runner.val_dataloader, 'validation batch')

    def before_test(self, runner: Runner) -> None:
        print_summary(runner, is_training=False)
        self.evaluation = evaluation_of(runner.test_dataloader, 'test batch')

    def after_val_iter(self, *args: Any, **kwargs: Any) -> None:
        self.evaluation.step()

    after_test_iter = after_val_iter

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        self.evaluation.close()
        self.metrics = metrics or {}
        shown = [
            f'{name} {figure(value).strip()}'
            for name, value in overall(self.metrics).items()
            if not is_of_size(name) and (name == 'val/loss' or not name.startswith('val/'))
        ]
        text = ', '.join(shown) or 'no metrics'
        ProgressBar.write(f'validation at iteration {runner.iter}: {text}')

    def after_test_epoch(self, *args: Any, **kwargs: Any) -> None:
        self.evaluation.close()

    def after_train(self, runner: Runner) -> None:
        self.training.close()
        if self.metrics:
            print(f'\nlast validation:\n{format_metrics(overall(self.metrics))}')
        best = runner.message_hub.runtime_info
        if 'best_score' in best and 'best_ckpt' in best:
            print(f'\nbest: {figure(best["best_score"]).strip()}, {best["best_ckpt"]}')


def evaluation_of(loader: DataLoader, description: str) -> Progress:
    return Progress(description, len(loader), interval=max(len(loader) // 5, 1), leave=False)


def print_summary(runner: Runner, is_training: bool) -> None:
    """Print what a run is about to do."""
    summary = summarize_run(runner, is_training)
    width = max(map(len, summary))
    print('\n'.join(f'{name:<{width}}  {value}' for name, value in summary.items()), flush=True)


def summarize_run(runner: Runner, is_training: bool) -> dict[str, str]:
    """Return what a run is about to do: model, weights, data, classes, schedule, device, log."""
    config, model = runner.cfg, unwrap(runner.model)
    parameters = list(model.parameters())
    backbone = whole_model(config).get('backbone') or {}
    parts = [type(model).__name__, str(backbone.get('type', '')), str(backbone.get('arch', ''))]
    names = ' '.join(part for part in parts if part and len(part) < 40)
    pretrained = pretrained_backbone(config)
    summary = {
        'model': f'{names}, {sum(p.numel() for p in parameters) / 1e6:.1f} M parameters',
        'weights': runner._load_from or (f'{pretrained} (backbone)' if pretrained else 'random'),
    } | getattr(model, 'summary', {})
    if not is_training:
        loaders = {'test': runner.test_dataloader}
    else:
        trained = sum(p.numel() for p in parameters if p.requires_grad) / 1e6
        summary['model'] += f', {trained:.1f} M of them trained'
        loaders = {'training': runner.train_dataloader}
        if config.get('val_dataloader'):
            loaders['validation'] = runner.val_dataloader
    for name, loader in loaders.items():
        summary[name] = f'{len(loader.dataset)} images, {source_of(loader.dataset)}'
    classes = (getattr(loader.dataset, 'metainfo', None) or {}).get('classes') or ()
    if classes:
        summary['classes'] = f'{len(classes)}: {first_of(classes, MAX_NAMED_CLASSES)}'
    if is_training:
        summary |= summarize_schedule(runner)
    processes = f'{runner.world_size} processes, each on ' if runner.world_size > 1 else ''
    device = parameters[0].device
    name = f'{str(device).upper()}, threads: {torch.get_num_threads()}'
    if device.type == 'cuda':
        name = torch.cuda.get_device_name(device)
    # mmengine's AmpOptimWrapper, or our CPUAmpOptimWrapper.
    is_mixed = 'Amp' in type(runner.optim_wrapper).__name__
    precision = 'mixed precision' if is_mixed else 'float32'
    summary.setdefault('device', f'{processes}{name}, {precision}')
    return summary | {'log': str(runner.logger.log_file)}


def summarize_schedule(runner: Runner) -> dict[str, str]:
    """Return a training's length, batch and learning rate, and where it resumes."""
    loop, config = runner.train_loop, runner.cfg
    if isinstance(loop, EpochBasedTrainLoop):
        length, unit = f'{loop.max_epochs} epochs of {len(loop.dataloader)} iterations', 'epochs'
    else:
        length, unit = f'{loop.max_iters} iterations', 'iterations'
    if runner.val_loop is not None:
        length += f', validation every {loop.val_interval} {unit}'
    size = config.train_dataloader.get('batch_size')
    batch = f'{size} images'
    if runner.world_size > 1 and size:
        batch += f' x {runner.world_size} processes = {size * runner.world_size}'
    if (batches := config.optim_wrapper.get('accumulative_counts', 1)) > 1:
        batch += f', mean gradient of {batches} batches'
    rates = [group.get('initial_lr', group['lr']) for group in runner.optim_wrapper.param_groups]
    rate = ' to '.join(dict.fromkeys(f'{rate:.3g}' for rate in (min(rates), max(rates))))
    if (config.get('auto_scale_lr') or {}).get('enable'):
        rate += ' (scaled to the batch)'
    summary = {'schedule': length, 'batch': f'{batch}, learning rate {rate}'}
    return summary | ({'resumed': f'at iteration {runner.iter}'} if runner.iter else {})


def source_of(dataset: Any) -> str:
    """Return the path of a dataset's annotations or images, else its type."""
    # Inside wrappers: ClassBalancedDataset for instance, and the one that seeds random numbers.
    while hasattr(dataset, 'dataset'):
        dataset = dataset.dataset
    prefix = getattr(dataset, 'data_prefix', None) or {}
    paths = (getattr(dataset, 'ann_file', ''), prefix.get('img_path'), prefix.get('img'))
    return next((str(path) for path in paths if path), type(dataset).__name__)
