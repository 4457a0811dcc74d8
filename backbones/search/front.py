"""What a search ends with: the networks that no other one is better than, as table, plot and data.

The published networks of the family stand beside them, with the weights of the same supernet. They
are the baseline: a search that finds nothing better than one of them was not worth it.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from backbones.benchmark.report import format_rows
from backbones.files import atomic_write

from .space import Choice, describe

# Rows of the table besides the published networks, and networks that are measured again.
MAX_ROWS = 16
MAX_MEASURED = 10
COLUMNS = ('network', 'number', '{metric}', 'parameters', 'latency', 'measured', 'remarks')


@dataclass
class Network:
    """One network that was evaluated.

    Attributes:
        choice: The network.
        metric: What it reaches on the hold-out.
        parameters: How many it has.
        latency: Predicted milliseconds, or None where there is no model of latency.
        name: What it is called, where it is a published network.
        measured: Measured milliseconds, or None.
        number: In the table, from 1 on.
    """

    choice: Choice
    metric: float
    parameters: int
    latency: float | None = None
    name: str | None = None
    measured: float | None = None
    number: int = 0

    @property
    def milliseconds(self) -> float | None:
        """What it takes, as well as that is known."""
        return self.latency if self.measured is None else self.measured

    def meets(self, targets: dict[str, float]) -> bool:
        """Whether it takes no more than a search may."""
        costs = dict(latency=self.milliseconds, parameters=self.parameters)
        return all(costs[name] <= target for name, target in targets.items())

    def dominates(self, other: 'Network') -> bool:
        """Whether it is nowhere worse than another network, and somewhere better."""
        pairs = [(self.metric, other.metric), (other.parameters, self.parameters)]
        if self.measured is not None and other.measured is not None:
            pairs.append((other.measured, self.measured))
        elif self.latency is not None:
            pairs.append((other.latency, self.latency))
        return all(own >= its for own, its in pairs) and any(own > its for own, its in pairs)


@dataclass
class Front:
    """The networks of a search that are shown.

    Attributes:
        networks: In the order of their costs.
        best: Which of them no other one dominates.
        found: The best one that meets the targets and is none of the published.
        baseline: The best published one that meets the targets, or None.
        targets: The most that a network may cost.
        metric: The name of the metric.
    """

    networks: list[Network]
    best: list[Network]
    found: Network
    baseline: Network | None
    targets: dict[str, float]
    metric: str
    notes: list[str] = field(default_factory=list)

    @property
    def is_worth_it(self) -> bool:
        """Whether the found network is better than all published ones that meet the targets."""
        return self.baseline is None or self.found.metric > self.baseline.metric

    def conclusion(self) -> str:
        """What to do, on one line."""
        found, baseline = self.found, self.baseline
        if not self.is_worth_it:
            return (
                f'No network that was found is better than {baseline.name}: take that '
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
    """Choose which networks are shown, and measure some of them again.

    Args:
        networks: All that were evaluated; one that is not published has to meet the targets.
        targets: The most that a network may cost: 'latency' in ms, 'parameters'.
        metric: The name of the metric.
        measure: Returns the milliseconds of networks. Default: none is measured.
    """
    networks = sorted(networks, key=lambda one: (one.latency or 0, one.parameters, -one.metric))
    best = not_dominated(networks)
    own, published = (
        sorted(
            (n for n in networks if bool(n.name) == is_published and n.meets(targets)),
            key=lambda one: -one.metric,
        )
        for is_published in (False, True)
    )
    if measure:
        chosen = [*own[:4], *published[:2], *best[:1], *best[-1:]]
        chosen = [*chosen, *spread(best, MAX_MEASURED)]
        measured = list({id(one): one for one in chosen}.values())[:MAX_MEASURED]
        times = measure([one.choice for one in measured])
        for one, time in zip(measured, times, strict=True):
            one.measured = time
    # What was predicted to meet them all may not.
    found = next((one for one in own if one.meets(targets)), (own or published)[0])
    baseline = next((one for one in published if one.meets(targets)), None)
    shown = [*spread(best, MAX_ROWS), found, *(one for one in networks if one.name)]
    shown = [one for one in networks if one.measured or any(one is each for each in shown)]
    for number, one in enumerate(shown, 1):
        one.number = number
    return Front(shown, [one for one in best if one.number], found, baseline, targets, metric)


def not_dominated(networks: Sequence[Network]) -> list[Network]:
    """Those that no other network is better than in everything."""
    return [one for one in networks if not any(other.dominates(one) for other in networks)]


def spread(networks: Sequence[Network], number: int) -> list[Network]:
    """So many of some networks, evenly from the first to the last."""
    if len(networks) <= number:
        return list(networks)
    return [
        networks[index] for index in np.linspace(0, len(networks) - 1, number).round().astype(int)
    ]


def format_front(front: Front) -> str:
    """The table in Markdown, what it is of, and the conclusion as the last line."""
    header = [column.format(metric=front.metric) for column in COLUMNS]
    table = format_rows([header, *(row_of(one, front) for one in front.networks)])
    notes = '\n'.join(f'- {note}' for note in front.notes)
    return f'{table}\n\n{notes}\n\n{front.conclusion()}'


def row_of(one: Network, front: Front) -> list[str]:
    """A network's line; a dash for what there is not."""
    times = ['–' if time is None else f'{time:.1f} ms' for time in (one.latency, one.measured)]
    name = f'{one.name}: {describe(one.choice)}' if one.name else describe(one.choice)
    return [
        name,
        str(one.number),
        f'{one.metric:.3f}',
        f'{one.parameters / 1e6:.2f} M',
        *times,
        ', '.join(remarks_on(one, front)),
    ]


