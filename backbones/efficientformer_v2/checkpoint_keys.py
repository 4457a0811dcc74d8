"""Conversion of published checkpoint layouts of EfficientFormerV2 to this package's layout.

| layout  | recognized by             | found in                                                |
| ------- | ------------------------- | ------------------------------------------------------- |
| snap    | ``patch_embed.0.weight``  | the authors' ImageNet ``.pth`` (under ``model``), and   |
|         |                           | their COCO and ADE20K models (under ``backbone.``)      |
| timm    | ``stem.conv1.bn.weight``  | ``timm/efficientformerv2_*`` on the Hugging Face hub    |
| own     | ``stem.conv1.norm.weight``| what this package saves                                 |
"""

import re
from collections.abc import Mapping, MutableMapping

from torch import Tensor

from backbones.errors import CheckpointError, first_of

# (pattern, replacement), applied in this order to every key.
RENAMING = {
    'timm': (
        # timm names stages so with features_only=True.
        (r'^stages_', 'stages.'),
        (r'\.bn\.', '.norm.'),
        (r'\.ls([12])\.gamma$', r'.layer_scale_\1.gamma'),
        (r'\.q\.local\.', '.q_local.'),
        (r'\.q\.proj\.', '.q.'),
        (r'\.attention_biases$', '.relative_position_bias.table'),
    ),
    'snap': (
        (r'^patch_embed\.0\.', 'stem.conv1.conv.'),
        (r'^patch_embed\.1\.', 'stem.conv1.norm.'),
        (r'^patch_embed\.3\.', 'stem.conv2.conv.'),
        (r'^patch_embed\.4\.', 'stem.conv2.norm.'),
        # The authors' list of modules has stages at even and downsampling at odd indices.
        (r'^network\.([0246])\.', lambda m: f'stages.{int(m[1]) // 2}.blocks.'),
        (r'^network\.([135])\.', lambda m: f'stages.{int(m[1]) // 2 + 1}.downsample.'),
        (r'\.downsample\.(proj|conv)\.', '.downsample.conv.conv.'),
        (r'\.downsample\.(norm|bn)\.', '.downsample.conv.norm.'),
        (r'\.mlp\.(fc1|mid|fc2)\.', r'.mlp.\1.conv.'),
        (r'\.mlp\.norm([12])\.', r'.mlp.fc\1.norm.'),
        (r'\.mlp\.mid_norm\.', '.mlp.mid.norm.'),
        (r'\.layer_scale_([12])$', r'.layer_scale_\1.gamma'),
        (r'\.q\.local\.0\.', '.q_local.'),
        (r'\.q\.proj\.', '.q.'),
        (r'\.(q|k|v|v_local|stride_conv)\.0\.', r'.\1.conv.'),
        (r'\.(q|k|v|v_local|stride_conv)\.1\.', r'.\1.norm.'),
        (r'\.proj\.1\.', '.proj.conv.'),
        (r'\.proj\.2\.', '.proj.norm.'),
        (r'\.attention_biases(_seg)?$', '.relative_position_bias.table'),
    ),
}

# Tensors of the other layouts that are not loaded, by reason.
LEFT_OUT = {
    'the ImageNet classifier': r'^(norm|head|dist_head|head_dist)\.',
    'index tables, which are computed for each image here': r'\.attention_bias_idxs(_seg)?$',
}
SUPERSEDED = "bias tables of ImageNet's size, beside those for dense prediction"

# Keys under which published files have their tensors, and the prefix of a whole model's backbone.
WRAPPERS = ('state_dict', 'model')
PREFIX = 'backbone.'
STEM = 'stem.conv1.conv.weight'


def adapt_state_dict(
    state_dict: MutableMapping, prefix: str, expected: Mapping[str, Tensor]
) -> None:
    """Convert the tensors under ``prefix`` from any known layout to this package's, in place.

    Raises CheckpointError if an ``expected`` tensor is missing, has another shape or contains NaN.
    """
    given = {
        key[len(prefix) :]: state_dict.pop(key)
        for key in list(state_dict)
        if key.startswith(prefix)
    }
    tensors = tensors_of(given)
    inside = {k.removeprefix(PREFIX): v for k, v in tensors.items() if k.startswith(PREFIX)}
    tensors = to_own_layout(inside or tensors)
    if STEM in tensors:
        tensors[STEM] = spread_rgb(tensors[STEM], expected[STEM].shape[1])
    check_complete(tensors, expected, given)
    built = {key.split('.')[1] for key in expected if key.startswith('stages.')}
    for key, tensor in tensors.items():
        stage = key.split('.')[1] if key.startswith('stages.') else None
        if stage is None or stage in built:
            state_dict[prefix + key] = tensor


