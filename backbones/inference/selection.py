"""Keeping only what was asked for of a model's predictions."""

from collections.abc import Sequence
from typing import Any

from backbones.errors import ConfigError

from .pipeline import Model
from .prediction import Detections, Segmentation


class SelectingModel:
    """A model whose predictions are cut down to some scores and classes.

    Args:
        model: The model.
        score_thr: Detections below this score are left out.
        labels: Indices of the classes to keep; None: all.
    """

    def __init__(self, model: Model, score_thr: float, labels: Sequence[int] | None) -> None:
        self.prepare = model.prepare
        self.predict = model.predict
        self._model = model
        self._score_thr = score_thr
        self._labels = labels

    def finish(self, raw: Any, size: tuple[int, int]) -> Detections | Segmentation:
        """What the model makes of it, without what was not asked for."""
        prediction = self._model.finish(raw, size)
        if isinstance(prediction, Detections):
            return prediction.select(self._score_thr, self._labels)
        return prediction.select(self._labels)


def class_indices(names: Sequence[str] | None, classes: Sequence[str]) -> list[int] | None:
    """Where the named classes are among the model's; None for None.

    Raises:
        ConfigError: The model has no class of such a name.
    """
    if names is None:
        return None
    unknown = [name for name in names if name not in classes]
    if unknown:
        raise ConfigError(
            f'the model has no class {", ".join(map(repr, unknown))}; it has '
            f'{", ".join(map(repr, classes))}'
        )
    return [index for index, name in enumerate(classes) if name in names]