def remarks_on(one: Network, front: Front) -> list[str]:
    """What is said of a network in the table."""
    remarks = {
        'found': one is front.found,
        'published': bool(one.name),
        'dominates the found one': one.dominates(front.found),
        'meets the targets': one.meets(front.targets) and one is not front.found,
        'above a target when measured': one is front.found and not one.meets(front.targets),
    }
    return [remark for remark, applies in remarks.items() if applies]


def write_front(front: Front, folder: Path, **extra: Any) -> None:
    """Write front.json, with other entries beside its own, front.md and front.png."""
    values = dict(
        metric=front.metric,
        targets=front.targets,
        found=front.found.number,
        baseline=front.baseline and front.baseline.number,
        is_worth_it=front.is_worth_it,
        networks=[as_dict(one, front) for one in front.networks],
        **extra,
    )
    for name, text in (
        ('front.json', json.dumps(values, indent=1)),
        ('front.md', format_front(front)),
    ):
        with atomic_write(folder / name) as partial:
            partial.write_text(f'{text}\n', encoding='utf-8')
    draw_front(front, folder / 'front.png')


def as_dict(one: Network, front: Front) -> dict[str, Any]:
    return dict(
        number=one.number,
        name=one.name,
        choice=json.loads(one.choice.to_json()),
        metric=one.metric,
        parameters=one.parameters,
        latency_ms=one.latency,
        measured_ms=one.measured,
        is_on_front=any(one is each for each in front.best),
        meets_targets=one.meets(front.targets),
        dominates_found=one.dominates(front.found),
    )


def draw_front(front: Front, path: Path) -> None:
    """Draw the metric over latency, with parameters as area; over parameters without latency."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout='constrained')
    axes = figure.subplots()
    has_latency = front.found.latency is not None

    def x(one: Network) -> float:
        return one.milliseconds if has_latency else one.parameters / 1e6

    largest = max(one.parameters for one in front.networks)
    groups = {
        'published': ('#c2541b', [one for one in front.networks if one.name]),
        'searched': ('#0b5fa5', [one for one in front.networks if not one.name]),
    }
    for label, (color, group) in groups.items():
        areas = [400 * one.parameters / largest for one in group]
        points = [x(one) for one in group], [one.metric for one in group]
        axes.scatter(*points, areas, color=color, alpha=0.5, linewidths=0, label=label)
        for one in group:
            text = f'{one.number}: {one.name}' if one.name else str(one.number)
            axes.annotate(
                text, (x(one), one.metric), (0, 8), textcoords='offset points', color=color,
                ha='center', fontsize=8,
            )  # fmt: skip
    found = front.found
    ring = dict(facecolors='none', edgecolors='black', linewidths=1.5)
    area = 400 * found.parameters / largest + 60
    axes.scatter([x(found)], [found.metric], [area], label='found', **ring)
    line: list[Network] = []
    for one in sorted(front.networks, key=x):
        if not line or one.metric > line[-1].metric:
            line.append(one)
    axes.plot([x(one) for one in line], [one.metric for one in line], color='#555555', alpha=0.3)
    target = front.targets.get('latency' if has_latency else 'parameters')
    if target:
        target = target if has_latency else target / 1e6
        axes.axvline(target, color='#555555', linestyle=':', label='target')
    axes.set(
        xlabel='latency (ms)' if has_latency else 'parameters (M)',
        ylabel=f'{front.metric} on the hold-out',
    )
    axes.set_title('Area: parameters', loc='left', fontsize=9, color='#555555')
    axes.margins(0.1)
    axes.grid(alpha=0.3)
    legend = axes.legend(loc='lower right')
    for handle in legend.legend_handles[:3]:
        handle.set_sizes([60])
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=150, format='png')
