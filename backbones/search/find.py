"""``search.py find``: search a supernet for the best networks that meet targets."""

import copy
import math
from argparse import Namespace
from functools import cache, partial
from pathlib import Path

from mmengine.config import Config
from mmengine.dist import is_main_process

from backbones.engine.console import Progress
from backbones.engine.distributed import prepare_on_first
from backbones.errors import ConfigError

from .evaluate import Evaluator, load_supernet
from .front import Network, format_front, make_front, write_front
from .holdout import prepare_holdout
from .latency import MAX_ERROR, LatencyModel, find_latency
from .measurements import check_setting
from .measurements import measure as measure_networks
from .methods import METHODS, Search
from .space import Choice


def find_networks(config: Config, args: Namespace) -> str | None:
    """``search.py find``: search a config's space with the weights of a supernet.

    Writes front.json, front.md and front.png to ``search`` in the work folder, and the evaluations,
    which a second call does not repeat. Modifies ``config`` in place.

    Returns:
        The table of the front and a conclusion in the first process, None in others.
    """
    limits = dict(latency=args.max_latency, parameters=args.max_parameters)
    targets = {name: limit for name, limit in limits.items() if limit is not None}
    # Copied now: latency was measured before the classes of the data are set.
    read_model = partial(latency_model, copy.deepcopy(config), args.backend, 'latency' in targets)

    def prepare(config: Config) -> None:
        if not targets:
            raise ConfigError('find needs a target: give --max-latency, --max-parameters or both')
        model = read_model()
        if args.measures and model and model.setting:
            check_setting(model.setting)
        prepare_holdout(config)

    config = prepare_on_first(config, prepare)
    model = read_model()
    layout, state_dict = load_supernet(config, args.checkpoint)
    space = layout.space

    @cache
    def costs(choice: Choice) -> dict[str, float]:
        latency = {'latency': model.predict(choice)} if model else {}
        return {**latency, 'parameters': layout.count_parameters(choice)}

    evaluator = Evaluator(config, layout, state_dict)
    weights = dict(zip(('parameters', 'latency'), args.exponents, strict=True))
    counts = (args.evaluations, args.seed)
    search = Search(space, evaluator.evaluate, costs, targets, weights, *counts)
    search.check_targets()
    if is_main_process():
        show_progress(evaluator, search)
    METHODS[args.method](search)
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
    if args.measures and model and model.setting:
        source = (args.config, args.cfg_options)
        measure = partial(measure_networks, *source, setting=model.setting, log=log)
    front = make_front(networks, targets, evaluator.metric, measure)
    # How the figures were obtained.
    front.notes = [
        f'{front.metric} on {len(evaluator.holdout)} held-out training images. All networks, also '
        f'published ones, have weights of {args.checkpoint} and calibrated norms. Further training '
        'raises the metric.',
        f'{args.method} evaluated {len(asked)} networks. With earlier searches, '
        f'{len(evaluator.known)} were evaluated; they are in {evaluator.path.name}.',
    ]
    if config.unseen_classes:
        front.notes.append(f'Not in the hold-out: {", ".join(config.unseen_classes)}.')
    if model:
        front.notes.append(
            'Latency is predicted for a whole network on one image, from '
            f'{model.source}, with a mean error of {model.error:.1%}; measured: on this machine.'
        )
    if front.off_pace:
        # Otherwise the next search would use these measurements.
        log.unlink()
        front.notes.append(
            f'Measured here, networks take {front.off_pace:.1f} times the predicted latency, so '
            'the measurements are not used: this machine is busy, or latency was fitted on another '
            'one. Run the same command when it is idle, or run `search.py latency` here.'
        )
    write_front(front, folder)
    return f'{format_front(front)}\nwritten: {folder}/front.json, front.md, front.png'


def latency_model(config: Config, backend: str | None, is_needed: bool) -> LatencyModel | None:
    """Return the latency model to use, or None; raise ConfigError if a needed one is unusable."""
    try:
        model = find_latency(config, backend)
    except ConfigError:
        if is_needed or backend:
            raise
        return None
    if model.error <= MAX_ERROR:
        return model
    if is_needed:
        raise ConfigError(
            f'latency is predicted with a mean error of {model.error:.0%} on networks that the fit '
            'has not seen, too large for a search: measure on an idle machine, or more networks '
            '(search.py latency --networks 80)'
        )
    return None


def show_progress(evaluator: Evaluator, search: Search) -> None:
    """Show the progress of a search; networks that were evaluated earlier take no time."""
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
    """Evaluate the published alternatives, and the smallest network if no new one was found."""
    published = list(search.space.published().values())
    found = [one for one in search.found if not search.unmet(one) and one not in published]
    if not found:
        found = [search.space.smallest]
        search.ask(found)
    neck = max(found, key=search.found.get).neck
    search.ask([one for one in published if one.neck == neck or not search.unmet(one)])
