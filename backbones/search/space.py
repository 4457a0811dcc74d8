"""The networks that a search chooses from.

Its largest network is the one in the config; all others are this one with fewer channels, blocks,
attention blocks, smaller expansion ratios or a narrower neck and head. The paper searches the same
dimensions of the backbone (section 4.2). In dense prediction the neck and the head take more time
than the backbone, so that here their width is a dimension too.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from mmengine.config import Config, ConfigDict

from backbones.efficientformer_v2.backbone import ARCHITECTURES, NUM_STAGES, resolve_architecture
from backbones.errors import CheckpointError, ConfigError

# Hidden channels are int(channels * ratio): with these ratios the product is exact.
RATIOS = (1.5, 2, 2.5, 3, 3.5, 4)
NECKS = (64, 96, 128, 192, 256)
# Of a stage's channels, the widths that it can have, to the nearest multiple of 8.
WIDTH_FRACTIONS = (0.5, 0.625, 0.75, 0.875)
# Heads whose width follows the neck's, and the options that set it.
ELASTIC_HEADS = {
    'FPNHead': ('decode_head', 'channels'),
    'RetinaHead': ('bbox_head', 'feat_channels'),
}
DEFAULTS = dict(
    channels=None,  # for each stage, its widths (default: by WIDTH_FRACTIONS)
    min_depths=None,  # for each stage, the fewest blocks (default: half of them)
    ratios=RATIOS,  # expansion ratios of all blocks
    necks=NECKS,  # widths of the neck
    holdout=0.1,  # the part of the training images that candidates are compared on
    calibration_images=64,  # training images that a candidate's BatchNorms see
    seed=0,  # of the hold-out and of the search
)


@dataclass(frozen=True)
class Choice:
    """One network of a space.

    Attributes:
        channels: Channels of each stage.
        ratios: For each stage, the expansion ratio of each block of the largest network, or 0
            where the block is left out.
        num_attention_blocks: How many of the last blocks that are left have attention, in stages 3
            and 4.
        neck: Channels of the neck, or None where it is the config's own.
    """

    channels: tuple[int, ...]
    ratios: tuple[tuple[float, ...], ...]
    num_attention_blocks: tuple[int, int]
    neck: int | None

    def blocks(self, stage: int) -> list[int]:
        """The blocks of a stage that are left, by their number in the largest network."""
        return [number for number, ratio in enumerate(self.ratios[stage]) if ratio]

    def attending_blocks(self, stage: int) -> list[int]:
        """Those of them that have attention."""
        number = (0, 0, *self.num_attention_blocks)[stage]
        return self.blocks(stage)[-number:] if number else []

    def architecture(self) -> dict[str, Any]:
        """The network as a row of ``ARCHITECTURES``, without ``drop_path_rate``."""
        return dict(
            channels=self.channels,
            depths=tuple(len(self.blocks(stage)) for stage in range(NUM_STAGES)),
            num_attention_blocks=self.num_attention_blocks,
            mlp_ratios=tuple(tuple(filter(None, ratios)) for ratios in self.ratios),
        )

    def to_json(self) -> str:
        """The same for equal choices."""
        ratios = [list(map(float, row)) for row in self.ratios]
        return json.dumps(asdict(self) | dict(ratios=ratios))

    @classmethod
    def from_json(cls, text: str) -> 'Choice':
        values = json.loads(text)
        return cls(
            tuple(values['channels']),
            tuple(map(tuple, values['ratios'])),
            tuple(values['num_attention_blocks']),
            values['neck'],
        )


@dataclass(frozen=True)
class Space:
    """All networks that a config can be searched for.

    Attributes:
        largest: The config's own network.
        channels: For each stage its widths, rising.
        min_depths: For each stage the fewest blocks.
        ratios: Expansion ratios, rising; each block takes those up to its own in ``largest``.
        necks: Widths of the neck, rising; empty where it is not searched.
        head: The head whose width follows the neck's: its key in the model, the option that sets
            its width, and that width over the neck's; or None.
    """

    largest: Choice
    channels: tuple[tuple[int, ...], ...]
    min_depths: tuple[int, ...]
    ratios: tuple[float, ...]
    necks: tuple[int, ...]
    head: tuple[str, str, float] | None

    @classmethod
    def from_config(cls, config: Config) -> 'Space':
        """The space of a config with ``search = dict(...)``.

        Raises:
            ConfigError: Its model cannot be searched, or an option in ``search`` is none.
        """
        options = search_options(config)
        model = config.model
        backbone = model.get('backbone') or {}
        if str(backbone.get('type')).rpartition('.')[2] != 'EfficientFormerV2':
            raise ConfigError('a search needs a model whose backbone is EfficientFormerV2')
        if backbone.get('frozen_stages', -1) >= 0:
            raise ConfigError(
                'in a supernet all stages are trained: set model.backbone.frozen_stages=-1'
            )
        if tuple(backbone.get('out_indices', (3,)))[-1] != NUM_STAGES - 1:
            raise ConfigError('a search needs all four stages: end out_indices with 3')
        neck = model.get('neck') or {}
        several = isinstance(neck, list | tuple)
        kind = [each.type for each in neck] if several else neck.get('type', 'none')
        if str(kind).rpartition('.')[2] != 'FPN':
            raise ConfigError(
                'a search needs an FPN as its neck, whose channels it can slice; the neck of this '
                f'model: {kind}'
            )
        try:
            arch = resolve_architecture(backbone.get('arch', 's0'))
        except ValueError as error:
            raise ConfigError(f'model.backbone: {error}') from error
        head = find_head(model)
        width = neck.out_channels if head else None
        largest = Choice(
            tuple(arch['channels']),
            tuple(map(tuple, arch['mlp_ratios'])),
            tuple(arch['num_attention_blocks']),
            width,
        )
        published = [row for row in ARCHITECTURES.values() if fits_in(row, arch)]
        channels = options['channels'] or [
            widths_of(full, [row['channels'][stage] for row in published])
            for stage, full in enumerate(largest.channels)
        ]
        min_depths = options['min_depths'] or [
            max(1, min(full // 2, *(row['depths'][stage] for row in published), full))
            for stage, full in enumerate(arch['depths'])
        ]
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
        return space

    def check(self) -> None:
        """See that the settings are possible.

        Raises:
            ConfigError: One is not.
        """
        for stage, widths in enumerate(self.channels):
            if widths[0] < 2 or widths[-1] > self.largest.channels[stage]:
                raise ConfigError(
                    f'search.channels[{stage}] are from 2 to {self.largest.channels[stage]}, what '
                    f'the stage has, not {widths}'
                )
        for stage, depth in enumerate(self.min_depths):
            full = len(self.largest.ratios[stage])
            if not 1 <= depth <= full:
                raise ConfigError(f'search.min_depths[{stage}] is from 1 to {full}, not {depth}')
        if not self.ratios or self.ratios[0] <= 0:
            raise ConfigError(f'search.ratios are above 0, not {self.ratios}')

    def to_json(self) -> str:
        """The same for equal spaces."""
        return json.dumps(asdict(self))

    def check_checkpoint(self, checkpoint: dict) -> bool:
        """Whether a checkpoint is one of a supernet; False where it is an ordinary one.

        Raises:
            CheckpointError: It is of another space.
        """
        # In one that was published it is beside the config.
        found = checkpoint.get('search_space') or checkpoint.get('meta', {}).get('search_space')
        if found is not None and found != self.to_json():
            raise CheckpointError(
                'the checkpoint is a supernet of another space: use the config that it was trained '
                f'with. Its space: {found}'
            )
        return found is not None

    @property
    def smallest(self) -> Choice:
        """The network with the smallest setting in every dimension."""
        ratios = []
        for stage, full in enumerate(self.largest.ratios):
            # The last blocks are the ones that can attend, and none of them has to.
            first = len(full) - self.min_depths[stage]
            ratios.append(
                tuple(
                    self.ratios_of(stage, block)[0] if block >= first else 0
                    for block in range(len(full))
                )
            )
        neck = self.necks[0] if self.necks else None
        channels = tuple(widths[0] for widths in self.channels)
        return Choice(channels, tuple(ratios), (0, 0), neck)

    def ratios_of(self, stage: int, block: int) -> tuple[float, ...]:
        """The ratios that a block can have, rising; the last is its own in the largest network."""
        own = self.largest.ratios[stage][block]
        return (*(ratio for ratio in self.ratios if ratio < own), own)

    def can_attend(self, stage: int, blocks: Sequence[int]) -> int:
        """How many of some blocks of a stage have attention in the largest network."""
        capable = self.largest.attending_blocks(stage)
        return sum(block in capable for block in blocks)

    def smaller(self, choice: Choice) -> dict[str, Choice]:
        """What the next smaller setting of each dimension makes of a network, by its name."""
        return self.neighbors(choice, next_below)

    def larger(self, choice: Choice) -> dict[str, Choice]:
        """What the next larger setting of each dimension makes of a network, by its name."""
        return self.neighbors(choice, next_above)

    def neighbors(self, choice: Choice, move: Callable[[Sequence[Any], Any], Any]) -> dict:
        """The networks that differ in one dimension by one setting, which `move` chooses."""
        found = {}
        for stage, widths in enumerate(self.channels):
            if (width := move(widths, choice.channels[stage])) is not None:
                channels = put(choice.channels, stage, width)
                found[f'stage {stage + 1}: {width} channels'] = replace(choice, channels=channels)
        for stage, ratios in enumerate(choice.ratios):
            for block, ratio in enumerate(ratios):
                where = f'stage {stage + 1}, block {block + 1}'
                other = move(self.ratios_of(stage, block), ratio) if ratio else None
                if other is not None:
                    name = f'{where}: ratio {other:g}'
                    found[name] = self.with_ratio(choice, stage, block, other)
                is_needed = len(choice.blocks(stage)) <= self.min_depths[stage]
                if move is next_below and ratio and not is_needed:
                    found[f'{where}: left out'] = self.with_ratio(choice, stage, block, 0)
                if move is next_above and not ratio:
                    smallest = self.ratios_of(stage, block)[0]
                    found[f'{where}: put back'] = self.with_ratio(choice, stage, block, smallest)
        for index, number in enumerate(choice.num_attention_blocks):
            possible = range(self.can_attend(index + 2, choice.blocks(index + 2)) + 1)
            if (other := move(possible, number)) is not None:
                numbers = put(choice.num_attention_blocks, index, other)
                name = f'stage {index + 3}: {other} attention blocks'
                found[name] = replace(choice, num_attention_blocks=numbers)
        if self.necks and (neck := move(self.necks, choice.neck)) is not None:
            found[f'neck: {neck} channels'] = replace(choice, neck=neck)
        return found

    def with_ratio(self, choice: Choice, stage: int, block: int, ratio: float) -> Choice:
        """A choice with another ratio of a block, 0 to leave it out."""
        ratios = put(choice.ratios, stage, put(choice.ratios[stage], block, ratio))
        return self.with_possible_attention(replace(choice, ratios=ratios))

    def with_possible_attention(self, choice: Choice) -> Choice:
        """A choice with no more attention blocks than its blocks have in the largest network."""
        numbers = tuple(
            min(number, self.can_attend(stage, choice.blocks(stage)))
            for stage, number in zip((2, 3), choice.num_attention_blocks, strict=True)
        )
        return replace(choice, num_attention_blocks=numbers)

    def sample(self, rng: np.random.Generator) -> Choice:
        """A random network; from the smallest to the largest, all sizes are about as frequent.

        Drawn from each dimension by itself, all networks would be of about the same, middle size.
        """
        level = rng.uniform()

        def draw(settings: Sequence[Any]) -> Any:
            position = np.clip(rng.normal(level, 0.3), 0, 1 - 1e-9)
            return settings[int(position * len(settings))]

        ratios = []
        for stage, full in enumerate(self.largest.ratios):
            depth = draw(range(self.min_depths[stage], len(full) + 1))
            left = set(rng.permutation(len(full))[:depth].tolist())
            ratios.append(
                tuple(
                    draw(self.ratios_of(stage, block)) if block in left else 0
                    for block in range(len(full))
                )
            )
        numbers = tuple(draw(range(n + 1)) for n in self.largest.num_attention_blocks)
        channels = tuple(map(draw, self.channels))
        neck = draw(self.necks) if self.necks else None
        return self.with_possible_attention(Choice(channels, tuple(ratios), numbers, neck))

    def __contains__(self, choice: Choice) -> bool:
        return (
            all(c in widths for c, widths in zip(choice.channels, self.channels, strict=True))
            and list(map(len, choice.ratios)) == list(map(len, self.largest.ratios))
            and all(
                len(choice.blocks(stage)) >= self.min_depths[stage] for stage in range(NUM_STAGES)
            )
            and all(
                choice.ratios[stage][block] in self.ratios_of(stage, block)
                for stage in range(NUM_STAGES)
                for block in choice.blocks(stage)
            )
            and self.with_possible_attention(choice) == choice
            and (choice.neck in self.necks if self.necks else choice.neck is None)
        )

    def embed(self, arch: str | dict, neck: int | None) -> Choice | None:
        """A network of the family as a choice of this space, or None where it is not in it.

        Args:
            arch: Its name or its row.
            neck: Channels of its neck; None where the neck is not searched.
        """
        arch = resolve_architecture(arch)
        ratios: list[tuple[float, ...]] = []
        for full, own in zip(self.largest.ratios, arch['mlp_ratios'], strict=True):
            # From the last block on, since the last ones attend.
            found, block = [0.0] * len(full), len(full)
            for ratio in reversed(own):
                block -= 1
                while block >= 0 and full[block] < ratio:
                    block -= 1
                if block < 0:
                    return None
                found[block] = ratio
            ratios.append(tuple(found))
        numbers = tuple(arch['num_attention_blocks'])
        choice = Choice(tuple(arch['channels']), tuple(ratios), numbers, neck)
        return choice if choice in self else None

    def published(self) -> dict[str, Choice]:
        """The published networks in this space, with every width of the neck, by their names."""
        members = {}
        for name in ARCHITECTURES:
            for neck in self.necks or (None,):
                if choice := self.embed(name, neck):
                    members[f'{name}, neck {neck}' if neck else name] = choice
        return members

    def widths(self, choice: Choice) -> dict[str, int]:
        """Channels of a network, by what they belong to.

        ``stem`` is what is between its two convolutions, ``stages.2`` a stage,
        ``stages.2.blocks.5`` the hidden channels of a block by its number in the largest network;
        ``neck`` and ``head`` are there where they are searched.
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
        """What makes of the space's config one of this network, by dotted key."""
        out_indices = config.model.backbone.get('out_indices', range(NUM_STAGES))
        arch = choice.architecture()
        largest = resolve_architecture(config.model.backbone.get('arch', 's0'))
        # As much less of it as there are fewer blocks, which it rises over.
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
    """``search`` of a config, with defaults for what it does not say.

    Raises:
        ConfigError: There is no ``search``, it has unknown options, or one of them is not the list
            that it has to be.
    """
    given = config.get('search')
    if given is None:
        raise ConfigError(
            f'{config.filename} has no search: add `search = dict()` to a config of your own over '
            'it, or take one of seg_configs/fpn_effv2_s1_search.py and the like'
        )
    if unknown := sorted(set(given) - set(DEFAULTS)):
        raise ConfigError(f'search has no options {unknown}; it has {sorted(DEFAULTS)}')
    options = DEFAULTS | given
    check_lists(options)
    return options


