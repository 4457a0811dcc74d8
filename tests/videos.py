"""Small videos for tests, whole and corrupt."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

SAMPLE_RATE = 48_000
TONE = 440.0
SAMPLES_PER_FRAME = 1024
BITS = 8

# Fixed, so that each file is the same in every run.
CORRUPTION_SEED = 0


def numbered_image(number: int, size: tuple[int, int] = (128, 96)) -> np.ndarray:
    """A gray image with a white corner at the top left and its number in bars at the bottom.

    Args:
        number: 0 to 255.
        size: Width and height.

    Returns:
        (height, width, 3), uint8, BGR.
    """
    width, height = size
    image = np.full((height, width, 3), 90, np.uint8)
    image[: height // 4, : width // 4] = 255
    for bit in range(BITS):
        left, right = bit * width // BITS, (bit + 1) * width // BITS
        image[height * 3 // 4 :, left:right] = 255 if number >> bit & 1 else 0
    return image


def read_number(image: np.ndarray) -> int:
    """The number of a :func:`numbered_image`, whatever coding and scaling have done to it."""
    height, width = image.shape[:2]
    row = image[height * 7 // 8].mean(axis=1)
    columns = [(2 * bit + 1) * width // (2 * BITS) for bit in range(BITS)]
    return sum(1 << bit for bit, column in enumerate(columns) if row[column] > 128)


def white_corner(image: np.ndarray) -> str:
    """Where the white corner of a numbered image is: ``'top left'`` for an upright one."""
    small = cv2.resize(image, (8, 8), interpolation=cv2.INTER_AREA).mean(axis=2)
    # The number's bars share two of the corners; only the white one is as bright beside them.
    brightness = {
        'top left': small[:2, :2].min(),
        'top right': small[:2, -2:].min(),
        'bottom left': small[-2:, :2].min(),
        'bottom right': small[-2:, -2:].min(),
    }
    return max(brightness, key=brightness.get)


def write_video(
    path: Path,
    frames: int | Sequence[np.ndarray] = 30,
    *,
    rate: int | Fraction = 10,
    times: Sequence[float] | None = None,
    size: tuple[int, int] = (128, 96),
    audio: bool | str = False,
    audio_layout: str = 'stereo',
    audio_start: float = 0.0,
    audio_duration: float | None = None,
    rotation: int | None = None,
    mirrored: bool = False,
    sample_aspect_ratio: Fraction | None = None,
    codec: str = 'libx264',
    format: str | None = None,
    pixel_format: str = 'yuv420p',
    colorspace: int | None = None,
    full_range: bool = False,
    keyframe_every: int = 5,
    options: dict[str, str] | None = None,
) -> Path:
    """Write a video with PyAV; the container follows from the name.

    Args:
        path: ``.mp4``, ``.mkv``, ``.webm``, ``.avi``, ``.ts``, ...
        frames: How many :func:`numbered_image`, or images, (height, width, 3) uint8 BGR.
        rate: Frames a second.
        times: Seconds at which each frame begins, multiples of 1 ms; default: at a constant rate.
            The last frame then lasts 1 / rate.
        size: Width and height of numbered images.
        audio: A tone of 440 Hz: True for AAC, or a codec (``'libopus'``).
        audio_layout: Its channels, which all have the same tone.
        audio_start: Seconds at which it begins.
        audio_duration: Seconds; default: until the last frame ends.
        rotation: What the display matrix asks for, in degrees counter-clockwise.
        mirrored: The display matrix also asks for left and right to be exchanged, after rotating.
        sample_aspect_ratio: Width of a pixel by its height.
        codec: Of the images.
        format: The container, where it does not follow from the name.
        pixel_format: Of the images.
        colorspace: Matrix by ITU-T H.273 (1: BT.709, 6: BT.601), with which images are converted
            and the file is tagged; None: BT.601 without a tag.
        full_range: 0 to 255 instead of 16 to 235.
        keyframe_every: Frames.
        options: For the muxer.

    Returns:
        ``path``.
    """
    images = frames if not isinstance(frames, int) else None
    count = len(frames) if images is not None else frames
    if images is not None:
        size = images[0].shape[1], images[0].shape[0]
    rate = Fraction(rate)
    begins = [Fraction(index) / rate for index in range(count)]
    if times is not None:
        begins = [Fraction(round(time * 1000), 1000) for time in times]
    end = begins[-1] + 1 / rate

    with av.open(str(path), 'w', format=format, container_options=options or {}) as container:
        video = container.add_stream(codec, rate=rate)
        video.width, video.height = size
        video.pix_fmt = pixel_format
        context = video.codec_context
        context.gop_size = keyframe_every
        if times is not None:
            context.time_base = Fraction(1, 1000)
        if sample_aspect_ratio is not None:
            context.sample_aspect_ratio = sample_aspect_ratio
        if colorspace is not None:
            context.colorspace = context.color_primaries = context.color_trc = colorspace
        context.color_range = 2 if full_range else 1
        if rotation is not None or mirrored:
            video.set_display_matrix(_display_matrix(rotation or 0, mirrored))
        tone = None
        if audio:
            tone = container.add_stream(
                'aac' if audio is True else audio, rate=SAMPLE_RATE, layout=audio_layout
            )
        tone_end = end if audio_duration is None else audio_start + audio_duration
        heard = round(audio_start * SAMPLE_RATE)

        for index, begin in enumerate(begins):
            image = numbered_image(index, size) if images is None else images[index]
            frame = av.VideoFrame.from_ndarray(image, 'bgr24').reformat(
                format=pixel_format,
                dst_colorspace=1 if colorspace == 1 else 5,
                src_color_range=2,
                dst_color_range=2 if full_range else 1,
            )
            frame.time_base = Fraction(1, 1000) if times is not None else 1 / rate
            frame.pts = round(begin / frame.time_base)
            container.mux(video.encode(frame))
            following = begins[index + 1] if index + 1 < count else tone_end
            while tone is not None and heard < following * SAMPLE_RATE:
                samples = min(SAMPLES_PER_FRAME, round(tone_end * SAMPLE_RATE) - heard)
                if samples <= 0:
                    break
                container.mux(tone.encode(_tone(heard, samples, audio_layout)))
                heard += samples
        container.mux(video.encode(None))
        if tone is not None:
            container.mux(tone.encode(None))
    return path


def _display_matrix(rotation: int, mirrored: bool) -> list[int]:
    """The matrix that takes a pixel (x, y) to (ax + cy, bx + dy), with y downwards."""
    cosine = round(np.cos(np.deg2rad(rotation))) << 16
    sine = round(np.sin(np.deg2rad(rotation))) << 16
    sign = -1 if mirrored else 1
    return [sign * cosine, -sine, 0, sign * sine, cosine, 0, 0, 0, 1 << 30]


def _tone(begin: int, samples: int, layout: str) -> av.AudioFrame:
    wave = 0.5 * np.sin(2 * np.pi * TONE * np.arange(begin, begin + samples) / SAMPLE_RATE)
    channels = np.stack([wave] * av.AudioLayout(layout).nb_channels).astype(np.float32)
    frame = av.AudioFrame.from_ndarray(channels, 'fltp', layout)
    frame.sample_rate = SAMPLE_RATE
    frame.time_base = Fraction(1, SAMPLE_RATE)
    frame.pts = begin
    return frame


def corrupt(path: Path, begin: float, end: float = 1.0) -> Path:
    """Overwrite a part of a file with noise; of an MP4, a part of the images and the audio.

    Args:
        path: The file; an MP4 keeps its index.
        begin: Where the noise begins, as a fraction of the file (of an MP4: of its ``mdat``).
        end: Where it ends, likewise.
    """
    content = bytearray(path.read_bytes())
    first, size = 0, len(content)
    if b'ftyp' in content[:16]:
        mark = content.index(b'mdat')
        first = mark + 4
        size = int.from_bytes(content[mark - 4 : mark], 'big') - 8
    begin_at, end_at = first + round(begin * size), first + round(end * size)
    noise = np.random.default_rng(CORRUPTION_SEED).integers(0, 256, end_at - begin_at, np.uint8)
    content[begin_at:end_at] = noise.tobytes()
    path.write_bytes(content)
    return path


def truncate(path: Path, fraction: float) -> Path:
    """Keep only the first part of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: round(fraction * len(content))])
    return path
