"""From configs to figures."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from mmengine.structures import InstanceData
from torch import nn

from backbones.errors import ConfigError
from backbones.inference.model import choose_device

from . import counting, machine, memory, timing
from .candidates import Candidate, Group, group_configs
from .work import Ready, Setting, make_batch, prepare

# In percent; above these, timings are doubtful.
MOST_BUSY, MOST_SPREAD = 15, 25
DEFAULT_SIZES = {'mmseg': (512, 512), 'mmdet': (800, 1333)}
NOTES = (
    counting.HOW,
    timing.HOW,
    memory.HOW,
    "'backbone' is the backbone alone, on a preprocessed photograph; 'model' is all of it as "
    'infer.py runs it, from the pixels of a photograph of that size to label maps, or to boxes, '
    'scores, labels and mask probabilities inside the boxes: normalisation and post-processing are '
    'included in all backends, reading, resizing and pasting masks into pictures in none. Weights '
    'are random, so detectors find other things than trained ones: how many is in the JSON; where '
    'it is none, mask heads did not run.',
    "'compile' is torch.compile, with weights frozen, of backbone, neck and dense heads; heads of "
    'regions are not compiled.',
)


@dataclass(frozen=True)
class Request:
    """What is measured: every combination of what has several values.

    Attributes:
        configs: Paths of configs.
        peers: Add MobileNetV2, ResNet-18 and ResNet-50 under the same neck and head.
        parts: Of 'backbone' and 'model'.
        sizes: Heights and widths of pictures. None: 512x512 for segmentors, 800x1333 for
            detectors.
        batches: Pictures at once.
        backends: Of 'torch', 'compile', 'onnxruntime' and 'openvino'.
        train: Measure training steps too, in torch.
        deploy: Fold all networks for inference, the peers' too.
        amp: Mixed precision, as infer.py and train.py have it.
        device: For instance 'cuda:1'. None: the first GPU, else the CPU.
        threads: Of the processor. None: see :func:`.machine.default_threads`.
        effort: How long is measured.
        options: Overrides for the configs, by dotted key.
    """

    configs: Sequence[str]
    peers: bool
    parts: Sequence[str]
    sizes: Sequence[tuple[int, int]] | None
    batches: Sequence[int]
    backends: Sequence[str]
    train: bool
    deploy: bool
    amp: bool
    device: str | None
    threads: int | None
    effort: timing.Effort
    options: dict[str, Any]


def benchmark(request: Request, report: Callable[[str], None]) -> dict[str, Any]:
    """Measure models side by side.

    Args:
        request: What is measured.
        report: Called with a line about what is going on.

    Returns:
        What can be written as JSON: ``machine``, ``deploy``, ``amp``, ``notes``, ``warnings``,
        ``paper_check`` (multiply-adds of s2 at 224x224) and ``results``, one for each model and
        setting.

    Raises:
        ConfigError: A config cannot be read, or there is no such device.
    """
    busy = machine.busy_percent()
    threads = request.threads or machine.default_threads()
    cpus = machine.pin(threads, busy)
    machine.use_threads(threads)
    device = str(choose_device(request.device))
    start = time.perf_counter()
    results = []
    for group in group_configs(request.configs, request.peers, request.options):
        for setting in settings_of(request, group.scope, device, threads):
            results += compare(group, setting, request.effort, report)
    return dict(
        machine=machine.describe_machine(device, threads, cpus),
        seconds=time.perf_counter() - start,
        busy_percent=sum(busy) / len(busy),
        deploy=request.deploy,
        amp=request.amp,
        notes=list(NOTES),
        warnings=doubts(sum(busy) / len(busy), results),
        paper_check=counting.check_against_paper(),
        results=results,
    )


def doubts(busy: float, results: list[dict[str, Any]]) -> list[str]:
    """Why the figures may not be trusted."""
    said = []
    if busy > MOST_BUSY:
        said.append(f'other work kept {busy:.0f} % of the processors busy at the start')
    spreads = [each['latency_ms']['spread_percent'] for each in results if 'latency_ms' in each]
    if spreads and (typical := median(spreads)) > MOST_SPREAD:
        said.append(
            f'timings spread by {typical:.0f} % (the median over all rows), so something else was '
            'running or the clock changed: repeat it on a quiet machine'
        )
    return said


def settings_of(request: Request, scope: str, device: str, threads: int) -> Iterator[Setting]:
    """Every combination; training in torch alone, which is the only one that can."""
    steps = [('predict', backend) for backend in request.backends]
    if request.train:
        steps.append(('train', 'torch'))
    sizes = request.sizes or [DEFAULT_SIZES[scope]]
    for size, batch, part, (step, backend) in product(sizes, request.batches, request.parts, steps):
        yield Setting(
            part, step, backend, size, batch, request.deploy, request.amp, device, threads
        )


def compare(
    group: Group, setting: Setting, effort: timing.Effort, report: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Measure the models of a group at one setting.

    What fails for one model is said in its result and leaves the others alone.
    """
    what = (
        f'{group.name}, {setting.part}, {setting.step}, {setting.backend}, '
        f'{setting.size[0]}x{setting.size[1]}, batch {setting.batch}'
    )
    results = {}
    ready: dict[str, Ready] = {}
    with TemporaryDirectory() as folder:
        for name, candidate in group.candidates.items():
            report(f'{what}: {name}')
            results[name] = dict(
                model=name,
                head=group.name,
                config=candidate.config_path,
                ours=candidate.is_ours,
                peer=candidate.peer is not None,
                **setting.described(),
                problem=None,
            )
            try:
                model = candidate.build()
                results[name] |= counts(model, setting)
                ready[name], file = make_ready(candidate, model, setting, Path(folder))
                peak = memory.peak_memory(candidate, setting, group.scope, file)
                results[name] |= dict(
                    peak_memory_mib=None if peak is None else peak / 2**20,
                    setup_seconds=ready[name].setup_seconds,
                    detections=count_detections(ready[name].run()),
                )
            # RuntimeError is what torch and the other libraries raise, want of memory included.
            except (ConfigError, RuntimeError) as error:
                ready.pop(name, None)
                results[name]['problem'] = ' '.join(str(error).split())[:500]
                report(f'{what}: {name} failed: {results[name]["problem"]}')
        timed = timing.measure_in_turns(
            {name: each.run for name, each in ready.items()},
            synchroniser(setting.device),
            effort,
            lambda line: report(f'{what}: {line}'),
        )
    first = next(iter(timed.values()), None)
    for name, each in timed.items():
        results[name] |= figures(each, first, setting.batch)
    del ready
    gc.collect()
    return list(results.values())


