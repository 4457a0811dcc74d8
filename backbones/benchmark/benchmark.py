"""Measuring groups of models at several settings, and describing the machine."""

import gc
import os
import platform
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import torch

from backbones.errors import in_one_line
from backbones.inference.exported_file import omp_threads

from .candidates import OURS, Group
from .measure import Timed, count_macs, measure_in_turns, peak_memory, synchronizer
from .work import SUFFIXES, Setting, export_model, make_batch, make_runner

# (height, width) of images.
DEFAULT_SIZES = {'mmseg': (512, 512), 'mmdet': (800, 1333)}
# Fields in which the settings of a run may differ.
VARIED = ('part', 'step', 'backend', 'size', 'batch')
LIBRARIES = ('torch', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'numpy', 'onnxruntime', 'openvino')


def benchmark(
    groups: Sequence[Group], settings: Sequence[Setting], rounds: int, seconds: float
) -> dict[str, Any]:
    """Measure models side by side; return results that can be written as JSON.

    Device, threads, deploy and amp must be equal in all settings. For ``rounds`` and ``seconds``
    see :func:`.measure.measure_in_turns`.
    """
    first = settings[0]
    start = time.perf_counter()
    cpus = use_threads(first.threads)
    results = []
    for group in groups:
        for setting in settings:
            sized = replace(setting, size=setting.size or DEFAULT_SIZES[group.scope])
            results += compare(group, sized, rounds, seconds)
    return dict(
        machine=describe_machine(first.device, first.threads, cpus),
        deploy=first.deploy,
        amp=first.amp,
        seconds=time.perf_counter() - start,
        results=results,
    )


def compare(group: Group, setting: Setting, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Measure the models of a group at one setting; if one fails, the others are still measured."""
    height, width = setting.size
    names = (group.name, setting.part, setting.step, setting.backend)
    what = f'{", ".join(names)}, {height}x{width}, batch {setting.batch}'
    results, runners, timed = {}, {}, {}

    def report(line: str) -> None:
        print(f'{what}: {line}', file=sys.stderr, flush=True)

    def fail(name: str, error: Exception) -> None:
        results[name]['problem'] = in_one_line(error)
        report(f'{name} failed: {results[name]["problem"]}')

    with TemporaryDirectory() as folder:
        for name, candidate in group.candidates.items():
            report(name)
            result = results[name] = dict(
                model=name,
                head=group.name,
                config=candidate.config_path,
                ours=candidate.name.startswith(OURS),
                problem=None,
                **{key: getattr(setting, key) for key in VARIED},
            )
            try:
                model = candidate.build()
                input_size = tuple(make_batch(model, setting)[0].shape[2:])
                counted = model.backbone if setting.part == 'backbone' else model
                result['input_size'] = input_size
                result['parameters'] = sum(p.numel() for p in counted.parameters())
                result['macs'] = count_macs(model, setting.part, input_size)
                exported = setting.backend in SUFFIXES
                file = Path(folder) / f'{name}{SUFFIXES[setting.backend]}' if exported else None
                if file:
                    export_model(candidate, model, setting, file)
                runner = make_runner(model, setting, file)
                result['peak_memory_mib'] = peak_memory(candidate, setting, group.scope, file)
                runner()
                runners[name] = runner
            # torch and the other libraries raise errors of many kinds.
            except Exception as error:
                fail(name, error)
        try:
            wait = synchronizer(setting.device)
            timed = measure_in_turns(runners, wait, rounds, seconds, report)
        except Exception as error:
            for name in runners:
                fail(name, error)
    first = next(iter(timed.values()), None)
    for name, each in timed.items():
        results[name] |= figures(each, first, setting.batch)
    del runners
    gc.collect()
    return list(results.values())


def figures(timed: Timed, first: Timed, batch: int) -> dict[str, Any]:
    """Return the latency of a batch in milliseconds, and figures derived from it."""
    low, middle, high = (timed.percentile(percent) * 1e3 for percent in (10, 50, 90))
    latency = dict(
        median=middle,
        p10=low,
        p90=high,
        spread_percent=(high - low) / middle * 100,
        round_medians=[seconds * 1e3 for seconds in timed.round_medians()],
    )
    per_second = batch * 1e3 / middle
    return dict(latency_ms=latency, images_per_second=per_second, ratio=timed.ratio_to(first))


def default_threads() -> int:
    """Return OMP_NUM_THREADS if set, else the number of physical cores for this process."""
    return omp_threads() or len(one_cpu_per_core())


def one_cpu_per_core() -> list[int]:
    """Return the first processor of each physical core that this process may use."""
    if not hasattr(os, 'sched_getaffinity'):
        return list(range(os.cpu_count() or 1))
    cores: dict[str, int] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        siblings = Path(f'/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list')
        cores.setdefault(siblings.read_text() if siblings.is_file() else str(cpu), cpu)
    return list(cores.values())


def use_threads(threads: int) -> list[int] | None:
    """Set the number of threads of this process, and pin it to one processor each if possible.

    Returns these processors, to which its child processes are pinned as well, or None if it cannot
    be pinned.
    """
    cpus = one_cpu_per_core()[:threads]
    can_pin = hasattr(os, 'sched_setaffinity') and threads == len(cpus)
    if can_pin:
        # This does not move threads that exist already.
        os.sched_setaffinity(0, cpus)
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    return cpus if can_pin else None


def describe_machine(device: str, threads: int, cpus: list[int] | None) -> dict[str, Any]:
    """Return the processor, GPU, system and versions of imported libraries."""
    cpu, info = platform.processor() or platform.machine(), Path('/proc/cpuinfo')
    if info.is_file() and (names := re.findall(r'model name\s*: (.*)', info.read_text())):
        cpu = names[0]
    gpu = {}
    if device.startswith('cuda'):
        gpu = dict(gpu=torch.cuda.get_device_name(device), cuda=torch.version.cuda)
    return dict(
        date=datetime.now(timezone.utc).isoformat(timespec='seconds'),
        cpu=cpu,
        threads=threads,
        pinned_to=cpus,
        device=device,
        system=platform.platform(),
        python=platform.python_version(),
        versions={name: sys.modules[name].__version__ for name in LIBRARIES if name in sys.modules},
        **gpu,
    )
