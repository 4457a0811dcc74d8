"""From a config and a checkpoint to a file that was compared with the model in it."""

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from torch import nn

from backbones.data.classes import set_num_classes
from backbones.data.config_datasets import test_pipeline
from backbones.deploy import switch_to_deploy
from backbones.engine.config import load_config
from backbones.errors import ExportError
from backbones.inference.exported_file import RUNNABLE, Description, open_exported
from backbones.inference.exported_model import ExportedModel
from backbones.inference.model import TorchModel, build_model, classes_and_palette
from backbones.weights import load_checkpoint

from .check import check_file, example_image, pipeline_difference
from .exportable import exportable, is_segmentor, min_image_size
from .formats import FORMATS, check_packages, write
from .preprocessing import Preprocessing, missing_to_multiple


@dataclass(frozen=True)
class Options:
    """What is exported.

    Attributes:
        size: Height and width of the input; None: what the config's test pipeline gives.
        dynamic: Whether height and width stay open.
        batch: Number of images in the input; None leaves it open.
        logits: Of a segmentor: logits instead of class indices.
        backbone_only: The backbone's feature maps instead of results.
        deploy: Fold the network for inference first.
        image: File of the image on which the results are compared.
    """

    size: tuple[int, int] | None = None
    dynamic: bool = False
    batch: int | None = 1
    logits: bool = False
    backbone_only: bool = False
    deploy: bool = True
    image: str | None = None


def export(
    config: str | os.PathLike,
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    options: Options | None = None,
    cfg_options: dict | None = None,
    report: Callable[[str], None] = print,
) -> Description:
    """Write a model as one file, run the file, and keep it only if its results are the model's.

    Args:
        config: Path of a config.
        checkpoint: Path or URL of the checkpoint of the whole model.
        out: The file: .onnx, .xml (with a .bin beside it) or .mlpackage.
        options: What is exported. Default: see :class:`Options`.
        cfg_options: Overrides for the config, by dotted key.
        report: Called with a line for each step.

    Returns:
        What the file says about itself.

    Raises:
        ConfigError: The config cannot be read or does not fit.
        CheckpointError: The checkpoint cannot be read or lacks part of the model.
        ExportError: The model cannot be exported so, or the file's results are others.
    """
    config, checkpoint, out, options = str(config), str(checkpoint), Path(out), options or Options()
    check_request(out, options)
    image = example_image(options.image)
    cfg = load_config(config, cfg_options)
    loaded = load_checkpoint(checkpoint)
    classes, palette = classes_and_palette(cfg, loaded)
    set_num_classes(cfg, len(classes))
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
    for transform in description.missing_transforms:
        report(
            f'note: neither the file nor infer.py does {transform} of the test pipeline; where it '
            'changes images, results differ'
        )
    with staged(out) as path:
        report(f'exporting: {summary(description)} ...')
        convert(traceable, path, description)
        if path.suffix in RUNNABLE:
            report('comparing the file with PyTorch ...')
            for line in check_file(open_exported(path), model, image):
                report(f'  {line}')
            if description.task != 'backbone':
                torch_model = TorchModel(config, checkpoint, 'cpu', cfg_options=cfg_options)
                figures = pipeline_difference(ExportedModel(path, 'cpu'), torch_model, image)
                report(f'{sizes_in_words(description)}: {figures}')
        else:
            report('not compared: Core ML runs on macOS and iOS only')
        size = sum(file.stat().st_size for file in path.parent.rglob('*') if file.is_file())
    report(f'written: {out} ({size / 2**20:.1f} MiB)')
    return description


def check_request(out: Path, options: Options) -> None:
    """Find what is wrong with a request before anything is read.

    Raises:
        ConfigError: A package is missing.
        ExportError: There is no such format, or it cannot hold what is asked for.
    """
    if out.suffix not in FORMATS:
        raise ExportError(f'OUT has to be {", ".join(FORMATS)}, not {str(out)!r}')
    check_packages(out.suffix)
    if options.dynamic and options.size:
        raise ExportError('a file is for one size or, with --dynamic, for any: not both')
    if out.suffix == '.mlpackage' and (options.dynamic or options.batch is None):
        raise ExportError('.mlpackage is for a fixed size and a fixed batch')


def convert(traceable: nn.Module, path: Path, description: Description) -> None:
    """Trace a model and write it.

    Raises:
        ExportError: torch or the format's own converter refuses.
    """
    try:
        with warnings.catch_warnings():
            # torch and the converters warn about each other's deprecated functions.
            warnings.simplefilter('ignore')
            write(traceable, path, description)
    except ExportError:
        raise
    # Each converter has its own exceptions.
    except Exception as error:
        reason = ' '.join(str(error).split())[:500]
        raise ExportError(
            f'{path.suffix} cannot be made of this model: {type(error).__name__}: {reason}'
        ) from error


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A path in a temporary folder, whose contents (files or a folder) replace those beside
    ``out`` on success."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f'{out.name}.', suffix='.partial', dir=out.parent) as folder:
        yield Path(folder) / out.name
        for made in Path(folder).iterdir():
            place = out.parent / made.name
            if place.is_dir():
                shutil.rmtree(place)
            made.replace(place)


