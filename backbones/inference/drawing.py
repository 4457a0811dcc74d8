"""Predictions drawn over their image, fast enough for every frame of a video."""

from collections.abc import Iterator, Sequence

import cv2
import numpy as np

from .legend import BGR, Entry, draw_panel, legend_band
from .masks import CroppedMask
from .palette import Color
from .results import Detections, Segmentation
from .text import fit_text, line_height, paint, render_text, rounded_box, text_width

# Pixels processed at a time: temporary arrays of this size are small, and fit into the cache.
STRIP_PIXELS = 1 << 18
MIN_FONT_SIZE = 9
# Text is drawn if a line of it takes at most this share of the image's shorter side.
TEXT_SHARE = 1 / 7
# The largest share of the image's width for a label, and of its pixels for all labels.
LABEL_SHARE, LABELS_SHARE = 0.45, 0.5
# How much lighter the outline of a mask or region is than its color; 1 is white.
OUTLINE_LIGHTNESS = 0.45
# Boxes of one class that are closer than this share of their size get different shades.
CLOSENESS = 0.05
# Hue (of 180), share of white, share of black; the first is the class's own color.
SHADES = ((0, 0, 0), (0, 0.45, 0), (0, 0, 0.4), (10, 0.15, 0), (-10, 0, 0.15))


class Visualizer:
    """Draws predictions over images of any size, with a ``palette`` of (R, G, B)."""

    def __init__(
        self, class_names: Sequence[str], palette: Sequence[Color], opacity: float = 0.5
    ) -> None:
        self.class_names = list(class_names)
        self.palette = list(palette)
        self.colors: list[BGR] = [(blue, green, red) for red, green, blue in palette]
        self.opacity = opacity

    def draw(
        self, image: np.ndarray, prediction: Detections | Segmentation, legend: bool = True
    ) -> np.ndarray:
        """Return a new image, (height, width, 3), uint8, BGR, with the prediction drawn over it.

        ``legend`` adds a legend below a segmentation; the drawing is then higher than the image.
        """
        if isinstance(prediction, Segmentation):
            return self.draw_segmentation(image, prediction, legend)
        return self.draw_detections(image, prediction)

    def draw_detections(self, image: np.ndarray, detections: Detections) -> np.ndarray:
        """Return a new image with masks, boxes, classes and scores, the highest score on top."""
        drawing = image.copy()
        boxes, visible = clip_boxes(detections.boxes, drawing)
        shades = assign_shades(boxes, detections.labels)
        colors = [
            shade_of(self.colors[label], shade)
            for label, shade in zip(detections.labels, shades, strict=True)
        ]
        highest_last = visible[::-1]
        if detections.masks is not None:
            for index in highest_last:
                draw_mask(drawing, detections.masks[index], colors[index], self.opacity)
        for index in highest_last:
            draw_box(drawing, boxes[index], colors[index])
        if has_room_for_text(drawing):
            texts = self._label_texts(detections, visible, drawing)
            visible = visible[: len(texts)]
            places = place_labels(boxes[visible], [text.shape for text in texts], drawing)
            for place in reversed(range(len(texts))):
                draw_label(drawing, texts[place], places[place], colors[visible[place]])
        return drawing

    def _label_texts(
        self, detections: Detections, indices: np.ndarray, image: np.ndarray
    ) -> list[np.ndarray]:
        """Render the labels of objects as bitmaps, as many as there is room for."""
        size, texts = font_size(image), []
        left = LABELS_SHARE * image.shape[0] * image.shape[1]
        for index in indices:
            score = '' if detections.scores is None else f' {detections.scores[index]:.2f}'
            room = round(image.shape[1] * LABEL_SHARE) - text_width(score, size)
            name = fit_text(self.class_names[detections.labels[index]], size, room)
            texts.append(render_text(name + score, size))
            left -= texts[-1].size
            if left < 0:
                break
        return texts

    def draw_segmentation(
        self, image: np.ndarray, segmentation: Segmentation, legend: bool = True
    ) -> np.ndarray:
        """Return a new image with every region in its class's color; other pixels keep theirs."""
        height, width = image.shape[:2]
        band = np.empty((0, width, 3), np.uint8)
        if legend and has_room_for_text(image):
            shares = self.class_shares(segmentation.seg_map)
            entries = [
                Entry(f'{self.class_names[label]} {percentage(share)}', self.colors[label])
                for label, share in sorted(shares.items(), key=lambda item: -item[1])
            ]
            band = legend_band(entries, width, height, font_size(image))
        drawing = np.empty((height + len(band), width, 3), np.uint8)
        drawing[:height] = image
        drawing[height:] = band
        self._color_regions(drawing[:height], segmentation.seg_map)
        return drawing

    def draw_legend(self, drawing: np.ndarray, labels: Sequence[int]) -> None:
        """Draw a legend of these classes over the lower left corner, in place, if there is room."""
        if has_room_for_text(drawing):
            entries = [Entry(self.class_names[label], self.colors[label]) for label in labels]
            draw_panel(drawing, entries, font_size(drawing))

    def class_shares(self, seg_map: np.ndarray) -> dict[int, float]:
        """Return the share of the image that each class covers, without classes that are absent."""
        values = np.iinfo(seg_map.dtype).max + 1
        pixels = np.zeros(values)
        for rows in strips(seg_map.shape):
            strip = np.ascontiguousarray(seg_map[rows])
            pixels += cv2.calcHist([strip], [0], None, [values], [0, values])[:, 0]
        found = np.flatnonzero(pixels[: len(self.class_names)])
        return {int(label): pixels[label] / seg_map.size for label in found}

    def _color_regions(self, image: np.ndarray, seg_map: np.ndarray) -> None:
        """Blend the color of every class into its pixels and outline the regions, in place."""
        colors = np.zeros((np.iinfo(seg_map.dtype).max + 1, 3), np.uint8)
        colors[: len(self.colors)] = self.colors
        thickness = thin_width(image)
        for rows in strips(seg_map.shape):
            labels, region = np.ascontiguousarray(seg_map[rows]), image[rows]
            # For 8-bit labels, OpenCV is ten times as fast.
            is_8_bit = labels.dtype == np.uint8
            layer = cv2.applyColorMap(labels, colors[:, None]) if is_8_bit else colors[labels]
            layer = cv2.addWeighted(region, 1 - self.opacity, layer, self.opacity, 0)
            light = cv2.convertScaleAbs(
                layer, alpha=1 - OUTLINE_LIGHTNESS, beta=255 * OUTLINE_LIGHTNESS
            )
            cv2.copyTo(light, borders(seg_map, rows, thickness), layer)
            cv2.copyTo(layer, (labels < len(self.colors)).view(np.uint8), region)


