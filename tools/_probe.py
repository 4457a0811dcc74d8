"""Imports the modules that it is given and answers with a JSON line for each.

The doctor runs it as a process of its own, since a library built against another torch may not only
fail to import but end the interpreter: the first module without an answer is the one that did.
"""

# Evaluated annotations would keep it from starting on a Python that is too old.
from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any


def look_at_torch() -> dict[str, Any]:
    """Return the build of torch and the devices that it sees."""
    import torch

    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append({'name': properties.name, 'memory': properties.total_memory})
    return {
        'cuda': torch.version.cuda or torch.version.hip,
        'gpus': gpus,
        'mps': torch.backends.mps.is_available(),
        'threads': torch.get_num_threads(),
    }


def try_mmcv_operators() -> dict[str, Any]:
    """Run one compiled operator on every kind of device that torch sees."""
    import torch
    from mmcv.ops import nms

    devices = ['cpu', 'cuda'] if torch.cuda.is_available() else ['cpu']
    failures = {}
    for device in devices:
        boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30]], device=device)
        scores = torch.tensor([0.9, 0.8, 0.7], device=device)
        try:
            kept = nms(boxes, scores, 0.5)[1].tolist()
        except RuntimeError as error:
            failures[device] = str(error).splitlines()[0]
            continue
        if kept != [0, 2]:
            failures[device] = f'nms kept the boxes {kept} instead of [0, 2]'
    return {'devices': devices, 'failures': failures}


def look_at_backbones() -> dict[str, Any]:
    """Return where the project's package is imported from."""
    import backbones

    return {'folder': os.path.dirname(os.path.abspath(backbones.__file__))}


LOOKS: dict[str, Callable[[], dict[str, Any]]] = {
    'torch': look_at_torch,
    'mmcv.ops': try_mmcv_operators,
    'backbones': look_at_backbones,
}


def probe(module: str) -> dict[str, Any]:
    """Import a module and look at it; whatever it raises becomes part of the answer."""
    try:
        importlib.import_module(module)
        details = LOOKS[module]() if module in LOOKS else {}
    except Exception as error:
        reason = ' '.join(str(error).split())
        return {'module': module, 'error': reason, 'raised': type(error).__name__}
    return {'module': module, 'error': None, **details}


def main() -> None:
    """Probe the modules named on the command line."""
    # The folder of this script; its train.py or test.py must not pass for somebody's module.
    del sys.path[0]
    # The answers get a channel of their own: what the modules print must not mix with them.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), 'w')
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for module in sys.argv[1:]:
        print(json.dumps(probe(module)), file=answers, flush=True)


if __name__ == '__main__':
    main()
