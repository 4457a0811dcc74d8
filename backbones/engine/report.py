"""What a test has measured, as a table and as JSON."""

import json
import math
from importlib import import_module
from pathlib import Path

from mmengine.config import Config

from backbones.data.config_datasets import walk

# The metrics of mmdet and mmseg, and our modules that add every class's own figure to them.
CLASSWISE = {
    'CocoMetric': ('classwise_coco', 'ClasswiseCocoMetric'),
    'IoUMetric': ('classwise_iou', 'ClasswiseIoUMetric'),
}


def report_every_class(config: Config, split: str) -> None:
    """Let the evaluators of a config's 'val' or 'test' return every class's own figure as well."""
    for evaluator in walk(config.get(f'{split}_evaluator')):
        if 'type' not in evaluator:
            continue
        name = str(evaluator.type).rpartition('.')[2]
        if name in CLASSWISE:
            module, replacement = CLASSWISE[name]
            import_module(f'.{module}', __package__)
            evaluator.type = f'{config.default_scope}.{replacement}'


def write_metrics(metrics: dict[str, float], path: Path) -> None:
    """Write metrics as JSON; what could not be measured (NaN) becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    valid = {name: float(v) if math.isfinite(v) else None for name, v in metrics.items()}
    path.write_text(json.dumps(valid, indent=2) + '\n', encoding='utf-8')


def format_metrics(metrics: dict[str, float]) -> str:
    """Metrics as lines of name and figure, those of single classes in a table of their own."""
    single = {name: value for name, value in metrics.items() if is_of_class(name)}
    overall = {
        name: value
        for name, value in metrics.items()
        if name not in single and not name.endswith('time')
    }
    lines = [f'  {name:<24} {value:8.3f}' for name, value in overall.items()]
    if single:
        lines += ['', '  every class:']
        lines += [f'  {name:<24} {value:8.3f}' for name, value in single.items()]
    return '\n'.join(lines)


def is_of_class(name: str) -> bool:
    """Whether a metric's name is that of a single class."""
    return any(f'{kind}/' in name for kind in ('bbox_AP', 'segm_AP', 'IoU'))
