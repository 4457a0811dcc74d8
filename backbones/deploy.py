"""Whole detectors and segmentors for inference: the same results, faster and in any memory format.

In evaluation mode a BatchNorm multiplies by and adds constants; folding puts these into the weights
and bias of the convolution before it. Layer scales fold the same way, and several convolutions of
one input become one.
"""

from itertools import pairwise
from typing import Any

import torch
from mmcv.cnn import ConvModule
from torch import Tensor, nn

from .efficientformer_v2.fold import can_fold, fold_norm


def switch_to_deploy(model: nn.Module) -> nn.Module:
    """Make a model ready for inference, permanently, and return it in evaluation mode.

    Parts with their own ``switch_to_deploy()``, such as our backbone, are switched by it. Then all
    other BatchNorms, in other backbones too, are folded into the convolutions before them. Other
    norms stay. Necks and heads that are known to support it work in channels last from then on.
    Load the weights and choose the device before the call: afterwards only weights that were saved
    folded fit, and our backbone can no longer be trained. A second call changes nothing.
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

    Children have to be registered in the order of the forward pass, as in ResNets, MobileNets and
    the heads of mmdet and mmseg.

    mmcv's ``fuse_conv_bn`` fails in two cases: it changes a convolution that several norms share
    once for each of them, and treats a ``ConvModule`` with the norm first as if it came last.
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
    """Replace mmcv's RoIAlign by :class:`.roi_align.RoIAlign` where it computes the same."""
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if is_operator(layer) and type(layer).__name__ == 'RoIAlign':
                # Imported here, since mmcv may be installed without its operators.
                from .roi_align import RoIAlign, can_replace

                if can_replace(layer):
                    setattr(parent, name, RoIAlign(layer))


def expect_contiguous(model: nn.Module) -> nn.Module:
    """Give contiguous tensors to every mmcv operator in a model; return the model.

    mmcv's kernels read memory as if every tensor were contiguous. With a map in channels last,
    RoIAlign and the deformable convolutions compute wrong results, on CPUs and GPUs, mostly without
    an error (mmcv issue 2203).
    """
    for module in model.modules():
        if is_operator(module) and make_contiguous not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(make_contiguous, with_kwargs=True)
    return model


def is_operator(module: nn.Module) -> bool:
    """Return whether a module is one of mmcv's operators, or derived from one."""
    return any(kind.__module__.startswith('mmcv.ops.') for kind in type(module).__mro__)


def make_contiguous(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    """Make the tensors for an operator contiguous; a forward pre-hook."""
    args = tuple(each.contiguous() if isinstance(each, Tensor) else each for each in args)
    kwargs = {
        name: each.contiguous() if isinstance(each, Tensor) else each
        for name, each in kwargs.items()
    }
    return args, kwargs


# Necks and heads that compute the same in channels last. Others may `view` a map as if its
# channels came first in memory.
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
# Children of a detector or segmentor that do not use the neck's maps at inference.
NOT_BEHIND_THE_NECK = {'data_preprocessor', 'backbone', 'neck', 'auxiliary_head'}


def put_channels_last(model: nn.Module) -> None:
    """Let the necks and heads in a model work in channels last, if they can.

    CPUs and CUDA GPUs convolve fastest in this format. The maps of such a neck are made contiguous
    again, unless all heads after it work in channels last too.
    """
    if any(parameter.device.type not in ('cpu', 'cuda') for parameter in model.parameters()):
        return
    understood = [whole.neck for whole in model.modules() if understands_neck(whole)]
    for part in model.modules():
        if not works_channels_last(part):
            continue
        # The output of a convolution takes the format of its weights.
        part.to(memory_format=torch.channels_last)
        has_hook = return_contiguous in part._forward_hooks.values()
        if type(part).__name__ == 'FPN' and part not in understood and not has_hook:
            part.register_forward_hook(return_contiguous)


def understands_neck(whole: nn.Module) -> bool:
    """Return whether a module has a neck and heads, and all these heads work in channels last."""
    heads = [head for name, head in whole.named_children() if name not in NOT_BEHIND_THE_NECK]
    has_neck = isinstance(getattr(whole, 'neck', None), nn.Module)
    return has_neck and bool(heads) and all(map(works_channels_last, heads))


def works_channels_last(part: nn.Module) -> bool:
    """Return whether a neck or head is known to compute the same in channels last."""
    kind = type(part)
    known = (kind.__module__.partition('.')[0], kind.__name__) in WORKS_CHANNELS_LAST
    # An operator would read its own weights as if they were contiguous.
    return known and not any(is_operator(module) for module in part.modules())


def return_contiguous(neck: nn.Module, inputs: tuple, maps: tuple[Tensor, ...]) -> tuple:
    """Make the maps of a neck contiguous; a forward hook."""
    return tuple(each.contiguous() for each in maps)
