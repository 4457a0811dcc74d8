"""Tracing a model and writing it as .onnx, .xml or .mlpackage."""

import logging
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch
from xml.etree import ElementTree

import torch
from torch import nn
from torch.torch_version import TorchVersion

from backbones.efficientformer_v2.fold import JoinedConvs
from backbones.efficientformer_v2.position_bias import RelativePositionBias
from backbones.errors import ExportError, import_optional, in_one_line
from backbones.inference.exported_file import INPUT_NAME, METADATA_KEY, Description

# The formats and the packages that each needs.
FORMATS = {
    '.onnx': ('onnx', 'onnxscript', 'onnxruntime'),
    '.xml': ('onnx', 'onnxscript', 'openvino'),
    '.mlpackage': ('coremltools',),
}
# The first version whose torch.export asserts at runtime what it cannot prove about dynamic sizes.
MIN_TORCH = '2.9'
OPSET = 18
# Upper limits of dynamic sizes for torch.export; nothing is computed from them.
MAX_SIZE = 16384
MAX_BATCH = 1024


def check_packages(suffix: str) -> None:
    """Raise an error if packages that a format needs are missing, before any long work."""
    if TorchVersion(torch.__version__) < MIN_TORCH:
        raise ExportError(
            f'writing {suffix} needs torch {MIN_TORCH} or later, not {torch.__version__}'
        )
    logging.getLogger('coremltools').setLevel(logging.ERROR)
    for package in FORMATS[suffix]:
        import_optional(package, f'writing {suffix}')


def write(model: nn.Module, path: Path, description: Description) -> None:
    """Trace a result of :func:`.exportable.exportable`, folded or not, on the CPU, and write it in
    one of ``FORMATS``. Its joined convolutions are separated.

    Raises ExportError if torch or the format's converter fails.
    """
    if path.suffix == '.mlpackage' and description.task == 'detection':
        raise ExportError(
            'detectors cannot be exported as .mlpackage, since Core ML lacks operators for their '
            'results: use --backbone-only for the backbone, or another format'
        )
    try:
        with warnings.catch_warnings():
            # torch and the converters warn about each other's deprecated functions.
            warnings.simplefilter('ignore')
            program = trace(model, description, constant_biases=path.suffix == '.mlpackage')
            if path.suffix == '.mlpackage':
                write_core_ml(program, path, description)
            elif path.suffix == '.xml':
                onnx_path = path.with_suffix('.onnx')
                write_onnx(program, onnx_path, description)
                onnx_to_openvino(onnx_path, path, description)
                onnx_path.unlink()
            else:
                write_onnx(program, path, description)
    # Each converter has its own exceptions.
    except Exception as error:
        reason = in_one_line(error)
        raise ExportError(
            f'this model cannot be written as {path.suffix}: {type(error).__name__}: {reason}'
        ) from error


def trace(
    model: nn.Module, description: Description, constant_biases: bool
) -> torch.export.ExportedProgram:
    """Trace a model for images of the description's size and batch.

    ``constant_biases`` is for formats that cannot resize the tables of relative position bias.
    """
    for module in model.modules():
        if isinstance(module, JoinedConvs):
            # In OpenVINO, splitting a joined result is slower than several convolutions.
            module.separate()
    batch, min_size = description.batch, description.min_size
    # With Dims, a dynamic size that becomes constant is an error.
    limits = {'batch': dict(max=MAX_BATCH)}
    limits['height'] = limits['width'] = dict(min=min_size, max=MAX_SIZE)
    dims = {
        axis: torch.export.Dim(name, **limits[name])
        for axis, name in open_axes(description).items()
    }
    # Small or equal sizes in the example would be taken for constants by torch.
    height, width = description.size or (2 * min_size + 61, 2 * min_size + 93)
    example = torch.zeros(batch or 3, 3, height, width)
    biases = biases_as_constants(model, example) if constant_biases else nullcontext()
    with torch.no_grad(), biases:
        return torch.export.export(
            model,
            (example,),
            dynamic_shapes=(dims,),
            # Conditions that torch cannot prove for all sizes become assertions.
            prefer_deferred_runtime_asserts_over_guards=True,
        )


def open_axes(description: Description) -> dict[int, str]:
    """Return the names of the input's axes with dynamic sizes."""
    batch = {0: 'batch'} if description.batch is None else {}
    return batch | ({2: 'height', 3: 'width'} if description.size is None else {})


