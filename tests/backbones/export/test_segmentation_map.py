"""Segmentation maps without resizing all logits are those of resizing all of them."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from exporting import needs_export

from backbones.export.exportable import segmentation_map


def resized(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(logits, size=size, mode='bilinear').argmax(dim=1)


@pytest.mark.parametrize('smooth', [True, False])
@pytest.mark.parametrize(
    ('shape', 'size', 'steps'),
    [
        ((1, 150, 16, 24), (64, 96), 4),
        # Strides that are rounded up, and down.
        ((2, 19, 33, 41), (130, 163), 4),
        ((1, 30, 23, 23), (95, 95), 5),
        ((2, 9, 20, 11), (160, 81), 8),
        ((1, 2, 3, 3), (95, 96), 32),
        ((1, 5, 7, 9), (7, 9), 1),
        ((1, 5, 1, 1), (4, 3), 4),
    ],
)
def test_equal_to_resizing_all_logits(shape, size, steps, smooth):
    torch.manual_seed(0)
    logits = torch.randn(shape)
    if smooth:
        logits = F.interpolate(torch.randn(*shape[:2], 4, 4), size=shape[2:], mode='bicubic')
    found = segmentation_map(logits, size, steps)
    assert found.shape == (shape[0], *size)
    assert torch.equal(found.long(), resized(logits, size))


def test_of_equal_classes_the_first():
    logits = torch.zeros(1, 3, 4, 5)
    logits[:, 2, 2:] = logits[:, 1, 2:] = 1
    logits[:, :, :, 4] = 0
    found = segmentation_map(logits, (16, 20), 4)
    assert torch.equal(found.long(), resized(logits, (16, 20)))
    assert set(found.unique().tolist()) == {0, 1}


@pytest.fixture(scope='module')
def path(tmp_path_factory) -> Path:
    """The last step as a file, for logits of any size."""
    torch.manual_seed(0)
    sizes = ({2: torch.export.Dim('height', min=2), 3: torch.export.Dim('width', min=2)},)
    program = torch.export.export(
        SegmentationMap(),
        (torch.randn(2, 40, 13, 17),),
        dynamic_shapes=sizes,
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    path = tmp_path_factory.mktemp('map') / 'map.onnx'
    torch.onnx.export(program, dynamo=True, opset_version=18, verbose=False).save(path)
    return path


@needs_export
@pytest.mark.parametrize('runtime', ['onnxruntime', 'openvino', 'openvino in bf16'])
def test_exported(path, runtime):
    """Also where nothing has to be resized, and where everything has."""
    openvino, onnxruntime = pytest.importorskip('openvino'), pytest.importorskip('onnxruntime')
    if runtime == 'onnxruntime':
        session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
        run = lambda x: session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]  # noqa: E731
    else:
        hint = {'INFERENCE_PRECISION_HINT': 'bf16' if 'bf16' in runtime else 'f32'}
        compiled = openvino.compile_model(path, 'CPU', hint)
        run = lambda x: compiled([x.numpy()])[0]  # noqa: E731
    torch.manual_seed(0)
    smooth = F.interpolate(torch.randn(2, 40, 3, 3), size=(160, 170), mode='bicubic')
    for logits in (torch.randn(2, 40, 13, 17), smooth, torch.zeros(2, 40, 9, 12)):
        same = torch.from_numpy(run(logits)) == SegmentationMap()(logits)
        # Of half a million pixels; half precision rounds logits, but not where they are.
        assert same.float().mean() >= (0.99 if 'bf16' in runtime else 0.9999)


class SegmentationMap(torch.nn.Module):
    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return segmentation_map(logits, (4 * logits.shape[2], 4 * logits.shape[3]), 4)
