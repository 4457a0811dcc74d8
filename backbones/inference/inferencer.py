"""Predictions from Python, for images, videos, folders, cameras and arrays."""

import os
import sys
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from backbones.errors import ConfigError, InputError, import_optional

from .drawing import Visualizer
from .exported_file import ExportedModel, is_exported
from .inputs import Input, list_inputs
from .masks import encode_mask, extents_of
from .model import TorchModel
from .output_paths import mirrored_path
from .palette import choose_palette
from .pipeline import Pipeline
from .reading import Clip, Closed, Frame, read_inputs
from .results import Detections, Segmentation, categories_of, coco_results, image_id_of, regions_of
from .tiles import TiledModel, check_tile

if TYPE_CHECKING:
    import supervision

Given = str | os.PathLike | np.ndarray


@dataclass(frozen=True)
class Result:
    """An image and its prediction, or why there is none; then its methods raise InputError.

    Attributes:
        source: Where the image comes from: a path, a URL, or 'array 3' for the fourth array.
        frame: Which frame of a video it is, counted from 0 at the clip's start; 0 for an image;
            None if ``problem`` is about the whole input.
        time: When that frame is shown, in seconds; None for an image.
        image: (height, width, 3), uint8, BGR; None if it could not be read.
        prediction: What the model predicts; None if there is a problem.
        problem: What is wrong with this input, in one line; None if nothing is.
    """

    source: str
    frame: int | None = None
    time: float | None = None
    image: np.ndarray | None = None
    prediction: Detections | Segmentation | None = None
    problem: str | None = None
    _visualizer: Visualizer | None = None

    def draw(self, legend: bool = True) -> np.ndarray:
        """Return the image with the prediction drawn over it, (height, width, 3), uint8, BGR.

        ``legend`` adds a legend below a segmentation; the drawing is then higher than the image.
        """
        self._expect_prediction()
        return self._visualizer.draw(self.image, self.prediction, legend)

    def to_supervision(self) -> 'supervision.Detections':
        """Return the prediction for the package supervision and its users, for example trackers.

        Class names are in ``data['class_name']``. A segmentation becomes one mask for each class in
        it, without confidence. Raises ConfigError if the package is not installed.
        """
        objects, size = self._objects(), self.image.shape[:2]
        supervision = import_optional('supervision', 'to_supervision()', 'tracking')
        masks = None
        if objects.masks:
            # Compact, like ours; supervision's extents include the last pixel.
            extents = extents_of(objects.masks) - (0, 0, 1, 1)
            encoded = [encode_mask(mask, size) for mask in objects.masks]
            masks = supervision.CompactMask.from_coco_rle(encoded, extents, size)
        names = [self._visualizer.class_names[label] for label in objects.labels]
        return supervision.Detections(
            xyxy=objects.boxes,
            mask=masks,
            confidence=objects.scores,
            class_id=objects.labels,
            data={'class_name': np.array(names, str)},
        )

    def to_coco(self) -> list[dict[str, Any]]:
        """Return the prediction in COCO's results format, as in the files of infer.py.

        A segmentation becomes one mask for each class in it, without a score.
        """
        objects, name = self._objects(), mirrored_path(self.source)
        image = {'image_id': image_id_of(name), 'file_name': name}
        if self.time is not None:
            image = {'image_id': image_id_of(name, self.frame), 'frame': self.frame}
        task = 'segmentation' if isinstance(self.prediction, Segmentation) else 'detection'
        categories = categories_of(self._visualizer.class_names, task)
        return coco_results(objects, self.image.shape[:2], image, categories)

    def _objects(self) -> Detections:
        self._expect_prediction()
        is_detection = isinstance(self.prediction, Detections)
        return self.prediction if is_detection else regions_of(self.prediction)

    def _expect_prediction(self) -> None:
        if self.prediction is None:
            raise InputError(f'{self.source} {self.problem}')


