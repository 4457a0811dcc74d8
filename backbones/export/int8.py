"""Int8: convolutions and matrix products of an exported file as 8-bit integers, without training.

NNCF for OpenVINO and onnxruntime's own tool for ONNX quantize the network by the ranges of its
activations on training images. The metric of the file is measured before and after; where it drops
too much, the layers that add most of the error become float again.
"""

import copy
import logging
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from mmengine.config import Config
from tqdm import tqdm

from backbones.data.config_datasets import build_images, datasets_of
from backbones.data.skip_bad import guard
from backbones.engine.metrics import is_number
from backbones.errors import ExportError, import_optional
from backbones.inference.exported_file import INPUT_NAME, METADATA_KEY, Description, open_exported

from .evaluate import check_exported_test, measure, use_exported

# Operators by ONNX's and OpenVINO's names. Those that are quantized:
LAYERS = {
    *('Conv', 'ConvTranspose', 'MatMul', 'Gemm', 'Convolution', 'GroupConvolution'),
    *('ConvolutionBackpropData', 'GroupConvolutionBackpropData'),
}
# All inputs of these carry features. Of others the first alone does: the rest are sizes, indices or
# boxes.
JOINING = {'MatMul', 'Concat', 'Add', 'Sub', 'Subtract', 'Mul', 'Multiply', 'Div', 'Divide'}
SHAPES = {'Shape', 'ShapeOf'}
ROI_ALIGN = {'RoiAlign', 'ROIAlign'}
QUOTIENTS = {'Div', 'Divide'}
# Shares of the layers that stay float, tried one after another until the metric is as wanted.
SHARES = (0, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
# Images on which layers of float and int8 are compared.
COMPARED = 8
# What is compared where a metric has several figures.
MAIN_METRICS = ('mIoU', 'bbox_mAP', 'segm_mAP')


def quantize(
    path: Path,
    config: Config,
    description: Description,
    calibration_images: int,
    max_drop: float,
    report: Callable[[str], None],
) -> Description:
    """Put an int8 file in the place of a float one, if its metric is nearly the same.

    Args:
        path: The float file, .onnx or .xml.
        config: What it was exported with; changed in place.
        description: The metadata of the file.
        calibration_images: How many training images ranges are taken from.
        max_drop: By how many points, hundredths of mIoU or AP, the metric may drop on the
            validation set.
        report: Called with a line for each step.

    Returns:
        The metadata of the int8 file, whose ``int8`` says what was measured.

    Raises:
        ExportError: The metric drops by more even where half of the layers stay float.
        ConfigError: NNCF is missing, or the config does not fit the file or its data.
        DataError: The data have errors.
    """
    nncf = import_nncf()
    if config.get('val_dataloader') and config.get('val_evaluator'):
        config.test_dataloader, config.test_evaluator = config.val_dataloader, config.val_evaluator
    use_exported(config, path)
    check_exported_test(config)
    batches = CalibrationBatches(config, description, calibration_images)
    before = points(measure(config, path, '  float: batch'))
    float_model = read_model(path)
    network = Network(float_model)
    with TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        order, first = [], None
        for share in SHARES:
            if share and not order:
                order = network.by_error(float_model, first, batches)
            kept = order[: math.ceil(share * len(order))]
            report(f'  calibrating on {len(batches)} images, {len(kept)} layers in float ...')
            if path.suffix == '.onnx':
                layers = [name for name in network.layers if name not in kept]
                # Products of activations, those of attention, gain nothing there.
                layers = [name for name in layers if network.types[name] != 'MatMul']
                model = run_onnxruntime(float_model, batches, layers)
            else:
                model = run_nncf(nncf, float_model, batches, [*network.outside, *kept])
            first = first or model
            write_model(model, made, description)
            after = points(measure(config, made, '  int8: batch'))
            drop = round(max(before[name] - after[name] for name in before), 2)
            figures = ', '.join(
                f'{name} {before[name]:.2f} -> {after[name]:.2f}' for name in before
            )
            report(f'  {figures}: a drop of {drop:.2f} points')
            if drop <= max_drop:
                break
        else:
            raise ExportError(
                f'int8 makes {figures}, a drop of {drop:.2f} points where {max_drop:g} are allowed '
                f'(--max-drop), even with {len(kept)} of {len(order)} layers in float'
            )
        sizes = [sum(one.stat().st_size for one in files_of(each)) for each in (path, made)]
        measured = {
            'metrics': {name: [before[name], after[name]] for name in before},
            'drop': drop,
            'float_layers': [name.removesuffix('/WithoutBiases') for name in kept],
            'calibration_images': len(batches),
            'speed_up': round(speed_up(path, made, batches[0][INPUT_NAME]), 2),
        }
        description = replace(description, int8=measured)
        write_model(model, made, description)
        for file in files_of(made):
            file.replace(path.with_suffix(file.suffix))
    report(
        f'int8: drop {drop:.2f}, {sizes[0] / 2**20:.1f} -> {sizes[1] / 2**20:.1f} MiB, '
        f'{measured["speed_up"]} times as fast, layers in float: '
        f'{", ".join(measured["float_layers"]) or "none"}'
    )
    return description


def import_nncf() -> ModuleType:
    """NNCF, without telling its makers that it is used."""
    os.environ.setdefault('NNCF_CI', '1')
    nncf = import_optional('nncf', '--int8', 'int8')
    nncf.set_log_level(logging.ERROR)
    return nncf


def points(metrics: dict[str, Any]) -> dict[str, float]:
    """The main figures among metrics, in hundredths."""
    named = [name for name in metrics if name.rpartition('/')[2] in MAIN_METRICS]
    named = named or [name for name, value in metrics.items() if is_number(value)][:1]
    # mmdet's are from 0 to 1, mmseg's from 0 to 100.
    return {
        name: round(float(metrics[name]) * (100 if name.endswith('mAP') else 1), 2)
        for name in named
    }


def run_onnxruntime(model: Any, batches: Sequence, layers: list[str]) -> Any:
    """A quantized copy of an ONNX model, of which these layers read and write 8-bit integers.

    NNCF quantizes what a layer reads. onnxruntime has integer kernels for those alone whose result
    is quantized too, and in this network most are followed by a GELU.
    """
    onnx = import_optional('onnx', '--int8')
    tool = import_optional('onnxruntime.quantization', '--int8')
    model = copy.deepcopy(model)
    # What it would remark the lack of: shapes are known, and norms are folded.
    onnx.helper.set_model_props(model, {'onnx.quant.pre_process': 'onnxruntime.quant'})
    with TemporaryDirectory() as folder:
        path = Path(folder, 'int8.onnx')
        tool.quantize_static(
            model,
            path,
            SimpleNamespace(
                get_next=partial(next, iter(tqdm(batches, '  ranges', mininterval=1)), None)
            ),
            nodes_to_quantize=layers,
            activation_type=tool.QuantType.QUInt8,
            weight_type=tool.QuantType.QInt8,
            per_channel=True,
            # Sums of products of 8 bits overflow in the 16 bits of processors without VNNI.
            reduce_range=True,
        )
        return onnx.load(path)


def run_nncf(nncf: ModuleType, model: Any, batches: Sequence, ignored: list[str]) -> Any:
    """A quantized copy of an OpenVINO model; ``ignored`` are operators that stay as they are."""
    ranges = import_optional('nncf.quantization.range_estimator', '--int8', 'int8')
    return nncf.quantize(
        model,
        nncf.Dataset(batches),
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER,
        target_device=nncf.TargetDevice.CPU,
        subset_size=len(batches),
        ignored_scope=nncf.IgnoredScope(names=ignored, validate=False),
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            activations_range_estimator_params=ranges.RangeEstimatorParametersSet.MINMAX
        ),
    )


