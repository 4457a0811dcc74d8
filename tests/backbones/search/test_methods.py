"""The methods: what they find on invented metrics, and what they ask for."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from searching import SPACE, costs, metric

from backbones.errors import ConfigError
from backbones.search.methods import (
    METHODS,
    Search,
    climb,
    descend,
    greedy,
    random,
)
from backbones.search.space import Choice


def make(**options: object) -> Search:
    asked = []

    def evaluate(choices: list[Choice]) -> list[float]:
        asked.extend(choices)
        return list(map(metric, choices))

    defaults = dict(targets=dict(latency=9.0, parameters=2.5e6), evaluations=10**6)
    defaults |= dict(exponents=dict(latency=1, parameters=0.5))
    search = Search(SPACE, evaluate, costs, **defaults | options)
    search.asked = asked
    return search


def exhaustive(search: Search) -> Choice:
    """The paper's search, which evaluates every action in every step."""
    state = SPACE.largest
    while names := search.unmet(state):
        prices = {}
        for choice in SPACE.smaller(state).values():
            gain = search.score(choice, names) - search.score(state, names)
            if gain > 0:
                prices[choice] = (metric(state) - metric(choice)) / gain
        state = min(prices, key=prices.get)
    return state


@pytest.mark.parametrize(
    'targets', [dict(latency=9.0), dict(parameters=2e6), dict(latency=9.0, parameters=2.5e6)]
)
def test_greedy_ends_where_evaluating_everything_does(targets):
    search = make(targets=targets)
    path, _ = descend(search)
    assert path[0] == SPACE.largest and not search.unmet(path[-1])
    assert path[-1] == exhaustive(search)
    asked = len(search.asked)
    search = make(targets=targets)
    search_all = sum(len(SPACE.smaller(state)) for state in path[:-1])
    assert asked < search_all


@pytest.mark.parametrize('rise', [0, 0.001])
def test_of_steps_that_cost_nothing_the_one_that_gains_most(rise):
    """Also where the metric rises with all, as it does by chance with some."""
    search = make(targets=dict(latency=9.0))
    search.evaluate = lambda choices: [-rise * metric(choice) for choice in choices]
    (_, first, *_), _ = descend(search)
    latencies = {c: costs(c)['latency'] for c in SPACE.smaller(SPACE.largest).values()}
    assert latencies[first] == min(latencies.values())


@pytest.mark.parametrize(
    ('latency', 'parameters', 'targets'),
    [
        (0, 1, dict(latency=9.0)),
        (1, 0, dict(parameters=2e6)),
        # Latency is met long before.
        (1, 0, dict(latency=9.0, parameters=4e5)),
    ],
)
def test_a_target_without_weight_is_reached_still(latency, parameters, targets):
    weights = dict(latency=latency, parameters=parameters)
    path, _ = descend(search := make(targets=targets, exponents=weights))
    assert not search.unmet(path[-1])


