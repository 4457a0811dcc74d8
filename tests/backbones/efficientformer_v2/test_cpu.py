"""Convolutions through oneDNN's own operators, and strips of feature maps."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from backbones.efficientformer_v2 import cpu
from backbones.efficientformer_v2.cpu import FusedConv, can_use_onednn, even_step, in_strips
from backbones.efficientformer_v2.layers import Cache

needs_onednn = pytest.mark.skipif(
    not cpu.has_operators(), reason='this torch or processor is without'
)


def plain(conv: FusedConv, x: torch.Tensor) -> torch.Tensor:
    """What a fused convolution is to compute, in torch's own words."""
    x = nn.functional.conv2d(
        x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
    )
    return nn.functional.gelu(x) if conv.gelu else x


def assert_fused(conv: FusedConv, x: torch.Tensor) -> None:
    with torch.no_grad():
        assert can_use_onednn(x)
        torch.testing.assert_close(conv(x), plain(conv, x), rtol=1e-5, atol=1e-5)


@needs_onednn
@pytest.mark.parametrize('gelu', [False, True])
@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('size', [(1, 1), (1, 9), (7, 1), (8, 8), (13, 21)])
@pytest.mark.parametrize(
    'arguments',
    [
        dict(kernel_size=1),
        dict(kernel_size=3, padding=1),
        dict(kernel_size=3, padding=1, stride=2),
        dict(kernel_size=3, padding=1, groups=6),
        dict(kernel_size=3, padding=1, stride=2, groups=6),
        dict(kernel_size=3, padding=1, bias=False),
    ],
    ids=str,
)
def test_computes_what_conv2d_does(arguments, size, channels_last, gelu):
    torch.manual_seed(0)
    conv = FusedConv(nn.Conv2d(6, 12, **arguments), gelu)
    x = torch.randn(2, 6, *size)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    assert_fused(conv, x)


@needs_onednn
def test_follows_its_weights_and_its_input():
    torch.manual_seed(0)
    conv = FusedConv(nn.Conv2d(16, 32, 1), gelu=True)
    small, large = torch.randn(1, 16, 3, 3), torch.randn(2, 16, 40, 50)
    for x in (small, large, small):
        assert_fused(conv, x)
    with torch.no_grad():
        conv.weight.mul_(2)
    assert_fused(conv, small)
    conv.load_state_dict({'weight': torch.randn(32, 16, 1, 1), 'bias': torch.randn(32)})
    assert_fused(conv, small)
    conv.weight = nn.Parameter(torch.randn(32, 16, 1, 1))
    assert_fused(conv, small)
    # The way through bfloat16 changes values, maybe at the address and version of before.
    assert_fused(conv.bfloat16().float(), small)


def test_another_thread_may_replace_what_is_cached(monkeypatch):
    cache = Cache()
    cache((1, 2), lambda: 'first')
    others = property(lambda self, kept=cache.kept: kept, lambda self, value: None)
    monkeypatch.setattr(Cache, 'kept', others, raising=False)
    assert cache((3, 4), lambda: 'second') == 'second'


@needs_onednn
def test_can_be_copied_and_saved_after_use():
    conv = FusedConv(nn.Conv2d(4, 8, 3, padding=1), gelu=True)
    x = torch.randn(1, 4, 9, 9)
    assert_fused(conv, x)
    for other in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert_fused(other, x)
        with torch.no_grad():
            other.weight.zero_()
        assert_fused(other, x)
    assert_fused(conv, x)


def test_everything_else_takes_conv2d():
    conv = FusedConv(nn.Conv2d(4, 8, 3, padding=1), gelu=True)
    x = torch.randn(1, 4, 9, 9)
    assert not can_use_onednn(x)
    conv(x).sum().backward()
    assert conv.weight.grad is not None
    with torch.no_grad():
        expected = plain(conv, x)
        torch.testing.assert_close(conv.double()(x.double()).float(), expected)
        conv.float()
        assert conv(x[:0]).shape == (0, 8, 9, 9)
        with torch.backends.mkldnn.flags(enabled=False):
            assert not can_use_onednn(x)
            torch.testing.assert_close(conv(x), expected)
        with torch.autocast('cpu', torch.bfloat16):
            assert conv(x).dtype == torch.bfloat16
        assert torch.compile(conv, backend='eager', fullgraph=True)(x).shape == expected.shape


@pytest.mark.parametrize('size', [(1, 1), (2, 9), (3, 4), (16, 5), (17, 5), (50, 3)])
@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('rows', [1, 2, 5, 1000])
def test_strips_change_nothing(rows, batch, size, monkeypatch):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, 3, padding=1)
    x = torch.randn(batch, 4, *size).contiguous(memory_format=torch.channels_last)
    heights = []

    def part(strip: torch.Tensor) -> torch.Tensor:
        heights.append(strip.shape[2])
        return strip + conv(strip).relu()

    monkeypatch.setattr(cpu, 'STRIP_BUDGET', rows * 4 * 7 * size[1])
    with torch.no_grad():
        torch.testing.assert_close(in_strips(part, x, 7), x + conv(x).relu())
    assert len(set(heights)) == 1 and heights[0] <= max(rows + 2, batch * size[0])
    assert len(heights) > 1 or batch * size[0] <= max(rows, 3)


def test_steps_are_as_alike_as_can_be():
    assert [even_step(25, most) for most in (1, 10, 13, 24, 25, 99)] == [1, 9, 13, 13, 25, 25]


@pytest.fixture
def untried():
    """Operators that are tried anew in the test, and again behind it."""
    cpu.has_operators.cache_clear()
    yield
    cpu.has_operators.cache_clear()


@needs_onednn
@pytest.mark.parametrize(
    ('name', 'make'),
    [
        ('pack', lambda real: lambda *args: torch.ops.mkldnn._not_there(*args)),
        ('convolve', lambda real: lambda *args, **kwargs: real(*args, 'too many', **kwargs)),
        ('convolve', lambda real: lambda *args, **kwargs: 2 * real(*args, **kwargs)),
        ('add_convolution_', lambda real: lambda *args: None),
    ],
    ids=['missing', 'other signature', 'other values', 'does nothing'],
)
def test_operators_that_are_not_as_expected_are_left_alone(name, make, untried, monkeypatch):
    conv, x = FusedConv(nn.Conv2d(4, 8, 3, padding=1), gelu=True), torch.randn(1, 4, 9, 9)
    monkeypatch.setattr(cpu, name, make(getattr(cpu, name)))
    with torch.no_grad():
        with pytest.warns(UserWarning, match='oneDNN'):
            torch.testing.assert_close(conv(x), plain(conv, x))
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            torch.testing.assert_close(conv(x), plain(conv, x))


@needs_onednn
def test_trying_the_operators_leaves_no_trace(untried):
    state = torch.get_rng_state()
    with torch.device('meta'), torch.inference_mode():
        assert cpu.has_operators()
    assert torch.equal(torch.get_rng_state(), state)
