"""Run a model on pictures and videos: drawings to show, data to work with.

INPUT is a picture, a video, a folder, a pattern in quotes, an address (http, https, rtsp), a
camera (webcam:0), or - for a list of those on standard input, one a line. What a file is, is found
out by looking into it.

In the output folder, drawn/ gets the drawings (videos as MP4 that browsers play), data/ the
predictions (COCO results in JSON; of a segmentation indexed PNGs), categories.json their classes,
and predictions.jsonl a line for each input: what was written, or why not.

Exit code: 0 all is well; 1 nothing could be done, the message says why; 2 the command line is
wrong; 3 some inputs failed; 130 interrupted, what was begun is finished.
"""

import argparse
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from types import FrameType

from _requirements import explain_missing

# Read when torch is loaded: threads that wait actively for the model's next step would take the
# cores from reading, drawing and encoding.
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

with explain_missing():
    import cv2
    from _arguments import (
        add_cfg_options,
        add_no_deploy,
        add_trust_checkpoint,
        make_parser,
        parse,
        positive,
    )

    from backbones import trust_checkpoints
    from backbones.errors import ConfigError, OutputError, exit_on_user_error
    from backbones.export.runner import is_exported
    from backbones.inference.inferencer import Inferencer
    from backbones.inference.inputs import Input, is_live, list_inputs
    from backbones.inference.jobs import plan_jobs
    from backbones.inference.progress import Progress
    from backbones.inference.reading import Clip
    from backbones.inference.records import FILE_NAME, PART_PATTERN, RecordFile, merge_records
    from backbones.inference.run import Run, Summary
    from backbones.inference.sharding import Processes, connect, device_of_process
    from backbones.inference.window import Window
    from backbones.inference.writing import Writer

SOME_FAILED, INTERRUPTED = 3, 130
EXAMPLES = """\
examples:
  python tools/infer.py seg_configs/fpn_effv2_s2.py fpn_s2.pth street.jpg
      outputs/drawn/street.jpg and outputs/data/street.png
  python tools/infer.py det_configs/mask_rcnn_effv2_s2.py mask_rcnn_s2.pth photos/ drive.mp4 \\
      --recursive --out-dir results --classes person car --score-thr 0.5
  python tools/infer.py CONFIG CHECKPOINT drive.mp4 --start 60 --end 90 --every 2 --no-data
      half a minute of a video, every second frame
  python tools/infer.py fpn_s2.xml street.jpg
      an exported model: .xml (OpenVINO), .onnx (onnxruntime) or .pt2 (torch)
  python tools/infer.py CONFIG CHECKPOINT webcam:0 --show
      a camera in a window; q ends it
  find photos -name '*.jpg' | python tools/infer.py CONFIG CHECKPOINT - --skip-existing
      goes on where an earlier run was stopped
  torchrun --nproc-per-node 8 tools/infer.py CONFIG CHECKPOINT photos/
      every process takes its share of the inputs; so does srun
"""


