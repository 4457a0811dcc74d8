"""What can be exported: a detector, a segmentor or a backbone as one function of pixels."""

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.errors import ExportError

from .preprocessing import Preprocessing


def exportable(model: nn.Module, logits: bool = False, backbone_only: bool = False) -> nn.Module:
    """A model as one function from images (batch, 3, height, width) to tensors.

    Args:
        model: A model of mmdet or mmseg in evaluation mode. It is not changed.
        logits: Of a segmentor: return logits instead of class indices.
        backbone_only: Return the backbone's feature maps.

    Raises:
        ExportError: The model has a part whose results would not be reproduced.
    """
    model = copy.deepcopy(model)
    if backbone_only:
        return ExportableBackbone(model).eval()
    if is_segmentor(model):
        check_segmentor(model)
        return ExportableSegmentor(model, logits).eval()
    from .detector import ExportableOneStage, ExportableTwoStage

    if logits:
        raise ExportError('logits are what a segmentor gives; this is a detector')
    if hasattr(model, 'roi_head'):
        check_two_stage(model)
        return ExportableTwoStage(model).eval()
    check_one_stage(model)
    return ExportableOneStage(model).eval()


def is_segmentor(model: nn.Module) -> bool:
    """Whether a model is mmseg's; others are mmdet's."""
    return hasattr(model, 'decode_head')


def min_image_size(model: nn.Module) -> int:
    """The smallest height and width of images for which every level has more than one cell."""
    strides = [32]
    for head in (getattr(model, 'bbox_head', None), getattr(model, 'rpn_head', None)):
        if head is not None:
            strides.append(max(head.prior_generator.strides[-1]))
    return max(strides) + 1


class ExportableBackbone(nn.Module):
    """Preprocessing and the backbone alone: from pixels to feature maps."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.preprocessing = Preprocessing(model.data_preprocessor)
        self.backbone = model.backbone

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.backbone(self.preprocessing(images))


class ExportableSegmentor(nn.Module):
    """An mmseg EncoderDecoder in its 'whole' mode.

    Args:
        segmentor: The model.
        logits: Return the logits of the classes instead of the class with the highest.
    """

    def __init__(self, segmentor: nn.Module, logits: bool = False) -> None:
        from mmseg.models.utils import Upsample

        super().__init__()
        self.preprocessing = Preprocessing(segmentor.data_preprocessor)
        self.segmentor = segmentor
        for module in segmentor.modules():
            # Other factors make constants of the sizes, an error where those are open.
            if isinstance(module, Upsample) and float(module.scale_factor or 0.5).is_integer():
                module.forward = partial(upsample, module)
        self.logits = logits

    def forward(self, images: Tensor) -> Tensor:
        """(batch, 3, height, width) to segmentation maps (batch, height, width), int32, or logits
        (batch, classes, height, width)."""
        height, width = images.shape[-2:]
        inputs = self.preprocessing(images)
        head = self.segmentor.decode_head
        logits = F.interpolate(
            head(self.segmentor.extract_feat(inputs)),
            size=inputs.shape[-2:],
            mode='bilinear',
            align_corners=head.align_corners,
        )
        if self.preprocessing.pad_divisor > 1:
            logits = logits[:, :, :height, :width]
        if self.logits:
            return logits
        if head.out_channels == 1:
            return (logits.sigmoid() > head.threshold).squeeze(1).to(torch.int32)
        return logits.argmax(dim=1).to(torch.int32)


def upsample(module: nn.Module, x: Tensor) -> Tensor:
    """mmseg's Upsample, whose ``int(size * factor)`` makes constants of the sizes."""
    size = [n * int(module.scale_factor) for n in x.shape[-2:]]
    return F.interpolate(x, size, mode=module.mode, align_corners=module.align_corners)


# ------------------------------------------------------------------------------------------------
# Checks
# ------------------------------------------------------------------------------------------------


def check_segmentor(model: nn.Module) -> None:
    """Check that a segmentor works on whole images."""
    from mmseg.models import EncoderDecoder

    expect(type(model), EncoderDecoder, 'a segmentor')
    mode = model.test_cfg.get('mode', 'whole')
    if mode != 'whole':
        raise ExportError(
            f'model.test_cfg.mode is {mode!r}; a file works on whole images: --cfg-options '
            'model.test_cfg.mode=whole'
        )


def check_one_stage(model: nn.Module) -> None:
    """Check that a detector is a RetinaNet."""
    from mmdet.models import RetinaHead

    head = getattr(model, 'bbox_head', None)
    expect(type(head), RetinaHead, 'bbox_head of a one-stage detector')
    check_anchors(head)
    check_nms(model.test_cfg)
    if not head.use_sigmoid_cls or getattr(head.loss_cls, 'custom_cls_channels', False):
        raise ExportError('bbox_head.loss_cls has to use a sigmoid')


def check_two_stage(model: nn.Module) -> None:
    """Check that a detector is a Faster or Mask R-CNN."""
    from mmdet.models import BBoxHead, FCNMaskHead, RPNHead, SingleRoIExtractor, StandardRoIHead

    head = model.roi_head
    expect(type(model.rpn_head), RPNHead, 'rpn_head')
    expect(type(head), StandardRoIHead, 'roi_head')
    check_anchors(model.rpn_head)
    check_nms(model.test_cfg.rpn)
    check_nms(model.test_cfg.rcnn)
    extractors = [head.bbox_roi_extractor]
    if not isinstance(head.bbox_head, BBoxHead) or head.bbox_head.custom_cls_channels:
        raise ExportError(f'roi_head.bbox_head of type {type(head.bbox_head).__name__}')
    check_coder(head.bbox_head.bbox_coder)
    if head.with_mask:
        expect(type(head.mask_head), FCNMaskHead, 'roi_head.mask_head')
        extractors.append(head.mask_roi_extractor)
    if head.with_shared_head:
        raise ExportError('roi_head.shared_head cannot be exported')
    for extractor in extractors:
        expect(type(extractor), SingleRoIExtractor, 'a roi_extractor')
        for layer in extractor.roi_layers:
            if type(layer).__name__ != 'RoIAlign' or layer.pool_mode != 'avg':
                raise ExportError('a roi_extractor has to average with RoIAlign')


def check_anchors(head: nn.Module) -> None:
    """Check that a head has mmdet's usual anchors and boxes."""
    from mmdet.models.task_modules import AnchorGenerator

    expect(type(head.prior_generator), AnchorGenerator, 'anchor_generator')
    check_coder(head.bbox_coder)


def check_coder(coder: object) -> None:
    """Check that boxes are coded as in Faster R-CNN."""
    from mmdet.models.task_modules import DeltaXYWHBBoxCoder

    expect(type(coder), DeltaXYWHBBoxCoder, 'bbox_coder')
    if coder.add_ctr_clamp:
        raise ExportError('bbox_coder.add_ctr_clamp cannot be exported')


def check_nms(settings: dict) -> None:
    """Check that non-maximum suppression is the kind that ONNX has."""
    kind = settings.nms.get('type', 'nms')
    if kind != 'nms':
        raise ExportError(f"test_cfg has nms of type {kind!r}; 'nms' is what can be exported")


def expect(found: type, wanted: type, what: str) -> None:
    """Check that a part of a model is of a type whose results are reproduced.

    Raises:
        ExportError: It is of another, even of a subclass, which may compute something else.
    """
    if found is not wanted:
        raise ExportError(
            f'{what} of type {found.__name__} cannot be exported, {wanted.__name__} can. '
            'The backbone alone can always be: --backbone-only'
        )
