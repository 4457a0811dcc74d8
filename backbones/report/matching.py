"""Detections matched with ground truth, and the type of every error.

Matching is COCO's, crowd regions included. Types of errors, their thresholds and costs are those of
Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors" (ECCV 2020).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.cocoeval import COCOeval

# TIDE's IoU thresholds: for a match, and up to which a detection is on the background.
MATCH_IOU = 0.5
BACKGROUND_IOU = 0.1

ERRORS = ('classification', 'localization', 'both', 'duplicate', 'background', 'missed')
CLASSIFICATION, LOCALIZATION, BOTH, DUPLICATE, BACKGROUND, MISSED = range(len(ERRORS))
CORRECT, IGNORED = -1, -2


class Matches(NamedTuple):
    """Detections and ground truth objects of a test, without crowd regions and their detections."""

    # Of the detections, (D,); those of an image by descending score.
    image: np.ndarray
    label: np.ndarray
    score: np.ndarray
    # CORRECT or the number of an error type.
    kind: np.ndarray
    # The object that a correct detection matches, or that one of wrong class or place overlaps.
    target: np.ndarray
    # The object of another class that a wrong detection covers, each object at most once.
    confused: np.ndarray
    # Of the objects, (G,); above, -1 stands for none.
    object_image: np.ndarray
    object_label: np.ndarray

    def found(self, score_thr: float = 0.0) -> np.ndarray:
        """Return whether each object, (G,), has a correct detection with at least this score."""
        found = np.zeros(len(self.object_label), bool)
        found[self.target[(self.kind == CORRECT) & (self.score >= score_thr)]] = True
        return found

    def missed(self, score_thr: float = 0.0) -> np.ndarray:
        """Return whether each object, (G,), is no detection's target at this score or above."""
        missed = ~self.found(score_thr)
        meant = np.isin(self.kind, (CLASSIFICATION, LOCALIZATION)) & (self.score >= score_thr)
        missed[self.target[meant]] = False
        return missed

    def best_score_thr(self) -> float:
        """Return the score at which F1 of all detections is highest, rounded down to 3 decimals."""
        order = np.argsort(-self.score, kind='stable')
        if not len(order):
            return 0.5
        correct = np.cumsum(self.kind[order] == CORRECT)
        f1 = 2 * correct / (np.arange(1, len(order) + 1) + len(self.object_label))
        return float(np.floor(self.score[order[f1.argmax()]] * 1000) / 1000)


def match_all(evaluation: COCOeval) -> Matches:
    """Match the detections of every image that pycocotools has evaluated."""
    key = 'bbox' if evaluation.params.iouType == 'bbox' else 'segmentation'
    parts, total = [], 0
    for index, number in enumerate(evaluation.params.imgIds):
        objects, detections = rows_of(evaluation, number)
        crowd = np.array([bool(one['ignore']) for _, one in objects], bool)
        ious = np.zeros((len(detections), len(objects)))
        if ious.size:
            both = [[one[key] for _, one in rows] for rows in (detections, objects)]
            ious = coco_mask.iou(*both, crowd.astype(int).tolist())
        labels, object_labels = (
            np.array([label for label, _ in rows], int) for rows in (detections, objects)
        )
        kind, target, confused = match_image(labels, object_labels, ious, crowd)
        used, object_labels = kind != IGNORED, object_labels[~crowd]
        # Numbers among the objects of all images; -1 stays -1.
        place = np.append(np.cumsum(~crowd) - 1 + total, -1)
        total += len(object_labels)
        part = Matches(
            image=np.full(used.sum(), index),
            label=labels[used],
            score=np.array([one['score'] for _, one in detections], float)[used],
            kind=kind[used],
            target=place[target[used]],
            confused=place[confused[used]],
            object_image=np.full(len(object_labels), index),
            object_label=object_labels,
        )
        parts.append(part)
    return Matches(*map(np.concatenate, zip(*parts, strict=True)))


def rows_of(evaluation: COCOeval, number: int) -> list[list[tuple[int, dict]]]:
    """Return an image's ground truth and detections with labels, the highest score first."""
    objects, detections = (
        [
            (label, one)
            for label, category in enumerate(evaluation.params.catIds)
            for one in groups.get((number, category), ())
        ]
        for groups in (evaluation._gts, evaluation._dts)
    )
    return [objects, sorted(detections, key=lambda row: -row[1]['score'])]


