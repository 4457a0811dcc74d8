"""What an input is, told by what is in it: an image, an animation, a video or a live source."""

import base64
import io
import os
import stat
import string
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import quote, unquote_to_bytes, urlsplit

import fsspec

from backbones.errors import InputError, NotMediaError

from .images import SIGNATURE_BYTES, begins_like_image, is_animation, open_image, upright_size
from .inputs import WEB_SCHEMES, explain_missing, find_scheme, is_live

MEDIA_SUFFIXES = (
    *('.avif', '.bmp', '.gif', '.heic', '.heif', '.jfif', '.jp2', '.jpeg', '.jpg', '.mpo', '.pgm'),
    *('.png', '.pnm', '.ppm', '.qoi', '.tif', '.tiff', '.webp'),
    *('.3gp', '.asf', '.avi', '.flv', '.h264', '.h265', '.hevc', '.m2ts', '.m4v', '.mjpeg'),
    *('.mjpg', '.mkv', '.mov', '.mp4', '.mpeg', '.mpg', '.mts', '.mxf', '.ogv', '.ts', '.vob'),
    *('.webm', '.wmv', '.y4m'),
)

# Seconds without a byte, and bytes of an image, after which a server is given up.
WEB_TIMEOUT = 10.0
MAX_DOWNLOAD = 2**28

Kind = Literal['image', 'animation', 'video', 'live']


class Source(NamedTuple):
    """What an input turned out to be."""

    kind: Kind
    # What to open: a path, a URL, webcam:N, or an image that was downloaded.
    file: str | io.BytesIO
    # (height, width) of an image or animation.
    size: tuple[int, int] | None = None


def identify(path: str) -> Source:
    """Find out what a file, a URL or ``webcam:N`` is. Cameras and streams are not opened.

    Raises:
        NotMediaError: Nothing says that this should be an image or a video.
        InputError: It cannot be opened or is corrupt; the message says why.
    """
    if is_live(path):
        return Source('live', path)
    try:
        return _identify_url(path) if find_scheme(path) else _identify_file(path)
    except NotMediaError as error:
        if is_named_as_media(path):
            raise InputError(str(error)) from error
        raise


def is_named_as_media(path: str) -> bool:
    return Path(path).suffix.lower() in MEDIA_SUFFIXES


def _identify_file(path: str) -> Source:
    try:
        # Before it is opened: opening a pipe waits for somebody to write into it.
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise NotMediaError(explain_missing(path, error)) from error
    if not stat.S_ISREG(status.st_mode):
        raise NotMediaError('is not a file but a folder, a device or a pipe')
    if not status.st_size:
        raise NotMediaError('is empty (0 bytes)')
    # A camera's row of JPEGs begins like one JPEG.
    if Path(path).suffix.lower() not in ('.mjpeg', '.mjpg'):
        with suppress(NotMediaError):
            return _identify_image(path)
    return _identify_video(path)


def _identify_image(file: str | io.BytesIO) -> Source:
    with open_image(file) as image:
        kind = 'animation' if is_animation(image) else 'image'
        return Source(kind, file, upright_size(image))


def _identify_video(path: str) -> Source:
    try:
        from .video_reader import find_video, open_container
    except ImportError as error:
        raise NotMediaError('is not an image, and videos need PyAV: pip install av') from error
    try:
        with open_container(path) as container:
            find_video(container)
    except InputError as error:
        reason = str(error) if is_named_as_media(path) else 'is neither an image nor a video'
        raise NotMediaError(reason) from error
    return Source('video', path)


def _identify_url(url: str) -> Source:
    """Download an image; of a video FFmpeg reads only what it needs."""
    is_web = find_scheme(url) in WEB_SCHEMES
    try:
        opened = _open_web(url) if is_web else fsspec.open(url, 'rb')
        with opened as file:
            content_type = file.headers.get_content_type() if is_web else ''
            if content_type == 'multipart/x-mixed-replace':
                return Source('live', url)
            data = file.read(SIGNATURE_BYTES)
            if begins_like_image(data) or content_type.startswith('image/'):
                data += file.read(MAX_DOWNLOAD)
                if len(data) > MAX_DOWNLOAD:
                    raise InputError(f'is too large: more than {MAX_DOWNLOAD / 2**20:g} MiB')
                return _identify_image(io.BytesIO(data))
    except InputError:
        raise
    # Each storage has errors of its own.
    except Exception as error:
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise InputError(f'cannot be read: {reason}') from error
    return _identify_video(url)


def _open_web(url: str) -> Any:
    # Letters of other alphabets, and spaces; what is quoted already stays.
    parts = urlsplit(quote(url, safe=string.punctuation))
    login, _, host = parts.netloc.rpartition('@')
    request = urllib.request.Request(
        parts._replace(netloc=host, fragment='').geturl(),
        headers={'User-Agent': 'efficientformer-v2-dense'},
    )
    if login:
        encoded = base64.b64encode(unquote_to_bytes(login)).decode()
        # Unredirected: a server that sends us elsewhere must not give the password away.
        request.add_unredirected_header('Authorization', f'Basic {encoded}')
    return urllib.request.urlopen(request, timeout=WEB_TIMEOUT)
