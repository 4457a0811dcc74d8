"""Opening video files, and in plain words why one cannot be opened."""

from pathlib import Path

import av
from av import error as av_error
from av.stream import Disposition

from backbones.errors import InputError

# Seconds without a byte after which we give up on an address.
NETWORK_TIMEOUT = 30.0


def open_container(source: str | Path) -> av.container.InputContainer:
    """Open a file or address with ffmpeg.

    Raises:
        InputError: It cannot be opened.
    """
    if '://' in str(source):
        name, timeout = str(source), NETWORK_TIMEOUT
    else:
        check_file(Path(source))
        # Without "file:" in front, a colon in a name would make an address of it.
        name, timeout = f'file:{source}', None
    try:
        return av.open(name, metadata_errors='replace', timeout=timeout)
    except av_error.InvalidDataError as error:
        if timeout is None and lacks_index(Path(source)):
            raise InputError('is cut short: its index (moov) is missing') from error
        raise InputError('is damaged, or no video that ffmpeg knows') from error
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


def find_video(container: av.container.InputContainer) -> av.VideoStream:
    """The video in a container.

    Raises:
        InputError: There is none, or none that we can decode.
    """
    # The cover of an album is a stream of one picture in a sound file.
    cover = Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams:
        kind = 'only sound' if container.streams.audio else 'nothing to see'
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