def parse_args() -> argparse.Namespace:
    parser = make_parser(
        __doc__,
        EXAMPLES,
        usage='%(prog)s CONFIG CHECKPOINT INPUT [INPUT ...] [options]\n'
        '       %(prog)s MODEL.{onnx,xml,pt2} INPUT [INPUT ...] [options]',
    )
    parser.add_argument(
        'model',
        metavar='CONFIG CHECKPOINT',
        help='the config that the model was trained with and a checkpoint of the whole model; or '
        'a file that tools/export.py wrote, an .onnx, .xml or .pt2',
    )
    parser.add_argument('inputs', nargs='+', metavar='INPUT', help='see above')
    parser.add_argument('--recursive', action='store_true', help='search folders in folders too')

    output = parser.add_argument_group('output')
    output.add_argument('--out-dir', default='outputs', metavar='DIR', help='default: outputs')
    earlier = output.add_mutually_exclusive_group()
    earlier.add_argument(
        '--skip-existing',
        action='store_const',
        dest='earlier',
        const='skip',
        default='refuse',
        help='leave out what an earlier run has finished',
    )
    earlier.add_argument(
        '--overwrite',
        action='store_const',
        dest='earlier',
        const='overwrite',
        help='do everything again, in place of earlier results',
    )
    output.add_argument('--data-only', action='store_true', help='no drawings')
    output.add_argument('--no-data', action='store_true', help='only drawings')
    output.add_argument(
        '--show', action='store_true', help='show drawings in a window as they come'
    )
    output.add_argument(
        '--palette',
        metavar='NAME|FILE',
        help="colours: coco, voc, cityscapes, ade20k, ..., random, or a text file with a class's "
        "colour a line, as '230 80 50' or '#e65032' (default: the model's)",
    )

    selection = parser.add_argument_group('what is kept')
    selection.add_argument(
        '--score-thr',
        type=score,
        default=0.3,
        metavar='SCORE',
        help='leave out detections below this, of drawings and data (default: 0.3; 0.05 or less '
        'where AP is to be computed of the data)',
    )
    selection.add_argument(
        '--classes', nargs='+', metavar='NAME', help='keep these classes only (default: all)'
    )

    video = parser.add_argument_group('videos and cameras')
    video.add_argument(
        '--every', type=positive, default=1, metavar='N', help='take every Nth frame (default: 1)'
    )
    video.add_argument(
        '--start', type=seconds, default=0.0, metavar='SECONDS', help='default: the beginning'
    )
    video.add_argument('--end', type=seconds, metavar='SECONDS', help='default: the end')
    video.add_argument(
        '--policy',
        choices=('latest', 'all'),
        default='latest',
        help='cameras and live streams: latest drops frames there is no time for and counts them, '
        'all drops none and may fall behind (default: latest)',
    )

    speed = parser.add_argument_group('speed')
    speed.add_argument(
        '--batch-size',
        type=positive,
        default=1,
        metavar='N',
        help='pictures that go through the model at once, if so many of one size are ready; '
        'changes no result (default: 1)',
    )
    speed.add_argument('--device', help='cpu, cuda:1, ... (default: a GPU if there is one)')
    speed.add_argument(
        '--amp',
        action='store_true',
        help='mixed precision: float16 on a GPU, bfloat16 on a CPU that has it, where it makes an '
        '.xml twice as fast, and checkpoints faster at 512x512 and above',
    )
    add_no_deploy(speed)

    add_trust_checkpoint(parser)
    add_cfg_options(parser, 'model.test_cfg.score_thr=0.01')
    args = parse(parser, parser.parse_intermixed_args)
    args.checkpoint = None if is_exported(args.model) else args.inputs.pop(0)
    if not args.inputs:
        parser.error('there is no INPUT after the model: give CONFIG CHECKPOINT INPUT')
    if args.end is not None and args.end <= args.start:
        parser.error(f'--end {args.end:g} is not after --start {args.start:g}')
    if args.data_only and args.no_data:
        parser.error('--data-only and --no-data leave nothing to write')
    return args


def seconds(text: str) -> float:
    """A time from 0 on."""
    number = float(text)
    if not 0 <= number < float('inf'):
        raise argparse.ArgumentTypeError(f'{text} is not 0 or more')
    return number


def score(text: str) -> float:
    """A number from 0 to 1."""
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f'{text} is not from 0 to 1')
    return number


def main() -> int:
    args = parse_args()
    # Frames are worked on in parallel already.
    cv2.setNumThreads(1)
    # Names of files need not be text.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors='backslashreplace')
    try:
        return infer(args)
    except KeyboardInterrupt:
        print('\nended; what is finished is whole', file=sys.stderr)
        return INTERRUPTED


def infer(args: argparse.Namespace) -> int:
    """Do what was asked for; returns the exit code."""
    with exit_on_user_error():
        if args.trust_checkpoint:
            trust_checkpoints()
        processes = connect()
        folder = Path(args.out_dir)
        paths, jobs, num_skipped = processes.from_first(lambda: plan(args, folder))
        share = processes.share_of(jobs)
        window = Window('predictions') if args.show else None
        inferencer = Inferencer(
            args.model,
            args.checkpoint,
            device=args.device if args.checkpoint is None else device_of_process(args.device),
            batch_size=args.batch_size,
            amp=args.amp,
            deploy=args.deploy,
            score_thr=args.score_thr,
            classes=args.classes,
            palette=args.palette,
            cfg_options=args.cfg_options,
        )
        writer = Writer(
            folder,
            inferencer.classes,
            inferencer.palette,
            draws=not args.data_only,
            writes_data=not args.no_data,
        )
        try:
            summary, was_stopped = work(args, processes, share, inferencer, writer, window)
            summaries = processes.gather((summary, was_stopped))
            if processes.rank == 0:
                records = merge_records(folder, paths)
        except OutputError as error:
            raise ConfigError(
                f'{folder}: {error.strerror}. What is finished is whole: make room, then go on '
                'with the same command and --skip-existing'
            ) from error
    if processes.rank == 0:
        report([summary for summary, _ in summaries], records, paths, num_skipped, folder)
    processes.await_end_of_first()
    if any(stopped for _, stopped in summaries):
        if processes.rank == 0:
            print('interrupted; the same command with --skip-existing goes on', file=sys.stderr)
        return INTERRUPTED
    return SOME_FAILED if any(summary.failed for summary, _ in summaries) else 0


