"""What torch is doing right now, in the words of all its versions."""

import torch
from torch import Tensor

# Where it has been since torch 2.3, and where it was before.
is_compiling = getattr(torch.compiler, 'is_compiling', None) or torch._dynamo.is_compiling


def is_recording() -> bool:
    """Whether a compiler, an exporter, a tracer or a counter of FLOPs looks at every operator."""
    return is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0


def version_of(parameter: Tensor) -> tuple[int, int]:
    """Something that changes when a parameter does, but for what is written to its ``data``."""
    version = 0 if parameter.is_inference() else parameter._version
    return version, parameter.data_ptr()


def is_autocasting_on_cpu() -> bool:
    """Whether autocast is on for CPUs."""
    # Before torch 2.4 every device had a function of its own.
    if hasattr(torch, 'get_autocast_dtype'):
        return torch.is_autocast_enabled('cpu')
    return torch.is_autocast_cpu_enabled()