def spread_rgb(weight: Tensor, channels: int) -> Tensor:
    """Adapt the first convolution's weight for RGB to other numbers of channels, as timm does."""
    if weight.shape[1:2] != (3,) or channels == 3:
        return weight
    if channels == 1:
        return weight.sum(1, keepdim=True)
    return weight[:, [index % 3 for index in range(channels)]] * (3 / channels)


def tensors_of(checkpoint: object) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name, without the keys that wrap them."""
    if not isinstance(checkpoint, Mapping):
        return {}
    for wrapper in WRAPPERS:
        if isinstance(checkpoint.get(wrapper), Mapping):
            return tensors_of(checkpoint[wrapper])
    return {
        # Models wrapped for distributed training are saved under 'module.'.
        key.removeprefix('module.'): value
        for key, value in checkpoint.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }


def check_nan(tensors: Mapping[str, Tensor], source: str = 'the checkpoint') -> None:
    """Raise CheckpointError if weights contain NaN, as after a training that diverged."""
    nan = [
        key
        for key, tensor in tensors.items()
        if tensor.is_floating_point() and not tensor.is_meta and tensor.isnan().any()
    ]
    if nan:
        raise CheckpointError(
            f'{len(nan)} of {len(tensors)} tensors of {source} contain NaN, as after a training '
            f'that diverged: {first_of(nan)}'
        )


def layout_of(tensors: Mapping) -> str | None:
    """Return 'snap', 'timm' or 'own', or None if the layout is unknown."""
    marks = {
        'snap': 'patch_embed.0.weight',
        'timm': 'stem.conv1.bn.weight',
        'own': 'stem.conv1.norm.weight',
    }
    return next((layout for layout, mark in marks.items() if mark in tensors), None)


def to_own_layout(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a backbone's tensors and drop unused ones; an unknown layout stays as it is."""
    layout = layout_of(tensors)
    if layout in (None, 'own'):
        return dict(tensors)
    renamed = {}
    for key, tensor in tensors.items():
        if reason_left_out(key, tensors):
            continue
        for pattern, replacement in RENAMING[layout]:
            key = re.sub(pattern, replacement, key)
        if key.endswith('.gamma'):
            tensor = tensor.flatten()
        elif key.endswith('.table'):
            # (num_heads, side * side), as published, to (num_heads, side, side).
            side = round(tensor.shape[1] ** 0.5)
            tensor = tensor.view(len(tensor), side, side)
        renamed[key] = tensor
    return renamed


def reason_left_out(key: str, tensors: Mapping[str, Tensor]) -> str | None:
    """Return why a tensor of a published backbone is not loaded, or None if it is."""
    for reason, pattern in LEFT_OUT.items():
        if re.search(pattern, key):
            return reason
    # The COCO and ADE20K files also have an unused table of zeros in ImageNet's size.
    return SUPERSEDED if f'{key}_seg' in tensors else None


def check_complete(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], given: Mapping
) -> None:
    """Raise CheckpointError if a checkpoint does not set all of the backbone, or has NaN."""
    # Older files lack BatchNorm's counter, which is not needed.
    needed = [key for key in expected if not key.endswith('num_batches_tracked')]
    missing = [key for key in needed if key not in tensors]
    mismatched = [
        f'{key} {tuple(tensors[key].shape)} instead of {tuple(expected[key].shape)}'
        for key in needed
        if key in tensors and not fits(key, tensors[key], expected[key])
    ]
    if mismatched:
        raise CheckpointError(
            f'the checkpoint is of another architecture: it has {describe(tensors)}, the backbone '
            f'has {describe(expected)}. Shapes that differ: {first_of(mismatched)}'
        )
    if missing:
        raise CheckpointError(
            f'the checkpoint lacks {len(missing)} of the {len(needed)} tensors of the backbone: '
            f'{first_of(missing)}; it has {first_of(list(given))}'
        )
    check_nan({key: tensors[key] for key in needed})


def fits(key: str, tensor: Tensor, expected: Tensor) -> bool:
    """Return whether a tensor can be loaded; bias tables are resized, so only heads must agree."""
    if key.endswith('relative_position_bias.table'):
        return tensor.dim() == 3 and len(tensor) == len(expected)
    return tensor.shape == expected.shape


def describe(tensors: Mapping[str, Tensor]) -> str:
    """Describe the channels and blocks of each stage, from tensors in this package's layout."""
    channels, depths = {}, {}
    for key, tensor in tensors.items():
        match = re.match(r'stages\.(\d+)\.blocks\.(\d+)\.mlp\.fc2\.conv\.weight$', key)
        if match:
            stage, block = int(match[1]), int(match[2])
            channels[stage] = tensor.shape[0]
            depths[stage] = max(block + 1, depths.get(stage, 0))
    return f'channels {list(channels.values())} and depths {list(depths.values())}'
