"""The figures as tables, and as JSON."""

import json
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

Result = dict[str, Any]
HEADER = (
    'model',
    'parameters',
    'multiply-adds',
    'median',
    'p90',
    'spread',
    'pictures/s',
    'time ratio',
    'peak memory',
)
MIXED = (
    'float16 on a GPU; on a CPU bfloat16, for all of a segmentor, in detectors and in training for '
    'backbone and neck only; in OpenVINO what it chooses.'
)


def write_json(outcome: dict[str, Any], path: Path) -> None:
    """Write everything that was measured."""
    path.write_text(json.dumps(outcome, indent=2) + '\n', encoding='utf-8')


def format_outcome(outcome: dict[str, Any]) -> str:
    """Tables in Markdown that are aligned for the console too, the machine, and how it was done."""
    sections = [
        f'## {title_of(results[0])}\n\n{format_table(results)}'
        for results in lanes(outcome['results'])
    ]
    check = outcome['paper_check']
    folded = (
        "All networks were folded for inference by backbones.deploy, the peers' too, and in torch "
        "on a CPU they work in channels last, the peers' too; training steps are left as they are."
        if outcome['deploy']
        else "No network was folded for inference (--no-deploy): the peers are as mmdet's and "
        "mmseg's users have them."
    )
    notes = [
        *(f'**Warning:** {warning}.' for warning in outcome['warnings']),
        describe(outcome['machine']),
        folded,
        *(['Mixed precision (--amp): ' + MIXED] if outcome['amp'] else []),
        *outcome['notes'],
        f'Counted so, s2 at 224x224 has {check["counted"] / 1e9:.3f} G multiply-adds, '
        f'{check["with_classifier"] / 1e9:.3f} G with its classifiers; the paper says '
        f'{check["paper"] / 1e9:.2f} G.',
        f'Measuring took {outcome["seconds"]:.0f} s.',
    ]
    how = '\n'.join(f'- {note}' for note in notes)
    return '\n\n'.join([*sections, f'## How it was measured\n\n{how}'])


def lanes(results: Iterable[Result]) -> list[list[Result]]:
    """The results that were measured against each other, together."""
    return [list(group) for _, group in groupby(results, title_of)]


def title_of(result: Result) -> str:
    """What the results of one table have in common."""
    part = 'backbone' if result['part'] == 'backbone' else f'{result["head"]}, whole model'
    height, width = result['size']
    step = ', training step' if result['step'] == 'train' else ''
    under = f' (under {result["head"]})' if result['part'] == 'backbone' else ''
    return f'{part}{under}{step}: {height}x{width}, batch {result["batch"]}, {result["backend"]}'


def format_table(results: list[Result]) -> str:
    """One line for each model."""
    rows = [list(HEADER), *(row_of(result) for result in results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = [
        '| ' + ' | '.join(align(cell, width, i) for i, (cell, width) in enumerate(zipped)) + ' |'
        for zipped in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    rule = ['-' * (width - (i > 0)) + ':' * (i > 0) for i, width in enumerate(widths)]
    lines.insert(1, '| ' + ' | '.join(rule) + ' |')
    problems = [f'{each["model"]}: {each["problem"]}' for each in results if each['problem']]
    setup = [
        f'{each["model"]} {each["setup_seconds"]:.1f} s'
        for each in results
        if each.get('setup_seconds')
    ]
    if setup:
        problems.append(f'compiling or exporting took: {", ".join(setup)}')
    return '\n'.join(lines) + ''.join(f'\n\n{problem}' for problem in problems)


def align(cell: str, width: int, column: int) -> str:
    """Names to the left, figures to the right."""
    return cell.ljust(width) if column == 0 else cell.rjust(width)


def row_of(result: Result) -> list[str]:
    """A model's line; a dash for what there is not."""
    row = [result['model'], '–', '–', '–', '–', '–', '–', '–', '–']
    if 'macs' in result:
        row[1] = f'{result["parameters"] / 1e6:.2f} M'
        row[2] = f'{result["macs"] / 1e9:.2f} G'
    if 'latency_ms' in result:
        latency = result['latency_ms']
        row[3], row[4] = f'{latency["median"]:.1f} ms', f'{latency["p90"]:.1f} ms'
        row[5] = f'{latency["spread_percent"]:.0f} %'
        row[6] = f'{result["pictures_per_second"]:.1f}'
        row[7] = f'{result["ratio"]:.2f}'
    if result.get('peak_memory_mib') is not None:
        row[8] = f'{result["peak_memory_mib"]:.0f} MiB'
    return row


def describe(machine: dict[str, Any]) -> str:
    """The machine in a sentence."""
    pinned = machine['pinned_to']
    where = f' pinned to processors {", ".join(map(str, pinned))}' if pinned else ' (not pinned)'
    gpu = f'{machine["gpu"]} (CUDA {machine["cuda"]}), ' if 'gpu' in machine else ''
    versions = ', '.join(f'{name} {number}' for name, number in machine['versions'].items())
    return (
        f'{gpu}{machine["cpu"]}, {machine["physical_cores"]} cores, {machine["memory_gib"]} GiB; '
        f'threads: {machine["threads"]}{where}; {machine["system"]}, Python {machine["python"]}, '
        f'{versions}; {machine["date"]}.'
    )
