"""Find the network of the family that fits a task, its data and a device.

A config of a search is any config of a segmentor with FPNHead, a RetinaNet or a Mask R-CNN, and
search = dict(). Its network is the largest of those that are searched.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from _requirements import explain_missing

with explain_missing():
    from _arguments import (
        add_cfg_options,
        add_launcher,
        add_measuring,
        add_trust_checkpoint,
        image_size,
        make_parser,
        parse_run_args,
        positive,
        seed,
    )
    from mmengine.config import Config

    from backbones.benchmark.benchmark import DEFAULT_SIZES, default_threads
    from backbones.benchmark.work import Setting
    from backbones.engine.config import load_run_config
    from backbones.engine.distributed import disconnect
    from backbones.errors import exit_on_user_error
    from backbones.export.formats import FORMATS
    from backbones.inference.model import choose_device
    from backbones.search.find import find_networks
    from backbones.search.latency import ELSEWHERE, fit, format_latency, latency_path
    from backbones.search.measurements import (
        BACKENDS,
        measure_latency,
        read_measurements,
        write_files,
    )
    from backbones.search.methods import EXPONENTS, METHODS
    from backbones.search.space import Space
    from backbones.search.take import take_network
    from backbones.weights import use_safe_loading

EXAMPLES = """\
examples:
  python tools/search.py latency my_search.py --backend openvino
      how long the networks take on this device
  python tools/search.py find my_search.py SUPERNET.pth --max-latency 60 --max-parameters 6e6
      the best networks that take no more than that, with the weights that train.py left
  python tools/search.py take my_search.py SUPERNET.pth --number 3 --out my_net.py
      one of them as an ordinary config and checkpoint
"""
LATENCY_EXAMPLES = """\
examples:
  python tools/search.py latency my_search.py --backend openvino --threads 4 --held-out 15
      in OpenVINO; 15 more networks say how well the latency of others is predicted
  python tools/search.py latency my_search.py --write-files phone --format .mlpackage
  python tools/search.py latency my_search.py --from phone/measurements.csv
      on a phone, by whatever measures it there
"""
FIND_EXAMPLES = """\
examples:
  python tools/search.py find my_search.py work_dirs/my_search/iter_40000.pth --max-latency 60
      networks of at most 60 ms for an image, on the device that `search.py latency` measured
  python tools/search.py find my_search.py SUPERNET.pth --max-parameters 4e6 --method random
      by size alone, and the baseline that every other method has to beat
  torchrun --nproc_per_node 8 tools/search.py find my_search.py SUPERNET.pth --max-latency 60
      on 8 GPUs, each of which evaluates networks of its own
"""
TAKE_EXAMPLES = """\
examples:
  python tools/search.py take my_search.py work_dirs/my_search/iter_40000.pth --number 3 \\
      --out my_net.py
  python tools/train.py my_net.py
      train it on, by itself
