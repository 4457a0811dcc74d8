"""Several processes: connecting them, and preparing a config in the first for all."""

import os
from collections.abc import Callable
from datetime import timedelta

import torch
from mmengine.config import Config, ConfigDict
from mmengine.dist import get_rank, get_world_size, init_dist, is_distributed
from mmengine.model import is_model_wrapper
from mmengine.utils.dl_utils import set_multi_processing
from torch import distributed, nn

from backbones.errors import ConfigError

# Checking a large dataset takes hours; if the first process ends, the others notice at once.
MAX_WAIT = timedelta(days=7)


def prepare_on_first(config: Config, prepare: Callable[[Config], None]) -> Config:
    """Let the first process prepare a config in place, and return the result in all processes.

    So annotation files are read and kept in memory only once. If the first process fails, the
    others end without a message.
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
        # The first process has ended with a message. After that, gloo may abort a regular exit.
        os._exit(1)
    distributed.destroy_process_group(group)
    return prepared[0]


def disconnect() -> None:
    """Leave the other processes at the end of a run: gloo may abort a regular exit otherwise."""
    if is_distributed():
        distributed.destroy_process_group()


def connect(config: Config) -> None:
    """Connect the processes of a run: with GPUs by mmengine, else by gloo."""
    if config.launcher == 'none' or is_distributed():
        return
    # Set by torchrun and, in mmengine, for SLURM. Others may start one process on each machine.
    os.environ.setdefault('LOCAL_RANK', os.environ.get('OMPI_COMM_WORLD_LOCAL_RANK', '0'))
    environment = config.get('env_cfg', {})
    if torch.cuda.is_available():
        processes, gpus = int(os.environ.get('LOCAL_WORLD_SIZE', 1)), torch.cuda.device_count()
        if processes > gpus:
            raise ConfigError(
                f'{processes} processes on this machine need a GPU each, but it has {gpus}; start '
                f'at most {gpus}, or set CUDA_VISIBLE_DEVICES= to use the CPU'
            )
        # Before init_dist(), which would choose another start method for the loaders' workers.
        set_multi_processing(**environment.get('mp_cfg', {}), distributed=True)
        init_dist(config.launcher, **environment.get('dist_cfg', {}))
        return
    if config.launcher != 'pytorch':
        raise ConfigError(
            f'--launcher {config.launcher} needs a GPU for every process; on CPUs use '
            'tools/dist_train.sh or tools/dist_test.sh'
        )
    distributed.init_process_group('gloo')
    config.model_wrapper_cfg = ConfigDict(
        type='MMDistributedDataParallel',
        device_ids=None,
        broadcast_buffers=False,
        find_unused_parameters=config.get('find_unused_parameters', False),
    )


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside a wrapper that distributes it over processes."""
    return model.module if is_model_wrapper(model) else model
