"""Predictions drawn over the picture they are about, fast enough for every frame of a video."""

from collections.abc import Iterator, Sequence
from typing import Literal

import cv2
import numpy as np

from .legend import Entry, SteadyClasses, draw_panel, legend_band
from .palette import Color
from .prediction import CroppedMask, Detections, Segmentation
from .text import fit_text, line_height, paint, render_text, rounded_box, text_width

BGR = tuple[int, int, int]

# Pixels worked on at a time: what a strip needs beside the picture stays small, and in the cache.
STRIP_PIXELS = 1 << 18
SMALLEST_FONT = 9
# Text is drawn where a line of it takes at most this part of the picture's shorter side.
TEXT_SHARE = 1 / 7
# A label takes at most this part of the picture's width.
LABEL_SHARE = 0.45
# How far a region's border moves from its colour towards white.
BORDER_LIGHTNESS = 0.45
HAIRLINE_OPACITY = 0.4


class Artist:
    """Draws what a model says about pictures of any size.

    Lines and letters grow with the square root of a picture's side, so that a small picture is not
    covered by them; in one larger than screens with the side, so that they are seen in it as a
    whole.

    Args:
        class_names: The model's classes, in order.
        palette: (R, G, B) of every class; see :func:`choose_palette`.
        opacity: Of masks and of a segmentation's regions, 0 to 1. Default: 0.5.
    """

    def __init__(
        self, class_names: Sequence[str], palette: Sequence[Color], opacity: float = 0.5
    ) -> None:
        self.class_names = list(class_names)
        self.colors: list[BGR] = [(blue, green, red) for red, green, blue in palette]
        self.opacity = opacity

    def draw_detections(self, picture: np.ndarray, detections: Detections) -> np.ndarray:
        """Masks with their outlines, boxes, and above each box its class and score.

        Args:
            picture: (height, width, 3), uint8, BGR; not changed.
            detections: What to draw. The surest lie on top.

        Returns:
            A new picture of the same size.
        """
        drawing = picture.copy()
        boxes, visible = clip_boxes(detections.boxes, drawing)
        colors = [self.colors[label] for label in detections.labels]
        surest_last = visible[::-1]
        if detections.masks is not None:
            for index in surest_last:
                draw_mask(drawing, detections.masks[index], colors[index], self.opacity)
        for index in surest_last:
            draw_box(drawing, boxes[index], colors[index])
        if has_room_for_text(drawing):
            labels = [self.label(detections, index, drawing) for index in visible]
            places = place_labels(boxes[visible], [label.shape for label in labels], drawing)
            for place in reversed(range(len(labels))):
                draw_label(drawing, labels[place], places[place], colors[visible[place]])
        return drawing

    def label(self, detections: Detections, index: int, picture: np.ndarray) -> np.ndarray:
        """The text of an object's label as a bitmap, in the size that suits the picture."""
        size = font_size(picture)
        score = '' if detections.scores is None else f' {detections.scores[index]:.2f}'
        room = round(picture.shape[1] * LABEL_SHARE) - text_width(score, size)
        name = fit_text(self.class_names[detections.labels[index]], size, room)
        return render_text(name + score, size)

    def draw_segmentation(
        self,
        picture: np.ndarray,
        segmentation: Segmentation,
        legend: Literal['below', 'inside', 'none'] = 'below',
        steady: SteadyClasses | None = None,
    ) -> np.ndarray:
        """Every region in its class's colour, and which colour means what.

        Args:
            picture: (height, width, 3), uint8, BGR; not changed.
            segmentation: Its classes. What was not asked for keeps the picture's colours.
            legend: 'below': in a band under the picture, the largest class first, so the result
                is higher than the picture; 'inside': over its lower left corner, in the order of
                the classes, so the size stays and a video does not flicker; or 'none'.
            steady: For a video, made once and given with every frame: keeps classes in the legend
                that are missing for a moment only. Default: the picture's own classes.

        Returns:
            A new picture.
        """
        height, width = picture.shape[:2]
        legend = legend if has_room_for_text(picture) else 'none'
        shares = {} if legend == 'none' else self.class_shares(segmentation.label_map)
        band = np.empty((0, width, 3), np.uint8)
        if legend == 'below':
            entries = [
                Entry(self.class_names[index], self.colors[index], share)
                for index, share in sorted(shares.items(), key=lambda item: -item[1])
            ]
            band = legend_band(entries, width, height, font_size(picture))
        drawing = np.empty((height + len(band), width, 3), np.uint8)
        drawing[:height] = picture
        drawing[height:] = band
        self.color_regions(drawing[:height], segmentation.label_map)
        if legend == 'inside':
            self.draw_legend(drawing, steady.update(shares) if steady else sorted(shares))
        return drawing

    def draw_legend(self, drawing: np.ndarray, listed: Sequence[int]) -> None:
        """Draw a legend over the lower left corner, in place, where there is room for text.

        Args:
            drawing: (height, width, 3), uint8, BGR.
            listed: Indices of the classes in it.
        """
        if has_room_for_text(drawing):
            entries = [Entry(self.class_names[index], self.colors[index]) for index in listed]
            draw_panel(drawing, entries, font_size(drawing))

    def class_shares(self, label_map: np.ndarray) -> dict[int, float]:
        """What part of the picture each class covers, of those that are there."""
        count = len(self.class_names)
        pixels = np.zeros(count, np.int64)
        for rows in strips(label_map.shape):
            pixels += count_labels(np.ascontiguousarray(label_map[rows]))[:count]
        return {int(index): pixels[index] / label_map.size for index in np.flatnonzero(pixels)}

    def color_regions(self, picture: np.ndarray, label_map: np.ndarray) -> None:
        """Blend every class's colour into its pixels and draw the borders, in place."""
        values = np.iinfo(label_map.dtype).max + 1
        colors = np.zeros((values, 1, 3), np.uint8)
        colors[: len(self.colors), 0] = self.colors
        asked_for = np.zeros(values, np.uint8)
        asked_for[: len(self.colors)] = 1
        thickness = thin_width(picture)
        for rows in strips(label_map.shape):
            labels = np.ascontiguousarray(label_map[rows])
            region = picture[rows]
            layer, mask = look_up(colors, labels), look_up(asked_for, labels)
            layer = cv2.addWeighted(region, 1 - self.opacity, layer, self.opacity, 0)
            pale = cv2.convertScaleAbs(
                layer, alpha=1 - BORDER_LIGHTNESS, beta=255 * BORDER_LIGHTNESS
            )
            cv2.copyTo(pale, borders(label_map, rows, thickness), layer)
            cv2.copyTo(layer, mask, region)


