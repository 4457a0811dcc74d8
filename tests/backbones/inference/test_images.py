"""Every kind of image file gives the pixels that a person would see, or says why not."""

import io
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import skimage
import tifffile
from PIL import Image, ImageChops

from backbones.errors import InputError, NotMediaError
from backbones.inference import images
from backbones.inference.images import (
    is_animation,
    open_image,
    read_frames,
    read_image,
    upright_size,
)

PHOTOGRAPHS = Path(skimage.data_dir)

# How a viewer shows the stored pixels, as the EXIF standard has it: where row 0 and column 0 of the
# file are in what is seen.
UPRIGHT = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],  # top, right
    3: lambda pixels: pixels[::-1, ::-1],  # bottom, right
    4: lambda pixels: pixels[::-1],  # bottom, left
    5: lambda pixels: pixels.transpose(1, 0, 2),  # left, top
    6: lambda pixels: pixels.transpose(1, 0, 2)[:, ::-1],  # right, top
    7: lambda pixels: pixels.transpose(1, 0, 2)[::-1, ::-1],  # right, bottom
    8: lambda pixels: pixels.transpose(1, 0, 2)[::-1],  # left, bottom
}


@pytest.fixture(scope='module')
def coffee() -> Image.Image:
    """A photograph, wider than high, small."""
    return Image.open(PHOTOGRAPHS / 'coffee.png').convert('RGB').resize((90, 60))


def encode(image: Image.Image, format: str, **options: object) -> io.BytesIO:
    file = io.BytesIO()
    if format == 'WEBP':
        options['lossless'] = True
    image.save(file, format, **options)
    return file


def encode_tiff(samples: np.ndarray, **options: object) -> io.BytesIO:
    file = io.BytesIO()
    tifffile.imwrite(file, samples, **options)
    return file


def bgr(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert('RGB'))[..., ::-1]


def levels_apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(a.astype(np.float64) - b)


@pytest.mark.parametrize(
    'name', ['astronaut.png', 'chelsea.png', 'rocket.jpg', 'retina.jpg', 'camera.png', 'page.png']
)
def test_photographs_are_those_that_training_reads(name: str):
    pixels = read_image(PHOTOGRAPHS / name)
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous and pixels.flags.writeable
    np.testing.assert_array_equal(pixels, cv2.imread(str(PHOTOGRAPHS / name)))
    with open_image(PHOTOGRAPHS / name) as image:
        assert upright_size(image) == pixels.shape[:2]


@pytest.mark.parametrize('format', ['JPEG', 'PNG', 'TIFF', 'WEBP'])
@pytest.mark.parametrize('orientation', UPRIGHT)
def test_rotates_as_exif_says(coffee: Image.Image, format: str, orientation: int):
    exif = Image.Exif()
    exif[0x112] = orientation
    file = encode(coffee, format, exif=exif)
    expected = UPRIGHT[orientation](read_image(encode(coffee, format)))
    np.testing.assert_array_equal(read_image(file), expected)
    with open_image(file) as image:
        assert upright_size(image) == expected.shape[:2]
    assert not file.closed


def test_exif_behind_the_pixels_of_a_png(coffee: Image.Image):
    exif = Image.Exif()
    exif[0x112] = 6
    data = encode(coffee, 'PNG', exif=exif).getvalue()
    begin = data.index(b'eXIf') - 4
    end = begin + 12 + int.from_bytes(data[begin : begin + 4], 'big')
    # The last 12 bytes are the chunk that ends the file.
    moved = data[:begin] + data[end:-12] + data[begin:end] + data[-12:]
    np.testing.assert_array_equal(read_image(io.BytesIO(moved)), UPRIGHT[6](bgr(coffee)))


def test_corrupt_exif_does_not_hide_the_image(coffee: Image.Image):
    file = encode(coffee, 'PNG', exif=b'Exif\0\0nonsense')
    np.testing.assert_array_equal(read_image(file), bgr(coffee))


@pytest.mark.parametrize('mode', ['1', 'L', 'P', 'RGB'])
@pytest.mark.parametrize('format', ['PNG', 'TIFF', 'BMP'])
def test_opaque_modes(coffee: Image.Image, mode: str, format: str):
    image = coffee.convert(mode)
    np.testing.assert_array_equal(read_image(encode(image, format)), bgr(image))


