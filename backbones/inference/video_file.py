"""Opening video files, and in plain words why one cannot be opened."""

from pathlib import Path

import av
import fsspec
from av import error as av_error
from av.stream import Disposition

from backbones.errors import InputError

from .inputs import WEB_SCHEMES, explain_os_error, find_scheme

# Of ffmpeg's formats those that hold videos: others draw texts, or follow a list of files.
FORMATS = (
    *('asf', 'av1', 'avi', 'dv', 'flv', 'gxf', 'h261', 'h263', 'h264', 'hevc', 'ivf', 'm4v'),
    *('matroska', 'mjpeg', 'mov', 'mpeg', 'mpegts', 'mpegvideo', 'mxf', 'nut', 'obu', 'ogg'),
    *('rm', 'vc1', 'vvc', 'webm', 'wtv', 'yuv4mpegpipe'),
)

# Seconds without a byte after which a web server is given up.
WEB_TIMEOUT = 30.0


def open_container(source: str | Path) -> av.container.InputContainer:
    """Open a file or URL with ffmpeg.

    Raises:
        InputError: It cannot be opened.
    """
    scheme = find_scheme(str(source))
    # Without "file:" in front, a colon in a name would make a URL of it.
    file, options, timeout = f'file:{source}', {'format_whitelist': ','.join(FORMATS)}, None
    try:
        if scheme in WEB_SCHEMES:
            file, options, timeout = str(source), {}, WEB_TIMEOUT
        elif scheme:
            file = fsspec.open(str(source), 'rb').open()
        return av.open(file, options=options, metadata_errors='replace', timeout=timeout)
    # The latter: of a format that is not in FORMATS.
    except (av_error.InvalidDataError, av_error.ArgumentError) as error:
        if not scheme and is_mp4(Path(source)):
            raise InputError('is cut short or corrupt: it has no index (moov)') from error
        raise InputError('is neither an image nor a video that can be read') from error
    except av_error.FFmpegError as error:
        is_of_system = isinstance(error, OSError)
        reason = explain_os_error(error) if is_of_system else f'cannot be read: {error.strerror}'
        raise InputError(reason) from error


def is_mp4(path: Path) -> bool:
    """Whether a file begins as an MP4 or MOV."""
    with path.open('rb') as file:
        return file.read(8)[4:] in (b'ftyp', b'mdat', b'wide')


def find_video(container: av.container.InputContainer) -> av.VideoStream:
    """The video in a container.

    Raises:
        InputError: There is none, or none that we can decode.
    """
    # The cover of an album is a stream of one image in an audio file.
    cover = Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams:
        kind = 'only audio' if container.streams.audio else 'nothing to see'
        raise InputError(f'has no video in it, {kind}')
    best = container.streams.best('video')
    stream = best if best in streams else streams[0]
    if stream.codec_context is None or not stream.width or not stream.height:
        raise InputError('is coded in a way that this build of ffmpeg cannot decode')
    return stream


def find_origin(container: av.container.InputContainer) -> float:
    """Where in a file's own time its beginning is, in seconds.

    Formats made for broadcast start anywhere. What lies before 0 is only audio that a decoder needs
    to get going.
    """
    return max(container.start_time or 0, 0) / av.time_base
