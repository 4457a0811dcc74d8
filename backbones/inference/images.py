"""Reading picture files of every kind as the arrays that models are given."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from PIL import ExifTags, Image

from backbones.errors import IMAGE_DECODE_ERRORS, InputError

from .inputs import explain_os_error

# More could not be worked on: a picture this large takes 3 GiB as an array.
MAX_PIXELS = 2**30

# Pillow's readers that are tried. Others take almost any bytes for a picture, or start programs.
FORMATS = (
    *('JPEG', 'PNG', 'WEBP', 'GIF', 'TIFF', 'BMP', 'AVIF'),
    *('MPO', 'JPEG2000', 'PPM', 'QOI'),
)

# Of these, several pictures in a file follow each other in time. In the others they are pages of a
# document, or the same moment seen again (the MPO of phones).
ANIMATED_FORMATS = ('GIF', 'PNG', 'WEBP', 'AVIF')

# How files begin that hold a picture, whole or not.
SIGNATURES = {
    b'\xff\xd8\xff': 'JPEG',
    b'\x89PNG\r\n': 'PNG',
    b'GIF8': 'GIF',
    b'II*\0': 'TIFF',
    b'MM\0*': 'TIFF',
    b'\xff\x4f\xff\x51': 'JPEG 2000',
    b'\0\0\0\x0cjP  ': 'JPEG 2000',
    b'qoif': 'QOI',
}

# Brands of the HEIF family other than AVIF, which begins the same way.
HEIC_BRANDS = (b'heic', b'heix', b'heim', b'heis', b'hevc', b'hevx', b'mif1', b'msf1')

# Browsers show a frame that asks for less than this as long as DEFAULT_DURATION: such files were
# made for programs that could not be faster.
SHORTEST_DURATION = 0.011
DEFAULT_DURATION = 0.1

# A picture is converted this many pixels at a time, so that what a conversion needs besides the
# result stays small for any picture.
STRIP_PIXELS = 2**22


class NotAnImage(InputError):
    """A file that is not a picture of any kind that is known here."""


def read_image(file: str | Path | BinaryIO) -> np.ndarray:
    """Read a picture as it is meant to be seen.

    It is turned as its EXIF data says. Transparent parts are white. Samples of more than 8 bits are
    scaled to 8. Of a file with several pictures the first is taken. Colour profiles are not
    applied, as they are not where models are trained.

    Args:
        file: A path, or a binary file that can seek; it stays open.

    Returns:
        (height, width, 3), uint8, BGR.

    Raises:
        InputError: The file cannot be read; the message says why.
    """
    with ImageFile(file) as picture:
        return picture.read()


class ImageFile:
    """A picture file that is open; its pixels are read when they are asked for.

    Args:
        file: A path, or a binary file that can seek; the latter is left open.

    Attributes:
        format: Pillow's name for the file's format, such as 'JPEG'.
        size: (height, width) of the picture as it is seen.
        is_animation: Whether the file has frames that follow each other in time.

    Raises:
        NotAnImage: The file is something else.
        InputError: The file is missing, empty, damaged or too large; the message says which.
    """

    def __init__(self, file: str | Path | BinaryIO):
        by_path = isinstance(file, str | os.PathLike)
        self._file = _open_file(file) if by_path else file
        try:
            with _plain_errors():
                self._image = _identify(self._file)
                orientation = _orientation(self._image)
                self.is_animation = self._image.format in ANIMATED_FORMATS and getattr(
                    self._image, 'is_animated', False
                )
            width, height = self._image.size
            if width * height > MAX_PIXELS:
                raise InputError(
                    f'is too large: {width}x{height} pixels, and {MAX_PIXELS:,} are the most that '
                    f'can be read; cut it into parts first'
                )
        except BaseException:
            if by_path:
                self._file.close()
            raise
        self._by_path = by_path
        self._stored = (height, width)
        # Pillow turns a TIFF by itself, and gives the size of what is seen from the beginning.
        turned = orientation >= 5 and self._image.format != 'TIFF'
        self.size = (width, height) if turned else (height, width)
        self.format = self._image.format

    def read(self) -> np.ndarray:
        """The picture, or the first one of several, as :func:`read_image` returns it."""
        with _plain_errors():
            if self.is_animation:
                self._image.seek(0)
            self._image.load()
            return self._pixels()

    def frames(self) -> Iterator[tuple[float, float, np.ndarray]]:
        """The frames of an animation, complete pictures of one size; a still picture is one frame.

        Yields:
            The time at which the frame appears and how long it stays, in seconds, and its pixels
            as :func:`read_image` returns them.

        Raises:
            InputError: A frame is damaged; those before it have been given.
        """
        if not self.is_animation:
            yield 0.0, DEFAULT_DURATION, self.read()
            return
        time, num_frames = 0.0, self.num_frames
        for index in range(num_frames):
            try:
                with _plain_errors():
                    self._image.seek(self._first_frame + index)
                    self._image.load()
                    pixels = self._pixels()
            except InputError as error:
                raise InputError(f'{error}; {index} frames before that were read') from error
            duration = self._image.info.get('duration', 0) / 1000
            duration = duration if duration >= SHORTEST_DURATION else DEFAULT_DURATION
            yield time, duration, pixels
            time += duration

    @property
    def num_frames(self) -> int:
        """How many frames :meth:`frames` gives; a GIF is read through for it, but not decoded."""
        if not self.is_animation:
            return 1
        with _plain_errors():
            return self._image.n_frames - self._first_frame

    def close(self) -> None:
        """Let go of the pixels, and close the file if it was opened here."""
        # Not self._image.close(): that closes a file of the caller's as well.
        del self._image
        if self._by_path:
            self._file.close()

    def __enter__(self) -> 'ImageFile':
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _first_frame(self) -> int:
        # The first picture of such a PNG is for programs that cannot show the animation.
        return 1 if self._image.info.get('default_image') else 0

    def _pixels(self) -> np.ndarray:
        # Asked for again: a PNG may have its EXIF data behind its pixels.
        orientation = _orientation(self._image)
        height, width = self._stored
        shown = (width, height) if orientation >= 5 else (height, width)
        pixels = np.empty((*shown, 3), np.uint8)
        as_stored = _as_stored(pixels, orientation)
        to_8_bits = _deep_gray_to_gray if _is_deep_gray(self._image) else _to_gray_or_rgb
        rows = max(1, STRIP_PIXELS // width)
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            strip = self._image
            if strip.size != (width, bottom - top):
                strip = strip.crop((0, top, width, bottom))
            samples = to_8_bits(strip, self._image)
            to_bgr = cv2.COLOR_GRAY2BGR if samples.ndim == 2 else cv2.COLOR_RGB2BGR
            as_stored[top:bottom] = cv2.cvtColor(samples, to_bgr)
        return pixels


def begins_like_image(beginning: bytes) -> str | None:
    """The format of the picture that a file with these first 12 bytes holds; None: not known."""
    if beginning[:4] == b'RIFF' and beginning[8:12] == b'WEBP':
        return 'WebP'
    if beginning[4:12] in (b'ftypavif', b'ftypavis'):
        return 'AVIF'
    names = (name for start, name in SIGNATURES.items() if beginning.startswith(start))
    return next(names, None)


def _open_file(path: str | Path) -> BinaryIO:
    try:
        return open(path, 'rb')
    except (OSError, ValueError) as error:
        raise InputError(explain_os_error(error)) from error


def _identify(file: BinaryIO) -> Image.Image:
    """Pillow's view of the file: the header is read, the pixels are not."""
    file.seek(0)
    beginning = file.read(12)
    if not beginning:
        raise InputError('is empty (0 bytes)')
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    try:
        return Image.open(file, formats=formats)
    except IMAGE_DECODE_ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise InputError(explain_os_error(error)) from error
        if beginning[4:8] == b'ftyp' and beginning[8:12] in HEIC_BRANDS:
            raise InputError(
                'is a HEIC picture, which cannot be read; convert it to JPEG or PNG'
            ) from error
        if name := begins_like_image(beginning):
            if 'truncated' in str(error).lower():
                raise
            raise InputError(
                f'begins like {name}, but is cut short, damaged or of a kind that cannot be read; '
                f'save it as JPEG or PNG'
            ) from error
        raise NotAnImage('is not a picture') from error


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8, as far as it is known without reading the pixels."""
    # Not image.getexif(): that of a PNG reads all pixels first.
    with suppress(*IMAGE_DECODE_ERRORS):
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
        if orientation in range(1, 9):
            return orientation
    return 1


def _as_stored(shown: np.ndarray, orientation: int) -> np.ndarray:
    """The array of the picture as it is seen, in the order in which the file has the pixels.

    Writing through this view turns the picture without a second copy of it.
    """
    match orientation:
        case 2:
            return shown[:, ::-1]
        case 3:
            return shown[::-1, ::-1]
        case 4:
            return shown[::-1]
        case 5:
            return shown.swapaxes(0, 1)
        case 6:
            return np.rot90(shown)
        case 7:
            return shown[::-1, ::-1].swapaxes(0, 1)
        case 8:
            return np.rot90(shown, -1)
        case _:
            return shown


def _is_deep_gray(image: Image.Image) -> bool:
    """Whether the samples are gray and of 9 to 16 bits.

    Raises:
        InputError: There is no telling which of their values are black and white, or Pillow does
            not read them rightly.
    """
    if image.format == 'TIFF' and image.tag_v2.get(ExifTags.Base.PlanarConfiguration) == 2:
        # Pillow takes the samples of such a file for 8 bits each, and says nothing.
        deep = max(image.tag_v2.get(ExifTags.Base.BitsPerSample, (8,))) > 8
        if deep and image.info.get('compression') == 'raw':
            raise InputError(
                'has its colours in separate planes of more than 8 bits, uncompressed, which '
                'cannot be read; save it as PNG, or as TIFF with interleaved colours'
            )
    if image.mode == 'F':
        raise InputError(
            'has floating-point samples, and nothing says which of them are black and white; '
            'save it with 8 or 16 bits a sample first'
        )
    if image.mode == 'I':
        lowest, highest = image.getextrema()
        if lowest < 0 or highest >= 2**16:
            raise InputError(
                f'has 32-bit samples from {lowest} to {highest}, and nothing says which of them '
                f'are black and white; save it with 8 or 16 bits a sample first'
            )
    return image.mode == 'I' or image.mode.startswith('I;16')


def _deep_gray_to_gray(strip: Image.Image, image: Image.Image) -> np.ndarray:
    samples = np.asarray(strip)
    bits, white_is_zero = 16, False
    if image.format == 'TIFF':
        bits = min(image.tag_v2.get(ExifTags.Base.BitsPerSample, (16,))[0], 16)
        white_is_zero = image.tag_v2.get(ExifTags.Base.PhotometricInterpretation) == 0
    gray = (samples >> (bits - 8)).astype(np.uint8)
    if white_is_zero:
        gray = 255 - gray
    if 'transparency' in strip.info:
        gray[samples == strip.info['transparency']] = 255
    return gray


def _to_gray_or_rgb(strip: Image.Image, _: Image.Image) -> np.ndarray:
    if 'A' in strip.getbands() or 'transparency' in strip.info:
        white = Image.new('RGBA', strip.size, 'white')
        strip = Image.alpha_composite(white, strip.convert('RGBA'))
    if strip.mode not in ('L', 'RGB'):
        strip = strip.convert('RGB')
    return np.asarray(strip)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Pillow at work on a picture up to :data:`MAX_PIXELS`; its errors become InputError."""
    try:
        with _large_pictures():
            yield
    except InputError:
        raise
    except MemoryError as error:
        raise InputError('is too large for the memory of this computer') from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f'is too large: more than {MAX_PIXELS:,} pixels') from error
    except IMAGE_DECODE_ERRORS as error:
        if 'truncated' in str(error).lower():
            raise InputError('is cut short: the file ends before the picture does') from error
        raise InputError(f'is damaged or cut short ({error})') from error


_limit_lock = threading.Lock()
_limit_users = 0
_limit_before: int | None = None


@contextmanager
def _large_pictures() -> Iterator[None]:
    """Pillow's limit on the size of pictures is ours for as long as any thread is in here.

    The limit exists once for the whole process and is read at several moments of opening and
    decoding. So the first who comes in sets it, and the last who leaves puts it back.
    """
    global _limit_users, _limit_before
    with _limit_lock:
        if _limit_users == 0:
            _limit_before = Image.MAX_IMAGE_PIXELS
            Image.MAX_IMAGE_PIXELS = MAX_PIXELS
        _limit_users += 1
    try:
        yield
    finally:
        with _limit_lock:
            _limit_users -= 1
            if _limit_users == 0:
                Image.MAX_IMAGE_PIXELS = _limit_before
