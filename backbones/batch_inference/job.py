"""Ray distributes units to processes, on this machine or on many."""

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow.parquet as pq

from backbones.engine.config import load_config
from backbones.errors import ConfigError, StorageError, import_optional, in_one_line
from backbones.inference.inputs import find_scheme
from backbones.inference.output import encode_drawing
from backbones.inference.output_paths import mirrored_path, shorten
from backbones.inference.predictor import Predictor
from backbones.inference.reading import Closed, Frame
from backbones.weights import use_safe_loading

from .destination import Destination
from .source import Unit, read_unit

# How often processes may die at one unit before the run fails.
MAX_RETRIES = 20
# After this many units with an error, no other unit is started.
MAX_ERRORS = 10
# The folder of drawings in the destination.
DRAWN_FOLDER = '_drawn'
GO_ON = 'The same command continues with what is missing'
# Bytes for what processes of our own cluster send each other: next to nothing.
OBJECT_STORE = 2**27
SETTINGS = {
    'RAY_USAGE_STATS_ENABLED': '0',
    # Each of our processes is told its device.
    'RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO': '0',
}


@dataclass
class Worker:
    """A process with the model, which turns units into files of results."""

    # The destination's URL.
    out: str
    # The arguments of Predictor.
    model: dict[str, Any]
    # Metadata about the model for the files of results.
    metadata: dict[str, str]
    # Whether drawings are written too.
    draw: bool = False
    trust_checkpoint: bool = False

    def __post_init__(self) -> None:
        use_safe_loading(self.trust_checkpoint)
        self.destination = Destination(self.out)
        self.predictor = Predictor(**self.model)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Process a unit, given by its fields, and return a report."""
        unit = Unit(**row)
        report = dict(inputs=unit.num_inputs, rows=0, problems=0, error='')
        try:
            # An earlier process may have died after its last step.
            if not self.destination.has(unit.part):
                self._run(unit, report)
        # Each storage has errors of its own.
        except Exception as error:
            report['error'] = in_one_line(error)
        return report

    def _run(self, unit: Unit, report: dict[str, Any]) -> None:
        schema = self.predictor.schema
        schema = schema.with_metadata(schema.metadata | self.metadata)
        tables = self.predictor.stream(
            read_unit(unit, self.destination), self._finish, raise_if_temporary
        )
        with TemporaryDirectory() as folder:
            file = Path(folder, unit.part)
            with pq.ParquetWriter(file, schema, compression='zstd') as writer:
                for table in tables:
                    writer.write_table(table)
                    report['rows'] += table.num_rows
                    report['problems'] += table.num_rows - table['problem'].null_count
            self.destination.commit(file, unit.part)

    def _finish(self, frame: Frame) -> None:
        if not self.draw:
            return
        drawing = self.predictor.inferencer.visualizer.draw(frame.image, frame.prediction)
        suffix, content = encode_drawing(drawing)
        name = drawn_name(frame.input.path)
        if frame.stream:
            name = f'{name}/{frame.index:06d}'
        if not name.endswith(suffix):
            name += suffix
        self.destination.write(f'{DRAWN_FOLDER}/{name}', content)


def raise_if_temporary(closed: Closed) -> None:
    """Raise StorageError for an input that may be read later: then its unit is not done."""
    if closed.is_temporary:
        raise StorageError(f'{closed.input.shown} {closed.problem}')


def drawn_name(path: str) -> str:
    """Return the name of an input's drawing, from the root on: processes' folders may differ."""
    name = mirrored_path(path) if find_scheme(path) else os.path.normpath(f'/{path}').lstrip('/')
    return shorten(name, path)


def fingerprint(model: dict[str, Any], draw: bool) -> dict[str, str]:
    """Return what results depend on: a hash of the model's files, and the options."""
    options = {key: value for key, value in model.items() if key != 'batch_size'} | {'draw': draw}
    config, checkpoint = options.pop('config'), options.pop('checkpoint')
    digest = hashlib.sha256()
    if checkpoint:
        digest.update(load_config(config, options['cfg_options']).pretty_text.encode())
        files = [checkpoint]
    else:
        files = [config, str(Path(config).with_suffix('.bin'))]
    for file in filter(os.path.isfile, files):
        digest.update(Path(file).read_bytes())
    if checkpoint and find_scheme(checkpoint):
        digest.update(checkpoint.encode())
    shown = {key: value for key, value in options.items() if value not in (None, {})}
    name = Path(checkpoint or config).name
    return {'model': f'{name}, sha256 {digest.hexdigest()[:16]}', 'options': json.dumps(shown)}


