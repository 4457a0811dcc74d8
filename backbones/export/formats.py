"""Writing a traced model in one of four formats."""

import re
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import torch
from torch.export import ExportedProgram
from torch.torch_version import TorchVersion

from backbones.errors import ExportError, import_optional

from .description import METADATA_KEY, Description
from .quiet import quiet

ENDINGS = ('.onnx', '.pt2', '.xml', '.mlpackage')
# The first whose torch.export.export takes assertions for what it cannot prove of open sizes.
LEAST_TORCH = '2.9'
OPSET = 18
# A protobuf message, which an .onnx file is, can be no larger.
LARGEST_ONNX = 2**31 - 1


def write(program: ExportedProgram, path: Path, description: Description) -> None:
    """Write a traced model in the format that the ending of ``path`` says.

    Args:
        program: What :func:`.tracing.trace` returns.
        path: Ends in one of ``ENDINGS``; an .xml gets a .bin beside it.
        description: Goes into the file's metadata.

    Raises:
        ExportError: A package is missing, or the model is too large for the format.
    """
    writers = dict(
        zip(ENDINGS, (write_onnx, write_pt2, write_openvino, write_core_ml), strict=True)
    )
    writers[path.suffix](program, path, description)


def packages_for(ending: str) -> None:
    """Import what a format needs, before work that takes long is done.

    Raises:
        ExportError: A package is missing, or torch is too old.
    """
    if TorchVersion(torch.__version__) < LEAST_TORCH:
        raise ExportError(
            f'writing {ending} needs torch {LEAST_TORCH} or later, this is {torch.__version__}'
        )
    wanted = {
        '.onnx': ('onnx', 'onnxscript', 'onnxruntime'),
        '.pt2': (),
        '.xml': ('onnx', 'onnxscript', 'openvino'),
        '.mlpackage': ('coremltools',),
    }
    with quiet('coremltools'):
        for package in wanted[ending]:
            import_optional(package, f'writing {ending}')


# ------------------------------------------------------------------------------------------------
# ONNX
# ------------------------------------------------------------------------------------------------


def write_onnx(program: ExportedProgram, path: Path, description: Description) -> None:
    """One .onnx file, weights inside, for opset 18."""
    import onnx

    from .ops import onnx_translations

    with quiet('torch.onnx'):
        exported = torch.onnx.export(
            program,
            input_names=['pictures'],
            output_names=list(description.outputs),
            opset_version=OPSET,
            custom_translation_table=onnx_translations(),
            external_data=False,
            dynamo=True,
            verbose=False,
        )
    for node in exported.model.graph.all_nodes():
        # Where in whose source code it comes from.
        node.metadata_props.clear()
        node.doc_string = None
    model = exported.model_proto
    name_sizes(model.graph)
    onnx.helper.set_model_props(model, {METADATA_KEY: description.to_json()})
    size = model.ByteSize()
    if size > LARGEST_ONNX:
        raise ExportError(f'an .onnx file holds 2 GB, the model has {size / 1e9:.1f}: use .pt2')
    onnx.save_model(model, str(path))


def name_sizes(graph: object) -> None:
    """Call open sizes batch, height, width and detections, which torch calls s77 and u0."""
    axes = ('batch', '', 'height', 'width')
    names = {}
    for axis, size in zip(axes, graph.input[0].type.tensor_type.shape.dim, strict=True):
        if size.dim_param:
            names[size.dim_param] = axis
    for value in (*graph.input, *graph.output, *graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = re.sub(
                    r'\b[su]\d+\b',
                    lambda match: names.setdefault(match[0], 'detections'),
                    size.dim_param,
                )


# ------------------------------------------------------------------------------------------------
# torch.export
# ------------------------------------------------------------------------------------------------


def write_pt2(program: ExportedProgram, path: Path, description: Description) -> None:
    """A .pt2, which ``torch.export.load`` reads after ``import backbones.export.ops``."""
    extra = {f'{METADATA_KEY}.json': description.to_json()}
    torch.export.save(program, str(path), extra_files=extra)


# ------------------------------------------------------------------------------------------------
# OpenVINO
# ------------------------------------------------------------------------------------------------


def write_openvino(program: ExportedProgram, path: Path, description: Description) -> None:
    """OpenVINO's .xml and .bin in float32, by way of ONNX, whose two operators it knows."""
    openvino = import_optional('openvino', 'writing .xml')
    onnx_path = path.with_suffix('.onnx')
    try:
        write_onnx(program, onnx_path, description)
        model = openvino.convert_model(str(onnx_path))
        model.set_rt_info(description.to_json(), [METADATA_KEY])
        openvino.save_model(model, str(path), compress_to_fp16=False)
        # It maps the weights from the file that is about to go.
        del model
    finally:
        onnx_path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------
# Core ML
# ------------------------------------------------------------------------------------------------


def write_core_ml(program: ExportedProgram, path: Path, description: Description) -> None:
    """A Core ML package (ML program, float16), which takes a picture as iOS and macOS have it."""
    tools = import_optional('coremltools', 'writing .mlpackage')
    shape = (description.batch, 3, *description.size)
    # An image input holds one picture.
    if description.batch == 1:
        pictures = tools.ImageType('pictures', shape=shape, color_layout=tools.colorlayout.BGR)
    else:
        pictures = tools.TensorType('pictures', shape=shape)
    # Progress bars of its passes.
    with quiet('coremltools'), redirect_stderr(StringIO()):
        model = tools.convert(
            program.run_decompositions({}),
            inputs=[pictures],
            outputs=[tools.TensorType(name) for name in description.outputs],
            minimum_deployment_target=tools.target.iOS15,
        )
    model.user_defined_metadata[METADATA_KEY] = description.to_json()
    model.short_description = f'{description.model}: {description.task}'
    for name, meaning in description.outputs.items():
        model.output_description[name] = meaning
    model.save(str(path))
