"""Files that tools/export.py wrote: their metadata, and predictions with them."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmcv.image import imresize, rescale_size

from backbones.errors import ConfigError, ExportError, import_optional, in_one_line

from .masks import paste_masks
from .results import NMS_THRESHOLD, Detections, Segmentation
from .seg_maps import Logits, seg_map_of

# The key in ONNX's metadata_props, OpenVINO's rt_info and Core ML's user-defined metadata.
METADATA_KEY = 'efficientformer_v2_dense'
INPUT_NAME = 'images'
LAYOUT = 'float32 (batch, 3, height, width), BGR, 0 to 255; normalized inside the file'
# Core ML's .mlpackage, the third format, runs only on Apple's machines.
RUNNABLE = ('.onnx', '.xml')

# ------------------------------------------------------------------------------------------------
# Metadata
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Description:
    """The metadata of an exported file."""

    # 'segmentation', 'detection' or 'backbone'.
    task: str
    model: str
    classes: tuple[str, ...]
    palette: list[list[int]] | None
    # Height and width; None if the file accepts any from min_size on.
    size: tuple[int, int] | None
    min_size: int
    # None if the file accepts any number of images.
    batch: int | None
    # The resizing transforms of the config's test pipeline, which are not part of the file, in
    # order: each with type, 'Resize' (scale: width and height, keep_ratio) or 'ResizeToMultiple'
    # (size_divisor), and interpolation.
    resize: list[dict[str, Any]]
    # (R, G, B).
    mean: tuple[float, ...]
    std: tuple[float, ...]
    # (B, G, R), for padding at the right and the bottom.
    pad_pixel: tuple[float, ...]
    outputs: list[str]
    # Other transforms of the test pipeline, which neither the file nor infer.py applies.
    missing_transforms: list[str]
    # Of a segmentor: whether it returns logits instead of class indices, how these are resized, and
    # for a single logit, the probability above which a pixel is of class 1.
    logits: bool = False
    align_corners: bool = False
    binary_threshold: float | None = None
    # Of a detector: the score that all detections exceed, how many there are at most in an image,
    # the IoU threshold of non-maximum suppression, and the probability from which on a pixel
    # belongs to an instance.
    score_threshold: float | None = None
    max_per_image: int | None = None
    nms_threshold: float = NMS_THRESHOLD
    mask_threshold: float | None = None
    # Of an int8 file: metrics (of float and int8), drop in points, float_layers, calibration_images
    # and speed_up on the CPU that exported it.
    int8: dict[str, Any] | None = None
    layout: str = LAYOUT

    @property
    def size_divisor(self) -> int:
        """Height and width of the input must be multiples of this."""
        return max((step.get('size_divisor', 1) for step in self.resize), default=1)

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    def fit(self, image: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
        """Resize an image as the config's test pipeline does, and make it an input of the file.

        Returns the input, and height and width of the image in it. If the size is fixed, a
        segmentor's image is stretched to fill it, and a detector's keeps its proportions.
        """
        for height, width, interpolation in self._sizes(*image.shape[:2]):
            if (height, width) != image.shape[:2]:
                image = imresize(image, (width, height), interpolation=interpolation)
        height, width = image.shape[:2]
        rows, columns = self.size or (max(height, self.min_size), max(width, self.min_size))
        inputs = np.empty((3, rows, columns), np.float32)
        inputs[:] = np.array(self.pad_pixel, np.float32)[:, None, None]
        inputs[:, :height, :width] = image.transpose(2, 0, 1)
        return inputs, (height, width)

    def _sizes(self, height: int, width: int) -> list[tuple[int, int, str]]:
        """Return the sizes that an image is resized to, in order, each with its interpolation."""
        sizes, interpolation = [], 'bilinear'
        for step in self.resize:
            interpolation = step['interpolation']
            if step['type'] == 'ResizeToMultiple':
                divisor = step['size_divisor']
                height, width = (-(-n // divisor) * divisor for n in (height, width))
            elif step['keep_ratio']:
                width, height = rescale_size((width, height), tuple(step['scale']))
            else:
                width, height = step['scale']
            sizes.append((height, width, interpolation))
        if self.size is None:
            return sizes
        fixed = self.size
        if self.task != 'segmentation':
            ratio = min(1, self.size[0] / height, self.size[1] / width)
            fixed = tuple(max(1, int(n * ratio + 0.5)) for n in (height, width))
        return sizes if fixed == (height, width) else [(*fixed, interpolation)]


@dataclass(frozen=True)
class Runner:
    """An opened file; call it with images."""

    description: Description
    _run: Callable[[np.ndarray], Sequence[np.ndarray]]

    def __call__(self, inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Return the outputs by name; RuntimeError if that fails, for example out of memory."""
        try:
            results = self._run(inputs)
        # Some of these libraries' exceptions are neither public nor derived from RuntimeError.
        except Exception as error:
            raise RuntimeError(in_one_line(error)) from error
        return dict(zip(self.description.outputs, results, strict=True))