def percentage(share: float) -> str:
    return f'{share:.0%}' if share >= 0.01 else '<1%'


def strips(shape: tuple[int, ...]) -> Iterator[slice]:
    """Yield the rows of an image, a few at a time."""
    height, width = shape[:2]
    step = max(STRIP_PIXELS // max(width, 1), 1)
    for start in range(0, height, step):
        yield slice(start, min(start + step, height))


def borders(seg_map: np.ndarray, rows: slice, thickness: int) -> np.ndarray:
    """Return the borders of regions in some rows of a map: (rows, width), uint8, 1 on a border."""
    above = min(thickness, rows.start)
    around = np.ascontiguousarray(seg_map[rows.start - above : rows.stop + thickness])
    kernel = np.ones((thickness + 1, thickness + 1), np.uint8)
    differences = cv2.morphologyEx(around, cv2.MORPH_GRADIENT, kernel)
    return (differences[above : above + rows.stop - rows.start] > 0).view(np.uint8)


def draw_mask(drawing: np.ndarray, mask: CroppedMask, color: BGR, opacity: float) -> None:
    pixels = np.ascontiguousarray(mask.pixels).view(np.uint8)
    if not pixels.size:
        return
    height, width = pixels.shape
    region = drawing[mask.y : mask.y + height, mask.x : mask.x + width]
    for rows in strips(pixels.shape):
        layer = np.empty_like(region[rows])
        cv2.rectangle(layer, (0, 0), layer.shape[1::-1], color, cv2.FILLED)
        layer = cv2.addWeighted(region[rows], 1 - opacity, layer, opacity, 0)
        cv2.copyTo(layer, pixels[rows], region[rows])
    outlines, _ = cv2.findContours(pixels, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    # Lighter than the mask, the outline separates neighbors of one class.
    cv2.drawContours(
        region, outlines, -1, lighten(color, OUTLINE_LIGHTNESS), thin_width(drawing), cv2.LINE_AA
    )


def draw_box(drawing: np.ndarray, box: np.ndarray, color: BGR) -> None:
    left, top, right, bottom = box
    # A small object must not disappear under its own box.
    width = max(min(line_width(drawing), (right - left) // 4, (bottom - top) // 4), 1)
    drawing[top : top + width, left:right] = color
    drawing[bottom - width : bottom, left:right] = color
    drawing[top:bottom, left : left + width] = color
    drawing[top:bottom, right - width : right] = color


def draw_label(drawing: np.ndarray, text: np.ndarray, corner: tuple[int, int], color: BGR) -> None:
    x, y = corner
    height, width = label_size(text.shape)
    paint(drawing, rounded_box(width, height, height // 5), x, y, color)
    paint(drawing, text, x + (width - text.shape[1]) // 2, y + 1, readable_on(color))


def clip_boxes(boxes: np.ndarray, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return boxes in whole pixels, inside the image and not empty; the indices of visible ones."""
    height, width = image.shape[:2]
    corners = boxes.astype(np.float64).reshape(-1, 2, 2)
    start, end = corners.min(axis=1), corners.max(axis=1)
    size = np.array([width, height])
    visible = ((end >= 0) & (start < size)).all(axis=1)
    start = np.round(np.clip(start, 0, size - 1)).astype(np.int64)
    end = np.round(np.clip(end, 0, size)).astype(np.int64)
    return np.hstack([start, np.maximum(end, start + 1)]), np.flatnonzero(visible)


def place_labels(
    boxes: np.ndarray, text_shapes: Sequence[tuple[int, ...]], image: np.ndarray
) -> list[tuple[int, int]]:
    """Return the upper left corners (x, y) of labels: at their boxes, with little overlap."""
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
    room = np.array(image.shape[1::-1]) - sizes
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
    """Return how many pixels boxes (..., 4) share, by broadcasting."""
    start = np.maximum(first[..., :2], second[..., :2])
    end = np.minimum(first[..., 2:], second[..., 2:])
    width, height = np.moveaxis((end - start).clip(0), -1, 0)
    return width * height


def label_size(text_shape: tuple[int, ...]) -> tuple[int, int]:
    """Return height and width of a label around a text."""
    height, width = text_shape
    return height + 2, width + 2 * round(height * 0.28)


# Lines and letters grow with the square root of an image's side, so that they do not cover a small
# image. In images larger than screens they grow with the side, to be visible in a reduced view.


def font_size(image: np.ndarray) -> int:
    return max(round(max(0.46 * side(image) ** 0.5, side(image) / 100)), MIN_FONT_SIZE)


def line_width(image: np.ndarray) -> int:
    return max(round(max(side(image) ** 0.5 / 13, side(image) / 800)), 1)


def thin_width(image: np.ndarray) -> int:
    return max(line_width(image) // 2, 1)


def side(image: np.ndarray) -> float:
    """Return the side of a square with as many pixels; at most 3 times the shorter side."""
    height, width = image.shape[:2]
    return min((height * width) ** 0.5, 3 * min(height, width))


def has_room_for_text(image: np.ndarray) -> bool:
    return line_height(font_size(image)) <= min(image.shape[:2]) * TEXT_SHARE


def assign_shades(boxes: np.ndarray, labels: np.ndarray) -> list[int]:
    """Return each object's shade: 0, but different ones for touching objects of one class."""
    shades = np.zeros(len(boxes), np.int64)
    margin = CLOSENESS * np.minimum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])
    grown = boxes + margin[:, None] * (-1, -1, 1, 1)
    # By place, not by score: places change less from frame to frame of a video.
    places = boxes[:, 0] + boxes[:, 2]
    order = np.argsort(places, kind='stable')
    grown, labels, places = grown[order], labels[order], places[order]
    reach = 2 * (grown[:, 2] - grown[:, 0]).max(initial=0)
    for index, box in enumerate(grown):
        # Boxes farther left than the widest box reaches are not near.
        others = slice(np.searchsorted(places, places[index] - reach), index)
        near = (overlaps(box, grown[others]) > 0) & (labels[others] == labels[index])
        taken = np.bincount(shades[others][near], minlength=len(SHADES))
        shades[index] = taken.argmin()
    return shades[np.argsort(order)].tolist()


def shade_of(color: BGR, shade: int) -> BGR:
    """Return a variant of a color, close enough to recognize the class."""
    hue_shift, white, black = SHADES[shade]
    if not shade:
        return color
    hue, saturation, value = cv2.cvtColor(np.uint8([[color]]), cv2.COLOR_BGR2HSV)[0, 0].astype(int)
    shifted = np.uint8([[((hue + hue_shift) % 180, saturation, value)]])
    color = cv2.cvtColor(shifted, cv2.COLOR_HSV2BGR)[0, 0]
    return lighten(tuple(round(int(channel) * (1 - black)) for channel in color), white)


def lighten(color: BGR, share: float) -> BGR:
    """Return a color, moved towards white."""
    return tuple(round(channel + (255 - channel) * share) for channel in color)


def readable_on(color: BGR) -> BGR:
    """Return white if its contrast is at least 3:1, as WCAG 2 computes it, else black."""
    blue, green, red = ((channel / 255) ** 2.2 for channel in color)
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return (0, 0, 0) if luminance > 0.3 else (255, 255, 255)
