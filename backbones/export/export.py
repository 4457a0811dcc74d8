"""From a config and a checkpoint to a file that was compared with the model it holds."""

import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from torch import nn

from backbones.data.classes import set_num_classes
from backbones.data.config_datasets import test_pipeline
from backbones.deploy import switch_to_deploy
from backbones.engine.config import load_config
from backbones.errors import ExportError
from backbones.inference.model import build_model, classes_and_palette
from backbones.weights import load_checkpoint

from .checking import check_file
from .description import Description
from .example_picture import example_picture
from .exportable import exportable, is_segmentor, least_size, pad_divisor
from .formats import ENDINGS, packages_for, write
from .preprocessing import flips_channels
from .reference import Reference
from .runner import RUNNABLE, open_exported

# Steps of a test pipeline that leave the picture as it is.
HARMLESS_STEPS = ('LoadImage', 'LoadAnnotations', 'Pack', 'Resize')


@dataclass(frozen=True)
class Options:
    """What is exported.

    Attributes:
        size: Height and width of the input; None: what the config's test pipeline gives.
        dynamic: Whether height and width stay open.
        batch: Pictures at once; None leaves it open.
        logits: Of a segmentor: logits instead of labels.
        backbone_only: The backbone's feature maps instead of results.
        deploy: Fold the network for inference first.
        picture: File of the picture on which the results are compared.
    """

    size: tuple[int, int] | None = None
    dynamic: bool = False
    batch: int | None = 1
    logits: bool = False
    backbone_only: bool = False
    deploy: bool = True
    picture: str | None = None


def export(
    config: str,
    checkpoint: str,
    out: Path,
    options: Options,
    cfg_options: dict | None = None,
    report: Callable[[str], None] = print,
) -> Description:
    """Write a model as one file, run the file, and keep it only if it says what the model says.

    Args:
        config: Path of a config.
        checkpoint: Path or address of the checkpoint of the whole model.
        out: The file, ending in .onnx, .pt2, .xml (with a .bin beside it) or .mlpackage.
        options: What is exported.
        cfg_options: Overrides for the config, by dotted key.
        report: Called with a line for each step.

    Returns:
        What the file says about itself.

    Raises:
        ConfigError: The config cannot be read or does not fit.
        CheckpointError: The checkpoint cannot be read or lacks part of the model.
        ExportError: The model cannot be exported so, or the file's results are others.
    """
    check_request(out, options)
    picture = example_picture(options.picture)
    cfg = load_config(config, cfg_options)
    loaded = load_checkpoint(checkpoint)
    classes, palette = classes_and_palette(cfg, loaded)
    set_num_classes(cfg.model, len(classes))
    model = revert_sync_batchnorm(build_model(cfg, loaded, checkpoint)).eval()
    description = describe(cfg, model, options, Path(config).stem, classes, palette)
    if out.suffix == '.mlpackage' and description.task == 'detection':
        raise ExportError(
            '.mlpackage holds segmentors, and the backbone of a detector with --backbone-only: '
            'Core ML has no operators for what comes after it'
        )
    traceable = exportable(model, options.logits, options.backbone_only)
    if options.deploy:
        traceable = switch_to_deploy(traceable)
    for step in unknown_steps(cfg):
        report(f'note: {step} of the test pipeline is not part of the file')
    with atomic_write(out) as path:
        report(f'exporting: {summary(description)} ...')
        convert(traceable, path, description)
        if path.suffix in RUNNABLE:
            report('comparing the file with PyTorch ...')
            for line in check_file(open_exported(path), Reference(model, description), picture):
                report(f'  {line}')
        else:
            report('not compared: Core ML runs on macOS and iOS only')
        size = sum(file.stat().st_size for file in path.parent.rglob('*') if file.is_file())
    report(f'written: {out} ({size / 2**20:.1f} MiB)')
    return description


def check_request(out: Path, options: Options) -> None:
    """See what can be seen to be wrong before anything is read.

    Raises:
        ExportError: The format, or something that it needs, is not there.
    """
    if out.suffix not in ENDINGS:
        raise ExportError(f'OUT ends in {", ".join(ENDINGS)}, not {str(out)!r}')
    packages_for(out.suffix)
    if options.dynamic and options.size:
        raise ExportError('a file is for one size or, with --dynamic, for any: not both')
    if out.suffix == '.mlpackage' and (options.dynamic or options.batch is None):
        raise ExportError('.mlpackage is for a fixed size and a fixed batch')


def describe(
    cfg: Config,
    model: nn.Module,
    options: Options,
    name: str,
    classes: tuple[str, ...],
    palette: Any,
) -> Description:
    """The metadata of the file that is to be written.

    Raises:
        ExportError: The config does not say for what size, and nor do the options.
    """
    preprocessor = model.data_preprocessor
    # Its mean and std are in the order that the network sees.
    mean, std = (getattr(preprocessor, key).flatten().tolist() for key in ('mean', 'std'))
    resize = resize_rule(cfg)
    min_size = least_size(model)
    size = None
    if not options.dynamic:
        size = options.size or nominal_size(cfg, model, resize)
    return Description(
        **task_of(model, options),
        model=name,
        classes=classes,
        palette=[list(map(int, colour)) for colour in palette] if palette else None,
        size=size,
        min_size=min_size if options.dynamic else 1,
        batch=options.batch,
        resize=resize,
        mean=tuple(mean),
        std=tuple(std),
        pad_pixel=tuple(mean[::-1] if flips_channels(preprocessor) else mean),
        pad_divisor=pad_divisor(model),
        deployed=options.deploy,
        version=project_version(),
    )


