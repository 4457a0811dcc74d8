"""One image, with its segmentation map if it has one, read as a training reads it."""

import io
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import mmcv
import numpy as np
from PIL import ExifTags, Image

from backbones.errors import IMAGE_DECODE_ERRORS

from .findings import ERROR, WARNING, Sample
from .labels import IGNORED, NO_CLASS, LabelRules

Fault = tuple[str, str, str]  # severity, kind, reason
Shape = tuple[int, int]  # height, width

# Pillow refuses what decompresses to very much.
PILLOW_ERRORS = (*IMAGE_DECODE_ERRORS, Image.DecompressionBombError)


def check_sample(sample: Sample) -> tuple[list[tuple[str, str, str, str]], set[int]]:
    """What is wrong with an image and its segmentation map, and the classes that the map has.

    A fault is severity, kind, reason and file.
    """
    shape, faults, labeled = None, [], set()
    if not os.path.isfile(sample.path):
        faults = [(ERROR, 'missing image', 'it is not there')]
    elif sample.decode:
        shape, faults = check_image(sample)
    else:
        with suppress(*PILLOW_ERRORS), Image.open(sample.path) as image:
            shape = upright_size(image)[::-1]
    found = [(*fault, sample.path) for fault in faults]
    if sample.seg_map:
        found += [(*fault, sample.seg_map) for fault in check_seg_map(sample, shape, labeled)]
    return found, labeled


def check_image(sample: Sample) -> tuple[Shape | None, list[Fault]]:
    """Decode an image; returns its size and what is wrong."""
    is_dark = False
    try:
        content = Path(sample.path).read_bytes()
        reason = content_fault(content)
        if not reason:
            image = mmcv.imfrombytes(content, flag=sample.color_type, backend=sample.backend)
            reason = 'it is of no format that can be read, or corrupt' if image is None else None
            # Cameras fill 10 to 14 of 16 bits, of which the upper 8 are read.
            if not reason and image.dtype == np.uint8 and image.max() < 64:
                whole = mmcv.imfrombytes(content, flag='unchanged', backend='cv2')
                is_dark = whole is not None and whole.dtype == np.uint16
    except Exception as error:
        reason = f'{type(error).__name__}: {error}'.strip().splitlines()[0]
    complaints = decoder_complaints()
    if reason:
        return None, [(ERROR, 'unreadable image', reason)]
    shape, faults = image.shape[:2], []
    if complaints:
        faults.append((WARNING, 'corrupt image', f'read, but the decoder says: {complaints}'))
    if is_dark:
        reason = f'read as 8 bits, it has the values 0 to {image.max()} only: stretch the 16 first'
        faults.append((WARNING, 'dark 16-bit image', reason))
    if sample.size and tuple(sample.size) != shape[::-1]:
        faults.append((ERROR, 'image of another size', size_reason(sample, shape)))
    return shape, faults


def content_fault(content: bytes) -> str | None:
    """Whether an image file is empty, truncated or a corrupt animation; None if it is not.

    Some versions of OpenCV fill in gray for what a JPEG lacks.
    """
    if not content:
        return 'the file is empty'
    if content.startswith(b'\xff\xd8') and not has_end(content):
        return 'the file is truncated: it has no end of image'
    if content.startswith(b'\x89PNG') and b'IEND' not in content[-1024:]:
        return 'the file is truncated: it has no IEND'
    if content.startswith(b'\x89PNG') and b'acTL' in content.partition(b'IDAT')[0]:
        # OpenCV 4.12 ends the process, or hangs, on an unknown filter in the pixels of one.
        try:
            with Image.open(io.BytesIO(content), formats=['PNG']) as image:
                for index in range(image.n_frames):
                    image.seek(index)
                    image.load()
        except PILLOW_ERRORS as error:
            return f'the animated PNG is corrupt: {error}'
    return None


def has_end(jpeg: bytes) -> bool:
    """Whether an end of image follows the first scan, in whose data its bytes cannot occur.

    A thumbnail in a segment before it has one too; what follows may be a phone's video.
    """
    at = 2
    while jpeg[at : at + 1] == b'\xff' and jpeg[at + 1 : at + 2] != b'\xda':
        is_fill = jpeg[at + 1 : at + 2] == b'\xff'
        at += 1 if is_fill else 2 + int.from_bytes(jpeg[at + 2 : at + 4], 'big')
    return jpeg.find(b'\xff\xd9', at) >= 0