class CalibrationBatches(Sequence):
    """Training images as inputs of a file, spread over the set; each is read when it is asked for.

    Args:
        config: A config whose classes are set.
        description: Of the file: how images are resized.
        number: Of images; all where there are fewer.
    """

    def __init__(self, config: Config, description: Description, number: int) -> None:
        self.dataset = build_images(next(datasets_of(config, ('train',))))
        guard(self.dataset)
        number = min(number, len(self.dataset))
        self.index = np.linspace(0, len(self.dataset) - 1, number).round().astype(int).tolist()
        self.description = description

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        image = self.description.fit(self.dataset[self.index[number]]['img'])[0]
        return {INPUT_NAME: np.stack([image] * (self.description.batch or 1))}


class Network:
    """What of a file is quantized, from its graph.

    The network is what lies between the image and the last of the layers, along inputs that carry
    features. Anchors, box decoding, suppression, RoIAlign's boxes, the tables of position biases,
    matrix decompositions and what comes after the network are outside of it.

    Attributes:
        layers: Each convolution and matrix product, with those whose results reach it first.
        outside: The other operators of the file that are not to be quantized.
        behind_rois: Layers whose inputs depend on the proposals, which differ between two files.
    """

    def __init__(self, model: Any) -> None:
        from nncf.common.factory import build_graph

        graph = build_graph(model)
        self.types = {node.node_name: node.node_type for node in graph.get_all_nodes()}
        self.inputs = {
            node.node_name: [
                edge.from_node.node_name
                for edge in graph.get_input_edges(node)
                if edge.input_port_id == 0 or node.node_type in JOINING
            ]
            for node in graph.get_all_nodes()
            if node.node_type not in SHAPES
        }
        outputs: dict[str, list[str]] = {name: [] for name in self.types}
        for name, sources in self.inputs.items():
            for source in sources:
                outputs[source].append(name)
        images = [node.node_name for node in graph.get_input_nodes()]
        of_images = reachable(images, outputs)
        # Where features are divided by features, as in a matrix decomposition, rounding errors
        # grow: float are all operators around, up to the next convolutions.
        around = {
            name: [*outputs[name], *self.inputs.get(name, [])]
            for name, kind in self.types.items()
            if kind not in LAYERS - {'MatMul'}
        }
        quotients = [
            name
            for name, sources in self.inputs.items()
            if self.types[name] in QUOTIENTS and len(sources) > 1 and of_images.issuperset(sources)
        ]
        decomposition = reachable(quotients, around) & set(around)
        layers = {name for name in of_images if self.types[name] in LAYERS} - decomposition
        network = (of_images & reachable(layers, self.inputs)) - decomposition
        rois = [name for name, kind in self.types.items() if kind in ROI_ALIGN]
        self.behind_rois = reachable(rois, outputs)
        # A level of the pyramid without a proposal has no range of its own.
        pooled = reachable(rois, without(layers, outputs)) - layers
        self.outside = [name for name in self.types if name not in network - pooled]
        before = without(layers, self.inputs)
        self.layers = {
            name: reachable(self.inputs[name], before) & layers for name in sorted(layers)
        }

    def by_error(self, before: Any, after: Any, batches: Sequence) -> list[str]:
        """The layers, those first that add most to the relative error of the int8 model."""
        names = list(self.layers)
        runs = [run_layers(model, names) for model in (before, after)]
        errors = np.zeros(len(names))
        for number in range(min(COMPARED, len(batches))):
            for index, pair in enumerate(zip(*(run(batches[number]) for run in runs), strict=True)):
                expected, found = pair
                if expected.shape == found.shape:
                    power = max(float(np.square(expected).mean()), 1e-12)
                    errors[index] += float(np.square(found - expected).mean()) / power
        of_layer = dict(zip(names, errors, strict=True))

        def rank(name: str) -> tuple[bool, float]:
            inherited = max((of_layer[each] for each in self.layers[name]), default=0.0)
            return name in self.behind_rois, inherited - of_layer[name]

        return sorted(names, key=rank)


