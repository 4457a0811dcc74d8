"""One picture, with its label map if it has one, read as a training reads it."""

import io
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import mmcv
import numpy as np
from PIL import ExifTags, Image

from backbones.errors import IMAGE_DECODE_ERRORS

from .findings import ERROR, WARNING, Finding

IGNORE_INDEX = 255
# Where the decoders of a worker process write what they complain about.
decoder_output: list[object] = []


@dataclass(frozen=True)
class PictureJob:
    """What a worker process is told about a picture.

    Attributes:
        path: The file.
        name: What the data set calls it.
        size: (width, height) that the annotations say; None where they say nothing.
        color_type: mmcv's flag for reading it.
        backend: mmcv's decoder.
        label_map: Its label map, if it has one.
        num_classes: Number of classes in the label map.
        reduce_zero_label: Whether 0 means "unlabelled" and class k is stored as k + 1.
    """

    path: str
    name: str
    size: tuple[int, int] | None = None
    color_type: str = 'color'
    backend: str = 'cv2'
    label_map: str | None = None
    num_classes: int = 0
    reduce_zero_label: bool = False


def check_picture(job: PictureJob) -> list[Finding]:
    """All that is wrong with a picture and its label map."""
    findings = []
    shape, faults = read_picture(job)
    for severity, kind, reason in faults:
        findings.append(Finding(severity, kind, job.path, reason, picture=job.name))
    if job.label_map:
        for severity, kind, reason in check_label_map(job, shape):
            findings.append(Finding(severity, kind, job.label_map, reason, picture=job.name))
    return findings


Fault = tuple[str, str, str]


def read_picture(job: PictureJob) -> tuple[tuple[int, int] | None, list[Fault]]:
    """Decode a picture; returns its (height, width) and what is wrong: (severity, kind, reason)."""
    try:
        content = Path(job.path).read_bytes()
        fault = content_fault(content)
        if fault:
            return None, [(ERROR, 'unreadable picture', fault)]
        picture = mmcv.imfrombytes(content, flag=job.color_type, backend=job.backend)
        if picture is None:
            raise ValueError('it is of no format that can be read, or damaged')
    except Exception as error:
        decoder_complaints()
        reason = f'{type(error).__name__}: {error}'.strip().splitlines()[0]
        return None, [(ERROR, 'unreadable picture', reason)]
    shape = picture.shape[:2]
    faults = []
    complaints = decoder_complaints()
    if complaints:
        faults.append((WARNING, 'damaged picture', f'read, but the decoder says: {complaints}'))
    if job.size and tuple(job.size) != shape[::-1]:
        faults.append((ERROR, 'picture of another size', size_reason(job, shape)))
    return shape, faults


def content_fault(content: bytes) -> str | None:
    """Whether a picture file is empty or ends too early; None if it does not.

    Some versions of OpenCV fill in grey for what a JPEG lacks. Within its data the bytes of a
    marker cannot occur, so a whole file has an end of image after its last start of scan; what
    comes earlier may be a thumbnail's.
    """
    if not content:
        return 'the file is empty'
    if content.startswith(b'\xff\xd8') and content.rfind(b'\xff\xd9') < content.rfind(b'\xff\xda'):
        return 'the file is truncated: it has no end of image'
    if content.startswith(b'\x89PNG') and b'IEND' not in content[-1024:]:
        return 'the file is truncated: it has no IEND'
    if content.startswith(b'\x89PNG') and b'acTL' in content.partition(b'IDAT')[0]:
        return animation_fault(content)
    return None


def animation_fault(content: bytes) -> str | None:
    """Whether an animated PNG is damaged; None if it is not.

    OpenCV 4.12 does not survive an unknown filter in the pixels of one: the process ends, or hangs.
    """
    try:
        with Image.open(io.BytesIO(content), formats=['PNG']) as picture:
            for index in range(picture.n_frames):
                picture.seek(index)
                picture.load()
    except (*IMAGE_DECODE_ERRORS, Image.DecompressionBombError) as error:
        return f'the animated PNG is damaged: {error}'
    return None


