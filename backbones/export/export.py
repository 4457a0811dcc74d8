"""Export of a config and a checkpoint to a file, which is compared with the model in PyTorch."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from backbones.inference.exported_file import RUNNABLE, Description, ExportedModel, open_exported
from backbones.inference.model import TorchModel, build_model, classes_and_palette
from backbones.inference.palette import saved_palette
from backbones.inference.testing import HARMLESS_TRANSFORMS
from backbones.weights import load_checkpoint

from .check import check_file, example_image, pipeline_difference, size_in_pytorch
from .exportable import exportable, is_segmentor, min_image_size
from .formats import FORMATS, check_packages, write
from .int8 import check_data, import_nncf, quantize
from .preprocessing import Preprocessing, missing_to_multiple


@dataclass(frozen=True)
class Options:
    """What is exported, and how."""

    size: tuple[int, int] | None = None  # height and width; None: from the test pipeline
    dynamic: bool = False  # accept images of any height and width
    batch: int | None = 1  # images in the input; None: any number
    logits: bool = False  # a segmentor's logits instead of class indices
    backbone_only: bool = False  # the backbone's feature maps instead of results
    deploy: bool = True  # fold the network for inference first
    image: str | None = None  # image file on which results are compared; None: a validation image
    int8: bool = False  # quantize, if the metric on the validation set drops little
    calibration_images: int = 300  # training images that set the ranges of int8
    max_drop: float = 1.0  # points of mIoU or AP by which int8 may lower the metric


def export(
    config: str | os.PathLike,
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    options: Options | None = None,
    cfg_options: dict | None = None,
    report: Callable[[str], None] = print,
) -> Description:
    """Write a model as one file, run it, and keep it only if its results equal the model's.

    Args:
        config: Path of a config.
        checkpoint: Path or URL of the checkpoint of the whole model.
        out: Path of the new file: .onnx, .xml (with a .bin beside it) or .mlpackage.
        options: What is exported. Default: see :class:`Options`.
        cfg_options: Overrides for the config, by dotted key.
        report: Called with a line for each step.

    Returns:
        The file's metadata.

    Raises:
        ConfigError: The config cannot be read or does not fit.
        CheckpointError: The checkpoint cannot be read or lacks part of the model.
        ExportError: The model cannot be exported this way, or the file's results differ.
    """
    config, checkpoint, out, options = str(config), str(checkpoint), Path(out), options or Options()
    check_request(out, options)
    cfg = load_config(config, cfg_options)
    if options.int8:
        # Before exporting, which takes minutes.
        data = load_config(config, cfg_options)
        check_data(data)
    image = example_image(options.image, cfg)
    loaded = load_checkpoint(checkpoint)
    classes, palette = classes_and_palette(cfg, loaded)
    set_num_classes(cfg, len(classes))
    model = revert_sync_batchnorm(build_model(cfg, loaded, checkpoint)).eval()
    # First, since describe() needs parts that detectors refused here may lack.
    open_sizes = out.suffix in RUNNABLE
    traceable = exportable(model, options.logits, options.backbone_only, open_sizes)
    description = describe(cfg, model, options, Path(config).stem, classes, palette)
    if options.deploy:
        traceable = switch_to_deploy(traceable)
    for transform in description.missing_transforms:
        report(
            f'note: the test pipeline has {transform}, which the file and infer.py leave out; if '
            'it changes images, results differ'
        )
    with staged(out) as path:
        size = size_in_words(description)
        report(
            f'exporting: {description.model}, {description.task}, {size}, '
            f'batch of {description.batch or "any number"}; this can take minutes ...'
        )
        write(traceable, path, description)
        if path.suffix in RUNNABLE:
            report('comparing the file with PyTorch ...')
            for line in check_file(open_exported(path), model, image):
                report(f'  {line}')
            # A config without data does not say how images are resized.
            if description.task != 'backbone' and test_pipeline(cfg):
                torch_model = TorchModel(config, checkpoint, 'cpu', cfg_options=cfg_options)
                figures = pipeline_difference(ExportedModel(path, 'cpu'), torch_model, image)
                if description.size is None:
                    how = "  resized as in PyTorch's test pipeline"
                elif description.task == 'segmentation':
                    how = f'note: images are resized to the fixed {size}, unlike in PyTorch'
                else:
                    how = f'note: images are padded to the fixed {size}, unlike in PyTorch'
                    own = 'x'.join(map(str, size_in_pytorch(torch_model, image)))
                    if own != size:
                        figures += f'; --size {own} fits this image'
                report(f'{how}: {figures}')
        else:
            report('not compared: Core ML runs on macOS and iOS only')
        if options.int8:
            report('quantizing; metrics are on the validation set ...')
            description = quantize(
                path,
                data,
                description,
                options.calibration_images,
                options.max_drop,
                report,
            )
        count = sum(file.stat().st_size for file in path.parent.rglob('*') if file.is_file())
    report(f'written: {out} ({count / 2**20:.1f} MiB)')
    return description


def check_request(out: Path, options: Options) -> None:
    """Raise ExportError if the options do not fit together, before any file is read."""
    if out.suffix not in FORMATS:
        raise ExportError(f'the suffix of OUT must be {", ".join(FORMATS)}, not {str(out)!r}')
    check_packages(out.suffix)
    if options.int8:
        if out.suffix not in RUNNABLE or options.backbone_only:
            raise ExportError(
                '--int8 is only for .onnx and .xml of whole models: it needs their metrics'
            )
        if out.suffix == '.xml':
            import_nncf()
    if options.logits and options.backbone_only:
        raise ExportError('--backbone-only exports feature maps, no logits: leave out --logits')
    if options.dynamic and options.size:
        raise ExportError('--size fixes the size, --dynamic allows any size: give one, not both')
    if out.suffix == '.mlpackage' and (options.dynamic or options.batch is None):
        raise ExportError('.mlpackage needs a fixed size and a fixed batch size')


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Yield a path in a temporary folder whose contents are moved beside ``out`` on success."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f'{out.name}.', suffix='.partial', dir=out.parent) as folder:
        yield Path(folder) / out.name
        for made in Path(folder).iterdir():
            place = out.parent / made.name
            if made.is_dir() and place.is_dir():
                shutil.rmtree(place)
            made.replace(place)


def size_in_words(description: Description) -> str:
    if description.size:
        return 'x'.join(map(str, description.size))
    return f'any size from {description.min_size}x{description.min_size} up'


def describe(
    cfg: Config,
    model: nn.Module,
    options: Options,
    name: str,
    classes: tuple[str, ...],
    palette: Any,
) -> Description:
    """Return the metadata of the file to be written."""
    preprocessing = Preprocessing(model.data_preprocessor)
    colors = saved_palette(palette, len(classes))
    resize, missing = resizing(cfg)
    min_size = min_image_size(model) if options.dynamic else 1
    size = options.size
    if not (size or options.dynamic):
        size = nominal_size(model, preprocessing.pad_divisor, resize)
    description = Description(
        **task_of(model, options),
        model=name,
        classes=classes,
        palette=[list(color) for color in colors] if colors else None,
        size=size,
        min_size=min_size,
        batch=options.batch,
        resize=resize,
        missing_transforms=missing,
        mean=tuple(preprocessing.mean.flatten().tolist()),
        std=tuple(preprocessing.std.flatten().tolist()),
        pad_pixel=tuple(preprocessing.pad_pixel()),
    )
    divisor = description.size_divisor
    if any(n % divisor for n in size or ()):
        raise ExportError(
            f'the test pipeline needs multiples of {divisor}: give another --size than '
            f'{size[0]}x{size[1]}'
        )
    return replace(description, min_size=min_size + missing_to_multiple(min_size, divisor))


def task_of(model: nn.Module, options: Options) -> dict[str, Any]:
    """Return the task, outputs and thresholds of the description."""
    if options.backbone_only:
        return dict(task='backbone', outputs=[f'features_{i}' for i in model.backbone.out_indices])
    if is_segmentor(model):
        head = model.decode_head
        return dict(
            task='segmentation',
            outputs=['logits' if options.logits else 'segmentation_map'],
            logits=options.logits,
            align_corners=head.align_corners,
            binary_threshold=head.threshold if head.out_channels == 1 else None,
        )
    settings = model.test_cfg.rcnn if hasattr(model, 'roi_head') else model.test_cfg
    has_masks = getattr(model, 'with_mask', False)
    return dict(
        task='detection',
        outputs=['boxes', 'scores', 'labels', *(['masks'] if has_masks else [])],
        score_threshold=settings.score_thr,
        max_per_image=settings.max_per_img,
        nms_threshold=settings.nms.get('iou_threshold', settings.nms.get('iou_thr')),
        mask_threshold=settings.mask_thr_binary if has_masks else None,
    )


def resizing(cfg: Config) -> tuple[list[dict[str, Any]], list[str]]:
    """Return how the test pipeline resizes images, see :attr:`Description.resize`, and the names
    of its other transforms that may change them."""
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


# Arguments of Resize that are supported; clip_object_border concerns only ground truth.
RESIZE_ARGUMENTS = {'type', 'scale', 'keep_ratio', 'interpolation', 'clip_object_border'}


def nominal_size(model: nn.Module, divisor: int, resize: list[dict]) -> tuple[int, int]:
    """Return the default height and width: a segmentor's crop size, since test images have all
    proportions, or a detector's test scale in landscape format with the detector's padding."""
    crop = getattr(model.data_preprocessor, 'size', None)
    if is_segmentor(model) and crop:
        return tuple(crop)
    scales = [step['scale'] for step in resize if 'scale' in step]
    if not scales:
        raise ExportError('the test pipeline sets no size: give one with --size HEIGHTxWIDTH')
    low, high = sorted(scales[-1])
    if is_segmentor(model):
        return low, low
    return tuple(n + missing_to_multiple(n, divisor) for n in (low, high))
