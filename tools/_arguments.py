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
    """Return a parser whose help keeps the line breaks of its texts."""
    return argparse.ArgumentParser(
        description=description,
        epilog=examples,
        usage=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_run_arguments(parser: argparse.ArgumentParser, option_example: str) -> None:
    """Add the options of every mmengine run; the example is for ``--cfg-options``."""
    parser.add_argument(
        '--work-dir', help="folder of logs and results (default: the config's, or work_dirs/NAME)"
    )
    add_trust_checkpoint(parser)
    add_cfg_options(parser, option_example)
    add_launcher(parser)


def add_launcher(parser: argparse.ArgumentParser) -> None:
    """Add ``--launcher``."""
    parser.add_argument(
        '--launcher',
        choices=('none', 'pytorch', 'slurm', 'mpi'),
        # Otherwise each process of torchrun would be a separate run in the same work folder.
        default='pytorch' if 'TORCHELASTIC_RUN_ID' in os.environ else 'none',
        help='what starts the processes (default: pytorch under torchrun, else none: a single '
        'process)',
    )
    # torch.distributed.launch passes it besides setting LOCAL_RANK.
    parser.add_argument('--local_rank', '--local-rank', help=argparse.SUPPRESS)


def add_trust_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add ``--trust-checkpoint``."""
    parser.add_argument(
        '--trust-checkpoint',
        action='store_true',
        help='read checkpoints even if they may run code; use it only for files that you made '
        'yourself',
    )


def add_cfg_options(parser: argparse.ArgumentParser, example: str) -> None:
    """Add ``--cfg-options``; then use :func:`parse` to parse the command line."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        metavar='KEY=VALUE',
        help=f'override entries of the config, such as {example}',
    )


def add_no_deploy(parser: argparse._ActionsContainer) -> None:
    """Add ``--no-deploy``, which makes ``deploy`` False."""
    parser.add_argument(
        '--no-deploy',
        dest='deploy',
        action='store_false',
        help='keep the network as in training and do not fold its norms and scales; this is '
        'slower, and the results differ by rounding only',
    )


def add_measuring(parser: argparse.ArgumentParser) -> None:
    """Add the options for measuring models in turns."""
    add, number = parser.add_argument, dict(type=positive, metavar='N')
    add('--device', help='such as cuda:1 (default: the first GPU, else cpu)')
    text = 'CPU threads (default: OMP_NUM_THREADS, else one per physical core)'
    add('--threads', **number, help=text)
    add('--rounds', **number, default=10, help='rounds, at most (default: 10)')
    text = 'time per model; then no new round begins, except the first three (default: 5)'
    add('--seconds', type=float, default=5.0, metavar='S', help=text)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`model_options` reads, and ``--trust-checkpoint``."""
    selection = parser.add_argument_group('selection')
    selection.add_argument(
        '--score-thr',
        type=number(0, 1),
        default=0.3,
        metavar='SCORE',
        help='leave out detections with a lower score (default: 0.3; to compute AP from the '
        'data, 0.05 or lower)',
    )
    selection.add_argument('--classes', nargs='+', metavar='NAME', help='the only classes to keep')
    add_tile(parser.add_argument_group('large images'))
    speed = parser.add_argument_group('speed')
    speed.add_argument(
        '--batch-size',
        type=positive,
        default=1,
        metavar='N',
        help='images per batch, if so many of one size are ready; does not change the results '
        '(default: 1)',
    )
    speed.add_argument(
        '--amp',
        action='store_true',
        help='mixed precision: float16 on a GPU, bfloat16 on a CPU that supports it (an .xml is '
        'twice as fast there, a checkpoint is faster from 512x512 on)',
    )
    add_no_deploy(speed)
    add_trust_checkpoint(parser)
    add_cfg_options(parser, 'model.test_cfg.score_thr=0.01')


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of Inferencer that its tools share, without the model's files."""
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
        help='split images with a longer side into tiles of this height and width, and merge the '
        'predictions; so resizing loses no small objects, and memory is bounded. Best is about '
        'the size of the training images',
    )
    parser.add_argument(
        '--overlap',
        type=float,
        metavar='SHARE',
        help='with --tile: the share of a tile that the next tile sees too; best larger than '
        'most objects (default: 0.2)',
    )


def parse(
    parser: argparse.ArgumentParser, parse_args: Callable[[], argparse.Namespace] | None = None
) -> argparse.Namespace:
    """Parse the command line; explain ``--cfg-options`` if its values cannot be parsed."""
    try:
        return (parse_args or parser.parse_args)()
    # mmengine's DictAction raises these for an entry without '=', and for brackets that it does
    # not know or that do not match.
    except (ValueError, RecursionError, AssertionError):
        parser.error(
            '--cfg-options takes KEY=VALUE without spaces, after all files. A value is a number, a '
            'word, None, or a list as "[1,2]" or "(1,2)". The entries of a dict are given one by '
            'one: model.backbone.init_cfg.checkpoint=PATH'
        )


def positive(text: str) -> int:
    """Parse a whole number from 1 on."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f'{text!r} is not a number from 1 on')
    return int(text)


def seed(text: str) -> int:
    """Parse a number that NumPy accepts as a seed."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f'{text!r} is not a number from 0 to {2**32 - 1}')
    return int(text)


def number(low: float, high: float) -> Callable[[str], float]:
    """Return a type for argparse: a number in this range."""

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
    """Parse '800x1344' into (800, 1344)."""
    height, separator, width = text.lower().partition('x')
    if not (separator and height.isdecimal() and width.isdecimal() and int(height) * int(width)):
        raise argparse.ArgumentTypeError(f'{text!r} is not HEIGHTxWIDTH, such as 800x1344')
    return int(height), int(width)
