"""Charts as pixel coordinates; the page draws them in its own colors, light and dark."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib.ticker import MaxNLocator

Curve = Sequence[tuple[float, float]]
Range = tuple[float, float]

# The ends of the axes, left and right, bottom and top, in a chart of 420 by 270 pixels.
X_PIXELS, Y_PIXELS = (60, 406), (228, 12)
# Longer curves are thinned out.
MAX_POINTS = 300


class Axis:
    """An axis: its label, its ticks, and the pixel of each value."""

    def __init__(self, label: str, span: Range, pixels: tuple[int, int]) -> None:
        self.label, self.span, self.pixels = label, span, pixels
        slack = (span[1] - span[0]) * 1e-6
        values = MaxNLocator(5).tick_values(*span)
        inside = values[(values >= span[0] - slack) & (values <= span[1] + slack)]
        self.ticks = [(self.place(value), f'{value:g}') for value in inside]

    def place(self, value: float) -> float:
        return round(float(np.interp(value, self.span, self.pixels)), 1)


@dataclass
class Chart:
    """A chart of lines, as points (x, y) by name, or of bars: (left, right, top, tooltip)."""

    title: str
    x: Axis
    y: Axis
    lines: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    bars: list[tuple[float, float, float, str]] = field(default_factory=list)


def line_chart(
    title: str,
    curves: Mapping[str, Curve],
    labels: tuple[str, str],
    x_range: Range | None = None,
    y_range: Range | None = None,
) -> Chart:
    """Return a chart of curves; ``labels`` are of x and y, default ranges those of the points."""
    finite = {
        name: [point for point in curve if all(map(math.isfinite, point))]
        for name, curve in curves.items()
    }
    points = [point for curve in finite.values() for point in curve] or [(0, 0), (1, 1)]
    xs, ys = zip(*points, strict=True)
    x = Axis(labels[0], x_range or span(xs), X_PIXELS)
    y = Axis(labels[1], y_range or span(ys), Y_PIXELS)
    lines = {
        name: [(x.place(a), y.place(b)) for a, b in thinned(curve)]
        for name, curve in finite.items()
    }
    return Chart(title, x, y, lines)


def thinned(curve: Curve) -> Curve:
    return [*curve[:: len(curve) // MAX_POINTS + 1], *curve[-1:]]


def reliability_chart(title: str, bins: np.ndarray, labels: tuple[str, str]) -> Chart:
    """Return a chart of the fraction that is correct at each confidence, beside the diagonal.

    ``bins`` are (B, 3): the number in each bin, the number correct, the sum of confidences.
    """
    x, y = Axis(labels[0], (0, 1), X_PIXELS), Axis(labels[1], (0, 1), Y_PIXELS)
    bars = []
    for number, (count, correct, confidence) in enumerate(bins):
        if count:
            share, ends = correct / count, (number / len(bins), (number + 1) / len(bins))
            text = f'confidence {confidence / count:.2f}, correct {share:.2f}, count {int(count):,}'
            bars.append((*map(x.place, ends), y.place(share), text))
    return Chart(title, x, y, bars=bars)


def calibration_error(bins: np.ndarray) -> float:
    """Return ECE: mean difference of confidence and correct fraction, bins weighted by size."""
    return float(np.abs(bins[:, 1] - bins[:, 2]).sum() / (bins[:, 0].sum() or math.nan))


def span(values: Sequence[float]) -> Range:
    """Return the range of numbers, extended to 0 if that is near."""
    low, high = min(values), max(values)
    low = 0 if 0 < low < 0.5 * high else low
    return (low, high) if high > low else (low - 0.5, high + 0.5)
