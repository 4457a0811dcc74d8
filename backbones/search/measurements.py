"""Networks of a space that were measured: on this device, or as files on another one."""

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
from backbones.inference.run import progress_bar

from .evaluate import append_record, read_records
from .latency import LatencyModel, check_identity, check_number, fit, identify, latency_path
from .space import Choice, Space, search_options

# Networks that are in memory at once, besides the one that all groups are compared with.
GROUP_SIZE = 5
MAX_PUBLISHED = 5
# Compiling each network takes longer than measuring it.
BACKENDS = ('torch', *SUFFIXES)
CSV_NAME, NETWORKS_NAME = 'measurements.csv', 'networks.json'
COLUMNS = ['file', 'ms']


def choose_networks(space: Space, seed: int, number: int, held_out: int = 0) -> list[Choice]:
    """The largest, the smallest, a few published and random networks; ``held_out`` others follow.

    The same seed gives the same networks, and those of a smaller ``number`` first.
    """
    published = list(space.published().values())
    step = math.ceil(len(published) / MAX_PUBLISHED) or 1
    # Keys, since a random one may be among those before it.
    chosen = dict.fromkeys([space.largest, space.smallest, *published[::step]][:number])
    for stream, total in enumerate((number, number + held_out)):
        rng = np.random.default_rng((seed, stream))
        for _ in range(100 * total):
            if len(chosen) >= total:
                break
            chosen[space.sample(rng)] = None
    if len(chosen) < number + held_out:
        raise ConfigError(f'the space has about {len(chosen)} networks only: ask for fewer')
    return list(chosen)


