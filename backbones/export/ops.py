"""Non-maximum suppression and RoIAlign: mmcv's in PyTorch, ONNX's own operators in a file.

Both results have a shape that does not depend on values, which is what keeps a traced detector
free of sizes that are known only while it runs. Importing this module registers them with torch;
a ``.pt2`` file with a detector inside can be loaded only after that.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


@torch.library.custom_op('efficientformer_v2::suppress', mutates_args=())
def suppress(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    score_threshold: float,
    max_per_picture: int,
) -> Tensor:
    """Greedy non-maximum suppression of each picture's boxes.

    Args:
        boxes: (batch, N, 4), left, top, right, bottom.
        scores: (batch, N).
        iou_threshold: Of two boxes that overlap more, the surer stays.
        score_threshold: Boxes that are not surer than this are dropped first; at least 0.
        max_per_picture: How many boxes stay at most, the surest.

    Returns:
        (batch, N), the scores of what stays and 0 for what does not.
    """
    from mmcv.ops import nms

    kept = torch.zeros_like(scores)
    for picture_boxes, picture_scores, picture_kept in zip(boxes, scores, kept, strict=True):
        candidates = (picture_scores > score_threshold).nonzero()[:, 0]
        if len(candidates) == 0:
            continue
        _, chosen = nms(picture_boxes[candidates], picture_scores[candidates], iou_threshold)
        chosen = candidates[chosen[:max_per_picture]]
        picture_kept[chosen] = picture_scores[chosen]
    return kept


@suppress.register_fake
def _(boxes, scores, iou_threshold, score_threshold, max_per_picture):
    return torch.empty_like(scores)


# torch before 2.7 cannot tell the schema from `collections.abc.Sequence`.
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
    """RoIAlign of every region on the level of a feature pyramid that it belongs to.

    Args:
        features: Maps (batch, channels, height, width), one a level.
        rois: (K, 5): index of the picture, left, top, right, bottom in pixels of the picture.
        levels: (K,), int64: the level of each region.
        output_size: Height and width of a result.
        spatial_scales: Pixels of a level's map for each pixel of the picture.
        sampling_ratio: Samples along an axis of a cell; 0 takes as many as the cell has pixels.
        aligned: Whether pixel centres are at halves, as in mmcv.

    Returns:
        (K, channels, output_size, output_size).
    """
    from mmcv.ops import roi_align as mmcv_roi_align

    size = (output_size, output_size)
    out = features[0].new_zeros(len(rois), features[0].shape[1], *size)
    for level, (feature, scale) in enumerate(zip(features, spatial_scales, strict=True)):
        index = (levels == level).nonzero()[:, 0]
        if len(index):
            # mmcv reads every map as if it were contiguous.
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

    def onnx_suppress(boxes, scores, iou_threshold, score_threshold, max_per_picture):
        selected = op.NonMaxSuppression(
            boxes,
            op.Unsqueeze(scores, op.Constant(value_ints=[1])),
            op.Constant(value_ints=[max_per_picture]),
            op.Constant(value_floats=[iou_threshold]),
            op.Constant(value_floats=[score_threshold]),
        )
        # Rows of picture, class (there is one) and box.
        index = op.Gather(selected, op.Constant(value_ints=[0, 2]), axis=1)
        return op.ScatterND(op.Sub(scores, scores), index, op.GatherND(scores, index))

    def onnx_roi_align(
        features,
        rois,
        levels,
        output_size,
        spatial_scales,
        sampling_ratio,
        aligned,
    ):
        pictures = op.Cast(op.Gather(rois, op.Constant(value_int=0), axis=1), to=INT64.dtype)
        boxes = op.Gather(rois, op.Constant(value_ints=[1, 2, 3, 4]), axis=1)
        flat = op.Constant(value_ints=[-1])
        order, pieces = [], []
        for level, (feature, scale) in enumerate(zip(features, spatial_scales, strict=True)):
            here = op.Equal(levels, op.Constant(value_int=level))
            index = op.Reshape(op.NonZero(here), flat)
            order.append(index)
            pieces.append(
                op.RoiAlign(
                    feature,
                    op.Gather(boxes, index, axis=0),
                    op.Gather(pictures, index, axis=0),
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
        return op.Gather(op.Concat(*pieces, axis=0), inverse, axis=0)

    ops = torch.ops.efficientformer_v2
    return {ops.suppress.default: onnx_suppress, ops.roi_align.default: onnx_roi_align}
