"""Training all networks of a space at once, with shared weights.

Every step trains four networks on the same batch: the largest, the smallest and two random ones
(the sandwich rule of Yu and Huang, arXiv 1903.05134, which the paper follows). The mean of their
gradients is used for one step of the optimizer.

The paper's supernet has norms for every width. In this one all networks share their BatchNorms: the
input of a norm depends on all other choices too, so in either case a network's statistics must be
computed again.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from mmengine import dist
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import MODEL_WRAPPERS
from mmengine.runner import Runner
from torch import Tensor, nn

from backbones.engine.runner import ReliableRunner
from backbones.errors import ConfigError

from .elastic import Layout, make_elastic, set_choice
from .holdout import check_holdout, leave_out_holdout
from .space import Space, describe, search_options

NUM_RANDOM = 2


def prepare_supernet(config: Config) -> None:
    """Turn the config of an ordinary training into that of a supernet, in place.

    The training then leaves out the hold-out, and BatchNorms update their statistics. Raises
    ConfigError or DataError if this is impossible.
    """
    space = Space.from_config(config)
    if config.optim_wrapper.get('accumulative_counts', 1) != 1:
        raise ConfigError(
            'a supernet already accumulates the gradients of its networks: remove '
            'optim_wrapper.accumulative_counts'
        )
    ends = [describe(choice) for choice in (space.smallest, space.largest)]
    print(f'supernet\n  from {ends[0]}\n  to {ends[1]}', flush=True)
    if config.model.backbone.get('norm_eval'):
        config.model.backbone.norm_eval = False
        print('  norm_eval is off: the networks need their own statistics', flush=True)
    leave_out_holdout(config)


@MODEL_WRAPPERS.register_module()
class Supernet(nn.Module):
    """A detector or segmentor whose training step trains several networks of a space.

    Several processes average their gradients without DistributedDataParallel, which supports
    neither several forward passes per step nor parameters that are unused in some steps.

    ``module``, the model of the space's config, is made elastic. ``generator`` returns the random
    generator of a step, the same in all processes.
    """

    def __init__(
        self, module: nn.Module, layout: Layout, generator: Callable[[], np.random.Generator]
    ) -> None:
        super().__init__()
        self.module = make_elastic(module, layout)
        self.layout = layout
        self.generator = generator

    def train_step(self, data: Any, optim_wrapper: OptimWrapper) -> dict[str, Tensor]:
        """Make one step of the optimizer; the loss is the mean over the networks."""
        data = self.module.data_preprocessor(data, True)
        space, rng = self.layout.space, self.generator()
        choices = [space.largest, space.smallest, *(space.sample(rng) for _ in range(NUM_RANDOM))]
        losses = []
        for choice in choices:
            set_choice(self.module, self.layout, choice)
            with optim_wrapper.optim_context(self.module):
                loss, _ = self.module.parse_losses(self.module(**data, mode='loss'))
            optim_wrapper.backward(optim_wrapper.scale_loss(loss / len(choices)))
            losses.append(loss.detach())
        # All processes trained the same networks, so they have the same gradients to average.
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        dist.all_reduce_params(gradients, op='mean')
        optim_wrapper.step()
        optim_wrapper.zero_grad()
        largest, smallest, *random = losses
        return dict(
            loss=torch.stack(losses).mean(),
            loss_largest=largest,
            loss_smallest=smallest,
            loss_random=torch.stack(random).mean(),
        )

    def val_step(self, data: Any) -> Any:
        """Return the predictions of the largest network."""
        set_choice(self.module, self.layout, self.layout.space.largest)
        return self.module.val_step(data)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class SupernetRunner(ReliableRunner):
    """A ReliableRunner that trains a supernet."""

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> Supernet:
        """Return the model as a supernet, also in a single process."""
        layout = Layout(model, Space.from_config(self.cfg), self.cfg)
        seed = search_options(self.cfg)['seed']

        def generator() -> np.random.Generator:
            """Return a generator that is the same in all processes and in a resumed training."""
            return np.random.default_rng([seed, self.iter])

        return Supernet(model.to(get_device()), layout, generator)

    def register_default_hooks(self, hooks: dict | None = None) -> None:
        """Register the usual hooks and the one that saves the space in checkpoints."""
        super().register_default_hooks(hooks)
        self.space_hook = SpaceHook(self.model.layout.space)
        self.register_hook(self.space_hook)

    def load_or_resume(self) -> None:
        """Load or resume as configured; sort channels by importance unless a supernet is loaded."""
        super().load_or_resume()
        supernet = self.model
        if self.iter == 0 and not self.space_hook.has_supernet:
            supernet.layout.sort_channels(supernet.module)
        for tensor in supernet.module.state_dict().values():
            dist.broadcast(tensor)


class SpaceHook(Hook):
    """A hook that saves the space in checkpoints and rejects checkpoints of another space."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.has_supernet = False  # whether the loaded checkpoint is a supernet

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        checkpoint['search_space'] = self.space.to_json()

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self.has_supernet = self.space.check_checkpoint(checkpoint)
        own = runner.train_dataloader.dataset.metainfo.get('classes') or ()
        classes = (checkpoint['meta'].get('dataset_meta') or {}).get('classes') or own
        # A supernet of other classes was trained on other images.
        if self.has_supernet and list(classes) == list(own):
            check_holdout(runner.cfg, checkpoint)
