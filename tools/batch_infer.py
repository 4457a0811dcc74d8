"""Run a trained model on millions of images and videos, on this machine or on a Ray cluster.

SOURCE is a folder, a glob in quotes, an image, a video, a list of these (a .txt with one per line),
or a Parquet file or dataset with a column of paths or encoded images. It is on this machine or in
any storage that fsspec supports (s3://, gs://, hf://, https://).

The folder or URL after --out becomes a Parquet dataset with one row for each image and each video
frame: path, frame, time, width, height; boxes, scores, labels and masks (COCO's run-length
encoding) from a detector, or seg_map (a PNG whose values are labels) from a segmentor; and problem,
which says why an input could not be read. The class names are in the metadata.

If a process or a machine is lost, no result is lost or written twice; the same command continues
with the missing ones. docs/scale.md describes clusters and storages, and has measured times.

Exit code: 0 success; 1 it could not run or finish, the message says why; 2 the command line is
wrong; 3 some inputs have problems; 130 interrupted.
"""

import argparse
import os
import sys
from pathlib import Path

from _requirements import explain_missing

with explain_missing():
    from _arguments import add_model_options, make_parser, model_options, number, parse, positive

    from backbones.errors import exit_on_user_error, import_optional
    from backbones.inference.exported_file import is_exported
    from backbones.progress import ProgressBar
    from backbones.weights import use_safe_loading

SOME_FAILED, INTERRUPTED = 3, 130
EXAMPLES = """\
examples:
  python tools/batch_infer.py seg_configs/fpn_effv2_s2.py fpn_s2.pth photos/ --out results
      all images and videos in a folder; read them with pandas.read_parquet('results')
  python tools/batch_infer.py fpn_s2.xml s3://bucket/images.parquet --out s3://bucket/results
      an exported model, from storage to storage
  python tools/batch_infer.py CONFIG CHECKPOINT list.txt --out /shared/results \\
      --address auto --gpus-per-actor 0.5 --actors 4:64 --draw
      on the cluster that this machine belongs to, two processes on each GPU, 4 to 64 in all
"""


def parse_args() -> argparse.Namespace:
    parser = make_parser(
        __doc__,
        EXAMPLES,
        usage='%(prog)s CONFIG CHECKPOINT SOURCE --out DESTINATION [options]\n'
        '       %(prog)s MODEL.{onnx,xml} SOURCE --out DESTINATION [options]',
    )
    parser.add_argument(
        'model',
        nargs='+',
        metavar='CONFIG CHECKPOINT SOURCE',
        help='as for tools/infer.py, and see above; on a cluster, every machine must find the '
        'files at these paths',
    )
    parser.add_argument(
        '--out', required=True, metavar='DESTINATION', help='folder or URL of the results'
    )
    parser.add_argument(
        '--draw', action='store_true', help='also write drawings, as JPEGs in DESTINATION/_drawn'
    )
    parser.add_argument(
        '--images-per-file',
        type=positive,
        default=256,
        metavar='N',
        help='images per file of results; a lost process repeats at most so many (default: 256; '
        'for Parquet files with images, a row group)',
    )
    cluster = parser.add_argument_group('cluster')
    cluster.add_argument(
        '--address',
        help='address of a Ray cluster: auto for the one that this machine belongs to, or '
        'HOST:PORT (default: this machine alone, until the command ends)',
    )
    cluster.add_argument(
        '--actors',
        type=actor_range,
        metavar='N|MIN:MAX',
        help='number of processes with the model, or a range for a cluster that grows and shrinks '
        '(default: as many as fit)',
    )
    cluster.add_argument(
        '--cpus-per-actor',
        type=number(0.1, 1e4),
        metavar='N',
        help='cores per process, for reading and, without a GPU, for the model (default: 1; with '
        'GPUs, the cores available per GPU)',
    )
    cluster.add_argument(
        '--gpus-per-actor',
        type=number(0, 64),
        metavar='N',
        help='GPUs per process; 0.5: two share one (default: 1 if there are GPUs; .xml: none)',
    )
    parser.add_argument(
        '--every', type=positive, default=1, metavar='N', help='use every Nth frame of videos'
    )
    add_model_options(parser)
    args = parse(parser, parser.parse_intermixed_args)
    expected = 2 if is_exported(args.model[0]) else 3
    if len(args.model) != expected:
        parser.error(
            f'give CONFIG CHECKPOINT SOURCE, or an exported file and SOURCE: {args.model} are '
            f'{len(args.model)}, not {expected}. Put a glob in quotes'
        )
    return args


def actor_range(text: str) -> tuple[int, int]:
    """Parse '4' into (4, 4) and '4:64' into (4, 64)."""
    least, _, most = text.partition(':')
    least, most = positive(least), positive(most or least)
    if most < least:
        raise argparse.ArgumentTypeError(f'{text!r} is not MIN:MAX')
    return least, most


def main() -> int:
    args = parse_args()
    try:
        with exit_on_user_error():
            import_optional('ray', 'tools/batch_infer.py', 'scale')
            return batch_infer(args)
    except KeyboardInterrupt:
        print('\ninterrupted; the same command continues with what is missing', file=sys.stderr)
        return INTERRUPTED


def batch_infer(args: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    from backbones.batch_inference.destination import Destination
    from backbones.batch_inference.job import fingerprint, run, versions
    from backbones.batch_inference.source import list_units
    from backbones.inference.predictor import Predictor

    use_safe_loading(args.trust_checkpoint)
    *files, source = args.model
    # The processes may have another working directory.
    files = [os.path.abspath(file) if os.path.exists(file) else file for file in files]
    model = dict(config=files[0], checkpoint=(files[1:] or [None])[0], every=args.every)
    model |= model_options(args)
    # Errors of the model are raised here, once, and not in every process.
    Predictor(**model, device='cpu')
    metadata = fingerprint(model, args.draw)
    out = args.out if '://' in args.out else str(Path(args.out).absolute())
    destination = Destination(out)
    destination.claim(metadata)
    job = dict(out=out, model=model, metadata=metadata | versions(), draw=args.draw)
    job['trust_checkpoint'] = args.trust_checkpoint
    units = list_units(source, destination, args.images_per_file)
    done = set(destination.names())
    missing = [unit for unit in units if unit.part not in done]
    num_inputs, num_missing = (sum(unit.num_inputs for unit in of) for of in (units, missing))
    print(f'{num_inputs} inputs, {num_inputs - num_missing} done earlier; results: {args.out}')
    if not missing:
        return 0
    gpus = 0.0 if files[0].endswith('.xml') else args.gpus_per_actor
    resources = dict(actors=args.actors, cpus=args.cpus_per_actor, gpus=gpus)
    num_rows = num_problems = 0
    with ProgressBar(total=num_missing, unit='input') as bar:
        for report in run(job, missing, args.address, **resources):
            num_rows += report['rows']
            num_problems += report['problems']
            bar.set_postfix(rows=num_rows, problems=num_problems, refresh=False)
            bar.update(report['inputs'])
    print(f'{num_rows} rows written, {num_problems} with a problem')
    return SOME_FAILED if num_problems else 0


if __name__ == '__main__':
    sys.exit(main())
