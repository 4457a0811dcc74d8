"""Draw loss, learning rate and metrics of a training from its log."""

import json
from collections import defaultdict
from pathlib import Path

from backbones.files import atomic_write

from .metrics import is_of_size, is_per_class

# Entries of the log that are neither losses nor metrics.
BOOKKEEPING = {'lr', 'base_lr', 'epoch', 'iter', 'step', 'time', 'data_time', 'memory', 'grad_norm'}

Curve = list[tuple[int, float]]


def draw_curves(work_dir: str) -> Path | None:
    """Draw all runs of a work folder over iterations; return ``curves.png``, None without a log."""
    from matplotlib.figure import Figure

    panels = panels_of(work_dir)
    if not panels:
        return None
    figure = Figure(figsize=(5 * len(panels), 4), layout='constrained')
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, curves) in zip(all_axes, panels.items(), strict=True):
        for name, curve in curves.items():
            iterations, values = zip(*curve, strict=True)
            marker = 'o' if len(curve) < 30 else None
            axes.plot(iterations, values, label=name, marker=marker, markersize=3)
        axes.set(title=title, xlabel='iteration')
        axes.grid(alpha=0.3)
        axes.legend(fontsize='x-small')
    path = Path(work_dir) / 'curves.png'
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=120, format='png')
    return path


def panels_of(work_dir: str) -> dict[str, dict[str, Curve]]:
    """Return the panels to draw, each with its curves: loss, learning rate and metric.

    Metrics of single classes and of objects of one size are left out.
    """
    training, validation = read_log(work_dir)
    losses = {name: curve for name, curve in training.items() if 'loss' in name}
    if len(losses) == 2:  # One loss, and the sum, which equals it.
        losses = {'loss': losses['loss']} if 'loss' in losses else losses
    losses |= {name: curve for name, curve in validation.items() if name == 'val/loss'}
    metrics = {
        name: curve
        for name, curve in validation.items()
        if not name.startswith('val/') and not is_per_class(name) and not is_of_size(name)
    }
    rates = {'lr': training.get('lr', [])}
    panels = {'loss': losses, 'learning rate': rates, 'metric': metrics}
    return {title: curves for title, curves in panels.items() if any(curves.values())}


def read_log(work_dir: str) -> tuple[dict[str, Curve], dict[str, Curve]]:
    """Return the logged values of training and of validation: by name, over iterations."""
    training: dict[str, dict[int, float]] = defaultdict(dict)
    validation: dict[str, dict[int, float]] = defaultdict(dict)
    ends: dict[int | None, int] = {}  # the last logged iteration of each epoch
    # Folders are sorted by the time of their start, so that a resumed run overrides repeated steps.
    for path in sorted(Path(work_dir).glob('*/vis_data/scalars.json')):
        iteration = 0
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # The last line of a run that was killed.
            step, is_training = entry['step'], 'lr' in entry
            if is_training:
                ends[entry.get('epoch')] = step
            elif not iteration:
                # A resumed run begins with a validation that the run before it had not done.
                step = ends.get(step, step)
            # A validation's step may be its epoch, which is less than the iterations before it.
            iteration = max(iteration, step)
            curves = training if is_training else validation
            for name, value in entry.items():
                if name not in BOOKKEEPING - {'lr'} and isinstance(value, (int, float)):
                    curves[name][iteration] = value
    return tuple(
        {name: sorted(curve.items()) for name, curve in values.items()}
        for values in (training, validation)
    )
