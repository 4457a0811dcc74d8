"""Whatever is in a file, infer.py and check_dataset.py read it or say what is wrong with it."""

from collections.abc import Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path
from threading import Event

import av
import numpy as np
import pytest
from fuzzing import corrupted, images, inputs, videos
from hypothesis import given
from hypothesis import strategies as st

from backbones.data.images import Sample, check_sample
from backbones.errors import InputError
from backbones.inference import images as image_reading
from backbones.inference.audio_track import AudioTrack
from backbones.inference.inputs import Input
from backbones.inference.reading import Clip, Closed, Frame, read_inputs

SUFFIXES = ('', '.jpg', '.png', '.tif', '.mp4', '.mjpeg', '.txt')
# More than any of the files has; what is repeated in one may add some.
MOST_FRAMES = 100


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp('fuzz')


@pytest.fixture(scope='module', autouse=True)
def small_limit() -> Iterator[None]:
    """A header that promises a large image must not take the memory of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_reading, 'MAX_PIXELS', 2**22)
        yield


def read(path: Path, clip: Clip) -> None:
    """Read a file as infer.py does."""
    for item in islice(read_inputs([Input(str(path))], clip, Event()), MOST_FRAMES):
        if isinstance(item, Frame):
            try:
                image = item.image if item.stream else item.load()
            except InputError as error:
                assert str(error)
            else:
                assert image.dtype == np.uint8
                assert image.ndim == 3 and image.shape[2] == 3 and image.size
        elif isinstance(item, Closed):
            assert item.problem is None or len(item.problem.splitlines()) == 1


def check_file(path: Path) -> None:
    """Read a file as check_dataset.py does."""
    for _, _, reason, file in check_sample(Sample(str(path), path.name, (26, 18)))[0]:
        assert reason and file == str(path)


@inputs(250, 6000)
@given(file=corrupted(images()))
def test_corrupt_images(folder: Path, file: tuple[str, bytes]):
    path = folder / file[0]
    path.write_bytes(file[1])
    read(path, Clip())
    check_file(path)


@inputs(40, 1500)
@given(
    file=corrupted(videos()),
    clip=st.builds(Clip, st.integers(1, 3), st.sampled_from([0.0, 0.15, 5.0]), st.none()),
)
def test_corrupt_videos(folder: Path, file: tuple[str, bytes], clip: Clip):
    path = folder / file[0]
    path.write_bytes(file[1])
    read(path, clip)


@inputs(20, 500)
@given(file=corrupted({name: content for name, content in videos().items() if 'audio' in name}))
def test_corrupt_audio(folder: Path, file: tuple[str, bytes]):
    path = folder / file[0]
    path.write_bytes(file[1])
    with av.open(str(folder / 'copy.mp4'), 'w') as output:
        track = AudioTrack(path, output, Fraction(0))
        track.write_until(None)
        assert track.problem is None or track.problem
        track.close()


@inputs(40, 1000)
@given(content=st.binary(max_size=300), suffix=st.sampled_from(SUFFIXES))
def test_noise(folder: Path, content: bytes, suffix: str):
    path = folder / f'noise{suffix}'
    path.write_bytes(content)
    read(path, Clip())
    check_file(path)
