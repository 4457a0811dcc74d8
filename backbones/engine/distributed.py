"""Several processes: which one speaks, and how they find each other without GPUs."""

import os

import torch
from mmengine.config import Config, ConfigDict

from backbones.errors import ConfigError

# Where torchrun, SLURM and Open MPI say which process this is.
RANK_VARIABLES = ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK')


def is_first_process() -> bool:
    """Whether this process is the only one or the first, known before they are connected."""
    return int(next((os.environ[name] for name in RANK_VARIABLES if name in os.environ), 0)) == 0


def connect_without_gpus(config: Config) -> None:
    """Connect the processes of a run by gloo where there is no GPU.

    mmengine asks for a GPU as soon as there are several processes: when it connects them, and when
    it wraps the model.

    Args:
        config: Changed in place.

    Raises:
        ConfigError: The launcher is not torchrun.
    """
    if torch.cuda.is_available() or config.launcher == 'none':
        return
    if config.launcher != 'pytorch':
        raise ConfigError(
            f'--launcher {config.launcher} needs a GPU for every process; on CPUs start them with '
            'tools/dist_train.sh or tools/dist_test.sh'
        )
    torch.distributed.init_process_group('gloo')
    config.model_wrapper_cfg = ConfigDict(
        type='MMDistributedDataParallel',
        device_ids=None,
        broadcast_buffers=False,
        find_unused_parameters=config.get('find_unused_parameters', False),
    )
