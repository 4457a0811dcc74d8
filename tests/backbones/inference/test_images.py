"""Every kind of picture file gives the pixels that a person would see, or says why not."""

import io
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import skimage
import tifffile
from PIL import Image, ImageChops

from backbones.errors import InputError
from backbones.inference import images
from backbones.inference.images import ImageFile, NotAnImage, read_image

PHOTOGRAPHS = Path(skimage.data_dir)

# What a viewer does with the stored pixels, as the EXIF standard has it: where row 0 and column 0
# of the file are in what is seen.
TURNED = {
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


def encode(image: Image.Image, format: str, **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file


def image_size(file: str | io.BytesIO) -> tuple[int, int]:
    with ImageFile(file) as picture:
        return picture.size


def animation_frames(file: Path | io.BytesIO) -> Iterator[tuple[float, float, np.ndarray]]:
    with ImageFile(file) as picture:
        yield from picture.frames()


def bgr(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert('RGB'))[..., ::-1]


def levels_apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(a.astype(np.float64) - b)


@pytest.mark.parametrize(
    'name', ['astronaut.png', 'chelsea.png', 'rocket.jpg', 'retina.jpg', 'camera.png', 'page.png']
)
def test_photographs(name: str):
    pixels = read_image(PHOTOGRAPHS / name)
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous and pixels.flags.writeable
    np.testing.assert_array_equal(pixels, bgr(Image.open(PHOTOGRAPHS / name)))
    assert image_size(str(PHOTOGRAPHS / name)) == pixels.shape[:2]


@pytest.mark.parametrize('format', ['JPEG', 'PNG', 'TIFF', 'WEBP'])
@pytest.mark.parametrize('orientation', TURNED)
def test_is_turned_as_exif_says(coffee: Image.Image, format: str, orientation: int):
    exif = Image.Exif()
    exif[0x112] = orientation
    options = {'lossless': True} if format == 'WEBP' else {}
    upright = read_image(encode(coffee, format, **options))
    file = encode(coffee, format, exif=exif, **options)
    expected = TURNED[orientation](upright)
    np.testing.assert_array_equal(read_image(file), expected)
    assert image_size(file) == expected.shape[:2]


def test_damaged_exif_does_not_hide_the_picture(coffee: Image.Image):
    file = encode(coffee, 'PNG', exif=b'Exif\0\0nonsense')
    np.testing.assert_array_equal(read_image(file), bgr(coffee))


def test_strips_fit_together(coffee: Image.Image, monkeypatch: pytest.MonkeyPatch):
    exif = Image.Exif()
    exif[0x112] = 6
    files = [encode(coffee, 'PNG', exif=exif), encode(coffee.convert('RGBA'), 'PNG')]
    whole = [read_image(file) for file in files]
    monkeypatch.setattr(images, 'STRIP_PIXELS', 7 * coffee.width)
    for file, expected in zip(files, whole, strict=True):
        np.testing.assert_array_equal(read_image(file), expected)


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
    options = {'lossless': True} if format == 'WEBP' else {}
    pixels = read_image(encode(image, format, **options))
    opaque = bgr(coffee.convert(mode[:-1])).astype(float)
    assert (pixels[:, :30] == 255).all()
    half = opaque * 128 / 255 + 255 * 127 / 255
    assert levels_apart(pixels[:, 30:60], half[:, 30:60]).max() <= 1
    np.testing.assert_array_equal(pixels[:, 60:], opaque[:, 60:])


@pytest.mark.parametrize(
    ('mode', 'colour', 'transparency'),
    [
        ('L', 100, 100),
        ('RGB', (9, 8, 7), (9, 8, 7)),
        ('I;16', 700, 700),
        ('P', 3, b'\xff\xff\xff\0'),
    ],
)
def test_colour_that_stands_for_transparency_is_white(mode: str, colour, transparency):
    image = Image.new(mode, (4, 4))
    for x, y in np.ndindex(2, 4):
        image.putpixel((x, y), colour)
    if mode == 'P':
        image.putpalette([0, 0, 0] * 3 + [200, 0, 0])
    pixels = read_image(encode(image, 'PNG', transparency=transparency))
    assert (pixels[:, :2] == 255).all()
    assert (pixels[:, 2:] == 0).all()


@pytest.mark.parametrize('format', ['PNG', 'TIFF'])
def test_gray_of_16_bits_is_scaled(format: str):
    samples = np.linspace(0, 65535, 60 * 90).astype(np.uint16).reshape(60, 90)
    pixels = read_image(encode(Image.fromarray(samples), format))
    assert levels_apart(pixels, (samples / 257)[..., None]).max() <= 1
    assert pixels.min() == 0 and pixels.max() == 255


def test_gray_of_16_bits_where_white_is_zero():
    samples = np.linspace(0, 65535, 60 * 90).astype(np.uint16).reshape(60, 90)
    file = io.BytesIO()
    tifffile.imwrite(file, samples, photometric='miniswhite')
    assert levels_apart(read_image(file), 255 - (samples / 257)[..., None]).max() <= 1


@pytest.mark.parametrize('byteorder', '<>')
def test_colours_of_16_bits_are_scaled(byteorder: str):
    ramp = np.linspace(0, 65535, 60 * 90).astype(np.uint16).reshape(60, 90)
    samples = np.stack([ramp, ramp[::-1], ramp[:, ::-1]], axis=-1)
    file = io.BytesIO()
    tifffile.imwrite(file, samples, photometric='rgb', byteorder=byteorder)
    assert levels_apart(read_image(file), samples[..., ::-1] / 257).max() <= 1


def test_planes_of_16_bits_are_right_or_refused():
    """Pillow 13 reads such a file as noise."""
    samples = np.linspace(0, 65535, 3 * 60 * 90).astype(np.uint16).reshape(3, 60, 90)
    file = io.BytesIO()
    tifffile.imwrite(file, samples, photometric='rgb', planarconfig='separate')
    with pytest.raises(InputError, match='separate planes'):
        read_image(file)


@pytest.mark.parametrize('samples', [np.ones((4, 4), np.float32), np.full((4, 4), 70000, np.int32)])
def test_samples_without_black_and_white_are_refused(samples: np.ndarray):
    with pytest.raises(InputError, match='save it with 8 or 16 bits'):
        read_image(encode(Image.fromarray(samples), 'TIFF'))


def test_cmyk_jpeg(coffee: Image.Image):
    file = encode(coffee.convert('CMYK'), 'JPEG', quality=98, subsampling=0)
    assert b'Adobe' in file.getvalue()
    assert levels_apart(read_image(file), bgr(coffee)).mean() < 1.5


def test_ycck_jpeg(coffee: Image.Image):
    """As Photoshop writes them: C, M and Y as if they were R, G and B, turned into YCbCr."""
    cyan, magenta, yellow, _ = coffee.convert('CMYK').split()
    black = Image.linear_gradient('L').resize(coffee.size)
    inks = Image.merge('RGB', (cyan, magenta, yellow)).convert('YCbCr').split()
    # Pillow turns all four upside down when it writes them, which is right for black alone.
    stored = Image.merge('CMYK', [*(ImageChops.invert(ink) for ink in inks), black])
    data = bytearray(encode(stored, 'JPEG', quality=100, subsampling=0).getvalue())
    transform = data.index(b'Adobe') + 11
    data[transform] = 2
    lightness = 1 - np.asarray(black)[..., None] / 255
    assert levels_apart(read_image(io.BytesIO(data)), bgr(coffee) * lightness).mean() < 1.5


def test_first_page_of_a_document():
    with ImageFile(PHOTOGRAPHS / 'multipage.tif') as picture:
        assert not picture.is_animation
        assert picture.num_frames == 1
        first = Image.open(PHOTOGRAPHS / 'multipage.tif')
        np.testing.assert_array_equal(picture.read(), bgr(first))
        assert len(list(picture.frames())) == 1


def test_first_picture_of_a_phone(coffee: Image.Image):
    file = encode(coffee, 'MPO', save_all=True, append_images=[coffee.rotate(180)], quality=95)
    with ImageFile(file) as picture:
        assert picture.format == 'MPO'
        assert not picture.is_animation
        assert levels_apart(picture.read(), bgr(coffee)).mean() < 4


@pytest.mark.parametrize('format', ['GIF', 'PNG', 'WEBP'])
def test_frames_of_an_animation(format: str):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    images = [Image.new('RGB', (16, 12), colour) for colour in colours]
    options = {'lossless': True} if format == 'WEBP' else {}
    file = encode(
        images[0],
        format,
        save_all=True,
        append_images=images[1:],
        duration=[50, 300, 120],
        **options,
    )
    with ImageFile(file) as picture:
        assert picture.is_animation
        assert picture.num_frames == 3
        frames = list(picture.frames())
        assert [time for time, _, _ in frames] == pytest.approx([0, 0.05, 0.35])
        assert [duration for _, duration, _ in frames] == pytest.approx([0.05, 0.3, 0.12])
        for (_, _, pixels), (red, green, blue) in zip(frames, colours, strict=True):
            assert pixels.shape == (12, 16, 3)
            assert (pixels == (blue, green, red)).all()
        # And again, and the first one alone.
        assert len(list(picture.frames())) == 3
        assert (picture.read() == (0, 0, 255)).all()


def test_frames_of_a_photograph_in_motion():
    frames = list(animation_frames(PHOTOGRAPHS / 'no_time_for_that_tiny.gif'))
    assert len(frames) == 24
    assert {pixels.shape for _, _, pixels in frames} == {(25, 14, 3)}
    times = [time for time, _, _ in frames]
    assert times[0] == 0 and times == sorted(set(times))


def test_frame_without_duration_is_shown_as_browsers_do():
    images = [Image.new('L', (4, 4), value) for value in (0, 255)]
    file = encode(images[0], 'GIF', save_all=True, append_images=images[1:], duration=0)
    assert [(time, duration) for time, duration, _ in animation_frames(file)] == [
        (0.0, 0.1),
        (0.1, 0.1),
    ]


def test_cover_of_an_animation_is_no_frame():
    cover, *images = (Image.new('L', (4, 4), value) for value in (9, 0, 255))
    file = encode(cover, 'PNG', save_all=True, append_images=images, default_image=True)
    with ImageFile(file) as picture:
        assert picture.num_frames == 2
        assert [pixels[0, 0, 0] for _, _, pixels in picture.frames()] == [0, 255]


def test_animation_that_is_cut_short_gives_what_it_has(coffee: Image.Image):
    images = [coffee.rotate(angle) for angle in (0, 30, 60)]
    data = encode(images[0], 'GIF', save_all=True, append_images=images[1:]).getvalue()
    frames = animation_frames(io.BytesIO(data[: len(data) // 2]))
    assert next(frames)[2].shape == (60, 90, 3)
    with pytest.raises(InputError, match=r'cut short.*1 frames before that were read'):
        list(frames)


@pytest.mark.parametrize('format', ['JPEG', 'PNG', 'GIF', 'TIFF', 'BMP', 'WEBP'])
def test_cut_short(coffee: Image.Image, format: str):
    data = encode(coffee, format).getvalue()
    with pytest.raises(InputError, match='cut short'):
        read_image(io.BytesIO(data[: len(data) * 2 // 3]))


def test_what_is_wrong_with_a_file(tmp_path: Path):
    def problem(path: Path) -> str:
        with pytest.raises(InputError) as caught:
            read_image(path)
        return str(caught.value)

    empty, text = tmp_path / 'empty.jpg', tmp_path / 'text.jpg'
    empty.touch()
    text.write_text('Not a picture at all, whatever it is called.\n')
    assert problem(empty) == 'is empty (0 bytes)'
    assert problem(tmp_path / 'none.jpg') == 'does not exist'
    assert problem(tmp_path) == 'is a folder'
    assert problem(text / 'below.jpg') == 'does not exist'
    with pytest.raises(NotAnImage, match='is not a picture'):
        read_image(text)


def test_damaged_header_is_not_taken_for_something_else():
    with pytest.raises(InputError, match='begins like PNG') as caught:
        read_image(io.BytesIO(b'\x89PNG\r\n\x1a\n' + bytes(100)))
    assert not isinstance(caught.value, NotAnImage)


def test_heic_says_what_to_do():
    with pytest.raises(InputError, match=r'HEIC.*convert it'):
        read_image(io.BytesIO(b'\0\0\0\x18ftypheic' + bytes(100)))


def test_names_of_the_world(tmp_path: Path, coffee: Image.Image):
    path = tmp_path / 'Ünï cödé 写真.jpg'
    coffee.save(path)
    assert read_image(path).shape == (60, 90, 3)


def test_file_of_the_caller_stays_open(coffee: Image.Image):
    file = encode(coffee, 'PNG')
    assert image_size(file) == (60, 90)
    assert read_image(file).shape == (60, 90, 3)
    assert not file.closed


def test_larger_than_pillow_allows():
    """More than twice what Pillow calls an attack, which it refuses to open."""
    file = encode(Image.new('1', (13500, 13400), 1), 'PNG')
    limit = Image.MAX_IMAGE_PIXELS
    assert 2 * limit < 13500 * 13400
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        pixels = read_image(file)
    assert pixels.shape == (13400, 13500, 3)
    assert pixels[0, 0].tolist() == pixels[-1, -1].tolist() == [255, 255, 255]
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize('format', ['JPEG', 'PNG', 'TIFF', 'GIF', 'WEBP', 'BMP'])
@pytest.mark.parametrize('limit', [1000, 4000])
def test_limit_of_pillow_is_no_limit_in_any_format(
    coffee: Image.Image, format: str, limit: int, monkeypatch: pytest.MonkeyPatch
):
    file = encode(coffee, format)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', limit)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert read_image(file).shape == (60, 90, 3)
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_too_large_for_anybody(coffee: Image.Image, monkeypatch: pytest.MonkeyPatch):
    file = encode(coffee, 'PNG')
    monkeypatch.setattr(images, 'MAX_PIXELS', 90 * 60 - 1)
    with pytest.raises(InputError, match='too large: 90x60 pixels'):
        image_size(file)


def test_limit_is_put_back_whatever_threads_do(coffee: Image.Image):
    limit = Image.MAX_IMAGE_PIXELS
    good, bad = encode(coffee, 'PNG').getvalue(), b'\x89PNG\r\n\x1a\n' + bytes(100)
    failures = []

    def work(read: Callable[[], object]) -> None:
        for _ in range(50):
            try:
                read()
            except InputError:
                failures.append(1)

    threads = [
        threading.Thread(target=work, args=(lambda data=data: read_image(io.BytesIO(data)),))
        for data in (good, bad, good, bad)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failures) == 100
    assert limit == Image.MAX_IMAGE_PIXELS
