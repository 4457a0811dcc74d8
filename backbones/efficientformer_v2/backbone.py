"""EfficientFormerV2 as a backbone for dense prediction.

Li et al., "Rethinking Vision Transformers for MobileNet Size and Speed", ICCV 2023,
arXiv 2212.08059.
"""

from collections.abc import Sequence
from typing import Any

import torch
from mmcv.cnn.bricks import DropPath
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from backbones.errors import CheckpointError, first_of

from .attention import DownsamplingAttention, TalkingHeadAttention
from .checkpoint_keys import adapt_state_dict
from .cpu import FusedConv, can_use_onednn, in_strips
from .fold import can_fold, fold_norm, fold_scale
from .layers import (
    ConvNorm,
    Downsample,
    FeedForward,
    LayerScale,
    Stem,
    add,
    is_compiling,
    memory_format_of,
)
from .position_bias import BIAS_RESIZE_MODES

# One row for each network of the family; sequences have an entry for each of the four stages, and
# `mlp_ratios` (hidden channels over channels) a number for each block. `num_attention_blocks` says
# how many blocks at the end of stages 3 and 4 have attention: one number for both, or a pair.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    's0': dict(
        channels=(32, 48, 96, 176),
        depths=(2, 2, 6, 4),
        num_attention_blocks=2,
        mlp_ratios=((4, 4), (4, 4), (4, 3, 3, 3, 4, 4), (4, 3, 3, 4)),
        drop_path_rate=0.0,
    ),
    's1': dict(
        channels=(32, 48, 120, 224),
        depths=(3, 3, 9, 6),
        num_attention_blocks=2,
        mlp_ratios=((4, 4, 4), (4, 4, 4), (4, 4, 3, 3, 3, 3, 4, 4, 4), (4, 4, 3, 3, 4, 4)),
        drop_path_rate=0.0,
    ),
    's2': dict(
        channels=(32, 64, 144, 288),
        depths=(4, 4, 12, 8),
        num_attention_blocks=4,
        mlp_ratios=((4,) * 4, (4,) * 4, (4, 4, *[3] * 6, *[4] * 4), (4, 4, *[3] * 4, 4, 4)),
        drop_path_rate=0.02,
    ),
    'l': dict(
        channels=(40, 80, 192, 384),
        depths=(5, 5, 15, 10),
        num_attention_blocks=6,
        mlp_ratios=(
            (4,) * 5,
            (4,) * 5,
            (4, 4, 4, 4, 3, 3, 3, 3, 3, 3, 3, 4, 4, 4, 4),
            (4, 4, 4, 3, 3, 3, 3, 4, 4, 4),
        ),
        drop_path_rate=0.1,
    ),
}
NUM_STAGES = 4


