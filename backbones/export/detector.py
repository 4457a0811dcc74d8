"""RetinaNet, Faster and Mask R-CNN as one function that can be traced.

The networks are mmdet's own modules. What stands around them there, and cannot be traced because
its shapes depend on values, is written out with fixed shapes: anchors, decoding, suppression, the
choice of pyramid levels. The results are those of mmdet's ``predict`` with ``rescale=False``.
"""

import torch
from torch import Tensor, nn

from .boxes import decode_boxes, grid_anchors, suppress_by_group, take_rows, top_k
from .ops import roi_align
from .preprocessing import Preprocessing


class ExportableDetector(nn.Module):
    """What one-stage and two-stage detectors share."""

    def __init__(self, detector: nn.Module, pad_divisor: int) -> None:
        super().__init__()
        self.preprocessing = Preprocessing(detector.data_preprocessor, pad_divisor)
        self.detector = detector

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        """Boxes (batch, N, 4) in pixels of ``pictures``, scores (batch, N), labels (batch, N) and
        for a model with masks their probabilities (batch, N, M, M), the surest first."""
        height, width = pictures.shape[-2:]
        features = self.detector.extract_feat(self.preprocessing(pictures))
        return self.detect(features, height, width)

    def anchors(self, head: nn.Module, level: int, grid: tuple[int, int]) -> Tensor:
        generator = head.prior_generator
        return grid_anchors(generator.base_anchors[level], generator.strides[level], grid)


class ExportableOneStage(ExportableDetector):
    """A RetinaNet."""

    def detect(self, features: tuple[Tensor, ...], height: int, width: int) -> tuple[Tensor, ...]:
        head, settings = self.detector.bbox_head, self.detector.test_cfg
        boxes, scores, labels = [], [], []
        for level, (logits, deltas) in enumerate(zip(*head(features), strict=True)):
            anchors = self.anchors(head, level, logits.shape[-2:])
            logits, deltas = by_anchor(logits, head), by_anchor(deltas, head)
            best, index = top_k(logits.sigmoid().flatten(1), settings.nms_pre)
            anchor = index // head.cls_out_channels
            decoded = decode_boxes(
                head.bbox_coder, anchors[anchor], take_rows(deltas, anchor), height, width
            )
            boxes.append(decoded)
            scores.append(best)
            labels.append(index % head.cls_out_channels)
        boxes, scores, labels = (torch.cat(parts, dim=1) for parts in (boxes, scores, labels))
        scores = drop_small(boxes, scores, settings)
        scores, index = suppress_by_group(
            boxes, scores, labels, settings.nms, settings.score_thr, settings.max_per_img
        )
        return trimmed(take_rows(boxes, index), scores, labels.gather(1, index))


