"""The parts of a detector with fixed shapes compute what mmdet's do."""

import numpy as np
import pytest
import torch
from mmcv import ops
from mmdet.models.task_modules import DeltaXYWHBBoxCoder

from backbones.export import detector
from backbones.export.detector import batched_nms, decode_boxes, drop_small, ranks, top_k
from backbones.export.formats import keep_boxes_precise
from backbones.export.preprocessing import missing_to_multiple


@pytest.mark.parametrize('clip', [True, False])
def test_boxes_are_decoded_as_in_mmdet(clip):
    coder = DeltaXYWHBBoxCoder((0.1, 0, 0, 0), (0.1, 0.1, 0.2, 0.2), clip_border=clip)
    corners, deltas = torch.rand(50, 2) * 100, torch.randn(50, 4) * 20
    anchors = torch.cat([corners, corners + torch.rand(50, 2) * 60], dim=1)
    expected = coder.decode(anchors, deltas, max_shape=(90, 120))
    torch.testing.assert_close(decode_boxes(coder, anchors, deltas, (90, 120)), expected)


def test_the_highest_of_too_few_are_filled_up_with_zeros():
    scores, index = top_k(torch.tensor([[0.2, 0.9]]), 4)
    torch.testing.assert_close(scores, torch.tensor([[0.9, 0.2, 0.0, 0.0]]))
    assert index[0, :2].tolist() == [1, 0] and index.max() <= 1


@pytest.mark.parametrize('class_agnostic', [False, True])
def test_suppression_is_mmcvs(class_agnostic, monkeypatch):
    def nms_scores(boxes, scores, iou_threshold, *_):
        _, kept = ops.nms(boxes[0], scores[0], iou_threshold)
        return torch.zeros_like(scores).index_copy(1, kept, scores[:, kept])

    # What the operator of a file does.
    monkeypatch.setattr(detector, 'nms_scores', nms_scores)
    torch.manual_seed(0)
    corners, scores, groups = torch.rand(60, 2) * 40, torch.rand(60), torch.arange(60) % 3
    boxes = torch.cat([corners, corners + 20], dim=1)
    nms = dict(type='nms', iou_threshold=0.5, class_agnostic=class_agnostic)
    _, expected = ops.batched_nms(boxes, scores, groups, nms, class_agnostic)
    found, index = batched_nms(boxes[None], scores[None], groups[None], nms, 0.0, 60)
    assert index[found > 0].tolist() == expected.tolist()


def test_boxes_have_to_be_larger_than_the_smallest():
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 3, 2], [0, 0, 3, 3]])
    for settings, expected in ((dict(), [1, 1, 1]), (dict(min_bbox_size=2), [0, 0, 1])):
        assert drop_small(boxes, torch.ones(3), settings).tolist() == expected


@pytest.mark.parametrize(('size', 'missing'), [(1, 31), (32, 0), (33, 31), (800, 0), (1067, 21)])
def test_padding_reaches_the_next_multiple(size, missing):
    assert missing_to_multiple(size, 32) == missing


def test_ranks_keep_apart_what_onnxruntimes_sigmoid_does_not():
    found = ranks(torch.tensor([-40.0, -30.0, -29.9999, -1e-6, 0.0, 1e-6, 30.0]))
    assert (found.diff() > 0).all() and found.min() > 0


def test_boxes_of_roi_align_are_not_rounded_in_mixed_precision(tmp_path):
    """From 1024 pixels on, bfloat16 has multiples of 8 only. Processors without it use float32."""
    openvino = pytest.importorskip('openvino')
    op = openvino.opset13

    def convolution(features):
        weight = np.ones((1, 1, 1, 1), np.float32)
        return op.convolution(features, weight, [1, 1], [0, 0], [0, 0], [1, 1])

    image, boxes = op.parameter([1, 1, 2, 1400]), op.parameter([1, 4])
    number = op.constant([0], np.int32)
    moved = op.gather(op.add(boxes, np.float32([[1, 0, 1, 0]])), number, 0)
    pooled = op.roi_align(
        convolution(image), moved, number, 1, 1, 2, 1.0, 'avg', aligned_mode='half_pixel'
    )
    model = openvino.Model([convolution(pooled)], [image, boxes])
    # A file is saved again when it is quantized.
    for name in ('float.xml', 'int8.xml'):
        openvino.save_model(model, tmp_path / name, compress_to_fp16=False)
        keep_boxes_precise(model, tmp_path / name)
        model = openvino.Core().read_model(tmp_path / name)
    edge = np.zeros((1, 1, 2, 1400), np.float32)
    edge[..., 1303:] = 1
    inputs = [edge, np.float32([[1300, 0, 1302, 2]])]
    core = openvino.Core()
    exact, mixed = (
        core.compile_model(model, 'CPU', settings)(inputs)[0]
        for settings in ({'INFERENCE_PRECISION_HINT': 'f32'}, {})
    )
    assert exact.item() == 0.25 and mixed.item() == pytest.approx(0.25, abs=0.01)