def test_steps_that_gain_nothing_may_be_needed():
    """As where the latency model rounds channels up to 16, near the smallest network."""

    def padded(choice: Choice) -> dict[str, float]:
        channels = tuple(-(-width // 16) * 16 for width in choice.channels)
        return costs(replace(choice, channels=channels))

    search = make(targets=dict(latency=1.001 * padded(SPACE.smallest)['latency']))
    search.costs = padded
    assert not search.unmet(descend(search)[0][-1])


def test_greedy_uses_the_room_below_the_targets():
    """Here the metric rises with everything, so that nothing larger may be left that fits."""
    search = make()
    first, _ = descend(make())
    found = greedy(search)[-1]
    assert metric(found) > metric(first[-1]) and not search.unmet(found)
    assert all(search.unmet(larger) for larger in SPACE.larger(found).values())


def test_the_score_is_the_paper_s():
    """S0, S1, S2 and L, up to a factor."""
    rows = [(3.5e6, 0.9), (6.1e6, 1.1), (12.6e6, 1.6), (26.1e6, 2.7)]
    scores = []
    for parameters, latency in rows:
        search = make(targets=dict(latency=1.0, parameters=3e6))
        search.costs = lambda _, row=dict(parameters=parameters, latency=latency): row
        scores.append(100 * search.score(SPACE.largest, ['latency', 'parameters']))
    assert scores == pytest.approx([102.9, 63.8, 30.5, 12.6], abs=0.1)


@pytest.mark.parametrize('name', METHODS)
def test_deterministic_and_within_the_evaluations(name):
    if name == 'nsga2':
        pytest.importorskip('pymoo', reason='pymoo is not installed')
    runs = [make(evaluations=120, seed=3) for _ in range(2)]
    for search in runs:
        METHODS[name](search)
        assert len(search.found) <= 120
        assert any(not search.unmet(choice) for choice in search.found)
    assert runs[0].asked == runs[1].asked


def test_few_evaluations_still_reach_the_targets():
    few = len(SPACE.smaller(SPACE.largest)) + 3
    search = make(targets=dict(latency=6.5), evaluations=few)
    path = greedy(search)
    assert not search.unmet(path[-1]) and path[-1] in search.found and len(search.found) <= few
    with pytest.raises(ConfigError, match='evaluations'):
        greedy(make(evaluations=few - 5))


def test_random_networks_are_near_the_targets():
    search = make(evaluations=50)
    random(search)
    assert len(search.found) == 50
    assert all(math.log(0.8) <= search.excess(choice) <= 0 for choice in search.found)


def test_random_networks_are_as_near_to_far_targets_as_can_be():
    far = dict(latency=2 * costs(SPACE.largest)['latency'])
    random(search := make(targets=far, evaluations=20))
    rng = np.random.default_rng(1)
    usual = np.median([costs(SPACE.sample(rng))['latency'] for _ in range(50)])
    assert all(costs(choice)['latency'] > usual for choice in search.found)


def test_nsga2_starts_from_the_greedy_path_and_improves():
    pytest.importorskip('pymoo', reason='pymoo is not installed')
    search, half = make(evaluations=400, seed=2), make(evaluations=200)
    METHODS['nsga2'](search)
    greedy(half)
    found = list(search.found)
    assert found[: len(half.found)] == list(half.found)

    def feasible(choices: list[Choice]) -> list[float]:
        return [metric(choice) for choice in choices if not search.unmet(choice)]

    bred = found[len(half.found) :]
    early, late = feasible(bred[:80]), feasible(bred[-80:])
    random(other := make(evaluations=200))
    assert np.mean(late) > np.mean(early) + 0.5
    assert np.mean(early) > np.mean(feasible(list(other.found))) + 1
    # Later generations keep to the targets.
    assert len(late) > 70 > len(early)


@pytest.mark.parametrize(('name', 'share'), [('greedy', 1), ('nsga2', 2)])
def test_the_fewest_evaluations_that_are_named_do(name, share):
    if name == 'nsga2':
        pytest.importorskip('pymoo', reason='pymoo is not installed')
    with pytest.raises(ConfigError, match='--evaluations 20 ') as error:
        METHODS[name](make(evaluations=20))
    *_, least = map(int, re.findall(r'\d+', str(error.value)))
    assert least >= share * len(SPACE.smaller(SPACE.largest))
    METHODS[name](search := make(evaluations=least))
    assert len(search.found) <= least
    with pytest.raises(ConfigError):
        METHODS[name](make(evaluations=least - 1))


def test_nothing_meets_the_targets():
    with pytest.raises(ConfigError, match='smallest') as error:
        make(targets=dict(latency=1.0)).check_targets()
    assert f'{costs(SPACE.smallest)["latency"]:.1f} ms' in str(error.value)


def test_any_values_are_a_network():
    settings, rng = SPACE.dimensions.values(), np.random.default_rng(0)
    for _ in range(50):
        choice = SPACE.sample(rng)
        assert SPACE.possible(SPACE.largest.with_values(choice.values)) == choice
        values = (each[rng.integers(len(each))] for each in settings)
        assert SPACE.possible(SPACE.largest.with_values(values)) in SPACE


@pytest.mark.parametrize(
    ('evaluations', 'drop', 'is_found'), [(100, 0, True), (9, 0, False), (9, 0.1, True)]
)
def test_the_climb_tries_all_that_is_left_while_evaluations_last(evaluations, drop, is_found):
    """First that without which the metric has dropped."""
    start, actions = SPACE.smallest, SPACE.larger(SPACE.smallest)
    name, better = list(actions.items())[-1]
    search = make(targets=dict(latency=99.0), evaluations=evaluations)
    search.evaluate = lambda choices: [float(choice == better) for choice in choices]
    search.ask([start])
    path = climb(search, [start], drops={name: drop})
    assert path == ([start, better] if is_found else [start])
    assert len(search.found) <= evaluations


def test_names_of_actions():
    """What an action has cost is known by its name when it is looked for again."""
    actions = SPACE.smaller(SPACE.largest)
    assert SPACE.smaller(actions['stage 1, block 2']).keys() == actions.keys()
    # The climb asks what it costs to be without a block, which may come back.
    assert SPACE.larger(actions['stage 3, block 4, left out']).keys() <= actions.keys()