@pytest.mark.parametrize(('mode', 'format'), [('LA', 'PNG'), ('RGBA', 'PNG'), ('RGBA', 'WEBP')])
def test_transparent_parts_are_white(coffee: Image.Image, mode: str, format: str):
    image = coffee.convert(mode)
    alpha = np.zeros((60, 90), np.uint8)
    alpha[:, 30:60] = 128
    alpha[:, 60:] = 255
    image.putalpha(Image.fromarray(alpha))
    pixels = read_image(encode(image, format))
    opaque = bgr(coffee.convert(mode[:-1])).astype(float)
    assert (pixels[:, :30] == 255).all()
    half = opaque * 128 / 255 + 255 * 127 / 255
    assert levels_apart(pixels[:, 30:60], half[:, 30:60]).max() <= 1
    np.testing.assert_array_equal(pixels[:, 60:], opaque[:, 60:])


@pytest.mark.parametrize(
    ('mode', 'color', 'transparency'),
    [
        ('L', 100, 100),
        ('RGB', (9, 8, 7), (9, 8, 7)),
        ('P', 3, b'\xff\xff\xff\0'),
    ],
)
def test_color_that_stands_for_transparency_is_white(mode: str, color, transparency):
    image = Image.new(mode, (4, 4))
    for x, y in np.ndindex(2, 4):
        image.putpixel((x, y), color)
    if mode == 'P':
        image.putpalette([0, 0, 0] * 3 + [200, 0, 0])
    pixels = read_image(encode(image, 'PNG', transparency=transparency))
    assert (pixels[:, :2] == 255).all()
    assert (pixels[:, 2:] == 0).all()


RAMP = np.linspace(0, 65535, 60 * 90).astype(np.uint16).reshape(60, 90)
COLORS = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=-1)


@pytest.mark.parametrize(
    ('file', 'samples'),
    [
        (encode(Image.fromarray(RAMP), 'PNG'), RAMP[..., None]),
        (encode(Image.fromarray(RAMP), 'TIFF'), RAMP[..., None]),
        (encode_tiff(RAMP, photometric='miniswhite'), 65535 - RAMP[..., None]),
        (encode_tiff(COLORS, photometric='rgb', byteorder='<'), COLORS[..., ::-1]),
        (encode_tiff(COLORS, photometric='rgb', byteorder='>'), COLORS[..., ::-1]),
    ],
)
def test_16_bits_are_scaled_to_8(file: io.BytesIO, samples: np.ndarray):
    assert levels_apart(read_image(file), samples / 257).max() <= 1


@pytest.mark.parametrize(
    ('file', 'reason'),
    [
        # Pillow 13 reads such a file as noise.
        (
            encode_tiff(COLORS.transpose(2, 0, 1), photometric='rgb', planarconfig='separate'),
            'separate planes',
        ),
        (encode_tiff(np.ones((4, 4), np.float32)), 'black and white'),
        (encode_tiff(np.full((4, 4), 70000, np.int32)), 'black and white'),
        # As 16 bits, they would all be black.
        (encode_tiff(np.arange(16, dtype=np.uint32).reshape(4, 4)), 'black and white'),
        (encode_tiff(np.full((4, 4), -1, np.int16)), 'sign, from -1 to -1'),
    ],
)
def test_samples_that_cannot_be_right_are_refused(file: io.BytesIO, reason: str):
    with pytest.raises(InputError, match=reason):
        read_image(file)


def test_cmyk_jpeg(coffee: Image.Image):
    file = encode(coffee.convert('CMYK'), 'JPEG', quality=98, subsampling=0)
    assert b'Adobe' in file.getvalue()
    assert levels_apart(read_image(file), bgr(coffee)).mean() < 1.5


def test_ycck_jpeg(coffee: Image.Image):
    """As Photoshop writes them: C, M and Y as if they were R, G and B, converted to YCbCr."""
    cyan, magenta, yellow, _ = coffee.convert('CMYK').split()
    black = Image.linear_gradient('L').resize(coffee.size)
    inks = Image.merge('RGB', (cyan, magenta, yellow)).convert('YCbCr').split()
    # Pillow inverts all four when it writes them, which is right for black alone.
    stored = Image.merge('CMYK', [*(ImageChops.invert(ink) for ink in inks), black])
    data = bytearray(encode(stored, 'JPEG', quality=100, subsampling=0).getvalue())
    data[data.index(b'Adobe') + 11] = 2
    lightness = 1 - np.asarray(black)[..., None] / 255
    assert levels_apart(read_image(io.BytesIO(data)), bgr(coffee) * lightness).mean() < 1.5


