"""What is compared: the models of configs, and the same models on the usual small backbones."""

import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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

from backbones.data.config_datasets import walk
from backbones.engine.config import load_config
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
    """A model to measure, described so that another process can build it.

    Attributes:
        config_path: Path of a config.
        peer: A key of ``PEERS`` to take instead of the config's backbone. Default: none.
        options: Overrides for the config, by dotted key.
    """

    config_path: str
    peer: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def load(self) -> Config:
        """The config, with the peer for its backbone, that loads no weights.

        Raises:
            ConfigError: The config cannot be read, or no peer fits its neck.
        """
        config = load_config(self.config_path, self.options)
        for node in walk(config.model):
            node.pop('init_cfg', None)
            node.pop('pretrained', None)
        if self.peer:
            put_peer(config.model, self.peer, self.config_path)
        return config

    def build(self) -> nn.Module:
        """The model, with random weights and statistics that fit them, in evaluation mode."""
        torch.manual_seed(0)
        config = self.load()
        with quiet_logger(), warnings.catch_warnings():
            # What mmseg says about a loss is for those who train.
            warnings.filterwarnings('ignore', 'Default ``avg_non_ignore``', UserWarning)
            model = revert_sync_batchnorm(MODELS.build(config.model))
            model.init_weights()
        fit_statistics(model.backbone)
        return model.eval()

    @property
    def is_ours(self) -> bool:
        """Whether the backbone is EfficientFormerV2."""
        return self.load().model.backbone.type.rpartition('.')[2] == OURS

    @property
    def name(self) -> str:
        """The backbone's name."""
        if self.peer:
            return self.peer
        backbone = self.load().model.backbone
        variant = backbone.get('arch', backbone.get('depth'))
        kind = backbone.type.rpartition('.')[2]
        if isinstance(variant, str) and kind == OURS:
            variant = variant.upper()
        return f'{kind}-{variant}' if isinstance(variant, str | int) else kind


@dataclass(frozen=True)
class Group:
    """Models that differ in their backbone alone.

    Attributes:
        name: What is over the backbone.
        scope: 'mmdet' or 'mmseg'.
        candidates: The models by name, the given configs first.
    """

    name: str
    scope: str
    candidates: dict[str, Candidate]


def group_configs(paths: Sequence[str], with_peers: bool, options: dict[str, Any]) -> list[Group]:
    """Put the models that differ in their backbone alone together.

    Args:
        paths: Configs.
        with_peers: Add each of ``PEERS`` to each group.
        options: Overrides for the configs, by dotted key.

    Raises:
        ConfigError: A config cannot be read, is given twice, or no peer fits its neck.
    """
    groups: dict[str, Group] = {}
    for path in paths:
        candidate = Candidate(path, options=options)
        config = candidate.load()
        key = json.dumps(without_backbone(config.model), sort_keys=True, default=str)
        group = groups.setdefault(key, Group(head_name(config.model), config.default_scope, {}))
        # Two variants of one backbone are told apart by the names of their configs.
        name = candidate.name if candidate.name not in group.candidates else Path(path).stem
        if name in group.candidates:
            raise ConfigError(f'{path} is given twice')
        group.candidates[name] = candidate
    for group in groups.values() if with_peers else ():
        first = next(iter(group.candidates.values()))
        for peer in PEERS:
            candidate = Candidate(first.config_path, peer, options)
            candidate.load()
            group.candidates.setdefault(peer, candidate)
    return list(groups.values())


def without_backbone(model: ConfigDict) -> dict:
    """A model's config without its backbone and the channels that come from it."""
    rest = {key: value for key, value in model.to_dict().items() if key != 'backbone'}
    if isinstance(rest.get('neck'), dict):
        rest['neck'] = {k: v for k, v in rest['neck'].items() if k != 'in_channels'}
    return rest


def head_name(model: ConfigDict) -> str:
    """MaskRCNN, RetinaNet, or of a segmentor its head: FPNHead."""
    named = model.decode_head if 'decode_head' in model else model
    if isinstance(named, list):
        named = named[-1]
    return named.type.rpartition('.')[2]


def put_peer(model: ConfigDict, peer: str, path: str) -> None:
    """Replace a model's backbone.

    Raises:
        ConfigError: The model has no neck that takes four maps.
    """
    backbone, channels = PEERS[peer]
    neck = model.get('neck')
    if not isinstance(neck, dict) or len(neck.get('in_channels', ())) != len(channels):
        raise ConfigError(
            f'{path}: --peers replaces a backbone under a neck whose in_channels are '
            f'{len(channels)} numbers, and this model has none'
        )
    norm_eval = model.backbone.get('norm_eval', False)
    model.backbone = ConfigDict(**backbone, norm_eval=norm_eval)
    neck.in_channels = list(channels)


@contextmanager
def quiet_logger() -> Iterator[None]:
    """Without mmengine's lines about every weight."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


@torch.no_grad()
def fit_statistics(backbone: nn.Module) -> None:
    """Give random weights the BatchNorm statistics that belong to them.

    With others, values vanish on their way through a deep network, and a processor takes many
    times as long for numbers close to zero (denormal ones).
    """
    norms = [module for module in backbone.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    backbone(torch.randn(2, 3, 128, 128))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