def task_of(model: nn.Module, options: Options) -> dict[str, Any]:
    """Task, outputs and thresholds."""
    if options.backbone_only:
        outputs = {f'features_{i}': 'feature map' for i in model.backbone.out_indices}
        return dict(task='backbone', outputs=outputs)
    if is_segmentor(model):
        head = model.decode_head
        outputs = (
            {'logits': '(batch, classes, height, width)'}
            if options.logits
            else {'label_map': '(batch, height, width), int32, index into the class names'}
        )
        return dict(
            task='segmentation',
            outputs=outputs,
            logits=options.logits,
            align_corners=head.align_corners,
            binary_threshold=head.threshold if head.out_channels == 1 else None,
        )
    settings = model.test_cfg.rcnn if hasattr(model, 'roi_head') else model.test_cfg
    outputs = {
        'boxes': '(batch, N, 4): left, top, right, bottom in pixels of the input',
        'scores': '(batch, N), falling; rows that only fill the batch have 0',
        'labels': '(batch, N), int32, index into the class names; -1 in rows that only fill',
    }
    thresholds = dict(score_threshold=settings.score_thr, max_per_picture=settings.max_per_img)
    if getattr(model, 'with_mask', False):
        outputs['masks'] = '(batch, N, M, M), probabilities inside the box'
        thresholds['mask_threshold'] = settings.mask_thr_binary
    return dict(task='detection', outputs=outputs, **thresholds)


def resize_rule(cfg: Config) -> dict[str, Any] | None:
    """How the test pipeline resizes pictures; None where it does not."""
    for step in test_pipeline(cfg):
        if str(step.type).rpartition('.')[2] == 'Resize' and 'scale' in step:
            scale = step.scale if isinstance(step.scale, (tuple, list)) else (step.scale,) * 2
            return dict(scale=list(scale), keep_ratio=bool(step.get('keep_ratio', False)))
    return None


def nominal_size(cfg: Config, model: nn.Module, resize: dict | None) -> tuple[int, int]:
    """Height and width of the pictures that a model is usually given.

    For a detector the test pipeline's scale, lying, padded as the detector pads. For a segmentor
    the crops of training: its pictures in testing have all proportions.
    """
    crop = getattr(model.data_preprocessor, 'size', None)
    if is_segmentor(model) and crop:
        return tuple(crop)
    if resize is None:
        raise ExportError('the test pipeline resizes to no size: give one with --size HEIGHTxWIDTH')
    low, high = sorted(resize['scale'])
    if is_segmentor(model):
        return low, low
    divisor = pad_divisor(model)
    return tuple(-(-n // divisor) * divisor for n in (low, high))


def unknown_steps(cfg: Config) -> list[str]:
    """Steps of the test pipeline that may change the picture and that a file does not have."""
    names = [str(step.type).rpartition('.')[2] for step in test_pipeline(cfg)]
    return [name for name in names if not name.startswith(HARMLESS_STEPS)]


def convert(traceable: nn.Module, path: Path, description: Description) -> None:
    """Trace a model and write it.

    Raises:
        ExportError: torch or the format's own converter refuses.
    """
    from .tracing import trace

    try:
        with warnings.catch_warnings():
            # Of what torch and the converters call that is deprecated.
            warnings.simplefilter('ignore')
            program = trace(
                traceable,
                description.size,
                description.batch,
                description.min_size,
                keep_biases=path.suffix == '.mlpackage',
            )
            write(program, path, description)
    except ExportError:
        raise
    # Each converter has its own exceptions.
    except Exception as error:
        reason = ' '.join(str(error).split())[:500]
        raise ExportError(
            f'{path.suffix} cannot be made of this model: {type(error).__name__}: {reason}'
        ) from error


@contextmanager
def atomic_write(out: Path) -> Iterator[Path]:
    """A path in a folder of its own, whose contents take their places if all goes well.

    A model may be more than one file, or a folder.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(mkdtemp(prefix=f'{out.name}.', suffix='.partial', dir=out.parent))
    try:
        yield folder / out.name
        for made in folder.iterdir():
            place = out.parent / made.name
            if place.is_dir():
                shutil.rmtree(place)
            made.replace(place)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def summary(description: Description) -> str:
    """What is being exported, in words."""
    size = 'x'.join(map(str, description.size)) if description.size else 'any size'
    batch = description.batch or 'any number'
    return f'{description.model}, {description.task}, {size}, batch of {batch}'


def project_version() -> str:
    """The version of this project, '' where it was not installed."""
    try:
        return version('efficientformer-v2-dense')
    except PackageNotFoundError:
        return ''
