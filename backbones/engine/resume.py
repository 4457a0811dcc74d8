"""Which checkpoint a training goes on from, and what of the config has to be as it was."""

from pathlib import Path

from mmengine.config import Config, ConfigDict

from backbones.errors import ConfigError

from .checkpointing import newest_checkpoint, read_resumable
from .distributed import is_first_process


def resume(config: Config, source: str) -> None:
    """Go on from a checkpoint, with the seed that its training was begun with.

    Args:
        config: Changed in place. Where nothing has been saved yet it starts as it says itself.
        source: A file, or 'auto' for the newest in the work folder that can be read.

    Raises:
        ConfigError: There is no such file.
        CheckpointError: It cannot be read, or none of those in the work folder can.
    """
    if source == 'auto':
        newest = newest_checkpoint(config.work_dir)
        if newest is None:
            say(f'--resume: no checkpoint in {config.work_dir} yet, starting from the beginning')
            config.resume = False
            return
        path, checkpoint, reasons = newest
        for reason in reasons:
            say(f'--resume: passed over: {reason}')
    else:
        path = Path(source)
        if not path.is_file():
            raise ConfigError(f'--resume: there is no checkpoint {path}')
        checkpoint = read_resumable(path)
    say(f'--resume: going on from {path}')
    config.resume, config.load_from = True, str(path)
    seed = (checkpoint.get('meta') or {}).get('seed')
    if seed is not None:
        keep_seed(config, seed)


def keep_seed(config: Config, seed: int) -> None:
    """Take the seed of the training that goes on, before anything is built with another one."""
    randomness = config.get('randomness', {})
    if randomness.get('seed') not in (None, seed):
        say(f'--resume: the seed stays {seed}, with which this training was begun')
    config.randomness = ConfigDict({**randomness, 'seed': seed})


def say(message: str) -> None:
    """Print in the first process only."""
    if is_first_process():
        print(message, flush=True)