def is_exported(path: str | os.PathLike) -> bool:
    """Return whether a path has a suffix of the files that tools/export.py writes."""
    return Path(path).suffix in (*RUNNABLE, '.mlpackage')


def omp_threads() -> int:
    """Return the number of threads in OMP_NUM_THREADS, or 0 if there is none."""
    # 4,2 means 4 threads, and 2 in nested regions; OpenMP ignores what is not a number.
    own = os.environ.get('OMP_NUM_THREADS', '').partition(',')[0].strip()
    return int(own) if own.isdecimal() else 0


def open_exported(
    path: str | os.PathLike,
    device: str | None = None,
    threads: int | None = None,
    amp: bool = False,
) -> Runner:
    """Open a file that tools/export.py wrote.

    ``device`` is 'cpu'; for .onnx also 'cuda' or 'cuda:1', for .xml one of OpenVINO's names.
    Default: for .onnx the GPU if onnxruntime can use one (under torchrun the process's own), else
    the CPU. Default of ``threads``: OMP_NUM_THREADS, else the library's choice. ``amp``, for .xml
    only, lets OpenVINO choose bfloat16 or float16. Raises ConfigError or ExportError.
    """
    path = Path(path)
    threads = threads or omp_threads()
    if path.suffix not in RUNNABLE:
        raise ExportError(f'{path} cannot be run here, only {" and ".join(RUNNABLE)} files')
    if not path.is_file():
        raise ExportError(f'there is no model {path}')
    if amp and path.suffix != '.xml':
        raise ConfigError(
            f'{path} runs in the precision that it was exported in; mixed precision (--amp) works '
            'only for .xml files, and for a config with its checkpoint'
        )
    try:
        if path.suffix == '.xml':
            return open_openvino(path, device, threads, amp)
        return open_onnx(path, device, threads)
    except ConfigError:
        raise
    # Neither library documents what it may raise.
    except Exception as error:
        reason = in_one_line(error)
        raise ExportError(f'{path} cannot be opened: {reason}') from error


def open_onnx(path: Path, device: str | None, threads: int) -> Runner:
    """Open a file with onnxruntime."""
    runtime = import_optional('onnxruntime', str(path))
    options = runtime.SessionOptions()
    # 0 means onnxruntime's own choice.
    options.intra_op_num_threads = threads
    providers = onnx_providers(runtime, device)
    session = runtime.InferenceSession(str(path), options, providers=providers)
    metadata = session.get_modelmeta().custom_metadata_map
    description = read_description(path, metadata.get(METADATA_KEY))
    names = list(description.outputs)
    return Runner(description, lambda inputs: session.run(names, {INPUT_NAME: inputs}))


def onnx_providers(runtime: Any, device: str | None) -> list:
    """Return the execution providers for a device."""
    has_gpu = 'CUDAExecutionProvider' in runtime.get_available_providers()
    own_gpu = f'cuda:{os.environ.get("LOCAL_RANK", 0)}'
    kind, _, number = (device or (own_gpu if has_gpu else 'cpu')).partition(':')
    if kind not in ('cpu', 'cuda') or (kind == 'cuda' and not has_gpu):
        raise ConfigError(
            f'device {device!r} cannot be used here: this onnxruntime runs on '
            f'{"cuda and cpu" if has_gpu else "cpu (for cuda, install onnxruntime-gpu)"}'
        )
    gpu = [('CUDAExecutionProvider', {'device_id': int(number or 0)})] if kind == 'cuda' else []
    return [*gpu, 'CPUExecutionProvider']


def open_openvino(path: Path, device: str | None, threads: int, amp: bool) -> Runner:
    """Open a file with OpenVINO."""
    if (device or '').startswith('cuda'):
        raise ConfigError(f'{path} cannot be run on {device}: OpenVINO needs --device cpu')
    openvino = import_optional('openvino', str(path))
    core = openvino.Core()
    settings = {'PERFORMANCE_HINT': 'LATENCY'}
    if not amp:
        # By default, OpenVINO uses bfloat16 if the processor has it.
        settings['INFERENCE_PRECISION_HINT'] = 'f32'
    if threads:
        settings['INFERENCE_NUM_THREADS'] = threads
    model = core.read_model(str(path))
    has_text = model.has_rt_info([METADATA_KEY])
    text = model.get_rt_info([METADATA_KEY]).astype(str) if has_text else None
    description = read_description(path, text)
    compiled = core.compile_model(model, (device or 'cpu').upper(), settings)
    return Runner(description, lambda inputs: compiled(inputs).to_tuple())


