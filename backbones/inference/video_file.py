"""Opening video files, and in plain words why one cannot be opened."""

from pathlib import Path

import av
import fsspec
from av import error as av_error
from av.stream import Disposition

from backbones.errors import InputError

from .inputs import WEB_SCHEMES, find_scheme

# Of ffmpeg's formats those that hold videos: others draw texts, or follow a list of files.
FORMATS = (
    *('asf', 'av1', 'avi', 'dv', 'flv', 'gxf', 'h261', 'h263', 'h264', 'hevc', 'ivf', 'm4v'),
    *('matroska', 'mjpeg', 'mov', 'mpeg', 'mpegts', 'mpegvideo', 'mxf', 'nut', 'obu', 'ogg'),
    *('rm', 'vc1', 'vvc', 'webm', 'wtv', 'yuv4mpegpipe'),
)

# Seconds without a byte after which we give up on an address.
NETWORK_TIMEOUT = 30.0


def open_container(source: str | Path) -> av.container.InputContainer:
    """Open a file or address with ffmpeg.

    Raises:
        InputError: It cannot be opened.
    """
    scheme = find_scheme(str(source))
    if scheme in WEB_SCHEMES:
        name, timeout = str(source), NETWORK_TIMEOUT
    elif scheme:
        name, timeout = fsspec.open(str(source), 'rb').open(), None
    else:
        check_file(Path(source))
        # Without "file:" in front, a colon in a name would make an address of it.
        name, timeout = f'file:{source}', None
    try:
        options = {} if timeout else {'format_whitelist': ','.join(FORMATS)}
        return av.open(name, options=options, metadata_errors='replace', timeout=timeout)
    # The latter: of a format that is not in FORMATS.
    except (av_error.InvalidDataError, av_error.ArgumentError) as error:
        if not scheme and lacks_index(Path(source)):
            raise InputError('is cut short: its index (moov) is missing') from error
        raise InputError('is neither an image nor a video that can be read') from error
    except (av_error.FFmpegError, OSError) as error:
        raise InputError(f'cannot be opened: {error.strerror}') from error


def check_file(path: Path) -> None:
    """Say in plain words what can be wrong with a file before it is read."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise InputError('does not exist') from None
    except OSError as error:
        raise InputError(f'cannot be opened: {error.strerror}') from error
    if path.is_dir():
        raise InputError('is a folder')
    if size == 0 and path.is_file():
        raise InputError('is empty (0 bytes)')


def lacks_index(path: Path) -> bool:
    """Whether a file is an MP4 or MOV without the ``moov`` box, which says where everything is."""
    names = set()
    with open(path, 'rb') as file:
        position, file_size = 0, path.stat().st_size
        while position + 8 <= file_size and len(names) < 100:
            file.seek(position)
            header = file.read(16)
            box_size, name = int.from_bytes(header[:4], 'big'), header[4:8]
            if box_size == 1:
                box_size = int.from_bytes(header[8:16], 'big')
            names.add(name)
            if box_size < 8:
                break
            position += box_size
    return bool(names & {b'ftyp', b'mdat'}) and b'moov' not in names


def check_video(source: str) -> None:
    """Raise InputError where there is no video in a file."""
    with open_container(source) as container:
        stream = find_video(container)
        if not stream.width or not stream.height:
            raise InputError('has no video in it that ffmpeg can decode')


def find_video(container: av.container.InputContainer) -> av.VideoStream:
    """The video in a container.

    Raises:
        InputError: There is none, or none that we can decode.
    """
    # The cover of an album is a stream of one picture in a sound file.
    cover = Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams:
        kind = 'only audio' if container.streams.audio else 'nothing to see'
        raise InputError(f'has no video in it, {kind}')
    best = container.streams.best('video')
    stream = best if best in streams else streams[0]
    if stream.codec_context is None:
        raise InputError('is coded in a way that this build of ffmpeg cannot decode')
    return stream


def find_origin(container: av.container.InputContainer) -> float:
    """Where in a file's own time its beginning is, in seconds.

    Formats made for broadcast start anywhere. What lies before 0 is only sound that a decoder needs
    to get going.
    """
    return max(container.start_time or 0, 0) / av.time_base
