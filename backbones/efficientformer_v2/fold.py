"""Folding what inference does not need into convolutions."""

import copy
from collections.abc import Sequence
from itertools import pairwise

import torch
from mmcv.cnn import Conv2d, ConvModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fold_norms(model: nn.Module) -> None:
    """Fold every BatchNorm into the convolution that it follows in its parent module.

    mmcv's ``fuse_conv_bn`` does so too, but changes a convolution that several norms share once
    for each of them, and takes a ``ConvModule`` with the norm in front for one with it behind.

    Args:
        model: Changed in place; a folded norm becomes an ``nn.Identity``.
    """
    for parent in list(model.modules()):
        if isinstance(parent, ConvModule) and not _norm_follows_conv(parent):
            continue
        children = list(parent.named_children())
        for (conv_name, conv), (norm_name, norm) in pairwise(children):
            if can_fold(conv, norm):
                setattr(parent, conv_name, fold_norm(conv, norm))
                setattr(parent, norm_name, nn.Identity())


def _norm_follows_conv(module: ConvModule) -> bool:
    order = module.order
    return order.index('norm') == order.index('conv') + 1


def can_fold(conv: nn.Module, norm: nn.Module) -> bool:
    """Whether a norm behind a convolution is one that :func:`fold_norm` can fold into it."""
    return (
        # Subclasses may do more with their weights than convolve: ConvWS2d, for one.
        type(conv) in (nn.Conv2d, Conv2d)
        # Spectral norm computes the weight anew at every call, from another parameter.
        and isinstance(conv.weight, nn.Parameter)
        and isinstance(norm, _BatchNorm)
        # Without running statistics a BatchNorm takes the picture's own.
        and norm.running_mean is not None
        and norm.num_features == conv.out_channels
    )


def fold_norm(conv: nn.Conv2d, norm: nn.Module) -> nn.Conv2d:
    """A convolution that does what a convolution and a BatchNorm in evaluation mode do.

    Args:
        conv: Left as it is.
        norm: A BatchNorm for which :func:`can_fold` holds; left as it is.

    Returns:
        A new convolution with the weights' data type, computed in float32 or better.
    """
    dtype = conv.weight.dtype
    precise = torch.promote_types(dtype, torch.float32)
    conv, norm = (copy.deepcopy(layer).eval().to(precise) for layer in (conv, norm))
    return fuse_conv_bn_eval(conv, norm).to(dtype)


@torch.no_grad()
def scale_channels(affine: nn.Module, factor: Tensor | float) -> None:
    """Multiply what a layer puts out, in place.

    Args:
        affine: A convolution or a norm with ``weight`` and ``bias``, each of which has the
            output's channels as its first dimension.
        factor: One for all channels, or (channels,).
    """
    affine.bias.mul_(factor)
    if isinstance(factor, Tensor):
        factor = factor.view(-1, *[1] * (affine.weight.dim() - 1))
    affine.weight.mul_(factor)


@torch.no_grad()
def join_convs(convs: Sequence[nn.Conv2d]) -> nn.Conv2d:
    """One convolution that puts out what several of the same input do, one after the other.

    Args:
        convs: Convolutions with biases that differ in ``out_channels`` alone; left as they are.
    """
    joined = copy.deepcopy(convs[0])
    joined.out_channels = sum(conv.out_channels for conv in convs)
    joined.weight = nn.Parameter(torch.cat([conv.weight for conv in convs]))
    joined.bias = nn.Parameter(torch.cat([conv.bias for conv in convs]))
    return joined
