"""Predictions from Python, for whatever can be given as a picture."""

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from sys import stdin
from typing import Any

import numpy as np

from backbones.errors import CheckpointError, ConfigError, InputError
from backbones.export.runner import is_exported
from backbones.weights import are_checkpoints_trusted

from .drawing import Artist
from .frame import Frame, Predicted
from .inputs import Input, list_inputs
from .palette import choose_palette
from .pipeline import Model, Pipeline
from .prediction import Detections, Segmentation
from .reading import Clip, Closed, Opened, read_inputs
from .selection import SelectingModel, class_indices
from .torch_model import TorchModel

Given = str | os.PathLike | np.ndarray


@dataclass(frozen=True)
class Result:
    """A picture and what the model says about it.

    Attributes:
        source: Where it comes from: a path, an address, or 'array 3' for the fourth array.
        picture: (height, width, 3), uint8, BGR.
        prediction: What the model says.
        frame: Which frame of a video it is, from 0; 0 for a picture.
        time: When that is shown, in seconds; None for a picture.
    """

    source: str
    picture: np.ndarray
    prediction: Detections | Segmentation
    frame: int
    time: float | None
    _artist: Artist

    def draw(self) -> np.ndarray:
        """The picture with the prediction drawn over it, BGR.

        A segmentation's legend is in a band below the picture, so the drawing is higher.
        """
        if isinstance(self.prediction, Segmentation):
            return self._artist.draw_segmentation(self.picture, self.prediction)
        return self._artist.draw_detections(self.picture, self.prediction)


class Inferencer:
    """A detector or segmentor that takes pictures, videos, folders, cameras and arrays.

    ::

        inferencer = Inferencer('seg_configs/fpn_effv2_s2.py', 'fpn_s2.pth')
        for result in inferencer(['street.jpg', 'drive.mp4']):
            print(result.source, result.frame, result.prediction)
            cv2.imwrite('drawn.png', result.draw())

    Args:
        config: Path of a config, or of a file that ``tools/export.py`` wrote: an .onnx, .xml or
            .pt2.
        checkpoint: Path or address of a checkpoint of the whole model; none for an exported file.
        device: For instance 'cuda:1'. Default: the first GPU, else the CPU; for an exported file
            see :func:`backbones.export.runner.open_exported`.
        batch_size: Pictures that go through the model at once. Changes no result.
        amp: Mixed precision, see :func:`backbones.engine.amp.inference_precision`; of exported
            files for an .xml only.
        deploy: Fold what only training needs, which is faster and changes results by rounding
            only.
        score_thr: Detections below this score are left out.
        classes: Names of the classes to keep. Default: all.
        palette: What :func:`backbones.inference.palette.choose_palette` takes. Default: the
            model's own.
        cfg_options: Overrides for the config, by dotted key.

    Attributes:
        classes: The model's class names; labels are indices into it.
        palette: (R, G, B) of each class.

    Raises:
        ConfigError: The config cannot be read or does not fit, or there is no such class.
        ExportError: The exported file cannot be run, or was not written by our tool.
        CheckpointError: The checkpoint cannot be read or lacks part of the model, or an exported
            file may run code and :func:`backbones.trust_checkpoints` was not called.
    """

    def __init__(
        self,
        config: str | os.PathLike,
        checkpoint: str | os.PathLike | None = None,
        *,
        device: str | None = None,
        batch_size: int = 1,
        amp: bool = False,
        deploy: bool = True,
        score_thr: float = 0.3,
        classes: Sequence[str] | None = None,
        palette: str | None = None,
        cfg_options: dict[str, Any] | None = None,
    ) -> None:
        if is_exported(config):
            model = load_exported(str(config), device, amp, not deploy or bool(cfg_options))
        else:
            model = TorchModel(str(config), str(checkpoint), device, amp, deploy, cfg_options)
        self.classes = model.classes
        self.palette = choose_palette(palette, model.classes, model.palette)
        kept = class_indices(classes, model.classes)
        self.model = SelectingModel(model, score_thr, kept)
        self.batch_size = batch_size
        self._artist = Artist(self.classes, self.palette)

    def __call__(
        self, inputs: Given | Iterable[Given], clip: Clip | None = None
    ) -> Iterator[Result]:
        """Predict, while what comes next is read and what came before is taken.

        Args:
            inputs: One or many of: the path of a picture, a video or a folder, a pattern, an
                address, 'webcam:0', or an array (height, width, 3), uint8, BGR. May be endless.
            clip: Which part of videos is taken. Default: all.

        Yields:
            A result for each picture and each frame of a video, in order.

        Raises:
            InputError: An input cannot be read. What came before it has been given.
        """
        if isinstance(inputs, str | os.PathLike | np.ndarray):
            inputs = [inputs]
        stop = threading.Event()
        pipeline = Pipeline(self.model, self.batch_size)
        frames = chain.from_iterable(
            read_input(given, number, clip or Clip(), stop) for number, given in enumerate(inputs)
        )
        try:
            for item in pipeline.run(frames, lambda predicted: predicted):
                if isinstance(item, Closed) and item.problem:
                    raise InputError(f'{item.input.shown} {item.problem}')
                if isinstance(item, Predicted):
                    yield self._result(item)
        finally:
            stop.set()

    def _result(self, predicted: Predicted) -> Result:
        frame = predicted.frame
        job = frame.origin.input if isinstance(frame.origin, Opened) else frame.origin
        if predicted.problem is not None:
            raise InputError(f'{job.shown} {predicted.problem}') from predicted.problem
        return Result(
            source=job.path,
            picture=predicted.picture,
            prediction=predicted.prediction,
            frame=frame.index,
            time=frame.timing.time if frame.timing else None,
            _artist=self._artist,
        )


