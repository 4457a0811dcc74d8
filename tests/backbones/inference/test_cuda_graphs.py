"""What needs no GPU to be seen; the rest is in tests/gpu."""

import torch

from backbones.inference.cuda_graphs import CALLS_BEFORE_RECORDING, Recorded


class OnGPU(torch.Tensor):
    is_cuda = True


@torch.no_grad()
def test_nothing_is_recorded_before_torch_2_4(monkeypatch):
    monkeypatch.delattr(torch, 'get_autocast_dtype')
    monkeypatch.setattr(torch, 'is_autocast_enabled', lambda: False)
    recorded = Recorded(torch.square, pool=(0, 1))
    for _ in range(CALLS_BEFORE_RECORDING + 1):
        assert recorded(torch.full((2,), 3.0).as_subclass(OnGPU)).tolist() == [9, 9]
    assert not recorded.graphs
