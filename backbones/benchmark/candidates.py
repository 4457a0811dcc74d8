"""What is compared: the models of configs, and the same models on the usual small backbones."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
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

# Backbones that both mmdet and mmseg have, at strides 4, 8, 16 and 32, and their channels. Of
# MobileNetV2 without the 1280 channels that come before its classifier.
PEERS = {
    'MobileNetV2': (dict(type='MobileNetV2', out_indices=(1, 2, 4, 6)), (24, 32, 96, 320)),
    'ResNet-18': (dict(type='ResNet', depth=18), (64, 128, 256, 512)),
    'ResNet-50': (dict(type='ResNet', depth=50), (256, 512, 1024, 2048)),
}
OURS = 'EfficientFormerV2'


@dataclass(frozen=True)
class Candidate:
    """A model to measure, described so that another process can build it: a config, with a key of
    ``PEERS`` in place of its backbone or None, and overrides by dotted key."""

    config_path: str
    peer: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def load(self) -> Config:
        """The config, with the peer for its backbone, that loads no weights."""
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
                    f'{self.config_path}: --peers needs a neck with {len(channels)} in_channels, '
                    'or no neck and a single head with in_channels for each in_index'
                )
            norm_eval = config.model.backbone.get('norm_eval', False)
            config.model.backbone = ConfigDict(**backbone, norm_eval=norm_eval)
            part.in_channels = [channels[index] for index in indices]
        return config

    @torch.no_grad()
    def build(self) -> nn.Module:
        """The model, with random weights and statistics that fit them, in evaluation mode."""
        torch.manual_seed(0)
        config = self.load()
        # mmengine logs a line about every weight, and mmseg warns those who train.
        quiet(MMLogger.get_current_instance())
        model = revert_sync_batchnorm(MODELS.build(config.model))
        model.init_weights()
        # With other statistics values vanish on their way through a deep network, and a processor
        # takes many times as long for numbers close to zero (denormal ones).
        for module in model.backbone.modules():
            if isinstance(module, _BatchNorm):
                module.train()
                module.momentum = 1.0
        model.backbone(torch.randn(2, 3, 128, 128))
        classifier = getattr(getattr(model, 'decode_head', None), 'conv_seg', None)
        if classifier is not None and classifier.bias is not None:
            # A segmentation map takes longer the more regions it has, and those of random weights
            # differ from network to network.
            nn.init.constant_(classifier.bias[:1], 1000.0)
        return model.eval()

    @property
    def name(self) -> str:
        """The backbone's name, such as EfficientFormerV2-S0 or ResNet-18."""
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
    """Models that differ in their backbone alone: what is over it, 'mmdet' or 'mmseg', and the
    models by name, the given configs first."""

    name: str
    scope: str
    candidates: dict[str, Candidate]


def group_configs(paths: Sequence[str], with_peers: bool, options: dict[str, Any]) -> list[Group]:
    """Put the models that differ in their backbone alone together, and ``PEERS`` beside them."""
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
        # Variants of one backbone are told apart by the names of their configs, which become names
        # of files.
        file = Path(path).with_suffix('')
        names = (candidate.name, file.stem, str(file).replace(os.sep, '-'))
        name = next(name for name in names if name not in group.candidates)
        group.candidates[name] = candidate
    for group in groups.values() if with_peers else ():
        first = next(iter(group.candidates.values()))
        for peer in PEERS:
            candidate = Candidate(first.config_path, peer, options)
            candidate.load()
            group.candidates.setdefault(peer, candidate)
    return list(groups.values())


def drop_weights(model: ConfigDict) -> None:
    """Take out of a model what says which weights it begins with."""
    for node in walk(model):
        node.pop('init_cfg', None)
        node.pop('pretrained', None)
        # Random weights with large layer scales make attention's scores so large that most of
        # their softmax is denormal, for which a processor takes many times as long.
        node.pop('layer_scale_init_value', None)


def behind_backbone(model: dict) -> dict | None:
    """The part whose several ``in_channels`` are the backbone's: the neck or, without one, the
    only head of a segmentor; None where there is no such part."""
    part = model.get('neck')
    if part is None and 'auxiliary_head' not in model:
        part = model.get('decode_head')
    several = isinstance(part, dict) and isinstance(part.get('in_channels'), Sequence)
    return part if several else None


def head_name(model: ConfigDict) -> str:
    """MaskRCNN, RetinaNet, or a segmentor's head: FPNHead."""
    named = model.get('decode_head', model)
    return (named[-1] if isinstance(named, list) else named).type.rpartition('.')[2]
