"""What a run starts from, checked before any data are read."""

from collections.abc import Sequence

from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS
from mmengine.runner import find_latest_checkpoint
from torch import nn

from backbones.checkpoint import CheckpointError, enumerate_keys
from backbones.efficientformer_v2 import EfficientFormerV2
from backbones.weights import load_checkpoint


def starting_checkpoint(config: Config) -> str | None:
    """The checkpoint of the whole model that a run loads or resumes, if there is one."""
    if config.get('resume') and not config.get('load_from'):
        return find_latest_checkpoint(config.work_dir)
    return config.get('load_from')


def leave_out_init_cfg(config: Config) -> None:
    """Where the whole model is loaded, do not first fetch what its backbone would start from.

    Args:
        config: Changed in place.
    """
    if starting_checkpoint(config) and 'backbone' in config.model:
        config.model.backbone.init_cfg = None


def check_start(config: Config) -> dict | None:
    """Read what a run starts from, and see that the backbone in it fits.

    Args:
        config: The config, with everything from the command line in it.

    Returns:
        The checkpoint of the whole model, or None where only the backbone is loaded, or nothing.

    Raises:
        CheckpointError: The file cannot be read, holds another backbone or only a part of it, or
            is to be resumed and holds no training. The message names the file.
    """
    backbone = whole_model(config).get('backbone', {})
    source = starting_checkpoint(config)
    init_cfg = backbone.get('init_cfg') or {}
    pretrained = init_cfg.get('checkpoint') if isinstance(init_cfg, dict) else None
    if source is None and pretrained is None:
        return None
    checkpoint = load_checkpoint(source or pretrained)
    # Other backbones than ours have rules of their own for what may be missing.
    if MODELS.get(backbone.get('type', '')) is EfficientFormerV2:
        fitted = MODELS.build({**backbone, 'init_cfg': None})
        model = fitted if source is None else nn.ModuleDict({'backbone': fitted})
        fit(model, checkpoint, source or pretrained)
    if config.get('resume') and source:
        missing = [key for key in ('optimizer', 'message_hub') if key not in checkpoint]
        if missing:
            raise CheckpointError(
                f'checkpoint {source} cannot be resumed: it has no {" and no ".join(missing)}, as '
                'the best and the published ones have not. Resume one of those that are saved at '
                'intervals (iter_*.pth, epoch_*.pth), or start from it: --cfg-options load_from=...'
            )
    return checkpoint if source else None


def check_whole(config: Config, checkpoint: dict, classes: Sequence[str]) -> None:
    """See that a checkpoint has all of the model that is to be tested, heads included.

    Args:
        config: A config whose classes are set, and whose ``load_from`` names the checkpoint.
        checkpoint: What :func:`check_start` has read.
        classes: Class names of the data.

    Raises:
        CheckpointError: A tensor is missing or of another shape, or there are other classes.
    """
    source = config.load_from
    trained = (checkpoint['meta'].get('dataset_meta') or {}).get('classes')
    if trained and len(trained) != len(classes):
        raise CheckpointError(
            f'checkpoint {source} was trained on {len(trained)} classes '
            f'({enumerate_keys(list(trained))}), the data of the config have {len(classes)} '
            f'({enumerate_keys(list(classes))})'
        )
    missing = fit(MODELS.build(whole_model(config)), checkpoint, source)
    if missing:
        raise CheckpointError(
            f'checkpoint {source} lacks {len(missing)} tensors of the model '
            f'({enumerate_keys(missing)}): it was made with another config, or holds a backbone '
            'only'
        )


def whole_model(config: Config) -> ConfigDict:
    """The model of a config, out of the wrapper for test-time augmentation."""
    return config.model.get('module', config.model)


def fit(model: nn.Module, checkpoint: dict, source: str) -> list[str]:
    """Load a checkpoint into a model and name the tensors that it lacks.

    Raises:
        CheckpointError: A tensor has another shape, or the backbone is another one.
    """
    try:
        missing, _ = model.load_state_dict(checkpoint['state_dict'], strict=False)
    except RuntimeError as error:
        raise CheckpointError(f'checkpoint {source} does not fit: {error}') from error
    # Older files lack BatchNorm's counter, which nothing depends on.
    return [key for key in missing if not key.endswith('num_batches_tracked')]
