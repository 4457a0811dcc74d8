"""Reading image files of every kind as the arrays that models are given.

Pillow reads what OpenCV, which reads the images of training, does not: animations, CMYK and AVIF;
of JPEG and PNG both give the same values. As in training, color profiles are not applied.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import cv2
import numpy as np
from PIL import ExifTags, Image

from backbones.errors import IMAGE_DECODE_ERRORS, InputError

from .inputs import explain_os_error

# More could not be worked on: an image this large takes 3 GiB as an array.
MAX_PIXELS = 2**30
# Pillow's own limit, for web servers, refuses what satellites and microscopes give.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS

# Pillow's readers that are tried. Others take almost any bytes for an image, or start programs.
FORMATS = (
    *('JPEG', 'PNG', 'WEBP', 'GIF', 'TIFF', 'BMP', 'AVIF'),
    *('MPO', 'JPEG2000', 'PPM', 'QOI', 'HEIF'),
)

# Of these, several images in a file follow each other in time. In the others they are pages of a
# document, or the same moment seen again (the MPO of phones).
ANIMATED_FORMATS = ('GIF', 'PNG', 'WEBP', 'AVIF')

# How files begin that hold an image, whole or not.
SIGNATURES = (
    *(b'\xff\xd8\xff', b'\x89PNG\r\n', b'GIF8', b'II*\0', b'MM\0*', b'qoif'),
    *(b'\xff\x4f\xff\x51', b'\0\0\0\x0cjP  '),
)
HEIC_BRANDS = (b'heic', b'heix', b'heim', b'heis', b'hevc', b'hevx', b'mif1', b'msf1')

# Seconds. Browsers show a frame that asks for less than this as long as DEFAULT_DURATION: such
# files were made for programs that could not be faster.
MIN_DURATION = 0.011
DEFAULT_DURATION = 0.1

# What to do with the stored pixels, by the EXIF orientation.
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class TimedImage(NamedTuple):
    """One frame of a video, animation or camera.

    Attributes:
        index: Which frame from the first one on that was read; what is missing was left out.
        time: When it is shown, in seconds from the beginning.
        pts: The same in units of the source's time base; of animations and cameras milliseconds.
        duration: For how long, in the same units; None where it is not known yet.
        image: (height, width, 3), uint8, BGR, upright. It may be drawn on.
    """

    index: int
    time: float
    pts: int
    duration: int | None
    image: np.ndarray


class NotAnImage(InputError):
    """A file that is not an image of any kind that is known here."""


def read_image(file: str | Path | BinaryIO) -> np.ndarray:
    """Read an image as it is meant to be seen: (height, width, 3), uint8, BGR.

    It is rotated as its EXIF data says. Transparent parts are white. Samples of more than 8 bits
    are scaled to 8. Of a file with several images the first is taken.

    Args:
        file: A path, or a binary file that can seek; it stays open.

    Raises:
        InputError: The file cannot be read; the message says why.
    """
    with ImageFile(file) as image:
        return image.read()


class ImageFile(AbstractContextManager):
    """An image file that is open; its pixels are read when they are asked for.

    Args:
        file: A path, or a binary file that can seek; the latter is left open.

    Attributes:
        format: Pillow's name for the file's format, such as 'JPEG'.
        size: (height, width) of the upright image.
        is_animation: Whether the file has frames that follow each other in time.

    Raises:
        NotAnImage: The file is something else.
        InputError: The file is missing, empty, corrupt or too large; the message says which.
    """

    def __init__(self, file: str | Path | BinaryIO):
        self._opened = None
        if isinstance(file, str | os.PathLike):
            try:
                file = self._opened = open(file, 'rb')  # noqa: SIM115
            except (OSError, ValueError) as error:
                raise InputError(explain_os_error(error)) from error
        try:
            with _plain_errors():
                self._image = image = _open(file)
                self.format = image.format
                self.is_animation = image.format in ANIMATED_FORMATS and getattr(
                    image, 'is_animated', False
                )
                # That of a PNG may be behind its pixels; asking would read them.
                knows = image.format != 'PNG' or 'exif' in image.info
                self._orientation = _orientation(image) if knows else 1
                width, height = image.size
                self.size = (width, height) if self._orientation >= 5 else (height, width)
        except BaseException:
            self.close()
            raise

    def read(self) -> np.ndarray:
        """The image, or the first one of several, as :func:`read_image` returns it."""
        with _plain_errors():
            if self.is_animation:
                self._image.seek(0)
            self._image.load()
            return _to_bgr(self._image, _orientation(self._image))

    def frames(self) -> Iterator[TimedImage]:
        """The frames of an animation, whole images of one size.

        Raises:
            InputError: A frame is corrupt; those before it have been given.
        """
        time = 0.0
        for index in range(self.num_frames):
            try:
                with _plain_errors():
                    self._image.seek(self._first_frame + index)
                    self._image.load()
                    pixels = _to_bgr(self._image, self._orientation)
            except InputError as error:
                raise InputError(f'{error}; {index} frames before that were read') from error
            duration = self._image.info.get('duration', 0) / 1000
            duration = duration if duration >= MIN_DURATION else DEFAULT_DURATION
            yield TimedImage(index, time, round(time * 1000), round(duration * 1000), pixels)
            time += duration

    @property
    def num_frames(self) -> int:
        """How many frames an animation has; a GIF is read through for it, but not decoded."""
        with _plain_errors():
            return self._image.n_frames - self._first_frame

    def close(self) -> None:
        """Close the file if it was opened here."""
        if self._opened is not None:
            self._opened.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _first_frame(self) -> int:
        # The first image of such a PNG is for programs that cannot show the animation.
        return 1 if self._image.info.get('default_image') else 0


def begins_like_image(beginning: bytes) -> bool:
    """Whether a file with these first 12 bytes holds an image."""
    return (
        beginning.startswith(SIGNATURES)
        or (beginning[:4] == b'RIFF' and beginning[8:12] == b'WEBP')
        or (beginning[4:8] == b'ftyp' and beginning[8:12] in (b'avif', b'avis', *HEIC_BRANDS))
    )


def _open(file: BinaryIO) -> Image.Image:
    """Pillow's view of the file: the header is read, the pixels are not."""
    file.seek(0)
    beginning = file.read(12)
    if not beginning:
        raise InputError('is empty (0 bytes)')
    if beginning[4:8] == b'ftyp' and beginning[8:12] in HEIC_BRANDS:
        _register_heic()
    Image.init()
    try:
        image = Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])
    except IMAGE_DECODE_ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise InputError(explain_os_error(error)) from error
        if not begins_like_image(beginning):
            raise NotAnImage('is not an image') from error
        if 'truncated' in str(error).lower():
            raise
        raise InputError(
            'begins like an image, but is cut short, corrupt or of a kind that cannot be read; '
            'save it as JPEG or PNG'
        ) from error
    if image.width * image.height > MAX_PIXELS:
        raise InputError(
            f'is too large: {image.width}x{image.height} pixels, and {MAX_PIXELS:,} are the most '
            'that can be read; cut it into parts first'
        )
    return image


