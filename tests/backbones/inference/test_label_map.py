"""Label maps made strip by strip are those of mmseg's whole resize."""

import pytest
import torch
import torch.nn.functional as F

from backbones.inference import label_map
from backbones.inference.label_map import label_map_of
from backbones.inference.logits import Logits


def random_logits(classes: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(classes, height, width, generator=torch.Generator().manual_seed(0))


def in_strips(logits: Logits, rows: int = 7) -> torch.Tensor:
    """All rows, made a few at a time, as (classes, height, width)."""
    height = logits.size[0]
    strips = [logits.rows(top, min(top + rows, height)) for top in range(0, height, rows)]
    return torch.cat(strips).permute(2, 0, 1)


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('size', [(100, 200), (33, 50), (64, 97), (1, 1), (300, 3)])
def test_strips_are_rows_of_the_whole(size, align_corners):
    logits = random_logits(5, 64, 97)
    whole = F.interpolate(logits[None], size, mode='bilinear', align_corners=align_corners)[0]
    strips = in_strips(Logits.of(logits).resize(size, align_corners))
    torch.testing.assert_close(strips, whole, atol=2e-5, rtol=0)


@pytest.mark.parametrize('align_corners', [False, True])
def test_resized_cropped_and_resized_again_is_the_same_in_strips(align_corners):
    logits = random_logits(3, 16, 24)
    resize = dict(mode='bilinear', align_corners=align_corners)
    padded = F.interpolate(logits[None], (64, 96), **resize)
    whole = F.interpolate(padded[:, :, 3:60, 2:91], (80, 70), **resize)[0]
    strips = Logits.of(logits).resize((64, 96), align_corners).crop(2, 5, 3, 4)
    assert strips.size == (57, 89)
    torch.testing.assert_close(
        in_strips(strips.resize((80, 70), align_corners)), whole, atol=2e-5, rtol=0
    )


def test_the_number_of_strips_changes_nothing(monkeypatch):
    logits = Logits.of(random_logits(5, 31, 40)).resize((90, 77), False)
    at_once = label_map_of(logits, None)
    monkeypatch.setattr(label_map, 'CPU_STRIP_BUDGET', 5 * 77 * 4 * 3)
    assert label_map_of(logits, None).equal(at_once)
    assert at_once.dtype == torch.uint8


def test_one_class_has_a_threshold_and_many_classes_fit():
    single = label_map_of(Logits.of(torch.tensor([[[-1.0, 3.0]]])), 0.3)
    assert single.tolist() == [[0, 1]]
    many = torch.zeros(300, 1, 1)
    many[299] = 1
    assert label_map_of(Logits.of(many), None).item() == 299
