"""Published checkpoints of every layout, converted to what this package's own training writes.

Only the backbone is named differently in the authors' files. The names of mmdet's and mmseg's necks
and heads have stayed the same; they are compared with the model that our config builds, so that
whatever does differ is reported.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import MODELS
from torch import Tensor

from backbones.data.classes import set_num_classes
from backbones.data.config_datasets import dataset_class, datasets_of
from backbones.efficientformer_v2.backbone import ARCHITECTURES, EfficientFormerV2
from backbones.efficientformer_v2.checkpoint_keys import (
    PREFIX,
    check_complete,
    describe,
    enumerate_keys,
    layout_of,
    reason_left_out,
    tensors_of,
    to_own_layout,
)
from backbones.errors import CheckpointError

from .config import fit_to_device, load_config
from .preflight import fit_whole

# They lie in a clone and in an installed package alike.
CONFIGS = Path(__file__).parents[1] / '.mim' / 'configs'
LAYOUTS = {
    'snap': "the authors' layout",
    'timm': "timm's layout",
    'own': "this package's own layout",
}


@dataclass(frozen=True)
class Task:
    """A kind of whole model."""

    title: str
    mark: str  # a tensor that only models of this kind have
    config: str  # path of its configs, without the architecture and the suffix
    num_classes: Callable[[Mapping[str, Tensor]], int]


TASKS = {
    'retinanet': Task(
        'RetinaNet',
        'bbox_head.retina_cls.weight',
        'det_configs/retinanet_effv2_',
        # Each anchor has a score for every class, and four coordinates.
        lambda t: (
            4 * len(t['bbox_head.retina_cls.weight']) // len(t['bbox_head.retina_reg.weight'])
        ),
    ),
    'mask_rcnn': Task(
        'Mask R-CNN',
        'roi_head.mask_head.conv_logits.weight',
        'det_configs/mask_rcnn_effv2_',
        # The last score is that of the background.
        lambda t: len(t['roi_head.bbox_head.fc_cls.weight']) - 1,
    ),
    'fpn': Task(
        'Semantic FPN',
        'decode_head.scale_heads.0.0.conv.weight',
        'seg_configs/fpn_effv2_',
        lambda t: len(t['decode_head.conv_seg.weight']),
    ),
}


@dataclass
class Conversion:
    """A converted checkpoint; a backbone has no ``meta``, ``config`` and ``num_classes``."""

    layout: str  # a key of LAYOUTS
    arch: str
    task: str  # 'backbone' or a key of TASKS
    table_size: tuple[int, int]  # height and width of the images that the bias tables are for
    tensors: dict[str, Tensor]  # by the names of this package
    left_out: dict[str, list[str]]  # names of the given tensors that were not converted, by reason
    meta: dict = field(default_factory=dict)  # config, class names and colors
    config: Path | None = None  # path of the config to test with
    num_classes: int | None = None


def convert(checkpoint: dict, task: str | None = None) -> Conversion:
    """Bring what :func:`backbones.weights.read_checkpoint` returns into our layout.

    Args:
        checkpoint: Of any layout.
        task: 'backbone' leaves neck and heads out; a key of ``TASKS`` insists on such a model.
            Default: whatever the checkpoint is recognized as.

    Raises:
        CheckpointError: It holds no EfficientFormerV2, not all of it, or not the model asked for.
    """
    given = tensors_of(checkpoint)
    prefix = PREFIX if any(key.startswith(PREFIX) for key in given) else ''
    backbone = {k.removeprefix(prefix): v for k, v in given.items() if k.startswith(prefix)}
    heads = {key: tensor for key, tensor in given.items() if not key.startswith(prefix)}
    own = to_own_layout(backbone)
    arch = recognize_arch(own, given)
    check_complete(own, EfficientFormerV2(arch).state_dict(), backbone)

    recognized = next((name for name, t in TASKS.items() if t.mark in heads), 'backbone')
    if task not in (None, 'backbone', recognized):
        raise CheckpointError(
            f'--task {task}: the checkpoint is no {TASKS[task].title}, which would have a '
            f'{TASKS[task].mark}; it is recognized as {recognized}'
        )
    left_out: dict[str, list[str]] = {}
    for key in backbone:
        if reason := reason_left_out(key, backbone):
            left_out.setdefault(reason, []).append(prefix + key)
    conversion = Conversion(
        layout_of(backbone), arch, task or recognized, table_size(own), own, left_out
    )
    if conversion.task != 'backbone':
        add_heads(conversion, heads, checkpoint.get('meta') or {})
    elif heads:
        left_out['neck and heads, since only a backbone is asked for'] = list(heads)
    return conversion


def recognize_arch(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """Which of ``ARCHITECTURES`` a backbone is, by the channels of its last stage."""
    last = own.get('stages.3.blocks.0.mlp.fc2.conv.weight')
    if last is None:
        raise CheckpointError(
            'no EfficientFormerV2 is recognized in the checkpoint, which has '
            f'{enumerate_keys(list(given))}'
        )
    for arch, row in ARCHITECTURES.items():
        if row['channels'][3] == len(last):
            return arch
    raise CheckpointError(
        f'the checkpoint has {describe(own)}, which is none of {list(ARCHITECTURES)}'
    )


def table_size(own: Mapping[str, Tensor]) -> tuple[int, int]:
    """Height and width of the images that bias tables are laid out for."""
    rows, columns = next(
        tensor.shape[1:]
        for key, tensor in own.items()
        if re.match(r'stages\.3\.blocks\..*\.relative_position_bias\.table$', key)
    )
    # Stage 4 has a token for every 32 pixels.
    return 32 * rows, 32 * columns


def add_heads(conversion: Conversion, heads: Mapping[str, Tensor], meta: dict) -> None:
    """Add neck and heads, as far as the model of our config has them."""
    task = TASKS[conversion.task]
    conversion.num_classes = task.num_classes(heads)
    names = [f'{task.config}{conversion.arch}{kind}.py' for kind in ('_authors', '')]
    names = names if conversion.layout == 'snap' else names[1:]
    conversion.config = next(Path(name) for name in names if (CONFIGS / name).is_file())
    config = build_config(conversion)
    model = MODELS.build(config.model)
    tensors = {PREFIX + key: tensor for key, tensor in conversion.tensors.items()} | dict(heads)
    fit_whole(model, {'state_dict': tensors}, f'for {conversion.config}')
    expected = model.state_dict()
    surplus = [key for key in heads if key not in expected]
    if surplus:
        conversion.left_out[f'parts that our {task.title} does not have'] = surplus
    conversion.tensors = {key: tensor for key, tensor in tensors.items() if key in expected}
    names = class_names(meta, config, conversion.num_classes)
    conversion.meta = {'cfg': config.pretty_text, **({'dataset_meta': names} if names else {})}


def build_config(conversion: Conversion) -> Config:
    """The config for a converted model: its classes, its bias tables, no pretrained weights."""
    height, width = conversion.table_size
    options = {
        'model.backbone.init_cfg': None,
        'model.backbone.pretrain_img_size': height if height == width else (height, width),
    }
    if conversion.layout == 'snap':
        # Their dense models were trained with tables resized as matrices.
        options['model.backbone.bias_resize'] = 'matrix'
    config = load_config(str(CONFIGS / conversion.config), options)
    set_num_classes(config, conversion.num_classes)
    fit_to_device(config)
    return config


def class_names(meta: dict, config: Config, num_classes: int) -> dict:
    """Class names and colors: those in the checkpoint, else those of the config's dataset."""
    known = dataset_class(next(datasets_of(config))).METAINFO
    # mmdet 2 and mmseg 0.x have them in capitals.
    in_capitals = {'classes': meta.get('CLASSES'), 'palette': meta.get('PALETTE')}
    for names in (meta.get('dataset_meta') or in_capitals, known):
        if names.get('classes') and len(names['classes']) == num_classes:
            palette = names.get('palette') or known.get('palette') or []
            return {
                'classes': list(names['classes']),
                'palette': [list(color) for color in palette][:num_classes],
            }
    return {}