def size_reason(sample: Sample, shape: Shape) -> str:
    width, height = sample.size
    reason = f'it is {size_text(shape)}, but annotated as {width}x{height}'
    if shape == (width, height):
        reason += ': width and height are exchanged, as by an EXIF orientation, which is followed'
    return reason


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of an image that was opened, rotated as its EXIF orientation says."""
    rotated = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return image.size[::-1] if rotated else image.size


def check_seg_map(sample: Sample, shape: Shape | None, labeled: set[int]) -> Iterator[Fault]:
    """What is wrong with the segmentation map of an image of a size; notes the classes it has."""
    try:
        with Image.open(sample.seg_map) as image:
            form, mode = image.format, image.mode
            labels = np.asarray(image)
    except FileNotFoundError:
        yield ERROR, 'missing segmentation map', f'it is not there; {sample.path} needs it'
        return
    except Exception as error:
        yield ERROR, 'unreadable segmentation map', f'{type(error).__name__}: {error}'
        return
    if labels.ndim != 2:
        reason = f'its mode is {mode}; it has to have one channel with the number of a class'
        yield ERROR, 'segmentation map in color', reason
        return
    if form == 'JPEG':
        reason = 'JPEG changes the numbers; it has to be a PNG'
        yield ERROR, 'segmentation map as JPEG', reason
        return
    if shape and labels.shape != shape:
        reason = f'it is {size_text(labels.shape)}, its image {size_text(shape)}'
        yield ERROR, 'segmentation map of another size', reason
    if min(labels.shape) == 1:
        reason = f'it is {size_text(labels.shape)}: mmseg cannot read a single row or column'
        yield ERROR, 'one-pixel segmentation map', reason
    if mode == 'P':
        reason = 'the index into the palette is the label'
        yield WARNING, 'segmentation map with a palette', reason
    if mode.startswith(('I', 'F')):
        if len(lost := labels[~np.isin(labels, np.arange(256))]):
            reason = f'it holds {lost[0]}, which does not fit into the 8 bits that mmseg keeps'
            yield ERROR, '16-bit segmentation map', reason
            return
        reason = 'its labels fit into 8 bits, so nothing is lost'
        yield WARNING, '16-bit segmentation map', reason
    yield from check_labels(labels.astype(np.uint8), sample.labels, labeled)


def check_labels(labels: np.ndarray, rules: LabelRules, labeled: set[int]) -> Iterator[Fault]:
    """Whether there are labels that no class has, or no others than the ignored one."""
    counts = np.bincount(labels.ravel(), minlength=256)
    classes = rules.classes_of_values()
    labeled.update(classes[(counts > 0) & (classes != IGNORED)].tolist())
    wrong = np.flatnonzero((counts > 0) & (classes == NO_CLASS))
    if len(wrong):
        pixels = counts[wrong].sum()
        reason = f'{pixels} pixels have the labels {wrong[:10].tolist()}, of no class: {rules}'
        yield ERROR, 'label of no class', reason
    elif not labeled:
        reason = 'all is ignored: nothing is learned from it'
        yield WARNING, 'segmentation map without labels', reason


def size_text(shape: Shape) -> str:
    return f'{shape[1]}x{shape[0]} (width x height)'


def catch_decoder_warnings() -> None:
    """Have the decoders' C libraries write to a file, for they name no image themselves."""
    # What they write to stays open when the file's own number is closed.
    with tempfile.TemporaryFile() as output:
        os.dup2(output.fileno(), 2)


def decoder_complaints() -> str:
    """What the decoders of a worker process have written since the last image, in one line."""
    if multiprocessing.parent_process() is None:
        return ''
    text = os.pread(2, 2**20, 0)
    os.ftruncate(2, 0)
    os.lseek(2, 0, os.SEEK_SET)
    # libpng finds fault with color profiles of intact files.
    lines = [line.strip() for line in text.decode(errors='replace').splitlines()]
    return '; '.join(line for line in lines if line and 'iCCP' not in line)[:200]
