"""Find the network of the family that fits a task, its data and a device.

A search config is any config of a segmentor with FPNHead, a RetinaNet or a Mask R-CNN, with
search = dict() added. Its network is the largest that the search considers.
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
        parse,
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
      measure the latency of the networks on this device
  python tools/search.py find my_search.py SUPERNET.pth --max-latency 60 --max-parameters 6e6
      the best networks within these limits, with the weights from train.py
  python tools/search.py take my_search.py SUPERNET.pth --number 3 --out my_net.py
      one of them as an ordinary config and checkpoint
"""
LATENCY_EXAMPLES = """\
examples:
  python tools/search.py latency my_search.py --backend openvino --threads 4
      in OpenVINO
  python tools/search.py latency my_search.py --write-files phone --format .mlpackage
  python tools/search.py latency my_search.py --from phone/measurements.csv
      on a phone, with any tool that measures it there
"""
FIND_EXAMPLES = """\
examples:
  python tools/search.py find my_search.py work_dirs/my_search/iter_40000.pth --max-latency 60
      networks of at most 60 ms per image, on the device that `search.py latency` measured
  python tools/search.py find my_search.py SUPERNET.pth --max-parameters 4e6 --method random
      by size alone, with random search, the baseline for all other methods
  torchrun --nproc_per_node 8 tools/search.py find my_search.py SUPERNET.pth --max-latency 60
      on 8 GPUs; each evaluates other networks
"""
TAKE_EXAMPLES = """\
examples:
  python tools/search.py take my_search.py work_dirs/my_search/iter_40000.pth --number 3 \\
      --out my_net.py
  python tools/train.py my_net.py
      continue its training, by itself
"""


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__, EXAMPLES)
    subparsers = parser.add_subparsers(metavar='COMMAND', required=True)
    add_latency(add_command(subparsers, latency, 'measure latency', LATENCY_EXAMPLES))
    add_find(add_command(subparsers, find, 'find the best networks for a target', FIND_EXAMPLES))
    add_take(add_command(subparsers, take, 'write one as config and weights', TAKE_EXAMPLES))
    return parse(parser)