def versions() -> dict[str, str]:
    """Return our version and torch's."""
    try:
        own = version('efficientformer-v2-dense')
    except PackageNotFoundError:
        own = 'not installed'
    return {'version': own, 'torch': version('torch')}


def run(
    job: dict[str, Any], units: Sequence[Unit], address: str | None = None, **resources: Any
) -> Iterator[dict[str, Any]]:
    """Process all units; if a process or machine is lost, only its current units start again.

    ``job`` are the arguments of :class:`Worker`, ``resources`` those of :func:`plan`. Without the
    ``address`` of a cluster, one is started on this machine. Yields for each finished unit how many
    ``inputs`` it had, and how many ``rows`` and ``problems`` were written. Raises ConfigError if
    Ray cannot be reached or has no room for a process, or if units fail.
    """
    ray = import_optional('ray', 'inference on many machines', 'scale')
    data = import_optional('ray.data', 'inference on many machines', 'scale')
    _connect(ray, address)
    try:
        machines = [node['Resources'] for node in ray.nodes() if node['Alive']]
        options, (least, most) = plan(machines, len(units), bool(address), **resources)
        data.DataContext.get_current().enable_progress_bars = False
        device = None if options['num_gpus'] else 'cpu'
        job = job | {'model': job['model'] | {'device': device}}
        dataset = data.from_items(
            [unit._asdict() for unit in units], override_num_blocks=len(units)
        )
        reports = dataset.map(
            Worker,
            fn_constructor_kwargs=job,
            compute=data.ActorPoolStrategy(min_size=least, max_size=most),
            max_task_retries=MAX_RETRIES,
            **options,
        )
        yield from _without_errors(reports.iter_rows())
    except ray.exceptions.RayError as error:
        # Without ray.shutdown(), which ended the command before it could print the error.
        reason = str(error).strip().splitlines()[-1]
        raise ConfigError(f'processes end with an error: {reason}. {GO_ON}') from error
    ray.shutdown()


def _connect(ray: Any, address: str | None) -> None:
    """Join the cluster, or start one; Ray and its processes log to Ray's own files."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    logging.getLogger('ray.data').setLevel(logging.CRITICAL)
    own = dict(include_dashboard=False, object_store_memory=OBJECT_STORE)
    quiet = dict(log_to_driver=False, logging_level=logging.ERROR)
    try:
        ray.init(address=address or 'local', **quiet, **({} if address else own))
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = f'cannot reach the cluster at {address}' if address else 'cannot start here'
        raise ConfigError(f'Ray {where}: {error}') from error


def plan(
    machines: Sequence[dict[str, float]],
    num_units: int,
    may_grow: bool = False,
    actors: tuple[int, int] | None = None,
    cpus: float | None = None,
    gpus: float | None = None,
) -> tuple[dict[str, float], tuple[int, int]]:
    """Return the resources of each process, and the least and the most processes at a time.

    The default is as many processes as fit, each with a GPU if there are some. Without a GPU, a
    process gets one core; with one, its share of the cores of the machine with fewest per GPU.
    """
    if gpus is None:
        gpus = 1.0 if any(room.get('GPU', 0) >= 1 for room in machines) else 0.0
    if cpus is None:
        shares = [room.get('CPU', 0) * gpus / room['GPU'] for room in machines if room.get('GPU')]
        cpus = max(1, int(min(shares))) if gpus and shares else 1
    fitting = 0
    for room in machines:
        by_gpu = room.get('GPU', 0) / gpus + 1e-6 if gpus else math.inf
        fitting += int(min(room.get('CPU', 0) // cpus, by_gpu))
    # A cluster that we did not start may grow, and have no room yet.
    if not fitting and not (actors and may_grow):
        rooms = (f'{r.get("CPU", 0):g} cores and {r.get("GPU", 0):g} GPUs' for r in machines)
        raise ConfigError(
            f'no machine has room for a process of {cpus:g} cores and {gpus:g} GPUs; they have '
            + '; '.join(dict.fromkeys(rooms))
        )
    least, most = actors or (fitting, fitting)
    return dict(num_cpus=cpus, num_gpus=gpus), (min(least, num_units), min(most, num_units))


def _without_errors(reports: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the reports of finished units; raise the errors of others at the end."""
    errors = []
    for report in reports:
        if not report['error']:
            yield report
            continue
        errors.append(report['error'])
        if len(errors) == MAX_ERRORS:
            break
    if errors:
        more = f' and {len(errors) - 1} more' if len(errors) > 1 else ''
        raise ConfigError(f'not all units are done: {errors[0]}{more}. {GO_ON}')