def load_exported(path: str, device: str | None, amp: bool, is_to_change: bool) -> Model:
    """A model from an exported file.

    Args:
        path: The file.
        device: Where it runs.
        amp: Mixed precision.
        is_to_change: Whether it is to be another than what was exported.

    Raises:
        ConfigError: It is, or there is no such device or no mixed precision.
        CheckpointError: Reading it may run code.
        ExportError: It cannot be run, or was not written by our tool.
    """
    # Exporting builds on this package.
    from backbones.export.exported_model import ExportedModel

    if is_to_change:
        raise ConfigError(
            f'{path} is exported: its folding and config were settled then, with the options of '
            'export.py'
        )
    if path.endswith('.pt2') and os.path.isfile(path) and not are_checkpoints_trusted():
        raise CheckpointError(
            f'{path}: torch.export.load runs code that is in the file. If you made it yourself, or '
            'trust its maker as you would trust a program, add --trust-checkpoint (in Python: '
            'backbones.trust_checkpoints()); an .onnx or .xml needs no trust'
        )
    return ExportedModel(path, device, amp)


def read_input(
    given: Given, number: int, clip: Clip, stop: threading.Event
) -> Iterator[Frame | Opened | Closed]:
    """The frames of one thing that was given: a path or an array."""
    if isinstance(given, np.ndarray):
        job = Input(f'array {number}', f'array_{number}')
        if given.ndim != 3 or given.shape[2] != 3 or given.dtype != np.uint8 or not given.size:
            problem = (
                f'is of shape {given.shape} and type {given.dtype}; pictures are (height, width, '
                '3), uint8, in BGR order'
            )
            yield Closed(job, problem=problem)
            return
        yield Frame(job, partial(np.asarray, given), given.nbytes)
        return
    listed = list_inputs([os.fspath(given)], recursive=False, stdin=stdin)
    yield from (
        item
        for item in read_inputs(listed, clip, stop)
        if not (isinstance(item, Closed) and item.was_left_out)
    )