def reachable(starts: Iterable[str], following: dict[str, list[str]]) -> set[str]:
    """All names that can be reached, the first ones included."""
    waiting, seen = list(starts), set()
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += following.get(name, [])
    return seen


def without(names: set[str], following: dict[str, list[str]]) -> dict[str, list[str]]:
    """``following``, but that nothing follows on these names."""
    return {name: after for name, after in following.items() if name not in names}


def files_of(path: Path) -> list[Path]:
    """A file with its weights."""
    return [path, path.with_suffix('.bin')] if path.suffix == '.xml' else [path]


def read_model(path: Path) -> Any:
    """An openvino.Model or an onnx.ModelProto."""
    if path.suffix == '.xml':
        return import_optional('openvino', '--int8').Core().read_model(str(path))
    return import_optional('onnx', '--int8').load(str(path))


def write_model(model: Any, path: Path, description: Description) -> None:
    """Write what :func:`read_model` returns, with its metadata."""
    if path.suffix == '.xml':
        model.set_rt_info(description.to_json(), [METADATA_KEY])
        openvino = import_optional('openvino', '--int8')
        openvino.save_model(model, str(path), compress_to_fp16=False)
        return
    onnx = import_optional('onnx', '--int8')
    onnx.helper.set_model_props(model, {METADATA_KEY: description.to_json()})
    onnx.save_model(model, str(path))


def run_layers(model: Any, names: list[str]) -> Callable[[dict], list[np.ndarray]]:
    """A function of an input that returns the results of layers."""
    if not hasattr(model, 'graph'):
        openvino = import_optional('openvino', '--int8')
        model = model.clone()
        model.add_outputs([(name, 0) for name in names])
        settings = {'INFERENCE_PRECISION_HINT': 'f32'}
        compiled = openvino.Core().compile_model(model, 'CPU', settings)
        return lambda inputs: list(compiled(inputs).to_tuple()[-len(names) :])
    onnx = import_optional('onnx', '--int8')
    runtime = import_optional('onnxruntime', '--int8')
    of_node = {node.name: node.output[0] for node in model.graph.node}
    tensors = [of_node[name] for name in names]
    model = copy.deepcopy(model)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors)
    providers = ['CPUExecutionProvider']
    session = runtime.InferenceSession(model.SerializeToString(), providers=providers)
    return lambda inputs: session.run(tensors, inputs)


def speed_up(before: Path, after: Path, inputs: np.ndarray, seconds: float = 3.0) -> float:
    """How many times as fast the second file is, both run by turns on the CPU."""
    runners = [open_exported(path, 'cpu') for path in (before, after)]
    times: list[list[float]] = [[], []]
    end = time.perf_counter() + seconds
    while len(times[0]) < 6 or time.perf_counter() < end:
        for runner, taken in zip(runners, times, strict=True):
            start = time.perf_counter()
            runner(inputs)
            taken.append(time.perf_counter() - start)
    # The first ones prepare memory.
    first, second = (statistics.median(taken[1:]) for taken in times)
    return first / second
