"""The search space: the networks that a search chooses from.

The largest network is that of the config. The others have fewer channels, blocks or attention
blocks, smaller expansion ratios, or a narrower neck and head. The paper searches the same
dimensions of the backbone (section 4.2). In dense prediction the neck and the head take more time
than the backbone, so their width is searched too.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import chain, islice
from typing import Any

import numpy as np
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS
from torch import nn

from backbones.efficientformer_v2.backbone import ARCHITECTURES, NUM_STAGES, resolve_architecture
from backbones.errors import CheckpointError, ConfigError

# Hidden channels are int(channels * ratio): with these ratios the product is exact.
RATIOS = (1.5, 2, 2.5, 3, 3.5, 4)
NECKS = (64, 96, 128, 192, 256)
# Widths of a stage as fractions of its channels, rounded to the nearest multiple of 8.
WIDTH_FRACTIONS = (0.5, 0.625, 0.75, 0.875)
# Heads whose width follows the neck's: key in the model, option for the width, mmdet's default.
ELASTIC_HEADS = {
    'FPNHead': ('decode_head', 'channels', None),
    'RetinaHead': ('bbox_head', 'feat_channels', 256),
}
DEFAULTS = dict(
    channels=None,  # widths of each stage (default: by WIDTH_FRACTIONS, and published ones)
    min_depths=None,  # the fewest blocks of each stage (default: half, or a published number)
    ratios=RATIOS,  # expansion ratios of all blocks
    necks=NECKS,  # widths of the neck
    holdout=0.1,  # the fraction of training images on which candidates are compared
    calibration_images=64,  # training images that set a candidate's BatchNorm statistics
    seed=0,  # seed of the hold-out and of the random networks that are trained and measured
)


@dataclass(frozen=True)
class Choice:
    """One network of a space."""

    channels: tuple[int, ...]  # of each stage
    # For each stage and block of the largest network; 0 if the block is left out.
    ratios: tuple[tuple[float, ...], ...]
    num_attention_blocks: tuple[int, int]  # the last remaining blocks of stages 3 and 4
    neck: int | None  # its channels; None: the config's own

    @property
    def values(self) -> tuple:
        """A value for each of ``Space.dimensions``."""
        return *self.channels, *chain(*self.ratios), *self.num_attention_blocks, self.neck

    def with_values(self, values: Iterable) -> 'Choice':
        values = iter(values)

        def take(own: tuple) -> tuple:
            return tuple(islice(values, len(own)))

        widths_and_ratios = take(self.channels), tuple(map(take, self.ratios))
        return Choice(*widths_and_ratios, take(self.num_attention_blocks), next(values))

    def blocks(self, stage: int) -> list[int]:
        """Return the remaining blocks of a stage, by their index in the largest network."""
        return [number for number, ratio in enumerate(self.ratios[stage]) if ratio]

    def attending_blocks(self, stage: int) -> list[int]:
        """Return those of the remaining blocks that have attention."""
        number = (0, 0, *self.num_attention_blocks)[stage]
        return self.blocks(stage)[-number:] if number else []

    def architecture(self) -> dict[str, Any]:
        """Return the network as a row of ``ARCHITECTURES``, without ``drop_path_rate``."""
        return dict(
            channels=self.channels,
            depths=tuple(len(self.blocks(stage)) for stage in range(NUM_STAGES)),
            num_attention_blocks=self.num_attention_blocks,
            mlp_ratios=tuple(tuple(filter(None, ratios)) for ratios in self.ratios),
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> 'Choice':
        """Return the choice of which a JSON file has the values."""
        return cls(
            tuple(values['channels']),
            tuple(map(tuple, values['ratios'])),
            tuple(values['num_attention_blocks']),
            values['neck'],
        )


@dataclass(frozen=True)
class Space:
    """All networks that can be found for a config; settings are in rising order."""

    largest: Choice  # the config's own network
    channels: tuple[tuple[int, ...], ...]  # of each stage
    min_depths: tuple[int, ...]  # of each stage
    ratios: tuple[float, ...]  # a block can have those up to its ratio in `largest`
    necks: tuple[int, ...]  # widths; empty if the neck is not searched
    # The head whose width follows the neck's: its key in the model, the option for its width, and
    # its width over the neck's.
    head: tuple[str, str, float] | None

    @classmethod
    def from_config(cls, config: Config) -> 'Space':
        """Return the space of a config with ``search = dict(...)``, or raise ConfigError."""
        options = search_options(config)
        model = config.model
        backbone = model.get('backbone') or {}
        if str(backbone.get('type')).rpartition('.')[2] != 'EfficientFormerV2':
            raise ConfigError('a search needs a model with EfficientFormerV2 as its backbone')
        if backbone.get('frozen_stages', -1) >= 0:
            raise ConfigError('a supernet trains all stages: set model.backbone.frozen_stages=-1')
        if backbone.get('out_indices', range(NUM_STAGES))[-1] != NUM_STAGES - 1:
            raise ConfigError('a search needs all four stages: the last of out_indices must be 3')
        neck = model.get('neck') or {}
        several = isinstance(neck, list | tuple)
        kind = [each.type for each in neck] if several else neck.get('type', 'none')
        if str(kind).rpartition('.')[2] != 'FPN':
            raise ConfigError(
                'a search needs a model with an FPN as its neck, whose channels can be sliced; the '
                f'neck of this model: {kind}'
            )
        try:
            arch = resolve_architecture(backbone.get('arch', 's0'))
        except ValueError as error:
            raise ConfigError(f'model.backbone: {error}') from error
        head = find_head(model)
        for part in [backbone, neck, model[head[0]]] if head else [backbone]:
            norm = (part.get('norm_cfg') or {}).get('type', 'BN')
            kind = norm if isinstance(norm, type) else MODELS.get(norm) or object
            # Others compute over several channels, or were never tried.
            if not issubclass(kind, nn.BatchNorm2d | nn.SyncBatchNorm):
                raise ConfigError(
                    f'the channels of {norm} cannot be sliced, also of a trained model: a search '
                    "needs norm_cfg=dict(type='BN') in backbone, neck and head"
                )
        width = neck.out_channels if head else None
        largest = Choice(
            tuple(arch['channels']),
            tuple(map(tuple, arch['mlp_ratios'])),
            tuple(arch['num_attention_blocks']),
            width,
        )
        published = ARCHITECTURES.values()
        channels = options['channels'] or [
            widths_of(full, [row['channels'][stage] for row in published])
            for stage, full in enumerate(largest.channels)
        ]
        min_depths = options['min_depths'] or [
            max(1, min(full // 2, *(row['depths'][stage] for row in published)))
            for stage, full in enumerate(arch['depths'])
        ]
        try:
            space = cls(
                largest,
                tuple(
                    tuple(sorted({*widths, full}))
                    for widths, full in zip(channels, largest.channels, strict=True)
                ),
                tuple(min_depths),
                tuple(sorted(options['ratios'])),
                tuple(sorted({n for n in options['necks'] if n < width} | {width})) if head else (),
                head,
            )
            space.check()
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f'search cannot be {config.search} ({error}). ratios are numbers above 0, necks '
                f'numbers. For each of {NUM_STAGES} stages, channels has a list of widths, from 2 '
                "to the config's channels, and min_depths a number from 1 to the config's blocks"
            ) from error
        return space

    def check(self) -> None:
        """Raise ValueError or TypeError if a setting is impossible."""
        for numbers in (*self.channels, self.min_depths, self.necks):
            if not all(isinstance(number, int) for number in numbers):
                raise ValueError(f'{numbers} are not whole numbers')
        for widths, full in zip(self.channels, self.largest.channels, strict=True):
            if widths[0] < 2 or widths[-1] > full:
                raise ValueError(f'channels {widths}')
        for depth, ratios in zip(self.min_depths, self.largest.ratios, strict=True):
            if not 1 <= depth <= len(ratios):
                raise ValueError(f'min_depths {depth}')
        if not self.ratios or self.ratios[0] <= 0:
            raise ValueError(f'ratios {self.ratios}')

    def to_json(self) -> str:
        """Return JSON that is the same for equal spaces."""
        return json.dumps(asdict(self))

    def check_checkpoint(self, checkpoint: dict) -> bool:
        """Return whether a checkpoint is a supernet's; CheckpointError if of another space."""
        # Published checkpoints have it beside the config.
        found = checkpoint.get('search_space') or checkpoint.get('meta', {}).get('search_space')
        if found is not None and found != self.to_json():
            raise CheckpointError(
                'the checkpoint is a supernet of another space: use the config of its training. '
                f'Its space: {found}'
            )
        return found is not None

    @property
    def smallest(self) -> Choice:
        """Return the network with the smallest setting in every dimension."""
        # The last blocks are kept: only they can have attention (here none has).
        return self.draw(lambda settings: settings[0], lambda number: range(number)[::-1])

    def ratios_of(self, stage: int, block: int) -> tuple[float, ...]:
        """Return the ratios that a block can have, rising; the last is that in `largest`."""
        own = self.largest.ratios[stage][block]
        return (*(ratio for ratio in self.ratios if ratio < own), own)

    @cached_property
    def dimensions(self) -> dict[str, Sequence]:
        """The settings of each dimension; for a block 0 (left out) and its ratios."""
        numbers = enumerate(self.largest.num_attention_blocks, 3)
        return {
            **{f'stage {stage}': widths for stage, widths in enumerate(self.channels, 1)},
            **{
                f'stage {stage + 1}, block {block + 1}': (0, *self.ratios_of(stage, block))
                for stage, ratios in enumerate(self.largest.ratios)
                for block in range(len(ratios))
            },
            **{f'stage {stage}, attention': range(number + 1) for stage, number in numbers},
            'neck': self.necks or (None,),
        }

    def possible(self, choice: Choice) -> Choice:
        """Return the network of the space that is nearest to a choice of settings.

        If a stage has too few blocks, its last missing ones return with their smallest ratio. Only
        blocks with attention in the largest network can have attention.
        """
        rows = list(map(list, choice.ratios))
        for stage, row in enumerate(rows):
            for block in reversed(range(len(row))):
                if sum(map(bool, row)) < self.min_depths[stage] and not row[block]:
                    row[block] = self.ratios_of(stage, block)[0]
        choice = replace(choice, ratios=tuple(map(tuple, rows)))
        numbers = (
            min(number, len({*choice.blocks(stage)} & {*self.largest.attending_blocks(stage)}))
            for stage, number in enumerate(choice.num_attention_blocks, NUM_STAGES - 2)
        )
        return replace(choice, num_attention_blocks=tuple(numbers))

    def smaller(self, choice: Choice) -> dict[str, Choice]:
        """Return the networks with the next smaller setting in a dimension, by its name."""
        return self.neighbors(choice, -1)

    def larger(self, choice: Choice) -> dict[str, Choice]:
        """Return the networks with the next larger setting in a dimension, by its name."""
        return self.neighbors(choice, 1)

    def neighbors(self, choice: Choice, step: int) -> dict[str, Choice]:
        """Return the networks that differ by one setting in one dimension; step is 1 or -1.

        Blocks of any ratio can also be left out; that, and their return, has a name of its own.
        """
        own, found = dict(zip(self.dimensions, choice.values, strict=True)), {}
        for name, settings in self.dimensions.items():
            is_block = 'block' in name
            position = settings.index(own[name]) + step
            others = {settings[position]} if 0 <= position < len(settings) else set()
            if is_block and own[name] and step < 0:
                others.add(0)
            for other in sorted(others, reverse=True):
                asked = choice.with_values((own | {name: other}).values())
                possible = self.possible(asked)
                # Skip if the stage needs the block, or no more blocks can have attention.
                if possible.ratios == asked.ratios and possible != choice:
                    is_left_out = is_block and 0 in (own[name], other)
                    found[f'{name}, left out' if is_left_out else name] = possible
        return found

    def sample(self, rng: np.random.Generator) -> Choice:
        """Return a random network; all sizes from the smallest to the largest are about as likely.

        With independent draws in each dimension, almost all networks would be of middle size.
        """
        level = rng.uniform()

        def pick(settings: Sequence[Any]) -> Any:
            position = np.clip(rng.normal(level, 0.3), 0, 1 - 1e-9)
            return settings[int(position * len(settings))]

        return self.draw(pick, rng.permutation)

    def draw(self, pick: Callable[[Sequence], Any], order: Callable[[int], Sequence]) -> Choice:
        """Return a network of picked settings; the first blocks of a stage in ``order`` remain."""
        ratios = []
        for stage, full in enumerate(self.largest.ratios):
            depth = pick(range(self.min_depths[stage], len(full) + 1))
            left = set(order(len(full))[:depth])
            ratios.append(
                tuple(
                    pick(self.ratios_of(stage, block)) if block in left else 0
                    for block in range(len(full))
                )
            )
        numbers = tuple(pick(range(n + 1)) for n in self.largest.num_attention_blocks)
        channels = tuple(map(pick, self.channels))
        neck = pick(self.necks) if self.necks else None
        return self.possible(Choice(channels, tuple(ratios), numbers, neck))

    def __contains__(self, choice: Choice) -> bool:
        pairs = zip(choice.values, self.dimensions.values(), strict=True)
        return all(value in each for value, each in pairs) and self.possible(choice) == choice

    def published(self) -> dict[str, Choice]:
        """Return the published networks in this space, with every width of the neck, by name."""
        members = {}
        for name in ARCHITECTURES:
            arch = resolve_architecture(name)
            ratios = tuple(map(align, arch['mlp_ratios'], self.largest.ratios))
            if None in ratios:
                continue
            numbers = tuple(arch['num_attention_blocks'])
            for neck in self.necks or (None,):
                choice = Choice(tuple(arch['channels']), ratios, numbers, neck)
                if choice in self:
                    members[f'{name}, neck {neck}' if neck else name] = choice
        return members

    def widths(self, choice: Choice) -> dict[str, int]:
        """Return the numbers of channels of a network, by group.

        ``stem`` is between the stem's two convolutions, ``stages.2`` a stage,
        ``stages.2.blocks.5`` the hidden channels of a block by its index in the largest network.
        ``neck`` and ``head`` exist only if they are searched.
        """
        widths = {'stem': choice.channels[0] // 2}
        for stage, channels in enumerate(choice.channels):
            widths[f'stages.{stage}'] = channels
            for block in choice.blocks(stage):
                hidden = int(channels * choice.ratios[stage][block])
                widths[f'stages.{stage}.blocks.{block}'] = hidden
        if self.head:
            widths |= {'neck': choice.neck, 'head': round(choice.neck * self.head[2])}
        return widths

    def options(self, choice: Choice, config: Config) -> dict[str, Any]:
        """Return the options that turn the space's config into this network's, by dotted key."""
        out_indices = config.model.backbone.get('out_indices', range(NUM_STAGES))
        arch = choice.architecture()
        largest = resolve_architecture(config.model.backbone.get('arch', 's0'))
        # The rate rises from block to block, so it is lower in proportion to the number of blocks.
        rate = largest['drop_path_rate'] * sum(arch['depths']) / sum(largest['depths'])
        options = {
            'model.backbone.arch': dict(arch, drop_path_rate=round(rate, 4), _delete_=True),
            'model.neck.in_channels': [choice.channels[index] for index in out_indices],
        }
        if self.head:
            key, name, _ = self.head
            head = config.model[key]
            several = isinstance(head.in_channels, list | tuple)
            options['model.neck.out_channels'] = choice.neck
            options[f'model.{key}.in_channels'] = (
                [choice.neck] * len(head.in_channels) if several else choice.neck
            )
            options[f'model.{key}.{name}'] = self.widths(choice)['head']
        return options


def search_options(config: Config) -> dict[str, Any]:
    """Return ``search`` of a config with defaults for missing options, or raise ConfigError."""
    given = config.get('search')
    if given is None:
        raise ConfigError(
            f'{config.filename} has no search: write a config that inherits it and has `search = '
            'dict()`, or use a ready one, such as seg_configs/fpn_effv2_s1_search.py'
        )
    if not isinstance(given, dict):
        raise ConfigError(f'search must be a dict, such as `search = dict()`, not {given!r}')
    if unknown := sorted(set(given) - set(DEFAULTS)):
        raise ConfigError(f'search has no options {unknown}; it has {sorted(DEFAULTS)}')
    options = DEFAULTS | given
    for name, minimum in (('calibration_images', 1), ('seed', 0)):
        value = options[name]
        if not isinstance(value, int) or value < minimum:
            raise ConfigError(f'search.{name} must be an integer from {minimum} on, not {value!r}')
    return options


def find_head(model: ConfigDict) -> tuple[str, str, float] | None:
    """Return the head whose width can follow the neck's, if it is the model's only head."""
    behind = [key for key in model if key.endswith('_head')]
    if len(behind) != 1 or not isinstance(model[behind[0]], dict):
        return None
    head = model[behind[0]]
    found = ELASTIC_HEADS.get(str(head.get('type')).rpartition('.')[2])
    if not found or found[0] != behind[0]:
        return None
    key, name, default = found
    return key, name, head.get(name, default) / model.neck.out_channels


def widths_of(full: int, published: Sequence[int]) -> set[int]:
    """Return the smaller widths of a stage with ``full`` channels in the largest network."""
    rounded = {max(8, round(full * fraction / 8) * 8) for fraction in WIDTH_FRACTIONS}
    return {width for width in rounded.union(published) if width < full}


def align(own: Sequence[float], full: Sequence[float]) -> tuple[float, ...] | None:
    """Align a stage's ratios with a larger one's, 0 for missing blocks; None if they do not fit."""
    placed, rest = [], list(own)
    # Backwards from the last block, since the last ones have attention.
    for ratio in reversed(full):
        placed.append(rest.pop() if rest and rest[-1] <= ratio else 0)
    return None if rest else tuple(reversed(placed))


def describe(choice: Choice) -> str:
    """Describe a network on one line, for tables; ratios are the means of the stages."""
    numbers = [len(choice.blocks(stage)) for stage in range(NUM_STAGES)]
    depths, channels = '/'.join(map(str, numbers)), '/'.join(map(str, choice.channels))
    means = (sum(ratios) / number for ratios, number in zip(choice.ratios, numbers, strict=True))
    ratios = '/'.join(f'{mean:.3g}' for mean in means)
    attention = '+'.join(map(str, choice.num_attention_blocks))
    neck = f', neck {choice.neck}' if choice.neck else ''
    return f'channels {channels}, blocks {depths}, ratios {ratios}, attention {attention}{neck}'
