"""The light head: mmseg's results for given bases, and the same ones whenever and wherever."""

import pytest
import torch
from mmseg.models import LightHamHead
from tiny import assert_same, with_random_weights
from torch import Tensor

from backbones.light_ham import FixedLightHamHead, FixedNMF2D

OPTIONS = dict(
    in_channels=[8, 8, 16],
    in_index=[1, 2, 3],
    channels=16,
    ham_channels=32,
    num_classes=7,
    dropout_ratio=0,
    align_corners=False,
    norm_cfg=dict(type='BN'),
)


def make_head(kind: type = FixedLightHamHead, **ham_kwargs: object) -> LightHamHead:
    return with_random_weights(kind(ham_kwargs=dict(MD_R=4, **ham_kwargs), **OPTIONS))


def make_maps(batch: int = 3) -> list[Tensor]:
    """What four stages give for images of 94x131 pixels; the first is not looked at."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((4, 24, 33), (8, 12, 17), (8, 6, 9), (16, 3, 5))
    return [torch.randn(batch, *shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('memory', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('parts', [1, 2])
def test_results_and_gradients_are_those_of_mmsegs_head_with_the_same_bases(train, memory, parts):
    # With one in forty others the decomposition multiplies rounding errors by a hundred.
    torch.manual_seed(0)
    ours, theirs = make_head(MD_S=parts), make_head(LightHamHead, rand_init=False, MD_S=parts)
    theirs.hamburger.ham.register_buffer('bases', torch.zeros_like(ours.hamburger.ham.bases))
    theirs.load_state_dict(ours.state_dict())
    expected = theirs.train(train)(make_maps())
    found = ours.train(train).to(memory_format=memory)(make_maps())
    assert found.shape == (3, 7, 12, 17)
    assert_same(found, expected, 1e-5)
    found.square().sum().backward()
    expected.square().sum().backward()
    assert_same(*([p.grad for p in head.parameters()] for head in (ours, theirs)))


@torch.no_grad()
def test_every_call_batch_and_process_gives_the_same():
    torch.manual_seed(0)
    head, maps = make_head(), make_maps()
    # In another process, random numbers are others before the model is built.
    torch.manual_seed(1)
    other = make_head()
    assert torch.equal(other.hamburger.ham.bases, head.hamburger.ham.bases)
    # Another version of torch may have drawn others before it wrote a checkpoint.
    head.hamburger.ham.bases.mul_(torch.rand(32, 4))
    expected = head(maps)
    other.load_state_dict(head.state_dict())
    assert torch.equal(other(maps), expected)
    for index in range(3):
        alone = other([each[index : index + 1] for each in maps])
        assert_same(alone, expected[index : index + 1], 1e-5)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_the_decomposition_is_in_float32_under_autocast(dtype):
    """Products over all pixels of these values exceed the 65504 of float16."""
    nmf = FixedNMF2D(32, dict(MD_R=4)).eval()
    x = 300 * torch.rand(2, 32, 12, 17, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.autocast('cpu', dtype):
        found = nmf(x)
    assert found.dtype == torch.float32 and found.isfinite().all()
    assert torch.equal(found, nmf(x.float()))


@torch.no_grad()
def test_bfloat16_autocast_stays_close():
    head, maps = make_head(), make_maps()
    expected = head(maps)
    with torch.autocast('cpu', torch.bfloat16):
        found = head(maps)
    assert (found - expected).abs().max() < 0.03 * expected.abs().max()


def test_bases_are_never_random():
    with pytest.raises(TypeError, match='rand_init'):
        make_head(rand_init=True)
