"""The result of a search: the Pareto front of its networks, as table, plot and data.

The published networks of the family are shown beside it, with the weights of the same supernet.
They are the baseline: a search was only worth it if it found a better network.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from backbones.benchmark.report import format_rows
from backbones.files import atomic_write, write_text

from .latency import MAX_ERROR
from .space import Choice, describe

MAX_ROWS = 16  # of the table, besides the published and the measured networks
MEASURED_AT_ONCE = 5  # of the networks that meet the targets, best first


@dataclass
class Network:
    """One network that was evaluated."""

    choice: Choice
    metric: float  # on the hold-out
    parameters: int
    latency: float | None = None  # predicted milliseconds, if there is a latency model
    name: str | None = None  # of a published network
    measured: float | None = None  # milliseconds
    number: int = 0  # in the table, from 1 on; 0 if it is not shown

    @property
    def milliseconds(self) -> float | None:
        """The measured latency, else the predicted one."""
        return self.latency if self.measured is None else self.measured

    def meets(self, targets: dict[str, float]) -> bool:
        """Return whether its costs are within the targets."""
        costs = dict(latency=self.milliseconds, parameters=self.parameters)
        return all(costs[name] <= target for name, target in targets.items())

    def dominates(self, other: 'Network') -> bool:
        """Return whether it is nowhere worse than another network, and somewhere better."""
        pairs = [(self.metric, other.metric), (other.parameters, self.parameters)]
        if self.measured is not None and other.measured is not None:
            pairs.append((other.measured, self.measured))
        elif self.latency is not None:
            pairs.append((other.latency, self.latency))
        return all(own >= its for own, its in pairs) and any(own > its for own, its in pairs)


@dataclass
class Front:
    """The networks of a search that are shown."""

    networks: list[Network]  # in the order of their costs
    best: list[Network]  # those of them that no other network dominates
    # The best unpublished network that meets the targets; if there is none, one that was predicted
    # to meet them, or the best published one.
    found: Network
    baseline: Network | None  # the best published network that meets the targets
    targets: dict[str, float]  # the most that a network may cost
    metric: str  # name of the metric
    # Median of measured over predicted latency, if it is too far from 1 to use the measurements.
    off_pace: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def is_worth_it(self) -> bool:
        """Return whether the found network is better than all published ones within the targets."""
        return self.baseline is None or self.found.metric > self.baseline.metric

    def conclusion(self) -> str:
        """Return what to do, on one line."""
        found, baseline = self.found, self.baseline
        if not self.is_worth_it:
            return (
                f'The search found no network better than {baseline.name}: take that '
                f'(number {baseline.number}, {self.metric} {baseline.metric:.3f} against '
                f'{found.metric:.3f}).'
            )
        beaten = f', {baseline.name} {baseline.metric:.3f}' if baseline else ''
        return (
            f'Found: number {found.number}, {self.metric} {found.metric:.3f}{beaten}. '
            f'`search.py take CONFIG SUPERNET --number {found.number} --out my_net.py` writes it.'
        )


def make_front(
    networks: Iterable[Network],
    targets: dict[str, float],
    metric: str,
    measure: Callable[[list[Choice]], list[float]] | None = None,
) -> Front:
    """Choose which networks are shown, and measure some of them.

    ``measure`` returns the milliseconds of networks whose latency is predicted. If the median
    differs from the prediction by more than ``MAX_ERROR``, the machine is busy or another one, and
    the measurements are not used. Otherwise, the found network and the baseline are measured ones.
    """

    def best_of(ranked: list[Network]) -> Network | None:
        return next((one for one in ranked if one.meets(targets)), None)

    def measure_all(chosen: list[Network]) -> None:
        for one, time in zip(chosen, measure([one.choice for one in chosen]), strict=True):
            one.measured = time

    off_pace = None
    networks = sorted(networks, key=lambda one: (one.latency or 0, one.parameters, -one.metric))
    best = [one for one in networks if not any(other.dominates(one) for other in networks)]
    own, published = (
        sorted(
            (n for n in networks if bool(n.name) == is_published and n.meets(targets)),
            key=lambda one: -one.metric,
        )
        for is_published in (False, True)
    )
    if measure:
        first = [*own[:MEASURED_AT_ONCE], *published[:MEASURED_AT_ONCE]]
        measure_all(first)
        pace = median(one.measured / one.latency for one in first)
        if abs(pace - 1) > MAX_ERROR:
            off_pace = pace
            for one in first:
                one.measured = None
        else:
            # If the best are too slow, the next best may be as well, so they are measured too.
            for ranked in (own, published):
                while (next_best := best_of(ranked)) and next_best.measured is None:
                    rest = [one for one in ranked if one.measured is None]
                    measure_all(rest[:MEASURED_AT_ONCE])
    # After measuring, it may be that no network meets the targets.
    found, baseline = best_of(own) or (own or published)[0], best_of(published)
    # Evenly spaced, and all if they are few.
    rows = np.linspace(0, len(best) - 1, MAX_ROWS).round().astype(int)
    shown = [*(best[row] for row in rows), found, *(one for one in networks if one.name)]
    shown = [one for one in networks if one.measured or any(one is each for each in shown)]
    for number, one in enumerate(shown, 1):
        one.number = number
    best = [one for one in best if one.number]
    return Front(shown, best, found, baseline, targets, metric, off_pace)


def format_front(front: Front) -> str:
    """Return the table in Markdown, the notes, and the conclusion as the last line."""
    header = ['network', 'number', front.metric, 'parameters', 'latency', 'measured', 'remarks']
    table = format_rows([header, *(row_of(one, front) for one in front.networks)])
    notes = '\n'.join(f'- {note}' for note in front.notes)
    return f'{table}\n\n{notes}\n\n{front.conclusion()}'


def row_of(one: Network, front: Front) -> list[str]:
    """Return a network's row, with dashes for missing values."""
    times = ['–' if time is None else f'{time:.1f} ms' for time in (one.latency, one.measured)]
    meets = one.meets(front.targets)
    remarks = {
        'found': one is front.found,
        'published': one.name,
        'dominates the found one': one.dominates(front.found),
        'meets the targets': meets and one is not front.found,
        'above a target when measured': not meets and one is front.found,
    }
    return [
        f'{one.name}: {describe(one.choice)}' if one.name else describe(one.choice),
        str(one.number),
        f'{one.metric:.3f}',
        f'{one.parameters / 1e6:.2f} M',
        *times,
        ', '.join(remark for remark, applies in remarks.items() if applies),
    ]


