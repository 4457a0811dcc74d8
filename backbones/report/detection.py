"""The sections of a report about a detector's boxes and masks."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.cocoeval import COCOeval

from backbones.inference.masks import crop_masks
from backbones.inference.results import Detections

from .blocks import (
    MAX_IMAGES,
    Block,
    calibration_block,
    count_by_confidence,
    matrix_block,
    pair_block,
    shown_size,
)
from .charts import Chart, line_chart
from .matching import (
    BACKGROUND_IOU,
    CORRECT,
    ERRORS,
    MATCH_IOU,
    MISSED,
    Matches,
    ap_gains,
    average_precision,
    match_all,
    rows_of,
)

SIZES = {
    'small': 'below 32² pixels',
    'medium': '32² to 96² pixels',
    'large': 'above 96² pixels',
}
MEANINGS = (
    f'wrong class, IoU at least {MATCH_IOU} with an object',
    f'right class, IoU {BACKGROUND_IOU} to {MATCH_IOU} with an object',
    f'wrong class, IoU {BACKGROUND_IOU} to {MATCH_IOU} with an object',
    'right class and place, but a detection with a higher score matches the object',
    f'IoU at most {BACKGROUND_IOU} with every object',
    'object without any detection, even of wrong class or place',
    'all detections that are not correct',
    'all objects without a correct detection',
)
# With more classes than this, the curves of each are folded away.
MAX_OPEN_CURVES = 5

# An image's path, its height and width.
ImageInfo = tuple[str, tuple[int, int]]


@dataclass
class DetectionResults:
    """The measurements of boxes or masks."""

    # 'bbox' or 'segm'.
    kind: str
    # Names, (C,), in the order of the labels.
    classes: list[str]
    # COCOeval's, (IoUs, recalls, C, sizes, numbers of detections), -1 where not measured.
    precision: np.ndarray
    # COCOeval's, as precision, but without recalls.
    recall: np.ndarray
    # The IoU thresholds along the first axis.
    iou_thrs: np.ndarray
    # How many objects are small, medium and large.
    sizes: list[int]
    matches: Matches
    # Matches.best_score_thr(), at which errors are counted.
    score_thr: float
    # Path, caption, ground truth, prediction, at the size that is shown.
    worst: list[tuple[str, str, Detections, Detections]]


def summarize(evaluation: COCOeval, images: Mapping[Any, ImageInfo]) -> DetectionResults:
    """Return the results that pycocotools has just evaluated; ``images`` are by id."""
    params, categories = evaluation.params, evaluation.cocoGt.cats
    objects = [one for group in evaluation._gts.values() for one in group if not one['ignore']]
    sizes = [sum(low <= one['area'] <= high for one in objects) for low, high in params.areaRng[1:]]
    classes = [categories[number]['name'] for number in params.catIds]
    matches = match_all(evaluation)
    score_thr = matches.best_score_thr()
    worst = []
    for index, caption in worst_images(matches, score_thr, classes):
        if (number := params.imgIds[index]) in images:
            path, shape = images[number]
            objects, detections = rows_of(evaluation, number)
            objects.sort(key=lambda row: row[1]['area'])
            shown = [row for row in detections if row[1]['score'] >= score_thr]
            pair = [to_detections(rows, params.iouType, shape) for rows in (objects, shown)]
            worst.append((path, caption, *pair))
    return DetectionResults(
        params.iouType,
        classes,
        evaluation.eval['precision'],
        evaluation.eval['recall'],
        np.asarray(params.iouThrs),
        sizes,
        matches,
        score_thr,
        worst,
    )


def worst_images(
    matches: Matches, score_thr: float, classes: Sequence[str]
) -> list[tuple[int, str]]:
    """Return indices and captions of the images with the lowest F1, then with most errors."""
    seen, correct = matches.score >= score_thr, matches.kind == CORRECT
    size = 1 + max(matches.image.max(initial=0), matches.object_image.max(initial=0))
    groups = (matches.image[seen & correct], matches.image[seen], matches.object_image)
    hits, detections, objects = (np.bincount(group, minlength=size) for group in groups)
    errors = detections + objects - 2 * hits
    f1 = 2 * hits / np.maximum(detections + objects, 1)
    missed, found = matches.missed(score_thr), []
    for index in [i for i in np.lexsort((-errors, f1)) if errors[i]][:MAX_IMAGES]:
        labels = {
            name: matches.label[seen & (matches.image == index) & (matches.kind == number)]
            for number, name in enumerate(ERRORS)
        }
        labels['missed'] = matches.object_label[missed & (matches.object_image == index)]
        texts = [
            f'{len(own)} {name} ({count_names(own, classes)})'
            for name, own in sorted(labels.items(), key=lambda item: -len(item[1]))
            if len(own)
        ]
        found.append((index, f'F1 {f1[index]:.2f}: {", ".join(texts)}'))
    return found


def count_names(labels: np.ndarray, classes: Sequence[str]) -> str:
    """Return a text of the most frequent classes and how often they occur."""
    counts = Counter(labels.tolist()).most_common()
    names = [classes[label] + (f' {times}' if times > 1 else '') for label, times in counts[:3]]
    return ', '.join(names) + (', ...' if len(counts) > 3 else '')


def to_detections(rows: list[tuple[int, dict]], kind: str, shape: tuple[int, int]) -> Detections:
    """Scale COCO's annotations or results from an image's size to the size that is shown."""
    size = shown_size(*shape)
    boxes = np.array([one['bbox'] for _, one in rows], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes *= np.float32([size[0] / shape[1], size[1] / shape[0]] * 2)
    masks = None
    if kind == 'segm':
        masks = [
            crop_masks(cv2.resize(coco_mask.decode(one['segmentation']), size)[None])[0]
            for _, one in rows
        ]
    scores = np.array([one.get('score', 0) for _, one in rows], np.float32)
    is_truth = not any('score' in one for _, one in rows)
    labels = np.array([label for label, _ in rows], np.int64)
    return Detections(boxes, None if is_truth else scores, labels, masks)


def detection_blocks(results: DetectionResults) -> list[Block]:
    """Return all blocks of a section."""
    matches, score_thr = results.matches, f'{results.score_thr:.3f}'
    at_score = f'IoU {MATCH_IOU}, score at least {score_thr}, where F1 is highest'
    matrix, names = confusion(results), [*results.classes, 'background']
    matrix_note = (
        f'Rows are ground truth, columns predictions ({at_score}). The row “background” counts '
        'detections without an object of their own, its column objects without a detection.'
    )
    pair_note = f'From the matrix above; “background” means no object or no detection ({at_score}).'
    calibration_note = (
        f'All {len(matches.score):,} detections by their score. Correct: right class, IoU at least '
        f'{MATCH_IOU}, no duplicate.'
    )
    bins = count_by_confidence(matches.score, matches.kind == CORRECT)
    return [
        class_block(results, at_score),
        curve_block(results),
        error_block(results),
        matrix_block(matrix, names, 'objects', matrix_note),
        pair_block(matrix, names, 'objects', pair_note),
        size_block(results),
        calibration_block(bins, calibration_note),
    ]


def class_block(results: DetectionResults, at_score: str) -> Block:
    """Return a table of the AP, precision and recall of every class."""
    matches, number = results.matches, len(results.classes)
    correct, seen = matches.kind == CORRECT, matches.score >= results.score_thr
    objects = np.bincount(matches.object_label, minlength=number)
    ap50 = average_precision(matches.label, matches.score, correct, objects)
    hits, detections = (
        np.bincount(matches.label[mask], minlength=number) for mask in (seen & correct, seen)
    )
    rows = []
    for label, name in enumerate(results.classes):
        values = (
            mean_of(results.precision[:, :, label, 0, -1]),
            ap50[label] if objects[label] else math.nan,
            mean_of(results.recall[:, label, 0, -1]),
            hits[label] / detections[label] if detections[label] else math.nan,
            hits[label] / objects[label] if objects[label] else math.nan,
            *(mean_of(results.precision[:, :, label, size, -1]) for size in range(1, 4)),
        )
        rows.append([name, int(objects[label]), *values])
    note = (
        'COCO’s AP and AR (average recall) are means over IoU thresholds, AP50 is at IoU 0.5. '
        f'Precision and recall: {at_score}. The table below defines the sizes.'
    )
    sizes = (f'AP {name}' for name in SIZES)
    columns = ('class', 'objects', 'AP', 'AP50', 'AR', 'precision', 'recall', *sizes)
    return Block('Classes', note, columns, rows)


def size_block(results: DetectionResults) -> Block:
    """Return a table of AP and AR by the size of objects."""
    rows = [
        [
            name,
            mean_of(results.precision[:, :, :, index, -1]),
            mean_of(results.recall[:, :, index, -1]),
            results.sizes[index - 1],
            area,
        ]
        for index, (name, area) in enumerate(SIZES.items(), 1)
    ]
    names = ('size', 'AP', 'AR', 'objects', 'area')
    return Block('Sizes of objects', 'By the area of the ground truth.', names, rows, half=True)


def curve_block(results: DetectionResults) -> Block:
    """Return precision-recall curves, of all classes and of each."""
    precision = results.precision[:, :, :, 0, -1]
    recalls = np.linspace(0, 1, precision.shape[1])
    thresholds = np.round(results.iou_thrs, 4).tolist()
    at = {f'IoU {one}': index for index, one in enumerate(thresholds) if one in (0.5, 0.75)}

    def chart(title: str, labels: Sequence[int]) -> Chart:
        values = precision[:, :, labels].mean(axis=2)
        curves = {name: values[index] for name, index in at.items()}
        curves['mean over IoU'] = values.mean(axis=0)
        lines = {name: list(zip(recalls, curve, strict=True)) for name, curve in curves.items()}
        return line_chart(title, lines, ('recall', 'precision'), (0, 1), (0, 1))

    measured = np.flatnonzero(precision[0, 0] > -1)
    every = [chart('all classes', measured)] if len(measured) > 1 else []
    each = [chart(results.classes[label], [label]) for label in measured]
    note = 'Interpolated as in COCO; “all classes” is their mean.'
    if len(each) > MAX_OPEN_CURVES:
        return Block('Precision and recall', note, charts=every, more_charts=each)
    return Block('Precision and recall', note, charts=every + each)


def error_block(results: DetectionResults) -> Block:
    """Return a table of the errors by type: how much they cost and how many there are."""
    matches, score_thr = results.matches, results.score_thr
    gains = ap_gains(matches, len(results.classes))
    counts = np.bincount(
        matches.kind[(matches.score >= score_thr) & (matches.kind != CORRECT)], minlength=MISSED
    ).tolist()
    counts += [matches.missed(score_thr).sum(), sum(counts), (~matches.found(score_thr)).sum()]
    rows = [
        [name, gain, int(number), meaning]
        for (name, gain), number, meaning in zip(gains.items(), counts, MEANINGS, strict=True)
    ]
    note = (
        'Types, thresholds and dAP are those of TIDE (Bolya et al., “A General Toolbox for '
        'Identifying Object Detection Errors”, ECCV 2020). dAP50 is how much AP50 would rise if '
        'only errors of that type were fixed, so the values do not add up. Errors are counted '
        f'at a score of at least {score_thr:.3f}; dAP50 is computed from all detections.'
    )
    columns = ('type', 'dAP50', 'errors', 'meaning')
    return Block('Types of errors', note, columns, rows, '+.3f')


def confusion(results: DetectionResults) -> np.ndarray:
    """Return the confusion matrix at ``score_thr``, (C + 1, C + 1), rows ground truth.

    The last row counts detections that cover no object, or one that another detection has; the
    last column counts objects without a detection.
    """
    matches, background = results.matches, len(results.classes)
    matrix = np.zeros((background + 1, background + 1), np.int64)
    found = matches.found(results.score_thr)
    seen, correct = matches.score >= results.score_thr, matches.kind == CORRECT
    confused = seen & (matches.confused >= 0)
    confused[confused] = ~found[matches.confused[confused]]
    objects = matches.confused[confused]
    pairs = [
        (matches.label[seen & correct], matches.label[seen & correct]),
        (matches.object_label[objects], matches.label[confused]),
        (background, matches.label[seen & ~correct & ~confused]),
    ]
    found[objects] = True
    for rows, columns in [*pairs, (matches.object_label[~found], background)]:
        np.add.at(matrix, (rows, columns), 1)
    return matrix


def mean_of(values: np.ndarray) -> float:
    """Return the mean of COCOeval's values without -1 (not measured); NaN if all are -1."""
    measured = values[values > -1]
    return float(measured.mean()) if measured.size else math.nan
