"""What an input is: a picture, an animation, a video or a live source."""

import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from backbones.errors import InputError

from .addresses import is_live, is_web
from .download import open_address
from .listing import explain_missing
from .pictures import NotAPicture, Picture, begins_like_picture
from .video_file import find_video, open_container

PICTURE_ENDINGS = (
    *('.avif', '.bmp', '.dib', '.gif', '.heic', '.heif', '.j2k', '.jfif', '.jp2', '.jpe'),
    *('.jpeg', '.jpg', '.mpo', '.pbm', '.pgm', '.png', '.pnm', '.ppm', '.qoi', '.tif', '.tiff'),
    '.webp',
)
VIDEO_ENDINGS = (
    *('.264', '.265', '.3g2', '.3gp', '.asf', '.avi', '.divx', '.dv', '.flv', '.h264', '.h265'),
    *('.hevc', '.ivf', '.m2ts', '.m2v', '.m4v', '.mjpeg', '.mjpg', '.mkv', '.mov', '.mp4'),
    *('.mpe', '.mpeg', '.mpg', '.mts', '.mxf', '.nut', '.obu', '.ogm', '.ogv', '.rm', '.rmvb'),
    *('.ts', '.vob', '.webm', '.wmv', '.y4m'),
)

# ffmpeg's names of formats that hold videos. It has others, which draw texts, open pictures, or
# follow a list of further files.
VIDEO_FORMATS = (
    *('asf', 'av1', 'avi', 'dv', 'flv', 'gxf', 'h261', 'h263', 'h264', 'hevc', 'ivf', 'm4v'),
    *('matroska', 'mjpeg', 'mov', 'mpeg', 'mpegts', 'mpegvideo', 'mxf', 'nut', 'obu', 'ogg'),
    *('rm', 'vc1', 'vvc', 'webm', 'wtv', 'yuv4mpegpipe'),
)

NEITHER = 'neither a picture nor a video'

# Bytes that show whether a file is text.
BEGINNING_SIZE = 4096


class NotMedia(InputError):
    """A file that is neither a picture nor a video, and is not named like one."""


@dataclass(frozen=True)
class Source:
    """What an input turned out to be.

    Attributes:
        kind: What is in it.
        file: What to open: a path or address, ``webcam:N``, or a picture that was downloaded.
        size: (height, width) of a picture or an animation.
    """

    kind: Literal['picture', 'animation', 'video', 'live']
    file: str | io.BytesIO
    size: tuple[int, int] | None = None


def look_at(path: str) -> Source:
    """Find out what an input is, by what is in it.

    Args:
        path: Of a file, an address, or ``webcam:N``. Cameras and live addresses are not opened.

    Raises:
        NotMedia: Nothing says that this should be a picture or a video.
        InputError: It cannot be opened or is damaged; the message says why.
    """
    if is_live(path):
        return Source('live', path)
    if is_web(path):
        return _look_at_address(path)
    try:
        return _look_at_file(path)
    except NotMedia as error:
        if looks_like_media_name(path):
            raise InputError(str(error)) from error
        raise


def looks_like_media_name(path: str) -> bool:
    """Whether a path ends as those of pictures and videos do."""
    return Path(path).suffix.lower() in (*PICTURE_ENDINGS, *VIDEO_ENDINGS)


def _look_at_file(path: str) -> Source:
    beginning = _read_beginning(path)
    if not beginning:
        raise NotMedia('is empty (0 bytes)')
    try:
        with Picture(path) as picture:
            if not _is_motion_jpeg(path, picture):
                return _source_of(picture, path)
    except NotAPicture:
        pass
    _check_video(path, beginning)
    return Source('video', path)


def _read_beginning(path: str) -> bytes:
    try:
        # Before it is opened: opening a pipe waits for somebody to write into it.
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            with open(path, 'rb') as file:
                return file.read(BEGINNING_SIZE)
    except (OSError, ValueError) as error:
        raise NotMedia(explain_missing(path, error)) from error
    raise NotMedia('is a folder' if stat.S_ISDIR(mode) else 'is no file but a device or a pipe')


def _source_of(picture: Picture, file: str | io.BytesIO) -> Source:
    return Source('animation' if picture.is_animation else 'picture', file, picture.size)


def _is_motion_jpeg(path: str, picture: Picture) -> bool:
    """Whether a file that begins with a JPEG is a row of them, as cameras record: a video."""
    return picture.format == 'JPEG' and Path(path).suffix.lower() in ('.mjpeg', '.mjpg')


def _check_video(path: str, beginning: bytes) -> None:
    if _is_text(beginning):
        raise NotMedia(f'is a text file, {NEITHER}')
    try:
        container = open_container(path)
    except InputError as error:
        raise NotMedia(str(error) if looks_like_media_name(path) else f'is {NEITHER}') from error
    with container:
        if not set(container.format.name.split(',')) & set(VIDEO_FORMATS):
            raise NotMedia(f'is {NEITHER}')
        try:
            stream = find_video(container)
        except InputError as error:
            raise NotMedia(str(error)) from error
        if not stream.width or not stream.height:
            raise NotMedia(f'is {NEITHER}')


def _is_text(beginning: bytes) -> bool:
    if b'\0' in beginning:
        return False
    try:
        beginning.decode()
    except UnicodeDecodeError as error:
        # The last letter may be cut in two.
        return error.start > len(beginning) - 4 and len(beginning) == BEGINNING_SIZE
    return True


def _look_at_address(address: str) -> Source:
    with open_address(address) as answer:
        if answer.content_type == 'multipart/x-mixed-replace':
            return Source('live', address)
        is_picture = answer.content_type.startswith('image/')
        if is_picture or begins_like_picture(answer.beginning(12)):
            data = answer.download()
            with Picture(data) as picture:
                return _source_of(picture, data)
        if answer.content_type in ('text/html', 'application/xhtml+xml'):
            raise InputError(f'is a web page, {NEITHER}')
    with open_container(address) as container:
        find_video(container)
    return Source('video', address)
