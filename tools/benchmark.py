"""Measure models side by side: latency, memory, parameters, multiply-adds; table, JSON and plot.

Measures the backbone and the whole model in torch, compiled, onnxruntime or OpenVINO, and training
steps. Models take turns in one run. The output folder gets benchmark.json (everything),
benchmark.md (the console's table) and benchmark.png (latency over parameters and multiply-adds).

Exit code: 0 success; 1 it could not run, the message says why; 3 some models failed.
"""

import argparse
import json
import sys
from itertools import product
from pathlib import Path

from _requirements import explain_missing

with explain_missing():
    from _arguments import (
        add_cfg_options,
        add_measuring,
        add_no_deploy,
        image_size,
        make_parser,
        parse,
        positive,
    )

    from backbones.benchmark.benchmark import benchmark, default_threads
    from backbones.benchmark.candidates import group_configs
    from backbones.benchmark.report import draw_plot, format_outcome
    from backbones.benchmark.work import BACKENDS, PARTS, Setting
    from backbones.errors import exit_on_user_error
    from backbones.files import write_text
    from backbones.inference.model import choose_device
    from backbones.weights import use_safe_loading

SOME_FAILED = 3
EXAMPLES = """\
examples:
  python tools/benchmark.py seg_configs/fpn_effv2_s?.py seg_configs/fpn_effv2_l.py --peers \\
      --part backbone
      all sizes beside MobileNetV2 and ResNet, on this machine
  python tools/benchmark.py det_configs/mask_rcnn_effv2_s0.py --sizes 800x1333 --batch 1 8 --train
      backbone and whole model, prediction and training step
  python tools/benchmark.py seg_configs/fpn_effv2_s2.py --peers --threads 1 \\
      --backend torch compile onnxruntime openvino
      one model in all runtimes, on one core
"""


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__, EXAMPLES)
    add = parser.add_argument
    add('configs', nargs='+', metavar='CONFIG', help='configs to compare')
    text = 'add MobileNetV2, ResNet-18 and ResNet-50 under the same neck and head'
    add('--peers', action='store_true', help=text)
    text = 'the backbone alone or the whole model (default: both)'
    add('--part', nargs='+', choices=PARTS, default=list(PARTS), help=text)
    text = 'size of the images (default: 512x512 for segmentors, 800x1333 for detectors)'
    add('--sizes', nargs='+', type=image_size, metavar='HEIGHTxWIDTH', help=text)
    add('--batch', nargs='+', type=positive, default=[1], metavar='N', help='images at once (1)')
    text = 'runtimes of the models (default: torch)'
    add('--backend', nargs='+', choices=BACKENDS, default=['torch'], help=text)
    add('--train', action='store_true', help='also measure training steps')
    add_no_deploy(parser)
    text = 'mixed precision, as in infer.py and train.py; not in onnxruntime'
    add('--amp', action='store_true', help=text)
    add_measuring(parser)
    text = 'output folder (default: work_dirs/benchmark)'
    add('--out-dir', type=Path, default=Path('work_dirs/benchmark'), metavar='DIR', help=text)
    add_cfg_options(parser, 'model.test_cfg.rpn.max_per_img=300')
    return parse(parser)


def main() -> int:
    args = parse_args()
    with exit_on_user_error():
        use_safe_loading()
        device, threads = str(choose_device(args.device)), args.threads or default_threads()
        # Only torch can train.
        steps = [('predict', name) for name in args.backend] + [('train', 'torch')] * args.train
        settings = [
            Setting(part, step, backend, size, batch, args.deploy, args.amp, device, threads)
            for size, batch, part, (step, backend) in product(
                args.sizes or [None], args.batch, args.part, steps
            )
        ]
        groups = group_configs(args.configs, args.peers, args.cfg_options)
        # Measuring takes long, so a folder that cannot be written to has to fail before.
        args.out_dir.mkdir(parents=True, exist_ok=True)
        outcome = benchmark(groups, settings, args.rounds, args.seconds)
        text = format_outcome(outcome)
        print(f'\n{text}\n')
        texts = {'benchmark.json': json.dumps(outcome, indent=2), 'benchmark.md': text}
        for name, content in texts.items():
            write_text(args.out_dir / name, content)
        print(f'written: {args.out_dir}/benchmark.json, benchmark.md', end='')
        print(', benchmark.png' if draw_plot(outcome, args.out_dir / 'benchmark.png') else '')
    return SOME_FAILED if any(each['problem'] for each in outcome['results']) else 0


if __name__ == '__main__':
    sys.exit(main())
