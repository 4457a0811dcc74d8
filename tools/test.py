"""Test a detector or a segmentor: COCO's AP for boxes and masks, or mIoU, overall and per class.

It also tests a file that tools/export.py wrote, given in place of the checkpoint.
"""

import argparse
import os
import sys
from pathlib import Path

from _requirements import explain_missing, wait_passively

wait_passively()
with explain_missing():
    from _arguments import add_no_deploy, add_run_arguments, add_tile, make_parser, parse
    from mmengine.config import Config
    from mmengine.dist import is_main_process
    from mmengine.logging import MMLogger

    from backbones.deploy import switch_to_deploy
    from backbones.engine.config import fit_to_device, load_run_config
    from backbones.engine.console import quiet
    from backbones.engine.distributed import disconnect, prepare_on_first, unwrap
    from backbones.engine.metrics import format_metrics, write_metrics
    from backbones.engine.preflight import check_test
    from backbones.engine.runner import ReliableRunner
    from backbones.engine.tta import use_test_time_augmentation
    from backbones.errors import ConfigError, exit_on_user_error, raise_output_errors
    from backbones.inference.exported_file import is_exported
    from backbones.inference.testing import use_inferencer
    from backbones.inference.tiles import check_tile
    from backbones.weights import use_safe_loading

EXAMPLES = """\
examples:
  python tools/test.py seg_configs/fpn_effv2_s2.py work_dirs/fpn_effv2_s2/best_mIoU_iter_40000.pth
      mIoU on ADE20K's validation images
  python tools/test.py det_configs/mask_rcnn_effv2_s0.py CHECKPOINT --show-dir drawn
      box and mask AP on COCO; ground truth and prediction of every image are drawn to drawn/
  python tools/test.py det_configs/mask_rcnn_effv2_s0.py CHECKPOINT --report report.html
      also one page with classes, curves, errors by type, calibration and the worst images
  tools/dist_test.sh det_configs/retinanet_effv2_l.py CHECKPOINT 8 --out metrics.json
      on 8 GPUs
  python tools/test.py seg_configs/fpn_effv2_s0.py fpn_s0.xml
      an exported file: .xml (OpenVINO) or .onnx (onnxruntime), in float or int8
  python tools/test.py det_configs/retinanet_effv2_s2.py CHECKPOINT --tile 1024
      on large images, in tiles of 1024x1024
"""


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument('config', help='the config that the model was trained with')
    parser.add_argument(
        'checkpoint',
        help='a checkpoint that tools/train.py, convert_checkpoint.py or publish_model.py wrote, '
        'or a file that tools/export.py wrote',
    )
    parser.add_argument(
        '--out', metavar='FILE', help='write metrics here as JSON (default: WORK_DIR/metrics.json)'
    )
    parser.add_argument(
        '--show-dir',
        metavar='DIR',
        help='draw every image with ground truth (left) and prediction (right) to this folder',
    )
    parser.add_argument(
        '--report',
        metavar='FILE',
        help='also write one HTML page: classes, curves, errors by type, the worst images',
    )
    parser.add_argument(
        '--tta',
        action='store_true',
        help="also predict flipped images, and the sizes of the config's tta_pipeline; average a "
        "segmentor's probabilities, merge a detector's boxes",
    )
    parser.add_argument(
        '--amp', action='store_true', help='mixed precision, for an exported .xml only'
    )
    add_tile(parser)
    add_no_deploy(parser)
    add_run_arguments(parser, 'test_dataloader.batch_size=4')
    return parse(parser)


def configure(args: argparse.Namespace) -> Config:
    """Return the config with the options of the command line."""
    config = load_run_config(args)
    for option, file in (('--out', args.out), ('--report', args.report)):
        if file and (Path(file).is_dir() or file.endswith('/')):
            raise ConfigError(f'{option} {file} is a folder; give the path of a file')
        if file:
            folder = Path(file).parent
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise ConfigError(f'{option} {file}: its folder cannot be written to')
    if args.out and args.out.endswith(('.pkl', '.pickle')):
        raise ConfigError(
            f'--out {args.out}: metrics are written as JSON; to write predictions, add the metric '
            'mmdet.DumpDetResults or DumpResults to the config'
        )
    check_tile(args.tile, args.overlap)
    if args.tile is not None and args.tta:
        raise ConfigError('--tta resizes and flips whole images: use either --tta or --tile')
    if is_exported(args.checkpoint):
        if args.tta or not args.deploy or any(key.startswith('model.') for key in args.cfg_options):
            raise ConfigError(
                f'{args.checkpoint} is exported, so that its model cannot be changed: leave out '
                '--tta, --no-deploy and --cfg-options model....'
            )
        use_model(config, args)
        return config
    if args.amp:
        raise ConfigError('--amp is for exported .xml files')
    config.load_from = args.checkpoint
    config.resume = False
    # A checkpoint's weights are the moving average already.
    config.custom_hooks = [
        hook for hook in config.get('custom_hooks') or [] if 'EMAHook' not in str(hook.type)
    ]
    if args.tta:
        use_test_time_augmentation(config)
    fit_to_device(config)
    return config


def use_model(config: Config, args: argparse.Namespace) -> None:
    """Replace the model by an Inferencer, for an exported file or for tiles."""
    # A batch has as many tiles as it would have images.
    size = config.test_dataloader.get('batch_size', 1)
    arguments = dict(tile=args.tile, overlap=args.overlap, batch_size=size)
    if is_exported(args.checkpoint):
        arguments |= dict(config=args.checkpoint, amp=args.amp)
    else:
        arguments |= dict(config=args.config, checkpoint=args.checkpoint)
        arguments |= dict(deploy=args.deploy, cfg_options=args.cfg_options)
    use_inferencer(config, arguments)


def main() -> None:
    args = parse_args()
    with exit_on_user_error(), raise_output_errors():
        use_safe_loading(args.trust_checkpoint)
        quiet(MMLogger.get_current_instance())
        config, check = configure(args), check_test
        if is_exported(args.checkpoint):
            from backbones.export.evaluate import check_exported_test as check
        config = prepare_on_first(config, check)
        in_tiles = args.tile is not None and check is check_test
        if in_tiles:
            use_model(config, args)
        runner = ReliableRunner.from_cfg(config)
        if args.deploy and check is check_test and not in_tiles:
            runner.load_or_resume()
            switch_to_deploy(unwrap(runner.model))
        if args.show_dir:
            from backbones.inference.comparison import ComparisonHook

            runner.register_hook(ComparisonHook(args.show_dir))
        if args.report:
            from backbones.report.page import write_report
            from backbones.report.recording import ReportHook

            recorded = ReportHook()
            runner.register_hook(recorded)
        metrics = runner.test()
        if is_main_process():
            print(f'\n{format_metrics(metrics)}\n')
            path = Path(args.out or Path(config.work_dir) / 'metrics.json')
            write_metrics(metrics, path)
            print(f'metrics: {path}')
            if args.show_dir:
                print(f'drawn: {args.show_dir}')
            if args.report:
                write_report(Path(args.report), runner, recorded, metrics)
                print(f'report: {args.report}')
    disconnect()


if __name__ == '__main__':
    sys.exit(main())
