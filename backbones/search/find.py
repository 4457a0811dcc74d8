"""``search.py find``: from a supernet and targets to the networks that are worth having."""

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import is_main_process

from backbones.engine.console import Progress
from backbones.engine.distributed import prepare_on_first
from backbones.errors import ConfigError

from .evaluate import Evaluator, load_supernet
from .front import Network, format_front, make_front, write_front
from .holdout import prepare_holdout
from .latency import HIGH_ERROR, LatencyModel, find_latency
from .methods import EXPONENTS, METHODS, Search
from .space import Choice, search_options


def find_networks(
    config: Config,
    source: str,
    config_path: str,
    options: dict[str, Any],
    max_latency: float | None = None,
    max_parameters: float | None = None,
    backend: str | None = None,
    method: str = 'greedy',
    evaluations: int = 250,
    exponents: Sequence[float] = EXPONENTS,
    measures: bool = True,
) -> str | None:
    """Search a config's space with the weights of a supernet; write and return what is found.

    Files go to ``search`` in the work folder: front.json, front.md, front.png, and evaluations that
    a second call does not repeat.

    Args:
        config: A config with ``search``, ``work_dir`` and ``launcher``; changed in place.
        source: The checkpoint of its supernet, or of an ordinary training of it.
        config_path, options: What the config was read from, for measuring.
        max_latency: The most milliseconds for an image. Default: any.
        max_parameters: The most parameters. Default: any.
        backend: Whose latency counts. Default: the only one that there is a model of.
        method: A key of ``METHODS``.
        evaluations: How many networks may be evaluated, besides the published ones.
        exponents: The weights of parameters and latency while neither target is met.
        measures: Whether networks of the front are measured again.

    Returns:
        The table of the front and what to do, in the first process; None in others.

    Raises:
        CheckpointError: The checkpoint does not fit.
        ConfigError: The config cannot be searched, or nothing meets the targets.
        DataError: The data cannot be read, or have errors.
    """
    limits = dict(latency=max_latency, parameters=max_parameters)
    targets = {name: limit for name, limit in limits.items() if limit is not None}
    # The config as it was measured, before the classes of the data are set.
    read_model = partial(
        latency_model, copy.deepcopy(config), backend=backend, is_needed=max_latency is not None
    )

    def prepare(config: Config) -> None:
        if not targets:
            raise ConfigError('give --max-latency, --max-parameters or both: what is searched for?')
        model = read_model()
        if model and model.error > HIGH_ERROR:
            print(f'warning: latency is predicted with a mean error of {model.error:.0%}')
        prepare_holdout(config)

    config = prepare_on_first(config, prepare)
    model = read_model()
    layout, state_dict = load_supernet(config, source)
    space = layout.space

    @cache
    def costs(choice: Choice) -> dict[str, float]:
        latency = {'latency': model.predict(choice)} if model else {}
        return {**latency, 'parameters': layout.count_parameters(choice)}

    evaluator = Evaluator(config, layout, state_dict, config.work_dir)
    weights = dict(zip(('parameters', 'latency'), exponents, strict=True))
    seed = search_options(config)['seed']
    search = Search(space, evaluator.evaluate, costs, targets, weights, evaluations, seed)
    search.check_targets()
    if is_main_process():
        show_progress(evaluator, search)
    METHODS[method](search)
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
    folder, measure = Path(config.work_dir) / 'search', None
    log = folder / 'measured.jsonl'
    if measures and model and model.setting:
        from .measurements import measure as measure_networks

        measure = partial(measure_networks, config_path, options, setting=model.setting, log=log)
    front = make_front(networks, targets, evaluator.metric, measure)
    # How the figures came about.
    front.notes = [
        f'{front.metric} on {config.holdout.images} training images that were held out, with the '
        'weights of the supernet, published networks too; norms calibrated. Training a network on '
        'raises it.',
        f'{method}: {len(asked)} networks; {len(evaluator.known)} were evaluated in all, by '
        f'earlier searches too, which are in {evaluator.path.name}.',
    ]
    if config.holdout.unseen_classes:
        front.notes.append(f'Not in the hold-out: {", ".join(config.holdout.unseen_classes)}.')
    if model:
        front.notes.append(
            'Latency of a whole network on one image, predicted from '
            f'{model.setting.backend if model.setting else "measurements.csv"} with a mean error '
            f'of {model.error:.1%}; measured: again, here.'
        )
    if front.off_pace:
        # Or the next search would take them from there.
        log.unlink()
        front.notes.append(
            f'Measured again, networks take {front.off_pace:.1f} times what was predicted, and do '
            'not count: the machine is busy, or another one. Give the same command again on '
            'a quiet one, or run `search.py latency` here.'
        )
    request = dict(max_latency=max_latency, max_parameters=max_parameters, backend=backend)
    request |= dict(method=method, evaluations=evaluations, exponents=exponents, measures=measures)
    write_front(
        front,
        folder,
        holdout=config.holdout.to_dict(),
        request=request,
        latency=model and dict(setting=model.setting and asdict(model.setting), error=model.error),
        evaluated=[
            dict(choice=one.to_json(), metric=search.found[one], **costs(one)) for one in asked
        ],
    )
    return f'{format_front(front)}\nwritten: {folder}/front.json, front.md, front.png'


def latency_model(config: Config, backend: str | None, is_needed: bool) -> LatencyModel | None:
    """The model of latency that counts; None where there is none and none is needed.

    Raises:
        ConfigError: One is needed, and there is none that can be trusted.
    """
    try:
        path = find_latency(config.work_dir, backend)
        model = LatencyModel.load(path, config)
    except ConfigError:
        if is_needed or backend:
            raise
        return None
    if not model.is_trusted and is_needed:
        raise ConfigError(
            f'{path} predicts networks that it has not seen with a mean error of '
            f'{model.error:.0%}, too much to search by: measure on a quiet machine, or more '
            'networks (search.py latency --networks 80)'
        )
    return model if model.is_trusted else None


def show_progress(evaluator: Evaluator, search: Search) -> None:
    """Show how far a search is; what was evaluated before takes no time."""
    progress, best = Progress('evaluation', search.evaluations, interval=10), -math.inf

    def report(choice: Choice, metric: float, is_new: bool) -> None:
        nonlocal best
        if not search.unmet(choice):
            best = max(best, metric)
        if is_new:
            note = 'none meets the targets yet' if best == -math.inf else f'best {best:.3f}'
            progress.step(note)
        else:
            progress.skip(1)

    evaluator.report = report


def evaluate_others(search: Search) -> None:
    """Evaluate the published networks that a user may take instead, and what is surely possible."""
    published = list(search.space.published().values())
    found = [one for one in search.found if not search.unmet(one) and one not in published]
    if not found:
        found = [search.space.smallest]
        search.ask(found)
    neck = max(found, key=search.found.get).neck
    search.ask([one for one in published if one.neck == neck or not search.unmet(one)])
