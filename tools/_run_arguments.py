"""The arguments that train.py and test.py share."""

import argparse
import os

from mmengine.config import DictAction


def add_run_arguments(parser: argparse.ArgumentParser, option_example: str) -> None:
    """Add what every run of a config takes.

    Args:
        parser: Changed in place.
        option_example: An example of ``--cfg-options``.
    """
    parser.add_argument(
        '--trust-checkpoint',
        action='store_true',
        help='read checkpoints even if that may run code in them: only for files that you made '
        'yourself',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        metavar='KEY=VALUE',
        help=f'override entries of the config: {option_example}',
    )
    parser.add_argument(
        '--launcher',
        choices=('none', 'pytorch', 'slurm', 'mpi'),
        default='none',
        help='what started the processes (default: none, a single one)',
    )
    # torch.distributed.launch passes it; torchrun sets LOCAL_RANK instead.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def parse_run_args(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line, and tell mmengine which process of its machine this is."""
    try:
        args = parser.parse_args()
    # What mmengine's DictAction makes of brackets that it does not know or that do not match.
    except (RecursionError, AssertionError):
        parser.error(
            '--cfg-options: a value is a number, a word, None, or a list as "[1,2]" or "(1,2)". '
            'The entries of a dict are given one by one: model.backbone.init_cfg.checkpoint=PATH'
        )
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args
