"""Read image files of every kind as arrays for models.

For JPEG and PNG, arrays equal those of OpenCV, which reads the images in training.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from backbones.errors import IMAGE_DECODE_ERRORS, InputError, NotMediaError, reason_of

# The largest image that can be processed: it takes 3 GiB as an array.
MAX_PIXELS = 2**30
# Pixels that are taken from Pillow at a time.
STRIP_PIXELS = 2**24

# Pillow's readers that are tried. Others take almost any bytes for an image, or start programs.
FORMATS = (
    *('JPEG', 'PNG', 'WEBP', 'GIF', 'TIFF', 'BMP', 'AVIF'),
    *('MPO', 'JPEG2000', 'PPM', 'QOI', 'HEIF'),
)
# In these, several images in a file follow each other in time. In the others they are pages of a
# document, or show the same moment again (the MPO of phones).
ANIMATED_FORMATS = ('GIF', 'PNG', 'WEBP', 'AVIF')
HEIC_BRANDS = (b'heic', b'heix', b'heim', b'heis', b'hevc', b'hevx', b'mif1', b'msf1')
# Bytes that begins_like_image needs.
SIGNATURE_BYTES = 16

# Seconds. Like in browsers, a frame with a shorter duration is shown for DEFAULT_DURATION: such
# files were made for programs that could not be faster.
MIN_DURATION = 0.011
DEFAULT_DURATION = 0.1


class TimedImage(NamedTuple):
    """One frame of a video, animation or camera."""

    # The number of the frame, from the first that was read on; frames left out count too.
    index: int
    # When it is shown, in seconds from the beginning.
    time: float
    # The same in units of the source's time base; milliseconds for animations and cameras.
    pts: int
    # For how long, in the same units; None if not known yet.
    duration: int | None
    # (height, width, 3), uint8, BGR, upright. It may be drawn on.
    image: np.ndarray


def read_image(file: str | Path | BinaryIO) -> np.ndarray:
    """Read a file's first image, upright and on white: (height, width, 3), uint8, BGR."""
    with open_image(file) as image:
        image.load()
        return to_bgr(image)


@contextmanager
def open_image(file: str | Path | BinaryIO) -> Iterator[Image.Image]:
    """Open the header of an image, from a path or a binary file that can seek.

    Raises NotMediaError if it is no image, InputError in place of what Pillow raises in the block.
    """
    try:
        is_path = isinstance(file, str | os.PathLike)
        with open(file, 'rb') if is_path else nullcontext(file) as stream:
            yield _identify(stream)
    except InputError:
        raise
    except MemoryError as error:
        raise InputError('is too large for the memory of this computer') from error
    except IMAGE_DECODE_ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise InputError(f'cannot be read: {reason_of(error)}') from error
        raise InputError(
            f'is cut short, corrupt, or an image of a kind that cannot be read ({error}); if other '
            'programs show it, save it as JPEG or PNG'
        ) from error


def begins_like_image(beginning: bytes) -> bool:
    """Return whether a file may be an image; the first letters of a text may be the same."""
    Image.init()
    return is_heic(beginning) or any(
        Image.OPEN[name][1](beginning) for name in FORMATS if name in Image.OPEN
    )


def is_heic(beginning: bytes) -> bool:
    return beginning[4:8] == b'ftyp' and beginning[8:12] in HEIC_BRANDS


