"""Train a detector or a segmentor: the config says which, mmengine does it."""

import argparse
import sys

from _requirements import explain_missing

with explain_missing():
    import torch
    from _arguments import add_run_arguments, make_parser, parse_run_args
    from mmengine.config import Config, ConfigDict
    from mmengine.dist import is_main_process

    from backbones.engine.checkpointing import explain_full_disk, remove_partial_checkpoints
    from backbones.engine.config import default_work_dir, fit_to_device, load_config
    from backbones.engine.curves import draw_curves
    from backbones.engine.preemption import PREEMPTED, Preempted
    from backbones.engine.preflight import leave_out_init_cfg, prepare_training
    from backbones.engine.report import report_every_class
    from backbones.engine.resume import resume
    from backbones.engine.run_defaults import keep_best_checkpoint, log_to_tensorboard
    from backbones.engine.runner import TrainRunner
    from backbones.errors import ConfigError, exit_on_user_error
    from backbones.weights import use_safe_loading

EXAMPLES = """\
examples:
  python tools/train.py seg_configs/fpn_effv2_s2.py
      train on ADE20K; logs and checkpoints go to work_dirs/fpn_effv2_s2
  python tools/train.py det_configs/mask_rcnn_effv2_s0.py --resume
      go on from the newest checkpoint in the work folder
  timeout --preserve-status 1h python tools/train.py my_config.py --resume
      train for an hour at a time: repeat it while it ends with exit code 75
  python tools/train.py seg_configs/fpn_effv2_s2.py --cfg-options load_from=published.safetensors
      start from a whole model, of other classes too
  python tools/train.py my_config.py --cfg-options model.backbone.init_cfg=None
      start from nothing instead of from ImageNet weights
  tools/dist_train.sh det_configs/retinanet_effv2_s1.py 8 --auto-scale-lr
      on 8 GPUs, the learning rate scaled to the batch

exit codes:
   0  the training is complete
   1  something is wrong; the message says what, and what to do
   2  the command line is wrong
  75  SIGTERM asked it to stop: all is saved, go on with --resume
"""


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument('config', help='a config for mmdet or mmseg (its default_scope tells)')
    parser.add_argument(
        '--work-dir',
        help='where logs and checkpoints go (default: the config, else work_dirs/NAME)',
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='PATH',
        help='go on from this checkpoint; without PATH, or with "auto", from the newest in the '
        'work folder that can be read. The result is that of a run which was never stopped',
    )
    parser.add_argument(
        '--amp',
        action='store_true',
        help='mixed precision: float16 on a GPU, bfloat16 on a CPU',
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale the learning rate by this run's batch over the one that the config is made for",
    )
    parser.add_argument('--seed', type=int, help='seed of all random numbers (default: drawn)')
    parser.add_argument(
        '--val-loss', action='store_true', help='compute the loss on the validation set as well'
    )
    parser.add_argument(
        '--skip-bad',
        action='store_true',
        help='leave out what is wrong in the data instead of stopping; it is counted and named '
        '(tools/check_dataset.py lists it beforehand)',
    )
    add_run_arguments(parser, 'optim_wrapper.optimizer.lr=1e-4 train_dataloader.batch_size=8')
    return parse_run_args(parser)


def configure(args: argparse.Namespace) -> Config:
    """The config with everything from the command line in it."""
    config = load_config(args.config, args.cfg_options)
    config.launcher = args.launcher
    config.work_dir = args.work_dir or config.get('work_dir') or default_work_dir(args.config)
    if args.seed is not None:
        config.randomness = ConfigDict({**config.get('randomness', {}), 'seed': args.seed})
    config.skip_bad = args.skip_bad or config.get('skip_bad', False)
    if args.resume or config.get('resume'):
        resume(config, args.resume or config.get('load_from') or 'auto')
    leave_out_init_cfg(config)
    if args.amp:
        use_amp(config)
    if args.auto_scale_lr:
        scale_learning_rate(config)
    keep_best_checkpoint(config)
    log_to_tensorboard(config)
    if config.default_scope == 'mmdet':
        report_every_class(config, 'val')
    if args.val_loss:
        from backbones.engine.val_loss import enable_val_loss

        enable_val_loss(config)
    fit_to_device(config)
    return config


def use_amp(config: Config) -> None:
    """Mixed precision with what the machine has."""
    if torch.cuda.is_available():
        config.optim_wrapper.type = 'AmpOptimWrapper'
        config.optim_wrapper.setdefault('loss_scale', 'dynamic')
        return
    from backbones.engine.amp import CPUAmpOptimWrapper

    config.optim_wrapper.type = CPUAmpOptimWrapper.__name__
    config.optim_wrapper.pop('loss_scale', None)


def scale_learning_rate(config: Config) -> None:
    """Let mmengine scale the learning rate, and have the result logged."""
    if not (config.get('auto_scale_lr') or {}).get('base_batch_size'):
        raise ConfigError(
            '--auto-scale-lr needs auto_scale_lr = dict(base_batch_size=N) in the config: the '
            'batch, over all GPUs, that its learning rate is meant for'
        )
    config.auto_scale_lr.enable = True
    from backbones.engine.learning_rate import LearningRateHook

    hook = ConfigDict(type=LearningRateHook.__name__)
    config.custom_hooks = [*config.get('custom_hooks', []), hook]


def train(config: Config) -> None:
    """Check what a training needs, and train."""
    config = prepare_training(config)
    if is_main_process():
        remove_partial_checkpoints(config.work_dir)
    TrainRunner.from_cfg(config).train()
    if is_main_process():
        best = config.default_hooks.checkpoint.get('save_best')
        curves = draw_curves(config.work_dir, best if isinstance(best, str) else None)
        print(f'logs and checkpoints: {config.work_dir}\ncurves: {curves}')


def main() -> None:
    args = parse_args()
    with exit_on_user_error():
        use_safe_loading(args.trust_checkpoint)
        config = configure(args)
        try:
            with explain_full_disk(config.work_dir):
                train(config)
        except Preempted as preempted:
            print(f'\n{preempted}', file=sys.stderr, flush=True)
            sys.exit(PREEMPTED)


if __name__ == '__main__':
    sys.exit(main())