def summary(description: Description) -> str:
    """What is being exported, in words."""
    size = f'any size from {description.min_size}x{description.min_size} on'
    if description.size:
        size = 'x'.join(map(str, description.size))
    batch = description.batch or 'any number'
    return f'{description.model}, {description.task}, {size}, batch of {batch}'


def sizes_in_words(description: Description) -> str:
    """How an image is made an input of the file, as opposed to PyTorch's test pipeline."""
    if description.size is None:
        return "  resized as in PyTorch's test pipeline"
    size = 'x'.join(map(str, description.size))
    how = 'resized' if description.task == 'segmentation' else 'resized and padded'
    return f'note: images are {how} to the fixed {size}, where PyTorch keeps their own sizes'


# ------------------------------------------------------------------------------------------------
# The metadata
# ------------------------------------------------------------------------------------------------


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
        ConfigError: The model pads images in a way that a file cannot.
        ExportError: Neither config nor options say for what size, or that is not the pipeline's.
    """
    preprocessing = Preprocessing(model.data_preprocessor)
    resize, missing = resizing(cfg)
    size, min_size = None, 1
    if options.dynamic:
        min_size = min_image_size(model)
    else:
        size = options.size or nominal_size(model, preprocessing.pad_divisor, resize)
    description = Description(
        **task_of(model, options),
        model=name,
        classes=classes,
        palette=[list(map(int, color)) for color in palette] if palette else None,
        size=size,
        min_size=min_size,
        batch=options.batch,
        resize=resize,
        missing_transforms=missing,
        mean=tuple(preprocessing.mean.flatten().tolist()),
        std=tuple(preprocessing.std.flatten().tolist()),
        pad_pixel=tuple(preprocessing.pad_pixel()),
        pad_divisor=preprocessing.pad_divisor,
        deployed=options.deploy,
        version=project_version(),
    )
    divisor = description.size_divisor
    if any(n % divisor for n in size or ()):
        raise ExportError(
            f'the test pipeline resizes to multiples of {divisor}, which {size[0]}x{size[1]} is not'
        )
    if size:
        return description
    return replace(description, min_size=min_size + missing_to_multiple(min_size, divisor))


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
            else {'segmentation_map': '(batch, height, width), int32, index into the class names'}
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
    thresholds = dict(score_threshold=settings.score_thr, max_per_image=settings.max_per_img)
    if getattr(model, 'with_mask', False):
        outputs['masks'] = '(batch, N, M, M), probabilities inside the box'
        thresholds['mask_threshold'] = settings.mask_thr_binary
    return dict(task='detection', outputs=outputs, **thresholds)


def resizing(cfg: Config) -> tuple[list[dict[str, Any]], list[str]]:
    """How the test pipeline resizes images, see :attr:`Description.resize`, and the other
    transforms that may change them."""
    steps, missing = [], []
    for transform in test_pipeline(cfg):
        name = str(transform.type).rpartition('.')[2]
        settings = {key: value for key, value in transform.items() if key[0] != '_'}
        step = {'type': name, 'interpolation': settings.get('interpolation') or 'bilinear'}
        if name == 'Resize' and set(settings) <= RESIZE_ARGUMENTS and 'scale' in settings:
            scale = settings['scale']
            step['scale'] = list(scale) if isinstance(scale, (tuple, list)) else [scale] * 2
            step['keep_ratio'] = bool(settings.get('keep_ratio', False))
            steps.append(step)
        elif name == 'ResizeToMultiple':
            steps.append(step | {'size_divisor': settings.get('size_divisor', 32)})
        elif not name.startswith(HARMLESS_TRANSFORMS):
            missing.append(name)
    return steps, missing


# Of a Resize that can be followed; clip_object_border is about ground truth.
RESIZE_ARGUMENTS = {'type', 'scale', 'keep_ratio', 'interpolation', 'clip_object_border'}
# They leave the image as it is.
HARMLESS_TRANSFORMS = ('LoadImage', 'LoadAnnotations', 'LoadPanopticAnnotations', 'Pack')


def nominal_size(model: nn.Module, divisor: int, resize: list[dict]) -> tuple[int, int]:
    """Height and width of the images that a model is usually given.

    For a detector the test pipeline's scale in landscape format, padded as the detector pads. For
    a segmentor the crops of training: its images in testing have all proportions.
    """
    crop = getattr(model.data_preprocessor, 'size', None)
    if is_segmentor(model) and crop:
        return tuple(crop)
    scales = [step['scale'] for step in resize if 'scale' in step]
    if not scales:
        raise ExportError('the test pipeline resizes to no size: give one with --size HEIGHTxWIDTH')
    low, high = sorted(scales[-1])
    if is_segmentor(model):
        return low, low
    return tuple(n + missing_to_multiple(n, divisor) for n in (low, high))


def project_version() -> str:
    """The version of this project, '' where it was not installed."""
    try:
        return version('efficientformer-v2-dense')
    except PackageNotFoundError:
        return ''
