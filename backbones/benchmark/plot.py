"""Latency against parameters and against multiply-adds."""

from pathlib import Path
from typing import Any

from .report import Result, lanes, title_of

OURS_COLOUR = '#0b5fa5'
PEER_COLOUR = '#c2541b'
PANELS = (('parameters', 1e6, 'parameters (M)'), ('macs', 1e9, 'multiply-adds (G)'))


def draw_plot(outcome: dict[str, Any], path: Path) -> bool:
    """Draw a row of two panels for every table.

    Args:
        outcome: What :func:`.benchmark.benchmark` returns.
        path: A .png.

    Returns:
        Whether there was something to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [
        measured
        for results in lanes(outcome['results'])
        if (measured := [each for each in results if 'latency_ms' in each])
    ]
    if not rows:
        return False
    figure = Figure(figsize=(11, 4.6 * len(rows) + 0.5), layout='constrained')
    FigureCanvasAgg(figure)
    parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for part, results in zip(parts, rows, strict=True):
        part.suptitle(title_of(results[0]), fontsize=13, fontweight='bold')
        all_axes = part.subplots(1, 2, sharey=True)
        for axes, panel in zip(all_axes, PANELS, strict=True):
            draw_panel(axes, results, *panel)
        all_axes[0].set_ylabel('latency (ms), median; bar: 10 % to 90 %')
    figure.supxlabel(machine_line(outcome), fontsize=8, color='#555555')
    figure.savefig(path, dpi=150)
    return True


def draw_panel(axes: Any, results: list[Result], key: str, unit: float, label: str) -> None:
    """Points for all models, ours joined by a line."""
    from matplotlib.patheffects import withStroke

    ours = sorted((each for each in results if each['ours']), key=lambda each: each[key])
    others = [each for each in results if not each['ours']]
    for group, colour, marker, line in (
        (others, PEER_COLOUR, 's', 'none'),
        (ours, OURS_COLOUR, 'o', '-'),
    ):
        if not group:
            continue
        x = [each[key] / unit for each in group]
        latencies = [each['latency_ms'] for each in group]
        y = [each['median'] for each in latencies]
        low = [each['median'] - each['p10'] for each in latencies]
        high = [each['p90'] - each['median'] for each in latencies]
        axes.errorbar(
            x, y, (low, high), color=colour, marker=marker, linestyle=line, linewidth=2,
            markersize=8, elinewidth=1, capsize=3, markeredgecolor='white', zorder=3,
        )  # fmt: skip
        for each, left, height in zip(group, x, y, strict=True):
            # Ours above their line, others below their points.
            is_ours = group is ours
            axes.annotate(
                short_name(each), (left, height), (-9, 5) if is_ours else (0, -9),
                textcoords='offset points', color=colour, fontsize=10, fontweight='bold',
                ha='right' if is_ours else 'center', va='bottom' if is_ours else 'top',
                path_effects=[withStroke(linewidth=3, foreground='white')], zorder=4,
            )  # fmt: skip
    label_axes(axes, [each[key] / unit for each in results], label)


def label_axes(axes: Any, x: list[float], label: str) -> None:
    """Logarithmic axes with plain numbers, and room for the names."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    axes.set(xscale='log', yscale='log', xlabel=label, xlim=(min(x) / 1.6, max(x) * 1.6))
    low, high = axes.get_ylim()
    axes.set_ylim(low / 1.15, high * 1.1)
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        # Of 1, 2, 5, 10, ... a narrow range has one or none.
        wide = high / low > 5
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if wide else MaxNLocator(5))
        axis.set_major_formatter(StrMethodFormatter('{x:g}'))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3, which='major')
    axes.spines[['top', 'right']].set_visible(False)


def short_name(result: Result) -> str:
    """Of ours S0, S1, ...: the title of the line says the rest."""
    return result['model'].removeprefix('EfficientFormerV2-')


def machine_line(outcome: dict[str, Any]) -> str:
    """Machine and versions, for below the picture."""
    machine = outcome['machine']
    name = machine.get('gpu', f'{machine["cpu"]}, threads: {machine["threads"]}')
    versions = [
        f'{library} {number.partition("-")[0]}'
        for library, number in machine['versions'].items()
        if library in ('torch', 'onnxruntime', 'openvino')
    ]
    folded = 'folded, but for training' if outcome['deploy'] else 'not folded'
    precision = 'mixed precision' if outcome['amp'] else 'float32'
    return f'{name}; {", ".join(versions)}; {folded}; {precision}; {machine["date"][:10]}'
