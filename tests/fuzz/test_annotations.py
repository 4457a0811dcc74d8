"""Whatever is in an annotation file, it is found and said; what has no errors can be trained on."""

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fuzzing import corrupted, encoded, inputs
from hypothesis import example, given
from hypothesis import strategies as st
from mmengine.config import Config
from mmengine.registry import DATASETS
from PIL import Image
from pycocotools import mask as coco_mask
from tiny import write_tiny_config

from backbones.data import Report, check, check_dataset
from backbones.data.classes import set_classes
from backbones.data.config_datasets import datasets_of
from backbones.data.findings import printable
from backbones.data.images import Sample, check_sample
from backbones.data.labels import LabelRules
from backbones.data.skip_bad import guard, leave_out_bad
from backbones.engine.config import load_config
from backbones.errors import ConfigError, DataError

WIDTH, HEIGHT = 48, 36
CLASSES = ('disc', 'square')


def whole_file() -> dict:
    """A small COCO file with every kind of segmentation."""
    drawn = np.zeros((HEIGHT, WIDTH), np.uint8)
    drawn[5:20, 8:30] = 1
    compressed = coco_mask.encode(np.asfortranarray(drawn))
    masks = [
        [[5, 5, 20, 5, 20, 20, 5, 20], [25.5, 5, 35, 5, 30, 12]],
        {'size': [HEIGHT, WIDTH], 'counts': compressed['counts'].decode()},
        {'size': [HEIGHT, WIDTH], 'counts': [100, 50, HEIGHT * WIDTH - 150]},
        [[2, 2, 12, 2, 12, 9]],
    ]
    return {
        'info': {},
        'images': [
            {'id': number, 'file_name': f'{number}.jpg', 'width': WIDTH, 'height': HEIGHT}
            for number in (1, 2)
        ],
        'categories': [{'id': 3, 'name': 'disc'}, {'id': 7, 'name': 'square'}],
        'annotations': [
            {
                'id': number,
                'image_id': 1 + number % 2,
                'category_id': (3, 7)[number // 2],
                'bbox': [5, 5, 20.5, 15],
                'area': 225.0,
                'iscrowd': int(number == 2),
                'segmentation': mask,
            }
            for number, mask in enumerate(masks)
        ],
    }


ODD_NUMBERS = st.sampled_from(
    [
        *(float('nan'), float('inf'), -float('inf'), 1e308, -1e-9, 0.5, 2**31, 2**63, 10**30),
        *(*range(-2, 9), 1e9, WIDTH * HEIGHT),
    ]
)
ODD_TEXTS = st.one_of(
    st.sampled_from(['', '1', '\0', '\ud800', '../1.jpg', '/', '1.jpg', '1.JPG', 'disc', '\n']),
    st.text(max_size=5),
)
ODD_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), ODD_NUMBERS, ODD_TEXTS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(['id', 'name', 'size', 'counts']), inner, max_size=2),
    ),
    max_leaves=5,
)


@st.composite
def broken(draw: st.DrawFn) -> dict:
    """A COCO file's content after one to three changes."""
    content = whole_file()
    for _ in range(draw(st.integers(1, 3))):
        change_somewhere(draw, content)
    return content


def change_somewhere(draw: st.DrawFn, content: dict) -> None:
    """Walk down from the top, then change what is there."""
    parent = content
    while True:
        keys = list(parent) if isinstance(parent, dict) else range(len(parent))
        if not keys:
            return
        key = draw(st.sampled_from(keys))
        inner = parent[key]
        if isinstance(inner, list | dict) and inner and draw(st.integers(0, 5)):
            parent = inner
            continue
        break
    match draw(st.sampled_from(['replace', 'replace', 'delete', 'repeat'])):
        case 'replace':
            parent[key] = draw(ODD_VALUES)
        case 'delete':
            del parent[key]
        case 'repeat' if isinstance(parent, list):
            parent.append(copy.deepcopy(inner))


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images, and where an annotation file goes."""
    folder = tmp_path_factory.mktemp('coco')
    for number in (1, 2):
        Image.new('RGB', (WIDTH, HEIGHT), (90, 40 * number, 9)).save(folder / f'{number}.jpg')
    return folder


@pytest.fixture(scope='module')
def config(folder: Path, shapes: Path) -> Callable[[], Config]:
    """A tiny config of the annotation file."""
    read = load_config(str(write_tiny_config(folder, 'mask_rcnn', shapes)))
    read.work_dir = str(folder / 'run')
    for dataset in datasets_of(read):
        dataset.update(data_root=str(folder), ann_file='broken.json', data_prefix={'img': ''})
    for evaluator in (read.val_evaluator, read.test_evaluator):
        evaluator.ann_file = str(folder / 'broken.json')
    # Without bases, which mmengine takes a second to find every time.
    read.dump(folder / 'whole.py')
    whole = load_config(str(folder / 'whole.py'))
    return lambda: copy.deepcopy(whole)


@pytest.fixture(scope='module', autouse=True)
def one_process() -> Iterator[None]:
    """Images are read here: starting processes for two of them takes the most time of all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, 'check_in_parallel', lambda samples, _: map(check_sample, samples))
        yield


