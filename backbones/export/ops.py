"""ONNX's non-maximum suppression and RoIAlign as operators for tracing a detector.

They do not run in PyTorch: tracing only needs the shapes of their results, which are fixed.
:func:`onnx_translations` translates them to ONNX.
"""

from collections.abc import Callable

import torch

# Returns scores (batch, N) of boxes (batch, N, 4): unchanged for those that greedy suppression
# keeps, at most max_per_image in each image, 0 for the others.
torch.library.define(
    'efficientformer_v2::nms_scores',
    '(Tensor boxes, Tensor scores, float iou_threshold, float score_threshold, int max_per_image)'
    ' -> Tensor',
)
# Returns (K, channels, output_size, output_size) for rois (K, 5), which are the image's index and
# left, top, right, bottom in pixels; levels (K,), int64, are their levels of the feature pyramid.
torch.library.define(
    'efficientformer_v2::roi_align',
    '(Tensor[] features, Tensor rois, Tensor levels, int output_size, float[] spatial_scales, '
    'int sampling_ratio, bool aligned) -> Tensor',
)
nms_scores = torch.ops.efficientformer_v2.nms_scores.default
roi_align = torch.ops.efficientformer_v2.roi_align.default


@torch.library.register_fake('efficientformer_v2::nms_scores')
def _(boxes, scores, iou_threshold, score_threshold, max_per_image):
    return torch.empty_like(scores)


@torch.library.register_fake('efficientformer_v2::roi_align')
def _(features, rois, levels, output_size, spatial_scales, sampling_ratio, aligned):
    return features[0].new_empty(rois.shape[0], features[0].shape[1], output_size, output_size)


def onnx_translations() -> dict[Callable, Callable]:
    """Return both operators in ONNX, as ``custom_translation_table`` of ``torch.onnx.export``."""
    from onnxscript import INT64
    from onnxscript import opset18 as op

    def onnx_nms_scores(boxes, scores, iou_threshold, score_threshold, max_per_image):
        selected = op.NonMaxSuppression(
            boxes,
            op.Unsqueeze(scores, op.Constant(value_ints=[1])),
            op.Constant(value_ints=[max_per_image]),
            op.Constant(value_floats=[iou_threshold]),
            op.Constant(value_floats=[score_threshold]),
        )
        # Each row is image, class (there is only one), box.
        index = op.Gather(selected, op.Constant(value_ints=[0, 2]), axis=1)
        return op.ScatterND(op.Sub(scores, scores), index, op.GatherND(scores, index))

    def onnx_roi_align(
        features, rois, levels, output_size, spatial_scales, sampling_ratio, aligned
    ):
        images = op.Cast(op.Gather(rois, op.Constant(value_int=0), axis=1), to=INT64.dtype)
        boxes = op.Gather(rois, op.Constant(value_ints=[1, 2, 3, 4]), axis=1)
        order, parts = [], []
        for level, (feature, scale) in enumerate(zip(features, spatial_scales, strict=True)):
            here = op.Equal(levels, op.Constant(value_int=level))
            index = op.Reshape(op.NonZero(here), op.Constant(value_ints=[-1]))
            order.append(index)
            parts.append(
                op.RoiAlign(
                    feature,
                    op.Gather(boxes, index, axis=0),
                    op.Gather(images, index, axis=0),
                    coordinate_transformation_mode='half_pixel' if aligned else 'output_half_pixel',
                    output_height=output_size,
                    output_width=output_size,
                    sampling_ratio=sampling_ratio,
                    spatial_scale=scale,
                )
            )
        order = op.Concat(*order, axis=0)
        count = op.Squeeze(op.Shape(order))
        positions = op.Range(op.Constant(value_int=0), count, op.Constant(value_int=1))
        inverse = op.ScatterElements(order, order, positions, axis=0)
        return op.Gather(op.Concat(*parts, axis=0), inverse, axis=0)

    return {nms_scores: onnx_nms_scores, roi_align: onnx_roi_align}
