"""Searching a space: which network is the best that meets the targets.

The greedy search is the paper's (section 4.2): from the largest network on, it makes the one
dimension smaller that costs the least accuracy for what it gains. The gain is that of the Mobile
Efficiency Score, parameters^-0.5 * latency^-1, whose constant factors do not matter here. Random
search is what it has to beat; NSGA-II goes on from its path. Where a step went below the targets,
dimensions are made larger again, which the paper does not do.

A method asks for the same networks whenever it is called with the same seed and gets the same
metrics. So one that was killed is called again, and runs through what it knows already.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from backbones.errors import ConfigError, import_optional

from .space import Choice, Space

EXPONENTS = (0.5, 1.0)  # of parameters and of latency, the paper's
# The greedy search evaluates all actions in every so many steps, and so many in the others.
FULL_STEP = 10
BEST_ACTIONS = 8
# Random networks take at least this part of a target, and so many are drawn for each that is taken.
NEAR_TARGET = 0.8
DRAWN_FOR_ONE = 20
POPULATION = 20
MAX_IDLE_GENERATIONS = 20


@dataclass
class Search:
    """What is searched for, and what was evaluated for it."""

    space: Space
    evaluate: Callable[[Sequence[Choice]], list[float]]  # metrics of networks, larger is better
    costs: Callable[[Choice], dict[str, float]]  # 'parameters', and 'latency' in ms where known
    targets: dict[str, float]  # the most that a network may cost, by the same names
    exponents: dict[str, float]  # the weight of each cost in the score
    evaluations: int = 250  # how many networks may be evaluated
    seed: int = 0
    found: dict[Choice, float] = field(default_factory=dict)  # metrics, in the order of asking

    @property
    def left(self) -> int:
        """How many networks may still be evaluated."""
        return self.evaluations - len(self.found)

    def ask(self, choices: Sequence[Choice]) -> list[float]:
        """The metrics of networks."""
        new = [choice for choice in dict.fromkeys(choices) if choice not in self.found]
        self.found.update(zip(new, self.evaluate(new), strict=True))
        return [self.found[choice] for choice in choices]

    def excess(self, choice: Choice) -> float:
        """The logarithm of the largest cost over its target; 0 or less where all are met."""
        costs = self.costs(choice)
        return max(math.log(costs[name] / target) for name, target in self.targets.items())

    def unmet(self, choice: Choice) -> list[str]:
        """The targets that a network does not meet."""
        costs = self.costs(choice)
        return [name for name, target in self.targets.items() if costs[name] > target]

    def score(self, choice: Choice, names: Sequence[str]) -> float:
        """The Mobile Efficiency Score with some of the costs, each in units of its target."""
        costs, weights = self.costs(choice), self.exponents
        # Only targets without weight are left, which are to be met too.
        if not any(weights[name] for name in names):
            weights = dict.fromkeys(names, 1)
        return math.prod((costs[name] / self.targets[name]) ** -weights[name] for name in names)

    def check_targets(self) -> None:
        """Raise ConfigError where no network can meet the targets."""
        if self.unmet(self.space.smallest):
            smallest = format_costs(self.costs(self.space.smallest))
            raise ConfigError(
                f'no network of the space takes at most {format_costs(self.targets)}: the smallest '
                f'takes {smallest}. Start from a smaller config, or give search more freedom '
                '(channels, min_depths, ratios, necks)'
            )


def format_costs(costs: dict[str, float]) -> str:
    """'12.3 ms and 3,450,000 parameters'."""
    texts = {'latency': '{:.1f} ms', 'parameters': '{:,.0f} parameters'}
    return ' and '.join(texts[name].format(costs[name]) for name in texts if name in costs)


def greedy(search: Search) -> list[Choice]:
    """The networks from the largest one to the best that meets the targets."""
    check_evaluations(search)
    return climb(search, *descend(search))


def descend(search: Search) -> tuple[list[Choice], dict[str, float]]:
    """The paper's search: the networks from the largest one to the first that meets the targets.

    A target that is met no longer counts. Where the evaluations would not last, fewer actions are
    evaluated in a step, and at worst none: then the one with the least known drop is taken. The
    last known drop of the metric is returned too, for every kind of action.
    """
    state, path, drops = search.space.largest, [search.space.largest], {}
    metric = None
    while actions := useful_actions(search, state):

        def price(name: str) -> tuple[float, float]:
            gain = actions[name][1]
            # Where the metric rises, which is mostly chance, the step costs nothing: divided by the
            # gain, that rise would be worth most in the steps that gain least.
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
    """Use the room that the last step left below the targets, while that raises the metric.

    A narrower neck for instance saves much more than the rest of the way may have needed. What
    cost most metric when it was made smaller is made larger first.
    """
    while better := better_and_larger(search, path[-1], drops):
        path.append(better)
    return path


def better_and_larger(search: Search, state: Choice, drops: dict[str, float]) -> Choice | None:
    """The best of the first few next larger networks with a better one among them, if any."""
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
    """Raise ConfigError where one of so many shares is too few for the first step."""
    number = len(useful_actions(search, search.space.largest))
    if number and search.evaluations // share < number + 2:
        raise ConfigError(
            f'--evaluations {search.evaluations} is too few: the first step of the greedy search '
            f'evaluates {number} networks; set {share * (number + 2)} or more'
        )


def useful_actions(search: Search, state: Choice) -> dict[str, tuple[Choice, float]]:
    """The next smaller networks that have a higher score, and by how much, while one is needed.

    All with the same gain where none has.
    """
    unmet = search.unmet(state)
    score = search.score(state, unmet)
    gains = {
        name: (choice, search.score(choice, unmet) - score)
        for name, choice in (search.space.smaller(state) if unmet else {}).items()
    }
    useful = {name: (choice, gain) for name, (choice, gain) in gains.items() if gain > 0}
    # Where latency is that of padded channels, what gains nothing leads to what does.
    return useful or {name: (choice, 1.0) for name, (choice, _) in gains.items()}


def affordable(search: Search, path: list[Choice], actions: dict[str, tuple[Choice, float]]) -> int:
    """How many actions to evaluate in a step, so that the evaluations last to the targets.

    The excess is taken to go on falling at the mean pace of the steps so far.
    """
    state, steps = path[-1], len(path) - 1
    excess = search.excess(state)
    if steps == 0:
        return len(actions)
    pace = (search.excess(path[0]) - excess) / steps
    steps_left = max(excess / pace, 1.0) if pace > 0 else len(actions)
    # One is kept for this state, another for the last one.
    left = search.left - 2
    if steps % FULL_STEP == 0 and left - len(actions) >= BEST_ACTIONS * steps_left:
        return len(actions)
    return max(0, min(BEST_ACTIONS, int(left / steps_left)))


def random(search: Search) -> list[Choice]:
    """Random networks that meet the targets, those near the targets first."""
    rng = np.random.default_rng(search.seed)
    drawn: dict[Choice, float] = {}
    for _ in range(DRAWN_FOR_ONE * search.evaluations):
        choice = search.space.sample(rng)
        if choice not in drawn and not search.unmet(choice):
            drawn[choice] = search.excess(choice)
    near = [choice for choice, excess in drawn.items() if excess >= math.log(NEAR_TARGET)]
    others = sorted(drawn.keys() - near, key=lambda choice: (-drawn[choice], choice.to_json()))
    chosen = [*near, *others][: search.evaluations]
    search.ask(chosen or [search.space.smallest])
    return list(search.found)


def nsga2(search: Search) -> list[Choice]:
    """NSGA-II over metric and costs, from the path of a greedy search with half the evaluations."""
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
    # The last of the path are the ones that are near the targets.
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
        # What there are no evaluations left for counts as bad.
        metrics = np.array([search.found.get(choice, -math.inf) for choice in choices])
        costs = np.array([[search.costs(one)[name] for name in search.targets] for one in choices])
        over = costs / list(search.targets.values()) - 1
        evaluated = StaticProblem(problem, F=np.column_stack([-metrics, costs]), G=over)
        Evaluator().eval(evaluated, population)
        algorithm.tell(infills=population)
    return list(search.found)


METHODS = {'greedy': greedy, 'random': random, 'nsga2': nsga2}
