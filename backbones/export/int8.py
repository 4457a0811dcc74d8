"""Int8: quantize convolutions and matrix products of an exported file, without training.

NNCF for OpenVINO and onnxruntime's own tool for ONNX quantize the network by the ranges of its
activations on training images. The metric of the file is measured before and after. If it drops
too much, the layers of a second stage's boxes and those that add most error stay in float.
"""

import logging
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from mmengine.config import Config

from backbones.data.check import refuse_errors
from backbones.data.classes import set_classes
from backbones.data.config_datasets import build_images, datasets_of
from backbones.data.skip_bad import guard
from backbones.engine.metrics import is_number, main_metrics
from backbones.errors import ConfigError, ExportError, import_optional
from backbones.inference.exported_file import INPUT_NAME, Description, open_exported
from backbones.inference.testing import use_inferencer
from backbones.progress import ProgressBar

from .evaluate import check_exported_test, measure
from .formats import reachable, save

# Layers to quantize. onnxruntime gains nothing from products of activations, as in attention.
ONNX_LAYERS = ('Conv', 'ConvTranspose', 'Gemm')
OPENVINO_LAYERS = (
    *('Convolution', 'GroupConvolution', 'MatMul'),
    *('ConvolutionBackpropData', 'GroupConvolutionBackpropData'),
)
# All inputs of these operators are features. Of other operators only the first input is; the rest
# are sizes, indices or boxes.
JOINING = ('MatMul', 'Concat', 'Add', 'Subtract', 'Multiply', 'Divide')
# Shares of layers that stay in float, tried in this order until the metric drops little enough.
SHARES = (0, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
# Number of images on which float and int8 layers are compared.
COMPARED = 8

# Makes the file's inputs from the training image with an index.
ReadInput = Callable[[int], dict[str, np.ndarray]]


def check_data(config: Config) -> None:
    """Use a config's validation set as its test set, and raise an error if int8 cannot be measured
    on it or calibrated on the training data."""
    if config.get('val_dataloader') and config.get('val_evaluator'):
        config.test_dataloader, config.test_evaluator = config.val_dataloader, config.val_evaluator
    for key in ('train_dataloader', 'test_dataloader', 'test_evaluator'):
        if not config.get(key):
            raise ConfigError(f'--int8 needs training and validation data, the config has no {key}')
    set_classes(config, ('train', 'test'), keep_files=True)
    refuse_errors(config, ('test',))
    training_images(config)


def training_images(config: Config) -> Any:
    """Return the training images of a config with classes set; corrupt ones raise an error."""
    dataset = build_images(next(datasets_of(config, ('train',))))
    guard(dataset)
    return dataset


def quantize(
    path: Path,
    config: Config,
    description: Description,
    calibration_images: int,
    max_drop: float,
    report: Callable[[str], None],
) -> Description:
    """Replace a float file, .onnx or .xml, by an int8 file if its metric is nearly as good.

    ``config``, which is modified, has passed :func:`check_data`. The metric may drop by
    ``max_drop`` points, hundredths of mIoU or AP. Returns the metadata of the int8 file with the
    measurements under ``int8``; raises ExportError if it drops more with half the layers in float.
    """
    use_inferencer(config, dict(config=str(path)))
    check_exported_test(config)
    images = training_images(config)
    index = np.linspace(0, len(images) - 1, min(calibration_images, len(images))).round()
    index = index.astype(int).tolist()

    def read_input(number: int) -> dict[str, np.ndarray]:
        image = description.fit(images[number]['img'])[0]
        return {INPUT_NAME: np.stack([image] * (description.batch or 1))}

    # mmdet's metrics range from 0 to 1, mmseg's from 0 to 100.
    scale = 100 if config.default_scope == 'mmdet' else 1
    before = points(measure(config, path, '  float: batch'), scale)
    made = path.with_name(f'int8.{path.name}')
    order: list[str] = []
    for share in SHARES:
        if share and not order:
            order = by_added_error(path, made, map(read_input, index[:COMPARED]))
        kept = order[: math.ceil(share * len(order))]
        report(f'  calibrating on {len(index)} images, {len(kept)} layers in float ...')
        if path.suffix == '.onnx':
            model = run_onnxruntime(path, made, index, read_input, kept)
        else:
            model = run_nncf(path, index, read_input, kept)
        save(model, made, description)
        after = points(measure(config, made, '  int8: batch'), scale)
        drop = round(max(before[name] - after[name] for name in before), 2)
        figures = ', '.join(f'{name} {before[name]:.2f} -> {after[name]:.2f}' for name in before)
        report(f'  {figures}: a drop of {drop:.2f} points')
        if drop <= max_drop:
            break
    else:
        raise ExportError(
            f'int8 lowers the metric too much: {figures}, a drop of {drop:.2f} points with '
            f'{len(kept)} of {len(order)} layers in float; --max-drop allows {max_drop:g}'
        )
    sizes = [sum(one.stat().st_size for one in files_of(each)) for each in (path, made)]
    measured = {
        'metrics': {name: [before[name], after[name]] for name in before},
        'drop': drop,
        'float_layers': [name.removesuffix('/WithoutBiases') for name in kept],
        'calibration_images': len(index),
        'speed_up': round(speed_up(path, made, read_input(index[0])[INPUT_NAME]), 2),
    }
    description = replace(description, int8=measured)
    save(model, made, description)
    for file, place in zip(files_of(made), files_of(path), strict=True):
        file.replace(place)
    report(
        f'int8: drop {drop:.2f}, {sizes[0] / 2**20:.1f} -> {sizes[1] / 2**20:.1f} MiB, '
        f'{measured["speed_up"]} times as fast, layers in float: '
        f'{", ".join(measured["float_layers"]) or "none"}'
    )
    return description


def import_nncf() -> ModuleType:
    """Import NNCF with its telemetry off."""
    os.environ.setdefault('NNCF_CI', '1')
    nncf = import_optional('nncf', '--int8 of .xml', 'int8')
    nncf.set_log_level(logging.ERROR)
    return nncf


def points(metrics: dict[str, Any], scale: int) -> dict[str, float]:
    """Return the main metrics, in hundredths."""
    named = main_metrics(name for name, value in metrics.items() if is_number(value))
    return {name: round(float(metrics[name]) * scale, 2) for name in named}


def run_onnxruntime(
    path: Path, made: Path, index: list[int], read_input: ReadInput, kept: list[str]
) -> Any:
    """Quantize an ONNX file, except for the layers ``kept``, write it to ``made`` and return it.

    NNCF is not used here: it quantizes only the inputs of layers. onnxruntime has integer kernels
    only for layers whose output is quantized too, and in this network a GELU follows most layers.
    """
    import onnx
    from onnxruntime import quantization

    model = onnx.load(path)
    layers = [node.name for node in model.graph.node if node.op_type in ONNX_LAYERS]
    # Avoids a warning that preprocessing is missing: shapes are known and norms are folded.
    onnx.helper.set_model_props(model, {'onnx.quant.pre_process': 'onnxruntime.quant'})
    inputs = map(read_input, ProgressBar(index, '  ranges'))
    quantization.quantize_static(
        model,
        made,
        SimpleNamespace(get_next=partial(next, inputs, None)),
        nodes_to_quantize=[name for name in layers if name not in kept],
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        per_channel=True,
        # On processors without VNNI, sums of 8-bit products overflow 16 bits.
        reduce_range=True,
    )
    return onnx.load(made)


def run_nncf(path: Path, index: list[int], read_input: ReadInput, kept: list[str]) -> Any:
    """Return a quantized copy of an OpenVINO file, except for the layers ``kept``."""
    nncf = import_nncf()
    import openvino
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    model = openvino.Core().read_model(path)
    network = network_of(model).difference(kept)
    names = [operator.get_friendly_name() for operator in model.get_ordered_ops()]
    ignored = [name for name in names if name not in network]
    return nncf.quantize(
        model,
        nncf.Dataset(index, read_input),
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER,
        target_device=nncf.TargetDevice.CPU,
        subset_size=len(index),
        ignored_scope=nncf.IgnoredScope(names=ignored, validate=False),
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX
        ),
    )