def write_front(front: Front, folder: Path) -> None:
    """Write front.json, front.md and front.png."""
    networks = [
        dict(
            number=one.number,
            name=one.name,
            choice=asdict(one.choice),
            metric=one.metric,
            parameters=one.parameters,
            latency_ms=one.latency,
            measured_ms=one.measured,
            is_on_front=any(one is each for each in front.best),
            meets_targets=one.meets(front.targets),
            dominates_found=one.dominates(front.found),
        )
        for one in front.networks
    ]
    values = dict(
        metric=front.metric,
        targets=front.targets,
        found=front.found.number,
        baseline=front.baseline and front.baseline.number,
        is_worth_it=front.is_worth_it,
        notes=front.notes,
        networks=networks,
    )
    texts = {'front.json': json.dumps(values, indent=1), 'front.md': format_front(front)}
    for name, text in texts.items():
        write_text(folder / name, text)
    draw_front(front, folder / 'front.png')


def draw_front(front: Front, path: Path) -> None:
    """Draw the metric over latency, or over parameters without latency; parameters are areas."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout='constrained')
    axes = figure.subplots()
    cost = 'parameters' if front.found.latency is None else 'latency'
    unit, label = (1e6, 'parameters (M)') if cost == 'parameters' else (1, 'latency (ms)')
    area = 400 / max(one.parameters for one in front.networks)

    def point(one: Network) -> tuple[float, float]:
        return (one.parameters if cost == 'parameters' else one.milliseconds) / unit, one.metric

    shown = sorted(front.networks, key=point)
    colors = {True: '#c2541b', False: '#0b5fa5'}
    for is_published, color in colors.items():
        name = 'published' if is_published else 'searched'
        axes.scatter([], [], label=name, color=color, alpha=0.5, linewidths=0)
    labels = []
    for one in shown:
        color = colors[bool(one.name)]
        axes.scatter(*point(one), area * one.parameters, color=color, alpha=0.5, linewidths=0)
        text = f'{one.number}: {one.name}' if one.name else str(one.number)
        labels.append((point(one), text, color))
    ring = dict(facecolors='none', edgecolors='black', linewidths=1.5)
    size = area * front.found.parameters + 60
    axes.scatter(*point(front.found), size, label='found', **ring)
    costs, metrics = zip(*map(point, shown), strict=True)
    axes.step(costs, np.maximum.accumulate(metrics), where='post', color='#555555', alpha=0.3)
    if cost in front.targets:
        axes.axvline(front.targets[cost] / unit, color='#555555', linestyle=':', label='target')
    axes.set(xlabel=label, ylabel=f'{front.metric} on the hold-out')
    axes.set_title('Area: parameters', loc='left', fontsize=9, color='#555555')
    axes.margins(0.1)
    axes.grid(alpha=0.3)
    for handle in axes.legend(loc='lower right').legend_handles[:3]:
        handle.set_sizes([60])
    figure.draw_without_rendering()
    label_points(axes, labels)
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=150, format='png')


def label_points(axes: Any, labels: list[tuple[tuple[float, float], str, str]]) -> None:
    """Write labels, each a point, a text and a color, above or below the points, where there is
    room; the axes have been drawn."""
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    style = dict(textcoords='offset points', ha='center', va='center', fontsize=8)
    style['path_effects'] = [withStroke(linewidth=2, foreground='white')]
    centers = axes.transData.transform([point for point, *_ in labels])
    taken = [Bbox.from_bounds(*(center - 5), 10, 10) for center in centers]
    for point, text, color in labels:
        written = axes.annotate(text, point, (0, 0), color=color, **style)
        for height in (12, -12, 23, -23, 34, -34, 45, -45):
            written.set_position((0, height))
            box = written.get_window_extent()
            if not box.count_overlaps(taken):
                break
        taken.append(box)