@contextmanager
def biases_as_constants(model: nn.Module, example: torch.Tensor) -> Iterator[None]:
    """Replace the relative position biases by those for the example's size, as constants."""
    model(example)
    constants = {
        module: module._cache.kept[1].contiguous()
        for module in model.modules()
        if isinstance(module, RelativePositionBias)
    }
    with patch.object(RelativePositionBias, 'forward', lambda module, *args: constants[module]):
        yield


def write_onnx(program: torch.export.ExportedProgram, path: Path, description: Description) -> None:
    """Write one .onnx file with its weights inside, for opset 18."""
    from .ops import onnx_translations

    axes = open_axes(description)
    logging.getLogger('torch.onnx').setLevel(logging.ERROR)
    exported = torch.onnx.export(
        program,
        input_names=[INPUT_NAME],
        output_names=list(description.outputs),
        opset_version=OPSET,
        custom_translation_table=onnx_translations(),
        dynamic_shapes=(axes,) if axes else None,
        external_data=False,
        dynamo=True,
        verbose=False,
    )
    names: Counter[str] = Counter()
    for node in exported.model.graph.all_nodes():
        # Metadata and docs have file names and source lines of this machine.
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.inputs[1:]:
            # Layers are named like the model's modules.
            if value is not None and (value.name or '').endswith('.weight'):
                node.name = value.name.removesuffix('.weight')
                names[node.name] += 1
                if names[node.name] > 1:
                    node.name += f'#{names[node.name]}'
    save(exported.model_proto, path, description)


def onnx_to_openvino(onnx_path: Path, path: Path, description: Description) -> None:
    """Convert an ONNX file to OpenVINO's .xml and .bin, in float32."""
    import openvino

    save(openvino.convert_model(str(onnx_path)), path, description)


def save(model: Any, path: Path, description: Description) -> None:
    """Write an openvino.Model as .xml and .bin, or an onnx.ModelProto, with its metadata."""
    if path.suffix == '.xml':
        import openvino

        model.set_rt_info(description.to_json(), [METADATA_KEY])
        openvino.save_model(model, str(path), compress_to_fp16=False)
        keep_boxes_precise(model, path)
    else:
        import onnx

        onnx.helper.set_model_props(model, {METADATA_KEY: description.to_json()})
        onnx.save_model(model, str(path))


def keep_boxes_precise(model: Any, path: Path) -> None:
    """Mark in a saved .xml what computes RoIAlign's boxes from the layers before: OpenVINO then
    uses float32 there, also in mixed precision. Coordinates above 512 pixels would be multiples of
    4 in bfloat16.
    """
    operators = {each.get_friendly_name(): each for each in model.get_ordered_ops()}
    sources = {
        name: [value.get_node().get_friendly_name() for value in each.input_values()]
        for name, each in operators.items()
    }
    types = {name: each.get_type_name() for name, each in operators.items()}
    boxes = [sources[name][1] for name in types if types[name] == 'ROIAlign']
    layers = {name for name in types if types[name] in ('Convolution', 'MatMul')}
    names = reachable(boxes, sources | {key: () for key in layers}) - layers
    if not names:
        return
    # Python's openvino cannot set this attribute.
    tree = ElementTree.parse(path)
    for layer in tree.iterfind('layers/layer'):
        if layer.get('name') in names:
            info = layer.find('rt_info')
            info = ElementTree.SubElement(layer, 'rt_info') if info is None else info
            ElementTree.SubElement(info, 'attribute', name='precise', version='0')
    tree.write(path, encoding='utf-8', xml_declaration=True)


def reachable(starts: Iterable[str], following: Mapping[str, Iterable[str]]) -> set[str]:
    """Return all names that can be reached, including the starts."""
    waiting, seen = list(starts), set()
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += following.get(name, [])
    return seen


def write_core_ml(
    program: torch.export.ExportedProgram, path: Path, description: Description
) -> None:
    """Write a Core ML package (ML program, float16), which accepts images of iOS and macOS."""
    import coremltools as tools

    shape = (description.batch, 3, *description.size)
    # An image input holds one image.
    if description.batch == 1:
        images = tools.ImageType(INPUT_NAME, shape=shape, color_layout=tools.colorlayout.BGR)
    else:
        images = tools.TensorType(INPUT_NAME, shape=shape)
    # Hide the progress bars of its passes.
    with redirect_stderr(StringIO()):
        model = tools.convert(
            program.run_decompositions({}),
            inputs=[images],
            outputs=[tools.TensorType(name) for name in description.outputs],
            minimum_deployment_target=tools.target.iOS15,
        )
    model.user_defined_metadata[METADATA_KEY] = description.to_json()
    model.save(str(path))