def network_of(model: Any) -> set[str]:
    """Return the operators of an OpenVINO model that compute features, from the image to the last
    of the layers.

    Anchors, box decoding, suppression, RoIAlign's boxes, the tables of position bias, talking
    heads, matrix decompositions and everything after the network are excluded.
    """
    operators = {each.get_friendly_name(): each for each in model.get_ordered_ops()}
    types = {name: each.get_type_name() for name, each in operators.items()}
    inputs: dict[str, list[str]] = {}
    outputs: dict[str, list[str]] = {name: [] for name in types}
    for name, operator in operators.items():
        if types[name] == 'ShapeOf':
            continue
        sources = [value.get_node().get_friendly_name() for value in operator.input_values()]
        inputs[name] = sources if types[name] in JOINING else sources[:1]
        for source in inputs[name]:
            outputs[source].append(name)
    of_image = reachable([name for name in types if types[name] == 'Parameter'], outputs)
    # If features are divided by features, as in a matrix decomposition, rounding errors grow: all
    # operators around stay in float, up to the next convolutions.
    around = {
        name: [*outputs[name], *inputs.get(name, [])]
        for name in types
        if types[name] == 'MatMul' or types[name] not in OPENVINO_LAYERS
    }
    quotients = [
        name
        for name, sources in inputs.items()
        if types[name] == 'Divide' and len(sources) > 1 and of_image.issuperset(sources)
    ]
    decomposition = reachable(quotients, around).intersection(around)
    layers = {name for name in of_image if types[name] in OPENVINO_LAYERS} - decomposition
    # Talking heads, weights times scores, are not faster in int8 but cost most accuracy: in Mask
    # R-CNN s2 on the demo's shapes 0.9 points of box AP.
    talking_heads = {name for name in layers if inputs[name][0] not in of_image}
    layers -= talking_heads
    # RoIAlign's output on a pyramid level without proposals has no range.
    rois = [name for name in types if types[name] == 'ROIAlign']
    up_to_layers = {name: after for name, after in outputs.items() if name not in layers}
    pooled = reachable(rois, up_to_layers) - layers
    return (of_image & reachable(layers, inputs)) - decomposition - pooled - talking_heads