def measure_latency(
    config: Config,
    options: dict[str, Any],
    setting: Setting,
    number: int,
    held_out: int,
    rounds: int,
    seconds: float,
) -> tuple[LatencyModel, dict[Choice, float]]:
    """Measure networks of a config's space, fit a model of latency and write it to the work folder.

    It is fitted to ``number`` networks, and ``held_out`` further ones tell how good it is. The
    milliseconds of all of them are returned too; see :func:`measure`.
    """
    space = Space.from_config(config)
    check_number(number)
    choices = choose_networks(space, search_options(config)['seed'], number, held_out)
    path = latency_path(config.work_dir, setting.backend)
    log = path.with_suffix('.jsonl')
    measured = measure(config.filename, options, choices, setting, log, rounds, seconds)
    model = fit(space, choices[:number], measured[:number], setting)
    by_choice = dict(zip(choices, measured, strict=True))
    model.save(path, config, by_choice)
    # It is for a command that was ended; the next one measures anew, on a quieter machine maybe.
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
    """Milliseconds that whole networks take for an image.

    A few take turns at a time, as more may not fit in memory, together with one that is the same in
    all of these groups. A network's latency is how many times as long it took as that one, by the
    median time of that one over all groups, so that a machine that becomes slower or faster
    meanwhile does not matter.

    Every group is appended to ``log``, a JSON Lines file; what stands there for the same model,
    space, options and setting is not measured again.
    """
    config = load_config(config_path, options)
    options = with_classes(config, options)
    space = Space.from_config(config)
    # The network of middle settings: it is timed most often, and should be like all others.
    reference = space.draw(lambda settings: settings[len(settings) // 2], range)
    machine = describe_machine(setting.device, setting.threads, None)
    what = [identify(config), options, asdict(setting), machine['cpu'], machine.get('gpu')]
    what.append(reference.to_json())
    key = hashlib.sha256(json.dumps(what, default=str).encode()).hexdigest()[:16]
    records = {r['choice']: r for r in read_records(log) if r['key'] == key}
    todo = [choice for choice in choices if choice.to_json() not in records]
    with (
        progress_bar(len(choices), 'network', 'measuring') as bar,
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
            # Those of a group are in memory at once, those of two are not.
            runners = {reference: runners[reference]}
            gc.collect()
            for choice in group:
                record = dict(
                    key=key,
                    choice=choice.to_json(),
                    ratio=timed[choice].ratio_to(timed[reference]),
                    reference_ms=timed[reference].percentile(50) * 1e3,
                )
                records[choice.to_json()] = record
                append_record(log, record)
            bar.update(0.5 * len(group))
    reference_ms = median(record['reference_ms'] for record in records.values())
    return [records[choice.to_json()]['ratio'] * reference_ms for choice in choices]


def check_setting(setting: Setting) -> None:
    """Raise ConfigError where networks cannot be measured again here as they were."""
    try:
        choose_device(setting.device)
        if setting.backend in SUFFIXES:
            check_packages(SUFFIXES[setting.backend])
    except ConfigError as error:
        raise ConfigError(f'{error}. Without measuring again here: --no-measure') from error


def with_classes(config: Config, options: dict[str, Any]) -> dict[str, Any]:
    """Options with the classes of a config's data, which its heads follow, where the data are."""
    try:
        names = set_classes(config, ('train',))
    except (ConfigError, DataError, FileNotFoundError):
        return options
    return {**options, 'classes': list(names)}


def make_network(candidate: Candidate, setting: Setting, folder: Path) -> Callable[[], Any]:
    """A function that runs a network once, which is written to a folder where it runs as a file."""
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
    """Write so many networks as files of a format, and a table to fill in with their milliseconds.

    Files that are there already are kept. Returns the table, measurements.csv: its cells under ms
    are empty.
    """
    config = load_config(config_path, options)
    space = Space.from_config(config)
    check_number(number)
    check_packages(suffix)
    chosen = choose_networks(space, search_options(config)['seed'], number)
    files = {f'network_{n + 1:02}{suffix}': choice for n, choice in enumerate(chosen)}
    setting = Setting(backend='onnxruntime', size=size or DEFAULT_SIZES[config.default_scope])
    names = {name: choice.to_json() for name, choice in files.items()}
    content = dict(files=names, size=setting.size, **identify(config))
    description = json.dumps(content, indent=2)
    # Only now: the networks are identified by the config without the classes that this sets there.
    options = with_classes(config, options)
    networks, table = folder / NETWORKS_NAME, folder / CSV_NAME
    if networks.is_file() and networks.read_text().strip() != description:
        raise ConfigError(f'{folder} has files of other networks: write to a new folder')
    write_text(networks, description)
    with progress_bar(len(files), 'file', 'writing') as bar:
        for name, choice in files.items():
            bar.set_postfix_str(name)
            if not (folder / name).exists():
                own = {**options, **space.options(choice, config)}
                candidate = Candidate(config_path, options=own)
                with staged(folder / name) as path:
                    export_model(candidate, candidate.build(), setting, path)
            bar.update()
    if not table.exists():
        lines = [','.join(COLUMNS), *(f'{name},' for name in files)]
        write_text(table, '\n'.join(lines))
    return table


def read_measurements(table: Path, config: Config) -> dict[Choice, float]:
    """The milliseconds in a table that :func:`write_files` wrote, once it is filled in."""
    networks = table.with_name(NETWORKS_NAME)
    if not networks.is_file():
        text = 'give --from the table in the folder that --write-files made'
        raise ConfigError(f'there is no {networks}: {text}')
    known = json.loads(networks.read_text())
    check_identity(networks, known, config, 'write and measure them again, in a new folder')
    measured = {}
    # Spreadsheets put a byte order mark first.
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
                # Taken out, so that a second line of the same file is refused.
                choice = known['files'].pop(name.strip())
            except (ValueError, KeyError) as error:
                raise ConfigError(
                    f'{table}, line {rows.line_num}: {",".join(row)!r} is not the name of one of '
                    'the files, once, and its milliseconds, such as 12.5. Remove the lines of '
                    'networks that were not measured'
                ) from error
            measured[Choice.from_json(choice)] = ms
    return measured
