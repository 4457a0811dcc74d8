"""Measuring the latency of networks of a space: on this device, or as files on another one."""

import csv
import gc
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import numpy as np
from mmengine.config import Config

from backbones.benchmark.benchmark import DEFAULT_SIZES, describe_machine, use_threads
from backbones.benchmark.candidates import Candidate
from backbones.benchmark.measure import measure_in_turns, synchronizer
from backbones.benchmark.work import SUFFIXES, Setting, export_model, make_runner
from backbones.data.classes import set_classes
from backbones.engine.config import load_config
from backbones.errors import ConfigError, DataError
from backbones.export.export import staged
from backbones.export.formats import check_packages
from backbones.files import write_text
from backbones.inference.model import choose_device
from backbones.progress import ProgressBar

from .evaluate import append_record, read_records
from .latency import LatencyModel, check_identity, check_number, fit, identify, latency_path
from .space import Choice, Space, search_options

# Networks in memory at once, besides the reference that all groups are compared with.
GROUP_SIZE = 5
MAX_PUBLISHED = 5
# Without torch.compile: compiling a network takes longer than measuring it.
BACKENDS = ('torch', *SUFFIXES)
CSV_NAME, NETWORKS_NAME = 'measurements.csv', 'networks.json'
COLUMNS = ['file', 'ms']


def choose_networks(space: Space, seed: int, number: int) -> list[Choice]:
    """Return the largest, the smallest, a few published and random networks.

    The same seed gives the same networks, and those of a smaller ``number`` come first.
    """
    published = list(space.published().values())
    step = math.ceil(len(published) / MAX_PUBLISHED) or 1
    # A dict, since a random network may be drawn twice.
    chosen = dict.fromkeys([space.largest, space.smallest, *published[::step]][:number])
    rng = np.random.default_rng(seed)
    for _ in range(100 * number):
        if len(chosen) == number:
            break
        chosen[space.sample(rng)] = None
    if len(chosen) < number:
        raise ConfigError(f'the space has only about {len(chosen)} networks: ask for fewer')
    return list(chosen)


def measure_latency(
    config: Config,
    options: dict[str, Any],
    setting: Setting,
    number: int,
    rounds: int,
    seconds: float,
) -> tuple[LatencyModel, dict[Choice, float]]:
    """Measure networks of a config's space, fit a latency model and write it to the work folder.

    Returns the model and the milliseconds of the networks, see :func:`measure`.
    """
    space = Space.from_config(config)
    check_number(number)
    choices = choose_networks(space, search_options(config)['seed'], number)
    path = latency_path(config.work_dir, setting.backend)
    log = path.with_suffix('.jsonl')
    measured = measure(config.filename, options, choices, setting, log, rounds, seconds)
    model = fit(space, choices, measured, setting)
    by_choice = dict(zip(choices, measured, strict=True))
    model.save(path, config, by_choice)
    # The log serves to resume a killed command; the next command should measure again.
    log.unlink()
    return model, by_choice