def check_lists(options: dict[str, Any]) -> None:
    """Raise ConfigError where an option is not the list that it has to be."""
    channels, depths = options['channels'], options['min_depths']
    of_channels = map(are_numbers, channels) if isinstance(channels, list | tuple) else ()
    is_right = dict(
        ratios=are_numbers(options['ratios']),
        necks=are_numbers(options['necks']),
        min_depths=not depths or (are_numbers(depths) and len(depths) == NUM_STAGES),
        channels=not channels or [*of_channels] == [True] * NUM_STAGES,
    )
    if wrong := [name for name, right in is_right.items() if not right]:
        name = wrong[0]
        raise ConfigError(
            f'search.{name} cannot be {options[name]}: ratios and necks are lists of numbers; '
            f'min_depths has a number, and channels a list of widths, for each of the {NUM_STAGES} '
            'stages'
        )


def are_numbers(values: Any) -> bool:
    """Whether these are a list or tuple of numbers."""
    return isinstance(values, list | tuple) and all(isinstance(n, int | float) for n in values)


def find_head(model: ConfigDict) -> tuple[str, str, float] | None:
    """The head whose width can follow the neck's, if it is all that is behind the neck."""
    behind = [key for key in model if key.endswith('_head')]
    if len(behind) != 1 or not isinstance(model[behind[0]], dict):
        return None
    head = model[behind[0]]
    key, name = ELASTIC_HEADS.get(str(head.get('type')).rpartition('.')[2], (None, None))
    if key != behind[0]:
        return None
    return key, name, head[name] / model.neck.out_channels