def counts(model: nn.Module, setting: Setting) -> dict[str, Any]:
    """Parameters, and multiply-adds at the size of the preprocessed picture."""
    inputs, _ = make_batch(model, setting)
    size = tuple(inputs.shape[2:])
    return dict(
        input_size=size,
        parameters=counting.count_parameters(model, setting.part),
        macs=counting.count_macs(model, setting.part, size),
    )


def make_ready(
    candidate: Candidate, model: nn.Module, setting: Setting, folder: Path
) -> tuple[Ready, Path | None]:
    """A function to time, and the file that it runs, if any."""
    if setting.backend not in ('onnxruntime', 'openvino'):
        return prepare(model, setting), None
    from .exported import export_file, open_file

    start = time.perf_counter()
    file = export_file(candidate, model, setting, folder)
    run = open_file(file, setting)
    return Ready(run, time.perf_counter() - start), file


def count_detections(outcome: Any) -> int | None:
    """How many objects a detector found on all pictures; None of everything else."""
    if isinstance(outcome, dict) and 'labels' in outcome:
        # Where an exported file fills up a batch, labels are -1.
        return int((outcome['labels'] >= 0).sum())
    if isinstance(outcome, list) and isinstance(outcome[0], InstanceData):
        return sum(map(len, outcome))
    return None


def synchroniser(device: str) -> Callable[[], None]:
    """A function that waits for the device; on a CPU there is nothing to wait for."""
    if device.startswith('cuda'):
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def figures(timed: timing.Timed, first: timing.Timed, batch: int) -> dict[str, Any]:
    """Latency of a batch in milliseconds, and what follows from it."""
    low, middle, high = (timed.percentile(percent) * 1e3 for percent in (10, 50, 90))
    return dict(
        latency_ms=dict(
            median=middle,
            fastest=timed.percentile(0) * 1e3,
            p10=low,
            p90=high,
            spread_percent=(high - low) / middle * 100,
            calls=sum(map(len, timed.rounds)),
            round_medians=[seconds * 1e3 for seconds in timed.round_medians()],
        ),
        pictures_per_second=batch * 1e3 / middle,
        ratio=timed.ratio_to(first),
    )
