"""Models as files, run by onnxruntime and OpenVINO."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from backbones.deploy import switch_to_deploy
from backbones.export.export import Options, convert, describe
from backbones.export.exportable import exportable
from backbones.export.formats import packages_for
from backbones.export.runner import open_exported

from .candidates import Candidate
from .work import Setting, make_batch, photograph

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
    is_backbone = setting.part == 'backbone'
    options = Options(
        # Alone, the backbone gets in every backend what the rest of the model would give it.
        size=tuple(make_batch(model, setting)[0].shape[2:]) if is_backbone else setting.size,
        batch=setting.batch,
        backbone_only=is_backbone,
        deploy=setting.deploy,
    )
    description = describe(candidate.load(), model, options, candidate.name, (), None)
    traceable = model.backbone if is_backbone else exportable(model)
    convert(switch_to_deploy(traceable) if setting.deploy else traceable, path, description)
    return path


def open_file(path: Path, setting: Setting) -> Callable[[], Any]:
    """A function that runs a file on a photograph."""
    runner = open_exported(path, setting.device, setting.threads, setting.amp)
    description = runner.description
    picture = photograph(description.size).astype(np.float32)
    if setting.part == 'backbone':
        picture = (picture[:, :, ::-1] - description.mean) / description.std
    inputs = np.stack([picture.transpose(2, 0, 1)] * setting.batch).astype(np.float32)
    return partial(runner, np.ascontiguousarray(inputs))