@pytest.mark.parametrize('format', ['TIFF', 'MPO'])
def test_pages_are_no_animation(coffee: Image.Image, format: str):
    """A document, or the same moment seen again by a phone: the first image counts."""
    options = {'quality': 95} if format == 'MPO' else {}
    file = encode(coffee, format, save_all=True, append_images=[coffee.rotate(180)], **options)
    with open_image(file) as image:
        assert image.format == format and not is_animation(image)
        assert levels_apart(read_image(file), bgr(coffee)).mean() < 4


@pytest.mark.parametrize('format', ['GIF', 'PNG', 'WEBP'])
def test_frames_of_an_animation(format: str):
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    first, *others = [Image.new('RGB', (16, 12), color) for color in colors]
    # Browsers show what asks for no time for 0.1 s.
    file = encode(first, format, save_all=True, append_images=others, duration=[50, 0, 120])
    with open_image(file) as image:
        assert is_animation(image)
        frames = list(read_frames(image))
        assert [frame[:4] for frame in frames] == [
            (0, 0, 0, 50),
            (1, 0.05, 50, 100),
            (2, pytest.approx(0.15), 150, 120),
        ]
        for frame, color in zip(frames, colors, strict=True):
            assert frame.image.shape == (12, 16, 3) and (frame.image == color[::-1]).all()
    assert (read_image(file) == (0, 0, 255)).all()


def test_cover_of_an_animation_is_no_frame():
    cover, *frames = (Image.new('L', (4, 4), value) for value in (9, 0, 255))
    file = encode(cover, 'PNG', save_all=True, append_images=frames, default_image=True)
    with open_image(file) as image:
        assert [frame.image[0, 0, 0] for frame in read_frames(image)] == [0, 255]


def test_animation_that_is_cut_short_gives_what_it_has(coffee: Image.Image):
    others = [coffee.rotate(angle) for angle in (30, 60)]
    data = encode(coffee, 'GIF', save_all=True, append_images=others).getvalue()
    shapes = []
    with (
        pytest.raises(InputError, match='cut short'),
        open_image(io.BytesIO(data[: len(data) // 2])) as image,
    ):
        for frame in read_frames(image):
            shapes.append(frame.image.shape)
    assert shapes == [(60, 90, 3)]


@pytest.mark.parametrize('format', ['JPEG', 'PNG', 'GIF', 'TIFF', 'BMP', 'WEBP'])
def test_cut_short(coffee: Image.Image, format: str):
    data = encode(coffee, format).getvalue()
    with pytest.raises(InputError, match='cut short'):
        read_image(io.BytesIO(data[: len(data) * 2 // 3]))


@pytest.mark.parametrize(
    ('content', 'reason', 'is_image'),
    [
        (b'Not an image at all, whatever it is called.\n', 'not an image', False),
        (b'\x89PNG\r\n\x1a\n' + bytes(100), 'is it corrupt', False),
        (b'\0\0\0\x18ftypheic' + bytes(100), 'pillow-heif', True),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path: Path, content: bytes, reason: str, is_image: bool):
    path = tmp_path / 'Ünï cödé 写真.jpg'
    path.write_bytes(content)
    with pytest.raises(InputError, match=reason) as caught:
        read_image(path)
    assert isinstance(caught.value, NotMediaError) != is_image
    for place, why in ((tmp_path / 'none.jpg', 'No such file'), (tmp_path, 'Is a directory')):
        with pytest.raises(InputError, match=why):
            read_image(place)


def test_heic_is_read_where_the_plugin_is(coffee: Image.Image, monkeypatch: pytest.MonkeyPatch):
    opened = []
    plugin = SimpleNamespace(register_heif_opener=lambda: opened.append(True))
    monkeypatch.setitem(sys.modules, 'pillow_heif', plugin)
    with pytest.raises(InputError, match='is it corrupt'):
        read_image(io.BytesIO(b'\0\0\0\x18ftypheic' + bytes(100)))
    assert opened


def test_larger_than_pillow_allows(coffee: Image.Image, monkeypatch: pytest.MonkeyPatch):
    """More than twice what Pillow calls an attack, which it refuses to open."""
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 90 * 60 // 3)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert read_image(encode(coffee, 'PNG')).shape == (60, 90, 3)
    monkeypatch.setattr(images, 'MAX_PIXELS', 90 * 60 - 1)
    with pytest.raises(InputError, match='too large: 90x60'):
        read_image(encode(coffee, 'PNG'))
