"""Non-maximum suppression and RoIAlign: mmcv's in PyTorch, ONNX's own operators in a file.

The shapes of their results do not depend on values, which keeps a traced detector free of sizes
that are known only while it runs.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


@torch.library.custom_op('efficientformer_v2::nms_scores', mutates_args=())
def nms_scores(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    score_threshold: float,
    max_per_image: int,
) -> Tensor:
    """Greedy non-maximum suppression of the boxes of each image.

    Args:
        boxes: (batch, N, 4): left, top, right, bottom.
        scores: (batch, N).
        iou_threshold: Of two boxes that overlap more, the one with the higher score stays.
        score_threshold: Boxes without a higher score are dropped first; at least 0.
        max_per_image: How many boxes stay at most, those with the highest scores.

    Returns:
        (batch, N): the scores of the boxes that stay, and 0 for the others.
    """
    from mmcv.ops import nms

    kept = torch.zeros_like(scores)
    for image, (image_boxes, image_scores) in enumerate(zip(boxes, scores, strict=True)):
        candidates = (image_scores > score_threshold).nonzero()[:, 0]
        if len(candidates):
            _, chosen = nms(image_boxes[candidates], image_scores[candidates], iou_threshold)
            chosen = candidates[chosen[:max_per_image]]
            kept[image, chosen] = image_scores[chosen]
    return kept


@nms_scores.register_fake
def _(boxes, scores, iou_threshold, score_threshold, max_per_image):
    return torch.empty_like(scores)


# torch before 2.7 cannot derive the schema from `collections.abc.Sequence`.
@torch.library.custom_op(
    'efficientformer_v2::roi_align',
    mutates_args=(),
    schema='(Tensor[] features, Tensor rois, Tensor levels, int output_size, '
    'float[] spatial_scales, int sampling_ratio, bool aligned) -> Tensor',
)
def roi_align(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    output_size: int,
    spatial_scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """RoIAlign of every region on its level of a feature pyramid.

    Args:
        features: Maps (batch, channels, height, width), one for each level.
        rois: (K, 5): index of the image, left, top, right, bottom in pixels of the image.
        levels: (K,), int64: the level of each region.
        output_size: Height and width of a result.
        spatial_scales: Pixels of a level's map for each pixel of the image.
        sampling_ratio: Samples along an axis of a cell; 0 takes as many as the cell has pixels.
        aligned: Whether pixel centers are at halves, as in mmcv.

    Returns:
        (K, channels, output_size, output_size).
    """
    from mmcv.ops import roi_align as mmcv_roi_align

    size = (output_size, output_size)
    out = features[0].new_zeros(len(rois), features[0].shape[1], *size)
    for level, (feature, scale) in enumerate(zip(features, spatial_scales, strict=True)):
        index = (levels == level).nonzero()[:, 0]
        if len(index):
            # On a CPU mmcv takes the memory of any map for channels first (mmcv issue 2203).
            out[index] = mmcv_roi_align(
                feature.contiguous(), rois[index], size, scale, sampling_ratio, 'avg', aligned
            )
    return out


@roi_align.register_fake
def _(features, rois, levels, output_size, spatial_scales, sampling_ratio, aligned):
    return features[0].new_empty(rois.shape[0], features[0].shape[1], output_size, output_size)


def onnx_translations() -> dict[Callable, Callable]:
    """What ``torch.onnx.export`` writes for the two, as its ``custom_translation_table``."""
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
        # Rows of image, class (there is one) and box.
        index = op.Gather(selected, op.Constant(value_ints=[0, 2]), axis=1)
        return op.ScatterND(op.Sub(scores, scores), index, op.GatherND(scores, index))

    def onnx_roi_align(
        features, rois, levels, output_size, spatial_scales, sampling_ratio, aligned
    ):
        images = op.Cast(op.Gather(rois, op.Constant(value_int=0), axis=1), to=INT64.dtype)
        boxes = op.Gather(rois, op.Constant(value_ints=[1, 2, 3, 4]), axis=1)
        flat = op.Constant(value_ints=[-1])
        order, parts = [], []
        for level, (feature, scale) in enumerate(zip(features, spatial_scales, strict=True)):
            here = op.Equal(levels, op.Constant(value_int=level))
            index = op.Reshape(op.NonZero(here), flat)
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

    ops = torch.ops.efficientformer_v2
    return {ops.nms_scores.default: onnx_nms_scores, ops.roi_align.default: onnx_roi_align}
