"""``search.py find``: from a supernet and targets to the networks that are worth having."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import is_main_process

from backbones.data.check import refuse_errors
from backbones.data.classes import set_classes
from backbones.engine.console import Progress
from backbones.engine.distributed import prepare_on_first
from backbones.errors import ConfigError

from .evaluate import Evaluator, load_supernet
from .front import Front, Network, format_front, make_front, write_front
from .holdout import use_holdout
from .latency import HIGH_ERROR, LatencyModel, find_latency
from .methods import EXPONENTS, METHODS, Search
from .space import Choice, Space, search_options


@dataclass(frozen=True)
class Request:
    """What is searched for.

    Attributes:
        max_latency: The most milliseconds for an image, or None.
        max_parameters: The most parameters, or None.
        backend: Whose latency counts. Default: the only one that there is a model of.
        method: A key of ``METHODS``.
        evaluations: How many networks may be evaluated.
        exponents: The weights of parameters and latency while neither target is met.
        measures: Whether networks of the front are measured again.
    """

    max_latency: float | None = None
    max_parameters: float | None = None
    backend: str | None = None
    method: str = 'greedy'
    evaluations: int = 250
    exponents: tuple[float, float] = EXPONENTS
    measures: bool = True

    @property
    def targets(self) -> dict[str, float]:
        """The most that a network may cost, by the name of the cost."""
        targets = dict(latency=self.max_latency, parameters=self.max_parameters)
        return {name: target for name, target in targets.items() if target is not None}


def find_networks(
    config: Config, source: str, request: Request, config_path: str, options: dict[str, Any]
) -> str | None:
    """Search a config's space with the weights of a supernet; write and return what is found.

    Files go to ``search`` in the work folder: front.json, front.md, front.png, and evaluations that
    a second call does not repeat.

    Args:
        config: A config with ``search``, ``work_dir`` and ``launcher``; changed in place.
        source: The checkpoint of its supernet, or of an ordinary training of it.
        request: What is searched for.
        config_path, options: What the config was read from, for measuring.

    Returns:
        The table of the front and what to do, in the first process; None in others.

    Raises:
        CheckpointError: The checkpoint does not fit.
        ConfigError: The config cannot be searched, or nothing meets the targets.
        DataError: The data cannot be read, or have errors.
    """
    config = prepare_on_first(config, partial(prepare, request=request))
    space = Space.from_config(config)
    model = latency_model(config, space, request)
    layout, state_dict = load_supernet(config, source)

    @cache
    def costs(choice: Choice) -> dict[str, float]:
        latency = {'latency': model.predict(choice)} if model else {}
        return {**latency, 'parameters': layout.count_parameters(choice)}

    evaluator = Evaluator(config, layout, state_dict, config.work_dir)
    exponents = dict(zip(('parameters', 'latency'), request.exponents, strict=True))
    seed, number = search_options(config)['seed'], request.evaluations
    search = Search(space, evaluator.evaluate, costs, request.targets, exponents, number, seed)
    search.check_targets()
    with shown_progress(evaluator, search):
        METHODS[request.method](search)
        asked = list(search.found)
        evaluate_others(search)
    if not is_main_process():
        return None
    names = {choice: name for name, choice in space.published().items()}
    networks = [
        Network(choice, metric, name=names.get(choice), **costs(choice))
        for choice, metric in evaluator.known.items()
        if choice not in names or choice in search.found
    ]
    measure = None
    if request.measures and model and model.setting:
        from .measurements import measure as measure_networks

        log = Path(config.work_dir) / 'search' / 'measured.jsonl'
        measure = partial(measure_networks, config_path, options, setting=model.setting, log=log)
    front = make_front(networks, request.targets, evaluator.metric, measure)
    front.notes = notes_on(front, config, evaluator, model, request, asked)
    folder = Path(config.work_dir) / 'search'
    write_front(
        front,
        folder,
        holdout=config.holdout.to_dict(),
        request=asdict(request),
        latency=model and dict(setting=model.setting and asdict(model.setting), error=model.error),
        evaluated=[as_point(one, search) for one in asked],
    )
    return f'{format_front(front)}\nwritten: {folder}/front.json, front.md, front.png'


def prepare(config: Config, request: Request) -> None:
    """Check what is asked for, and let the config read the hold-out."""
    if not request.targets:
        raise ConfigError('give --max-latency, --max-parameters or both: what is searched for?')
    model = latency_model(config, Space.from_config(config), request)
    if model and model.error > HIGH_ERROR:
        print(f'warning: latency is predicted with a mean error of {model.error:.0%}', flush=True)
    set_classes(config, ('train', 'val'))
    use_holdout(config)
    refuse_errors(config, ('val',))


def latency_model(config: Config, space: Space, request: Request) -> LatencyModel | None:
    """The model of latency that counts; None where there is none and none is needed.

    Raises:
        ConfigError: One is needed, and there is none that can be trusted.
    """
    try:
        path = find_latency(config.work_dir, request.backend)
        model = LatencyModel.load(path, space)
    except ConfigError:
        if request.max_latency is None and request.backend is None:
            return None
        raise
    if not model.is_trusted:
        if request.max_latency is None:
            return None
        raise ConfigError(
            f'{path} predicts networks that it has not seen with a mean error of '
            f'{model.error:.0%}, too much to search by: measure on a quiet machine, or more '
            'networks (search.py latency --networks 80)'
        )
    return model


@contextmanager
def shown_progress(evaluator: Evaluator, search: Search) -> Iterator[None]:
    """Show how far a search is; what was evaluated before takes no time."""
    if not is_main_process():
        yield
        return
    progress, evaluate = Progress('evaluation', search.evaluations, interval=10), search.evaluate
    best = [None]

    def note(choice: Choice, metric: float) -> str:
        if not search.unmet(choice) and (best[0] is None or metric > best[0]):
            best[0] = metric
        return 'none meets the targets yet' if best[0] is None else f'best {best[0]:.3f}'

    def ask(choices: Sequence[Choice]) -> list[float]:
        old = [c for c in dict.fromkeys(choices) if c in evaluator.known and c not in search.found]
        for choice in old:
            note(choice, evaluator.known[choice])
        progress.skip(len(old))
        return evaluate(choices)

    search.evaluate = ask
    evaluator.report = lambda choice, metric, _: progress.step(note(choice, metric))
    try:
        yield
    finally:
        progress.close()


def evaluate_others(search: Search) -> None:
    """Evaluate the published networks that a user may take instead, and what is surely possible."""
    published = list(search.space.published().values())
    found = [one for one in search.found if not search.unmet(one) and one not in published]
    if not found:
        found = [search.space.smallest]
        search.ask(found)
    neck = max(found, key=search.found.get).neck
    search.ask([one for one in published if one.neck == neck or not search.unmet(one)])


def as_point(choice: Choice, search: Search) -> dict[str, Any]:
    """An evaluation of this search, for comparing methods."""
    return dict(choice=choice.to_json(), metric=search.found[choice], **search.costs(choice))


def notes_on(
    front: Front,
    config: Config,
    evaluator: Evaluator,
    model: LatencyModel | None,
    request: Request,
    asked: list[Choice],
) -> list[str]:
    """How the figures came about."""
    holdout = config.holdout
    notes = [
        f'{front.metric} on {holdout.images} training images that were held out, with the weights '
        'of the supernet, published networks too; norms calibrated. Training a network on raises '
        'it.',
        f'{request.method}: {len(asked)} networks; {len(evaluator.known)} were evaluated in all, '
        f'by earlier searches too, which are in {evaluator.path.name}.',
    ]
    if holdout.unseen_classes:
        notes.append(f'Not in the hold-out: {", ".join(holdout.unseen_classes)}.')
    if model:
        where = f'{model.setting.backend}' if model.setting else 'measurements.csv'
        notes.append(
            f'Latency of a whole network on one image, predicted from {where} with a mean error '
            f'of {model.error:.1%}; measured: again, here.'
        )
    return notes
