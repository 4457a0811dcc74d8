"""The front: which networks are shown, which are measured, and what the last line advises."""

import json
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from searching import SPACE, costs, metric

from backbones.search.front import (
    Network,
    format_front,
    label_points,
    make_front,
    write_front,
)
from backbones.search.space import Choice

TARGETS = dict(latency=9.0, parameters=2.5e6)


def networks(number: int = 60, bonus: float = 0.0) -> list[Network]:
    """Random ones and the published; ``bonus`` is added to the metric of the latter."""
    rng = np.random.default_rng(0)
    random = {SPACE.sample(rng): None for _ in range(number)}
    names = {choice: name for name, choice in SPACE.published().items()}
    return [
        Network(one, metric(one) + bonus * (one in names), name=names.get(one), **costs(one))
        for one in {**random, **names, SPACE.smallest: None}
    ]


def test_no_network_shown_as_best_is_dominated():
    everything = networks()
    front = make_front(everything, TARGETS, 'mIoU')
    for one in everything:
        worse = any(
            other.metric >= one.metric
            and other.latency <= one.latency
            and other.parameters <= one.parameters
            and other is not one
            for other in everything
        )
        if any(one is each for each in front.best):
            assert not worse
    assert {id(one) for one in everything if one.name} <= {id(one) for one in front.networks}
    assert [one.number for one in front.networks] == list(range(1, len(front.networks) + 1))
    assert front.found.meets(TARGETS) and not front.found.name
    feasible = [one for one in everything if one.meets(TARGETS) and not one.name]
    assert front.found.metric == max(one.metric for one in feasible)


@pytest.mark.parametrize('bonus', [-10, 10])
def test_a_published_network_that_is_better_is_advised(bonus):
    targets = costs(SPACE.published()['s0, neck 96'])
    front = make_front(networks(bonus=bonus), targets, 'mIoU')
    last = format_front(front).splitlines()[-1]
    assert front.is_worth_it == (bonus < 0)
    number = front.found.number if bonus < 0 else front.baseline.number
    assert f'number {number}' in last
    assert front.baseline.name == 's0, neck 96' and 's0, neck 96' in last


def test_what_is_measured_decides():
    asked: list[Choice] = []

    def measure(choices: list[Choice]) -> list[float]:
        """The best by prediction takes longer than it may."""
        asked.extend(choices)
        return [20.0 if one == predicted else costs(one)['latency'] for one in choices]

    predicted = make_front(networks(), TARGETS, 'mIoU').found.choice
    front = make_front(networks(), TARGETS, 'mIoU', measure)
    assert len(asked) == len(set(asked)) <= 10 and predicted in asked
    assert front.found.choice != predicted and front.found.measured <= TARGETS['latency']
    shown = next(one for one in front.networks if one.choice == predicted)
    assert shown.measured == 20.0 and shown.latency == costs(predicted)['latency']


def test_what_is_found_was_measured():
    """Predictions are a tenth too low, for all networks, which a model of latency may be."""
    searched = [one for one in networks() if not one.name][:30]
    for one, ms in zip(searched, np.linspace(8, 8.99, 30), strict=True):
        one.latency = one.metric = ms
    times = {one.choice: 1.1 * one.latency for one in searched}
    front = make_front(searched, {'latency': 9.0}, 'mIoU', lambda asked: [times[c] for c in asked])
    assert front.off_pace is None
    meet = [one for one in searched if times[one.choice] <= 9]
    assert front.found is max(meet, key=lambda one: one.metric)
    assert front.found.measured == times[front.found.choice]


@pytest.mark.parametrize(('pace', 'number_that_meet'), [(1.06, 2), (1.1, 0)])
def test_a_published_network_that_is_advised_was_measured(pace, number_that_meet):
    """All five are predicted to be just fast enough, and the best of them are not."""
    everything = networks(bonus=10)
    published = sorted((one for one in everything if one.name), key=lambda one: one.metric)
    for one, ms in zip(published, np.linspace(8.2, 8.9, 5), strict=True):
        one.latency = ms
    times = {one.choice: pace * one.latency for one in everything}
    front = make_front(
        everything, {'latency': 9.0}, 'mIoU', lambda asked: [times[c] for c in asked]
    )
    assert front.off_pace is None
    if number_that_meet:
        assert front.baseline is published[number_that_meet - 1]
        assert front.baseline.measured == times[front.baseline.choice]
    else:
        assert front.baseline is None


@pytest.mark.parametrize('pace', [7, 0.5])
def test_what_is_measured_on_a_busy_machine_does_not_count(pace):
    def measure(choices: list[Choice]) -> list[float]:
        return [pace * costs(one)['latency'] for one in choices]

    predicted = make_front(networks(), TARGETS, 'mIoU')
    front = make_front(networks(), TARGETS, 'mIoU', measure)
    assert front.found.choice == predicted.found.choice and front.off_pace == pytest.approx(pace)
    assert all(one.measured is None for one in front.networks)


@pytest.mark.parametrize('has_latency', [True, False])
def test_files(has_latency, tmp_path):
    targets = TARGETS if has_latency else dict(parameters=2.5e6)
    members = networks()
    if not has_latency:
        members = [replace(one, latency=None) for one in members]
    front = make_front(members, targets, 'mIoU')
    front.notes = ['how it was done']
    write_front(front, tmp_path)
    saved = json.loads((tmp_path / 'front.json').read_text())
    found = saved['networks'][saved['found'] - 1]
    assert found['number'] == saved['found'] and saved['notes'] == front.notes
    choice = Choice.from_dict(found['choice'])
    assert choice == front.found.choice and found['parameters'] == costs(choice)['parameters']
    assert found['latency_ms'] == (costs(choice)['latency'] if has_latency else None)
    assert format_front(front) in (tmp_path / 'front.md').read_text()
    with Image.open(tmp_path / 'front.png') as image:
        assert np.asarray(image.convert('L')).std() > 10


def test_labels_of_close_networks_do_not_overlap():
    figure = Figure()
    axes = figure.subplots()
    points = [(100.0, 70.0), (100.1, 70.1), (100.2, 70.0), (0.0, 0.0)]
    axes.scatter(*zip(*points, strict=True))
    figure.draw_without_rendering()
    label_points(axes, [(point, 's0, neck 96', 'red') for point in points])
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 4
    assert all(box.count_overlaps(boxes[:number]) == 0 for number, box in enumerate(boxes))