def is_animation(image: Image.Image) -> bool:
    """Return whether an opened image has frames that follow each other in time."""
    return image.format in ANIMATED_FORMATS and getattr(image, 'is_animated', False)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return height and width of an opened image after it is rotated."""
    # Pillow rotates a TIFF by itself. The EXIF data of a PNG may be behind its pixels; asking would
    # read them.
    if image.format != 'TIFF' and (image.format != 'PNG' or 'exif' in image.info):
        with suppress(*IMAGE_DECODE_ERRORS):
            if image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8):
                return image.size
    return image.size[::-1]


def read_frames(image: Image.Image) -> Iterator[TimedImage]:
    """Yield the frames of an opened animation, whole images of one size."""
    time = 0.0
    # The first image of such a PNG is for programs that cannot show the animation.
    first = 1 if image.info.get('default_image') else 0
    for index in range(image.n_frames - first):
        image.seek(first + index)
        image.load()
        duration = image.info.get('duration', 0) / 1000
        duration = duration if duration >= MIN_DURATION else DEFAULT_DURATION
        # A copy, since the next frame is drawn over this one.
        pixels = to_bgr(image.copy())
        yield TimedImage(index, time, round(time * 1000), round(duration * 1000), pixels)
        time += duration


def _identify(file: BinaryIO) -> Image.Image:
    file.seek(0)
    beginning = file.read(SIGNATURE_BYTES)
    if is_heic(beginning):
        try:
            from pillow_heif import register_heif_opener
        except ImportError as error:
            raise InputError(
                'is a HEIC image: pip install pillow-heif, or convert it to JPEG or PNG'
            ) from error
        register_heif_opener()
    Image.init()
    # Pillow's own limit, meant for web servers, refuses images of satellites and microscopes.
    Image.MAX_IMAGE_PIXELS = None
    try:
        image = Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])
    except UnidentifiedImageError as error:
        raise NotMediaError('is not an image that can be read; is it corrupt?') from error
    if image.width * image.height > MAX_PIXELS:
        raise InputError(
            f'is too large: {image.width}x{image.height} pixels, but at most {MAX_PIXELS:,} '
            'can be read; cut it into parts first'
        )
    return image


def to_bgr(image: Image.Image) -> np.ndarray:
    """Convert a loaded image, which is changed, to an array: upright, on white, in 8 bits."""
    # An image with corrupt EXIF data is still read.
    with suppress(*IMAGE_DECODE_ERRORS):
        ImageOps.exif_transpose(image, in_place=True)
    if _is_deep_gray(image):
        image = _to_8_bits(image)
    elif 'A' in image.getbands() or 'transparency' in image.info:
        white = Image.new('RGBA', image.size, 'white')
        image = Image.alpha_composite(white, image.convert('RGBA'))
    if image.mode not in ('L', 'RGB'):
        image = image.convert('RGB')
    code = cv2.COLOR_GRAY2BGR if image.mode == 'L' else cv2.COLOR_RGB2BGR
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    # Pillow copies an image twice to make an array; for a large image that would be gigabytes.
    step = max(STRIP_PIXELS // max(image.width, 1), 1)
    for top in range(0, image.height, step):
        bottom = min(top + step, image.height)
        is_whole = bottom - top == image.height
        strip = image if is_whole else image.crop((0, top, image.width, bottom))
        cv2.cvtColor(np.asarray(strip), code, dst=pixels[top:bottom])
    return pixels


def _is_deep_gray(image: Image.Image) -> bool:
    """Return whether samples are gray, with 9 to 16 bits; refuse what would be read wrongly."""
    bits = 8
    if image.format == 'TIFF':
        bits = max(image.tag_v2.get(ExifTags.Base.BitsPerSample, (8,)))
        is_planar = image.tag_v2.get(ExifTags.Base.PlanarConfiguration) == 2
        # Pillow reads the samples of such a file as 8 bits each, without an error.
        if is_planar and bits > 8 and image.info.get('compression') == 'raw':
            raise InputError(
                'has its colors in separate planes of more than 8 bits, which cannot be read; '
                'save it as PNG, or as TIFF with interleaved colors'
            )
    low, high = image.getextrema() if image.mode in ('I', 'F') else (0, 0)
    if image.mode == 'F' or low < 0 or bits > 16:
        raise InputError(
            f'has samples of 32 bits or with a sign, from {low:g} to {high:g}, but does not say '
            'which of them are black and white; save it with 8 or 16 bits per sample first'
        )
    return image.mode == 'I' or image.mode.startswith('I;16')


def _to_8_bits(image: Image.Image) -> Image.Image:
    samples = np.asarray(image)
    bits, white_is_zero = 16, False
    if image.format == 'TIFF':
        bits = min(image.tag_v2.get(ExifTags.Base.BitsPerSample, (16,))[0], 16)
        white_is_zero = image.tag_v2.get(ExifTags.Base.PhotometricInterpretation) == 0
    gray = (samples >> (bits - 8)).astype(np.uint8)
    if white_is_zero:
        gray = 255 - gray
    return Image.fromarray(gray)
