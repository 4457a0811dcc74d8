"""Label maps made strip by strip are those of mmseg's whole resize."""

import pytest
import torch
import torch.nn.functional as F

from backbones.inference import label_map
from backbones.inference.label_map import label_map_of, resize_rows


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('size', [(100, 200), (33, 50), (64, 97), (1, 1), (300, 3)])
def test_strips_are_rows_of_the_whole(size, align_corners):
    logits = torch.randn(5, 64, 97, generator=torch.Generator().manual_seed(0))
    whole = F.interpolate(logits[None], size, mode='bilinear', align_corners=align_corners)[0]
    strips = [
        resize_rows(logits, size, align_corners, top, min(top + 7, size[0]))
        for top in range(0, size[0], 7)
    ]
    torch.testing.assert_close(torch.cat(strips, dim=1), whole, atol=2e-5, rtol=0)


def test_the_number_of_strips_changes_nothing(monkeypatch):
    logits = torch.randn(5, 31, 40, generator=torch.Generator().manual_seed(0))
    at_once = label_map_of(logits, (90, 77), False, None)
    monkeypatch.setattr(label_map, 'STRIP_BUDGET', 5 * 77 * 4 * 3)
    assert label_map_of(logits, (90, 77), False, None).equal(at_once)
    assert at_once.dtype == torch.uint8


def test_one_class_has_a_threshold_and_many_classes_fit():
    single = label_map_of(torch.tensor([[[-1.0, 3.0]]]), (1, 2), False, 0.3)
    assert single.tolist() == [[0, 1]]
    many = torch.zeros(300, 1, 1)
    many[299] = 1
    assert label_map_of(many, (1, 1), False, None).item() == 299
