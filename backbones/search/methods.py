"""Search methods: find the best network of a space that meets the targets.

The greedy search is the paper's (section 4.2): from the largest network, each step makes the
dimension smaller that loses the least accuracy for its gain. The gain is that of the Mobile
Efficiency Score, parameters^-0.5 * latency^-1, whose constant factors do not matter here. If the
last step went far below the targets, dimensions are made larger again, which the paper does not do.
Random search is the baseline; NSGA-II continues from the greedy path.

With the same seed and the same metrics, a method asks for the same networks. So a killed search is
simply repeated, and the networks that were already evaluated take no time.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from backbones.errors import ConfigError, import_optional

from .space import Choice, Space

EXPONENTS = (0.5, 1.0)  # the paper's, of parameters and latency
# The greedy search evaluates all actions in every FULL_STEP-th step, else BEST_ACTIONS of them.
FULL_STEP = 10
BEST_ACTIONS = 8
# Random search prefers networks above this share of a target, and draws so many per evaluation.
NEAR_TARGET = 0.8
DRAWN_FOR_ONE = 20
POPULATION = 20
MAX_IDLE_GENERATIONS = 20


@dataclass
class Search:
    """The goal of a search, and the networks that it has evaluated."""

    space: Space
    evaluate: Callable[[Sequence[Choice]], list[float]]  # metrics of networks, larger is better
    costs: Callable[[Choice], dict[str, float]]  # 'parameters', and 'latency' in ms if known
    targets: dict[str, float]  # the most that a network may cost, by the same names
    exponents: dict[str, float]  # the weight of each cost in the score
    evaluations: int = 250  # how many networks may be evaluated
    seed: int = 0
    found: dict[Choice, float] = field(default_factory=dict)  # metrics, in the order of asking

    @property
    def left(self) -> int:
        """The number of networks that may still be evaluated."""
        return self.evaluations - len(self.found)

    def ask(self, choices: Sequence[Choice]) -> list[float]:
        """Return the metrics of networks; evaluate those that are new."""
        new = [choice for choice in dict.fromkeys(choices) if choice not in self.found]
        self.found.update(zip(new, self.evaluate(new), strict=True))
        return [self.found[choice] for choice in choices]

    def excess(self, choice: Choice) -> float:
        """Return the logarithm of the largest ratio of cost to target; 0 or less if all are met."""
        costs = self.costs(choice)
        return max(math.log(costs[name] / target) for name, target in self.targets.items())

    def unmet(self, choice: Choice) -> list[str]:
        """Return the targets that a network does not meet."""
        costs = self.costs(choice)
        return [name for name, target in self.targets.items() if costs[name] > target]

    def score(self, choice: Choice, names: Sequence[str]) -> float:
        """Return the Mobile Efficiency Score of the named costs, each in units of its target."""
        costs, weights = self.costs(choice), self.exponents
        # If only targets with exponent 0 are left, they must be met too.
        if not any(weights[name] for name in names):
            weights = dict.fromkeys(names, 1)
        return math.prod((costs[name] / self.targets[name]) ** -weights[name] for name in names)

    def check_targets(self) -> None:
        """Raise ConfigError if no network can meet the targets."""
        if self.unmet(self.space.smallest):
            smallest = format_costs(self.costs(self.space.smallest))
            raise ConfigError(
                f'no network of the space takes at most {format_costs(self.targets)}: the smallest '
                f'takes {smallest}. Start from a smaller config, or allow smaller settings in '
                'search (channels, min_depths, ratios, necks)'
            )


def format_costs(costs: dict[str, float]) -> str:
    """Return text such as '12.3 ms and 3,450,000 parameters'."""
    texts = {'latency': '{:.1f} ms', 'parameters': '{:,.0f} parameters'}
    return ' and '.join(texts[name].format(costs[name]) for name in texts if name in costs)


def greedy(search: Search) -> list[Choice]:
    """Return the networks from the largest one to the best that meets the targets."""
    check_evaluations(search)
    return climb(search, *descend(search))


def descend(search: Search) -> tuple[list[Choice], dict[str, float]]:
    """Run the paper's search, from the largest network to the first that meets the targets.

    A target that is met no longer counts. If the evaluations are short, a step evaluates fewer
    actions or none, and takes the one with the least known drop for its gain. Returns the networks
    of the path, and for every kind of action the last known drop of the metric.
    """
    state, path, drops = search.space.largest, [search.space.largest], {}
    metric = None
    while actions := useful_actions(search, state):

        def price(name: str) -> tuple[float, float]:
            gain = actions[name][1]
            # A rise of the metric, which is mostly chance, counts as no drop: divided by the gain,
            # it would favor the steps with the smallest gain.
            return max(drops.get(name, 0.0), 0.0) / gain, -gain

        number = affordable(search, path, actions)
        tried = sorted(actions, key=price)[: max(number, 1)]
        if number:
            if metric is None:
                (metric,) = search.ask([state])
            metrics = search.ask([actions[name][0] for name in tried])
            for name, value in zip(tried, metrics, strict=True):
                drops[name] = metric - value
        best = min(tried, key=price)
        state = actions[best][0]
        metric = search.found.get(state)
        path.append(state)
    search.ask([state])
    return path, drops


def climb(search: Search, path: list[Choice], drops: dict[str, float]) -> list[Choice]:
    """Make dimensions larger while the targets are met and the metric rises.

    The last step may have saved more than needed, for example by a narrower neck. Dimensions whose
    reduction lowered the metric most are tried first.
    """
    while better := better_and_larger(search, path[-1], drops):
        path.append(better)
    return path


def better_and_larger(search: Search, state: Choice, drops: dict[str, float]) -> Choice | None:
    """Try next larger networks, a few at a time; return the best of the first few with a rise."""
    actions = search.space.larger(state)
    names = [name for name, choice in actions.items() if not search.unmet(choice)]
    names.sort(key=lambda name: -drops.get(name, 0.0))
    while names and search.left > 0:
        number = min(BEST_ACTIONS, search.left)
        tried, names = [actions[name] for name in names[:number]], names[number:]
        metrics = search.ask(tried)
        if max(metrics) > search.found[state]:
            return tried[int(np.argmax(metrics))]
    return None


def check_evaluations(search: Search, share: int = 1) -> None:
    """Raise ConfigError if 1 / ``share`` of the evaluations is too few for the first step."""
    number = len(useful_actions(search, search.space.largest))
    if number and search.evaluations // share < number + 2:
        raise ConfigError(
            f'--evaluations {search.evaluations} is too few: the first step of the greedy search '
            f'evaluates {number} networks; set {share * (number + 2)} or more'
        )


def useful_actions(search: Search, state: Choice) -> dict[str, tuple[Choice, float]]:
    """Return the next smaller networks with a higher score, and the gain, until targets are met.

    If none has a higher score, all are returned with the same gain.
    """
    unmet = search.unmet(state)
    score = search.score(state, unmet)
    gains = {
        name: (choice, search.score(choice, unmet) - score)
        for name, choice in (search.space.smaller(state) if unmet else {}).items()
    }
    useful = {name: (choice, gain) for name, (choice, gain) in gains.items() if gain > 0}
    # If latency depends on padded channels, several steps without gain may lead to one with gain.
    return useful or {name: (choice, 1.0) for name, (choice, _) in gains.items()}


def affordable(search: Search, path: list[Choice], actions: dict[str, tuple[Choice, float]]) -> int:
    """Return how many actions a step may evaluate, so that evaluations last until targets are met.

    The excess is assumed to fall at the mean pace of the steps so far.
    """
    state, steps = path[-1], len(path) - 1
    excess = search.excess(state)
    if steps == 0:
        return len(actions)
    pace = (search.excess(path[0]) - excess) / steps
    steps_left = max(excess / pace, 1.0) if pace > 0 else len(actions)
    # Reserve one evaluation for this state, another for the last state.
    left = search.left - 2
    if steps % FULL_STEP == 0 and left - len(actions) >= BEST_ACTIONS * steps_left:
        return len(actions)
    return max(0, min(BEST_ACTIONS, int(left / steps_left)))


def random(search: Search) -> list[Choice]:
    """Evaluate random networks that meet the targets, those near the targets first."""
    rng = np.random.default_rng(search.seed)
    drawn = [search.space.sample(rng) for _ in range(DRAWN_FOR_ONE * search.evaluations)]
    chosen = [choice for choice in dict.fromkeys(drawn) if not search.unmet(choice)]
    # Those near the targets stay in random order.
    chosen.sort(key=lambda choice: -min(search.excess(choice), math.log(NEAR_TARGET)))
    search.ask(chosen[: search.evaluations] or [search.space.smallest])
    return list(search.found)


def nsga2(search: Search) -> list[Choice]:
    """Run NSGA-II on metric and costs, after a greedy search with half the evaluations."""
    import_optional('pymoo', '--method nsga2', 'search')
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.evaluator import Evaluator
    from pymoo.core.problem import Problem
    from pymoo.core.termination import NoTermination
    from pymoo.operators.crossover.ux import UniformCrossover
    from pymoo.operators.mutation.pm import PM
    from pymoo.operators.repair.rounding import RoundingRepair
    from pymoo.problems.static import StaticProblem

    check_evaluations(search, share=2)
    path = greedy(half := replace(search, evaluations=search.evaluations // 2, found={}))
    search.found.update(half.found)
    dimensions = list(search.space.dimensions.values())
    limits = np.array(list(map(len, dimensions))) - 1

    def genes_of(choice: Choice) -> list[int]:
        return [each.index(value) for each, value in zip(dimensions, choice.values, strict=True)]

    def network(genes: Sequence) -> Choice:
        values = (each[int(gene)] for each, gene in zip(dimensions, genes, strict=True))
        return search.space.possible(search.space.largest.with_values(values))

    number = len(search.targets)
    size = dict(n_var=len(limits), n_obj=1 + number, n_ieq_constr=number)
    problem = Problem(**size, xl=np.zeros(len(limits)), xu=limits, vtype=int)
    rng = np.random.default_rng(search.seed)
    # The last networks of the path are near the targets.
    start = [*path[::-1][:POPULATION], *(search.space.sample(rng) for _ in range(POPULATION))]
    algorithm = NSGA2(
        pop_size=POPULATION,
        sampling=np.array([genes_of(choice) for choice in dict.fromkeys(start)][:POPULATION]),
        crossover=UniformCrossover(),
        mutation=PM(prob_var=2 / len(limits), eta=5, vtype=float, repair=RoundingRepair()),
    )
    algorithm.setup(problem, termination=NoTermination(), seed=search.seed)
    idle = 0
    while search.left > 0 and idle < MAX_IDLE_GENERATIONS:
        population = algorithm.ask()
        choices = list(map(network, population.get('X')))
        new = [choice for choice in dict.fromkeys(choices) if choice not in search.found]
        idle = 0 if new else idle + 1
        search.ask(new[: search.left])
        # Networks without evaluation, when none are left, count as bad.
        metrics = np.array([search.found.get(choice, -math.inf) for choice in choices])
        costs = np.array([[search.costs(one)[name] for name in search.targets] for one in choices])
        over = costs / list(search.targets.values()) - 1
        evaluated = StaticProblem(problem, F=np.column_stack([-metrics, costs]), G=over)
        Evaluator().eval(evaluated, population)
        algorithm.tell(infills=population)
    return list(search.found)


METHODS = {'greedy': greedy, 'random': random, 'nsga2': nsga2}