def whole_report(config: Config) -> Report:
    """What check_dataset.py finds, which has to be fit to be shown and written."""
    report = check_dataset(config, ('train', 'val'), workers=1)
    '\n'.join(report.lines()).encode()
    printable(json.dumps(report.as_dict(), ensure_ascii=False)).encode()
    return report


def check_before_training(config: Config) -> str | None:
    """What keeps a training from starting."""
    try:
        set_classes(config, ('train', 'val'), keep_files=True)
        check.refuse_errors(config, ('train', 'val'))
    except (ConfigError, DataError) as error:
        return str(error)
    return None


def prepare_all(config: Config) -> None:
    """Read what training and validation would."""
    for loader in (config.train_dataloader, config.val_dataloader):
        # Serializing collects garbage, of which a long run has much.
        dataset = DATASETS.build({**loader.dataset, 'serialize_data': False})
        assert len(dataset), 'mmengine cannot serialize an empty one'
        guard(dataset)
        for index in range(len(dataset)):
            dataset[index]


def train_on(config: Callable[[], Config]) -> None:
    """Check an annotation file, start on it, and start with --skip-bad; nothing may go wrong."""
    report = whole_report(config())
    reason = check_before_training(config())
    # Images are opened by check_dataset.py and in training, not before it.
    errors = [found for found in report.of('error') if found.kind != 'image of another size']
    assert bool(errors) == bool(reason), (errors, reason)
    if not reason:
        whole = config()
        set_classes(whole, ('train', 'val'))
        prepare_all(whole)
    rest = config()
    try:
        set_classes(rest, ('train', 'val'))
        leave_out_bad(rest, ('train', 'val'))
    except (ConfigError, DataError) as error:
        assert report.of('error'), error
    else:
        prepare_all(rest)


@inputs(60, 1500)
@given(content=broken())
def test_broken_coco_files(content: dict, config: Callable[[], Config], folder: Path):
    text = json.dumps(content)
    (folder / 'broken.json').write_text(text, encoding='utf-8')
    train_on(config)


ENCODINGS = {
    name: json.dumps(whole_file()).encode(name)
    for name in ('utf-8', 'utf-8-sig', 'utf-16', 'utf-32', 'latin-1')
}


@inputs(40, 600)
@given(content=corrupted(ENCODINGS).map(lambda file: file[1]))
@example(content=b'[' * 100_000)
@example(content=b'{"images": ' + b'9' * 5000 + b'}')
def test_corrupt_coco_files(content: bytes, config: Callable[[], Config], folder: Path):
    (folder / 'broken.json').write_bytes(content)
    train_on(config)


def seg_maps() -> dict[str, bytes]:
    """PNGs of the kinds that hold labels."""
    labels = np.random.default_rng(0).integers(0, 3, (HEIGHT, WIDTH), np.uint8)
    plain = Image.fromarray(labels)
    palette = plain.copy()
    palette.putpalette(bytes(range(256)) * 3)
    wide = Image.fromarray(labels.astype(np.uint16))
    maps = {'plain': plain, 'palette': palette, 'wide': wide, 'bits': plain.convert('1')}
    return {name: encoded(image, 'PNG') for name, image in maps.items()}


@inputs(60, 1500)
@given(file=corrupted(seg_maps()))
def test_corrupt_seg_maps(file: tuple[str, bytes], folder: Path):
    path = folder / 'labels.png'
    path.write_bytes(file[1])
    sample = Sample(str(folder / '1.jpg'), '1.jpg', seg_map=str(path), labels=LabelRules(2, True))
    for decode in (True, False):
        assert all(reason for _, _, reason, _ in check_sample(replace(sample, decode=decode))[0])
