"""Charts as SVG that takes its colors from the page, so that they follow light and dark."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape
from matplotlib.ticker import MaxNLocator

Curve = Sequence[tuple[float, float]]
Range = tuple[float, float]

WIDTH, HEIGHT = 420, 270
LEFT, RIGHT, TOP, BOTTOM = 60, 14, 12, 42
# Lines differ in color and dashes; long curves are thinned out, those of few points have dots.
STYLES = 8
MAX_POINTS = 300
MAX_DOTS = 30


@dataclass
class Chart:
    """An SVG with its title, and the number of its style for every line's name."""

    title: str
    svg: Markup
    legend: dict[str, int]


def line_chart(
    title: str,
    curves: Mapping[str, Curve],
    labels: tuple[str, str],
    x_range: Range | None = None,
    y_range: Range | None = None,
) -> Chart:
    """Curves over common axes; ``labels`` are the axes', ranges by default those of the points."""
    finite = {
        name: [point for point in curve if all(map(math.isfinite, point))]
        for name, curve in curves.items()
    }
    points = [point for curve in finite.values() for point in curve] or [(0, 0), (1, 1)]
    x_range = x_range or span([x for x, _ in points])
    axes = Axes(x_range, y_range or span([y for _, y in points]))
    marks, legend = [], {}
    for number, (name, curve) in enumerate(finite.items()):
        legend[name] = number % STYLES
        thin = [*curve[:: len(curve) // MAX_POINTS + 1], *curve[-1:]]
        places = [axes.place(*point).split(',') for point in thin]
        dots = [f'<circle cx="{x}" cy="{y}" r="2.5"/>' for x, y in places if len(curve) <= MAX_DOTS]
        line = Markup('<g class="line c{}"><title>{}</title><polyline points="{}"/>{}</g>')
        text = ' '.join(map(','.join, places))
        marks.append(line.format(legend[name], name, text, Markup(''.join(dots))))
    return Chart(title, axes.draw(title, labels, Markup('').join(marks)), legend)


def reliability_chart(title: str, bins: np.ndarray, labels: tuple[str, str]) -> Chart:
    """What share is correct at each confidence, beside the diagonal where both are equal.

    ``bins`` are (B, 3): how many, how many of them correct, the sum of their confidences.
    """
    axes, width = Axes((0, 1), (0, 1)), 1 / len(bins)
    marks = []
    for number, (count, correct, confidence) in enumerate(bins):
        if count:
            share = correct / count
            text = f'confidence {confidence / count:.2f}, correct {share:.2f}, {int(count):,}'
            marks.append(axes.bar(number * width, (number + 1) * width, share, text))
    line = Markup('<polyline class="ideal" points="{} {}"/>')
    marks.append(line.format(axes.place(0, 0), axes.place(1, 1)))
    return Chart(title, axes.draw(title, labels, Markup('').join(marks)), {})


def calibration_error(bins: np.ndarray) -> float:
    """ECE: the mean distance of confidence from correctness, bins weighted by their size."""
    return float(np.abs(bins[:, 1] - bins[:, 2]).sum() / max(bins[:, 0].sum(), 1))


class Axes:
    """Two axes and the place of what is drawn over them."""

    def __init__(self, x: Range, y: Range) -> None:
        self.x, self.y = x, y

    def place(self, x: float, y: float) -> str:
        """A point in pixels, inside the axes."""
        across, up = (
            min(max((value - low) / (high - low), 0), 1)
            for value, (low, high) in ((x, self.x), (y, self.y))
        )
        column = LEFT + across * (WIDTH - LEFT - RIGHT)
        return f'{column:.1f},{HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM):.1f}'

    def bar(self, left: float, right: float, height: float, text: str) -> Markup:
        """A bar from the lower axis on, with a text that is shown where the mouse is."""
        (x, y), (x_end, y_end) = (
            map(float, self.place(*corner).split(',')) for corner in ((left, height), (right, 0))
        )
        mark = Markup(
            '<rect class="mark" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}">'
            '<title>{}</title></rect>'
        )
        return mark.format(x + 1, y, x_end - x - 2, y_end - y, text)

    def draw(self, title: str, labels: tuple[str, str], marks: Markup) -> Markup:
        """The whole chart, ``marks`` over grid and axes."""
        parts = []
        for value in ticks(self.x):
            x, y = self.place(value, self.y[0]).split(',')
            parts.append(f'<path class="grid" d="M{x} {TOP}V{y}"/>')
            parts.append(f'<text x="{x}" y="{float(y) + 16}" text-anchor="middle">{value:g}</text>')
        for value in ticks(self.y):
            x, y = self.place(self.x[0], value).split(',')
            parts.append(f'<path class="grid" d="M{x} {y}H{WIDTH - RIGHT}"/>')
            parts.append(
                f'<text x="{float(x) - 6}" y="{float(y) + 4}" text-anchor="end">{value:g}</text>'
            )
        middle = (HEIGHT - BOTTOM + TOP) / 2
        names = Markup(
            '<text x="{}" y="{}" text-anchor="middle">{}</text>'
            '<text transform="translate(12 {}) rotate(-90)" text-anchor="middle">{}</text>'
        ).format((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, labels[0], middle, labels[1])
        return Markup(
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
            f'{"".join(parts)}{names}{marks}</svg>'
        )


def ticks(span: Range) -> list[float]:
    """Round numbers inside a range."""
    low, high = span
    slack = (high - low) * 1e-6
    found = MaxNLocator(5).tick_values(low, high)
    return [float(value) for value in found if low - slack <= value <= high + slack]


def span(values: Sequence[float]) -> Range:
    """The range of numbers, with 0 where that is near."""
    low, high = min(values), max(values)
    low = 0 if 0 < low < 0.5 * high else low
    return (low, high) if high > low else (low - 0.5, high + 0.5)