@MODELS.register_module()
class EfficientFormerV2(BaseModule):
    """EfficientFormerV2 with feature maps at strides 4, 8, 16 and 32.

    Images may have any height and width; every stride of 2 gives ceil(size / 2). Checkpoints
    of the authors, of timm and of this class can be loaded, see :mod:`.checkpoint_keys`.

    Args:
        arch: 's0', 's1', 's2', 'l', or a dict with the keys of a row of ``ARCHITECTURES``.
            Default: 's0'.
        out_indices: Stages (0 to 3, rising) whose feature maps are returned. Stages after the
            last of them are not built. Default: all.
        pretrain_img_size: Image size of pre-training, one number or (height, width). It sets the
            token grids of the tables of relative position bias. Default: 224 (ImageNet).
        bias_resize: How these tables are resized to other grids: 'offset' (default), or 'matrix'
            for the authors' own COCO and ADE20K models, see
            :class:`.position_bias.RelativePositionBias`.
        drop_path_rate: Stochastic depth rate of the last block; the rates rise linearly from 0
            at the first. Default: the architecture's own.
        layer_scale_init_value: Initial value of the layer scales. Default: 1e-5.
        norm_cfg: Config of the norms, as in mmcv. Default: ``dict(type='BN')``.
        frozen_stages: Stages to freeze (no gradient, evaluation mode): -1 none, 0 the stem,
            n from 1 to 4 the stem and the first n stages. Default: -1.
        norm_eval: Keep BatchNorms in evaluation mode while training. Default: False.
        with_cp: Recompute the blocks' activations in the backward pass instead of storing them,
            which saves memory and costs time. As in mmdet's ResNet, BatchNorms in training mode
            then count every batch twice. Default: False.
        in_channels: Channels of the image; weights for RGB are adapted to them. Default: 3.
        init_cfg: mmengine's initialization; ``dict(type='Pretrained', checkpoint=...)`` loads
            weights. Default: None.

    Raises:
        ValueError: An argument is not allowed; the message says which values are.
    """

    def __init__(
        self,
        arch: str | dict = 's0',
        out_indices: Sequence[int] = (0, 1, 2, 3),
        pretrain_img_size: int | tuple[int, int] = 224,
        bias_resize: str = 'offset',
        drop_path_rate: float | None = None,
        layer_scale_init_value: float = 1e-5,
        norm_cfg: dict | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        in_channels: int = 3,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        arch = resolve_architecture(arch)
        self.out_indices = check_out_indices(out_indices)
        if bias_resize not in BIAS_RESIZE_MODES:
            raise ValueError(f'bias_resize must be in {BIAS_RESIZE_MODES}, not {bias_resize!r}')
        if frozen_stages not in range(-1, NUM_STAGES + 1):
            raise ValueError(f'frozen_stages must be -1 to {NUM_STAGES}, not {frozen_stages!r}')
        if drop_path_rate is None:
            drop_path_rate = arch['drop_path_rate']
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f'drop_path_rate must be 0 or more, below 1, not {drop_path_rate!r}')
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.with_cp = with_cp
        self.deployed = False
        channels, depths = arch['channels'], arch['depths']
        drop_path_rates = torch.linspace(0, drop_path_rate, sum(depths), device='cpu').tolist()
        shared = dict(
            grids=token_grids(pretrain_img_size),
            bias_resize=bias_resize,
            layer_scale_init_value=layer_scale_init_value,
            norm_cfg=norm_cfg or dict(type='BN'),
            with_cp=with_cp,
        )

        self.stem = Stem(in_channels, channels[0], shared['norm_cfg'])
        self.stages = nn.ModuleList()
        for index in range(self.out_indices[-1] + 1):
            first = sum(depths[:index])
            self.stages.append(
                Stage(
                    index=index,
                    in_channels=channels[max(index - 1, 0)],
                    channels=channels[index],
                    mlp_ratios=arch['mlp_ratios'][index],
                    num_attention_blocks=(0, 0, *arch['num_attention_blocks'])[index],
                    drop_path_rates=drop_path_rates[first : first + depths[index]],
                    **shared,
                )
            )
        self._freeze_stages()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the feature maps of the stages in ``out_indices`` for images (batch, C, H, W).

        Each is (batch, channels, ceil(H / s), ceil(W / s)) with its stage's channels and stride s
        of 4, 8, 16 or 32. The maps are in channels last if x is, else contiguous.
        """
        memory_format = memory_format_of(x)
        # CPUs and CUDA GPUs convolve fastest in this format; BatchNorm in training is slower in it.
        if self.deployed and x.device.type in ('cpu', 'cuda') and not is_compiling():
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.stem(x)
        features = []
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index in self.out_indices:
                # Attention returns other formats, which mmcv's RoIAlign would read as contiguous.
                features.append(x.contiguous(memory_format=memory_format))
        return tuple(features)

    def switch_to_deploy(self) -> None:
        """Prepare for inference, which cannot be undone: load the weights first.

        Folds BatchNorms and layer scales into convolutions; other norms stay. The features are the
        same up to rounding. For a whole model see :func:`backbones.deploy.switch_to_deploy`.
        """
        if self.deployed:
            return
        self.eval()
        for parent in list(self.modules()):
            for name, child in parent.named_children():
                if isinstance(child, ConvNorm) and can_fold(child.conv, child.norm):
                    setattr(parent, name, FusedConv(fold_norm(child.conv, child.norm)))
        for module in list(self.modules()):
            if module is not self and hasattr(module, 'switch_to_deploy'):
                module.switch_to_deploy()
        if next(self.parameters()).is_cuda:
            # As the images in forward(), or the weights would be reordered at every call.
            self.to(memory_format=torch.channels_last)
        self.deployed = True

    def train(self, mode: bool = True) -> 'EfficientFormerV2':
        """Switch between training and evaluation; frozen stages and norms stay in evaluation."""
        if mode and self.deployed:
            raise RuntimeError(
                'switch_to_deploy() was called for this backbone: its norms are folded into the '
                'convolutions, so it cannot be trained. Build a new backbone for training'
            )
        super().train(mode)
        self._freeze_stages()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args, **kwargs) -> None:
        keys = {key[len(prefix) :] for key in state_dict if key.startswith(prefix)}
        if not self.deployed:
            adapt_state_dict(state_dict, prefix, self.state_dict())
        elif differing := sorted(keys ^ set(self.state_dict())):
            raise CheckpointError(
                'switch_to_deploy() was already called for this backbone, and the checkpoint was '
                'saved before it or has another architecture: load the checkpoint first. '
                f'Keys that only one of them has: {first_of(differing)}'
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _freeze_stages(self) -> None:
        if self.frozen_stages < 0:
            return
        for module in (self.stem, *self.stages[: self.frozen_stages]):
            module.eval()
            module.requires_grad_(False)


class Stage(nn.Module):
    """A stage: downsampling (from the second stage on), then blocks at one resolution."""

    def __init__(
        self,
        index: int,
        in_channels: int,
        channels: int,
        mlp_ratios: Sequence[float],
        num_attention_blocks: int,
        grids: Sequence[tuple[int, int]],
        bias_resize: str,
        drop_path_rates: Sequence[float],
        layer_scale_init_value: float,
        norm_cfg: dict,
        with_cp: bool,
    ) -> None:
        super().__init__()
        self.with_cp = with_cp
        self.downsample = None
        if index > 0:
            attention = None
            if index == 3:
                attention = DownsamplingAttention(
                    in_channels, channels, grids[2], bias_resize, norm_cfg
                )
            self.downsample = Downsample(in_channels, channels, norm_cfg, attention)
        # Stage 3 attends at stage 4's resolution: the cost is quadratic in the number of tokens.
        stride = 2 if index == 2 else 1
        first_with_attention = len(mlp_ratios) - num_attention_blocks
        self.blocks = nn.ModuleList()
        for position, (ratio, rate) in enumerate(zip(mlp_ratios, drop_path_rates, strict=True)):
            mixer = None
            if position >= first_with_attention:
                mixer = TalkingHeadAttention(channels, stride, grids[3], bias_resize, norm_cfg)
            block = Block(channels, ratio, mixer, rate, layer_scale_init_value, norm_cfg)
            self.blocks.append(block)

    def forward(self, x: Tensor) -> Tensor:
        if self.downsample is not None:
            x = self.downsample(x)
        for block in self.blocks:
            if self.with_cp and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


class Block(nn.Module):
    """Attention if the block has it, then feed-forward, each scaled and added to its input."""

    def __init__(
        self,
        channels: int,
        mlp_ratio: float,
        token_mixer: TalkingHeadAttention | None,
        drop_path_rate: float,
        layer_scale_init_value: float,
        norm_cfg: dict,
    ) -> None:
        super().__init__()
        self.token_mixer = token_mixer
        if token_mixer is not None:
            self.layer_scale_1 = LayerScale(channels, layer_scale_init_value)
        self.mlp = FeedForward(channels, mlp_ratio, norm_cfg)
        self.layer_scale_2 = LayerScale(channels, layer_scale_init_value)
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()
        self.feed_forward_is_local = False

    def forward(self, x: Tensor) -> Tensor:
        if self.token_mixer is not None:
            x = add(self.drop_path(self.layer_scale_1(self.token_mixer(x))), x)
        if self.feed_forward_is_local and can_use_onednn(x):
            return in_strips(self.feed_forward, x, self.mlp.mid.out_channels)
        return self.feed_forward(x)

    def feed_forward(self, x: Tensor) -> Tensor:
        return add(self.drop_path(self.layer_scale_2(self.mlp(x))), x)

    def switch_to_deploy(self) -> None:
        """Fold the layer scales into the convolutions before them and remove stochastic depth."""
        self.drop_path = nn.Identity()
        if self.token_mixer is not None and fold_scale(self.token_mixer.proj, self.layer_scale_1):
            self.layer_scale_1 = nn.Identity()
        if fold_scale(self.mlp.fc2, self.layer_scale_2):
            self.layer_scale_2 = nn.Identity()
        # Norms that are not folded may need all pixels, as GroupNorm does.
        self.feed_forward_is_local = not any(isinstance(m, ConvNorm) for m in self.mlp.modules())


def resolve_architecture(arch: str | dict) -> dict:
    """Return a checked row of ``ARCHITECTURES`` with ``num_attention_blocks`` as a pair."""
    keys = set(ARCHITECTURES['s0'])
    if isinstance(arch, str):
        arch = ARCHITECTURES.get(arch, arch)
    if not isinstance(arch, dict) or set(arch) != keys:
        raise ValueError(
            f'arch must be in {list(ARCHITECTURES)} or a dict with exactly the keys '
            f'{sorted(keys)}, not {arch!r}'
        )
    for key in ('channels', 'depths', 'mlp_ratios'):
        if not isinstance(arch[key], Sequence) or len(arch[key]) != NUM_STAGES:
            raise ValueError(f'arch[{key!r}] needs an entry for each of {NUM_STAGES} stages')
    depths = arch['depths']
    for stage, (depth, ratios) in enumerate(zip(depths, arch['mlp_ratios'], strict=True)):
        if depth < 1 or not isinstance(ratios, Sequence) or len(ratios) != depth:
            raise ValueError(
                f"arch['mlp_ratios'][{stage}] needs a number for each block of the stage "
                f"(arch['depths'][{stage}] is {depth}), but is {ratios!r}"
            )
    given = arch['num_attention_blocks']
    numbers = (given, given) if isinstance(given, int) else tuple(given)
    if len(numbers) != 2 or any(not 0 <= n <= d for n, d in zip(numbers, depths[2:], strict=True)):
        raise ValueError(
            "arch['num_attention_blocks'] must be a number, or a pair for stages 3 and 4, from 0 "
            f'to their depths {tuple(depths[2:])}, not {given!r}'
        )
    return {**arch, 'num_attention_blocks': numbers}


def check_out_indices(out_indices: Sequence[int]) -> tuple[int, ...]:
    """Check ``out_indices`` and return it as a tuple."""
    indices = tuple(out_indices) if isinstance(out_indices, Sequence) else ()
    stages = tuple(range(NUM_STAGES))
    if not indices or indices != tuple(stage for stage in stages if stage in indices):
        raise ValueError(
            f'out_indices must be a rising sequence of stages in {stages}, not {out_indices!r}'
        )
    return indices


def token_grids(img_size: int | tuple[int, int]) -> list[tuple[int, int]]:
    """Return the height and width of each stage's output for a checked image size."""
    size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(size) != 2 or any(not isinstance(side, int) or side < 1 for side in size):
        raise ValueError(
            f'pretrain_img_size must be a positive int or a (height, width), not {img_size!r}'
        )
    return [(-(-size[0] // stride), -(-size[1] // stride)) for stride in (4, 8, 16, 32)]
