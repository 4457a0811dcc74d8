"""Measuring time (in turns), multiply-adds and peak memory."""

import copy
import gc
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from backbones.errors import in_one_line
from backbones.inference.cuda_graphs import CALLS_BEFORE_RECORDING

from .candidates import Candidate
from .work import Setting, make_runner

Key = TypeVar('Key')

MIN_ROUNDS = 3
WARM_UP_CALLS = 2
SECONDS_OF_A_TURN = 0.25
MAX_CALLS_OF_A_TURN = 50


@dataclass(frozen=True)
class Timed:
    """The seconds of each call of a function, by round."""

    rounds: list[list[float]]

    def percentile(self, percent: float) -> float:
        """Return a percentile of the seconds of all calls."""
        return float(np.percentile([call for calls in self.rounds for call in calls], percent))

    def round_medians(self) -> list[float]:
        return [float(np.median(calls)) for calls in self.rounds]

    def ratio_to(self, other: 'Timed') -> float:
        """Return the median over rounds of this function's time divided by the other's."""
        return float(np.median(np.divide(self.round_medians(), other.round_medians())))


def measure_in_turns(
    functions: Mapping[Key, Callable[[], Any]],
    synchronize: Callable[[], None],
    rounds: int,
    seconds: float,
    report: Callable[[str], None],
) -> dict[Key, Timed]:
    """Time functions alternately.

    Args:
        functions: By name.
        synchronize: Waits until the device has finished.
        rounds: The most turns of every function.
        seconds: Time limit per function, after which only the first three rounds may begin.
        report: Called with a line for each round.
    """
    for function in functions.values():
        for _ in range(WARM_UP_CALLS):
            function()
        synchronize()
    timed = {name: Timed([]) for name in functions}
    start = time.perf_counter()
    for number in range(rounds):
        late = time.perf_counter() - start > seconds * len(functions)
        if late and number >= MIN_ROUNDS:
            break
        report(f'round {number + 1}')
        for name, function in functions.items():
            timed[name].rounds.append(take_turn(function, synchronize))
    return timed


def synchronizer(device: str) -> Callable[[], None]:
    """Return a function that waits until a device has finished."""
    if device.startswith('cuda'):
        return partial(torch.cuda.synchronize, device)
    return lambda: None


def take_turn(function: Callable[[], Any], synchronize: Callable[[], None]) -> list[float]:
    """Call once to warm the caches, then time calls for a quarter of a second (at most 50)."""
    function()
    synchronize()
    calls: list[float] = []
    while not calls or (sum(calls) < SECONDS_OF_A_TURN and len(calls) < MAX_CALLS_OF_A_TURN):
        start = time.perf_counter()
        function()
        synchronize()
        calls.append(time.perf_counter() - start)
    return calls


@torch.no_grad()
def count_macs(model: nn.Module, part: str, size: tuple[int, int]) -> int:
    """Return the multiply-adds of a model that was not folded, or its backbone, for one image.

    ``size`` is (height, width). Counts convolutions and matrix products, except in RoI heads.
    """
    # On this device only shapes are computed.
    model = copy.deepcopy(model).to('meta')
    images = torch.zeros(1, 3, *size, device='meta')
    with (
        FlopCounterMode(display=False) as counter,
        # The counter does not know all kernels of attention, but it knows the two products.
        patch.object(F, 'scaled_dot_product_attention', lambda q, k, v, *_, **__: (q @ k.mT) @ v),
    ):
        if part == 'backbone':
            model.backbone(images)
        else:
            features = model.extract_feat(images)
            for name in ('decode_head', 'rpn_head', 'bbox_head'):
                if hasattr(model, name):
                    getattr(model, name)(features)
    return counter.get_total_flops() // 2


def peak_memory(
    candidate: Candidate, setting: Setting, scope: str, file: Path | None = None
) -> float | None:
    """Return the peak memory, in MiB, of a model or of the file that it was exported to.

    On a GPU, the memory that torch allocates; else the resident memory of a separate process. None
    if it cannot be measured or memory is insufficient.
    """
    if setting.device.startswith('cuda'):
        return None if file else gpu_peak(candidate, setting)
    if setting.backend == 'compile':
        return None
    context = multiprocessing.get_context('forkserver')
    # Imported once; each process begins as a copy of one with these modules.
    context.set_forkserver_preload([__name__, f'{scope}.models'])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(cpu_peak, candidate, setting, scope, file).result() / 2**20
        # The process was killed, or torch raised any error.
        except Exception as error:
            print(f'peak memory was not measured: {in_one_line(error)}', file=sys.stderr)
            return None


def gpu_peak(candidate: Candidate, setting: Setting) -> float | None:
    """Return a model's peak memory on a GPU in MiB, or None if memory is insufficient."""
    before = torch.cuda.memory_allocated(setting.device)
    try:
        run = make_runner(candidate.build(), setting)
        torch.cuda.reset_peak_memory_stats(setting.device)
        # The last call records a CUDA graph, which keeps memory.
        for _ in range(CALLS_BEFORE_RECORDING + 1):
            run()
    except torch.OutOfMemoryError:
        return None
    return (torch.cuda.max_memory_allocated(setting.device) - before) / 2**20


def cpu_peak(candidate: Candidate, setting: Setting, scope: str, file: Path | None) -> int:
    """Return the bytes that a model needs, measured in this process, which must be new."""
    for module in (f'{scope}.models', *([setting.backend] if file else [])):
        import_module(module)
    torch.set_num_threads(setting.threads)
    before = resident_peak()
    run = make_runner(candidate.build() if file is None else None, setting, file)
    gc.collect()
    resident_peak()
    run()
    run()
    return max(0, resident_peak() - before)


def resident_peak() -> int:
    """Return the peak of resident bytes since the last call, or ever if that is unavailable."""
    # ru_maxrss is in KiB, but on macOS in bytes.
    unit = 1 if sys.platform == 'darwin' else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    with suppress(OSError):
        Path('/proc/self/clear_refs').write_text('5')
    return peak
