"""The machine: what it is, what it is busy with, and which of its processors are used."""

import os
import platform
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
import torch

LIBRARIES = ('torch', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'numpy', 'onnxruntime', 'openvino')


def default_threads() -> int:
    """OMP_NUM_THREADS where it is set, else the physical cores that this process may use."""
    return int(os.environ.get('OMP_NUM_THREADS') or 0) or len(one_cpu_per_core())


def one_cpu_per_core() -> list[int]:
    """For each physical core that this process may use, its first processor there."""
    if not hasattr(os, 'sched_getaffinity'):
        return list(range(psutil.cpu_count(logical=False) or 1))
    cores: dict[str, int] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        siblings = Path(f'/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list')
        core = siblings.read_text().strip() if siblings.is_file() else str(cpu)
        cores.setdefault(core, cpu)
    return list(cores.values())


def pin(threads: int, busy: list[float]) -> list[int] | None:
    """Keep this process, and those it starts, on one processor for each thread.

    Call it before anything is computed, since threads that exist stay where they are.

    Args:
        threads: How many.
        busy: How busy each processor is; the least busy ones are taken.

    Returns:
        The processors; None where the system has no way to, or there are fewer than threads.
    """
    cpus = sorted(one_cpu_per_core(), key=lambda cpu: busy[cpu] if cpu < len(busy) else 0)
    if not hasattr(os, 'sched_setaffinity') or threads > len(cpus):
        return None
    chosen = sorted(cpus[:threads])
    os.sched_setaffinity(0, chosen)
    return chosen


def use_threads(threads: int) -> None:
    """Set how many threads torch and OpenCV compute with."""
    import cv2

    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)


def describe_machine(device: str, threads: int, cpus: list[int] | None) -> dict[str, Any]:
    """Processor, GPU, system and versions; call it when everything has been imported."""
    described = dict(
        date=datetime.now(timezone.utc).isoformat(timespec='seconds'),
        cpu=cpu_name(),
        physical_cores=psutil.cpu_count(logical=False),
        logical_cores=psutil.cpu_count(),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        threads=threads,
        pinned_to=cpus,
        device=device,
        system=platform.platform(),
        python=platform.python_version(),
        versions={name: sys.modules[name].__version__ for name in LIBRARIES if name in sys.modules},
    )
    if device.startswith('cuda'):
        described['gpu'] = torch.cuda.get_device_name(device)
        described['cuda'] = torch.version.cuda
        described['cudnn'] = torch.backends.cudnn.version()
    return described


def cpu_name() -> str:
    """The processor as Linux calls it, else as Python does."""
    info = Path('/proc/cpuinfo')
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith('model name'):
                return ' '.join(line.partition(':')[2].split())
    return platform.processor() or platform.machine()


def busy_percent() -> list[float]:
    """How busy each processor is with other work, over half a second in which we do nothing."""
    return psutil.cpu_percent(interval=0.5, percpu=True)