def add_command(
    subparsers: argparse._SubParsersAction,
    run: Callable[[argparse.Namespace], None],
    summary: str,
    examples: str,
) -> argparse.ArgumentParser:
    """Add a command, with the arguments of all commands."""
    parser = subparsers.add_parser(
        run.__name__,
        help=summary,
        description=run.__doc__,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('config', help='a config with `search`')
    parser.add_argument(
        '--work-dir', help="folder of the results (default: the config's, or work_dirs/NAME)"
    )
    add_cfg_options(parser, 'val_dataloader.batch_size=8')
    add_trust_checkpoint(parser)
    parser.set_defaults(run=run, launcher='none')
    return parser


def add_supernet(parser: argparse.ArgumentParser, text: str) -> None:
    """Add the arguments for the weights that are searched."""
    parser.add_argument('checkpoint', help=text)
    text = 'leave out images with errors, if the supernet was trained with --skip-bad'
    parser.add_argument('--skip-bad', action='store_true', help=text)


def load_search(args: argparse.Namespace) -> Config:
    """Return the config with the options of the command line."""
    config = load_run_config(args)
    config.skip_bad = args.skip_bad or config.get('skip_bad', False)
    return config


def add_latency(parser: argparse.ArgumentParser) -> None:
    add, number = parser.add_argument, dict(type=positive, metavar='N')
    add('--backend', choices=BACKENDS, default='torch', help='runtime (default: torch)')
    text = 'size of the images (default: 512x512 for segmentors, 800x1333 for detectors)'
    add('--size', type=image_size, metavar='HEIGHTxWIDTH', help=text)
    add('--networks', **number, help='networks to measure (40; 25 with --write-files)')
    add_measuring(parser)
    add = parser.add_argument_group('for another device, such as a phone').add_argument
    text = 'write the networks as files, and measurements.csv to fill in'
    add('--write-files', type=Path, metavar='DIR', help=text)
    add('--format', choices=FORMATS, default='.onnx', help='of the files (default: .onnx)')
    text = 'fit the latency model to the filled-in table'
    add('--from', dest='table', type=Path, metavar='DIR/measurements.csv', help=text)


def latency(args: argparse.Namespace) -> None:
    """Time whole networks on this device, and fit a model that predicts the latency of all others.

    Measurements are saved as they are made: the same command continues an interrupted one.
    """
    config = load_run_config(args)
    number = args.networks or (25 if args.write_files else 40)
    if args.write_files:
        options = (args.write_files, args.format, args.size, number)
        table = write_files(args.config, args.cfg_options, *options)
        print(f'written: {number} networks. Measure each on the device, fill in {table}, then run')
        print(f'this command again with --from {table} in place of --write-files')
        return
    if args.table:
        backend = ELSEWHERE
        measured = read_measurements(args.table, config)
        model = fit(Space.from_config(config), list(measured), list(measured.values()))
        model.save(latency_path(config.work_dir, backend), config, measured)
    else:
        backend = args.backend
        setting = Setting(
            backend=backend,
            size=args.size or DEFAULT_SIZES[config.default_scope],
            # OpenVINO cannot use the GPUs that torch sees.
            device=str(choose_device(args.device or ('cpu' if backend == 'openvino' else None))),
            threads=args.threads or default_threads(),
        )
        counts = (number, args.rounds, args.seconds)
        model, measured = measure_latency(config, args.cfg_options, setting, *counts)
    print(format_latency(model, measured))
    print(f'written: {latency_path(config.work_dir, backend)}')


def add_find(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    text = 'the checkpoint of the supernet, or of an ordinary training (plain slimming)'
    add_supernet(parser, text)
    add('--max-latency', type=float, metavar='MS', help='for one image, in milliseconds')
    add('--max-parameters', type=float, metavar='N', help='such as 6e6')
    text = f'whose latency to use; {ELSEWHERE}: that of --from (default: the only one measured)'
    add('--backend', choices=(*BACKENDS, ELSEWHERE), help=text)
    text = (
        "greedy is the paper's; random is the baseline; nsga2 is a genetic search that starts from "
        'the result of greedy (default: greedy)'
    )
    add('--method', choices=METHODS, default='greedy', help=text)
    text = 'maximum number of networks to evaluate besides the published ones (default: 250)'
    add('--evaluations', type=positive, default=250, metavar='N', help=text)
    text = 'seed of random and nsga2 (default: 0); it does not change the hold-out images'
    add('--seed', type=seed, default=0, metavar='N', help=text)
    text = (
        'with both targets, the weights of parameters and latency until one target is met '
        "(default: 0.5 1, the paper's)"
    )
    add('--exponents', nargs=2, type=float, default=EXPONENTS, metavar=('A', 'B'), help=text)
    text = 'show the predicted latency, and do not measure the networks found'
    add('--no-measure', dest='measures', action='store_false', help=text)
    add_launcher(parser)


def find(args: argparse.Namespace) -> None:
    """Search for the best networks that meet targets of latency and size.

    Networks are compared on training images that the supernet was not trained on. WORK_DIR/search
    gets front.md (the console's table), front.json, front.png and every evaluation, so that the
    same command continues an interrupted search.
    """
    text = find_networks(load_search(args), args)
    if text:
        print(f'\n{text}')


def add_take(parser: argparse.ArgumentParser) -> None:
    add, number = parser.add_argument, dict(type=positive, metavar='N')
    add_supernet(parser, 'the checkpoint that was searched')
    add('--number', **number, required=True, help='number of the network in front.md')
    text = 'the config to write; the weights go beside it, with the suffix .pth'
    add('--out', type=Path, required=True, metavar='FILE.py', help=text)


def take(args: argparse.Namespace) -> None:
    """Write a network of the front as an ordinary config, and its weights beside it.

    The weights are the supernet's, for further training with tools/train.py. Their norms are
    calibrated, so that they can also be tested as they are.
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
