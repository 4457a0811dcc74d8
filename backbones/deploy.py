"""Whole detectors and segmentors for inference: the same results, faster and in any memory format.

In evaluation mode a BatchNorm multiplies and adds constants, which the weights and bias of the
convolution before it can do as well. So can a layer scale, and convolutions of one input can be
one convolution. What remains of a model computes the same, faster.
"""

from itertools import pairwise
from typing import Any

import torch
from mmcv.cnn import ConvModule
from torch import Tensor, nn

from .efficientformer_v2.fold import can_fold, fold_norm


def switch_to_deploy(model: nn.Module) -> nn.Module:
    """Make a model ready for inference, for good, and return it in evaluation mode.

    Parts that have a ``switch_to_deploy()`` of their own, our backbone for one, are switched by it;
    then all other BatchNorms, those of another backbone too, are folded into the convolutions that
    they follow. Other norms stay. Necks and heads that are known to allow it work in channels last
    from then on. Load the weights and choose the device first: what is folded cannot be loaded
    into, and our backbone can no longer be trained. A second call changes nothing.
    """
    model.eval()
    _switch_parts(model)
    fold_norms(model)
    replace_roi_align(model)
    put_channels_last(model)
    return expect_contiguous(model)


def _switch_parts(module: nn.Module) -> None:
    if hasattr(module, 'switch_to_deploy'):
        module.switch_to_deploy()
        return
    for child in module.children():
        _switch_parts(child)


def fold_norms(model: nn.Module) -> None:
    """Fold every BatchNorm into the convolution that comes just before it in its parent module.

    The order is that in which the children were registered, which has to be that of the forward
    pass; it is in ResNets, MobileNets and the heads of mmdet and mmseg.

    mmcv's ``fuse_conv_bn`` changes a convolution that several norms share once for each of them,
    and takes a ``ConvModule`` with the norm in front for one with it behind.
    """
    for parent in list(model.modules()):
        if isinstance(parent, ConvModule) and 'conv_norm' not in '_'.join(parent.order):
            continue
        children = list(parent.named_children())
        for (conv_name, conv), (norm_name, norm) in pairwise(children):
            if can_fold(conv, norm):
                setattr(parent, conv_name, fold_norm(conv, norm))
                setattr(parent, norm_name, nn.Identity())


def replace_roi_align(model: nn.Module) -> None:
    """Put :class:`.roi_align.RoIAlign` in place of mmcv's in a model, where it does the same."""
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if is_operator(layer) and type(layer).__name__ == 'RoIAlign':
                # Here, since mmcv can be had without its operators.
                from .roi_align import RoIAlign, can_replace

                if can_replace(layer):
                    setattr(parent, name, RoIAlign(layer))


def expect_contiguous(model: nn.Module) -> nn.Module:
    """Have every operator of mmcv in a model, which is returned, get contiguous tensors.

    mmcv's kernels read memory as if every tensor were contiguous. Given a map in channels last,
    RoIAlign and the deformable convolutions compute something else, on CPUs and GPUs, most of them
    without an error (mmcv issue 2203).
    """
    for module in model.modules():
        if is_operator(module) and make_contiguous not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(make_contiguous, with_kwargs=True)
    return model


def is_operator(module: nn.Module) -> bool:
    """Whether a module is one of mmcv's operators, or made from one."""
    return any(kind.__module__.startswith('mmcv.ops.') for kind in type(module).__mro__)


def make_contiguous(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    """A hook in front of an operator: its tensors, contiguous."""
    args = tuple(each.contiguous() if isinstance(each, Tensor) else each for each in args)
    kwargs = {
        name: each.contiguous() if isinstance(each, Tensor) else each
        for name, each in kwargs.items()
    }
    return args, kwargs


# Necks and heads that compute the same in channels last. Others may `view` a map as if its
# channels came first.
WORKS_CHANNELS_LAST = {
    ('mmdet', 'FPN'),
    ('mmdet', 'RPNHead'),
    ('mmdet', 'RetinaHead'),
    ('mmdet', 'FCNMaskHead'),
    ('mmdet', 'StandardRoIHead'),
    ('mmseg', 'FPN'),
    ('mmseg', 'FPNHead'),
    ('mmseg', 'UPerHead'),
}
# Children of a detector or segmentor that take no maps of its neck at inference.
NOT_BEHIND_THE_NECK = {'data_preprocessor', 'backbone', 'neck', 'auxiliary_head'}


def put_channels_last(model: nn.Module) -> None:
    """Have the necks and heads in a model work in channels last, where they can.

    It is how CPUs and CUDA's GPUs convolve fastest. What such a neck returns is made contiguous
    again, unless all heads behind it work in channels last too.
    """
    if any(parameter.device.type not in ('cpu', 'cuda') for parameter in model.parameters()):
        return
    understood = [whole.neck for whole in model.modules() if understands_neck(whole)]
    for part in model.modules():
        if not works_channels_last(part):
            continue
        # What a convolution puts out follows its weights.
        part.to(memory_format=torch.channels_last)
        has_hook = return_contiguous in part._forward_hooks.values()
        if type(part).__name__ == 'FPN' and part not in understood and not has_hook:
            part.register_forward_hook(return_contiguous)


def understands_neck(whole: nn.Module) -> bool:
    """Whether a module has a neck and heads, and all of these heads work in channels last."""
    heads = [head for name, head in whole.named_children() if name not in NOT_BEHIND_THE_NECK]
    has_neck = isinstance(getattr(whole, 'neck', None), nn.Module)
    return has_neck and bool(heads) and all(map(works_channels_last, heads))


def works_channels_last(part: nn.Module) -> bool:
    """Whether a neck or head is known to compute the same in channels last."""
    kind = type(part)
    known = (kind.__module__.partition('.')[0], kind.__name__) in WORKS_CHANNELS_LAST
    # An operator would read its own weights as if they were contiguous.
    return known and not any(is_operator(module) for module in part.modules())


def return_contiguous(neck: nn.Module, inputs: tuple, maps: tuple[Tensor, ...]) -> tuple:
    """A hook behind a neck: its maps, contiguous."""
    return tuple(each.contiguous() for each in maps)