def fits_in(row: dict, arch: dict) -> bool:
    """Whether a published network is nowhere larger than another."""
    return all(
        small <= large
        for key in ('channels', 'depths')
        for small, large in zip(row[key], arch[key], strict=True)
    )


def widths_of(full: int, published: Sequence[int]) -> list[int]:
    """The widths of a stage that has so many channels in the largest network."""
    rounded = {max(8, round(full * fraction / 8) * 8) for fraction in WIDTH_FRACTIONS}
    return sorted({width for width in rounded | set(published) if width <= full} | {full})


def next_below(settings: Sequence[Any], setting: Any) -> Any:
    """The largest of some rising settings below one, or None."""
    return max((each for each in settings if each < setting), default=None)


def next_above(settings: Sequence[Any], setting: Any) -> Any:
    """The smallest of some rising settings above one, or None."""
    return min((each for each in settings if each > setting), default=None)


def put(values: tuple, index: int, value: Any) -> tuple:
    """A tuple with one value replaced."""
    return (*values[:index], value, *values[index + 1 :])


def describe(choice: Choice) -> str:
    """A network on one line, for tables; ratios are the means of the stages."""
    numbers = [len(choice.blocks(stage)) for stage in range(NUM_STAGES)]
    depths, channels = '/'.join(map(str, numbers)), '/'.join(map(str, choice.channels))
    means = (sum(ratios) / number for ratios, number in zip(choice.ratios, numbers, strict=True))
    ratios = '/'.join(f'{mean:.3g}' for mean in means)
    attention = '+'.join(map(str, choice.num_attention_blocks))
    neck = f', neck {choice.neck}' if choice.neck else ''
    return f'channels {channels}, blocks {depths}, ratios {ratios}, attention {attention}{neck}'


def iterate_dimensions(space: Space) -> Iterator[tuple[str, Sequence[Any]]]:
    """Every dimension of a space with its settings, for reports."""
    for stage, widths in enumerate(space.channels):
        yield f'channels of stage {stage + 1}', widths
        full = len(space.largest.ratios[stage])
        yield f'blocks of stage {stage + 1}', range(space.min_depths[stage], full + 1)
    yield 'expansion ratios', space.ratios
    for index, number in enumerate(space.largest.num_attention_blocks):
        yield f'attention blocks of stage {index + 3}', range(number + 1)
    if space.necks:
        yield 'channels of the neck', space.necks