"""


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__, EXAMPLES)
    subparsers = parser.add_subparsers(metavar='COMMAND', required=True)
    add_latency(add_command(subparsers, latency, 'how long networks take', LATENCY_EXAMPLES))
    add_find(add_command(subparsers, find, 'the best networks that meet targets', FIND_EXAMPLES))
    add_take(add_command(subparsers, take, 'one of them as config and weights', TAKE_EXAMPLES))
    return parse_run_args(parser)


def add_command(
    subparsers: argparse._SubParsersAction,
    run: Callable[[argparse.Namespace], None],
    summary: str,
    examples: str,
) -> argparse.ArgumentParser:
    """Add a command, with the arguments that all have."""
    parser = subparsers.add_parser(
        run.__name__,
        help=summary,
        description=run.__doc__,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('config', help='a config with `search`')
    parser.add_argument(
        '--work-dir', help='where results go (default: the config, else work_dirs/NAME)'
    )
    add_cfg_options(parser, 'val_dataloader.batch_size=8')
    add_trust_checkpoint(parser)
    parser.set_defaults(run=run, launcher='none', local_rank=0)
    return parser


def add_supernet(parser: argparse.ArgumentParser, text: str) -> None:
    """Add what tells which weights are searched."""
    parser.add_argument('checkpoint', help=text)
    text = 'leave out images with errors, where the supernet was trained with --skip-bad'
    parser.add_argument('--skip-bad', action='store_true', help=text)


def load_search(args: argparse.Namespace) -> Config:
    """The config with everything from the command line in it."""
    config = load_run_config(args)
    config.skip_bad = args.skip_bad or config.get('skip_bad', False)
    return config


def add_latency(parser: argparse.ArgumentParser) -> None:
    add, number = parser.add_argument, dict(type=positive, metavar='N')
    add('--backend', choices=BACKENDS, default='torch', help='what runs them (default: torch)')
    text = 'of the images (default: 512x512 for segmentors, 800x1333 for detectors)'
    add('--size', type=image_size, metavar='HEIGHTxWIDTH', help=text)
    add('--networks', **number, help='to measure (default: 40; 25 with --write-files)')
    text = 'measure N more, which the model does not see, and report its error on them'
    add('--held-out', **number, default=0, help=text)
    add_measuring(parser)
    add = parser.add_argument_group('for another device, such as a phone').add_argument
    text = 'write the networks as files, and measurements.csv to fill in'
    add('--write-files', type=Path, metavar='DIR', help=text)
    add('--format', choices=FORMATS, default='.onnx', help='of these files (default: .onnx)')
    text = 'fit the model to what was filled in'
    add('--from', dest='table', type=Path, metavar='DIR/measurements.csv', help=text)


def latency(args: argparse.Namespace) -> None:
    """Time whole networks on this device, and fit a model of the latency of all others.

    What is measured is kept: a command that was ended goes on where it was.
    """
    config = load_run_config(args)
    number = args.networks or (25 if args.write_files else 40)
    if args.write_files:
        options = (args.write_files, args.format, args.size, number)
        table = write_files(args.config, args.cfg_options, *options)
        print(f'written: {number} networks. Measure each on the device, fill in {table}, then give')
        print(f'this command again with --from {table} in place of --write-files')
        return
    if args.table:
        backend = ELSEWHERE
        measured = read_measurements(args.table, config)
        number = len(measured)
        model = fit(Space.from_config(config), list(measured), list(measured.values()))
        model.save(latency_path(config.work_dir, backend), config, measured)
    else:
        backend = args.backend
        setting = Setting(
            backend=backend,
            size=args.size or DEFAULT_SIZES[config.default_scope],
            # OpenVINO runs on no GPU that torch can see.
            device=str(choose_device(args.device or ('cpu' if backend == 'openvino' else None))),
            threads=args.threads or default_threads(),
        )
        counts = (number, args.held_out, args.rounds, args.seconds)
        model, measured = measure_latency(config, args.cfg_options, setting, *counts)
    print(format_latency(model, measured, number))
    print(f'written: {latency_path(config.work_dir, backend)}')


def add_find(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    text = "the supernet's, or that of an ordinary training of the config (plain slimming)"
    add_supernet(parser, text)
    add('--max-latency', type=float, metavar='MS', help='for one image')
    add('--max-parameters', type=float, metavar='N', help='for instance 6e6')
    text = f'whose latency counts; {ELSEWHERE}: what --from read (default: the only one there is)'
    add('--backend', choices=(*BACKENDS, ELSEWHERE), help=text)
    text = (
        "greedy is the paper's; random the baseline; nsga2 a genetic search that starts from the "
        'greedy one (default: greedy)'
    )
    add('--method', choices=METHODS, default='greedy', help=text)
    text = 'networks to evaluate at most, besides the published ones (default: 250)'
    add('--evaluations', type=positive, default=250, metavar='N', help=text)
    text = 'of random and nsga2 (default: 0); the hold-out stays the same'
    add('--seed', type=seed, default=0, metavar='N', help=text)
    text = (
        'with both targets, how much parameters and latency weigh against each other until one is '
        "met (default: 0.5 1, the paper's)"
    )
    add('--exponents', nargs=2, type=float, default=EXPONENTS, metavar=('A', 'B'), help=text)
    text = 'leave the latency of the networks that are shown at what is predicted'
    add('--no-measure', dest='measures', action='store_false', help=text)
    add_launcher(parser)


def find(args: argparse.Namespace) -> None:
    """Search for the best networks that meet targets of latency and size.

    Networks are compared on a part of the training images that the supernet was not trained on. In
    WORK_DIR/search: front.md (what the console shows), front.json, front.png, and every
    evaluation, so that a search that was ended goes on where it was.
    """
    text = find_networks(load_search(args), args)
    if text:
        print(f'\n{text}')


def add_take(parser: argparse.ArgumentParser) -> None:
    add, number = parser.add_argument, dict(type=positive, metavar='N')
    add_supernet(parser, 'the one that was searched')
    add('--number', **number, required=True, help="the network's in front.md")
    text = 'the config to write; the weights go beside it, with the suffix .pth'
    add('--out', type=Path, required=True, metavar='FILE.py', help=text)


def take(args: argparse.Namespace) -> None:
    """Write a network of the front as an ordinary config, and its weights beside it.

    The weights are the supernet's, to go on from with tools/train.py; with norms calibrated, they
    can be tested as they are.
    """
    take_network(load_search(args), args.checkpoint, args.number, args.out, args.cfg_options)
    print(f'written: {args.out}, {args.out.with_suffix(".pth")}')


def main() -> None:
    args = parse_args()
    with exit_on_user_error():
        use_safe_loading(args.trust_checkpoint)
        args.run(args)
    disconnect()


if __name__ == '__main__':
    sys.exit(main())
