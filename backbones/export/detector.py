"""RetinaNet, Faster and Mask R-CNN as one function that can be traced.

The networks are mmdet's own modules. mmdet's code around them cannot be traced, because its shapes
depend on values. Here box decoding, non-maximum suppression and the choice of pyramid levels are
written with fixed shapes. The results equal those of mmdet's ``predict`` with ``rescale=False``.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops import nms_scores, roi_align
from .preprocessing import Preprocessing


class ExportableDetector(nn.Module):
    """A detector in evaluation mode that :func:`.exportable.check_detector` accepts."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.preprocessing = Preprocessing(detector.data_preprocessor)
        self.detector = detector

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Detect objects in images (batch, 3, height, width), BGR, 0 to 255. Returns, by falling
        score, boxes (batch, N, 4) in pixels, scores and labels (batch, N), and for Mask R-CNN mask
        probabilities (batch, N, M, M)."""
        size = images.shape[-2:]
        features = self.detector.extract_feat(self.preprocessing(images))
        if hasattr(self.detector, 'roi_head'):
            return self.detect_in_proposals(features, size)
        settings = self.detector.test_cfg
        boxes, scores, labels, _ = best_anchors(
            self.detector.bbox_head, features, settings, torch.sigmoid, size
        )
        return select(boxes, scores, labels, settings)

    def detect_in_proposals(
        self, features: tuple[Tensor, ...], size: tuple[int, int]
    ) -> tuple[Tensor, ...]:
        """Run the second stage, on the proposals of the region proposal network."""
        head, settings = self.detector.roi_head, self.detector.test_cfg.rcnn
        proposals, is_proposal = self.propose(features, size)
        logits, deltas = head.bbox_head(extract(head.bbox_roi_extractor, features, proposals))
        shape, classes = proposals.shape[:2], head.bbox_head.num_classes
        scores = logits.softmax(dim=-1)[:, :-1].unflatten(0, shape) * is_proposal[:, :, None]
        deltas = deltas.reshape(*shape, -1, 4)
        boxes = decode_boxes(head.bbox_head.bbox_coder, proposals[:, :, None], deltas, size)
        boxes = boxes.expand(-1, -1, classes, -1)
        labels = torch.arange(classes, device=scores.device).expand_as(scores)
        found = select(*(part.flatten(1, 2) for part in (boxes, scores, labels)), settings)
        return (*found, self.masks(features, found[0], found[2])) if head.with_mask else found

    def propose(self, features: tuple[Tensor, ...], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return proposals (batch, N, 4), and (batch, N) with 1 for proposals, 0 for filler."""
        settings = self.detector.test_cfg.rpn
        boxes, scores, _, levels = best_anchors(
            self.detector.rpn_head, features, settings, ranks, size
        )
        scores, index = batched_nms(boxes, scores, levels, settings.nms, 0.0, settings.max_per_img)
        is_proposal = (scores > 0).to(boxes)
        # RoIAlign of a small box costs almost nothing.
        filler = boxes.new_tensor([0.0, 0.0, 1.0, 1.0])
        chosen = take_rows(boxes, index)
        return torch.where(is_proposal[:, :, None] > 0, chosen, filler), is_proposal

    def masks(self, features: tuple[Tensor, ...], boxes: Tensor, labels: Tensor) -> Tensor:
        """Return mask probabilities (batch, N, M, M) inside each box."""
        head = self.detector.roi_head
        logits = head.mask_head(extract(head.mask_roi_extractor, features, boxes))
        size = logits.shape[-1]
        if not head.mask_head.class_agnostic:
            index = labels.clamp(min=0).to(torch.int64).flatten()[:, None, None, None]
            logits = logits.gather(1, index.expand(-1, 1, size, size))
        return logits.sigmoid().reshape(*boxes.shape[:2], size, size)


