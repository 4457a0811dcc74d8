"""Measuring several functions in turns, so that what disturbs the machine disturbs all alike."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

HOW = (
    'Models take turns: each turn is one call that is not timed, then calls for about a quarter of '
    'a second (at least one). Medians and percentiles are over all timed calls; the ratio is the '
    "median over the rounds of a model's median to that of the first model in the same round. "
    'Spread is the range from the 10th to the 90th percentile, in percent of the median.'
)
LEAST_ROUNDS = 3
WARM_UP_CALLS = 2
SECONDS_OF_A_TURN = 0.25
MOST_CALLS_OF_A_TURN = 50


@dataclass(frozen=True)
class Effort:
    """How long is measured.

    Attributes:
        rounds: How many turns every function gets, at most.
        seconds: Time for each function, after which no new round begins (but three at least,
            where ``rounds`` allows).
    """

    rounds: int = 10
    seconds: float = 5.0


@dataclass(frozen=True)
class Timed:
    """Seconds that calls of a function took.

    Attributes:
        rounds: For each round, those of its calls.
    """

    rounds: list[list[float]]

    def percentile(self, percent: float) -> float:
        """Seconds that so many percent of the calls do not exceed."""
        return float(np.percentile([call for calls in self.rounds for call in calls], percent))

    def round_medians(self) -> list[float]:
        """The median of each round, in seconds."""
        return [float(np.median(calls)) for calls in self.rounds]

    def ratio_to(self, other: 'Timed') -> float:
        """The median over the rounds of how many times the other's time this took."""
        pairs = zip(self.round_medians(), other.round_medians(), strict=True)
        return float(np.median([mine / theirs for mine, theirs in pairs]))


def measure_in_turns(
    functions: Mapping[str, Callable[[], Any]],
    synchronise: Callable[[], None],
    effort: Effort,
    report: Callable[[str], None],
) -> dict[str, Timed]:
    """Time functions alternately.

    Args:
        functions: By name.
        synchronise: Waits until the device has done all it was given.
        effort: How long.
        report: Called with a line for each round.
    """
    for function in functions.values():
        for _ in range(WARM_UP_CALLS):
            function()
        synchronise()
    timed: dict[str, list[list[float]]] = {name: [] for name in functions}
    start = time.perf_counter()
    for number in range(effort.rounds):
        late = time.perf_counter() - start > effort.seconds * len(functions)
        if late and number >= LEAST_ROUNDS:
            break
        report(f'round {number + 1}')
        for name, function in functions.items():
            timed[name].append(take_turn(function, synchronise))
    return {name: Timed(rounds) for name, rounds in timed.items()}


def take_turn(function: Callable[[], Any], synchronise: Callable[[], None]) -> list[float]:
    """Call once to fill the caches again, then time calls for a quarter of a second."""
    function()
    synchronise()
    calls: list[float] = []
    while not calls or (sum(calls) < SECONDS_OF_A_TURN and len(calls) < MOST_CALLS_OF_A_TURN):
        start = time.perf_counter()
        function()
        synchronise()
        calls.append(time.perf_counter() - start)
    return calls
