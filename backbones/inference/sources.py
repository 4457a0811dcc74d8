"""What an input is, told by what is in it: an image, an animation, a video or a live source."""

import base64
import http.client
import io
import os
import stat
import string
import urllib.error
import urllib.request
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import quote, unquote_to_bytes, urlsplit

import fsspec

from backbones.errors import InputError

from .images import ImageFile, NotAnImage, begins_like_image
from .inputs import WEB_SCHEMES, explain_missing, find_scheme, is_live

MEDIA_SUFFIXES = (
    *('.avif', '.bmp', '.gif', '.heic', '.heif', '.jfif', '.jp2', '.jpeg', '.jpg', '.mpo', '.pgm'),
    *('.png', '.pnm', '.ppm', '.qoi', '.tif', '.tiff', '.webp'),
    *('.3gp', '.asf', '.avi', '.flv', '.h264', '.h265', '.hevc', '.m2ts', '.m4v', '.mjpeg'),
    *('.mjpg', '.mkv', '.mov', '.mp4', '.mpeg', '.mpg', '.mts', '.mxf', '.ogv', '.ts', '.vob'),
    *('.webm', '.wmv', '.y4m'),
)
NEITHER = 'is neither an image nor a video'

# Seconds without a byte, and bytes of an image, after which a server is given up.
WEB_TIMEOUT = 10.0
MAX_DOWNLOAD = 2**28


Kind = Literal['image', 'animation', 'video', 'live']


class NotMedia(InputError):
    """A file that is neither an image nor a video, and is not named like one."""


class Source(NamedTuple):
    """What an input turned out to be.

    Attributes:
        kind: What is in it.
        file: What to open: a path, a URL, ``webcam:N``, or an image that was downloaded.
        size: (height, width) of an image or animation.
    """

    kind: Kind
    file: str | io.BytesIO
    size: tuple[int, int] | None = None


def identify(path: str) -> Source:
    """Find out what a file, a URL or ``webcam:N`` is. Cameras and streams are not opened.

    Raises:
        NotMedia: Nothing says that this should be an image or a video.
        InputError: It cannot be opened or is corrupt; the message says why.
    """
    if is_live(path):
        return Source('live', path)
    scheme = find_scheme(path)
    try:
        if scheme in WEB_SCHEMES:
            return _identify_web(path)
        return _identify_stored(path) if scheme else _identify_file(path)
    except NotMedia as error:
        if Path(path).suffix.lower() in MEDIA_SUFFIXES:
            raise InputError(str(error)) from error
        raise


def _identify_file(path: str) -> Source:
    try:
        # Before it is opened: opening a pipe waits for somebody to write into it.
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise NotMedia(explain_missing(path, error)) from error
    if stat.S_ISDIR(status.st_mode):
        raise NotMedia('is a folder')
    if not stat.S_ISREG(status.st_mode):
        raise NotMedia('is not a file but a device or a pipe')
    if not status.st_size:
        raise NotMedia('is empty (0 bytes)')
    try:
        with ImageFile(path) as image:
            # A camera's row of JPEGs begins like one JPEG.
            if image.format != 'JPEG' or Path(path).suffix.lower() not in ('.mjpeg', '.mjpg'):
                return _image_source(image, path)
    except NotAnImage:
        pass
    return _video_source(path)


def _image_source(image: ImageFile, file: str | io.BytesIO) -> Source:
    return Source('animation' if image.is_animation else 'image', file, image.size)


def _video_source(path: str) -> Source:
    try:
        from .video_reader import find_video, open_container
    except ImportError as error:
        raise NotMedia('is not an image, and videos need PyAV: pip install av') from error
    try:
        with open_container(path) as container:
            find_video(container)
    except InputError as error:
        is_named_so = Path(path).suffix.lower() in MEDIA_SUFFIXES
        raise NotMedia(str(error) if is_named_so else NEITHER) from error
    return Source('video', path)


def _identify_stored(url: str) -> Source:
    try:
        with fsspec.open(url, 'rb') as file:
            data = file.read(12)
            if begins_like_image(data):
                data = io.BytesIO(data + file.read())
                with ImageFile(data) as image:
                    return _image_source(image, data)
    except InputError:
        raise
    # Each storage has errors of its own.
    except Exception as error:
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise InputError(f'cannot be read: {reason}') from error
    return _video_source(url)


def _identify_web(url: str) -> Source:
    """Download an image; ffmpeg opens a video by itself, and reads only what it needs."""
    try:
        with urllib.request.urlopen(_request(url), timeout=WEB_TIMEOUT) as response:
            content_type = response.headers.get_content_type()
            if content_type == 'multipart/x-mixed-replace':
                return Source('live', url)
            if content_type in ('text/html', 'application/xhtml+xml'):
                raise InputError(f'is a web page, it {NEITHER}')
            data = response.read(12)
            if begins_like_image(data) or content_type.startswith('image/'):
                data = io.BytesIO(data + _download(response, MAX_DOWNLOAD))
                with ImageFile(data) as image:
                    return _image_source(image, data)
    except InputError:
        raise
    except urllib.error.HTTPError as error:
        error.close()
        raise InputError(f'the server answers {error.code} ({error.reason})') from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, 'reason', error)
        if isinstance(reason, TimeoutError):
            reason = f'not a byte for {WEB_TIMEOUT:g} s'
        reason = getattr(reason, 'strerror', None) or reason
        raise InputError(f'cannot be downloaded: {reason}') from error
    return _video_source(url)


def _download(response: http.client.HTTPResponse, limit: int) -> bytes:
    data = response.read(limit + 1)
    if len(data) > limit:
        raise InputError(f'is too large to be downloaded: more than {limit / 2**20:g} MiB')
    # What the server promised and has not sent.
    if response.length:
        raise InputError(f'is cut short: {response.length} bytes are missing')
    return data


def _request(url: str) -> urllib.request.Request:
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
    return request
