"""Detections and objects of one hand-made image, all of whose errors are known."""

import numpy as np
import pytest

from backbones.report.detection import DetectionResults, confusion, curve_block, worst_images
from backbones.report.matching import (
    BACKGROUND,
    BOTH,
    CLASSIFICATION,
    CORRECT,
    DUPLICATE,
    IGNORED,
    LOCALIZATION,
    Matches,
    ap_gains,
    match_image,
)

CLASSES = ['cat', 'dog']
# Objects: cat, dog, cat, dog, cat, and a crowd of cats.
OBJECTS = np.array([0, 1, 0, 1, 0, 0])
CROWD = np.array([False] * 5 + [True])
# Detections by falling score: their label, what they overlap, and the error.
CASES = [
    (0, {0: 0.9}, CORRECT),
    (0, {0: 0.8}, DUPLICATE),
    (0, {1: 0.7, 2: 0.05}, CLASSIFICATION),
    (0, {2: 0.3}, LOCALIZATION),
    (1, {2: 0.3}, BOTH),
    (1, {3: 0.1}, LOCALIZATION),
    (1, {0: 0.05, 3: 0.09}, BACKGROUND),
    (0, {5: 0.6}, IGNORED),
    (1, {1: 0.6}, CORRECT),
]
SCORES = np.linspace(0.9, 0.1, len(CASES))


@pytest.fixture
def matches() -> Matches:
    labels = np.array([label for label, _, _ in CASES])
    ious = np.zeros((len(CASES), len(OBJECTS)))
    for row, (_, overlaps, _) in enumerate(CASES):
        for place, iou in overlaps.items():
            ious[row, place] = iou
    kind, target, confused = match_image(labels, OBJECTS, ious, CROWD)
    assert kind.tolist() == [kind for _, _, kind in CASES]
    assert target.tolist() == [0, -1, 1, 2, -1, 3, -1, -1, 1]
    assert confused.tolist() == [-1, -1, 1, -1, -1, -1, -1, -1, -1]
    used = kind != IGNORED
    of_image = [np.zeros(used.sum(), int), labels[used], SCORES[used]]
    return Matches(
        *of_image, kind[used], target[used], confused[used], np.zeros(5, int), OBJECTS[~CROWD]
    )


def results_at(matches: Matches, score_thr: float) -> DetectionResults:
    return DetectionResults('bbox', CLASSES, *[np.empty(0)] * 3, [], matches, score_thr, [])


def test_what_is_missed(matches):
    """An object that a detection of wrong class or place was meant for is not."""
    assert matches.missed().tolist() == [False, False, False, False, True]
    # At this score no detection of the second dog is left.
    assert matches.missed(0.55).tolist() == [False, False, False, True, True]


def test_gains_by_hand(matches):
    """Cats: correct, duplicate, other class, other place; 3 objects. Dogs: both, place, background,
    correct; 2 objects. Each class has 101 recalls, of which a third are 34 and a half are 51."""
    third, two_thirds, half = 34 / 101, 67 / 101, 51 / 101
    cat, dog = third, half / 4
    gains = ap_gains(matches, 2)
    baseline = (cat + dog) / 2

    def mean(cat: float, dog: float) -> float:
        return pytest.approx((cat + dog) / 2 - baseline)

    # The dog has a correct detection, so that the cat over it is left out.
    assert gains['classification'] == mean(cat, dog)
    # Of 4 cats the last is correct now; of 4 dogs the second and the last.
    assert gains['localization'] == mean(
        third + (two_thirds - third) / 2, half / 2 + (1 - half) / 2
    )
    assert gains['both'] == mean(cat, half / 3)
    assert gains['duplicate'] == mean(cat, dog)
    assert gains['background'] == mean(cat, half / 3)
    assert gains['missed'] == mean(half, dog)
    assert gains['all false positives'] == mean(cat, half)
    assert gains['all false negatives'] == mean(1, 1 / 4)


@pytest.mark.parametrize('found', [0, 1])
def test_missed_objects_cost_what_their_class_lacks(found):
    """As in TIDE, a class of which nothing is left does not count; a class has an object each."""
    none, label = np.full(found, -1), np.arange(found)
    correct = np.full(found, CORRECT)
    objects = np.arange(2)
    gains = ap_gains(Matches(label, label, label + 0.5, correct, label, none, objects, objects), 2)
    cost = 1 - found / 2
    expected = {'missed': cost, 'all false negatives': cost}
    assert gains == dict.fromkeys(gains, 0) | expected


def test_confusion_by_hand(matches):
    matrix = confusion(results_at(matches, 0.0))
    # The dog's own detection has it, so that the cat over it has no object.
    assert matrix.tolist() == [[1, 0, 2], [0, 1, 1], [3, 3, 0]]
    matrix = confusion(results_at(matches, 0.65))
    # Without it, the dog was taken for a cat.
    assert matrix.tolist() == [[1, 0, 2], [1, 0, 1], [1, 0, 0]]


@pytest.mark.parametrize(('measured', 'charts'), [(0, 0), (1, 1), (2, 3)])
def test_one_class_has_its_curves_once(matches, measured, charts):
    results = results_at(matches, 0.0)
    results.iou_thrs, results.precision = np.array([0.5]), np.full((1, 101, 2, 4, 3), -1.0)
    results.precision[:, :, :measured] = 1
    assert len(curve_block(results).charts) == charts


def test_worst_images_say_why(matches):
    ((index, caption),) = worst_images(matches, 0.65, CLASSES)
    assert index == 0 and caption.startswith('F1 0.25')
    for part in ('1 duplicate (cat)', '1 classification (cat)', '3 missed (cat 2, dog)'):
        assert part in caption


def test_the_score_with_the_highest_f1(matches):
    # With all 8 detections, 2 of 5 objects are found: 4 / 13; with the first alone 2 / 6.
    assert matches.best_score_thr() == 0.9
    # Rounded down, so that the detection itself is above it.
    assert matches._replace(score=matches.score - 0.0004).best_score_thr() == 0.899


@pytest.mark.parametrize(
    ('labels', 'objects', 'ious', 'crowd', 'expected'),
    [
        # Of two equal objects the last, as in pycocotools.
        ([0], [0, 0], [[0.7, 0.7]], [False] * 2, ([CORRECT], [1], [-1])),
        # A crowd of another class takes nothing.
        ([1], [0], [[0.6]], [True], ([BACKGROUND], [-1], [-1])),
        # An object is mistaken for another class once.
        ([1, 1], [0], [[0.7], [0.6]], [False], ([CLASSIFICATION] * 2, [0, 0], [0, -1])),
    ],
    ids=['equal', 'crowd', 'confused'],
)
def test_one_image(labels, objects, ious, crowd, expected):
    found = match_image(*map(np.array, (labels, objects, ious, crowd)))
    assert tuple(values.tolist() for values in found) == expected
