"""Run a trained model on images, videos and cameras: drawings to look at, data to work with.

INPUT is an image, a video, a folder, a glob in quotes, a URL (http, https, rtsp), a camera
(webcam:0), or - for a list of these on standard input, one per line. The kind of a file is
recognized by its content.

The paths of the results mirror those of the inputs: photos/a.jpg becomes drawn/photos/a.jpg and
data/photos/a.json (COCO results; for segmentation an indexed PNG) in the output folder. Videos
become MP4 files that browsers play. categories.json names the classes, and predictions.jsonl gets
one line per input: what was written, or why not.

Exit code: 0 success; 1 it could not run, the message says why; 2 the command line is wrong; 3 some
inputs failed; 130 interrupted, the results written so far are complete.
"""

import argparse
import os
import sys
from pathlib import Path

from _requirements import explain_missing, wait_passively

wait_passively()
with explain_missing():
    import cv2
    from _arguments import add_model_options, make_parser, model_options, number, parse, positive

    from backbones.errors import ConfigError, OutputError, exit_on_user_error, raise_output_errors
    from backbones.inference import Clip, Inferencer
    from backbones.inference.exported_file import is_exported
    from backbones.inference.inputs import RECORDS_NAME, is_live, list_inputs
    from backbones.inference.output import Writer
    from backbones.inference.output_paths import plan_jobs
    from backbones.inference.run import Run, Window
    from backbones.weights import use_safe_loading

SOME_FAILED, INTERRUPTED = 3, 130
EXAMPLES = """\
examples:
  python tools/infer.py seg_configs/fpn_effv2_s2.py fpn_s2.pth street.jpg
      outputs/fpn_effv2_s2/drawn/street.jpg and outputs/fpn_effv2_s2/data/street.png
  python tools/infer.py det_configs/mask_rcnn_effv2_s2.py mask_rcnn_s2.pth photos/ drive.mp4 \\
      --recursive --out-dir results --classes person car --score-thr 0.5
  python tools/infer.py CONFIG CHECKPOINT drive.mp4 --start 60 --end 90 --every 2 --no-data
      half a minute of a video, every second frame
  python tools/infer.py fpn_s2.xml street.jpg
      an exported model: .xml (OpenVINO) or .onnx (onnxruntime)
  python tools/infer.py CONFIG CHECKPOINT satellite.tif --tile 1024
      a large image, in tiles of 1024x1024 that overlap by a fifth
  python tools/infer.py CONFIG CHECKPOINT webcam:0 --show
      a camera in a window; q ends it
  find photos -name '*.jpg' | python tools/infer.py CONFIG CHECKPOINT - --skip-existing
      continue an interrupted run
"""


