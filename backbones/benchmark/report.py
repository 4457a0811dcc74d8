"""The results of a benchmark as tables and as a plot."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from backbones.files import atomic_write

Result = dict[str, Any]
COLUMNS = (
    *('model', 'parameters', 'multiply-adds', 'median', 'p90', 'spread', 'images/s'),
    *('time ratio', 'peak memory'),
)


def format_outcome(outcome: dict[str, Any]) -> str:
    """Return Markdown with tables, aligned for the console too, the machine and the method."""
    sections = [
        f'## {title_of(results[0])}\n\n{format_table(results)}'
        for results in by_title(outcome['results'])
    ]
    machine = outcome['machine']
    pinned = machine['pinned_to']
    where = f'pinned to processors {", ".join(map(str, pinned))}' if pinned else 'not pinned'
    versions = ', '.join(f'{name} {number}' for name, number in machine['versions'].items())
    folded = 'All models, peers too, are folded for inference.'
    notes = [
        f'{processor(machine)} ({where}); {machine["system"]}, Python {machine["python"]}, '
        f'{versions}; {machine["date"]}; it took {outcome["seconds"]:.0f} s.',
        folded if outcome['deploy'] else 'Not folded (--no-deploy).',
        *(['Mixed precision (--amp).'] if outcome['amp'] else []),
        'Weights are random. What the columns mean: docs/speed.md.',
    ]
    how = '\n'.join(f'- {note}' for note in notes)
    return '\n\n'.join([*sections, f'## How it was measured\n\n{how}'])


def by_title(results: Iterable[Result]) -> list[list[Result]]:
    """Group the results that were measured side by side."""
    return [list(group) for _, group in groupby(results, title_of)]


def title_of(result: Result) -> str:
    """Return the title of a table: what its results have in common."""
    head, (height, width) = result['head'], result['size']
    part = f'backbone (under {head})' if result['part'] == 'backbone' else f'{head}, whole model'
    step = ', training step' if result['step'] == 'train' else ''
    return f'{part}{step}: {height}x{width}, batch {result["batch"]}, {result["backend"]}'


def processor(machine: dict[str, Any]) -> str:
    gpu = f'{machine["gpu"]} (CUDA {machine["cuda"]}), ' if 'gpu' in machine else ''
    return f'{gpu}{machine["cpu"]}, threads: {machine["threads"]}'


def format_table(results: list[Result]) -> str:
    """Return a table with one row per model, and the problems below it."""
    problems = [f'\n\n{each["model"]}: {each["problem"]}' for each in results if each['problem']]
    return format_rows([COLUMNS, *map(row_of, results)]) + ''.join(problems)


def format_rows(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table of cells with aligned columns; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    # Names to the left, figures to the right.
    line = ['-' * widths[0], *('-' * (width - 1) + ':' for width in widths[1:])]
    lines = []
    for name, *cells in (rows[0], line, *rows[1:]):
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append(f'| {" | ".join([name.ljust(widths[0]), *padded])} |')
    return '\n'.join(lines)


def row_of(result: Result) -> list[str]:
    """Return a model's row, with dashes for missing values."""
    row = [result['model'], *'–' * 8]
    if 'macs' in result:
        row[1:3] = f'{result["parameters"] / 1e6:.2f} M', f'{result["macs"] / 1e9:.2f} G'
    if 'latency_ms' in result:
        latency = result['latency_ms']
        row[3:5] = f'{latency["median"]:.1f} ms', f'{latency["p90"]:.1f} ms'
        row[5:7] = f'{latency["spread_percent"]:.0f} %', f'{result["images_per_second"]:.1f}'
        row[7] = f'{result["ratio"]:.2f}'
    if result.get('peak_memory_mib') is not None:
        row[8] = f'{result["peak_memory_mib"]:.0f} MiB'
    return row


def draw_plot(outcome: dict[str, Any], path: Path) -> bool:
    """Draw latency over parameters and multiply-adds, a row per table; False if there is none."""
    from matplotlib.figure import Figure

    tables = by_title(each for each in outcome['results'] if 'latency_ms' in each)
    if not tables:
        return False
    figure = Figure(figsize=(11, 4.6 * len(tables) + 0.5), layout='constrained')
    rows = figure.subplots(len(tables), 2, squeeze=False, sharey='row')
    for axes, results in zip(rows, tables, strict=True):
        axes[0].set_title(title_of(results[0]), loc='left', fontsize=12, fontweight='bold')
        axes[0].set_ylabel('latency (ms), median; bar: 10 % to 90 %')
        draw_panel(axes[0], results, 'parameters', 1e6, 'parameters (M)')
        draw_panel(axes[1], results, 'macs', 1e9, 'multiply-adds (G)')
    machine, folded = outcome['machine'], 'folded' if outcome['deploy'] else 'not folded'
    precision = 'mixed precision' if outcome['amp'] else 'float32'
    below = f'{processor(machine)}; {folded}; {precision}; {machine["date"][:10]}'
    figure.supxlabel(below, fontsize=8, color='#555555')
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=150, format='png')
    return True


def draw_panel(axes: Any, results: list[Result], key: str, unit: float, label: str) -> None:
    """Draw a point for each model, and a line through ours."""
    for ours, color, marker in ((False, '#c2541b', 's'), (True, '#0b5fa5', 'o-')):
        group = sorted((each for each in results if each['ours'] == ours), key=lambda e: e[key])
        latencies = [each['latency_ms'] for each in group]
        x, y = [each[key] / unit for each in group], [each['median'] for each in latencies]
        bars = [[abs(each[end] - each['median']) for each in latencies] for end in ('p10', 'p90')]
        axes.errorbar(x, y, bars, fmt=marker, color=color, elinewidth=1, capsize=3)
        for each, point in zip(group, zip(x, y, strict=True), strict=True):
            name = each['model'].removeprefix('EfficientFormerV2-')
            # Ours above their line, others below their points.
            offset, side = ((-8, 4), 'right') if ours else ((0, -16), 'center')
            axes.annotate(name, point, offset, textcoords='offset points', color=color, ha=side)
    axes.set(xlabel=label)
    axes.margins(0.15)
    axes.grid(alpha=0.3)
