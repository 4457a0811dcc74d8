"""One model with the weights of all networks of a space, and any network of it by itself.

Which channels each dimension of each tensor runs over is seen in a second network, all of whose
widths are others (``Layout``). Everything follows from it: an elastic model that computes what the
network of a choice does with slices of its weights, the order in which important channels come
first, the number of parameters of a network and its weights.
"""

import copy
import math
import re
from collections.abc import Iterator
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

BLOCK_KEY = re.compile(r'backbone\.stages\.(\d+)\.(?:blocks\.(\d+)\.)?(.+)')
OF_ATTENTION = ('token_mixer.', 'layer_scale_1.')


class Axes(NamedTuple):
    """A tensor of the largest network: its shape, what each dimension of it belongs to (a key of
    ``Space.widths`` or None), and whether it is a parameter."""

    shape: tuple[int, ...]
    groups: tuple[str | None, ...]
    is_parameter: bool


class Layout:
    """What every dimension of the tensors of a space's largest network belongs to.

    ``config``: of the ``model``, which is that network.
    """

    def __init__(self, model: nn.Module, space: Space, config: Config) -> None:
        self.space = space
        widths = space.widths(space.largest)
        # The widths of another network, each larger by a number of its own (the stem's by half of
        # the first stage's, as must be), so that no two are confused where sizes are compared.
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

    def slices(self, choice: Choice) -> Iterator[tuple[str, str, tuple[slice, ...]]]:
        """The tensors of a network: name in the largest one, own name, and what of it they are."""
        widths = self.space.widths(choice)
        for name, axes in self.tensors.items():
            own_name = renamed(name, choice)
            if own_name:
                yield name, own_name, tuple(slice(widths.get(group)) for group in axes.groups)

    def count_parameters(self, choice: Choice) -> int:
        """Parameters of a network, exactly."""
        total = 0
        for name, _, slices in self.slices(choice):
            axes = self.tensors[name]
            if axes.is_parameter:
                parts = zip(slices, axes.shape, strict=True)
                total += math.prod(len(range(length)[part]) for part, length in parts)
        return total

    def extract(self, state_dict: dict[str, Tensor], choice: Choice) -> dict[str, Tensor]:
        """The weights of a network by itself, out of those of a supernet; copies.

        Every tensor is the first part of the supernet's, in every dimension.
        """
        return {
            own_name: state_dict[name][slices].clone()
            for name, own_name, slices in self.slices(choice)
        }

    @torch.no_grad()
    def sort_channels(self, model: nn.Module) -> None:
        """Put the important channels first, which leaves what a model computes as it is.

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
    """The model of a config with the options of one of its space's networks."""
    own = Config(dict(model=copy.deepcopy(config.model)))
    own.merge_from_dict(options)
    return MODELS.build(own.model)


def layer_of(name: str) -> str:
    """The layer of a tensor: a convolution together with its norm."""
    return re.sub(r'(\.conv|\.norm|\.[bgil]n)?\.[^.]+$', '', name)


def renamed(name: str, choice: Choice) -> str | None:
    """A tensor's name in a network by itself, or None where the network has no such tensor."""
    match = BLOCK_KEY.fullmatch(name)
    if not match or match[2] is None:
        return name
    stage, block, rest = int(match[1]), int(match[2]), match[3]
    blocks = choice.blocks(stage)
    if block not in blocks:
        return None
    if rest.startswith(OF_ATTENTION) and block not in choice.attending_blocks(stage):
        return None
    return f'backbone.stages.{stage}.blocks.{blocks.index(block)}.{rest}'


class ElasticConv2d(nn.Conv2d):
    """A convolution with the first of its weights: all inputs there are, ``width`` outputs."""

    width: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        inputs = x.shape[1]
        is_depthwise = self.groups > 1
        outputs = inputs if is_depthwise else self.width
        bias = None if self.bias is None else self.bias[:outputs]
        weight, groups = self.weight[:outputs, :inputs], inputs if is_depthwise else 1
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, groups)


class ElasticBatchNorm(nn.BatchNorm2d):
    """A BatchNorm of as many channels as there are, with the statistics of all processes' batches.

    Running statistics move only where ``tracks`` is True: every network has others, and these are
    the largest one's.
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
    """BatchNorm over the batches of all processes, which are taken to be equally large.

    torch's SyncBatchNorm does the same, on GPUs alone.
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
    """The mean of the tensors of all processes, as that of all gradients is its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        all_reduce(x, op='mean')
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return MeanOverProcesses.apply(gradient)


class ElasticLayerScale(LayerScale):
    """A layer scale of as many channels as there are."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma[: x.shape[1], None, None]


class ElasticBlock(Block):
    """A block that can be left out, as can its attention."""

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

    Modules change their classes, so that the keys of its state_dict stay what they are. Raises
    ConfigError where a layer cannot be sliced.
    """
    if not isinstance(model.backbone, EfficientFormerV2) or model.backbone.deployed:
        raise ConfigError('a supernet is made of an EfficientFormerV2 that is not yet deployed')
    elastic = {layer_of(name) for name, axes in layout.tensors.items() if any(axes.groups)}
    for name, module in model.named_modules():
        own_parameters = list(module.parameters(recurse=False))
        if isinstance(module, Block):
            module.__class__ = ElasticBlock
        elif isinstance(module, LayerScale):
            module.__class__ = ElasticLayerScale
        elif isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
            if module.momentum is None or not (module.affine and module.track_running_stats):
                raise ConfigError(
                    f'{name} cannot be sliced: that needs a momentum, affine=True and statistics'
                )
            # All of them, since every network has other statistics behind what it shares, too.
            module.__class__ = ElasticBatchNorm
        elif layer_of(f'{name}.weight') not in elastic or not own_parameters:
            continue
        elif type(module) in (nn.Conv2d, Conv2d):
            module.__class__ = ElasticConv2d
        else:
            raise ConfigError(
                f'{name} is a {type(module).__name__}, whose channels cannot be sliced: use '
                "norm_cfg=dict(type='BN') in backbone, neck and head"
            )
    set_choice(model, layout, layout.space.largest)
    return model


def set_choice(model: nn.Module, layout: Layout, choice: Choice) -> None:
    """Let an elastic model compute the network of a choice from now on.

    Stochastic depth and running statistics are the largest network's alone.
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