def match_image(
    labels: np.ndarray, object_labels: np.ndarray, ious: np.ndarray, crowd: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ``kind``, ``target`` and ``confused`` of detections, sorted by descending score.

    ``ious`` are (D, G); with a crowd region, intersection over the area of the detection. What
    such a region covers is IGNORED.
    """
    kind = np.full(len(labels), BACKGROUND)
    target, confused = np.full((2, len(labels)), -1)
    if not ious.size:
        return kind, target, confused
    same = labels[:, None] == object_labels
    own, others = np.where(same & ~crowd, ious, 0), np.where(~same & ~crowd, ious, 0)
    free = own.copy()
    for row in np.flatnonzero(own.max(axis=1) >= MATCH_IOU):
        # The last of equal ones, as in pycocotools.
        best = len(object_labels) - 1 - free[row, ::-1].argmax()
        if free[row, best] >= MATCH_IOU:
            kind[row], target[row] = CORRECT, best
            free[:, best] = 0
    best_own, best_other = own.max(axis=1), others.max(axis=1)
    wrong = kind != CORRECT
    # In the order of TIDE's own code.
    types = {
        IGNORED: np.where(same & crowd, ious, 0).max(axis=1) >= MATCH_IOU,
        LOCALIZATION: (best_own >= BACKGROUND_IOU) & (best_own <= MATCH_IOU),
        CLASSIFICATION: best_other >= MATCH_IOU,
        DUPLICATE: best_own >= MATCH_IOU,
        BACKGROUND: np.maximum(best_own, best_other) <= BACKGROUND_IOU,
    }
    kind[wrong] = np.select(list(types.values()), list(types), BOTH)[wrong]
    for error, overlaps in ((LOCALIZATION, own), (CLASSIFICATION, others)):
        target[kind == error] = overlaps[kind == error].argmax(axis=1)
    free = others.copy()
    for row in np.flatnonzero(wrong & (kind != IGNORED) & (best_other >= MATCH_IOU)):
        best = free[row].argmax()
        if free[row, best] >= MATCH_IOU:
            confused[row] = best
            free[:, best] = 0
    return kind, target, confused


def average_precision(
    label: np.ndarray, score: np.ndarray, correct: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """Return COCO's AP of every class at one IoU threshold, 0 to 1; 0 if it has no objects.

    ``label``, ``score`` and ``correct`` are of detections, ``counts`` the objects of each class.
    """
    found = np.zeros(len(counts))
    for number in np.flatnonzero(counts):
        own = np.flatnonzero(label == number)
        own = own[np.argsort(-score[own], kind='stable')]
        hits = np.cumsum(correct[own])
        precision = np.append(hits / np.arange(1, len(own) + 1), 0)
        precision = np.maximum.accumulate(precision[::-1])[::-1]
        places = np.searchsorted(hits / counts[number], np.linspace(0, 1, 101))
        found[number] = precision[places].mean()
    return found


def ap_gains(matches: Matches, classes: int) -> dict[str, float]:
    """Return TIDE's dAP: how much AP at MATCH_IOU would rise without the errors of each type.

    A detection of wrong class or place is corrected if it is the first for an object without a
    correct detection. Otherwise it is left out, like those with other errors. Missed objects are
    not counted. The mean is over classes with objects, as in COCO's AP, that still have objects or
    detections, as in TIDE.
    """
    counts = np.bincount(matches.object_label, minlength=classes)
    found, kind, missed = matches.found(), matches.kind, matches.missed()
    fixable = np.flatnonzero(np.isin(kind, (CLASSIFICATION, LOCALIZATION)))
    fixable = fixable[~found[matches.target[fixable]]]
    fixable = fixable[np.unique(matches.target[fixable], return_index=True)[1]]

    def mean_ap(left_out: np.ndarray, fixed: Sequence[int], objects: np.ndarray) -> float:
        label, correct = matches.label.copy(), kind == CORRECT
        label[fixed], correct[fixed] = matches.object_label[matches.target[fixed]], True
        kept = correct | ~left_out
        left = counts - np.bincount(matches.object_label[objects], minlength=classes)
        values = average_precision(label[kept], matches.score[kept], correct[kept], left)
        used = (counts > 0) & ((left > 0) | (np.bincount(label[kept], minlength=classes) > 0))
        return float(values[used].mean()) if used.any() else 1.0

    nothing, no_object = np.zeros_like(kind, bool), np.zeros_like(found)
    baseline = mean_ap(nothing, [], no_object)
    values = {
        name: mean_ap(kind == number, fixable[kind[fixable] == number], no_object)
        for number, name in enumerate(ERRORS[:MISSED])
    }
    values['missed'] = mean_ap(nothing, [], missed)
    values['all false positives'] = mean_ap(kind != CORRECT, [], no_object)
    values['all false negatives'] = mean_ap(nothing, [], ~found)
    return {name: value - baseline for name, value in values.items()}
