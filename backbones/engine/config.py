"""Reading a config, and fitting it to the machine and to the command line."""

import itertools
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.config import utils as config_utils
from mmengine.registry import init_default_scope

from backbones.data.config_datasets import datasets_of, walk
from backbones.errors import ConfigError

# What reading a config raises when there is something wrong in it.
CONFIG_ERRORS = (
    *(SyntaxError, NameError, KeyError, TypeError),
    *(AttributeError, ImportError, OSError),
)

SCOPES = ('mmdet', 'mmseg')
CONFIG_ENDINGS = ('.py', '.json', '.yaml', '.yml')


def load_config(path: str, options: dict | None = None) -> Config:
    """Read a config for mmdet or mmseg, and make that the library in which types are looked up.

    Args:
        path: The config, whose bases may be ``mmdet::...``, ``mmseg::...`` and ``backbones::...``
            too.
        options: Overrides by dotted key, as ``--cfg-options`` gives them. Default: none.

    Raises:
        ConfigError: There is no such file, it cannot be read, or it belongs to neither library.
    """
    if not Path(path).is_file():
        raise ConfigError(f'there is no config {path}; ours are in det_configs/ and seg_configs/')
    if not path.endswith(CONFIG_ENDINGS):
        raise ConfigError(
            f'{path} is no config: those end in {", ".join(CONFIG_ENDINGS)}, and come before the '
            'checkpoint'
        )
    register_config_packages()
    try:
        config = Config.fromfile(path)
        config.merge_from_dict(options or {})
    except CONFIG_ERRORS as error:
        raise ConfigError(f'{path} cannot be read: {type(error).__name__}: {error}') from error
    if config.get('default_scope') not in SCOPES:
        raise ConfigError(
            f'{path}: default_scope is {config.get("default_scope")!r}; it must be one of '
            f'{SCOPES}, which tells a detector from a segmentor'
        )
    for node in walk(config._cfg_dict):
        # mmengine takes what stands before '::' for the library that the types are in.
        if node.get('_scope_') == 'backbones':
            del node['_scope_']
    init_default_scope(config.default_scope)
    name_library_of_transforms(config)
    return config


def name_library_of_transforms(config: Config) -> None:
    """Let pipelines work after a model of the other library was made in the same process.

    Both libraries look their transforms up in the scope of the model that was made last.
    """
    pipelines = [dataset.get('pipeline', []) for dataset in datasets_of(config)]
    for transform in itertools.chain(*pipelines, config.get('test_pipeline', [])):
        transform.setdefault('_scope_', config.default_scope)


def register_config_packages() -> None:
    """Let ``_base_ = 'backbones::...'`` find our configs, and ``'mmseg::...'`` those of mmseg.

    mmengine takes mmseg's distribution to be 'mmsegmentation', which the maintained line has
    renamed.
    """
    config_utils.MODULE2PACKAGE['backbones'] = 'backbones'
    try:
        distribution('mmsegmentation')
    except PackageNotFoundError:
        if find_spec('mmseg') is not None:
            config_utils.MODULE2PACKAGE['mmseg'] = 'mmseg'


def fit_to_device(config: Config) -> None:
    """Take BatchNorm for SyncBN, which needs GPUs, where there are none."""
    if torch.cuda.is_available():
        return
    for node in walk(config.model):
        norm = node.get('norm_cfg')
        if isinstance(norm, dict) and norm.get('type') == 'SyncBN':
            norm.type = 'BN'


def default_work_dir(config_path: str) -> str:
    """``work_dirs/NAME`` for a config ``.../NAME.py``, as mmdet and mmseg have it."""
    return str(Path('work_dirs') / Path(config_path).stem)