def plan(args: argparse.Namespace, folder: Path) -> tuple[list[str], list[Input], int]:
    """All inputs, what is to be done of them, and how many were done earlier."""
    listed = list_inputs(args.inputs, args.recursive, sys.stdin)
    live = [item for item in listed if is_live(item.path)]
    if live and len(listed) > 1:
        raise ConfigError(f'{live[0].shown} has no end of its own: give it as the only input')
    wanted = ['drawn'] * (not args.data_only) + ['data'] * (not args.no_data)
    jobs, num_skipped = plan_jobs(listed, folder, args.earlier, wanted)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A run that was killed has left its records in parts, which this one will write anew.
        if any(folder.glob(PART_PATTERN)):
            merge_records(folder, ())
    except OSError as error:
        raise ConfigError(f'--out-dir {folder} cannot be written: {error.strerror}') from error
    return [item.shown for item in listed], jobs, num_skipped


def work(
    args: argparse.Namespace,
    processes: Processes,
    jobs: list[Input],
    inferencer: Inferencer,
    writer: Writer,
    window: Window | None,
) -> tuple[Summary, bool]:
    """Do this process's share; returns what was done, and whether it was interrupted."""
    prefix = f'rank {processes.rank}: ' if processes.count > 1 else ''
    progress = Progress(len(jobs), prefix)
    records = RecordFile(writer.folder, jobs, processes.rank)
    clip = Clip(args.every, args.start, args.end, args.policy)
    run = Run(
        inferencer.model,
        writer,
        records,
        clip,
        args.batch_size,
        progress,
        show=window.show if window else None,
    )
    interruption = Interruption(run)
    try:
        if writer.writes_data and processes.rank == 0:
            writer.write_categories()
        live = any(is_live(job.path) for job in jobs)
        summary = run(jobs, live)
    finally:
        progress.close()
        records.close()
        if window:
            window.close()
    # A camera has no other end.
    return summary, interruption.happened and not live


class Interruption:
    """Ctrl-C and SIGTERM let the run finish what it has in hand; a second one ends it at once."""

    def __init__(self, run: Run) -> None:
        self.happened = False
        self._run = run
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.happened:
            raise KeyboardInterrupt
        self.happened = True
        # Not print, which may be what was interrupted.
        os.write(sys.stderr.fileno(), b'\nfinishing what is begun; once more ends at once\n')
        self._run.stop()


def report(
    summaries: list[Summary],
    records: dict[str, dict],
    paths: list[str],
    num_skipped: int,
    folder: Path,
) -> None:
    """The last lines: what was done, how fast, and where it is."""
    failed = [failure for summary in summaries for failure in summary.failed]
    done = sum(summary.done for summary in summaries)
    left_out = sum(summary.left_out for summary in summaries)
    interrupted = sum(summary.interrupted for summary in summaries)
    frames = sum(summary.frames for summary in summaries)
    duration = max(summary.seconds for summary in summaries)
    parts = [f'{done} done', f'{len(failed)} failed']
    parts += [f'{interrupted} interrupted'] if interrupted else []
    parts += [f'{num_skipped} skipped, done earlier'] if num_skipped else []
    parts += [f'{left_out} left out, neither picture nor video'] if left_out else []
    print(f'\ninputs:  {", ".join(parts)}')
    for path, problem in failed[:10]:
        print(f'         failed: {path}: {problem}')
    if len(failed) > 10:
        print(f'         ... and {len(failed) - 10} more')
    if frames:
        kinds = Counter(records[path].get('kind') for path in paths if path in records)
        unit = 'pictures' if set(kinds) <= {'picture', None} else 'frames'
        busy = max(summaries, key=lambda summary: summary.frames)
        print(
            f'speed:   {frames} {unit} in {duration:.1f} s, {frames / duration:.2f} a second '
            f'(model alone {busy.model_rate:.2f}, drawing and writing alone '
            f'{busy.finishing_rate:.1f})'
        )
    for summary in summaries:
        if summary.capture_rate:
            print(f'capture: {summary.capture_rate:.1f} a second, {summary.dropped} dropped')
    print(f'results: {folder}{os.sep}, listed in {folder / FILE_NAME}')


if __name__ == '__main__':
    sys.exit(main())
