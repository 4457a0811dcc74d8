"""Check the weights and the data of a run before it begins."""

import sys
import traceback
from collections.abc import Sequence

from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS
from torch import nn

from backbones.data.check import refuse_errors
from backbones.data.classes import check_class_weights, set_classes
from backbones.data.skip_bad import leave_out_bad
from backbones.efficientformer_v2.backbone import EfficientFormerV2
from backbones.efficientformer_v2.checkpoint_keys import check_nan
from backbones.errors import CheckpointError, ConfigError, first_of
from backbones.weights import load_checkpoint


def check_training(config: Config) -> None:
    """Check the weights and the data of a training, and set the classes of the data in the config.

    Raises CheckpointError, ConfigError or DataError if they do not fit or cannot be read.
    """
    check_start(config)
    splits = ('train', 'val') if config.get('val_dataloader') else ('train',)
    set_classes(config, splits, keep_files=True)
    check_class_weights(config.model)
    (leave_out_bad if config.get('skip_bad') else refuse_errors)(config, splits)


def check_test(config: Config) -> None:
    """Check the checkpoint ``load_from`` and the data of a test, like :func:`check_training`."""
    checkpoint = check_start(config)
    classes = set_classes(config, ('test',), keep_files=True)
    trained = (checkpoint['meta'].get('dataset_meta') or {}).get('classes')
    if trained:
        check_classes(f'checkpoint {config.load_from}', trained, classes)
    load_whole(build(whole_model(config)), checkpoint, config.load_from)
    refuse_errors(config, ('test',))


def pretrained_backbone(config: Config) -> str | None:
    """Return the source of the backbone's weights; None if none, or if ``init_cfg`` is a list."""
    init_cfg = (whole_model(config).get('backbone') or {}).get('init_cfg') or {}
    return init_cfg.get('checkpoint') if isinstance(init_cfg, dict) else None


def check_start(config: Config) -> dict | None:
    """Read the weights that a run starts from; raise CheckpointError if the backbone does not fit.

    Returns the checkpoint of the whole model, or None if only the backbone or nothing is loaded.
    """
    backbone = whole_model(config).get('backbone', {})
    # First, since a wrong `arch` would cause a download of weights that do not exist.
    fitted = build({**backbone, 'init_cfg': None}) if is_ours(backbone) else None
    source, pretrained = config.get('load_from'), pretrained_backbone(config)
    if source is None and pretrained is None:
        if fitted and backbone.get('norm_eval'):
            print(
                'warning: the backbone starts from random weights, but with norm_eval=True its '
                'BatchNorms do not learn: add --cfg-options model.backbone.norm_eval=False',
                file=sys.stderr,
                flush=True,
            )
        return None
    checkpoint = load_checkpoint(source or pretrained)
    # Other backbones than ours have their own rules for missing weights.
    if fitted:
        model = fitted if source is None else nn.ModuleDict({'backbone': fitted})
        load_weights(model, checkpoint, source or pretrained)
    try:
        check_nan(checkpoint['state_dict'], f'checkpoint {source or pretrained}')
    except CheckpointError as error:
        # Unused tensors do no harm, and buffers may have NaN by design.
        print(f'warning: {error}', file=sys.stderr, flush=True)
    return checkpoint if source else None


def build(model: dict) -> nn.Module:
    """Build a config's model or a part of it; raise ConfigError if that fails."""
    try:
        return MODELS.build(model)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f'the model of the config cannot be built: {error} ({place.filename}, line '
            f'{place.lineno})'
        ) from error


def is_ours(backbone: dict) -> bool:
    """Return whether a config's backbone is an EfficientFormerV2."""
    # A model may have no backbone at its top level: a teacher and its student have one each.
    return 'type' in backbone and MODELS.get(backbone['type']) is EfficientFormerV2


def check_classes(source: str, trained: Sequence[str], classes: Sequence[str]) -> None:
    """Raise CheckpointError if a model was trained on another number of classes than the data have.

    Names may differ, but the same names have to be in the same order.
    """
    if not classes:
        # Some datasets get their classes only when they are read.
        return
    same_names = sorted(trained) == sorted(classes)
    if len(trained) != len(classes) or (same_names and list(trained) != list(classes)):
        raise CheckpointError(
            f'{source} was trained on {len(trained)} classes ({first_of(list(trained))}), '
            f'the data of the config have {len(classes)} ({first_of(list(classes))}); '
            'number and order must be the same'
        )


def whole_model(config: Config) -> ConfigDict:
    """Return the model of a config, without the wrapper for test-time augmentation."""
    return config.model.get('module', config.model)


def load_whole(model: nn.Module, checkpoint: dict, source: str) -> None:
    """Load a checkpoint; raise CheckpointError if it lacks a part of the model."""
    if missing := load_weights(model, checkpoint, source):
        raise CheckpointError(
            f'checkpoint {source} lacks {len(missing)} tensors of the model '
            f'({first_of(missing)}): it was made with another config, or has only a '
            'backbone'
        )


def load_weights(model: nn.Module, checkpoint: dict, source: str) -> list[str]:
    """Load a checkpoint into a model, and return the names of the tensors that it lacks.

    Raises CheckpointError if shapes or the backbone differ, or weights contain NaN.
    """
    try:
        missing, _ = model.load_state_dict(checkpoint['state_dict'], strict=False)
    except RuntimeError as error:
        raise CheckpointError(f'checkpoint {source} does not fit: {error}') from error
    # Buffers may have NaN by design, except those of norms.
    weights = {key for key, _ in model.named_parameters()}
    weights |= {k for k, _ in model.named_buffers() if k.endswith(('running_mean', 'running_var'))}
    used = {key: tensor for key, tensor in checkpoint['state_dict'].items() if key in weights}
    check_nan(used, f'checkpoint {source}')
    # Older files lack BatchNorm's counter, which is not used.
    return [key for key in missing if not key.endswith('num_batches_tracked')]
