"""tools/infer.py as a user runs it: what is written, what is said, and what comes after a stop."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import av
import cv2
import infer
import numpy as np
import pytest
import skimage
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from rtsp_server import RtspServer
from tool_process import TOOLS, Started
from trained_tiny import write_trained
from videos import corrupt, truncate, write_video
from web import serve

from backbones.inference import Inferencer, camera

PHOTOGRAPHS = Path(skimage.data_dir)

# Not a multiple of anything, and none as long as the one before.
UNEVEN_TIMES = (0, 0.1, 0.15, 0.3, 0.41, 0.5, 0.65, 0.7, 0.82, 0.9)
NUM_DAMAGED = 60

Command = list[str]


@pytest.fixture(scope='module')
def models(tmp_path_factory, shapes) -> dict[str, tuple[Path, Path]]:
    """A config and a checkpoint for each task."""
    folder = tmp_path_factory.mktemp('models')
    return {task: write_trained(folder, task, shapes) for task in ('fpn', 'retinanet', 'mask_rcnn')}


@pytest.fixture(scope='module')
def media(tmp_path_factory) -> Path:
    """A folder with everything that people have in folders."""
    folder = tmp_path_factory.mktemp('media') / 'photos'
    below = folder / 'straße 1'
    below.mkdir(parents=True)
    shutil.copy(PHOTOGRAPHS / 'coffee.png', folder / 'coffee.png')
    shutil.copy(PHOTOGRAPHS / 'rocket.jpg', folder / 'coffee.jpg')
    shutil.copy(PHOTOGRAPHS / 'rocket.jpg', below / '000000000139.jpg')
    shutil.copy(PHOTOGRAPHS / 'rocket.jpg', folder / 'cut.jpg')
    truncate(folder / 'cut.jpg', 0.5)
    (folder / 'text.jpg').write_text('no image')
    (folder / 'empty.png').touch()
    (folder / 'notes.txt').write_text('left out')
    write_video(folder / 'uneven.mp4', 10, times=UNEVEN_TIMES, audio=True, rotation=90)
    corrupt(write_video(folder / 'damaged.mp4', NUM_DAMAGED), 0.67)
    truncate(write_video(folder / 'no_index.mp4', 10), 0.9)
    return folder


class Finished:
    """One run of the tool over everything.

    Attributes:
        task: What was run.
        media: The folder of inputs.
        out: The output folder.
        process: The finished process.
        lines: ``predictions.jsonl``.
        records: The same by the inputs' names.
    """

    def __init__(self, task: str, model: tuple[Path, Path], media: Path, out: Path) -> None:
        self.task, self.media, self.out = task, media, out
        inputs = [media.name, media.parent / 'missing.jpg', '-']
        command = [*model, *inputs, '--recursive', '--out-dir', out, '--score-thr', 0]
        listed = f'{PHOTOGRAPHS / "astronaut.png"}\n\n{media / "coffee.png"}\n'
        self.process = Started(media.parent, [TOOLS / 'infer.py', *command], stdin=listed).wait()
        self.lines = read_lines(out)
        self.records = {Path(record['input']).name: record for record in self.lines}

    def source(self, name: str) -> str:
        """The path of an input."""
        return str(self.media.parent / self.records[name]['input'])


def read_lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / 'predictions.jsonl').open(encoding='utf-8')]


@pytest.fixture(scope='module', params=['fpn', 'mask_rcnn'])
def finished(request, models, media, tmp_path_factory) -> Finished:
    task = request.param
    return Finished(task, models[task], media, tmp_path_factory.mktemp(task) / 'results é')


@pytest.fixture
def call(call_tool) -> Callable[..., tuple[int, str]]:
    """Runs infer.py in this process; returns the exit code and what was said."""
    return partial(call_tool, 'infer.py')


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file()}


def shown_times(path: Path) -> list[float]:
    """Seconds at which each frame of a video begins."""
    with av.open(str(path)) as container:
        return [frame.time for frame in container.decode(video=0)]


class TestEverythingInOneRun:
    def test_bad_inputs_stop_no_others_and_are_explained(self, finished):
        assert finished.process.returncode == 3
        assert 'Traceback' not in finished.process.stderr
        problems = {
            name: record['problem']
            for name, record in finished.records.items()
            if record['status'] == 'failed'
        }
        said = {
            'cut.jpg': 'cut short',
            'damaged.mp4': 'corrupt',
            'empty.png': 'is empty (0 bytes)',
            'no_index.mp4': 'cut short',
            'text.jpg': 'neither',
            'missing.jpg': 'No such file',
        }
        assert set(problems) == set(said)
        for name, part in said.items():
            assert part in problems[name]
            assert f'{finished.records[name]["input"]}: {problems[name]}' in finished.process.stderr

    def test_every_input_has_a_line_in_order(self, finished):
        names = [Path(record['input']).name for record in finished.lines]
        assert names == [
            'coffee.jpg', 'coffee.png', 'cut.jpg', 'damaged.mp4', 'empty.png', 'no_index.mp4',
            'text.jpg', 'uneven.mp4', '000000000139.jpg', 'missing.jpg', 'astronaut.png',
        ]  # fmt: skip
        for record in finished.lines:
            if record['status'] == 'done':
                assert record['seconds'] > 0 and record['drawn'] and record['data']

    def test_the_summary_counts(self, finished):
        counts = '5 done, 6 failed, 1 left out, neither image nor video'
        assert f'inputs:  {counts}\n' in finished.process.stdout
        assert f'results: {finished.out}/' in finished.process.stdout
        frames = 4 + len(UNEVEN_TIMES) + finished.records['damaged.mp4']['frames']
        assert f'speed:   {frames} frames in ' in finished.process.stdout

    def test_results_mirror_the_inputs(self, finished):
        suffixes = dict(fpn=('png', 'frames')).get(finished.task, ('json', 'jsonl'))
        expected = {'categories.json', 'predictions.jsonl'}
        below = f'{PHOTOGRAPHS.relative_to("/")}/astronaut'
        images = ['photos/coffee.jpg', 'photos/coffee.png', 'photos/straße 1/000000000139', below]
        for stem in images:
            expected |= {f'drawn/{stem}.jpg', f'data/{stem}.{suffixes[0]}'}
        for stem in ('photos/uneven', 'photos/damaged'):
            expected |= {f'drawn/{stem}.mp4', f'data/{stem}.{suffixes[1]}'}
        there = {re.sub('[.]frames/.*', '.frames', name) for name in files_in(finished.out)}
        assert there == expected
        named = {line[key] for line in finished.lines for key in ('drawn', 'data') if key in line}
        assert named == expected - {'categories.json', 'predictions.jsonl'}

    def test_images_are_drawn_over(self, finished):
        for name in ('coffee.png', 'coffee.jpg', '000000000139.jpg'):
            record = finished.records[name]
            source = cv2.imread(finished.source(name))
            drawn = cv2.imread(str(finished.out / record['drawn']))
            height, width = source.shape[:2]
            assert (record['width'], record['height']) == (width, height)
            assert drawn.shape[1] == width
            # A segmentation's legend stands below.
            assert (drawn.shape[0] > height) == (finished.task == 'fpn')
            difference = np.abs(drawn[:height].astype(int) - source)
            assert (difference > 30).any(axis=2).mean() > 0.01

    def test_the_data_of_images(self, finished, models):
        categories = json.loads((finished.out / 'categories.json').read_text())
        inferencer = Inferencer(*models[finished.task], score_thr=0)
        assert [category['name'] for category in categories] == list(inferencer.classes)
        first = 0 if finished.task == 'fpn' else 1
        ids = list(range(first, first + len(categories)))
        assert [category['id'] for category in categories] == ids
        for name in ('coffee.png', '000000000139.jpg'):
            record = finished.records[name]
            path = finished.out / record['data']
            expected = next(inferencer(finished.source(name))).prediction
            if finished.task == 'fpn':
                with Image.open(path) as image:
                    assert image.mode == 'P'
                    np.testing.assert_array_equal(np.array(image), expected.seg_map)
                    colors = np.reshape(image.getpalette(), (-1, 3))
                np.testing.assert_array_equal(
                    colors[: len(categories)], inferencer.visualizer.palette
                )
            else:
                self.check_coco(name, record, path, categories, expected)

    def check_coco(self, name, record, path, categories, expected):
        image_id = json.loads(path.read_text())[0]['image_id']
        assert image_id == 139 if '139' in name else image_id > 2**31
        size = {'width': record['width'], 'height': record['height']}
        coco = COCO()
        coco.dataset = {'images': [{'id': image_id, **size}], 'categories': categories}
        coco.createIndex()
        results = coco.loadRes(str(path)).dataset['annotations']
        scores = [result['score'] for result in results]
        np.testing.assert_allclose(scores, expected.scores, atol=1e-5)
        left, top, width, height = np.array([result['bbox'] for result in results]).T
        assert len(results) == 10 and min(*left, *top) >= 0 and min(*width, *height) > 0
        assert max(left + width) <= size['width'] + 0.01
        assert max(top + height) <= size['height'] + 0.01
        for result in results:
            assert result['file_name'] == record['input']
            pixels = coco_mask.decode(result['segmentation'])
            assert pixels.shape == (size['height'], size['width'])

    def test_a_video_stays_what_it_was(self, finished):
        """Size, rotation, uneven times, duration and sound."""
        record = finished.records['uneven.mp4']
        assert (record['width'], record['height'], record['frames']) == (96, 128, 10)
        source, drawn = finished.source('uneven.mp4'), finished.out / record['drawn']
        assert shown_times(drawn) == pytest.approx(UNEVEN_TIMES, abs=1e-4)
        with av.open(source) as before, av.open(str(drawn)) as after:
            video = after.streams.video[0]
            assert video.codec_context.name == 'h264' and video.format.name == 'yuv420p'
            assert (video.width, video.height) == (96, 128)
            assert next(after.decode(video)).rotation == 0
            assert after.duration == pytest.approx(before.duration, abs=50_000)
            assert after.streams.audio[0].codec_context.name == 'aac'

    def test_the_data_of_a_video(self, finished):
        record = finished.records['uneven.mp4']
        path = finished.out / record['data']
        if finished.task == 'fpn':
            assert sorted(os.listdir(path)) == [f'{index:06d}.png' for index in range(10)]
            with Image.open(path / '000003.png') as image:
                assert (image.mode, image.size) == ('P', (96, 128))
            return
        frames = [json.loads(line) for line in path.open()]
        assert [frame['frame'] for frame in frames] == list(range(10))
        assert [frame['time'] for frame in frames] == pytest.approx(UNEVEN_TIMES)
        ids = [each['image_id'] for frame in frames for each in frame['detections']]
        assert len(ids) == 10 * len(frames) and len(set(ids)) == len(frames)

    def test_the_good_part_of_a_damaged_video_is_kept(self, finished):
        record = finished.records['damaged.mp4']
        assert NUM_DAMAGED / 2 < record['frames'] < NUM_DAMAGED
        assert len(shown_times(finished.out / record['drawn'])) == record['frames']


@pytest.mark.skipif(sys.platform != 'linux', reason='names are text elsewhere')
def test_names_that_are_no_text(models, call, tmp_path):
    """Old archives leave such; where they are good or bad, the others go on."""
    folder = os.fsencode(tmp_path / 'in')
    os.mkdir(folder)
    shutil.copy(PHOTOGRAPHS / 'rocket.jpg', folder + b'/b\xe4d.jpg')
    shutil.copy(write_video(tmp_path / 'clip.mp4', 3), folder + b'/b\xe4d.mp4')
    with open(folder + b'/b\xe4d.png', 'w') as file:
        file.write('no image')
    out = tmp_path / 'out'
    command = [*models['retinanet'], os.fsdecode(folder), '--out-dir', out, '--score-thr', 0]
    code, said = call(*command)
    assert code == 3 and '2 done, 1 failed' in said
    assert 'd.png: is neither' in said
    records = read_lines(out)
    assert records[0]['input'] == os.fsdecode(folder + b'/b\xe4d.jpg')
    assert all((out / record['drawn']).is_file() for record in records[:2])
    code, said = call(*command, '--skip-existing')
    assert code == 3 and '2 skipped' in said


class TestEarlierResults:
    @pytest.fixture
    def folder(self, tmp_path, monkeypatch) -> Path:
        """The current folder, with two images in ``in``."""
        monkeypatch.chdir(tmp_path)
        Path('in').mkdir()
        for name in ('a.png', 'b.png'):
            cv2.imwrite(f'in/{name}', np.full((40, 60, 3), 80, np.uint8))
        return tmp_path

    def test_they_are_kept_continued_or_replaced(self, models, call, folder):
        command, out = [*models['fpn'], './in', '--out-dir', 'out'], folder / 'out'
        assert call(*command)[0] == 0
        first = files_in(out)
        assert {'drawn/in/a.jpg', 'drawn/in/b.jpg', 'data/in/a.png', 'data/in/b.png'} < first
        times = {name: (out / name).stat().st_mtime_ns for name in first}

        code, said = call(*models['fpn'], 'in', '--out-dir', 'out')
        assert code == 1 and '--skip-existing' in said and '--overwrite' in said
        shutil.copytree('in', 'other')
        code, said = call(*models['fpn'], 'other', '--out-dir', 'out')
        assert code == 0 and '2 done' in said
        assert {'drawn/other/a.jpg', 'drawn/other/b.jpg'} < files_in(out)

        # What was lost and what is new is done, the rest stays as it is.
        (out / 'data' / 'in' / 'b.png').unlink()
        cv2.imwrite('in/c.png', np.zeros((20, 20, 3), np.uint8))
        code, said = call(*command, '--skip-existing')
        assert code == 0 and '2 done, 1 skipped' in said
        assert first | {'drawn/in/c.jpg', 'data/in/c.png'} < files_in(out)
        assert (out / 'drawn' / 'in' / 'a.jpg').stat().st_mtime_ns == times['drawn/in/a.jpg']
        assert len(read_lines(out)) == 6

        code, said = call(*command, '--overwrite')
        assert code == 0 and '3 done' in said
        assert (out / 'drawn' / 'in' / 'a.jpg').stat().st_mtime_ns > times['drawn/in/a.jpg']

    def test_models_have_folders_of_their_own(self, models, call, folder):
        """Other classes would change what the numbers of earlier results mean."""
        for task in ('fpn', 'mask_rcnn'):
            assert call(*models[task], 'in')[0] == 0
        assert len(list(folder.glob('outputs/*/categories.json'))) == 2
        shutil.copytree('in', 'other')
        code, said = call(*models['retinanet'], 'other', '--out-dir', 'outputs/saved_fpn')
        assert code == 1 and 'other classes' in said


class TestParts:
    @pytest.fixture
    def video(self, tmp_path, monkeypatch) -> Path:
        monkeypatch.chdir(tmp_path)
        return write_video(tmp_path / 'clip.mp4', 20, audio=True)

    def test_some_frames_and_only_drawings(self, models, video, call, tmp_path):
        options = ['--every', 2, '--start', 0.5, '--end', 1.5, '--no-data']
        code, _ = call(*models['fpn'], video, '--out-dir', tmp_path / 'out', *options)
        assert code == 0
        assert files_in(tmp_path / 'out') == {'drawn/clip.mp4', 'predictions.jsonl'}
        times = shown_times(tmp_path / 'out' / 'drawn' / 'clip.mp4')
        assert times == pytest.approx([0, 0.2, 0.4, 0.6, 0.8], abs=1e-4)
        with av.open(str(tmp_path / 'out' / 'drawn' / 'clip.mp4')) as container:
            assert container.duration == pytest.approx(1_000_000, abs=60_000)
            assert container.streams.audio

    def test_no_legend(self, models, call, tmp_path):
        source = shutil.copy(PHOTOGRAPHS / 'rocket.jpg', tmp_path)
        code, _ = call(*models['fpn'], source, '--out-dir', tmp_path, '--no-legend')
        (drawn,) = (tmp_path / 'drawn').rglob('*.jpg')
        assert code == 0 and cv2.imread(str(drawn)).shape == cv2.imread(source).shape

    def test_only_data(self, models, video, call, tmp_path):
        out = tmp_path / 'out'
        command = [*models['retinanet'], video, '--out-dir', out, '--data-only', '--score-thr', 0]
        code, _ = call(*command, '--classes', 'disc', 'ring')
        assert code == 0
        assert files_in(out) == {'data/clip.jsonl', 'categories.json', 'predictions.jsonl'}
        lines = [json.loads(line) for line in (out / 'data' / 'clip.jsonl').open()]
        assert len(lines) == 20
        names = {
            each['id']: each['name'] for each in json.loads((out / 'categories.json').read_text())
        }
        found = {names[each['category_id']] for line in lines for each in line['detections']}
        assert found and found <= {'disc', 'ring'}

    def test_maps_of_an_earlier_run_do_not_stay_among_new_ones(self, models, video, call, tmp_path):
        command = [*models['fpn'], video, '--out-dir', tmp_path / 'out', '--data-only']
        call(*command, '--end', 0.6)
        call(*command, '--every', 5, '--overwrite')
        there = sorted(os.listdir(tmp_path / 'out' / 'data' / 'clip.frames'))
        assert there == ['000000.png', '000005.png', '000010.png', '000015.png']


# infer.py, which goes on after frame 40 of a video when it has been told to stop.
HELD = """
import os, sys, threading
from pathlib import Path
import infer
from backbones.inference import video_reader

