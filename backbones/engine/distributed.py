"""Several processes: how they find each other, and what the first does for all."""

import os
import sys
from collections.abc import Callable
from datetime import timedelta

import torch
from mmengine.config import Config, ConfigDict
from mmengine.dist import get_rank, get_world_size, init_dist, is_distributed
from torch import distributed

from backbones.errors import ConfigError

# The first process may read a large dataset meanwhile; that it ended is noticed at once.
MAX_WAIT = timedelta(days=7)

# Where torchrun, SLURM and Open MPI say which process this is.
RANK_VARIABLES = ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK')


def is_first_process() -> bool:
    """Whether this process is the only one or the first, known before they are connected."""
    return int(next((os.environ[name] for name in RANK_VARIABLES if name in os.environ), 0)) == 0


def prepare_on_first(config: Config, prepare: Callable[[Config], None]) -> Config:
    """Let the first process prepare a config, and hand what it made of it to all others.

    What is read for it, such as annotation files, is read and kept in memory once. The other
    processes wait as long as it takes; where the first one fails, they end without a message.

    Args:
        config: The config; its ``launcher`` says what started the processes.
        prepare: Changes a config in place, or raises.

    Returns:
        The prepared config, the same in all processes.

    Raises:
        ConfigError: The launcher needs GPUs, and there are none.
    """
    connect(config)
    if get_world_size() == 1:
        prepare(config)
        return config
    group = distributed.new_group(backend='gloo', timeout=MAX_WAIT)
    if get_rank() == 0:
        prepare(config)
    prepared = [config]
    try:
        distributed.broadcast_object_list(prepared, src=0, group=group)
    except RuntimeError:
        if get_rank() == 0:
            raise
        sys.exit(1)  # the first process has ended, and said why
    distributed.destroy_process_group(group)
    return prepared[0]


def connect(config: Config) -> None:
    """Connect the processes of a run: by mmengine with GPUs, else by gloo.

    mmengine asks for a GPU as soon as there are several processes: when it connects them, and when
    it wraps the model.

    Args:
        config: Changed in place.

    Raises:
        ConfigError: There are no GPUs and the launcher is not torchrun.
    """
    if config.launcher == 'none' or is_distributed():
        return
    if torch.cuda.is_available():
        init_dist(config.launcher, **config.get('env_cfg', {}).get('dist_cfg', {}))
        return
    if config.launcher != 'pytorch':
        raise ConfigError(
            f'--launcher {config.launcher} needs a GPU for every process; on CPUs start them with '
            'tools/dist_train.sh or tools/dist_test.sh'
        )
    distributed.init_process_group('gloo')
    config.model_wrapper_cfg = ConfigDict(
        type='MMDistributedDataParallel',
        device_ids=None,
        broadcast_buffers=False,
        find_unused_parameters=config.get('find_unused_parameters', False),
    )