def measure(
    config_path: str,
    options: dict[str, Any],
    choices: Sequence[Choice],
    setting: Setting,
    log: Path,
    rounds: int = 10,
    seconds: float = 5.0,
) -> list[float]:
    """Measure the milliseconds that whole networks take for an image.

    Networks are measured in turns, in small groups, since more may not fit in memory. Every group
    also has a reference network, the same in all groups. A network's latency is the ratio of its
    time to the reference's, times the reference's median time over all groups. So it does not
    matter if the machine becomes slower or faster meanwhile.

    Every group is appended to ``log``, a JSON Lines file. Networks that it has for the same model,
    space, options and setting are not measured again.
    """
    config = load_config(config_path, options)
    options = with_classes(config, options)
    space = Space.from_config(config)
    # Middle settings, to be similar to all others.
    reference = space.draw(lambda settings: settings[len(settings) // 2], range)
    machine = describe_machine(setting.device, setting.threads, None)
    what = [identify(config), options, asdict(setting), machine['cpu'], machine.get('gpu')]
    what.append(asdict(reference))
    key = hashlib.sha256(json.dumps(what, default=str).encode()).hexdigest()[:16]
    records = {Choice.from_dict(r['choice']): r for r in read_records(log) if r['key'] == key}
    todo = [choice for choice in choices if choice not in records]
    with (
        ProgressBar(total=len(choices), desc='measuring', unit='network', leave=False) as bar,
        TemporaryDirectory() as folder,
    ):

        def build(choice: Choice) -> Callable[[], Any]:
            bar.set_postfix_str('building')
            candidate = Candidate(config_path, options={**options, **space.options(choice, config)})
            return make_network(candidate, setting, Path(mkdtemp(dir=folder)))

        bar.update(len(choices) - len(todo))
        if todo:
            use_threads(setting.threads)
            runners = {reference: build(reference)}
        for start in range(0, len(todo), GROUP_SIZE):
            group = todo[start : start + GROUP_SIZE]
            for choice in group:
                runners[choice] = runners.get(choice) or build(choice)
                bar.update(0.5)
            timed = measure_in_turns(
                runners, synchronizer(setting.device), rounds, seconds, bar.set_postfix_str
            )
            # Frees the group's networks before the next group is built.
            runners = {reference: runners[reference]}
            gc.collect()
            for choice in group:
                record = dict(
                    key=key,
                    choice=asdict(choice),
                    ratio=timed[choice].ratio_to(timed[reference]),
                    reference_ms=timed[reference].percentile(50) * 1e3,
                )
                records[choice] = record
                append_record(log, record)
            bar.update(0.5 * len(group))
    reference_ms = median(record['reference_ms'] for record in records.values())
    return [records[choice]['ratio'] * reference_ms for choice in choices]


def check_setting(setting: Setting) -> None:
    """Raise ConfigError if networks cannot be measured here with the same setting."""
    try:
        choose_device(setting.device)
        if setting.backend in SUFFIXES:
            check_packages(SUFFIXES[setting.backend])
    except ConfigError as error:
        raise ConfigError(f'{error}. To skip measuring here: --no-measure') from error


def with_classes(config: Config, options: dict[str, Any]) -> dict[str, Any]:
    """Return options with the classes of a config's data, if it exists; heads depend on them."""
    try:
        names = set_classes(config, ('train',))
    except (ConfigError, DataError, FileNotFoundError):
        return options
    return {**options, 'classes': list(names)}


def make_network(candidate: Candidate, setting: Setting, folder: Path) -> Callable[[], Any]:
    """Return a function that runs a network once; for file backends, write it to a folder."""
    model = candidate.build()
    if setting.backend not in SUFFIXES:
        return make_runner(model, setting)
    path = folder / f'network{SUFFIXES[setting.backend]}'
    export_model(candidate, model, setting, path)
    return make_runner(None, setting, path)


def write_files(
    config_path: str,
    options: dict[str, Any],
    folder: Path,
    suffix: str = '.onnx',
    size: tuple[int, int] | None = None,
    number: int = 25,
) -> Path:
    """Write a number of networks as files, and a table to fill in with their milliseconds.

    Returns the path of the table, measurements.csv, whose column ms is empty. It is written last;
    raises ConfigError if it exists.
    """
    config = load_config(config_path, options)
    space = Space.from_config(config)
    check_number(number)
    check_packages(suffix)
    table = folder / CSV_NAME
    if table.exists():
        raise ConfigError(f'{table} exists already: choose a new folder')
    chosen = choose_networks(space, search_options(config)['seed'], number)
    files = {f'network_{n + 1:02}{suffix}': choice for n, choice in enumerate(chosen)}
    setting = Setting(backend='onnxruntime', size=size or DEFAULT_SIZES[config.default_scope])
    names = {name: asdict(choice) for name, choice in files.items()}
    content = dict(files=names, size=setting.size, **identify(config))
    write_text(folder / NETWORKS_NAME, json.dumps(content))
    # After identify(), which needs the config without the classes that this sets.
    options = with_classes(config, options)
    with ProgressBar(total=len(files), desc='writing', unit='file', leave=False) as bar:
        for name, choice in files.items():
            bar.set_postfix_str(name)
            candidate = Candidate(config_path, options={**options, **space.options(choice, config)})
            with staged(folder / name) as path:
                export_model(candidate, candidate.build(), setting, path)
            bar.update()
    lines = [','.join(COLUMNS), *(f'{name},' for name in files)]
    write_text(table, '\n'.join(lines))
    return table


def read_measurements(table: Path, config: Config) -> dict[Choice, float]:
    """Read the milliseconds from a filled-in table of :func:`write_files`."""
    networks = table.with_name(NETWORKS_NAME)
    if not networks.is_file():
        text = 'give --from the table in the folder that --write-files wrote'
        raise ConfigError(f'there is no {networks}: {text}')
    known = json.loads(networks.read_text())
    check_identity(networks, known, config, 'write and measure them again, in a new folder')
    measured = {}
    # Spreadsheets begin files with a byte order mark.
    with table.open(newline='', encoding='utf-8-sig') as file:
        rows = csv.reader(file)
        for row in filter(None, rows):
            if row == COLUMNS:
                continue
            try:
                name, cell = row
                ms = float(cell)
                if not 0 < ms < math.inf:
                    raise ValueError
                # Removed, so that a second line of the same file is an error.
                choice = known['files'].pop(name.strip())
            except (ValueError, KeyError) as error:
                raise ConfigError(
                    f'{table}, line {rows.line_num}: {",".join(row)!r} must be the name of a file, '
                    'only once in the table, and its milliseconds, such as 12.5. Remove the lines '
                    'of networks that were not measured'
                ) from error
            measured[Choice.from_dict(choice)] = ms
    return measured