def strips(shape: tuple[int, ...]) -> Iterator[slice]:
    """Rows of a picture, few at a time."""
    height, width = shape[:2]
    step = max(STRIP_PIXELS // max(width, 1), 1)
    for start in range(0, height, step):
        yield slice(start, min(start + step, height))


def count_labels(labels: np.ndarray) -> np.ndarray:
    """How often each value that the type has occurs."""
    values = np.iinfo(labels.dtype).max + 1
    return cv2.calcHist([labels], [0], None, [values], [0, values])[:, 0].astype(np.int64)


def look_up(table: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """``table[labels]``, for 8 bits by OpenCV, which is ten times as fast."""
    if labels.dtype != np.uint8:
        return table[labels].reshape(labels.shape + table.shape[2:])
    return cv2.applyColorMap(labels, table) if table.ndim == 3 else cv2.LUT(labels, table)


def borders(label_map: np.ndarray, rows: slice, thickness: int) -> np.ndarray:
    """Where regions meet, in some rows of a label map: (rows, width), uint8, not 0 on a border."""
    above = min(thickness, rows.start)
    around = np.ascontiguousarray(label_map[rows.start - above : rows.stop + thickness])
    kernel = np.ones((thickness + 1, thickness + 1), np.uint8)
    differences = cv2.morphologyEx(around, cv2.MORPH_GRADIENT, kernel)
    return (differences[above : above + rows.stop - rows.start] > 0).view(np.uint8)


def draw_mask(drawing: np.ndarray, mask: CroppedMask, color: BGR, opacity: float) -> None:
    if not mask.pixels.size:
        return
    height, width = mask.pixels.shape
    region = drawing[mask.y : mask.y + height, mask.x : mask.x + width]
    pixels = np.ascontiguousarray(mask.pixels).view(np.uint8)
    for rows in strips(pixels.shape):
        layer = np.empty_like(region[rows])
        cv2.rectangle(layer, (0, 0), layer.shape[1::-1], color, cv2.FILLED)
        layer = cv2.addWeighted(region[rows], 1 - opacity, layer, opacity, 0)
        cv2.copyTo(layer, pixels[rows], region[rows])
    outlines, _ = cv2.findContours(pixels, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    # Paler than its box, the outline parts neighbours of one class.
    cv2.drawContours(region, outlines, -1, pale(color), thin_width(drawing), cv2.LINE_AA)


def draw_box(drawing: np.ndarray, box: np.ndarray, color: BGR) -> None:
    left, top, right, bottom = box
    # A small object must not vanish under its own box.
    width = max(min(line_width(drawing), (right - left) // 4, (bottom - top) // 4), 1)
    draw_frame(drawing, box, width, color)
    if min(right - left, bottom - top) > 16 * width:
        # A hairline that is seen where the picture has the colour of the box.
        inner = (left + width, top + width, right - width, bottom - width)
        draw_frame(drawing, inner, thin_width(drawing), readable_on(color), HAIRLINE_OPACITY)


def draw_frame(
    drawing: np.ndarray, box: Sequence[int], width: int, color: BGR, opacity: float = 1
) -> None:
    left, top, right, bottom = box
    for region in (
        drawing[top : top + width, left:right],
        drawing[bottom - width : bottom, left:right],
        drawing[top + width : bottom - width, left : left + width],
        drawing[top + width : bottom - width, right - width : right],
    ):
        region[:] = region * (1 - opacity) + np.multiply(color, opacity) if opacity < 1 else color


def draw_label(drawing: np.ndarray, text: np.ndarray, corner: tuple[int, int], color: BGR) -> None:
    x, y = corner
    height, width = label_size(text.shape)
    paint(drawing, rounded_box(width, height, height // 5), x, y, color)
    paint(drawing, text, x + (width - text.shape[1]) // 2, y + 1, readable_on(color))


def clip_boxes(boxes: np.ndarray, picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whole pixels of boxes, inside the picture, and the indices of those that can be seen.

    Returns:
        (N, 4), int64: left, top, right, bottom, the last two exclusive, at least a pixel apart;
        and up to N indices.
    """
    height, width = picture.shape[:2]
    corners = boxes.astype(np.float64).reshape(-1, 2, 2)
    start, end = corners.min(axis=1), corners.max(axis=1)
    size = np.array([width, height])
    visible = ((end >= 0) & (start < size)).all(axis=1)
    start = np.round(np.clip(start, 0, size - 1)).astype(np.int64)
    end = np.round(np.clip(end, 0, size)).astype(np.int64)
    return np.hstack([start, np.maximum(end, start + 1)]), np.flatnonzero(visible)


def place_labels(
    boxes: np.ndarray, text_shapes: Sequence[tuple[int, ...]], picture: np.ndarray
) -> list[tuple[int, int]]:
    """Where labels go: at their box, inside the picture, and clear of each other if possible.

    Args:
        boxes: (N, 4): left, top, right, bottom; the most important first, which chooses first.
        text_shapes: (height, width) of the N texts.
        picture: (height, width, 3).

    Returns:
        N left upper corners (x, y).
    """
    if not len(boxes):
        return []
    sizes = np.array([label_size(shape)[::-1] for shape in text_shapes])
    left, top, right, bottom = boxes.T
    width, height = sizes.T
    starts = np.array(
        [
            (left, top - height),
            (left, top),
            (right - width, top - height),
            (left, bottom),
            (right, top),
            (left - width, top),
            (right - width, top),
            (left, bottom - height),
            (right - width, bottom),
            (right - width, bottom - height),
        ]
    ).transpose(2, 0, 1)  # label, place, x and y
    room = np.array(picture.shape[1::-1]) - sizes
    moved = np.clip(starts, 0, np.maximum(room, 0)[:, None])
    places = np.concatenate([moved, moved + sizes[:, None]], axis=2)
    areas = (right - left) * (bottom - top)
    hidden = overlaps(places, boxes[:, None]) / areas[:, None]
    away = np.abs(moved - starts).sum(axis=2) / sizes.sum(axis=1)[:, None]
    cost = 2 * hidden + away + 0.05 * np.arange(starts.shape[1])
    taken = np.empty((len(boxes), 4), np.int64)
    for index in range(len(boxes)):
        covered = overlaps(places[index, :, None], taken[None, :index]).sum(axis=1)
        best = (cost[index] + 10 * covered / sizes[index].prod()).argmin()
        taken[index] = places[index, best]
    return [(int(x), int(y)) for x, y in taken[:, :2]]


def overlaps(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Pixels that boxes share, each (..., 4), by broadcasting."""
    start = np.maximum(first[..., :2], second[..., :2])
    end = np.minimum(first[..., 2:], second[..., 2:])
    width, height = np.moveaxis((end - start).clip(0), -1, 0)
    return width * height


def label_size(text_shape: tuple[int, ...]) -> tuple[int, int]:
    """Height and width of a label round a text."""
    height, width = text_shape
    return height + 2, width + 2 * round(height * 0.28)


def font_size(picture: np.ndarray) -> int:
    return max(round(max(0.46 * side(picture) ** 0.5, side(picture) / 100)), SMALLEST_FONT)


def line_width(picture: np.ndarray) -> int:
    return max(round(max(side(picture) ** 0.5 / 13, side(picture) / 800)), 1)


def thin_width(picture: np.ndarray) -> int:
    return max(line_width(picture) // 2, 1)


def side(picture: np.ndarray) -> float:
    """The side of a square with as many pixels; of a narrow strip, of as much as one looks at."""
    height, width = picture.shape[:2]
    return min((height * width) ** 0.5, 3 * min(height, width))


def has_room_for_text(picture: np.ndarray) -> bool:
    return line_height(font_size(picture)) <= min(picture.shape[:2]) * TEXT_SHARE


def pale(color: BGR) -> BGR:
    return tuple(round(value + (255 - value) * BORDER_LIGHTNESS) for value in color)


def readable_on(color: BGR) -> BGR:
    """White where its contrast is at least 3:1, else black, by WCAG 2.

    https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio
    """
    blue, green, red = (
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
        for value in (channel / 255 for channel in color)
    )
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return (0, 0, 0) if 3 * (luminance + 0.05) > 1.05 else (255, 255, 255)
