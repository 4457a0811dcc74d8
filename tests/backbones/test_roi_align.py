"""RoIAlign on a CPU computes what mmcv's does."""

import pytest
import torch
from mmcv import ops

from backbones.roi_align import RoIAlign, can_replace

GENERATOR = torch.Generator().manual_seed(0)


def maps(dtype: torch.dtype, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 8, 40, 56, generator=GENERATOR, dtype=dtype)


def regions(number: int, dtype: torch.dtype) -> torch.Tensor:
    """Of all sizes, some beyond the image of 160x224, one without an area."""
    image = torch.randint(2, (number, 1), generator=GENERATOR)
    center = torch.rand(number, 2, generator=GENERATOR) * torch.tensor([300, 240]) - 40
    size = torch.rand(number, 2, generator=GENERATOR) ** 3 * 250
    rois = torch.cat([image, center - size / 2, center + size / 2], dim=1).to(dtype)
    rois[0, 1:] = torch.tensor([0, 0, 224, 160])
    rois[1, 3:] = rois[1, 1:3]
    rois[2, 1:] = torch.tensor([500, 500, 600, 600])
    return rois


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('size', [7, (3, 5), 14])
def test_is_mmcvs(size, aligned, memory_format):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        theirs = ops.RoIAlign(size, 0.25, aligned=aligned)
        x, rois = maps(dtype), regions(60, dtype)
        expected = theirs(x, rois)
        found = RoIAlign(theirs)(x.contiguous(memory_format=memory_format), rois)
        assert found.shape == expected.shape and found.dtype == dtype
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
        assert expected.abs().max() > 1


def test_samples_on_the_border_and_behind_rounding_are_mmcvs():
    theirs, x = ops.RoIAlign(7, 0.25), maps(torch.float32)
    rois = torch.tensor([
        # Cells of a pixel, the first of whose samples lie at -1, and at 56 and 40, the map's sides.
        [0, -4, -4, 24, 24], [0, 224, 160, 252, 188],
        # Two samples a pixel apart, just below 1 and, rounded, at 2.
        [0, 3.9999998, 3.9999998, 60, 60],
    ])  # fmt: skip
    torch.testing.assert_close(RoIAlign(theirs)(x, rois), theirs(x, rois), atol=1e-5, rtol=0)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_half_precision_is_left_to_mmcv(memory_format):
    theirs, x, rois = ops.RoIAlign(7, 0.25), maps(torch.float32).half(), regions(20, torch.float32)
    found = RoIAlign(theirs)(x.contiguous(memory_format=memory_format), rois.half())
    assert torch.equal(found, theirs(x, rois.half()))


def test_only_the_usual_mode_is_replaced():
    assert can_replace(ops.RoIAlign(7, 0.25))
    for options in (dict(sampling_ratio=2), dict(pool_mode='max'), dict(use_torchvision=True)):
        assert not can_replace(ops.RoIAlign(7, 0.25, **options))
    own = type('Own', (ops.RoIAlign,), {})  # it may compute something else
    assert not can_replace(own(7, 0.25))


def test_no_regions():
    assert RoIAlign(ops.RoIAlign(7, 0.25))(maps(torch.float32), torch.empty(0, 5)).shape == (
        *(0, 8, 7, 7),
    )


def test_regions_that_are_not_numbers_end_nothing():
    rois = torch.tensor(
        [[0, float('nan'), 0, 10, 10], [1, 0, 0, 40, float('inf')], [1, 4, 4, 9, 9]]
    )
    x = maps(torch.float32)
    found = RoIAlign(ops.RoIAlign(7, 0.25))(x, rois)
    torch.testing.assert_close(found[2:], ops.RoIAlign(7, 0.25)(x, rois[2:]), atol=1e-5, rtol=0)


def test_gradients_are_mmcvs():
    theirs = ops.RoIAlign(7, 0.25)
    rois = regions(20, torch.float64)
    gradients = []
    for layer in (theirs, RoIAlign(theirs)):
        x = maps(torch.float64).fill_(0.5).requires_grad_()
        (layer(x, rois) * torch.arange(49.0).view(7, 7)).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, atol=1e-10, rtol=0)
