"""Which models can be exported, and what of their settings an exported file follows."""

import copy

from torch import nn

from backbones.errors import ConfigError, ExportError


def exportable(model: nn.Module, logits: bool = False, backbone_only: bool = False) -> nn.Module:
    """A detector, a segmentor or its backbone as one function from pixels to results.

    Args:
        model: A model of mmdet or mmseg in evaluation mode. It is not changed.
        logits: Of a segmentor: give logits instead of labels.
        backbone_only: Give the backbone's feature maps.

    Raises:
        ExportError: The model has a part whose results would not be reproduced.
    """
    model = copy.deepcopy(model)
    divisor = pad_divisor(model)
    if backbone_only:
        from .backbone import ExportableBackbone

        return ExportableBackbone(model, divisor).eval()
    if is_segmentor(model):
        from .segmentor import ExportableSegmentor

        check_segmentor(model)
        return ExportableSegmentor(model, divisor, logits).eval()
    from .detector import ExportableOneStage, ExportableTwoStage

    if logits:
        raise ExportError('logits are what a segmentor gives; this is a detector')
    if hasattr(model, 'roi_head'):
        check_two_stage(model)
        return ExportableTwoStage(model, divisor).eval()
    check_one_stage(model)
    return ExportableOneStage(model, divisor).eval()


def is_segmentor(model: nn.Module) -> bool:
    """Whether a model is mmseg's; others are mmdet's."""
    return hasattr(model, 'decode_head')


def pad_divisor(model: nn.Module) -> int:
    """To what multiple the model's data preprocessor pads pictures in testing."""
    preprocessor = model.data_preprocessor
    if not is_segmentor(model):
        return preprocessor.pad_size_divisor
    settings = preprocessor.test_cfg or {}
    if settings.get('size'):
        raise ConfigError(
            'data_preprocessor.test_cfg pads pictures to a fixed size, which an exported file '
            'does not; give the size to export instead: '
            '--cfg-options model.data_preprocessor.test_cfg=None'
        )
    return settings.get('size_divisor') or 1


def least_size(model: nn.Module) -> int:
    """The least height and width of pictures for which every level has more than one cell."""
    strides = [32]
    for head in (getattr(model, 'bbox_head', None), getattr(model, 'rpn_head', None)):
        if head is not None:
            strides.append(max(head.prior_generator.strides[-1]))
    return max(strides) + 1


def check_segmentor(model: nn.Module) -> None:
    """See that a segmentor works on whole pictures."""
    from mmseg.models import EncoderDecoder

    expect(type(model), EncoderDecoder, 'a segmentor')
    mode = model.test_cfg.get('mode', 'whole')
    if mode != 'whole':
        raise ExportError(
            f'model.test_cfg.mode is {mode!r}; a file works on whole pictures: --cfg-options '
            'model.test_cfg.mode=whole'
        )


def check_one_stage(model: nn.Module) -> None:
    """See that a detector is a RetinaNet."""
    from mmdet.models import RetinaHead

    head = getattr(model, 'bbox_head', None)
    expect(type(head), RetinaHead, 'bbox_head of a one-stage detector')
    check_anchors(head)
    check_suppression(model.test_cfg)
    if not head.use_sigmoid_cls or getattr(head.loss_cls, 'custom_cls_channels', False):
        raise ExportError('bbox_head.loss_cls has to use a sigmoid')


def check_two_stage(model: nn.Module) -> None:
    """See that a detector is a Faster or Mask R-CNN."""
    from mmdet.models import BBoxHead, FCNMaskHead, RPNHead, SingleRoIExtractor, StandardRoIHead

    head = model.roi_head
    expect(type(model.rpn_head), RPNHead, 'rpn_head')
    expect(type(head), StandardRoIHead, 'roi_head')
    check_anchors(model.rpn_head)
    check_suppression(model.test_cfg.rpn)
    check_suppression(model.test_cfg.rcnn)
    extractors = [head.bbox_roi_extractor]
    if not isinstance(head.bbox_head, BBoxHead) or head.bbox_head.custom_cls_channels:
        raise ExportError(f'roi_head.bbox_head is a {type(head.bbox_head).__name__}')
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
    """See that a head has mmdet's usual anchors and boxes."""
    from mmdet.models.task_modules import AnchorGenerator

    expect(type(head.prior_generator), AnchorGenerator, 'anchor_generator')
    check_coder(head.bbox_coder)


def check_coder(coder: object) -> None:
    """See that boxes are coded as in Faster R-CNN."""
    from mmdet.models.task_modules import DeltaXYWHBBoxCoder

    expect(type(coder), DeltaXYWHBBoxCoder, 'bbox_coder')
    if coder.add_ctr_clamp:
        raise ExportError('bbox_coder.add_ctr_clamp cannot be exported')


def check_suppression(settings: dict) -> None:
    """See that boxes are suppressed as ONNX's NonMaxSuppression does it."""
    kind = settings.nms.get('type', 'nms')
    if kind != 'nms':
        raise ExportError(f"test_cfg has nms of type {kind!r}; 'nms' is what can be exported")


def expect(found: type, wanted: type, what: str) -> None:
    """See that a part of a model is of a type whose results are reproduced.

    Raises:
        ExportError: It is of another, of a subclass even, which may compute something else.
    """
    if found is not wanted:
        raise ExportError(
            f'{what} of type {found.__name__} cannot be exported, {wanted.__name__} can. '
            'The backbone alone can always be: --backbone-only'
        )
