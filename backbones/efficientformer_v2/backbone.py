"""EfficientFormerV2 as a backbone for dense prediction.

Li et al., "Rethinking Vision Transformers for MobileNet Size and Speed", ICCV 2023,
arXiv 2212.08059.
"""

from collections.abc import Sequence

import torch
from mmcv.cnn.bricks import DropPath
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from backbones.errors import CheckpointError

from .attention import DownsamplingAttention, TalkingHeadAttention
from .checkpoint_keys import adapt_state_dict, enumerate_keys
from .cpu import FusedConv, add, can_use_onednn, in_strips, is_compiling
from .fold import can_fold, fold_norm, scale_channels
from .layers import ConvNorm, FeedForward, LayerScale, Stem
from .position_bias import BIAS_RESIZE_MODES

# One row for each network of the family; every sequence has an entry for each of the four stages.
# `mlp_ratios` has one number for each block, `num_attention_blocks` says how many of the last
# blocks of stages 3 and 4 have attention.
ARCHITECTURES = {
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
        mlp_ratios=((4,) * 3, (4,) * 3, (4, 4, 3, 3, 3, 3, 4, 4, 4), (4, 4, 3, 3, 4, 4)),
        drop_path_rate=0.0,
    ),
    's2': dict(
        channels=(32, 64, 144, 288),
        depths=(4, 4, 12, 8),
        num_attention_blocks=4,
        mlp_ratios=(
            (4,) * 4,
            (4,) * 4,
            (4, 4, 3, 3, 3, 3, 3, 3, 4, 4, 4, 4),
            (4, 4, 3, 3, 3, 3, 4, 4),
        ),
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

    Takes pictures of any height and width; every stride of 2 gives ceil(size / 2). Checkpoints
    of the authors, of timm and of this class all load, see :mod:`.checkpoint_keys`.

    Args:
        arch: 's0', 's1', 's2', 'l', or a dict in the shape of a row of ``ARCHITECTURES``.
            Default: 's0'.
        out_indices: Stages (0 to 3, rising) whose feature maps are returned. Later stages than
            the last of them are not built. Default: all.
        pretrain_img_size: Picture size, one number or (height, width), whose token grids the
            tables of the relative position bias are laid out for. Default: 224 (ImageNet).
        bias_resize: How these tables are carried over to other grids: 'offset' (default), or
            'matrix' for the authors' own COCO and ADE20K models, see
            :class:`backbones.efficientformer_v2.position_bias.RelativePositionBias`.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0.
            Default: the architecture's own.
        layer_scale_init_value: What the layer scales start from. Default: 1e-5.
        norm_cfg: Normalisation layers in mmcv's notation. Default: ``dict(type='BN')``.
        frozen_stages: Stages to freeze (no gradient, evaluation mode): -1 none, 0 the stem,
            1 to 4 the stem and as many stages. Default: -1.
        norm_eval: Keep the BatchNorms' running statistics while training. Default: False.
        with_cp: Recompute the blocks in the backward pass instead of keeping what is inside
            them, which saves memory and costs time. Default: False.
        init_cfg: mmengine's initialisation; ``dict(type='Pretrained', checkpoint=...)`` loads
            weights. Default: None.

    Raises:
        ValueError: An argument is not one of what is allowed; the message names that.
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
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        arch = resolve_architecture(arch)
        self.out_indices = checked_out_indices(out_indices)
        if bias_resize not in BIAS_RESIZE_MODES:
            raise ValueError(f'bias_resize is one of {BIAS_RESIZE_MODES}, not {bias_resize!r}')
        if frozen_stages not in range(-1, NUM_STAGES + 1):
            raise ValueError(f'frozen_stages is from -1 to {NUM_STAGES}, not {frozen_stages!r}')
        if drop_path_rate is None:
            drop_path_rate = arch['drop_path_rate']
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f'drop_path_rate is at least 0 and below 1, not {drop_path_rate!r}')
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.with_cp = with_cp
        self.deployed = False
        norm_cfg = norm_cfg or dict(type='BN')
        channels = arch['channels']
        grids = token_grids(pretrain_img_size)
        drop_path_rates = torch.linspace(
            0, drop_path_rate, sum(arch['depths']), device='cpu'
        ).tolist()

        self.stem = Stem(channels[0], norm_cfg)
        self.stages = nn.ModuleList()
        for index in range(self.out_indices[-1] + 1):
            first = sum(arch['depths'][:index])
            self.stages.append(
                Stage(
                    index=index,
                    in_channels=channels[max(index - 1, 0)],
                    channels=channels[index],
                    mlp_ratios=arch['mlp_ratios'][index],
                    num_attention_blocks=arch['num_attention_blocks'],
                    grids=grids,
                    bias_resize=bias_resize,
                    drop_path_rates=drop_path_rates[first : first + arch['depths'][index]],
                    layer_scale_init_value=layer_scale_init_value,
                    norm_cfg=norm_cfg,
                    with_cp=with_cp,
                )
            )
        self._freeze_stages()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Feature maps of the stages in ``out_indices``.

        Args:
            x: Pictures, (batch, 3, height, width).

        Returns:
            For stage i a map (batch, channels[i], ceil(height / s), ceil(width / s)) with
            s = 4, 8, 16, 32 for i = 0, 1, 2, 3, in channels last if x is so, else contiguous.
        """
        memory_format = memory_format_of(x)
        # Channels last is how a CPU convolves fastest; others choose by themselves.
        if self.deployed and x.device.type == 'cpu' and not is_compiling():
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.stem(x)
        features = []
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index in self.out_indices:
                # Attention leaves other formats, which mmcv's RoIAlign would read as contiguous.
                features.append(x.contiguous(memory_format=memory_format))
        return tuple(features)

    def switch_to_deploy(self) -> None:
        """Fold what inference does not need into the convolutions; there is no way back.

        BatchNorms and layer scales become part of the convolutions before them, the projections
        to queries, keys and values one convolution, and stochastic depth goes. Other norms than
        BatchNorm stay. The features remain the same up to rounding. For a whole detector or
        segmentor see :func:`backbones.deploy.switch_to_deploy`.
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
        self.deployed = True

    def train(self, mode: bool = True) -> 'EfficientFormerV2':
        """Switch between training and evaluation; frozen stages and norms stay in evaluation.

        Raises:
            RuntimeError: Training is asked for after :meth:`switch_to_deploy`.
        """
        if mode and self.deployed:
            raise RuntimeError(
                'the backbone was switched to inference for good: its norms are folded into the '
                'convolutions. Train one for which switch_to_deploy() was not called'
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
        if self.deployed:
            self._check_deployed(keys)
        elif 'stem.conv1.weight' in keys:
            raise CheckpointError(
                'the checkpoint was saved after switch_to_deploy(): call it on the model before '
                'loading, or load the checkpoint that was trained'
            )
        else:
            adapt_state_dict(state_dict, prefix, self.state_dict())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _check_deployed(self, keys: set[str]) -> None:
        differing = sorted(keys ^ set(self.state_dict()))
        if differing:
            raise CheckpointError(
                'the backbone was switched by switch_to_deploy() already, and the checkpoint is '
                'of one that was not, or of another architecture: load the checkpoint first. '
                f'Keys that only one of the two has: {enumerate_keys(differing)}'
            )

    def _freeze_stages(self) -> None:
        if self.frozen_stages < 0:
            return
        for module in (self.stem, *self.stages[: self.frozen_stages]):
            module.eval()
            module.requires_grad_(False)


class Stage(nn.Module):
    """A stage: downsampling (from the second stage on), then blocks of one size.

    Args:
        index: Which stage, 0 to 3.
        in_channels: Channels of the input.
        channels: Channels of the output.
        mlp_ratios: Expansion ratio of each block's feed-forward.
        num_attention_blocks: How many of the last blocks have attention, in the third and
            fourth stage.
        grids: For each stage, the token grid (height, width) of its output that bias tables
            are laid out for.
        bias_resize: 'offset' or 'matrix'.
        drop_path_rates: Stochastic depth of each block.
        layer_scale_init_value: What the layer scales start from.
        norm_cfg: Normalisation layers in mmcv's notation.
        with_cp: Recompute the blocks in the backward pass.
    """

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
            attention = (
                DownsamplingAttention(in_channels, channels, grids[2], bias_resize, norm_cfg)
                if index == 3
                else None
            )
            self.downsample = Downsample(in_channels, channels, norm_cfg, attention)
        first_with_attention = len(mlp_ratios) - (num_attention_blocks if index >= 2 else 0)
        self.blocks = nn.ModuleList()
        for position, (mlp_ratio, drop_path_rate) in enumerate(
            zip(mlp_ratios, drop_path_rates, strict=True)
        ):
            token_mixer = None
            if position >= first_with_attention:
                # Stage 3 attends at the fourth stage's size, which is what makes it affordable.
                stride = 2 if index == 2 else 1
                token_mixer = TalkingHeadAttention(
                    channels, stride, grids[3], bias_resize, norm_cfg
                )
            self.blocks.append(
                Block(
                    channels,
                    mlp_ratio,
                    token_mixer,
                    drop_path_rate,
                    layer_scale_init_value,
                    norm_cfg,
                )
            )

    def forward(self, x: Tensor) -> Tensor:
        if self.downsample is not None:
            x = self.downsample(x)
        for block in self.blocks:
            if self.with_cp and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


class Downsample(nn.Module):
    """3x3 convolution of stride 2, with attention added where there is one.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output, which has half the height and width.
        norm_cfg: Normalisation layer in mmcv's notation.
        attention: Attention with an output of the same shape, or None.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm_cfg: dict,
        attention: DownsamplingAttention | None,
    ) -> None:
        super().__init__()
        self.conv = ConvNorm(in_channels, out_channels, 3, norm_cfg, stride=2)
        self.attn = attention

    def forward(self, x: Tensor) -> Tensor:
        if self.attn is None:
            return self.conv(x)
        return add(self.conv(x), self.attn(x))


class Block(nn.Module):
    """Attention where there is one, then feed-forward, each scaled and added to its input.

    Args:
        channels: Channels of input and output.
        mlp_ratio: Expansion ratio of the feed-forward.
        token_mixer: Attention, or None.
        drop_path_rate: How often a sample skips a part while training, 0 to 1.
        layer_scale_init_value: What the layer scales start from.
        norm_cfg: Normalisation layers in mmcv's notation.
    """

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
        """Fold the layer scales into what they scale, drop what only training needs."""
        self.drop_path = nn.Identity()
        if self.token_mixer is not None and fold_scale(self.token_mixer.proj, self.layer_scale_1):
            self.layer_scale_1 = nn.Identity()
        if fold_scale(self.mlp.fc2, self.layer_scale_2):
            self.layer_scale_2 = nn.Identity()
        # Norms that are left may look at all pixels.
        self.feed_forward_is_local = not any(isinstance(m, ConvNorm) for m in self.mlp.modules())


def fold_scale(layer: ConvNorm | nn.Conv2d, scale: LayerScale | nn.Identity) -> bool:
    """Let a layer's own weights do what the layer scale behind it does, if it has any."""
    affine = layer.norm if isinstance(layer, ConvNorm) else layer
    if isinstance(scale, nn.Identity) or getattr(affine, 'weight', None) is None:
        return False
    scale_channels(affine, scale.gamma)
    return True


def memory_format_of(x: Tensor) -> torch.memory_format:
    """Channels last if that is what x is in and nothing else, else contiguous."""
    is_channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if is_channels_last else torch.contiguous_format


def resolve_architecture(arch: str | dict) -> dict:
    """The row of ``ARCHITECTURES`` with that name, or the given row after a check.

    Raises:
        ValueError: No such name, a key is missing or unknown, or lengths disagree.
    """
    if isinstance(arch, str):
        if arch not in ARCHITECTURES:
            raise ValueError(
                f'arch is one of {list(ARCHITECTURES)} or a dict with the keys '
                f'{list(ARCHITECTURES["s0"])}, not {arch!r}'
            )
        return ARCHITECTURES[arch]
    expected = set(ARCHITECTURES['s0'])
    if not isinstance(arch, dict) or set(arch) != expected:
        raise ValueError(f'an arch dict has exactly the keys {sorted(expected)}, not {arch!r}')
    for key in ('channels', 'depths', 'mlp_ratios'):
        if len(arch[key]) != NUM_STAGES:
            raise ValueError(f'arch[{key!r}] has an entry for each of {NUM_STAGES} stages')
    if any(number < 2 for number in arch['channels']):
        raise ValueError(f"arch['channels'] are at least 2, not {arch['channels']}")
    for stage, (depth, ratios) in enumerate(zip(arch['depths'], arch['mlp_ratios'], strict=True)):
        if depth < 1 or len(ratios) != depth:
            raise ValueError(
                f"arch['mlp_ratios'][{stage}] has a number for each block of the stage: "
                f"arch['depths'][{stage}] is {depth}, but there are {len(ratios)}"
            )
    most = min(arch['depths'][2:])
    if not 0 <= arch['num_attention_blocks'] <= most:
        raise ValueError(
            f"arch['num_attention_blocks'] is at least 0 and at most {most}, the blocks of "
            f'stages 3 and 4, not {arch["num_attention_blocks"]}'
        )
    return arch


def checked_out_indices(out_indices: Sequence[int]) -> tuple[int, ...]:
    """``out_indices`` as a tuple.

    Raises:
        ValueError: It is empty, not rising, or names a stage that does not exist.
    """
    indices = tuple(out_indices) if isinstance(out_indices, Sequence) else ()
    allowed = tuple(range(NUM_STAGES))
    if not indices or any(i not in allowed for i in indices) or list(indices) != sorted({*indices}):
        raise ValueError(
            f'out_indices is a rising sequence of stages out of {allowed}, not {out_indices!r}'
        )
    return indices


def token_grids(img_size: int | tuple[int, int]) -> list[tuple[int, int]]:
    """Height and width of each stage's output for a picture of ``img_size``.

    Raises:
        ValueError: ``img_size`` is not a positive number or a pair of them.
    """
    size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(size) != 2 or any(not isinstance(n, int) or n < 1 for n in size):
        raise ValueError(
            f'pretrain_img_size is a positive int or a (height, width) of them, not {img_size!r}'
        )
    strides = (4, 8, 16, 32)
    return [(-(-size[0] // stride), -(-size[1] // stride)) for stride in strides]