class Inferencer:
    """A detector or segmentor for images, videos, folders, cameras and arrays.

    ::

        inferencer = Inferencer('seg_configs/fpn_effv2_s2.py', 'fpn_s2.pth')
        for result in inferencer(['street.jpg', 'drive.mp4']):
            print(result.source, result.frame, result.problem or result.prediction)

    Args:
        config: Path of a config, or of a file that ``tools/export.py`` wrote.
        checkpoint: Path or URL of a checkpoint of the whole model; None for an exported file.
        device: For instance 'cuda:1'. Default: the first GPU, else the CPU; for an exported file
            see :func:`.exported_file.open_exported`.
        batch_size: Images that go through the model at once. Changes no result.
        amp: Mixed precision, see :func:`backbones.engine.amp.inference_precision`; among exported
            files, only .xml has it.
        deploy: Fold layers that only training needs; this is faster, and changes results only by
            rounding.
        score_thr: Detections below this score are left out.
        classes: Names of the classes to keep. Default: all.
        palette: See :func:`backbones.inference.palette.choose_palette`. Default: the model's own.
        tile: Images with a longer side go through the model in tiles of this height and width, in
            pixels, at least 64; see :mod:`backbones.inference.tiles`. Default: as a whole.
        overlap: With ``tile``: the share of a tile's side that its neighbor also covers, from 0 to
            below 0.9. Default: 0.2.
        cfg_options: Overrides for the config, by dotted key.

    Attributes:
        task: 'detection' or 'segmentation'.
        classes: The model's class names; labels are indices into it.
        about: Texts by name that describe the model, and for an exported file what runs it.
        visualizer: Draws predictions.

    Raises ConfigError, ExportError or CheckpointError if the model cannot be read or run, or lacks
    one of ``classes``.
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
        tile: int | None = None,
        overlap: float | None = None,
    ) -> None:
        check_tile(tile, overlap)
        if not is_exported(config):
            if checkpoint is None:
                raise ConfigError(f'give a config and its checkpoint, not {config} alone')
            if is_exported(checkpoint):
                raise ConfigError(f'{checkpoint} is an exported file: give it without {config}')
            model = TorchModel(str(config), str(checkpoint), device, amp, deploy, cfg_options)
        elif cfg_options or not deploy:
            raise ConfigError(
                f'{config} is an exported file, so config and folding cannot be changed: export it '
                'again with other options of export.py'
            )
        else:
            model = ExportedModel(str(config), device, amp)
        self.task, self.classes, self.about = model.task, model.classes, model.about
        colors = choose_palette(palette, model.classes, model.palette)
        self.visualizer = Visualizer(self.classes, colors)
        self.batch_size = batch_size
        if tile is not None:
            model = TiledModel(model, tile, overlap, batch_size, score_thr)
        self.preprocess, self.predict = model.preprocess, model.predict
        self._model = model
        self._score_thr = score_thr
        self._labels = labels_of(classes, self.classes)

    def postprocess(self, raw: Any, size: tuple[int, int]) -> Detections | Segmentation:
        """Return the model's prediction, with the chosen scores and classes only."""
        prediction = self._model.postprocess(raw, size)
        if isinstance(prediction, Detections):
            return prediction.select(self._score_thr, self._labels)
        return prediction.select(self._labels)

    def __call__(
        self, inputs: Given | Iterable[Given], clip: Clip | None = None
    ) -> Generator[Result, None, None]:
        """Predict; the next images are read while the last results are used.

        Args:
            inputs: One or many of: the path of an image, a video or a folder, a glob, a URL,
                'webcam:0', or an array (height, width, 3), uint8, BGR. May be endless.
            clip: Which part of videos is read. Default: all.

        Yields:
            A result for each image and each frame of a video, in order; for an input that cannot
            be read to its end, one with a ``problem``. The other inputs are still read.
        """
        if isinstance(inputs, str | os.PathLike | np.ndarray):
            inputs = [inputs]
        listed = chain.from_iterable(
            list_given(given, number) for number, given in enumerate(inputs)
        )
        for item in Pipeline(self, self.batch_size).run(read_inputs(listed, clip or Clip())):
            if isinstance(item, Closed) and item.problem and not item.was_left_out:
                yield Result(item.input.shown, problem=item.problem)
            if isinstance(item, Frame):
                yield Result(
                    *(item.input.shown, item.index, item.time),
                    *(item.image, item.prediction, item.problem, self.visualizer),
                )


def labels_of(names: Sequence[str] | None, classes: Sequence[str]) -> list[int] | None:
    """Return the labels of the named classes, None for None; ConfigError for an unknown class."""
    if names is None:
        return None
    unknown = [name for name in names if name not in classes]
    if unknown:
        raise ConfigError(
            f'the model has no class {", ".join(map(repr, unknown))}; it has '
            f'{", ".join(map(repr, classes))}'
        )
    return [label for label, name in enumerate(classes) if name in names]


def list_given(given: Given, number: int) -> list[Input]:
    """Return the inputs that a path or an array stands for."""
    if not isinstance(given, np.ndarray):
        return list_inputs([os.fspath(given)], recursive=False, stdin=sys.stdin)
    problem = None
    if given.ndim != 3 or given.shape[2] != 3 or given.dtype != np.uint8 or not given.size:
        problem = (
            f'has shape {given.shape} and type {given.dtype}; images must be (height, width, 3), '
            'uint8, in BGR order'
        )
    return [Input(f'array {number}', problem=problem, data=given)]
