"""The shapes set: its two layouts, what they agree on, and what the tool refuses to do."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

TOOL = Path(__file__).parents[2] / 'tools' / 'make_shapes.py'
NAMES = ['disc', 'square', 'triangle', 'star', 'cross', 'ring']
TRAIN, VAL, HEIGHT, WIDTH = 12, 6, 64, 80
SPLITS = [('train', 'train2017', 'training', TRAIN), ('val', 'val2017', 'validation', VAL)]


def make_shapes(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def make_set(out: Path, *arguments: object, train: int = TRAIN) -> subprocess.CompletedProcess[str]:
    size = f'{HEIGHT}x{WIDTH}'
    return make_shapes(out, '--train', train, '--val', VAL, '--size', size, *arguments)


def read_all(root: Path) -> dict[str, bytes]:
    files = (path for path in root.rglob('*') if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


@pytest.fixture(scope='module')
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp('data') / 'shapes'
    result = make_set(out)
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope='module')
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location('make_shapes', TOOL)
    module = importlib.util.module_from_spec(spec)
    # dataclasses looks up the module of a class by its name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# What is written


def test_layout(shapes: Path) -> None:
    expected = {'classes.txt', 'parameters.json'}
    for name, coco, ade, count in SPLITS:
        expected.add(f'coco/annotations/instances_{coco}.json')
        for number in range(1, count + 1):
            stem = f'{name}_{number:06d}'
            expected.add(f'coco/{coco}/{stem}.jpg')
            expected.add(f'ade/images/{ade}/{stem}.jpg')
            expected.add(f'ade/annotations/{ade}/{stem}.png')
    files = read_all(shapes)
    assert set(files) == expected
    assert files['classes.txt'].decode().split() == ['background', *NAMES]
    for name, coco, ade, _ in SPLITS:
        first = f'{name}_000001.jpg'
        assert files[f'coco/{coco}/{first}'] == files[f'ade/images/{ade}/{first}']


def test_summary_comes_last(tmp_path: Path) -> None:
    out = tmp_path / 'shapes'
    result = make_set(out)
    *_, train_row, val_row, last = result.stdout.splitlines()
    for row, coco in ((train_row, 'train2017'), (val_row, 'val2017')):
        document = json.loads((out / f'coco/annotations/instances_{coco}.json').read_text())
        assert sum(map(int, row.split()[1:])) == len(document['annotations'])
    assert last == f'12 training and 6 validation pictures of 64x80 written to {out}'


def test_same_seed_gives_the_same_bytes(shapes: Path, tmp_path: Path) -> None:
    make_set(tmp_path / 'again')
    assert read_all(tmp_path / 'again') == read_all(shapes)


def test_another_seed_gives_other_pictures(shapes: Path, tmp_path: Path) -> None:
    make_set(tmp_path / 'other', '--seed', 1)
    first, other = read_all(shapes), read_all(tmp_path / 'other')
    pictures = [name for name in first if name.endswith('.jpg')]
    assert pictures
    assert all(first[name] != other[name] for name in pictures)


def test_larger_set_begins_with_the_smaller(shapes: Path, tmp_path: Path) -> None:
    make_set(tmp_path / 'larger', train=TRAIN + 4)
    smaller, larger = read_all(shapes), read_all(tmp_path / 'larger')
    for name, content in smaller.items():
        if not name.endswith('.json'):
            assert larger[name] == content, name
    name = 'coco/annotations/instances_train2017.json'
    few, many = json.loads(smaller[name]), json.loads(larger[name])
    for key in ('images', 'annotations'):
        assert many[key][: len(few[key])] == few[key]
        assert len(many[key]) > len(few[key])


# The annotations


@pytest.fixture(scope='module', params=SPLITS, ids=['train', 'val'])
def split(request: pytest.FixtureRequest, shapes: Path) -> tuple[COCO, Path]:
    """The COCO annotations of a split and the folder of its ADE20K annotations."""
    _, coco, ade, _ = request.param
    annotations = COCO(str(shapes / f'coco/annotations/instances_{coco}.json'))
    return annotations, shapes / 'ade/annotations' / ade


def read_label_map(folder: Path, image: dict) -> np.ndarray:
    path = folder / Path(image['file_name']).with_suffix('.png')
    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)


def test_coco_categories(split: tuple[COCO, Path]) -> None:
    coco, _ = split
    assert [(c['id'], c['name']) for c in coco.dataset['categories']] == list(enumerate(NAMES, 1))


def test_every_class_occurs(split: tuple[COCO, Path]) -> None:
    coco, _ = split
    assert {annotation['category_id'] for annotation in coco.dataset['annotations']} == set(
        range(1, len(NAMES) + 1)
    )


def test_ids_are_unique_and_above_zero(split: tuple[COCO, Path]) -> None:
    coco, _ = split
    for key in ('images', 'annotations'):
        ids = [item['id'] for item in coco.dataset[key]]
        assert ids == list(range(1, len(ids) + 1))


def test_pictures_have_their_objects_and_size(split: tuple[COCO, Path]) -> None:
    coco, folder = split
    for image in coco.dataset['images']:
        assert (image['height'], image['width']) == (HEIGHT, WIDTH)
        label_map = read_label_map(folder, image)
        assert label_map.shape == (HEIGHT, WIDTH)
        assert label_map.dtype == np.uint8
        assert label_map.min() == 1, 'nothing is unlabelled, and some background is in sight'
        assert 2 <= len(coco.getAnnIds(imgIds=image['id'])) <= 6


def test_masks_are_the_label_map(split: tuple[COCO, Path]) -> None:
    coco, folder = split
    for image in coco.dataset['images']:
        painted = np.ones((HEIGHT, WIDTH), np.uint8)
        for annotation in coco.imgToAnns[image['id']]:
            painted[coco.annToMask(annotation) == 1] = annotation['category_id'] + 1
        np.testing.assert_array_equal(painted, read_label_map(folder, image))


def test_boxes_and_areas_are_those_of_the_masks(split: tuple[COCO, Path]) -> None:
    coco, _ = split
    for annotation in coco.dataset['annotations']:
        mask = coco.annToMask(annotation)
        rows, columns = np.nonzero(mask)
        x, y, width, height = annotation['bbox']
        assert (x, y) == (columns.min(), rows.min())
        assert (x + width, y + height) == (columns.max() + 1, rows.max() + 1)
        assert annotation['area'] == mask.sum()
        assert annotation['iscrowd'] == 0


def test_masks_with_holes_are_rle_and_others_polygons(tool: ModuleType) -> None:
    solid = np.zeros((20, 30), bool)
    solid[2:8, 3:9] = solid[10:15, 12:25] = True
    holed = solid.copy()
    holed[4:6, 5:7] = False
    assert [len(polygon) for polygon in tool.coco_segmentation(solid)] == [8, 8]
    assert set(tool.coco_segmentation(holed)) == {'size', 'counts'}


# Drawing


def test_draw_picture(tool: ModuleType) -> None:
    image, label_map, instances = tool.draw_picture(np.random.default_rng(0), 48, 96)
    assert (image.shape, image.dtype) == ((48, 96, 3), np.uint8)
    assert (label_map.shape, label_map.dtype) == ((48, 96), np.uint8)
    painted = np.zeros_like(label_map)
    for instance in instances:
        assert not painted[instance.mask].any(), 'masks are disjoint'
        painted[instance.mask] = instance.label
    np.testing.assert_array_equal(painted, label_map)


def test_classes_are_balanced(tool: ModuleType) -> None:
    counts = np.zeros(len(NAMES) + 1, int)
    for seed in range(100):
        _, _, instances = tool.draw_picture(np.random.default_rng(seed), 32, 32)
        np.add.at(counts, [instance.label for instance in instances], 1)
    mean = counts[1:].mean()
    assert (abs(counts[1:] - mean) < 0.3 * mean).all(), counts


def test_every_object_stays_in_sight(tool: ModuleType) -> None:
    smallest_disc = np.pi / 4 * (tool.OBJECT_SIZES[0] * 96) ** 2
    for seed in range(30):
        _, _, instances = tool.draw_picture(np.random.default_rng(seed), 96, 96)
        for instance in instances:
            # No unit shape has less than half the area of the disc, and none is squashed below 0.8.
            least = tool.MIN_VISIBLE * 0.8 * 0.5 * smallest_disc
            assert instance.mask.sum() > 0.9 * least


# What the tool refuses


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--size', '31'], "argument --size: '31' is not within 32 to 2048 pixels a side"),
        (['--size', '64x8'], "argument --size: '64x8' is not within 32 to 2048 pixels a side"),
        (['--size', 'big'], "argument --size: 'big' is neither a side such as 160 nor HxW"),
        (['--train', '0'], "argument --train: '0' is not a number of pictures, 1 or more"),
        (['--val', '-3'], "argument --val: '-3' is not a number of pictures, 1 or more"),
        (['--seed', '-1'], "argument --seed: '-1' is not a whole number from 0 to 2**32 - 1"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, tmp_path: Path) -> None:
    out = tmp_path / 'shapes'
    result = make_shapes(out, *arguments)
    assert result.returncode == 2
    assert result.stderr == f'make_shapes.py: error: {message}\n'
    assert not out.exists()


@pytest.mark.parametrize('below', ['', 'shapes'])
def test_file_in_the_way(below: str, tmp_path: Path) -> None:
    file = tmp_path / 'file'
    file.write_text('precious')
    result = make_set(file / below)
    assert result.returncode == 2
    assert result.stderr == f'make_shapes.py: error: {file} is not a folder\n'
    assert file.read_text() == 'precious'


def test_same_set_is_left_as_it_is(tmp_path: Path) -> None:
    out = tmp_path / 'shapes'
    make_set(out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob('*')}
    result = make_set(out)
    assert result.returncode == 0
    assert 'is already there' in result.stdout
    assert {path: path.stat().st_mtime_ns for path in out.rglob('*')} == before


def test_other_set_is_replaced_only_when_told_to(tmp_path: Path) -> None:
    out = tmp_path / 'shapes'
    make_set(out)
    before = read_all(out)

    result = make_set(out, '--seed', 1)
    assert result.returncode == 2
    assert result.stderr.count('\n') == 1
    assert 'other parameters' in result.stderr
    assert '--overwrite' in result.stderr
    assert read_all(out) == before

    assert make_set(out, '--seed', 1, '--overwrite').returncode == 0
    assert json.loads((out / 'parameters.json').read_text())['seed'] == 1
    assert read_all(out) != before
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize('name', ['thesis.txt', 'parameters.json'])
def test_other_files_are_never_replaced(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text('{"precious": 1}')
    result = make_set(tmp_path, '--overwrite')
    assert result.returncode == 2
    assert 'no shapes set' in result.stderr
    assert read_all(tmp_path) == {name: b'{"precious": 1}'}


def test_empty_folder_is_filled(tmp_path: Path) -> None:
    out = tmp_path / 'shapes'
    out.mkdir()
    assert make_set(out).returncode == 0
    assert (out / 'classes.txt').is_file()


# Interrupted runs


def test_interrupt_leaves_nothing(
    tool: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    draw_picture = tool.draw_picture
    drawn = []

    def draw_two_pictures(*arguments: object) -> tuple:
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(draw_picture(*arguments))
        return drawn[-1]

    monkeypatch.setattr(tool, 'draw_picture', draw_two_pictures)
    assert tool.main([str(tmp_path / 'shapes'), '--size', '32']) == 130
    assert len(drawn) == 2
    assert 'interrupted' in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_killed_run_leaves_no_set(tmp_path: Path) -> None:
    out = tmp_path / 'shapes'
    process = subprocess.Popen([sys.executable, str(TOOL), str(out), '--train', '100000'])
    try:
        deadline = time.monotonic() + 30
        while not list(tmp_path.rglob('*.jpg')):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    assert not out.exists()
    assert make_set(out).returncode == 0
