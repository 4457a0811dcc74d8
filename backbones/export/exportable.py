"""Detectors, segmentors and backbones as functions of pixels that can be exported."""

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.errors import ExportError
from backbones.inference.seg_maps import Cells, resized_argmax

from .preprocessing import Preprocessing

# Height and width of a test image, which shows how many pixels there are per logit. Strides do not
# divide it, so the number is right even if a segmentor rounds the size of its logits down.
PROBE = 95


def exportable(
    model: nn.Module, logits: bool = False, backbone_only: bool = False, open_sizes: bool = True
) -> nn.Module:
    """Return a copy of an mmdet or mmseg model as one function from images (batch, 3, height,
    width) to tensors. With ``open_sizes``, sizes inside may depend on the image. Raises ExportError
    if the model has a part that cannot be exported with the same results."""
    model = copy.deepcopy(model)
    if backbone_only:
        return nn.Sequential(Preprocessing(model.data_preprocessor), model.backbone).eval()
    if is_segmentor(model):
        check_segmentor(model)
        return ExportableSegmentor(model, logits, open_sizes).eval()
    if logits:
        raise ExportError('--logits is only for segmentors, and this is a detector')
    from .detector import ExportableDetector

    check_detector(model)
    return ExportableDetector(model).eval()


def is_segmentor(model: nn.Module) -> bool:
    """Return whether a model is mmseg's; other models are mmdet's."""
    return hasattr(model, 'decode_head')


def min_image_size(model: nn.Module) -> int:
    """Return the smallest height and width of images for which every level has several cells."""
    heads = [getattr(model, name, None) for name in ('bbox_head', 'rpn_head')]
    generators = [head.prior_generator for head in heads if hasattr(head, 'prior_generator')]
    return max([32, *(max(each.strides[-1]) for each in generators)]) + 1


class ExportableSegmentor(nn.Module):
    """An mmseg EncoderDecoder in its 'whole' mode. With ``open_sizes``, a segmentation map is
    computed without resizing all logits to the image, see :func:`segmentation_map`."""

    def __init__(self, segmentor: nn.Module, logits: bool = False, open_sizes: bool = True) -> None:
        from mmseg.models.utils import Upsample

        super().__init__()
        self.preprocessing = Preprocessing(segmentor.data_preprocessor)
        self.segmentor = segmentor
        for module in segmentor.modules():
            # Other factors make sizes constant, which is an error if they are dynamic.
            if isinstance(module, Upsample) and float(module.scale_factor or 0.5).is_integer():
                module.forward = partial(upsample, module)
        self.logits = logits
        head = segmentor.decode_head
        self.steps = None
        if open_sizes and not logits and head.out_channels > 1 and not head.align_corners:
            with torch.no_grad():
                probed = head(segmentor.extract_feat(torch.zeros(1, 3, PROBE, PROBE)))
            self.steps = -(-PROBE // min(probed.shape[-2:]))

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, 3, height, width) to segmentation maps (batch, height, width), int32,
        or logits (batch, classes, height, width)."""
        inputs = self.preprocessing(images)
        size, head = inputs.shape[-2:], self.segmentor.decode_head
        results = head(self.segmentor.extract_feat(inputs))
        if self.steps:
            results = segmentation_map(results, size, self.steps)
        else:
            results = F.interpolate(
                results, size, mode='bilinear', align_corners=head.align_corners
            )
            if not self.logits and head.out_channels == 1:
                results = (results.sigmoid() > head.threshold).squeeze(1).to(torch.int32)
            elif not self.logits:
                results = results.argmax(dim=1).to(torch.int32)
        if self.preprocessing.pad_divisor > 1:
            height, width = images.shape[-2:]
            results = results[..., :height, :width]
        return results


def segmentation_map(logits: Tensor, size: tuple[int, int], steps: int) -> Tensor:
    """Return the class with the highest logit after bilinear resizing (the first of equals), int32
    (batch, *size). Along each axis there are at most ``steps`` pixels per logit."""
    sides = zip(size, logits.shape[2:], strict=True)
    rows, columns = (cells_of(pixels, count, steps) for pixels, count in sides)
    return resized_argmax(logits, rows, columns, torch.int32)


def cells_of(pixels: int, logits: int, steps: int) -> Cells:
    """Return the positions of pixels between logits along one axis.

    Pixel p is at (p + 1/2) * logits / pixels - 1/2, as in PyTorch's ``interpolate``. This is
    computed in integers, which stay exact if a file runs in half precision. A cell lies between two
    neighboring logits; the outermost cells have the same logit on both sides.
    """
    cell = torch.arange(logits + 1)
    first = ((2 * cell - 1) * pixels + logits - 1).clamp(min=0) // (2 * logits)
    inside = (2 * (first[:, None] + torch.arange(steps)) + 1) * logits + pixels
    after = (inside - 2 * pixels * cell[:, None]).to(torch.float32) / (2 * pixels)
    pixel = torch.arange(pixels)
    at = ((2 * pixel + 1) * logits + pixels) // (2 * pixels)
    return Cells(
        neighbors=torch.stack([(cell - 1).clamp(min=0), cell.clamp(max=logits - 1)], dim=1),
        weights=after[:, :, None],
        positions=at * steps + pixel - first[at],
    )


def upsample(module: nn.Module, x: Tensor) -> Tensor:
    """Compute mmseg's Upsample without its ``int(size * factor)``, which makes sizes constant."""
    size = [n * int(module.scale_factor) for n in x.shape[-2:]]
    return F.interpolate(x, size, mode=module.mode, align_corners=module.align_corners)


