"""Training all networks of a space at once, with shared weights.

Every step trains four networks on the same batch: the largest, the smallest and two random ones
(the sandwich rule of Yu and Huang, arXiv 1903.05134, which the paper follows). Their gradients are
added up for one step of the optimizer.

Unlike the paper's supernet, which has norms for every width, this one has BatchNorms that all
networks share: what a norm sees depends on all other choices too, so that statistics have to be
taken anew for a network in either case.
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
from .holdout import leave_out_holdout
from .space import Choice, Space, iterate_dimensions

NUM_RANDOM = 2


def prepare_supernet(config: Config) -> None:
    """Make the config of an ordinary training one of a supernet's.

    Args:
        config: A config with ``search``; changed in place: its training does not read the held-out
            images, and its BatchNorms learn.

    Raises:
        ConfigError: Its model cannot be searched, or its training not be one of a supernet.
        DataError: There are too few training images to hold some of them out.
    """
    space = Space.from_config(config)
    if config.optim_wrapper.get('accumulative_counts', 1) != 1:
        raise ConfigError(
            'a supernet adds up the gradients of its networks: leave out '
            'optim_wrapper.accumulative_counts'
        )
    lines = [f'{name}: {", ".join(map(str, each))}' for name, each in iterate_dimensions(space)]
    if config.model.backbone.get('norm_eval'):
        config.model.backbone.norm_eval = False
        lines.append('norm_eval is off: the networks need statistics of their own')
    print('\n  '.join(['supernet', *lines]), flush=True)
    leave_out_holdout(config)


@MODEL_WRAPPERS.register_module()
class Supernet(nn.Module):
    """A detector or segmentor whose training step trains networks of a space.

    Several processes add up their gradients without DistributedDataParallel, which knows neither
    several forward passes a step nor parameters that take part in some steps only.

    Args:
        module: The model of the space's config; made elastic.
        layout: The layout of its tensors.
        generator: Gives the random numbers of a step, the same in all processes.
    """

    def __init__(
        self, module: nn.Module, layout: Layout, generator: Callable[[], np.random.Generator]
    ) -> None:
        super().__init__()
        self.module = make_elastic(module, layout)
        self.layout = layout
        self.generator = generator

    def train_step(self, data: Any, optim_wrapper: OptimWrapper) -> dict[str, Tensor]:
        """One step of the optimizer.

        Returns:
            ``loss``, the mean over the networks, and the losses of the largest, the smallest and
            the random ones.
        """
        data = self.module.data_preprocessor(data, True)
        losses = {}
        choices = self.draw_choices()
        for name, choice in choices.items():
            set_choice(self.module, self.layout, choice)
            with optim_wrapper.optim_context(self.module):
                loss, _ = self.module.parse_losses(self.module(**data, mode='loss'))
            optim_wrapper.backward(optim_wrapper.scale_loss(loss / len(choices)))
            losses[name] = loss.detach()
        self.average_gradients()
        optim_wrapper.step()
        optim_wrapper.zero_grad()
        random = [loss for name, loss in losses.items() if name.startswith('random')]
        return dict(
            loss=torch.stack(list(losses.values())).mean(),
            loss_largest=losses['largest'],
            loss_smallest=losses['smallest'],
            loss_random=torch.stack(random).mean(),
        )

    def draw_choices(self) -> dict[str, Choice]:
        """The networks of a step."""
        space, rng = self.layout.space, self.generator()
        return dict(
            largest=space.largest,
            smallest=space.smallest,
            **{f'random_{number}': space.sample(rng) for number in range(NUM_RANDOM)},
        )

    def average_gradients(self) -> None:
        """Make every gradient the mean over all processes, which all trained the same networks."""
        if dist.get_world_size() == 1:
            return
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat, op='mean')
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def val_step(self, data: Any) -> Any:
        """Predictions of the largest network."""
        set_choice(self.module, self.layout, self.layout.space.largest)
        return self.module.val_step(data)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class SupernetRunner(ReliableRunner):
    """A ReliableRunner that trains a supernet."""

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> Supernet:
        """The model as a supernet, also in a single process."""
        layout = Layout(model, Space.from_config(self.cfg))
        # A number for every step, so that a resumed training draws the same.
        generator = lambda: np.random.default_rng([self.seed, self.iter])  # noqa: E731
        return Supernet(model.to(get_device()), layout, generator)

    def register_default_hooks(self, hooks: dict | None = None) -> None:
        """Those of every run, and the one that keeps the space in checkpoints."""
        super().register_default_hooks(hooks)
        self.register_hook(SpaceHook(self.model.layout.space))

    def load_or_resume(self) -> None:
        """Load what the config names, and put the important channels first in the beginning."""
        super().load_or_resume()
        supernet = self.model
        if self.iter == 0:
            supernet.layout.sort_channels(supernet.module)
        for tensor in supernet.module.state_dict().values():
            dist.broadcast(tensor)


class SpaceHook(Hook):
    """Keeps the space in checkpoints, and refuses to resume from one of another."""

    def __init__(self, space: Space) -> None:
        self.space = space

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        checkpoint['search_space'] = self.space.to_json()

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self.space.check_checkpoint(checkpoint)
