"""The parts of a detector with fixed shapes compute what mmdet's do."""

import pytest
import torch
from mmcv.ops import batched_nms as mmcv_batched_nms
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmdet.models.task_modules import AnchorGenerator, DeltaXYWHBBoxCoder

from backbones.export.detector import (
    batched_nms,
    decode_boxes,
    grid_anchors,
    ranks,
    take_rows,
    top_k,
)
from backbones.export.ops import roi_align
from backbones.export.preprocessing import missing_to_multiple


def random_boxes(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 100
    return torch.cat([corner, corner + torch.rand(count, 2, generator=generator) * 60], dim=1)


def test_anchors_are_mmdets():
    generator = AnchorGenerator(strides=[8, 16], ratios=[0.5, 1.0], scales=[4, 6])
    grids = [(5, 7), (3, 4)]
    expected = generator.grid_priors(grids, device='cpu')
    for level, grid in enumerate(grids):
        found = grid_anchors(generator.base_anchors[level], generator.strides[level], grid)
        torch.testing.assert_close(found, expected[level])


@pytest.mark.parametrize('clip', [True, False])
def test_boxes_are_decoded_as_in_mmdet(clip):
    coder = DeltaXYWHBBoxCoder((0.1, 0, 0, 0), (0.1, 0.1, 0.2, 0.2), clip_border=clip)
    anchors, deltas = random_boxes(50), torch.randn(50, 4) * 20
    expected = coder.decode(anchors, deltas, max_shape=(90, 120))
    torch.testing.assert_close(decode_boxes(coder, anchors, deltas, 90, 120), expected)


@pytest.mark.parametrize('agnostic', [True, False])
def test_nms_is_mmcvs_for_every_image(agnostic):
    boxes = torch.stack([random_boxes(80, seed) for seed in (1, 2)])
    scores = torch.rand(2, 80)
    groups = torch.randint(0, 3, (2, 80))
    nms = dict(type='nms', iou_threshold=0.3, class_agnostic=agnostic)
    found, index = batched_nms(boxes, scores, groups, nms, 0.2, 20)
    for image in range(2):
        above = scores[image] > 0.2
        expected, _ = mmcv_batched_nms(
            boxes[image][above], scores[image][above], groups[image][above], nms
        )
        expected = expected[:20]
        torch.testing.assert_close(found[image, : len(expected)], expected[:, 4])
        assert not found[image, len(expected) :].any()
        kept = take_rows(boxes, index)[image, : len(expected)]
        torch.testing.assert_close(kept, expected[:, :4])


def test_the_highest_of_too_few_are_filled_up_with_zeros():
    scores, index = top_k(torch.tensor([[0.2, 0.9]]), 4)
    torch.testing.assert_close(scores, torch.tensor([[0.9, 0.2, 0.0, 0.0]]))
    assert index[0, :2].tolist() == [1, 0] and index.max() <= 1


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_roi_align_is_mmdets_for_maps_of_any_memory_format(memory_format):
    extractor = SingleRoIExtractor(
        dict(type='RoIAlign', output_size=7, sampling_ratio=0), 4, [4, 8], finest_scale=20
    )
    features = [torch.randn(2, 4, 40, 40), torch.randn(2, 4, 20, 20)]
    rois = torch.cat([torch.randint(0, 2, (30, 1)).float(), random_boxes(30)], dim=1)
    levels = extractor.map_roi_levels(rois, 2)
    assert 0 < levels.sum() < 30
    maps = [each.to(memory_format=memory_format) for each in features]
    found = roi_align(maps, rois, levels, 7, [1 / 4, 1 / 8], 0, True)
    torch.testing.assert_close(found, extractor(features, rois))


@pytest.mark.parametrize(('size', 'missing'), [(1, 31), (32, 0), (33, 31), (800, 0), (1067, 21)])
def test_padding_reaches_the_next_multiple(size, missing):
    assert missing_to_multiple(size, 32) == missing


def test_ranks_keep_apart_what_onnxruntimes_sigmoid_does_not():
    found = ranks(torch.tensor([-40.0, -30.0, -29.9999, -1e-6, 0.0, 1e-6, 30.0]))
    assert (found.diff() > 0).all() and found.min() > 0