def read_description(path: Path, text: str | None) -> Description:
    """Return a file's metadata, without entries of other versions."""
    try:
        values, known = json.loads(text or ''), {field.name for field in fields(Description)}
        values = {key: value for key, value in values.items() if key in known}
        for key in ('classes', 'mean', 'std', 'pad_pixel'):
            values[key] = tuple(values[key])
        values['size'] = values['size'] and tuple(values['size'])
        return Description(**values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(
            f'{path} has no metadata that describes its inputs and outputs: another program or an '
            'earlier version of tools/export.py wrote it, or it is corrupt; export the model again'
        ) from error


class ExportedModel:
    """A file that tools/export.py wrote, with the methods of :class:`.model.TorchModel`.

    Arguments and errors are those of :func:`open_exported`; ExportError also for a backbone alone.
    """

    def __init__(
        self, path: str | os.PathLike, device: str | None = None, amp: bool = False
    ) -> None:
        self.runner = open_exported(path, device, amp=amp)
        self.description = self.runner.description
        if self.description.task == 'backbone':
            raise ExportError(f'{path} holds only a backbone, which makes no predictions')
        self.task = self.description.task
        self.classes = self.description.classes
        self.palette = self.description.palette
        self.gives_logits = self.description.logits
        self.nms_threshold = self.description.nms_threshold
        runtime = 'OpenVINO' if Path(path).suffix == '.xml' else 'onnxruntime'
        self.about = {
            'model': f'{self.description.model}, exported',
            'device': f'{runtime}, mixed precision' if amp else runtime,
        }

    def preprocess(self, image: np.ndarray) -> dict[str, Any]:
        """Return the file's input, and the sizes of the image in it and of the image itself."""
        inputs, fitted = self.description.fit(image)
        return dict(inputs=inputs, fitted=fitted, size=image.shape[:2])

    def predict(self, batch: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Run the file on preprocessed images of one size; return each one's outputs by name."""
        step = self.description.batch or max(len(batch), 1)
        raws = []
        for first in range(0, len(batch), step):
            chunk = batch[first : first + step]
            inputs = np.stack([item['inputs'] for item in chunk])
            if self.description.batch:
                # A file with a fixed batch size accepts no smaller batch.
                rest = [(0, self.description.batch - len(chunk))] + [(0, 0)] * 3
                inputs = np.pad(inputs, rest)
            outputs = self.runner(inputs)
            raws += [
                {name: values[i] for name, values in outputs.items()} | {'fitted': item['fitted']}
                for i, item in enumerate(chunk)
            ]
        return raws

    def predict_logits(self, batch: Sequence[dict[str, Any]]) -> list[Logits]:
        """Return the logits of preprocessed images, all of one size, if the file returns logits."""
        raws = zip(self.predict(batch), batch, strict=True)
        return [self._logits_of(raw, item['size']) for raw, item in raws]

    def postprocess(self, raw: dict[str, Any], size: tuple[int, int]) -> Detections | Segmentation:
        """Turn a result of :meth:`predict` into a prediction in pixels of an image of that size."""
        fitted_height, fitted_width = raw['fitted']
        if self.task == 'segmentation':
            dtype = np.uint8 if len(self.classes) <= 255 else np.uint16
            if self.gives_logits:
                return Segmentation(seg_map_of(self._logits_of(raw, size)).numpy().astype(dtype))
            labels = raw['segmentation_map'][:fitted_height, :fitted_width].astype(dtype)
            return Segmentation(
                cv2.resize(labels, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
            )
        limits = np.array([fitted_width, fitted_height] * 2, np.float32)
        kept = (raw['boxes'][:, :2] < limits[:2]).all(axis=1) & (raw['labels'] >= 0)
        scale = np.array([size[1] / fitted_width, size[0] / fitted_height] * 2, np.float32)
        boxes = raw['boxes'][kept]
        masks = None
        if 'masks' in raw:
            # A mask covers the whole box, whose part in the padding is cut off below.
            threshold = self.description.mask_threshold
            masks = paste_masks(raw['masks'][kept], boxes * scale, size, threshold)
        boxes = np.minimum(boxes, limits) * scale
        return Detections(boxes, raw['scores'][kept], raw['labels'][kept].astype(np.int64), masks)

    def _logits_of(self, raw: dict[str, Any], size: tuple[int, int]) -> Logits:
        height, width = raw['fitted']
        logits = torch.from_numpy(raw['logits'][:, :height, :width])
        logits = Logits.of(logits, self.description.binary_threshold)
        return logits.resize(size, self.description.align_corners)