def size_reason(job: PictureJob, shape: tuple[int, int]) -> str:
    height, width = shape
    reason = (
        f'it is {width}x{height} (width x height), but annotated as {job.size[0]}x{job.size[1]}'
    )
    if (height, width) != tuple(job.size):
        return reason
    turned = False
    # Pillow does not know all that OpenCV reads.
    with suppress(*IMAGE_DECODE_ERRORS), Image.open(job.path) as picture:
        turned = header_size(picture) != picture.size
    return f'{reason}: ' + (
        'its EXIF orientation turns it by 90 degrees when it is read'
        if turned
        else 'width and height are exchanged'
    )


def header_size(picture: Image.Image) -> tuple[int, int]:
    """(width, height) of a picture that was opened, turned as its EXIF orientation says."""
    turned = picture.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return picture.size[::-1] if turned else picture.size


def check_label_map(job: PictureJob, shape: tuple[int, int] | None) -> Iterator[Fault]:
    """What is wrong with a label map: (severity, kind, reason)."""
    try:
        with Image.open(job.label_map) as picture:
            form, mode = picture.format, picture.mode
            labels = np.asarray(picture)
    except FileNotFoundError:
        yield ERROR, 'missing label map', f'it is not there; {job.path} needs it'
        return
    except Exception as error:
        yield ERROR, 'unreadable label map', f'{type(error).__name__}: {error}'
        return
    if labels.ndim != 2:
        yield (
            ERROR,
            'label map in colour',
            f'its mode is {mode}; a label map has one channel with the number of a class',
        )
        return
    if form == 'JPEG':
        yield ERROR, 'label map as JPEG', 'JPEG changes the numbers; it has to be a PNG'
        return
    if shape and labels.shape != shape:
        yield (
            ERROR,
            'label map of another size',
            f'it is {size_text(labels.shape)}, its picture {size_text(shape)}',
        )
    if min(labels.shape) == 1:
        reason = f'it is {size_text(labels.shape)}: mmseg cannot read a single row or column'
        yield ERROR, 'one-pixel label map', reason
    if mode == 'P':
        yield WARNING, 'label map with a palette', 'the index into the palette is the label'
    if mode.startswith(('I', 'F')):
        if not np.array_equal(labels, labels.astype(np.uint8)):
            yield (
                ERROR,
                '16-bit label map',
                f'it holds {labels.max()}, and mmseg keeps 8 bits of it, {int(labels.max()) % 256}',
            )
            return
        yield WARNING, '16-bit label map', 'its labels fit into 8 bits, so nothing is lost'
    yield from check_labels(labels.astype(np.uint8), job)


def check_labels(labels: np.ndarray, job: PictureJob) -> Iterator[Fault]:
    first = int(job.reduce_zero_label)
    counts = np.bincount(labels.ravel(), minlength=256)
    ignored = [0, IGNORE_INDEX] if job.reduce_zero_label else [IGNORE_INDEX]
    allowed = np.zeros(256, bool)
    allowed[first : first + job.num_classes] = True
    allowed[ignored] = True
    wrong = np.flatnonzero((counts > 0) & ~allowed)
    if len(wrong):
        yield (
            ERROR,
            'label of no class',
            f'{int(counts[wrong].sum())} pixels have the labels {wrong[:10].tolist()}; the '
            f'{job.num_classes} classes are {first} to {first + job.num_classes - 1}'
            + (', after 0 for "unlabelled" (reduce_zero_label=True)' if first else '')
            + f', and {IGNORE_INDEX} is left out',
        )
    elif counts[ignored].sum() == labels.size:
        yield (
            WARNING,
            'label map without labels',
            'all is ignored: nothing is learned from it',
        )


def size_text(shape: tuple[int, ...]) -> str:
    return f'{shape[1]}x{shape[0]} (width x height)'


def catch_decoder_warnings() -> None:
    """Have the decoders' C libraries write to a file, for they name no picture themselves."""
    output = tempfile.TemporaryFile()  # noqa: SIM115, it stays open as long as the process
    sys.stderr.flush()
    os.dup2(output.fileno(), 2)
    decoder_output.append(output)


def decoder_complaints() -> str:
    """What the decoders have written since the last picture, in one line."""
    if not decoder_output:
        return ''
    output = decoder_output[0]
    output.seek(0)
    text = output.read().decode(errors='replace')
    output.seek(0)
    output.truncate()
    # libpng finds fault with colour profiles of sound files.
    lines = [line.strip() for line in text.splitlines() if 'iCCP' not in line]
    return '; '.join(line for line in lines if line)[:200]
