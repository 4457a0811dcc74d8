"""One model with the weights of all networks of a space, and single networks taken out of it.

``Layout`` finds which channels each dimension of each tensor has, by comparison with a second
network with different widths. From this follow: the elastic model, which computes any network of
the space with slices of its weights; sorting channels by importance; the number of parameters of a
network; its weights.
"""

import copy
import math
import re
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from mmcv.cnn import Conv2d
from mmcv.cnn.bricks import DropPath
from mmengine.config import Config
from mmengine.dist import all_reduce, get_world_size
from mmengine.registry import MODELS
from torch import Tensor, nn

from backbones.efficientformer_v2.backbone import NUM_STAGES, Block, EfficientFormerV2
from backbones.efficientformer_v2.layers import LayerScale
from backbones.errors import ConfigError

from .space import Choice, Space

BLOCK_KEY = re.compile(r'backbone\.stages\.(\d+)\.blocks\.(\d+)\.(.+)')
OF_ATTENTION = ('token_mixer.', 'layer_scale_1.')


class Axes(NamedTuple):
    """A tensor of the largest network: its shape, the group of channels of each dimension (a key
    of ``Space.widths`` or None), and whether it is a parameter."""

    shape: tuple[int, ...]
    groups: tuple[str | None, ...]
    is_parameter: bool


class Layout:
    """The groups of channels in every tensor of a space's largest network.

    ``model`` is this network, ``config`` is its config.
    """

    def __init__(self, model: nn.Module, space: Space, config: Config) -> None:
        self.space = space
        widths = space.widths(space.largest)
        # Widths of another network. Each differs by another number (the stem's by half of the
        # first stage's, as it must), so that comparing sizes tells all groups apart.
        others = {group: width + 64 * n for n, (group, width) in enumerate(widths.items(), 1)}
        channels = tuple(others[f'stages.{stage}'] for stage in range(NUM_STAGES))
        ratios = tuple(
            tuple((others[f'stages.{stage}.blocks.{n}'] + 0.5) / width for n in range(len(row)))
            for stage, (width, row) in enumerate(zip(channels, space.largest.ratios, strict=True))
        )
        other = replace(space.largest, channels=channels, ratios=ratios, neck=others.get('neck'))
        options = space.options(other, config)
        if space.head:
            options['model.{}.{}'.format(*space.head)] = others['head']
        with torch.device('meta'):
            tensors = build_network(config, options).state_dict()
        parameters = dict(model.named_parameters())
        groups = {(width, others[group]): group for group, width in widths.items()}
        self.tensors = {}
        for name, tensor in model.state_dict().items():
            sizes = zip(tensor.shape, tensors[name].shape, strict=True)
            axes = tuple(map(groups.get, sizes))
            self.tensors[name] = Axes(tuple(tensor.shape), axes, name in parameters)

    def count_parameters(self, choice: Choice) -> int:
        """Return the exact number of parameters of a network."""
        widths = self.space.widths(choice)
        return sum(
            math.prod(map(widths.get, axes.groups, axes.shape))
            for name, axes in self.tensors.items()
            if axes.is_parameter and renamed(name, choice)
        )

    def extract(self, state_dict: dict[str, Tensor], choice: Choice) -> dict[str, Tensor]:
        """Return a network's own weights, copied from those of a supernet.

        Every tensor is the first part of the supernet's, in every dimension.
        """
        widths, own = self.space.widths(choice), {}
        for name, axes in self.tensors.items():
            if own_name := renamed(name, choice):
                slices = tuple(slice(widths.get(group)) for group in axes.groups)
                own[own_name] = state_dict[name][slices].clone()
        return own

    @torch.no_grad()
    def sort_channels(self, model: nn.Module) -> None:
        """Sort channels so that important ones come first; the model's results stay the same.

        A channel's importance is the sum of the absolute weights that read it, as in Once-for-All
        (Cai et al., arXiv 1908.09791, section 3.3).
        """
        tensors = model.state_dict()
        importance: dict[str, Tensor] = {}
        for name, axes in self.tensors.items():
            if len(axes.groups) == 4 and axes.groups[1]:
                read = tensors[name].abs().sum(dim=(0, 2, 3))
                importance[axes.groups[1]] = importance.get(axes.groups[1], 0) + read
        orders = {
            group: values.argsort(descending=True, stable=True)
            for group, values in importance.items()
        }
        for name, axes in self.tensors.items():
            for dim, group in enumerate(axes.groups):
                if group in orders:
                    tensors[name].copy_(tensors[name].index_select(dim, orders[group]))


def build_network(config: Config, options: dict[str, Any]) -> nn.Module:
    """Build the model of a config with the options of a network of its space."""
    own = Config(dict(model=copy.deepcopy(config.model)))
    own.merge_from_dict(options)
    return MODELS.build(own.model)


def renamed(name: str, choice: Choice) -> str | None:
    """Return a tensor's name in a network by itself, or None if the network lacks the tensor."""
    match = BLOCK_KEY.fullmatch(name)
    if not match:
        return name
    stage, block, rest = int(match[1]), int(match[2]), match[3]
    blocks = choice.blocks(stage)
    if block not in blocks:
        return None
    if rest.startswith(OF_ATTENTION) and block not in choice.attending_blocks(stage):
        return None
    return f'backbone.stages.{stage}.blocks.{blocks.index(block)}.{rest}'