def _register_heic() -> None:
    try:
        from pillow_heif import register_heif_opener
    except ImportError as error:
        raise InputError(
            'is a HEIC image: pip install pillow-heif, or convert it to JPEG or PNG'
        ) from error
    register_heif_opener()


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8."""
    # Pillow rotates a TIFF by itself.
    if image.format != 'TIFF':
        # Corrupt EXIF data does not hide the image; ImageOps.exif_transpose would stumble over it.
        with suppress(*IMAGE_DECODE_ERRORS):
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            return orientation if orientation in TRANSPOSITIONS else 1
    return 1


def _to_bgr(image: Image.Image, orientation: int) -> np.ndarray:
    if _is_deep_gray(image):
        image = _to_8_bits(image)
    elif 'A' in image.getbands() or 'transparency' in image.info:
        white = Image.new('RGBA', image.size, 'white')
        image = Image.alpha_composite(white, image.convert('RGBA'))
    if image.mode not in ('L', 'RGB'):
        image = image.convert('RGB')
    if orientation > 1:
        image = image.transpose(TRANSPOSITIONS[orientation])
    to_bgr = cv2.COLOR_GRAY2BGR if image.mode == 'L' else cv2.COLOR_RGB2BGR
    return cv2.cvtColor(np.asarray(image), to_bgr)


def _is_deep_gray(image: Image.Image) -> bool:
    """Whether the samples are gray and of 9 to 16 bits.

    Raises:
        InputError: There is no telling which of their values are black and white, or Pillow does
            not read them rightly.
    """
    if image.format == 'TIFF' and image.tag_v2.get(ExifTags.Base.PlanarConfiguration) == 2:
        # Pillow takes the samples of such a file for 8 bits each, and says nothing.
        is_deep = max(image.tag_v2.get(ExifTags.Base.BitsPerSample, (8,))) > 8
        if is_deep and image.info.get('compression') == 'raw':
            raise InputError(
                'has its colors in separate planes of more than 8 bits, uncompressed, which '
                'cannot be read; save it as PNG, or as TIFF with interleaved colors'
            )
    min_sample, max_sample = image.getextrema() if image.mode in ('I', 'F') else (0, 0)
    if image.mode == 'F' or min_sample < 0 or max_sample >= 2**16:
        raise InputError(
            f'has 32-bit samples from {min_sample:g} to {max_sample:g}, and nothing says which of '
            'them are black and white; save it with 8 or 16 bits a sample first'
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
    if 'transparency' in image.info:
        gray[samples == image.info['transparency']] = 255
    return Image.fromarray(gray)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Whatever Pillow raises becomes an InputError."""
    try:
        yield
    except InputError:
        raise
    except MemoryError as error:
        raise InputError('is too large for the memory of this computer') from error
    except Image.DecompressionBombError as error:
        raise InputError(f'is too large: more than {MAX_PIXELS:,} pixels') from error
    except IMAGE_DECODE_ERRORS as error:
        if 'truncated' in str(error).lower():
            raise InputError('is cut short: the file ends before the image does') from error
        raise InputError(f'is corrupt or cut short ({error})') from error