def by_added_error(before: Path, after: Path, inputs: Iterable[dict[str, np.ndarray]]) -> list[str]:
    """Return the layers of a float file, sorted by how much each adds to the int8 file's relative
    error (the error of its output minus that of its input), largest first.

    Layers of a second stage cannot be compared, since proposals differ between two files. Those
    that find its boxes come first, since AP depends most on them, and those of masks are left out.
    """
    layers = layers_of(before)
    boxes = [name for name in layers if 'roi_head.bbox_head' in name]
    layers = {name: tensors for name, tensors in layers.items() if 'roi_head' not in name}
    tensors = list({tensor for ends in layers.values() for tensor in ends})
    runs = [open_at(path, tensors) for path in (before, after)]
    errors = dict.fromkeys(tensors, 0.0)
    for each in inputs:
        for tensor, expected, found in zip(tensors, *(run(each) for run in runs), strict=True):
            if expected.shape == found.shape:
                power = max(float(np.square(expected).mean()), 1e-12)
                errors[tensor] += float(np.square(found - expected).mean()) / power
    added = {name: errors[result] - errors[features] for name, (features, result) in layers.items()}
    return boxes + sorted(added, key=added.get, reverse=True)


def layers_of(path: Path) -> dict[str, tuple[Any, Any]]:
    """Return the tensors that each layer of a float file reads and writes, by the layer's name."""
    if path.suffix == '.onnx':
        import onnx

        nodes = [node for node in onnx.load(path).graph.node if node.op_type in ONNX_LAYERS]
        ends = {node.name: (node.input[0], node.output[0]) for node in nodes}
    else:
        import openvino

        model = openvino.Core().read_model(path)
        network, ends = network_of(model), {}
        for operator in model.get_ordered_ops():
            name = operator.get_friendly_name()
            if name in network and operator.get_type_name() in OPENVINO_LAYERS:
                inputs = operator.input_values()
                features = next(i for i in inputs if i.get_node().get_type_name() != 'Constant')
                source = features.get_node().get_friendly_name(), features.get_index()
                ends[name] = source, (name, 0)
    return ends


def open_at(path: Path, tensors: list[Any]) -> Callable[[dict], list[np.ndarray]]:
    """Return a function that runs a file and returns some of its inner tensors."""
    if path.suffix == '.onnx':
        import onnx
        import onnxruntime

        model = onnx.load(path)
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors)
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), providers=['CPUExecutionProvider']
        )
        return partial(session.run, tensors)
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    model.add_outputs(tensors)
    compiled = core.compile_model(model, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    return lambda inputs: list(compiled(inputs).to_tuple()[-len(tensors) :])


def files_of(path: Path) -> list[Path]:
    """Return the paths of a file and its weights."""
    return [path, path.with_suffix('.bin')] if path.suffix == '.xml' else [path]


def speed_up(before: Path, after: Path, inputs: np.ndarray, seconds: float = 3.0) -> float:
    """Return the time of the first file over that of the second, both run by turns on the CPU."""
    runners = [open_exported(path, 'cpu') for path in (before, after)]
    times: list[list[float]] = [[], []]
    end = time.perf_counter() + seconds
    while len(times[0]) < 6 or time.perf_counter() < end:
        for runner, taken in zip(runners, times, strict=True):
            start = time.perf_counter()
            runner(inputs)
            taken.append(time.perf_counter() - start)
    # The first runs allocate memory.
    first, second = (statistics.median(taken[1:]) for taken in times)
    return first / second