def check_segmentor(model: nn.Module) -> None:
    """Raise ExportError if a segmentor does not predict whole images at once."""
    from mmseg.models import EncoderDecoder

    expect(model, EncoderDecoder, 'a segmentor')
    mode = model.test_cfg.get('mode', 'whole')
    if mode != 'whole':
        raise ExportError(
            f"model.test_cfg.mode is {mode!r}, but only 'whole' can be exported: use --cfg-options "
            'model.test_cfg.mode=whole'
        )


def check_detector(model: nn.Module) -> None:
    """Raise ExportError unless it is a RetinaNet, Faster or Mask R-CNN of mmdet's usual parts."""
    from mmdet.models import (
        BBoxHead,
        FCNMaskHead,
        RetinaHead,
        RPNHead,
        SingleRoIExtractor,
        StandardRoIHead,
    )
    from mmdet.models.task_modules import AnchorGenerator, DeltaXYWHBBoxCoder

    head, settings = getattr(model, 'roi_head', None), [model.test_cfg]
    if head is None:
        dense = getattr(model, 'bbox_head', None)
        expect(dense, RetinaHead, 'bbox_head of a one-stage detector')
        coders = [dense.bbox_coder]
        if not dense.use_sigmoid_cls or getattr(dense.loss_cls, 'custom_cls_channels', False):
            raise ExportError('bbox_head.loss_cls must use a sigmoid to be exported')
    else:
        dense, settings = model.rpn_head, [model.test_cfg.rpn, model.test_cfg.rcnn]
        expect(dense, RPNHead, 'rpn_head')
        expect(head, StandardRoIHead, 'roi_head')
        if not isinstance(head.bbox_head, BBoxHead) or head.bbox_head.custom_cls_channels:
            raise ExportError(f'cannot export roi_head.bbox_head {type(head.bbox_head).__name__}')
        if head.with_shared_head:
            raise ExportError('roi_head.shared_head cannot be exported')
        coders = [dense.bbox_coder, head.bbox_head.bbox_coder]
        extractors = [head.bbox_roi_extractor]
        if head.with_mask:
            expect(head.mask_head, FCNMaskHead, 'roi_head.mask_head')
            extractors.append(head.mask_roi_extractor)
        for extractor in extractors:
            expect(extractor, SingleRoIExtractor, 'a roi_extractor')
            for layer in extractor.roi_layers:
                if type(layer).__name__ != 'RoIAlign' or layer.pool_mode != 'avg':
                    raise ExportError('a roi_extractor must use RoIAlign with average pooling')
    expect(dense.prior_generator, AnchorGenerator, 'anchor_generator')
    for coder in coders:
        expect(coder, DeltaXYWHBBoxCoder, 'bbox_coder')
        if coder.add_ctr_clamp:
            raise ExportError('bbox_coder.add_ctr_clamp cannot be exported')
    for kind in (each.nms.get('type', 'nms') for each in settings):
        if kind != 'nms':
            raise ExportError(f"test_cfg has nms of type {kind!r}; only 'nms' can be exported")


def expect(part: object, wanted: type, what: str) -> None:
    """Raise ExportError for another type, even a subclass, which may compute something else."""
    if type(part) is not wanted:
        raise ExportError(
            f'{what} of type {type(part).__name__} cannot be exported, only {wanted.__name__}. '
            'Any backbone can be exported, with --backbone-only'
        )