class ElasticConv2d(nn.Conv2d):
    """A convolution with its first weights only, for the input's channels and ``width`` outputs."""

    width: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        inputs = x.shape[1]
        is_depthwise = self.groups > 1
        outputs = inputs if is_depthwise else self.width
        bias = None if self.bias is None else self.bias[:outputs]
        weight, groups = self.weight[:outputs, :inputs], inputs if is_depthwise else 1
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, groups)


class ElasticBatchNorm(nn.BatchNorm2d):
    """A BatchNorm of its first channels, as many as the input has, synchronized over processes.

    Running statistics are updated only if ``tracks`` is True, for the largest network: every
    network would need its own.
    """

    tracks = True

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        mean, var = self.running_mean[:channels], self.running_var[:channels]
        weight, bias = self.weight[:channels], self.bias[:channels]
        if not self.training:
            return F.batch_norm(x, mean, var, weight, bias, False, 0.0, self.eps)
        if not self.tracks:
            mean = var = None
        if get_world_size() > 1:
            return synchronized_batch_norm(x, mean, var, weight, bias, self.momentum, self.eps)
        return F.batch_norm(x, mean, var, weight, bias, True, self.momentum, self.eps)


def synchronized_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    momentum: float,
    eps: float,
) -> Tensor:
    """Apply BatchNorm over the batches of all processes, which must be of equal size.

    torch's SyncBatchNorm does the same, but only on GPUs.
    """
    values = x.to(weight.dtype)
    mean = MeanOverProcesses.apply(values.mean(dim=(0, 2, 3)))
    centered = values - mean[:, None, None]
    var = MeanOverProcesses.apply(centered.square().mean(dim=(0, 2, 3)))
    if running_mean is not None:
        count = x.numel() // x.shape[1] * get_world_size()
        running_mean.lerp_(mean.detach(), momentum)
        running_var.lerp_(var.detach() * (count / max(count - 1, 1)), momentum)
    factor = (var + eps).rsqrt() * weight
    return (centered * factor[:, None, None] + bias[:, None, None]).to(x.dtype)


class MeanOverProcesses(torch.autograd.Function):
    """The mean of a tensor over all processes; its gradient is the mean of their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        all_reduce(x, op='mean')
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return MeanOverProcesses.apply(gradient)


class ElasticLayerScale(LayerScale):
    """A layer scale that uses its first factors, as many as the input has channels."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma[: x.shape[1], None, None]


class ElasticBlock(Block):
    """A block that can be left out, or only its attention."""

    is_left_out = False
    attends = True

    def forward(self, x: Tensor) -> Tensor:
        if self.is_left_out:
            return x
        if self.attends:
            return super().forward(x)
        return self.feed_forward(x)


def make_elastic(model: nn.Module, layout: Layout) -> nn.Module:
    """Let a model compute any network of a space with slices of its own weights.

    Only the classes of its modules change, so the keys of its state_dict stay. Raises ConfigError
    if a layer cannot be sliced.
    """
    if not isinstance(model.backbone, EfficientFormerV2) or model.backbone.deployed:
        raise ConfigError('a supernet needs an EfficientFormerV2 before switch_to_deploy()')
    tensors = layout.tensors.items()
    elastic = {name.rpartition('.')[0] for name, axes in tensors if any(axes.groups)}
    for name, module in model.named_modules():
        if isinstance(module, Block):
            module.__class__ = ElasticBlock
        elif isinstance(module, LayerScale):
            module.__class__ = ElasticLayerScale
        elif isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
            if module.momentum is None or not (module.affine and module.track_running_stats):
                raise ConfigError(
                    f'{name} cannot be sliced: it needs momentum, affine and track_running_stats'
                )
            # All BatchNorms, since statistics differ even in layers that all networks share.
            module.__class__ = ElasticBatchNorm
        elif name not in elastic:
            continue
        elif type(module) in (nn.Conv2d, Conv2d):
            module.__class__ = ElasticConv2d
        else:
            kind = type(module).__name__
            raise ConfigError(f'{name} is a {kind}, whose channels cannot be sliced')
    set_choice(model, layout, layout.space.largest)
    return model


def set_choice(model: nn.Module, layout: Layout, choice: Choice) -> None:
    """Let an elastic model compute the network of a choice from now on.

    Only the largest network has stochastic depth and updates running statistics.
    """
    widths = layout.space.widths(choice)
    is_largest = choice == layout.space.largest
    for name, module in model.named_modules():
        if isinstance(module, ElasticConv2d):
            module.width = widths.get(layout.tensors[f'{name}.weight'].groups[0])
        elif isinstance(module, ElasticBatchNorm):
            module.tracks = is_largest
        elif isinstance(module, DropPath):
            module.train(model.training and is_largest)
    for number, stage in enumerate(model.backbone.stages):
        attending = choice.attending_blocks(number)
        for position, block in enumerate(stage.blocks):
            block.is_left_out = not choice.ratios[number][position]
            block.attends = position in attending
