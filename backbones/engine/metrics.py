"""Metrics: per class, the main one, which chooses the best checkpoint, and their printing."""

import json
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.evaluator import BaseMetric

# The main metrics of COCO, LVIS and segmentation; the first one that was measured is chosen.
MAIN = ('segm_mAP', 'bbox_mAP', 'segm_AP', 'bbox_AP', 'mIoU', 'mDice', 'mFscore')
PER_CLASS = ('bbox_AP', 'segm_AP', 'IoU')
SUFFIX = '_precision'

Compute = Callable[[list], dict[str, float]]


def add_per_class(metric: BaseMetric) -> None:
    """Let mmdet's COCO metric and mmseg's IoU metric also return the value of every class."""
    add = {'CocoMetric': coco_per_class, 'IoUMetric': iou_per_class}.get(owner_of(metric))
    if add is not None and not metric.format_only:
        metric.compute_metrics = partial(add, metric, metric.compute_metrics)


def owner_of(metric: BaseMetric) -> str:
    """Return the name of the class that defines a metric's ``compute_metrics``."""
    return next(kind for kind in type(metric).__mro__ if 'compute_metrics' in vars(kind)).__name__


def coco_per_class(metric: BaseMetric, compute: Compute, results: list) -> dict[str, float]:
    """Return COCO's metrics, with ``{bbox,segm}_AP/CLASS`` for every class.

    mmdet names a class's AP the same for boxes and masks, so that the second overwrites the first,
    and mixes up the names if the ids in the file are not ascending. Without detections it returns
    nothing, which ends a training that keeps the best checkpoint; here the AP is 0 then.
    """
    metric.classwise = True
    kinds, everything = metric.metrics, {}
    try:
        for kind in kinds:
            metric.metrics = [kind]
            found = compute(results)
            if not found and kind in ('bbox', 'segm'):
                names = metric.metric_items or ['mAP', 'mAP_50', 'mAP_75']
                found = {f'{kind}_{name}': 0.0 for name in names}
            # pycocotools sorts classes by id; mmdet names them in the order of the file.
            names = [name for name in found if name.endswith(SUFFIX)]
            by_id = [names[place] for place in np.argsort(metric.cat_ids)] if names else names
            found |= dict(zip(by_id, [found[name] for name in names], strict=True))
            for name, value in found.items():
                if name.endswith(SUFFIX):
                    name = f'{kind}_AP/{name.removesuffix(SUFFIX)}'
                everything[name] = value
    finally:
        metric.metrics = kinds
    return everything


def iou_per_class(metric: BaseMetric, compute: Compute, results: list) -> dict[str, float]:
    """Return mmseg's metrics, with ``IoU/CLASS`` in percent; NaN for a class without pixels."""
    metrics = compute(results)
    intersection = torch.stack([result[0] for result in results]).sum(0)
    union = torch.stack([result[1] for result in results]).sum(0)
    for name, iou in zip(metric.dataset_meta['classes'], intersection / union, strict=True):
        metrics[f'IoU/{name}'] = round(100 * float(iou), 2)
    return metrics


def main_metrics(names: Iterable[str]) -> list[str]:
    """Return the main metrics among those measured: mask AP, box AP, mIoU; else the first.

    mmdet adds prefixes to names for models with a teacher and for joined datasets; a config may
    measure mAP_50 alone.
    """
    names = list(names)
    for is_of in (str.__eq__, str.startswith):
        found = [n for main in MAIN for n in names if is_of(n.rpartition('/')[2], main)]
        if found:
            return found
    return names[:1]


def is_per_class(name: str) -> bool:
    """Return whether a metric is for a single class."""
    return any(f'{kind}/' in name for kind in PER_CLASS)


def is_of_size(name: str) -> bool:
    """Return whether a metric is COCO's for objects of one size; it is -1 if there are none."""
    return name.endswith(('_mAP_s', '_mAP_m', '_mAP_l'))


def overall(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics without single classes and times."""
    return {
        name: value
        for name, value in metrics.items()
        if not is_per_class(name) and not name.endswith('time')
    }


def write_metrics(metrics: Mapping[str, object], path: Path) -> None:
    """Write metrics as JSON; NaN (not measured) becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    valid = {
        name: (float(value) if math.isfinite(value) else None) if is_number(value) else value
        for name, value in metrics.items()
    }
    path.write_text(json.dumps(valid, indent=2, default=str) + '\n', encoding='utf-8')


def format_metrics(metrics: Mapping[str, object]) -> str:
    """Format a line for every metric, then a table with a row for every class."""
    lines = [f'  {name:<24} {figure(value)}' for name, value in overall(metrics).items()]
    classes: dict[str, dict[str, object]] = {}
    for name, value in metrics.items():
        if is_per_class(name):
            kind = next(kind for kind in PER_CLASS if f'{kind}/' in name)
            classes.setdefault(name.partition(f'{kind}/')[2], {})[kind] = value
    if classes:
        kinds = list(dict.fromkeys(kind for row in classes.values() for kind in row))
        lines += ['', f'  {"class":<24} ' + ' '.join(f'{kind:>8}' for kind in kinds)]
        for label, row in classes.items():
            figures = ' '.join(figure(row.get(kind, math.nan)) for kind in kinds)
            lines.append(f'  {label:<24} {figures}')
    return '\n'.join(lines)


def figure(value: object) -> str:
    return f'{float(value):8.3f}' if is_number(value) else str(value)


def is_number(value: object) -> bool:
    """Return whether a metric's value is a single number, also one of NumPy or torch."""
    return isinstance(value, numbers.Real) or getattr(value, 'ndim', None) == 0
