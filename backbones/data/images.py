"""Check one image and its segmentation map, reading them as a training does."""

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

IMAGE_SUFFIXES = {'.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff'}
# Pillow refuses images that decompress to a huge size.
PILLOW_ERRORS = (*IMAGE_DECODE_ERRORS, Image.DecompressionBombError)


def check_sample(sample: Sample) -> tuple[list[tuple[str, str, str, str]], set[int]]:
    """Return what is wrong with an image and its segmentation map, and the classes in the map.

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
    """Decode an image; return its size and what is wrong."""
    is_dark = False
    try:
        content = Path(sample.path).read_bytes()
        reason = content_fault(content)
        if not reason:
            image = mmcv.imfrombytes(content, flag=sample.color_type, backend=sample.backend)
            reason = 'it has no format that can be read, or is corrupt' if image is None else None
            # Cameras use 10 to 14 of 16 bits, but only the upper 8 are read.
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
        faults.append((WARNING, 'corrupt image', f'read, but the decoder warns: {complaints}'))
    if is_dark:
        reason = f'read as 8 bits, its values are only 0 to {image.max()}: stretch the 16 bits'
        faults.append((WARNING, 'dark 16-bit image', reason))
    if sample.size and tuple(sample.size) != shape[::-1]:
        faults.append((ERROR, 'image of another size', size_reason(sample, shape)))
    return shape, faults


def content_fault(content: bytes) -> str | None:
    """Return whether an image file is empty, truncated or a corrupt animation; None if not.

    Some versions of OpenCV fill the missing part of a JPEG with gray.
    """
    if not content:
        return 'the file is empty'
    if content.startswith(b'\xff\xd8') and not has_end(content):
        return 'the file is truncated: it has no end of image marker'
    if content.startswith(b'\x89PNG') and b'IEND' not in content[-1024:]:
        return 'the file is truncated: it has no IEND'
    if content.startswith(b'\x89PNG') and b'acTL' in content.partition(b'IDAT')[0]:
        # OpenCV 4.12 crashes or hangs on an unknown filter in the pixels of an animation.
        try:
            with Image.open(io.BytesIO(content), formats=['PNG']) as image:
                for index in range(image.n_frames):
                    image.seek(index)
                    image.load()
        except PILLOW_ERRORS as error:
            return f'the animated PNG is corrupt: {error}'
    return None


def has_end(jpeg: bytes) -> bool:
    """Return whether an end of image follows the first scan, whose data cannot contain its bytes.

    A thumbnail in an earlier segment has one too; after it may follow a phone's video.
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
        reason += ': width and height are swapped, maybe by EXIF orientation, which is applied'
    return reason


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return (width, height) of an opened image as mmcv reads it, after its EXIF rotation."""
    # Pillow rotates a TIFF by itself, and OpenCV does not rotate WebP.
    rotates = image.format in ('JPEG', 'MPO', 'PNG')
    rotated = rotates and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return image.size[::-1] if rotated else image.size


def check_seg_map(sample: Sample, shape: Shape | None, labeled: set[int]) -> Iterator[Fault]:
    """Yield what is wrong with the map of an image of this shape; add its classes to labeled."""
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
        reason = f'its mode is {mode}; it must have one channel with the numbers of classes'
        yield ERROR, 'segmentation map in color', reason
        return
    if form == 'JPEG':
        reason = 'JPEG changes the numbers; it must be a PNG'
        yield ERROR, 'segmentation map as JPEG', reason
        return
    if shape and labels.shape != shape:
        reason = f'it is {size_text(labels.shape)}, its image {size_text(shape)}'
        yield ERROR, 'segmentation map of another size', reason
    if mode.startswith(('I', 'F')) and len(lost := labels[~np.isin(labels, np.arange(256))]):
        reason = f'it holds {lost[0]}, which does not fit into the 8 bits that mmseg keeps'
        yield ERROR, '16-bit segmentation map', reason
        return
    yield from check_labels(labels.astype(np.uint8), sample.labels, labeled)


def check_labels(labels: np.ndarray, rules: LabelRules, labeled: set[int]) -> Iterator[Fault]:
    """Yield a fault if labels belong to no class, or if all are ignored."""
    counts = np.bincount(labels.ravel(), minlength=256)
    classes = rules.classes_of_values()
    labeled.update(classes[(counts > 0) & (classes != IGNORED)].tolist())
    wrong = np.flatnonzero((counts > 0) & (classes == NO_CLASS))
    if len(wrong):
        pixels = counts[wrong].sum()
        reason = f'{pixels} pixels have the labels {wrong[:10].tolist()}, of no class: {rules}'
        yield ERROR, 'label of no class', reason
    elif not labeled:
        reason = 'all pixels are ignored: nothing is learned from it'
        yield WARNING, 'segmentation map without labels', reason


def size_text(shape: Shape) -> str:
    return f'{shape[1]}x{shape[0]} (width x height)'


def catch_decoder_warnings() -> None:
    """Redirect the messages of the decoders' C libraries, which name no image, to a file."""
    # The duplicate stays open when the file itself is closed.
    with tempfile.TemporaryFile() as output:
        os.dup2(output.fileno(), 2)


def decoder_complaints() -> str:
    """Return the decoders' messages in a worker process since the last image, in one line."""
    if multiprocessing.parent_process() is None:
        return ''
    text = os.pread(2, 2**20, 0)
    os.ftruncate(2, 0)
    os.lseek(2, 0, os.SEEK_SET)
    # libpng warns about color profiles in intact files.
    lines = [line.strip() for line in text.decode(errors='replace').splitlines()]
    return '; '.join(line for line in lines if line and 'iCCP' not in line)[:200]
