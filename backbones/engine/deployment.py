"""Testing with the network that inference uses: its norms folded into the convolutions."""

from mmengine.config import Config, ConfigDict
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from backbones.deploy import switch_to_deploy


def deploy_before_test(config: Config) -> None:
    """Have the model folded once its weights are loaded.

    Args:
        config: Changed in place: gets a hook, and loses an EMAHook. What that would put in the
            place of the weights is what a checkpoint has there already.
    """
    hooks = [hook for hook in config.get('custom_hooks') or [] if 'EMAHook' not in str(hook.type)]
    config.custom_hooks = [*hooks, ConfigDict(type='DeployHook')]


@HOOKS.register_module()
class DeployHook(Hook):
    """Calls :func:`backbones.deploy.switch_to_deploy` before a test."""

    def before_test(self, runner: Runner) -> None:
        switch_to_deploy(runner.model.module if is_model_wrapper(runner.model) else runner.model)
