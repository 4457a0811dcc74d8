"""Exported files, run by what runs their format: onnxruntime, OpenVINO or torch."""

import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from backbones.errors import ConfigError, ExportError, import_optional

from .description import METADATA_KEY, Description
from .quiet import quiet

# Core ML's, the other format that is written, runs on Apple's machines only.
RUNNABLE = ('.onnx', '.xml', '.pt2')

Run = Callable[[np.ndarray], Sequence[np.ndarray]]


@dataclass(frozen=True)
class Runner:
    """A file that tools/export.py wrote, opened: a function of pictures.

    Attributes:
        description: What the file says about itself.
    """

    description: Description
    _run: Run

    def __call__(self, inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Run the file.

        Args:
            inputs: (batch, 3, height, width), float32, BGR, 0 to 255.

        Returns:
            The outputs by name, as ``description.outputs`` has them.

        Raises:
            RuntimeError: It cannot be run, for want of memory perhaps.
        """
        try:
            results = self._run(inputs)
        # Some of these libraries' exceptions are neither public nor derived from RuntimeError.
        except Exception as error:
            raise RuntimeError(' '.join(str(error).split())) from error
        return dict(zip(self.description.outputs, results, strict=True))


def is_exported(path: str | os.PathLike) -> bool:
    """Whether a path is, by its ending, that of a file that tools/export.py writes."""
    return Path(path).suffix in (*RUNNABLE, '.mlpackage')


def open_exported(
    path: str | os.PathLike,
    device: str | None = None,
    threads: int | None = None,
    amp: bool = False,
) -> Runner:
    """Open a file that tools/export.py wrote.

    Args:
        path: Ends in one of ``RUNNABLE``. Reading a .pt2 may run code that is in it.
        device: 'cpu'; for .onnx 'cuda' or 'cuda:1' too, for .xml what OpenVINO calls its devices.
            Default: for .onnx the GPU if onnxruntime can use one, the process's own where torchrun
            started several; else the CPU.
        threads: Of the processor. Default: onnxruntime's and OpenVINO's own choice. A .pt2 always
            runs in torch's (``torch.set_num_threads``).
        amp: Mixed precision, of an .xml only: what OpenVINO chooses by itself, which is bfloat16
            or float16 where the device has it.

    Raises:
        ConfigError: There is no such device, or no mixed precision.
        ExportError: The file is missing, damaged or not one of ours, or what runs it is missing.
    """
    path = Path(path)
    if path.suffix not in RUNNABLE:
        raise ExportError(f'{path} cannot be run here: {", ".join(RUNNABLE)} can be')
    if not path.is_file():
        raise ExportError(f'there is no model {path}')
    if path.suffix == '.xml':
        return open_openvino(path, device, threads, amp)
    if amp:
        raise ConfigError(
            f'{path} runs in the precision that it was exported in; mixed precision (--amp) is '
            'for .xml files, and for config and checkpoint'
        )
    opener = open_onnx if path.suffix == '.onnx' else open_pt2
    return opener(path, device, threads)


def open_onnx(path: Path, device: str | None, threads: int | None) -> Runner:
    """A runner that is onnxruntime's."""
    runtime = import_optional('onnxruntime', str(path))
    options = runtime.SessionOptions()
    # 0 is its own choice.
    options.intra_op_num_threads = threads or 0
    providers = onnx_providers(runtime, device)
    try:
        session = runtime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:
        raise unreadable(path, 'an ONNX model', error) from error
    text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    description = described(path, text)
    names = list(description.outputs)
    return Runner(description, lambda inputs: session.run(names, {'pictures': inputs}))


def onnx_providers(runtime: Any, device: str | None) -> list:
    """The execution providers for a device.

    Raises:
        ConfigError: There is no such device.
    """
    has_gpu = 'CUDAExecutionProvider' in runtime.get_available_providers()
    own_gpu = f'cuda:{os.environ.get("LOCAL_RANK", 0)}'
    kind, _, number = (device or (own_gpu if has_gpu else 'cpu')).partition(':')
    if kind not in ('cpu', 'cuda') or (kind == 'cuda' and not has_gpu):
        raise ConfigError(
            f'device {device!r} cannot be used here: this onnxruntime runs on '
            f'{"cuda and cpu" if has_gpu else "cpu (onnxruntime-gpu runs on cuda)"}'
        )
    gpu = [('CUDAExecutionProvider', {'device_id': int(number or 0)})] if kind == 'cuda' else []
    return [*gpu, 'CPUExecutionProvider']


def open_openvino(path: Path, device: str | None, threads: int | None, amp: bool) -> Runner:
    """A runner that is OpenVINO's."""
    openvino = import_optional('openvino', str(path))
    core = openvino.Core()
    name = (device or 'cpu').upper()
    if name not in core.available_devices:
        raise ConfigError(
            f'device {device!r} cannot be used here: OpenVINO runs on '
            f'{", ".join(core.available_devices).lower()}'
        )
    weights = path.with_suffix('.bin')
    if not weights.is_file():
        raise ExportError(f'{path} needs {weights}, the weights that export.py wrote beside it')
    settings = {'PERFORMANCE_HINT': 'LATENCY'}
    if not amp:
        # Its own choice is bfloat16 where the processor has it.
        settings['INFERENCE_PRECISION_HINT'] = 'f32'
    if threads:
        settings['INFERENCE_NUM_THREADS'] = threads
    try:
        model = core.read_model(str(path))
        has_text = model.has_rt_info([METADATA_KEY])
        text = model.get_rt_info([METADATA_KEY]).astype(str) if has_text else None
        description = described(path, text)
        compiled = core.compile_model(model, name, settings)
    except ExportError:
        raise
    except Exception as error:
        raise unreadable(path, 'an OpenVINO model', error) from error
    return Runner(description, lambda inputs: compiled(inputs).to_tuple())


def open_pt2(path: Path, device: str | None, threads: int | None) -> Runner:
    """A runner that is torch's."""
    import torch

    if device not in (None, 'cpu'):
        raise ConfigError(
            f'device {device!r} cannot be used here: a .pt2 runs on cpu, config and checkpoint '
            'on a GPU'
        )
    try:
        description = described(path, pt2_text(path))
        with quiet('torch.export'):
            module = torch.export.load(str(path)).module()
    except ExportError:
        raise
    except Exception as error:
        raise unreadable(path, 'a model of torch.export', error) from error

    @torch.inference_mode()
    def run(inputs: np.ndarray) -> list[np.ndarray]:
        results = module(torch.from_numpy(inputs))
        results = results if isinstance(results, Sequence) else (results,)
        return [result.numpy() for result in results]

    return Runner(description, run)


def pt2_text(path: Path) -> str | None:
    """The description in a .pt2, found without running what else is in there."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(f'/{METADATA_KEY}.json'):
                return archive.read(name).decode()
    return None


def described(path: Path, text: str | None) -> Description:
    """What a file says about itself.

    Raises:
        ExportError: It says nothing.
    """
    try:
        return Description.from_json(text or '')
    except ValueError as error:
        raise ExportError(
            f'{path} does not say what its inputs and outputs mean: it was not written by '
            'tools/export.py, or is damaged'
        ) from error


def unreadable(path: Path, what: str, error: Exception) -> ExportError:
    """The error for a file that is not what its ending says."""
    reason = ' '.join(str(error).split())
    return ExportError(f'{path} cannot be read as {what}: {reason[:500]}')
