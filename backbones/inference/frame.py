"""What travels through the pipeline: images, each from an input."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


@dataclass(frozen=True)
class Timing:
    """When a frame of a video is shown, exactly.

    Attributes:
        time: Seconds from the beginning of the video.
        pts: The same in units of the video's time base.
        duration: For how long, in the same units; None where it is not known yet.
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
    """An image, or a frame of a video.

    Attributes:
        origin: Where it comes from; whatever the caller passes.
        load: Returns the image, (height, width, 3), uint8, BGR.
        num_bytes: The image's size in memory.
        index: Which frame of a video, from 0.
        timing: When in a video it is shown.
        started: When the work on it began, by ``time.perf_counter``.
    """

    origin: Any
    load: Callable[[], np.ndarray]
    num_bytes: int
    index: int = 0
    timing: Timing | None = None
    started: float = 0.0
