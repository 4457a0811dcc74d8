"""Several processes that share the inputs, started by torchrun or by SLURM's srun."""

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from backbones.errors import ConfigError

# They meet only at the beginning and at the end, which may be days apart.
TIMEOUT = timedelta(days=30)
DEFAULT_PORT = '29511'


@dataclass(frozen=True)
class Processes:
    """Which process this is, and of how many.

    Attributes:
        rank: Number of this process, from 0.
        count: How many there are.
    """

    rank: int = 0
    count: int = 1

    def share_of(self, items: list) -> list:
        """Every ``count``-th item, beginning with the ``rank``-th."""
        return items[self.rank :: self.count]

    def from_first(self, function: Callable[[], Any]) -> Any:
        """What a function returns in the first process, in all of them.

        Where it raises, the first process says so, and the others end in silence after it.
        """
        if self.count == 1:
            return function()
        box = [None, None]
        try:
            if self.rank == 0:
                box = [function(), 'done']
        finally:
            distributed.broadcast_object_list(box, src=0)
        if box[1] is None:
            self.await_end_of_first()
            sys.exit(1)
        return box[0]

    def await_end_of_first(self) -> None:
        """Wait, in all processes but the first, until that has ended.

        torchrun ends all of them as soon as one has failed, whatever the first is about to say.
        """
        if self.rank > 0:
            # The first one never comes here; its end is what breaks this off.
            with suppress(RuntimeError):
                distributed.barrier()

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in all of them; waits until all have come here.

        Raises:
            ConfigError: One of them never will.
        """
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        try:
            distributed.all_gather_object(values, value)
        except RuntimeError as error:
            raise ConfigError(
                'another process has ended before its share was done; when the cause is mended, '
                'the same command with --skip-existing goes on'
            ) from error
        return values


def connect() -> Processes:
    """Connect the processes that torchrun or srun has started; alone without them.

    Raises:
        ConfigError: SLURM does not say where the processes are to meet.
    """
    if 'RANK' not in os.environ and int(os.environ.get('SLURM_STEP_NUM_TASKS', 1)) > 1:
        set_variables_from_slurm()
    count = int(os.environ.get('WORLD_SIZE', 1))
    if count == 1:
        return Processes()
    distributed.init_process_group('gloo', timeout=TIMEOUT)
    return Processes(distributed.get_rank(), count)


def set_variables_from_slurm() -> None:
    """Say in torchrun's words what srun has said in its own."""
    environ = os.environ
    environ['RANK'] = environ['SLURM_PROCID']
    environ['WORLD_SIZE'] = environ['SLURM_STEP_NUM_TASKS']
    environ['LOCAL_RANK'] = environ.get('SLURM_LOCALID', '0')
    environ.setdefault('MASTER_PORT', DEFAULT_PORT)
    if 'MASTER_ADDR' in environ:
        return
    nodes = environ.get('SLURM_STEP_NODELIST') or environ.get('SLURM_NODELIST', '')
    command = ['scontrol', 'show', 'hostnames', nodes]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        environ['MASTER_ADDR'] = listed.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise ConfigError(
            f'SLURM has started {environ["WORLD_SIZE"]} processes, but `{" ".join(command)}` does '
            'not say on which machine the first one is: set MASTER_ADDR to its name'
        ) from error


def device_of_process(asked: str | None) -> str | None:
    """The device that was asked for, else a GPU of its own for each process of a machine."""
    if asked is None and torch.cuda.is_available():
        return f'cuda:{int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()}'
    return asked
