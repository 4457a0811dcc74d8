"""What travels through the pipeline: pictures, each from an input."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .prediction import Detections, Segmentation


@dataclass(frozen=True)
class Timing:
    """When a frame of a video is shown, exactly.

    Attributes:
        time: Seconds from the beginning of the video.
        pts: The same in units of the video's time base.
        duration: For how long, in the same units; None where nobody knows yet.
    """

    time: float
    pts: int
    duration: int | None = None


class TimedImage(NamedTuple):
    """One frame of a video, animation or camera, as it was read.

    Attributes:
        index: Which frame from the first one on that was read; what is missing was left out.
        timing: When it is shown.
        image: (height, width, 3), uint8, BGR, upright. It may be drawn on.
    """

    index: int
    timing: Timing
    image: np.ndarray


@dataclass
class Frame:
    """A picture, or one of the pictures of a video.

    Attributes:
        origin: Whatever the caller wants to know it by.
        load: Returns the picture, (height, width, 3) uint8 in BGR order.
        num_bytes: What the picture takes in memory.
        index: Which picture of a video, from 0.
        timing: When in a video it is shown.
        started: When work on it began, by ``time.perf_counter``.
    """

    origin: Any
    load: Callable[[], np.ndarray]
    num_bytes: int
    index: int = 0
    timing: Timing | None = None
    started: float = 0.0


@dataclass
class Predicted:
    """A frame with what the model says about it, or with what went wrong.

    Attributes:
        frame: The frame.
        picture: Its picture, or None where it could not be had.
        prediction: What the model says about it.
        problem: What went wrong with this frame, or None.
    """

    frame: Frame
    picture: np.ndarray | None = None
    prediction: Detections | Segmentation | None = None
    problem: Exception | None = None
