"""Train a detector or a segmentor from its config."""

import argparse
import os
import sys
from functools import partial

from _requirements import explain_missing

# It is read when torch is imported. By default each of OpenMP's threads spins for milliseconds
# until the others are done: on two cores beside one busy process, a step took 40 times as long.
if 'OMP_WAIT_POLICY' not in os.environ:
    os.environ.setdefault('GOMP_SPINCOUNT', '10000')

with explain_missing():
    import torch
    from _arguments import add_run_arguments, make_parser, parse, seed
    from mmengine.config import Config, ConfigDict
    from mmengine.dist import is_main_process

    from backbones.engine import config as configs
    from backbones.engine.checkpoints import remove_partial_checkpoints, resume
    from backbones.engine.curves import draw_curves
    from backbones.engine.distributed import disconnect, prepare_on_first
    from backbones.engine.hooks import ValLossHook, is_annotated_after_resizing
    from backbones.engine.preemption import PREEMPTED, Preempted
    from backbones.engine.preflight import check_training
    from backbones.engine.runner import ReliableRunner
    from backbones.errors import ConfigError, exit_on_user_error, in_one_line, raise_output_errors
    from backbones.weights import use_safe_loading

EXAMPLES = """\
examples:
  python tools/train.py seg_configs/fpn_effv2_s2.py
      train on ADE20K; logs and checkpoints go to work_dirs/fpn_effv2_s2
  python tools/train.py det_configs/mask_rcnn_effv2_s0.py --resume
      continue from the newest checkpoint in the work folder
  timeout --preserve-status 1h python tools/train.py my_config.py --resume
      train for one hour at a time: repeat it while the exit code is 75
  python tools/train.py seg_configs/fpn_effv2_s2.py --cfg-options load_from=published.safetensors
      start from a whole model, which may have other classes
  python tools/train.py seg_configs/fpn_effv2_s1_search.py
      train a supernet for tools/search.py, since this config has `search`
  tools/dist_train.sh det_configs/retinanet_effv2_s1.py 8 --auto-scale-lr
      on 8 GPUs, the learning rate scaled to the batch

exit codes:
   0  the training is complete
   1  error; the message says what is wrong and what to do
   2  the command line is wrong
  75  stopped by SIGTERM and saved; continue with --resume
"""


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument('config', help='a config for mmdet or mmseg, by its default_scope')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='PATH',
        help='continue from this checkpoint; without PATH or with "auto", from the newest readable '
        'one in the work folder. The result is the same as without a stop',
    )
    parser.add_argument(
        '--amp',
        action='store_true',
        help='mixed precision: float16 on a GPU, bfloat16 on a CPU',
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale the learning rate by the ratio of this run's batch size to the config's",
    )
    parser.add_argument('--seed', type=seed, help='seed of all random numbers (default: random)')
    parser.add_argument(
        '--val-loss', action='store_true', help='also compute the loss on the validation set'
    )
    parser.add_argument(
        '--skip-bad',
        action='store_true',
        help='leave out corrupt and wrongly annotated images and list them, instead of stopping '
        '(tools/check_dataset.py lists them beforehand)',
    )
    add_run_arguments(parser, 'optim_wrapper.optimizer.lr=1e-4 train_dataloader.batch_size=8')
    return parse(parser)


def configure(args: argparse.Namespace) -> Config:
    """Return the config with the options of the command line."""
    config = configs.load_run_config(args)
    if args.seed is not None:
        config.randomness = ConfigDict({**config.get('randomness', {}), 'seed': args.seed})
    config.skip_bad = args.skip_bad or config.get('skip_bad', False)
    if args.amp:
        configs.use_amp(config)
    if args.auto_scale_lr:
        configs.scale_learning_rate(config)
    configs.keep_best_checkpoint(config)
    configs.log_to_tensorboard(config)
    configs.fit_to_device(config)
    return config


def prepare(config: Config, args: argparse.Namespace) -> None:
    """Find what the training starts from; check it and the data."""
    if args.resume or config.get('resume'):
        resume(config, args.resume or config.get('load_from') or 'auto')
    check_training(config)
    if config.get('search') is not None:
        from backbones.search.supernet import prepare_supernet

        prepare_supernet(config)
    remove_partial_checkpoints(config)


def runner_of(config: Config) -> type[ReliableRunner]:
    """Return the runner for a config; one with ``search`` trains a supernet."""
    if config.get('search') is None:
        return ReliableRunner
    from backbones.search.supernet import SupernetRunner

    return SupernetRunner


def train(config: Config, args: argparse.Namespace) -> None:
    """Check what a training needs, and train."""
    config = prepare_on_first(config, partial(prepare, args=args))
    runner = runner_of(config).from_cfg(config)
    if args.val_loss and config.get('val_dataloader'):
        runner.register_hook(ValLossHook(resize=is_annotated_after_resizing(config)))
    runner.train()
    if is_main_process():
        print(f'checkpoints and logs: {config.work_dir}\ncurves: {draw_curves(config.work_dir)}')


def main() -> None:
    args = parse_args()
    with exit_on_user_error():
        use_safe_loading(args.trust_checkpoint)
        config = configure(args)
        advice = (
            f'. Checkpoints in {config.work_dir} are unchanged: free space or make it writable, '
            'then continue with --resume'
        )
        try:
            with raise_output_errors(advice):
                train(config, args)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                'the GPU has too little memory: lower train_dataloader.batch_size (now '
                f'{config.train_dataloader.get("batch_size")}), or add --amp or --cfg-options '
                f'model.backbone.with_cp=True ({in_one_line(error)})'
            ) from error
        except Preempted as preempted:
            print(f'\n{preempted}', file=sys.stderr, flush=True)
            sys.exit(PREEMPTED)
    disconnect()


if __name__ == '__main__':
    sys.exit(main())
