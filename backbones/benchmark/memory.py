"""Peak memory, each model in a process of its own."""

import gc
import multiprocessing
import resource
import sys
from contextlib import suppress
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import torch

from .candidates import Candidate
from .machine import use_threads
from .work import Setting, prepare

HOW = (
    'Peak memory is taken in a process of its own for each model: on a GPU the most that torch had '
    'allocated (weights, inputs and results included), on a CPU by how much the resident memory '
    'was at most, while the model ran twice, over that of the process with its libraries loaded. '
    "It is not taken for compiled models on a CPU, where it would be the compiler's, nor for other "
    'libraries on a GPU.'
)
CALLS = 2


def peak_memory(
    candidate: Candidate, setting: Setting, scope: str, file: Path | None = None
) -> int | None:
    """Bytes that a model takes at most.

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
    context.set_forkserver_preload([__name__, 'mmdet.models', 'mmseg.models'])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(sender, candidate, setting, scope, file))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return None
    finally:
        process.join()


def measure(
    sender: Connection, candidate: Candidate, setting: Setting, scope: str, file: Path | None
) -> None:
    """What the other process does."""
    import_module(f'{scope}.models')
    if file is not None:
        import_module(setting.backend)
        from .exported import open_file

    use_threads(setting.threads)
    before = psutil.Process().memory_info().rss
    run = open_file(file, setting) if file else prepare(candidate.build(), setting).run
    gc.collect()
    forget_peak()
    on_gpu = setting.device.startswith('cuda')
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(setting.device)
    for _ in range(CALLS):
        run()
    if on_gpu:
        torch.cuda.synchronize(setting.device)
        sender.send(torch.cuda.max_memory_allocated(setting.device))
    else:
        # In KiB, but on macOS in bytes.
        unit = 1 if sys.platform == 'darwin' else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        sender.send(max(0, peak - before))


def forget_peak() -> None:
    """Let the peak of the resident memory begin anew, after building, where Linux can do so."""
    # Elsewhere, and where it is not allowed, what building took is part of the peak.
    with suppress(OSError):
        Path('/proc/self/clear_refs').write_text('5')
