"""Every fault is found, with file and reason, and nothing in a whole set."""

import copy
import io
import json
import multiprocessing
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import mmcv
import numpy as np
import pytest
from corrupt import cut, detach, edit
from mmengine.config import Config, ConfigDict
from PIL import Image
from pycocotools import mask as coco_mask
from tiny import write_tiny_config

from backbones.data import Report, check_dataset
from backbones.data.config_datasets import datasets_of
from backbones.data.images import content_fault
from backbones.data.objects import decode_runs, run_length_fault
from backbones.engine.config import load_config

TRAIN = 'coco/annotations/instances_train2017.json'
VAL = 'coco/annotations/instances_val2017.json'
IMAGE = 'coco/train2017/train_000001.jpg'
SEG_IMAGE = 'ade/images/training/train_000001.jpg'
LABELS = 'ade/annotations/training/train_000001.png'
NAN, INF = float('nan'), float('inf')


@pytest.fixture(scope='module')
def configs(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    """The tiny configs, read once."""
    folder = tmp_path_factory.mktemp('configs')
    tasks = ('retinanet', 'mask_rcnn', 'fpn')
    return {task: load_config(str(write_tiny_config(folder, task, shapes))) for task in tasks}


@pytest.fixture
def check(configs: dict[str, Config], data: Path) -> Callable[..., Report]:
    """Checks the set: ``check(task, splits, change=..., **options)``."""

    def run(task: str, splits=('train',), change=lambda config: None, **options) -> Report:
        config = copy.deepcopy(configs[task])
        for dataset in datasets_of(config):
            dataset.data_root = str(data / ('ade' if task == 'fpn' else 'coco'))
        change(config)
        return check_dataset(config, splits, **{'workers': 1, **options})

    return run


def annotation(**entries: object) -> Callable[[Path], None]:
    """Changes entries of the first annotation, of the first image."""
    return content(lambda c: c['annotations'][0].update(entries))


def image(number: int = 0, **entries: object) -> Callable[[Path], None]:
    return content(lambda c: c['images'][number].update(entries))


def category(**entries: object) -> Callable[[Path], None]:
    """Changes entries of the second category."""
    return content(lambda c: c['categories'][1].update(entries))


def content(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return lambda data: edit(data / TRAIN, change)


def text(new: str) -> Callable[[Path], None]:
    return lambda data: (data / TRAIN).write_text(new)


def mask(*size: int, counts: object) -> Callable[[Path], None]:
    return annotation(segmentation={'size': list(size), 'counts': counts})


def polygons(*parts: object) -> Callable[[Path], None]:
    return annotation(segmentation=list(parts))


def tear(path: Path) -> None:
    """Corrupt bytes in the middle of a JPEG's data."""
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2 : len(whole) // 2 + 6] = b'\xff\xd4\x55\xff\xd1\x55'
    path.write_bytes(whole)


def break_animation(path: Path) -> None:
    """Write an animated PNG that OpenCV 4.12 does not survive: its first row has filter 9."""
    image = Image.new('RGB', (128, 128))
    image.save(path, 'PNG', save_all=True, append_images=[Image.new('RGB', (128, 128), 'red')])
    content = path.read_bytes()
    start = content.index(b'IDAT') - 4
    (size,) = struct.unpack('>I', content[start : start + 4])
    rows = bytearray(zlib.decompress(content[start + 8 : start + 8 + size]))
    rows[0] = 9
    chunk = b'IDAT' + zlib.compress(bytes(rows))
    chunk = struct.pack('>I', len(chunk) - 4) + chunk + struct.pack('>I', zlib.crc32(chunk))
    path.write_bytes(content[:start] + chunk + content[start + 12 + size :])


def relabel(change: Callable[[np.ndarray], Image.Image], **save) -> Callable[[Path], None]:
    def corrupt(data: Path) -> None:
        labels = np.array(Image.open(data / LABELS))
        change(labels).save(data / LABELS, **save)

    return corrupt


def with_palette(labels: np.ndarray) -> Image.Image:
    image = Image.fromarray(labels)
    image.putpalette(bytes(range(256)) * 3)
    return image


def wide(labels: np.ndarray) -> Image.Image:
    return Image.fromarray(labels.astype(np.uint16))


def with_nan(labels: np.ndarray) -> Image.Image:
    """As geographic software writes it, where nothing is known."""
    return Image.fromarray(np.where(labels == labels[0, 0], np.nan, labels).astype(np.float32))


def of_16_bits(step: int) -> Callable[[Path], None]:
    """Makes a gray image of 12 bits, brightened by a factor."""
    ramp = np.arange(4096, dtype=np.uint16).repeat(4).reshape(128, 128)
    return lambda data: Image.fromarray(ramp * step).save(data / IMAGE, format='PNG')


def is_small(data: Path) -> None:
    Image.new('RGB', (1, 1)).save(data / IMAGE)
    image(width=1, height=1)(data)


def is_rotated(data: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (128, 96)).save(data / IMAGE, exif=exif)
    image(height=96)(data)


# What is changed, severity, kind, and what the reason has to say.
IMAGES = [
    (lambda d: cut(d / IMAGE), 'error', 'unreadable image', 'truncated'),
    (lambda d: (d / IMAGE).write_bytes(b''), 'error', 'unreadable image', 'empty'),
    (lambda d: (d / IMAGE).write_text('<html>'), 'error', 'unreadable image', 'no format'),
    (lambda d: tear(d / IMAGE), 'warning', 'corrupt image', 'Corrupt JPEG data'),
    (lambda d: break_animation(d / IMAGE), 'error', 'unreadable image', 'animated PNG is corrupt'),
    (lambda d: (d / IMAGE).unlink(), 'error', 'missing image', 'not there'),
    (lambda d: (d / IMAGE).rename((d / IMAGE).with_suffix('.JPG')), 'error', 'missing image',
     'there is train_000001.JPG'),
    (lambda d: Image.new('RGB', (90, 70)).save(d / IMAGE), 'error', 'image of another size',
     '90x70 (width x height), but annotated as 128x128'),
    (is_rotated, 'error', 'image of another size', 'EXIF'),
    (of_16_bits(1), 'warning', 'dark 16-bit image', '0 to 15'),
    (is_small, 'warning', 'small image', 'min_size=32'),
    (content(detach), 'warning', 'image without objects', 'filter_empty_gt=True'),
    (image(1, file_name='train_000001.jpg'), 'warning', 'image listed twice', '1 and as image 2'),
]  # fmt: skip
OBJECTS = [
    (content(lambda c: c['annotations'][1].update(id=1)), 'error', 'duplicate annotation id',
     'more than one'),
    (category(id='two'), 'error', 'annotation of no category', "'two'"),
    (annotation(category_id=99), 'error', 'annotation of no category', 'category_id 99'),
    (content(lambda c: c['annotations'][0].pop('bbox')), 'error', 'incomplete annotation',
     'lacks bbox'),
    (annotation(id=[]), 'error', 'incomplete annotation', 'has [] as id'),
    (annotation(iscrowd='yes'), 'error', 'malformed iscrowd', "'yes'"),
    (annotation(area='big'), 'error', 'incomplete annotation', "has 'big' as area"),
    (annotation(bbox=[1, 2, 3]), 'error', 'malformed box', 'four numbers'),
    (annotation(bbox=[1, NAN, 3, 4]), 'error', 'malformed box', 'finite'),
    (annotation(bbox=[5, 5, 0, 9]), 'warning', 'box without area', 'leaves the object out'),
    (annotation(area=0), 'warning', 'box without area', 'leaves the object out'),
    (annotation(bbox=[500, 5, 9, 9]), 'warning', 'box outside the image', 'outside of 128x128'),
    (annotation(bbox=[-5, 5, 90, 90]), 'warning', 'box beyond the border', 'reaches out'),
    (annotation(iscrowd=1, segmentation={'size': [128, 128], 'counts': [100, 50, 16234]}),
     'warning', 'crowd region', 'does not count'),
    (annotation(iscrowd=1, segmentation=[[1, 1, 9, 1, 9, 9]]), 'warning', 'crowd region',
     'polygon'),
    (polygons([1, 1, 5, 5]), 'warning', 'polygon of fewer than three points', 'ignored'),
    (polygons([1, 1, 5, NAN, 9, 9]), 'error', 'malformed mask', 'not finite'),
    (polygons([1, 1, 5, 1e9, 9, 9]), 'error', 'malformed mask', 'far outside'),
    (polygons(1, 1, 5, 5, 9, 9), 'error', 'malformed mask', 'list of numbers'),
    (polygons(), 'error', 'malformed mask', 'no mask'),
    (mask(64, 64, counts=[96, 4000]), 'error', 'malformed mask',
     'size [64, 64], the image [128, 128]'),
    (mask(128, 128, counts=[5, 3]), 'error', 'malformed mask', '8 pixels'),
    (mask(128, 128, counts='é'), 'error', 'malformed mask', 'no run-length'),
]  # fmt: skip
ENTRIES = [
    (content(lambda c: c['images'][0].pop('width')), 'error', 'incomplete image', 'lacks width'),
    (image(width=INF), 'error', 'incomplete image', 'has inf as width'),
    (image(id=[1]), 'error', 'incomplete image', 'has [1] as id'),
    (image(file_name=7), 'error', 'incomplete image', 'has 7 as file_name'),
    (image(file_name='\ud800.jpg'), 'error', 'incomplete image', 'as file_name'),
    (content(lambda c: [i.update(width=20) for i in c['images']]), 'error', 'no images',
     'min_size=32'),
    (category(id=1), 'error', 'unusable dataset', "'disc' and 'square'"),
    (category(name='disc'), 'error', 'unusable dataset', "called 'disc'"),
    (content(lambda c: c['categories'][1].pop('name')), 'error', 'unusable dataset', 'lacks name'),
    (category(id=[2]), 'error', 'unusable dataset', 'has [2] as id'),
    (annotation(image_id=99), 'error', 'annotation of no image', 'image_id 99'),
    (annotation(image_id=[1]), 'error', 'incomplete annotation', 'has [1] as image_id'),
    (content(lambda c: c.update(annotations={})), 'error', 'unusable dataset', 'no annotations'),
    (content(lambda c: c.update(annotations=[])), 'error', 'no objects', 'no annotation'),
    (content(lambda c: [a.update(category_id=9) for a in c['annotations']]), 'error', 'no objects',
     'any of the classes'),
    (content(lambda c: [a.update(iscrowd=1) for a in c['annotations']]), 'error', 'only crowds',
     'iscrowd'),
    (lambda d: cut(d / TRAIN), 'error', 'unusable dataset', 'line 1 column'),
    (text('[' * 100_000), 'error', 'unusable dataset', 'recursion'),
    (text('9' * 5000), 'error', 'unusable dataset', 'limit'),
    (text('[1]'), 'error', 'unusable dataset', 'holds a list'),
]  # fmt: skip
SEG_MAPS = [
    (lambda d: (d / LABELS).unlink(), 'error', 'missing segmentation map', 'not there'),
    (lambda d: cut(d / LABELS), 'error', 'unreadable segmentation map', 'truncated'),
    (relabel(lambda labels: Image.fromarray(labels).convert('RGB')), 'error',
     'segmentation map in color', 'mode is RGB'),
    (relabel(Image.fromarray, format='JPEG'), 'error', 'segmentation map as JPEG',
     'changes the numbers'),
    (relabel(lambda labels: wide(labels.astype(int) * 0 + 300)), 'error',
     '16-bit segmentation map', 'holds 300'),
    (relabel(with_nan, format='TIFF'), 'error', '16-bit segmentation map', 'holds nan'),
    (relabel(lambda labels: Image.fromarray(labels[:64])), 'error',
     'segmentation map of another size', 'it is 128x64 (width x height), its image 128x128'),
    (relabel(lambda labels: Image.fromarray(labels * 0 + 8)), 'error', 'label of no class',
     '16384 pixels have the labels [8], of no class: the 7 classes are 1 to 7, ignored is 0'),
    (relabel(lambda labels: Image.fromarray(labels * 0)), 'warning',
     'segmentation map without labels', 'ignored'),
]  # fmt: skip
# The task, the file that is named, and as above.
FAULTS = [
    *(('retinanet', IMAGE, *fault) for fault in IMAGES),
    *(('mask_rcnn', IMAGE, *fault) for fault in OBJECTS),
    *(('retinanet', TRAIN, *fault) for fault in ENTRIES),
    *(('fpn', LABELS, *fault) for fault in SEG_MAPS),
    ('retinanet', 'coco/train2017', lambda d: shutil.rmtree(d / 'coco/train2017'), 'error',
     'missing folder', 'no image folder'),
    ('retinanet', 'coco/train2017/train_000002.jpg', image(1, id=1), 'error', 'duplicate image id',
     'image id 1'),
    ('fpn', SEG_IMAGE, lambda d: cut(d / SEG_IMAGE), 'error', 'unreadable image', 'truncated'),
    ('fpn', 'ade/images/training',
     lambda d: [file.unlink() for file in (d / 'ade/images/training').glob('*')], 'error',
     'unusable dataset', "ends in '.jpg'"),
]  # fmt: skip


@pytest.mark.parametrize(
    ('task', 'file', 'corrupt', 'severity', 'kind', 'reason'),
    FAULTS,
    ids=[f'{fault[4]}: {fault[5]}' for fault in FAULTS],
)
def test_finds_every_fault(task, file, corrupt, severity, kind, reason, data, check):
    corrupt(data)
    found = [one for one in check(task).findings if one.kind == kind]
    assert {one.severity for one in found} == {severity}
    assert any(one.file == str(data / file) and reason in one.reason for one in found), found


@pytest.mark.parametrize('task', ['retinanet', 'mask_rcnn', 'fpn'])
def test_finds_nothing_in_a_whole_set(task, check):
    report = check(task, ('train', 'val', 'test'))
    assert report.findings == []
    # Testing reads what validation reads, once.
    assert sorted(report.images.values()) == [5, 8]


def test_a_16_bit_image_that_uses_them_is_fine(data, check):
    of_16_bits(16)(data)
    assert not check('retinanet').findings


@pytest.mark.parametrize('save', [with_palette, wide])
def test_maps_with_a_palette_or_16_bits_are_fine(save, data, check):
    relabel(save)(data)
    assert not check('fpn').findings


@pytest.mark.parametrize('progressive', [False, True])
def test_a_jpeg_ends_where_its_scans_do(progressive):
    """Not in a thumbnail before them, nor in the video that phones put behind."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8))
    files = []
    for thumbnail in (b'', b'\xff\xd8\xff\xda\xff\xd9'):
        noise.save(file := io.BytesIO(), 'JPEG', progressive=progressive, comment=thumbnail)
        files.append(file.getvalue())
    for whole in files:
        assert content_fault(whole + b'\xff\xda' + rng.bytes(9)) is None
        for length in (2, 3, 30, len(whole) // 2, len(whole) - 1):
            assert 'truncated' in content_fault(whole[:length])


def test_several_processes_find_what_one_does(data, check):
    for number in (1, 7):
        cut(data / f'coco/train2017/train_00000{number}.jpg')
    one, several = check('retinanet'), check('retinanet', workers=3)
    assert len(one.findings) == 2
    assert one == several


@pytest.mark.skipif(
    multiprocessing.get_start_method() != 'fork', reason='processes do not inherit the decoder'
)
def test_an_image_that_ends_the_process_is_named(data, check, monkeypatch):
    (data / IMAGE).write_bytes(b'deadly')
    decode = mmcv.imfrombytes

    def die(content: bytes, **options) -> np.ndarray:
        return os._exit(1) if content == b'deadly' else decode(content, **options)

    monkeypatch.setattr(mmcv, 'imfrombytes', die)
    report = check('retinanet', ('train', 'val'), workers=2)
    assert [one.file for one in report.findings] == [str(data / IMAGE)]
    assert 'the process that read it was ended' in report.findings[0].reason


@pytest.mark.parametrize('task', ['retinanet', 'mask_rcnn'])
@pytest.mark.parametrize('more', [0, 1])
def test_images_with_more_objects_than_are_detected_are_counted(task, more, data, check):
    def repeat(content: dict) -> None:
        first, ids = content['annotations'][0], range(100 + more)
        crowd = {**first, 'id': 10**6, 'iscrowd': 1}
        content['annotations'] = [*({**first, 'id': number + 1} for number in ids), crowd]

    edit(data / TRAIN, repeat)
    kinds = [found.kind for found in check(task).findings]
    assert kinds.count('many objects') == more


def test_one_object_among_crowds_is_enough(data, check):
    edit(data / TRAIN, lambda c: [a.update(iscrowd=1) for a in c['annotations'][1:]])
    assert {one.kind for one in check('retinanet').findings} == {'crowd region'}


def test_validation_is_checked_for_evaluation(data, check):
    """pycocotools' `evaluateImg` keeps ids of matched objects, and 0 for those that are not."""

    def change(content: dict) -> None:
        detach(content)
        content['annotations'][0].pop('iscrowd')
        content['annotations'][1].update(id=0)

    for path in (TRAIN, VAL):
        edit(data / path, change)
    found = [(one.split, one.kind) for one in check('retinanet', ('train', 'val')).findings]
    assert found == [
        ('train', 'image without objects'),
        ('val', 'incomplete annotation'),
        ('val', 'annotation id 0'),
        ('val', 'image without objects'),
    ]


def test_ground_truth_is_that_of_the_same_images(data, check):
    def validate_with(path: str) -> Callable[[Config], None]:
        return lambda config: config.val_evaluator.update(ann_file=str(data / path))

    def renumber(content: dict) -> None:
        first, second = content['images'][:2]
        first['id'], second['id'] = second['id'], first['id']

    (data / 'copy.json').write_bytes((data / VAL).read_bytes())
    assert not check('retinanet', ('val',), validate_with('copy.json')).findings
    edit(data / 'copy.json', renumber)
    for path in ('copy.json', TRAIN):
        (found,) = check('retinanet', ('val',), validate_with(path)).of('error')
        assert found.file == str(data / path) and 'val_evaluator' in found.reason


def test_predictions_are_written_for_images_without_annotations(data, check):
    edit(data / VAL, lambda content: content.pop('annotations'))

    def test_on(config: Config, **options: bool) -> None:
        config.test_evaluator.update(ann_file=str(data / VAL), **options)

    assert check('retinanet', ('test',), test_on).of('error')
    assert not check('retinanet', ('test',), lambda c: test_on(c, format_only=True)).findings


def test_every_part_of_a_joined_set_may_have_a_metric_of_its_own(data, check):
    def validate_on_both(config: Config, paths: tuple[str, ...] = (TRAIN, VAL)) -> None:
        parts = list(datasets_of(config, ('train', 'val')))
        config.val_dataloader.dataset = ConfigDict(type='ConcatDataset', datasets=parts)
        metrics = [{**config.val_evaluator, 'ann_file': str(data / path)} for path in paths]
        config.val_evaluator = ConfigDict(
            type='MultiDatasetsEvaluator', metrics=metrics, dataset_prefixes=['a', 'b']
        )

    assert not check('retinanet', ('val',), validate_on_both).of('error')
    (found,) = check('retinanet', ('val',), lambda c: validate_on_both(c, (VAL, VAL))).of('error')
    assert found.kind == 'ground truth of other images'


def test_what_training_and_validation_read_is_checked_for_evaluation(data, check):
    edit(data / TRAIN, lambda c: c['annotations'][0].pop('iscrowd'))

    def validate_on_training_data(config: Config) -> None:
        for dataset in datasets_of(config, ('val',)):
            dataset.update(
                ann_file=config.train_dataloader.dataset.ann_file,
                data_prefix=config.train_dataloader.dataset.data_prefix,
            )
        config.val_evaluator.ann_file = str(data / TRAIN)

    report = check('retinanet', ('train', 'val'), validate_on_training_data)
    (found,) = report.of('error')
    assert (found.split, found.annotation) == ('val', 1)
    assert len(report.images) == 1


def test_label_255_is_left_out_and_0_a_class_without_reduce_zero_label(data, check):
    def count_from_zero(config: Config) -> None:
        for dataset in datasets_of(config):
            dataset.reduce_zero_label = False

    relabel(lambda labels: Image.fromarray(np.where(labels == 1, 255, labels - 1).astype('u1')))(
        data
    )
    found = check('fpn', change=count_from_zero).findings
    assert not [one for one in found if 'train_000001' in one.file]


@pytest.mark.parametrize(
    ('values', 'reduced', 'classes', 'expected'),
    [
        ((0, 255), False, ['ground', 'crack'], "'ground'"),
        ((0, 1), True, ['ground', 'crack'], "'ground'"),
        ((0, 0), False, ['crack'], "'crack'"),
        ((0, 1), False, ['ground', 'crack'], None),
        ((1, 2), True, ['ground', 'crack'], None),
    ],
)
def test_a_training_needs_a_second_class(values, reduced, classes, expected, data, check):
    for path in data.glob('ade/annotations/*/*.png'):
        labels = np.where(np.array(Image.open(path)) > 1, *values[::-1])
        Image.fromarray(labels.astype(np.uint8)).save(path)

    def change(config: Config) -> None:
        config.classes, config.palette = classes, [[0, 0, 0]] * len(classes)
        for dataset in datasets_of(config):
            dataset.update(reduce_zero_label=reduced, metainfo={'classes': classes})

    errors = check('fpn', ('train', 'val'), change).of('error')
    assert [one.kind for one in errors] == ['a single class'] * bool(expected)
    assert all(expected in one.reason for one in errors)
    # A few images may well be of one class.
    assert not check('fpn', ('test',), change).findings


def test_one_map_with_a_second_class_is_enough(data, check):
    first, *others = sorted(data.glob('ade/annotations/*/*.png'))
    for path in others:
        Image.fromarray(np.array(Image.open(path)) * 0 + 1).save(path)
    assert not check('fpn', ('train', 'val')).findings
    first.write_bytes(others[0].read_bytes())
    assert [one.kind for one in check('fpn', ('train', 'val')).findings] == ['a single class']


def test_other_types_of_data_have_their_images_read(data, check, capsys):
    cut(data / SEG_IMAGE)
    listed = [{'img_path': Path(SEG_IMAGE).name}]
    content = {'metainfo': {'classes': ['disc']}, 'data_list': listed}
    (data / 'mine.json').write_text(json.dumps(content))

    def other_type(config: Config) -> None:
        config.train_dataloader.dataset = ConfigDict(
            type='mmdet.BaseDetDataset',
            data_root=str(data),
            ann_file='mine.json',
            data_prefix={'img_path': str(Path(SEG_IMAGE).parent)},
        )

    report = check('retinanet', change=other_type)
    assert 'other' in capsys.readouterr().out
    assert [one.kind for one in report.findings] == ['unreadable image']


@pytest.mark.parametrize('seed', range(5))
def test_run_lengths_are_read_as_pycocotools_does(seed):
    drawn = np.random.default_rng(seed).random((37, 53)) < 0.3
    drawn[:, 10:30] = seed % 2
    encoded = coco_mask.encode(np.asfortranarray(drawn.astype(np.uint8)))
    runs = list(decode_runs(encoded['counts']))
    values = np.repeat(np.arange(len(runs)) % 2, runs).reshape(drawn.shape, order='F')
    assert np.array_equal(values, drawn)
    text = {'size': [37, 53], 'counts': encoded['counts'].decode()}
    assert run_length_fault(text, 37, 53) is None
    assert run_length_fault({**text, 'counts': text['counts'][:-1]}, 37, 53) is not None