class ExportableTwoStage(ExportableDetector):
    """A Faster R-CNN or a Mask R-CNN."""

    def detect(self, features: tuple[Tensor, ...], height: int, width: int) -> tuple[Tensor, ...]:
        head, settings = self.detector.roi_head, self.detector.test_cfg.rcnn
        proposals, are_proposals = self.propose(features, height, width)
        logits, deltas = head.bbox_head(self.extract(head.bbox_roi_extractor, features, proposals))
        batch, count = proposals.shape[:2]
        classes = head.bbox_head.num_classes
        scores = logits.softmax(dim=-1)[:, :-1].unflatten(0, (batch, count))
        scores = scores * are_proposals[:, :, None]
        deltas = deltas.reshape(batch, count, -1, 4)
        boxes = decode_boxes(
            head.bbox_head.bbox_coder, proposals[:, :, None], deltas, height, width
        ).expand(-1, -1, classes, -1)
        labels = torch.arange(classes, device=scores.device).expand_as(scores)
        boxes, scores, labels = (part.flatten(1, 2) for part in (boxes, scores, labels))
        scores, index = suppress_by_group(
            boxes, scores, labels, settings.nms, settings.score_thr, settings.max_per_img
        )
        boxes, scores, labels = trimmed(take_rows(boxes, index), scores, labels.gather(1, index))
        if not head.with_mask:
            return boxes, scores, labels
        return boxes, scores, labels, self.masks(features, boxes, labels)

    def propose(
        self, features: tuple[Tensor, ...], height: int, width: int
    ) -> tuple[Tensor, Tensor]:
        """Proposals (batch, N, 4), and 1 or 0 (batch, N) for whether each is one at all."""
        head, settings = self.detector.rpn_head, self.detector.test_cfg.rpn
        boxes, scores, levels = [], [], []
        for level, (logits, deltas) in enumerate(zip(*head(features), strict=True)):
            anchors = self.anchors(head, level, logits.shape[-2:])
            logits, deltas = by_anchor(logits, head), by_anchor(deltas, head)
            best, index = top_k(ranks(logits.flatten(1)), settings.nms_pre)
            decoded = decode_boxes(
                head.bbox_coder, anchors[index], take_rows(deltas, index), height, width
            )
            boxes.append(decoded)
            scores.append(best)
            levels.append(torch.full_like(index, level))
        boxes, scores, levels = (torch.cat(parts, dim=1) for parts in (boxes, scores, levels))
        scores = drop_small(boxes, scores, settings)
        scores, index = suppress_by_group(
            boxes, scores, levels, settings.nms, 0.0, settings.max_per_img
        )
        are_proposals = (scores > 0).to(boxes)
        # What is none gets a small box, which costs RoIAlign next to nothing.
        filler = boxes.new_tensor([0.0, 0.0, 1.0, 1.0])
        chosen = take_rows(boxes, index)
        return torch.where(are_proposals[:, :, None] > 0, chosen, filler), are_proposals

    def masks(self, features: tuple[Tensor, ...], boxes: Tensor, labels: Tensor) -> Tensor:
        """Probabilities (batch, N, M, M) inside each box."""
        head = self.detector.roi_head
        logits = head.mask_head(self.extract(head.mask_roi_extractor, features, boxes))
        size = logits.shape[-1]
        if not head.mask_head.class_agnostic:
            index = labels.clamp(min=0).to(torch.int64).flatten()[:, None, None, None]
            logits = logits.gather(1, index.expand(-1, 1, size, size))
        return logits.sigmoid().reshape(*boxes.shape[:2], size, size)

    def extract(self, extractor: nn.Module, features: tuple[Tensor, ...], boxes: Tensor) -> Tensor:
        """Features (batch * N, channels, size, size) of the boxes (batch, N, 4)."""
        layers = extractor.roi_layers
        picture = torch.arange(boxes.shape[0], device=boxes.device).to(boxes)
        picture = picture[:, None, None].expand(-1, boxes.shape[1], 1)
        rois = torch.cat([picture, boxes], dim=2).flatten(0, 1)
        scale = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).sqrt()
        levels = torch.floor(torch.log2(scale / extractor.finest_scale + 1e-6))
        levels = levels.clamp(0, len(layers) - 1).to(torch.int64)
        return roi_align(
            list(features[: len(layers)]),
            rois,
            levels,
            layers[0].output_size[0],
            [layer.spatial_scale for layer in layers],
            layers[0].sampling_ratio,
            layers[0].aligned,
        )


def by_anchor(values: Tensor, head: nn.Module) -> Tensor:
    """A level's map (batch, A * D, height, width) to rows (batch, height * width * A, D)."""
    batch, _, height, width = values.shape
    count = head.num_base_priors
    rows = values.unflatten(1, (count, -1)).permute(0, 3, 4, 1, 2)
    return rows.reshape(batch, height * width * count, rows.shape[-1])


def ranks(logits: Tensor) -> Tensor:
    """Numbers above 0 in the order of the logits, for where nothing but the order counts.

    Sigmoids would do in PyTorch, but where they are small onnxruntime's are all the same: it
    computes them to 1e-8, and a region proposal network is certain of most of what it sees.
    """
    inverse = 1 / (1 + logits.abs())
    return torch.where(logits < 0, inverse, 2 - inverse)


def drop_small(boxes: Tensor, scores: Tensor, settings: dict) -> Tensor:
    """Scores, 0 where a box is not larger than ``min_bbox_size``."""
    smallest = settings.get('min_bbox_size', -1)
    if smallest < 0:
        return scores
    width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    return scores * ((width > smallest) & (height > smallest)).to(scores)


def trimmed(boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As many rows as the fullest picture of the batch has detections, at least one.

    Rows without a detection have score 0 and label -1.
    """
    found = scores > 0
    count = found.sum(dim=1).max().clamp(min=1).item()
    torch._check(count >= 1)
    torch._check(count <= scores.shape[1])
    labels = torch.where(found, labels, -1).to(torch.int32)
    boxes = boxes * found[:, :, None].to(boxes)
    return boxes[:, :count], scores[:, :count], labels[:, :count]
