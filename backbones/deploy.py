"""Models for inference: the same results in fewer steps.

In evaluation mode a BatchNorm multiplies and adds constants, which the weights and bias of the
convolution before it can do as well. So can a layer scale, and convolutions of one input can be
one convolution. What remains of a model computes the same, faster.
"""

import torch
from torch import Tensor, nn

from .efficientformer_v2.fold import fold_norms


def switch_to_deploy(model: nn.Module) -> nn.Module:
    """Make a model ready for inference, for good.

    Parts that have a ``switch_to_deploy()`` of their own, the backbone for one, are switched by
    it; then the BatchNorms of the neck and the heads are folded into the convolutions that they
    follow. Other norms stay. On a CPU, necks and heads that were tried so work in channels last
    from then on (:mod:`backbones.channels_last`). Load the weights first: what is folded cannot
    be loaded into, and the backbone can no longer be trained. A second call changes nothing.

    Args:
        model: A backbone, or a detector or segmentor; changed in place and left in evaluation
            mode, whatever mode it was in.

    Returns:
        The model itself.
    """
    model.eval()
    _switch_parts(model)
    fold_norms(model)
    put_channels_last(model)
    return model


def _switch_parts(module: nn.Module) -> None:
    if hasattr(module, 'switch_to_deploy'):
        module.switch_to_deploy()
        return
    for child in module.children():
        _switch_parts(child)


# Those that were tried. Others may `view` a map as if its channels came first, or hand it to an
# operator that reads memory so, unasked.
TRIED = {
    ('mmdet', 'FPN'),
    ('mmdet', 'RPNHead'),
    ('mmdet', 'RetinaHead'),
    ('mmdet', 'FCNMaskHead'),
    ('mmseg', 'FPN'),
    ('mmseg', 'FPNHead'),
    ('mmseg', 'UPerHead'),
}
NOT_BEHIND_THE_NECK = {'data_preprocessor', 'backbone', 'neck', 'auxiliary_head'}


def put_channels_last(model: nn.Module) -> None:
    """Have the neck and heads of a detector or segmentor on a CPU work in channels last.

    Results stay the same up to rounding. Only parts in ``TRIED`` are changed, and maps reach all
    others with the channels first.

    Args:
        model: Changed in place.
    """
    if any(parameter.device.type != 'cpu' for parameter in model.parameters()):
        return
    for part in model.modules():
        if was_tried(part):
            # What a convolution puts out follows its weights.
            part.to(memory_format=torch.channels_last)
    neck = getattr(model, 'neck', None)
    takers = [part for name, part in model.named_children() if name not in NOT_BEHIND_THE_NECK]
    if neck is None or not was_tried(neck) or all(was_tried(part) for part in takers):
        return
    if channels_first not in neck._forward_hooks.values():
        neck.register_forward_hook(channels_first)


def was_tried(part: nn.Module) -> bool:
    """Whether a part can do with maps in channels last."""
    kind = type(part)
    return (kind.__module__.partition('.')[0], kind.__name__) in TRIED


def channels_first(neck: nn.Module, inputs: tuple, features: tuple[Tensor, ...]) -> tuple:
    """A hook behind a neck: its maps with the channels first, as mmcv's RoIAlign takes them."""
    return tuple(each.contiguous() for each in features)
