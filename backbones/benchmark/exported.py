"""Models as files, run by onnxruntime and OpenVINO."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from backbones.deploy import switch_to_deploy
from backbones.export.errors import need
from backbones.export.export import Options, convert, describe
from backbones.export.exportable import exportable
from backbones.export.formats import packages_for

from .candidates import Candidate
from .work import Setting, photograph

ENDINGS = {'onnxruntime': '.onnx', 'openvino': '.xml'}


def export_file(candidate: Candidate, model: nn.Module, setting: Setting, folder: Path) -> Path:
    """Export a model for one size and batch.

    Args:
        candidate: Where it comes from.
        model: What ``candidate.build()`` returns.
        setting: What is to be done with it.
        folder: Where the file goes.

    Raises:
        ExportError: It cannot be, or a package is missing.
    """
    path = folder / f'{candidate.name}{ENDINGS[setting.backend]}'
    packages_for(path.suffix)
    options = Options(
        size=setting.size,
        batch=setting.batch,
        backbone_only=setting.part == 'backbone',
        deploy=setting.deploy,
    )
    description = describe(candidate.load(), model, options, candidate.name, (), None)
    traceable = exportable(model, backbone_only=options.backbone_only)
    convert(switch_to_deploy(traceable) if setting.deploy else traceable, path, description)
    return path


def open_file(path: Path, setting: Setting) -> Callable[[], Any]:
    """A function that runs a file on a photograph."""
    picture = photograph(setting.size).transpose(2, 0, 1).astype(np.float32)
    inputs = np.stack([picture] * setting.batch)
    if setting.backend == 'openvino':
        openvino = need('openvino', 'running .xml')
        model = openvino.Core().compile_model(
            str(path),
            'CPU',
            {
                'INFERENCE_PRECISION_HINT': 'f32',
                'INFERENCE_NUM_THREADS': setting.threads,
                'PERFORMANCE_HINT': 'LATENCY',
            },
        )
        return lambda: model(inputs)
    runtime = need('onnxruntime', 'running .onnx')
    options = runtime.SessionOptions()
    options.intra_op_num_threads = setting.threads
    wanted = ['CPUExecutionProvider']
    if setting.device.startswith('cuda'):
        number = int(setting.device.partition(':')[2] or 0)
        wanted.insert(0, ('CUDAExecutionProvider', {'device_id': number}))
    session = runtime.InferenceSession(str(path), options, providers=wanted)
    return lambda: session.run(None, {'pictures': inputs})