told = threading.Event()
interrupt = infer.Run._interrupt


class HeldReader(video_reader.VideoReader):
    def __iter__(self):
        for frame in super().__iter__():
            if frame.index == 40:
                Path(os.environ['HELD']).touch()
                told.wait()
            yield frame


video_reader.VideoReader = HeldReader
infer.Run._interrupt = lambda *given: (interrupt(*given), told.set())
sys.exit(infer.main())
"""


@pytest.mark.skipif(os.name == 'nt', reason='other signals')
@pytest.mark.parametrize(
    'number', [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_stop_in_the_middle_of_a_video(number, models, media, call, tmp_path):
    out, held = tmp_path / 'out', tmp_path / 'held'
    video = write_video(tmp_path / 'long.mp4', 60, audio=True)
    command = [*models['fpn'], video, media / 'coffee.png', '--out-dir', out]
    (tmp_path / 'infer_held.py').write_text(HELD)
    process = Started(Path.cwd(), [tmp_path / 'infer_held.py', *command], HELD=str(held))
    while process.is_alive() and not held.exists():
        time.sleep(0.02)
    os.kill(process.pid, number)
    done = process.wait()
    said = done.stdout + done.stderr
    assert done.returncode == 130, said
    assert 'the same command with --skip-existing continues' in said and 'Traceback' not in said
    (record,) = read_lines(out)
    assert (record['status'], record['frames']) == ('interrupted', 40)
    assert len(shown_times(out / record['drawn'])) == record['frames']
    assert len(list((out / record['data']).iterdir())) == record['frames']
    assert not [name for name in files_in(out) if 'partial' in name]

    if number == signal.SIGINT:
        code, said = call(*command, '--skip-existing')
        assert code == 0 and '2 done' in said
        whole = [line for line in read_lines(out) if line['status'] == 'done']
        assert len(shown_times(out / whole[0]['drawn'])) == 60
        assert not [name for name in files_in(out) if 'interrupted' in name]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[int], Path]]:
    """A disk of so many kilobytes; called again, of another size."""
    folder = tmp_path / 'disk'
    folder.mkdir()
    mounted = []

    def mount(kilobytes: int) -> Path:
        size = f'size={kilobytes}k,remount' if mounted else f'size={kilobytes}k'
        process = subprocess.run(['mount', '-t', 'tmpfs', '-o', size, 'none', folder])
        if process.returncode != 0:
            pytest.skip('mounting a disk is not permitted here')
        mounted.append(folder)
        return folder

    if shutil.which('mount') is None:
        pytest.skip('no mount')
    yield mount
    if mounted:
        # Lazily: who has failed may have left a file open.
        subprocess.run(['umount', '--lazy', folder], check=True)


@pytest.mark.parametrize('last', ['image', 'video'])
def test_a_full_disk(last, models, media, call, small_disk, tmp_path, monkeypatch):
    # With many threads, all images might be half written when the disk is full.
    monkeypatch.setattr(os, 'cpu_count', lambda: 1)
    images = [tmp_path / f'{number}.png' for number in range(8)]
    for number, path in enumerate(images):
        noise = np.random.default_rng(number).integers(0, 256, (100, 150, 3), np.uint8)
        cv2.imwrite(str(path), noise)
    noise = np.random.default_rng(0).integers(0, 256, (100, 90, 120, 3), np.uint8)
    video = write_video(tmp_path / 'noise.mp4', list(noise))
    inputs = images if last == 'image' else [*images[:2], video]
    out = small_disk(120) / 'out'
    command = [*models['fpn'], *inputs, '--out-dir', out]
    code, said = call(*command)
    assert code == 1
    assert 'No space left on device' in said
    assert 'make room' in said and '--skip-existing' in said
    done = [record for record in read_lines(out) if record['status'] == 'done']
    assert 0 < len(done) < len(inputs)
    for record in done:
        assert cv2.imread(str(out / record['drawn'])) is not None
        with Image.open(out / record['data']) as image:
            image.load()
    assert not [name for name in files_in(out) if 'partial' in name]

    small_disk(20_000)
    code, said = call(*command, '--skip-existing')
    assert code == 0, said
    assert f'{len(inputs) - len(done)} done, {len(done)} skipped' in said
    stems = {path.stem for path in inputs}
    assert {Path(name).stem for name in files_in(out / 'drawn')} == stems
    assert {Path(record['input']).stem for record in read_lines(out)} == stems


def test_a_read_only_disk(models, call, tmp_path, monkeypatch):
    def refuse(path: Path, **_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, 'mkdir', refuse)
    out = tmp_path / 'out'
    code, said = call(*models['fpn'], PHOTOGRAPHS / 'rocket.jpg', '--out-dir', out)
    assert code == 1 and f'{out}: ' in said and 'Read-only file system' in said


class TestLive:
    def test_rtsp(self, models, call, tmp_path):
        out = tmp_path / 'out'
        with RtspServer(num_frames=40) as server:
            code, said = call(*models['fpn'], server.url, '--out-dir', out, '--end', 1)
        assert code == 0, said
        (record,) = read_lines(out)
        assert (record['kind'], record['status'], record['input']) == ('live', 'done', server.url)
        assert record['dropped'] >= 0 and record['frames'] > 0
        times = shown_times(out / record['drawn'])
        assert len(times) == record['frames'] and times[-1] < 1.1
        assert 'capture: ' in said and f'{record["dropped"]} dropped' in said
        assert 'model alone' in said


class TestWindow:
    """Which the user closes at the first drawing."""

    @pytest.fixture
    def call(self, models, call, tmp_path, monkeypatch) -> Callable[..., tuple[int, str]]:
        monkeypatch.setattr(infer, 'Window', lambda: SimpleNamespace(show=lambda drawing: False))
        return partial(call, *models['fpn'], '--show', '--out-dir', tmp_path / 'out')

    def test_files_are_interrupted(self, call, tmp_path):
        (tmp_path / 'in').mkdir()
        for number in range(40):
            cv2.imwrite(f'{tmp_path}/in/{number}.png', np.full((40, 60, 3), 80, np.uint8))
        code, said = call(tmp_path / 'in')
        assert code == 130 and '--skip-existing' in said
        num_done = len(read_lines(tmp_path / 'out'))
        assert num_done < 40
        code, said = call(tmp_path / 'in', '--skip-existing')
        assert f'{num_done} skipped' in said
        # It would keep the results of an earlier run.
        code, said = call(tmp_path / 'in', '--overwrite')
        assert code == 130 and '--skip-existing' not in said

    def test_a_camera_has_ended(self, call, tmp_path, monkeypatch):
        def read_stream(url: str, timeout: float) -> Iterator:
            while True:
                yield None, np.full((40, 60, 3), 80, np.uint8)
                time.sleep(0.01)

        monkeypatch.setenv('no_proxy', '*')
        monkeypatch.setattr(camera, 'read_stream', read_stream)
        with serve({'/': ('multipart/x-mixed-replace; boundary=next', b'--next')}) as server:
            code, said = call(server.url + '/')
        assert code == 0 and '--skip-existing' not in said
        assert [record['status'] for record in read_lines(tmp_path / 'out')] == ['done']


class TestMistakes:
    @pytest.mark.parametrize(
        ('arguments', 'code', 'said'),
        [
            (['--classes', 'unicorn'], 1, "no class 'unicorn'"),
            (['--palette', 'sunset'], 1, 'sunset'),
            (['--device', 'cuda:77'], 1, "device 'cuda:77' cannot be used here"),
            (['webcam:0'], 1, 'webcam:0 has no end of its own: give it as the only input'),
            (['--data-only', '--no-data'], 2, 'not allowed with'),
            (['--data-only', '--show'], 2, '--show'),
            (['--every', '0'], 2, "'0' is not a number from 1 on"),
            (['--score-thr', '50'], 2, "'50' is not a number from 0"),
            (['--score-thr', 'high'], 2, "'high' is not a number from 0"),
            (['--start', '-1'], 2, "'-1' is not a number from 0"),
            (['--start', '9', '--end', '9'], 2, 'after --start'),
            (['--end', '0'], 2, 'after --start'),
        ],
    )
    def test_of_the_command(self, arguments, code, said, models, call, tmp_path):
        photograph = PHOTOGRAPHS / 'rocket.jpg'
        command = [*models['retinanet'], photograph, '--out-dir', tmp_path / 'out', *arguments]
        assert call(*command)[0] == code
        assert said in call(*command)[1]
        assert not list(tmp_path.glob('out/*/*'))

    def test_classes_before_the_inputs(self, models, call):
        for arguments in (['--classes', 'disc', 'a.jpg'], []):
            code, said = call(*models['fpn'], *arguments)
            assert code == 2 and ('before --classes' in said) == bool(arguments)

    def test_of_files(self, models, call, tmp_path):
        config, checkpoint = models['fpn']
        photograph = PHOTOGRAPHS / 'rocket.jpg'
        code, said = call(config, 'nowhere.pth', photograph, '--out-dir', tmp_path / 'a')
        assert code == 1 and 'nowhere.pth does not exist' in said
        code, said = call(checkpoint, config, photograph, '--out-dir', tmp_path / 'a')
        assert code == 1 and str(checkpoint) in said and 'before the checkpoint' in said
        code, said = call(config, 'model.onnx', photograph, '--out-dir', tmp_path / 'a')
        assert code == 1 and f'without {config}' in said
        code, said = call('nowhere.py', checkpoint, photograph, '--out-dir', tmp_path / 'a')
        assert code == 1 and 'nowhere.py' in said
        code, said = call(config, checkpoint, photograph, '--out-dir', checkpoint)
        assert code == 1 and f"exists: '{checkpoint}'" in said
        code, said = call(
            models['mask_rcnn'][0], models['retinanet'][1], photograph, '--out-dir', tmp_path
        )
        assert code == 1 and 'does not fit' in said
