"""The shapes dataset: its two layouts, what they agree on, and what the tool refuses to do."""

import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import cv2
import make_shapes
import numpy as np
import pytest
from make_shapes import CLASSES, draw_image, main
from pycocotools.coco import COCO

TRAIN, VAL, HEIGHT, WIDTH = 12, 6, 64, 80
SPLITS = [('train', 'train2017', 'training', TRAIN), ('val', 'val2017', 'validation', VAL)]


def make_set(out: Path, train: int = TRAIN, val: int = VAL) -> None:
    main([str(out), '--train', str(train), '--val', str(val), '--size', f'{HEIGHT}x{WIDTH}'])


def read_all(root: Path) -> dict[str, bytes]:
    files = (path for path in root.rglob('*') if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


@pytest.fixture(scope='module')
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp('data') / 'shapes'
    make_set(out)
    return out


def test_layout(dataset: Path) -> None:
    files = read_all(dataset)
    expected = {'classes.txt', 'parameters.json'}
    for name, coco, ade, count in SPLITS:
        expected.add(f'coco/annotations/instances_{coco}.json')
        for stem in (f'{name}_{number:06d}' for number in range(1, count + 1)):
            expected |= {f'coco/{coco}/{stem}.jpg', f'ade/annotations/{ade}/{stem}.png'}
            expected.add(f'ade/images/{ade}/{stem}.jpg')
            assert files[f'coco/{coco}/{stem}.jpg'] == files[f'ade/images/{ade}/{stem}.jpg']
    assert set(files) == expected
    assert files['classes.txt'].decode().split() == ['background', *CLASSES]


def test_a_larger_dataset_begins_with_the_smaller(dataset: Path, tmp_path: Path) -> None:
    make_set(tmp_path / 'larger', TRAIN + 4)
    first, larger = read_all(dataset), read_all(tmp_path / 'larger')
    assert all(larger[name] == first[name] for name in first if not name.endswith('.json'))
    name = 'coco/annotations/instances_train2017.json'
    few, many = json.loads(first[name]), json.loads(larger[name])
    for key in ('images', 'annotations'):
        assert many[key][: len(few[key])] == few[key] and len(many[key]) > len(few[key])


@pytest.mark.parametrize(('coco', 'ade'), [split[1:3] for split in SPLITS])
def test_layouts_agree(dataset: Path, coco: str, ade: str) -> None:
    annotations = COCO(str(dataset / f'coco/annotations/instances_{coco}.json'))
    categories = [(c['id'], c['name']) for c in annotations.dataset['categories']]
    assert categories == list(enumerate(CLASSES, 1))
    assert {a['category_id'] for a in annotations.dataset['annotations']} == {1, 2, 3, 4, 5, 6}
    for key in ('images', 'annotations'):
        ids = [item['id'] for item in annotations.dataset[key]]
        assert ids == list(range(1, len(ids) + 1))
    for image in annotations.dataset['images']:
        assert (image['height'], image['width']) == (HEIGHT, WIDTH)
        assert 2 <= len(annotations.getAnnIds(imgIds=image['id'])) <= 6
        painted = np.ones((HEIGHT, WIDTH), np.uint8)
        for each in annotations.imgToAnns[image['id']]:
            mask = annotations.annToMask(each)
            painted[mask == 1] = each['category_id'] + 1
            rows, columns = np.nonzero(mask)
            x, y, width, height = each['bbox']
            assert (x, y) == (columns.min(), rows.min())
            assert (x + width, y + height) == (columns.max() + 1, rows.max() + 1)
            assert (each['area'], each['iscrowd']) == (mask.sum(), 0)
        file = dataset / 'ade/annotations' / ade / Path(image['file_name']).with_suffix('.png')
        np.testing.assert_array_equal(painted, cv2.imread(str(file), cv2.IMREAD_UNCHANGED))
        assert painted.min() == 1  # some background is visible


def test_objects_are_visible_disjoint_and_balanced() -> None:
    counts = np.zeros(len(CLASSES) + 1, int)
    smallest_disc = np.pi / 4 * (make_shapes.OBJECT_SIZES[0] * 48) ** 2
    for seed in range(100):
        image, segmentation_map, objects = draw_image(np.random.default_rng(seed), 48, 96)
        assert (image.shape, image.dtype) == ((48, 96, 3), np.uint8)
        painted = np.zeros((48, 96), np.uint8)
        for label, mask in objects:
            assert not painted[mask].any()
            painted[mask] = label
            counts[label] += 1
            # No unit shape has less than half the area of the disc, none is squashed below 0.8.
            assert mask.sum() > 0.8 * make_shapes.MIN_VISIBLE * 0.8 * 0.5 * smallest_disc
        np.testing.assert_array_equal(painted, segmentation_map)
    mean = counts[1:].mean()
    assert (abs(counts[1:] - mean) < 0.3 * mean).all(), counts


@pytest.mark.parametrize('arguments', [('--size', '64x8'), ('--size', 'big'), ('--train', '0')])
def test_bad_arguments(arguments: tuple[str, str], tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as left:
        main([str(tmp_path / 'shapes'), *arguments])
    assert left.value.code == 2 and arguments[0] in capsys.readouterr().err
    assert not (tmp_path / 'shapes').exists()


def test_nothing_is_replaced(dataset: Path, tmp_path: Path) -> None:
    times = {path: path.stat().st_mtime_ns for path in dataset.rglob('*')}
    make_set(dataset)
    with pytest.raises(SystemExit, match=str(dataset)):
        make_set(dataset, val=1)
    assert {path: path.stat().st_mtime_ns for path in dataset.rglob('*')} == times
    (tmp_path / 'parameters.json').write_text('{"precious": 1}')
    for out in (tmp_path, tmp_path / 'parameters.json', tmp_path / 'parameters.json' / 'below'):
        with pytest.raises(SystemExit, match=str(tmp_path)):
            make_set(out)
    assert read_all(tmp_path) == {'parameters.json': b'{"precious": 1}'}


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGKILL])
def test_stopped_run_leaves_no_dataset(tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / 'shapes'
    command = [sys.executable, make_shapes.__file__, str(out), '--train', '100000']
    # A shell ignores SIGINT in what it starts in the background, and so would this process.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob('*.jpg')):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    errors = process.communicate(timeout=60)[1]
    assert not out.exists()
    if number == signal.SIGINT:
        assert process.returncode == 1 and 'Traceback' not in errors
        assert list(tmp_path.iterdir()) == []