def parse_args() -> argparse.Namespace:
    parser = make_parser(
        __doc__,
        EXAMPLES,
        usage='%(prog)s CONFIG CHECKPOINT INPUT [INPUT ...] [options]\n'
        '       %(prog)s MODEL.{onnx,xml} INPUT [INPUT ...] [options]',
    )
    parser.add_argument(
        'model',
        metavar='CONFIG CHECKPOINT',
        help='the config that the model was trained with and a checkpoint of the whole model; or '
        'a file that tools/export.py wrote',
    )
    parser.add_argument('inputs', nargs='+', metavar='INPUT', help='see above')
    parser.add_argument('--recursive', action='store_true', help='search subfolders too')

    output = parser.add_argument_group('output')
    default = 'folder of the results (default: outputs/ plus the name of the config)'
    output.add_argument('--out-dir', metavar='DIR', help=default)
    existing = output.add_mutually_exclusive_group()
    existing.add_argument(
        '--skip-existing', action='store_true', help='leave out inputs that have results'
    )
    existing.add_argument(
        '--overwrite', action='store_true', help='replace the results of inputs that have any'
    )
    less = output.add_mutually_exclusive_group()
    less.add_argument('--data-only', action='store_true', help='write no drawings')
    less.add_argument('--no-data', action='store_true', help='write only drawings')
    output.add_argument('--no-legend', action='store_true', help='draw no legend on segmentations')
    output.add_argument('--show', action='store_true', help='also show drawings in a window')
    output.add_argument(
        '--palette',
        metavar='FILE',
        help="a text file with one color per class and line, as '230 80 50' or '#e65032' "
        "(default: the model's colors)",
    )
    video = parser.add_argument_group('videos and cameras')
    video.add_argument('--every', type=positive, default=1, metavar='N', help='use every Nth frame')
    video.add_argument(
        '--start', type=number(0, 1e9), default=0.0, metavar='SECONDS', help='start here'
    )
    video.add_argument('--end', type=number(0, 1e9), metavar='SECONDS', help='stop here')
    video.add_argument(
        '--policy',
        choices=('latest', 'all'),
        default='latest',
        help='for cameras and live streams: latest drops frames to keep up, and counts them; all '
        'drops none and may fall behind (default: latest)',
    )
    parser.add_argument('--device', help='cpu, cuda:1, ... (default: a GPU if there is one)')
    add_model_options(parser)
    args = parse(parser, parser.parse_intermixed_args)
    args.existing = 'skip' if args.skip_existing else 'overwrite' if args.overwrite else 'refuse'
    args.checkpoint = None if is_exported(args.model) else args.inputs.pop(0)
    if not args.inputs:
        place = ' before --classes' if args.classes else ''
        parser.error(f'there is no INPUT after the model: give CONFIG CHECKPOINT INPUT{place}')
    if args.data_only and args.show:
        parser.error('--show shows drawings, which --data-only leaves out')
    if args.end is not None and args.end <= args.start:
        parser.error('--end has to be after --start')
    return args


def main() -> int:
    args = parse_args()
    # Frames are processed in parallel already.
    cv2.setNumThreads(1)
    # Names of files need not be text.
    if '-' in args.inputs:
        sys.stdin.reconfigure(errors='surrogateescape')
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors='backslashreplace')
    try:
        with exit_on_user_error():
            return infer(args)
    except KeyboardInterrupt:
        print('\ninterrupted; results written so far are complete', file=sys.stderr)
        return INTERRUPTED


def infer(args: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    use_safe_loading(args.trust_checkpoint)
    listed = list_inputs(args.inputs, args.recursive, sys.stdin)
    live = [item for item in listed if is_live(item.path)]
    if live and len(listed) > 1:
        raise ConfigError(f'{live[0].shown} has no end of its own: give it as the only input')
    folder = Path(args.out_dir or Path('outputs', Path(args.model).stem))
    # After --overwrite, earlier results of inputs that were not reached would be left.
    again = 'starts again' if args.overwrite else 'with --skip-existing continues'
    parts = ['drawn'] * (not args.data_only) + ['data'] * (not args.no_data)
    jobs, num_skipped = plan_jobs(listed, folder, args.existing, parts)
    show = Window().show if args.show else None
    options = dict(device=args.device, palette=args.palette, **model_options(args))
    inferencer = Inferencer(args.model, args.checkpoint, **options)
    try:
        with raise_output_errors():
            folder.mkdir(parents=True, exist_ok=True)
        writer = Writer(folder, inferencer, parts, legend=not args.no_legend)
        clip = Clip(args.every, args.start, args.end, args.policy)
        run = Run(inferencer, writer, clip, args.batch_size, show)
        run.stop_on_signals()
        run(jobs)
    except OutputError as error:
        raise ConfigError(
            f'{folder}: {error.strerror}. Results written so far are complete: make room, then '
            f'the same command {again}'
        ) from error
    print(f'\n{run.describe(num_skipped)}')
    print(f'results: {folder}{os.sep}, listed in {folder / RECORDS_NAME}')
    # An interrupted live source counts as done, since it has no other end.
    if run.counts.total() < len(jobs) or run.counts['interrupted']:
        print(f'interrupted; the same command {again}', file=sys.stderr)
        return INTERRUPTED
    return SOME_FAILED if run.failed else 0


if __name__ == '__main__':
    sys.exit(main())
