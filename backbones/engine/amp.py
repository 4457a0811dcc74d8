"""Mixed precision for inference, and for training on a CPU, which mmengine does not support."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import Tensor, nn

from .distributed import unwrap


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(OptimWrapper):
    """Backbone and neck in bfloat16, without loss scaling; heads and losses in float32."""

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with features_in_bfloat16(unwrap(model)), super().optim_context(model):
            yield


def inference_precision(
    model: nn.Module, device: str | torch.device
) -> AbstractContextManager[None]:
    """Return a context for inference in mixed precision: float16 on a GPU, else bfloat16.

    On a CPU it covers a whole segmentor, but only the backbone and neck of a detector.
    """
    kind = torch.device(device).type
    if kind != 'cpu':
        return torch.autocast(kind, torch.float16)
    if hasattr(model, 'decode_head'):
        return torch.autocast('cpu', torch.bfloat16)
    return features_in_bfloat16(model)


@contextmanager
def features_in_bfloat16(model: nn.Module) -> Iterator[None]:
    """Run backbone and neck in bfloat16 on a CPU, and return their features in float32.

    mmcv's operators have no bfloat16 kernel on CPUs, and box coordinates need the precision.
    """
    extract_feat = model.extract_feat

    def extract_in_bfloat16(*args) -> tuple[Tensor, ...]:
        with torch.autocast('cpu', torch.bfloat16):
            features = extract_feat(*args)
        return tuple(feature.float() for feature in features)

    model.extract_feat = extract_in_bfloat16
    try:
        yield
    finally:
        del model.extract_feat
