"""Read a config, and adapt it to the machine and the command line."""

import io
import itertools
import warnings
from argparse import Namespace
from contextlib import redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict
from mmengine.config import utils as config_utils
from mmengine.device import utils as device_utils
from mmengine.registry import init_default_scope

from backbones.data.config_datasets import SPLITS, datasets_of, walk
from backbones.errors import ConfigError, in_one_line

from .amp import CPUAmpOptimWrapper
from .settings import read_config

SCOPES = ('mmdet', 'mmseg')


def load_config(path: str, options: dict | None = None) -> Config:
    """Read a config for mmdet or mmseg, and make this library the default scope.

    Its bases may be files, ``mmdet::...``, ``mmseg::...`` or ``backbones::...``; ``options`` are
    overrides by dotted key. Raises ConfigError if it cannot be read.
    """
    if not Path(path).is_file():
        own = Path(path, f'{Path(path).resolve().name}.py')
        hint = f'there is {own}' if own.is_file() else 'ours are in det_configs/ and seg_configs/'
        raise ConfigError(f'there is no config {path}; {hint}')
    if not path.endswith('.py'):
        raise ConfigError(f'{path} is not a .py file; give the config before the checkpoint')
    # mmengine finds 'mmseg::...' by the name of the distribution, which differs on the maintained
    # line; here the names of the modules are added.
    config_utils.MODULE2PACKAGE.update(backbones='backbones', mmseg='mmseg')
    try:
        config = read_config(path, options or {})
        config.merge_from_dict(options or {})
    except ConfigError:
        raise
    # A config is a program, so it may raise any error.
    except Exception as error:
        raise ConfigError(f'{path} cannot be read: {type(error).__name__}: {error}') from error
    scope = str((config.get('model') or {}).get('type')).partition('.')[0]
    if config.get('default_scope') is None and scope in SCOPES:
        # mmdet's configs that use classes as types have none.
        config.default_scope = scope
    if config.get('default_scope') not in SCOPES:
        raise ConfigError(
            f'{path}: default_scope is {config.get("default_scope")!r}; it must be one of '
            f'{SCOPES}, for a detector or a segmentor'
        )
    for node in walk(config._cfg_dict):
        # mmengine takes the word before '::' as the library of the types.
        if node.get('_scope_') == 'backbones':
            del node['_scope_']
    import_library(config.default_scope)
    init_default_scope(config.default_scope)
    name_library_of_transforms(config)
    name_pretrained(config)
    return config


def load_run_config(args: Namespace) -> Config:
    """Return the config of a run, with the options that all commands have."""
    config = load_config(args.config, args.cfg_options)
    config.launcher = args.launcher
    default = str(Path('work_dirs') / Path(args.config).stem)
    config.work_dir = args.work_dir or config.get('work_dir') or default
    # mmengine would use Apple's GPU, for which mmcv has no NMS and no RoIAlign.
    if device_utils.DEVICE == 'mps':
        device_utils.DEVICE = 'cpu'
    return config


def import_library(scope: str) -> None:
    """Import mmdet or mmseg, and hide what they print about optional packages."""
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            for part in ('datasets', 'evaluation', 'models'):
                import_module(f'{scope}.{part}')
        # It is missing, or does not fit mmcv (AssertionError) or torch (OSError).
        except (ImportError, AssertionError, OSError) as error:
            reason = in_one_line(error)
            raise ConfigError(
                f'the config needs {scope}, which cannot be imported: {reason}. Run `python '
                'tools/doctor.py` to see what does not fit'
            ) from error


def name_library_of_transforms(config: Config) -> None:
    """Make pipelines work after a model of the other library was built in the same process.

    Both libraries look up transforms in the scope of the last model built.
    """
    pipelines = [dataset.get('pipeline', []) for dataset in datasets_of(config)]
    for transform in itertools.chain(*pipelines, config.get('test_pipeline', [])):
        transform.setdefault('_scope_', config.default_scope)


def name_pretrained(config: Config) -> None:
    """Move mmseg's older ``model.pretrained`` to ``init_cfg`` of the backbone."""
    model = config.get('model') or {}
    backbone = model.get('backbone')
    if backbone and isinstance(model.get('pretrained'), str) and not backbone.get('init_cfg'):
        backbone.init_cfg = dict(type='Pretrained', checkpoint=model.pop('pretrained'))


def fit_to_device(config: Config) -> None:
    """Without a GPU, use BatchNorm instead of SyncBN, and no pinned memory.

    Mixed precision gets the type that the device supports.
    """
    kind = str((config.get('optim_wrapper') or {}).get('type')).rpartition('.')[2]
    # Classes that users derive from these stay.
    if kind in ('AmpOptimWrapper', CPUAmpOptimWrapper.__name__):
        use_amp(config)
    if not torch.cuda.is_available():
        use_batch_norm(config)
        for split in SPLITS:
            (config.get(f'{split}_dataloader') or {}).pop('pin_memory', None)


def use_batch_norm(config: Config) -> None:
    """Use BatchNorm instead of SyncBN."""
    for node in walk(config.model):
        norm = node.get('norm_cfg')
        if isinstance(norm, dict) and norm.get('type') == 'SyncBN':
            norm.type = 'BN'


def keep_best_checkpoint(config: Config) -> None:
    """Keep the best checkpoint, by the main metric if the config names none."""
    hook = config.get('default_hooks', {}).get('checkpoint')
    if hook is not None and config.get('val_evaluator') and not hook.get('save_best'):
        hook.save_best, hook.rule = 'auto', 'greater'


def log_to_tensorboard(config: Config) -> None:
    """Add TensorBoard, if it is installed, to the backends that a config logs to."""
    if find_spec('tensorboard') is None:
        return
    visualizer = config.setdefault('visualizer', ConfigDict(type='Visualizer'))
    backends = visualizer.get('vis_backends') or [ConfigDict(type='LocalVisBackend')]
    if not any('Tensorboard' in str(backend.type) for backend in backends):
        visualizer.vis_backends = [*backends, ConfigDict(type='TensorboardVisBackend')]


def use_amp(config: Config) -> None:
    """Train in mixed precision: float16 on a GPU, bfloat16 on a CPU."""
    if torch.cuda.is_available():
        config.optim_wrapper.type = 'AmpOptimWrapper'
        config.optim_wrapper.setdefault('loss_scale', 'dynamic')
        return
    config.optim_wrapper.type = CPUAmpOptimWrapper.__name__
    for option in ('loss_scale', 'dtype'):
        config.optim_wrapper.pop(option, None)


def scale_learning_rate(config: Config) -> None:
    """Let mmengine scale the learning rate to the batch of this run."""
    if not (config.get('auto_scale_lr') or {}).get('base_batch_size'):
        raise ConfigError(
            '--auto-scale-lr needs auto_scale_lr = dict(base_batch_size=N) in the config: the '
            'batch size, over all GPUs, for which its learning rate is made'
        )
    config.auto_scale_lr.enable = True
