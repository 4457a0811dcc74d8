"""The learning rate that a training really starts with."""

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner


@HOOKS.register_module()
class LearningRateHook(Hook):
    """Log the learning rate after scaling and before warm-up."""

    def before_train(self, runner: Runner) -> None:
        groups = runner.optim_wrapper.param_groups
        rates = sorted({group.get('initial_lr', group['lr']) for group in groups})
        runner.logger.info(
            f'--auto-scale-lr: the learning rate is {", ".join(f"{rate:.3g}" for rate in rates)}, '
            f'for {runner.world_size} x {runner.cfg.train_dataloader.batch_size} pictures a step'
        )