def best_anchors(
    head: nn.Module,
    features: tuple[Tensor, ...],
    settings: dict,
    score: Callable[[Tensor], Tensor],
    size: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the ``nms_pre`` best boxes (batch, N, 4) of each level, scores, labels and levels."""
    generator, classes = head.prior_generator, head.cls_out_channels
    found = []
    for level, (logits, deltas) in enumerate(zip(*head(features), strict=True)):
        anchors = generator.single_level_grid_priors(
            logits.shape[-2:], level, dtype=logits.dtype, device=logits.device
        )
        logits, deltas = by_anchor(logits, head), by_anchor(deltas, head)
        best, index = top_k(score(logits.flatten(1)), settings.nms_pre)
        anchor = index // classes
        boxes = decode_boxes(head.bbox_coder, anchors[anchor], take_rows(deltas, anchor), size)
        found.append((boxes, best, index % classes, torch.full_like(index, level)))
    boxes, scores, labels, levels = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    return boxes, drop_small(boxes, scores, settings), labels, levels


def extract(extractor: nn.Module, features: tuple[Tensor, ...], boxes: Tensor) -> Tensor:
    """Return features (batch * N, channels, size, size) of the boxes (batch, N, 4)."""
    layers = extractor.roi_layers
    image = torch.arange(boxes.shape[0], device=boxes.device).to(boxes)
    image = image[:, None, None].expand(-1, boxes.shape[1], 1)
    rois = torch.cat([image, boxes], dim=2).flatten(0, 1)
    scale = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).sqrt()
    levels = torch.floor(torch.log2(scale / extractor.finest_scale + 1e-6))
    return roi_align(
        list(features[: len(layers)]),
        rois,
        levels.clamp(0, len(layers) - 1).to(torch.int64),
        layers[0].output_size[0],
        [layer.spatial_scale for layer in layers],
        layers[0].sampling_ratio,
        layers[0].aligned,
    )


def by_anchor(values: Tensor, head: nn.Module) -> Tensor:
    """Reshape a level's map (batch, A * D, height, width) to (batch, height * width * A, D)."""
    batch, _, height, width = values.shape
    count = head.num_base_priors
    rows = values.unflatten(1, (count, -1)).permute(0, 3, 4, 1, 2)
    return rows.reshape(batch, height * width * count, rows.shape[-1])


def decode_boxes(coder: object, anchors: Tensor, deltas: Tensor, size: tuple[int, int]) -> Tensor:
    """Decode boxes (..., 4) from anchors and deltas (..., 4), as mmdet's DeltaXYWHBBoxCoder; clip
    them to the image, if the coder does, whose size is (height, width)."""
    deltas = deltas * deltas.new_tensor(coder.stds) + deltas.new_tensor(coder.means)
    sides = anchors[..., 2:] - anchors[..., :2]
    center = (anchors[..., :2] + anchors[..., 2:]) * 0.5
    # Fast R-CNN's limit: a box grows by a factor of at most 1000 / 16.
    limit = abs(math.log(16 / 1000))
    center = center + sides * deltas[..., :2]
    half = sides * deltas[..., 2:].clamp(-limit, limit).exp() * 0.5
    left, top = (center - half).unbind(-1)
    right, bottom = (center + half).unbind(-1)
    if coder.clip_border:
        left, right = left.clamp(0, size[1]), right.clamp(0, size[1])
        top, bottom = top.clamp(0, size[0]), bottom.clamp(0, size[0])
    return torch.stack([left, top, right, bottom], dim=-1)


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k highest of scores (batch, N), all at least 0, and their indices, (batch, k).

    If there are fewer than k, the missing scores are 0 and their indices arbitrary.
    """
    # N may be known only at runtime, but runtimes need a constant k.
    count = scores.shape[1]
    missing = k - count if isinstance(count, int) else k
    if missing > 0:
        scores = F.pad(scores, (0, missing))
    best, index = scores.topk(k, dim=1)
    return best, index.clamp(max=count - 1)


def take_rows(values: Tensor, index: Tensor) -> Tensor:
    """Return rows of each image: (batch, N, D) and an index (batch, k) to (batch, k, D)."""
    return values.gather(1, index[:, :, None].expand(-1, -1, values.shape[2]))


def ranks(logits: Tensor) -> Tensor:
    """Return positive numbers in the order of the logits, for use where only the order counts.

    onnxruntime computes sigmoids only to 1e-8, so all small ones would be equal, and a region
    proposal network's are small almost everywhere.
    """
    inverse = 1 / (1 + logits.abs())
    return torch.where(logits < 0, inverse, 2 - inverse)


def drop_small(boxes: Tensor, scores: Tensor, settings: dict) -> Tensor:
    """Return the scores, but 0 for boxes that are not larger than ``min_bbox_size``."""
    min_size = settings.get('min_bbox_size', -1)
    if min_size < 0:
        return scores
    width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    return scores * ((width > min_size) & (height > min_size)).to(scores)


def batched_nms(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor,
    nms: dict,
    score_threshold: float,
    max_per_image: int,
) -> tuple[Tensor, Tensor]:
    """Apply non-maximum suppression within each group (class or pyramid level); ``nms`` as in mmcv.
    Returns falling scores (batch, max_per_image), 0 if there are no more, and their indices."""
    if not nms.get('class_agnostic', False):
        # As in mmcv, groups are moved so far apart that they do not overlap.
        apart = boxes.flatten().max() + 1
        boxes = boxes + (groups * apart)[:, :, None]
    iou_threshold = nms.get('iou_threshold', nms.get('iou_thr'))
    return top_k(
        nms_scores(boxes, scores, iou_threshold, score_threshold, max_per_image), max_per_image
    )


def select(
    boxes: Tensor, scores: Tensor, labels: Tensor, settings: dict
) -> tuple[Tensor, Tensor, Tensor]:
    """Select the detections: as many rows as the image with the most has, and at least one. Rows
    without a detection have score 0 and label -1."""
    scores, index = batched_nms(
        boxes, scores, labels, settings.nms, settings.score_thr, settings.max_per_img
    )
    found = scores > 0
    count = found.sum(dim=1).max().clamp(min=1).item()
    torch._check(count >= 1)
    torch._check(count <= scores.shape[1])
    labels = torch.where(found, labels.gather(1, index), -1).to(torch.int32)
    boxes = take_rows(boxes, index) * found[:, :, None].to(boxes)
    return boxes[:, :count], scores[:, :count], labels[:, :count]
