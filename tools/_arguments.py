"""What the tools' command lines have in common."""

import argparse
import math
import os
from collections.abc import Callable
from typing import Any

from mmengine.config import DictAction


def make_parser(
    description: str | None, examples: str, usage: str | None = None
) -> argparse.ArgumentParser:
    """A parser whose help keeps the line breaks of its texts."""
    return argparse.ArgumentParser(
        description=description,
        epilog=examples,
        usage=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_run_arguments(parser: argparse.ArgumentParser, option_example: str) -> None:
    """Add what every run of mmengine's takes; with an example of ``--cfg-options``."""
    parser.add_argument(
        '--work-dir', help='where logs and results go (default: the config, else work_dirs/NAME)'
    )
    add_trust_checkpoint(parser)
    add_cfg_options(parser, option_example)
    add_launcher(parser)


def add_launcher(parser: argparse.ArgumentParser) -> None:
    """Add ``--launcher``; the parser's arguments are then read by :func:`parse_run_args`."""
    parser.add_argument(
        '--launcher',
        choices=('none', 'pytorch', 'slurm', 'mpi'),
        # Each of torchrun's processes would otherwise be a run of its own, in the same work folder.
        default='pytorch' if 'TORCHELASTIC_RUN_ID' in os.environ else 'none',
        help='what started the processes (default: pytorch under torchrun, else none, a single '
        'one)',
    )
    # torch.distributed.launch passes it; torchrun sets LOCAL_RANK instead.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def add_trust_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add ``--trust-checkpoint``."""
    parser.add_argument(
        '--trust-checkpoint',
        action='store_true',
        help='read checkpoints even if that may run code in them: only for files that you made '
        'yourself',
    )


def add_cfg_options(parser: argparse.ArgumentParser, example: str) -> None:
    """Add ``--cfg-options``; the parser's arguments are then read by :func:`parse`."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        metavar='KEY=VALUE',
        help=f'override entries of the config: {example}',
    )


def add_no_deploy(parser: argparse._ActionsContainer) -> None:
    """Add ``--no-deploy``, which makes ``deploy`` False."""
    parser.add_argument(
        '--no-deploy',
        dest='deploy',
        action='store_false',
        help='leave the network as it is in training instead of folding its norms and scales, '
        'which is slower and changes results by rounding only',
    )


def add_measuring(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``, ``--threads``, ``--rounds`` and ``--seconds``, for measuring in turns."""
    add, number = parser.add_argument, dict(type=positive, metavar='N')
    add('--device', help='for instance cuda:1 (default: the first GPU, else cpu)')
    text = 'of the processor (default: OMP_NUM_THREADS, else one for each physical core)'
    add('--threads', **number, help=text)
    add('--rounds', **number, default=10, help='turns of every model, at most (default: 10)')
    text = 'for each model, after which no round but the first three begins (default: 5)'
    add('--seconds', type=float, default=5.0, metavar='S', help=text)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add what :func:`model_options` reads, and ``--trust-checkpoint``."""
    selection = parser.add_argument_group('selection')
    selection.add_argument(
        '--score-thr',
        type=number(0, 1),
        default=0.3,
        metavar='SCORE',
        help='leave out detections below this (default: 0.3; at most 0.05 to compute AP from the '
        'data)',
    )
    selection.add_argument('--classes', nargs='+', metavar='NAME', help='only these (default: all)')
    add_tile(parser.add_argument_group('large images'))
    speed = parser.add_argument_group('speed')
    speed.add_argument(
        '--batch-size',
        type=positive,
        default=1,
        metavar='N',
        help='images that go through the model at once, if that many of one size are ready; '
        'changes no result (default: 1)',
    )
    speed.add_argument(
        '--amp',
        action='store_true',
        help='mixed precision: float16 on a GPU, bfloat16 on a CPU that has it, where it makes an '
        '.xml twice as fast, and checkpoints faster at 512x512 and above',
    )
    add_no_deploy(speed)
    add_trust_checkpoint(parser)
    add_cfg_options(parser, 'model.test_cfg.score_thr=0.01')


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of Inferencer that its tools have in common, without the model's files."""
    names = (
        *('batch_size', 'amp', 'deploy', 'score_thr', 'classes', 'cfg_options'),
        *('tile', 'overlap'),
    )
    return {name: getattr(args, name) for name in names}


def add_tile(parser: argparse._ActionsContainer) -> None:
    """Add ``--tile`` and ``--overlap``."""
    parser.add_argument(
        '--tile',
        type=int,
        metavar='PIXELS',
        help='of images with a longer side, put tiles of this height and width through the model '
        'and merge what it predicts: small objects are not lost to resizing, and memory is '
        'bounded. About the size of the images of training is best',
    )
    parser.add_argument(
        '--overlap',
        type=float,
        metavar='SHARE',
        help='with --tile: the share of a tile that the next one sees too; best above the size of '
        'most objects (default: 0.2)',
    )


def parse(
    parser: argparse.ArgumentParser, parse_args: Callable[[], argparse.Namespace] | None = None
) -> argparse.Namespace:
    """Parse the command line, with a message for what ``--cfg-options`` cannot take."""
    try:
        return (parse_args or parser.parse_args)()
    # What mmengine's DictAction makes of an entry without '=', and of brackets that it does not
    # know or that do not match.
    except (ValueError, RecursionError, AssertionError):
        parser.error(
            '--cfg-options takes KEY=VALUE without spaces, after all files. A value is a number, a '
            'word, None, or a list as "[1,2]" or "(1,2)". The entries of a dict are given one by '
            'one: model.backbone.init_cfg.checkpoint=PATH'
        )


def parse_run_args(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line, and tell mmengine which process of its machine this is."""
    args = parse(parser)
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def positive(text: str) -> int:
    """A number from 1 on."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f'{text!r} is not a number from 1 on')
    return int(text)


def seed(text: str) -> int:
    """A number that NumPy takes as a seed."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f'{text!r} is not a number from 0 to {2**32 - 1}')
    return int(text)


def number(low: float, high: float) -> Callable[[str], float]:
    """A type for argparse: a number in this range."""

    def parse_number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f'{text!r} is not a number from {low} to {high:g}')
        return value

    return parse_number


def image_size(text: str) -> tuple[int, int]:
    """'800x1344' as (800, 1344)."""
    height, separator, width = text.lower().partition('x')
    if not (separator and height.isdecimal() and width.isdecimal() and int(height) * int(width)):
        raise argparse.ArgumentTypeError(f'{text!r} is not HEIGHTxWIDTH, such as 800x1344')
    return int(height), int(width)
