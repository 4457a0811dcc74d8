"""What is measured: time in turns, parameters and multiply-adds, peak memory."""

import copy
import gc
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .candidates import Candidate
from .work import Setting, make_runner

NOTES = (
    'Models take turns, so that what disturbs the machine disturbs all alike: a turn is one call '
    'that is not timed, then calls for about a quarter of a second. Median and p90 are over all '
    "timed calls, spread is p90 less p10 in percent of the median; the time ratio is a model's "
    'median to that of the first model in the same round, the median over the rounds.',
    'Multiply-adds are half the FLOPs that torch.utils.flop_counter counts in convolutions and '
    'matrix products, those of attention included, for one image in the network before folding. '
    'RoI heads, whose cost depends on the image, are left out, and backward passes.',
    'Peak memory is taken in a process for each model: on a GPU what torch had allocated at most, '
    'on a CPU what the resident memory grew by after the libraries were loaded; not for compiled '
    'models on a CPU, nor for exported files on a GPU.',
)
MIN_ROUNDS = 3
WARM_UP_CALLS = 2
SECONDS_OF_A_TURN = 0.25
MAX_CALLS_OF_A_TURN = 50


@dataclass(frozen=True)
class Effort:
    """How long is measured.

    Attributes:
        rounds: How many turns every function gets, at most.
        seconds: Time for each function, after which no new round begins (but three at least,
            where ``rounds`` allows).
    """

    rounds: int = 10
    seconds: float = 5.0


@dataclass(frozen=True)
class Timed:
    """Seconds that the calls of a function took, by round."""

    rounds: list[list[float]]

    def percentile(self, percent: float) -> float:
        """Seconds that so many percent of the calls do not exceed."""
        return float(np.percentile([call for calls in self.rounds for call in calls], percent))

    def round_medians(self) -> list[float]:
        return [float(np.median(calls)) for calls in self.rounds]

    def ratio_to(self, other: 'Timed') -> float:
        """The median over the rounds of how many times the other's time this took."""
        pairs = zip(self.round_medians(), other.round_medians(), strict=True)
        return float(np.median([mine / theirs for mine, theirs in pairs]))


def measure_in_turns(
    functions: Mapping[str, Callable[[], Any]],
    synchronize: Callable[[], None],
    effort: Effort,
    report: Callable[[str], None],
) -> dict[str, Timed]:
    """Time functions alternately.

    Args:
        functions: By name.
        synchronize: Waits until the device has done all it was given.
        effort: How long.
        report: Called with a line for each round.
    """
    for function in functions.values():
        for _ in range(WARM_UP_CALLS):
            function()
        synchronize()
    timed: dict[str, list[list[float]]] = {name: [] for name in functions}
    start = time.perf_counter()
    for number in range(effort.rounds):
        late = time.perf_counter() - start > effort.seconds * len(functions)
        if late and number >= MIN_ROUNDS:
            break
        report(f'round {number + 1}')
        for name, function in functions.items():
            timed[name].append(take_turn(function, synchronize))
    return {name: Timed(rounds) for name, rounds in timed.items()}


def take_turn(function: Callable[[], Any], synchronize: Callable[[], None]) -> list[float]:
    """Call once to fill the caches again, then time calls for a quarter of a second."""
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
    """Multiply-adds for one image.

    Args:
        model: A model of mmdet or mmseg that was not folded.
        part: 'backbone', or 'model' for that with neck and dense heads.
        size: Height and width of the input.
    """
    # Nothing is computed on this device, shapes alone are.
    model = copy.deepcopy(model).to('meta')
    images = torch.zeros(1, 3, *size, device='meta')
    with (
        FlopCounterMode(display=False) as counter,
        # The counter does not know all of its kernels, but it knows its two products.
        patch.object(F, 'scaled_dot_product_attention', two_products),
    ):
        features = model.backbone(images) if part == 'backbone' else model.extract_feat(images)
        for name in ('decode_head', 'rpn_head', 'bbox_head') if part == 'model' else ():
            if hasattr(model, name):
                getattr(model, name)(features)
    return counter.get_total_flops() // 2


def two_products(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return (q @ k.transpose(-2, -1)) @ v


def peak_memory(
    candidate: Candidate, setting: Setting, scope: str, file: Path | None = None
) -> int | None:
    """Bytes that a model takes at most, in a process of its own.

    Args:
        candidate: The model.
        setting: What it does.
        scope: 'mmdet' or 'mmseg'.
        file: Where it is exported, if it is.

    Returns:
        None where it cannot be measured so, or where memory was not enough.
    """
    on_gpu = setting.device.startswith('cuda')
    if (setting.backend == 'compile' and not on_gpu) or (file is not None and on_gpu):
        return None
    context = multiprocessing.get_context('forkserver')
    # Loaded once; each process begins as a copy of one that has them.
    context.set_forkserver_preload([__name__, f'{scope}.models'])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_peak, args=(sender, candidate, setting, scope, file))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return None
    finally:
        process.join()


def send_peak(
    sender: Connection, candidate: Candidate, setting: Setting, scope: str, file: Path | None
) -> None:
    """What the other process does."""
    for module in (f'{scope}.models', *([setting.backend] if file else [])):
        import_module(module)
    torch.set_num_threads(setting.threads)
    before = resident_peak()
    run = make_runner(candidate.build() if file is None else None, setting, file)
    gc.collect()
    resident_peak()
    on_gpu = setting.device.startswith('cuda')
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(setting.device)
    run()
    run()
    if on_gpu:
        torch.cuda.synchronize(setting.device)
        sender.send(torch.cuda.max_memory_allocated(setting.device))
    else:
        sender.send(max(0, resident_peak() - before))


def resident_peak() -> int:
    """Most bytes that were resident since the last call, or where that cannot be had, ever."""
    # In KiB, but on macOS in bytes.
    unit = 1 if sys.platform == 'darwin' else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    with suppress(OSError):
        Path('/proc/self/clear_refs').write_text('5')
    return peak
