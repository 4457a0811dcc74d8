"""The models to compare: those of configs, and the same models on common small backbones."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from backbones.data.classes import set_classes
from backbones.data.config_datasets import walk
from backbones.engine.config import load_config
from backbones.engine.console import quiet
from backbones.errors import ConfigError

# Backbones of both mmdet and mmseg, with their channels at strides 4, 8, 16 and 32. MobileNetV2 is
# without the layer of 1280 channels before its classifier.
PEERS = {
    'MobileNetV2': (dict(type='MobileNetV2', out_indices=(1, 2, 4, 6)), (24, 32, 96, 320)),
    'ResNet-18': (dict(type='ResNet', depth=18), (64, 128, 256, 512)),
    'ResNet-50': (dict(type='ResNet', depth=50), (256, 512, 1024, 2048)),
}
OURS = 'EfficientFormerV2'


@dataclass(frozen=True)
class Candidate:
    """A model to measure, described so that another process can build it: a config, a key of
    ``PEERS`` to replace its backbone (or None), and overrides by dotted key."""

    config_path: str
    peer: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def load(self) -> Config:
        """Return the config without weights, and with the peer as its backbone if there is one."""
        config = load_config(self.config_path, self.options)
        if 'classes' in config:
            set_classes(config, splits=())
        drop_weights(config.model)
        if self.peer:
            backbone, channels = PEERS[self.peer]
            part = behind_backbone(config.model)
            indices = part.get('in_index', range(len(channels))) if part else ()
            if not part or len(part.in_channels) != len(indices):
                raise ConfigError(
                    f'{self.config_path}: --peers needs a model with {len(channels)} in_channels '
                    'in its neck or, without a neck, a single head with in_channels per in_index'
                )
            norm_eval = config.model.backbone.get('norm_eval', False)
            config.model.backbone = ConfigDict(**backbone, norm_eval=norm_eval)
            part.in_channels = [channels[index] for index in indices]
        return config

    @torch.no_grad()
    def build(self) -> nn.Module:
        """Build the model with random weights and matching statistics, in evaluation mode."""
        torch.manual_seed(0)
        config = self.load()
        # Hide mmengine's line for every weight and mmseg's warnings about training.
        quiet(MMLogger.get_current_instance())
        model = revert_sync_batchnorm(MODELS.build(config.model))
        model.init_weights()
        # With other statistics, values vanish in a deep network, and processors are many times
        # slower with numbers close to zero (denormal ones).
        for module in model.backbone.modules():
            if isinstance(module, _BatchNorm):
                module.train()
                module.momentum = 1.0
        model.backbone(torch.randn(2, 3, 128, 128))
        classifier = getattr(getattr(model, 'decode_head', None), 'conv_seg', None)
        if classifier is not None and classifier.bias is not None:
            # One class for all pixels: a segmentation map takes longer with more regions, whose
            # number would differ between networks with random weights.
            nn.init.constant_(classifier.bias[:1], 1000.0)
        return model.eval()

    @property
    def name(self) -> str:
        """The name of the backbone, such as EfficientFormerV2-S0 or ResNet-18."""
        if self.peer:
            return self.peer
        backbone = self.load().model.backbone
        kind = backbone.type.rpartition('.')[2]
        variant = backbone.get('arch', backbone.get('depth'))
        if not isinstance(variant, str | int):
            return kind
        return f'{kind}-{variant.upper() if kind == OURS else variant}'


@dataclass(frozen=True)
class Group:
    """Models that differ only in their backbone: the name of their head, 'mmdet' or 'mmseg', and
    the models by name, given configs first."""

    name: str
    scope: str
    candidates: dict[str, Candidate]


def group_configs(paths: Sequence[str], with_peers: bool, options: dict[str, Any]) -> list[Group]:
    """Group the models that differ only in their backbone, and add ``PEERS`` to each group."""
    for path, count in Counter(Path(path).resolve() for path in paths).items():
        if count > 1:
            raise ConfigError(f'{path} is given twice')
    groups: dict[str, Group] = {}
    for path in paths:
        candidate = Candidate(path, options=options)
        config = candidate.load()
        rest = {key: value for key, value in config.model.to_dict().items() if key != 'backbone'}
        if part := behind_backbone(rest):
            del part['in_channels']
        key = json.dumps(rest, sort_keys=True, default=str)
        group = groups.setdefault(key, Group(head_name(config.model), config.default_scope, {}))
        # Variants of one backbone are named by their configs, without os.sep: names become file
        # names.
        file = Path(path).with_suffix('')
        names = (candidate.name, file.stem, str(file).strip(os.sep).replace(os.sep, '-'))
        name = next(name for name in names if name not in group.candidates)
        group.candidates[name] = candidate
    for group in groups.values() if with_peers else ():
        first = next(iter(group.candidates.values()))
        for peer in PEERS:
            candidate = Candidate(first.config_path, peer, options)
            candidate.load()
            group.candidates.setdefault(peer, candidate)
    # Necks differ under heads of one kind, too.
    heads = Counter(group.name for group in groups.values())
    return [
        replace(group, name=f'{group.name} of {next(iter(group.candidates.values())).config_path}')
        if heads[group.name] > 1
        else group
        for group in groups.values()
    ]


def drop_weights(model: ConfigDict) -> None:
    """Remove the settings of initial weights from a model's config."""
    for node in walk(model):
        node.pop('init_cfg', None)
        node.pop('pretrained', None)
        # Large layer scales with random weights make attention's scores so large that most of
        # their softmax is denormal, which is many times slower on a processor.
        node.pop('layer_scale_init_value', None)


def behind_backbone(model: dict) -> dict | None:
    """Return the part whose list of ``in_channels`` is the backbone's: the neck or, without one,
    the only head of a segmentor; None if there is no such part."""
    part = model.get('neck')
    if part is None and 'auxiliary_head' not in model:
        part = model.get('decode_head')
    several = isinstance(part, dict) and isinstance(part.get('in_channels'), Sequence)
    return part if several else None


def head_name(model: ConfigDict) -> str:
    """Return the detector's type, such as MaskRCNN, or the segmentor's head, such as FPNHead."""
    named = model.get('decode_head', model)
    return (named[-1] if isinstance(named, list) else named).type.rpartition('.')[2]
