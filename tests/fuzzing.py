"""Inputs for the tests in tests/fuzz: how many of them, and files with something wrong in them.

The tests read a few hundred inputs, the same in every run. With ``FUZZ=1`` (``make fuzz``) they
read more than ten thousand, others in every run.
"""

import io
import os
import struct
import tempfile
import zlib
from functools import cache
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from PIL import Image
from videos import write_video

IS_THOROUGH = os.environ.get('FUZZ') == '1'

PNG_SIGNATURE = b'\x89PNG\r\n\x1a\n'


def inputs(few: int, many: int) -> settings:
    """How many inputs a test reads: few in the tests, many in a run of its own."""
    return settings(
        max_examples=many if IS_THOROUGH else few,
        derandomize=not IS_THOROUGH,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def corrupted(draw: st.DrawFn, files: dict[str, bytes]) -> tuple[str, bytes]:
    """One of the files after one to four changes; (name, content)."""
    name = draw(st.sampled_from(sorted(files)))
    content = files[name]
    for _ in range(draw(st.integers(1, 4))):
        content = draw(changed(content))
    if content.startswith(PNG_SIGNATURE) and draw(st.booleans()):
        # Else a reader sees no more of a change than that the checksum is wrong.
        content = with_checksums(content)
    return name, content


@st.composite
def changed(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes with a part overwritten, inserted, left out or repeated, or without their end."""
    # Headers, where a byte has the most to say, are short.
    last = draw(st.sampled_from([32, 256, len(content)]))
    start = draw(st.integers(0, max(min(last, len(content)) - 1, 0)))
    size = draw(st.sampled_from([1, 1, 2, 4, 8, 64]))
    match draw(st.sampled_from(['overwrite', 'overwrite', 'insert', 'delete', 'repeat', 'cut'])):
        case 'overwrite':
            new = draw(telling_bytes(size))
            return content[:start] + new + content[start + len(new) :]
        case 'insert':
            return content[:start] + draw(telling_bytes(size)) + content[start:]
        case 'delete':
            return content[:start] + content[start + size :]
        case 'repeat':
            return content[: start + size] + content[start:]
        case 'cut':
            return content[:start]


def telling_bytes(size: int) -> st.SearchStrategy[bytes]:
    """Any bytes, and numbers at the ends of their range."""
    edges = [0, 1, 2**7, 2**8 - 1, 2**15 - 1, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1]
    numbers = st.builds(
        lambda number, order: (number % 2 ** (8 * size)).to_bytes(size, order),
        st.sampled_from(edges),
        st.sampled_from(['big', 'little']),
    )
    return st.one_of(st.binary(min_size=size, max_size=size), numbers)


def with_checksums(png: bytes) -> bytes:
    """A PNG whose chunks have the checksums of what is in them."""
    parts, position = [png[:8]], 8
    while position + 12 <= len(png):
        (length,) = struct.unpack('>I', png[position : position + 4])
        end = position + 8 + length
        if end + 4 > len(png):
            break
        checksum = zlib.crc32(png[position + 4 : end])
        parts += [png[position:end], struct.pack('>I', checksum)]
        position = end + 4
    return b''.join([*parts, png[position:]])


@cache
def images() -> dict[str, bytes]:
    """A small file of every kind of image that is read."""
    colors = np.random.default_rng(0).integers(0, 256, (18, 26, 3), np.uint8)
    photo = Image.fromarray(colors)
    gray = photo.convert('L')
    deep = Image.fromarray(colors[..., 0].astype(np.uint16) * 257)
    clear = photo.convert('RGBA')
    clear.putalpha(gray)
    exif = Image.Exif()
    exif[0x0112] = 6
    others = [Image.fromarray(np.roll(colors, shift, 1)) for shift in (3, 6)]
    frames = dict(save_all=True, append_images=others, duration=[40, 0, 70])
    kinds = {
        'plain.jpg': (photo, 'JPEG', {}),
        'rotated.jpg': (photo, 'JPEG', dict(exif=exif)),
        'progressive.jpg': (photo, 'JPEG', dict(progressive=True)),
        'cmyk.jpg': (photo.convert('CMYK'), 'JPEG', {}),
        'plain.png': (photo, 'PNG', dict(exif=exif)),
        'clear.png': (clear, 'PNG', {}),
        'deep.png': (deep, 'PNG', {}),
        'palette.png': (photo.convert('P'), 'PNG', dict(transparency=3)),
        'bits.png': (photo.convert('1'), 'PNG', {}),
        'frames.png': (photo, 'PNG', dict(**frames, default_image=True)),
        'plain.tif': (photo, 'TIFF', dict(exif=exif)),
        'packed.tif': (photo, 'TIFF', dict(compression='tiff_lzw')),
        'jpeg.tif': (photo, 'TIFF', dict(compression='jpeg')),
        'deep.tif': (deep, 'TIFF', {}),
        'bits.tif': (photo.convert('1'), 'TIFF', dict(compression='group4')),
        'pages.tif': (photo, 'TIFF', dict(save_all=True, append_images=others)),
        'frames.gif': (photo, 'GIF', frames),
        'plain.gif': (photo, 'GIF', {}),
        'plain.webp': (photo, 'WEBP', {}),
        'clear.webp': (clear, 'WEBP', dict(lossless=True, exif=exif)),
        'frames.webp': (photo, 'WEBP', frames),
        'plain.bmp': (photo, 'BMP', {}),
        'palette.bmp': (photo.convert('P'), 'BMP', {}),
        'plain.avif': (photo, 'AVIF', {}),
        'plain.jp2': (photo, 'JPEG2000', {}),
        'deep.ppm': (deep, 'PPM', {}),
        'plain.ppm': (photo, 'PPM', {}),
        'several.mpo': (photo, 'MPO', dict(save_all=True, append_images=others)),
    }
    return {name: encoded(image, kind, **options) for name, (image, kind, options) in kinds.items()}


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@cache
def videos() -> dict[str, bytes]:
    """A small file of several kinds of video."""
    small = dict(frames=4, size=(32, 24))
    kinds = {
        'plain.mp4': {},
        'audio.mp4': dict(audio=True),
        'rotated.mp4': dict(rotation=90),
        'uneven.mp4': dict(times=[0, 0.1, 0.15, 0.9]),
        'old.avi': dict(codec='mpeg4'),
        'audio.mkv': dict(audio='libopus'),
        'audio.ts': dict(audio=True),
        'row.mjpeg': dict(codec='mjpeg', pixel_format='yuvj420p'),
    }
    with tempfile.TemporaryDirectory() as folder:
        return {
            name: write_video(Path(folder) / name, **{**small, **options}).read_bytes()
            for name, options in kinds.items()
        }
