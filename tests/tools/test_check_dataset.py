"""tools/check_dataset.py finds every fault, with file and reason, and nothing in a whole set."""

import copy
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
from mmengine.config import Config
from PIL import Image
from pycocotools import mask as coco_mask
from tiny import write_tiny_config

from backbones.data import Report, check_dataset
from backbones.data.config_datasets import datasets_of
from backbones.data.findings import CheckedDataset
from backbones.data.objects import decode_runs, run_length_fault
from backbones.engine.config import load_config

TRAIN = 'coco/annotations/instances_train2017.json'
VAL = 'coco/annotations/instances_val2017.json'
IMAGE = 'coco/train2017/train_000001.jpg'
SEG_IMAGE = 'ade/images/training/train_000001.jpg'
LABELS = 'ade/annotations/training/train_000001.png'
NAN, INF = float('nan'), float('inf')


@pytest.fixture
def data(shapes: Path, tmp_path: Path) -> Path:
    """A dataset to corrupt."""
    return Path(shutil.copytree(shapes, tmp_path / 'shapes'))


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


def edit(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def annotation(**entries: object) -> Callable[[Path], None]:
    """Changes entries of the first annotation, of the first image."""
    return lambda data: edit(data / TRAIN, lambda c: c['annotations'][0].update(entries))


def content(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return lambda data: edit(data / TRAIN, change)


def mask(*size: int, counts: object) -> Callable[[Path], None]:
    return annotation(segmentation={'size': list(size), 'counts': counts})


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def rotate_by_exif(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (128, 96)).save(path, exif=exif)


def overwrite(path: Path, position: int, new: bytes) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:position] + new + content[position + len(new) :])


def detach(content: dict) -> None:
    """Take all annotations from the first image."""
    content['annotations'] = [a for a in content['annotations'] if a['image_id'] != 1]


def tear(path: Path) -> None:
    """Spoil bytes in the middle of a JPEG's data."""
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


def to_one_pixel(data: Path) -> None:
    Image.new('RGB', (1, 1)).save(data / SEG_IMAGE)
    Image.new('L', (1, 1), 1).save(data / LABELS)


# Task, what is corrupt, severity, kind, file, and what the reason has to say.
FAULTS = {
    'image cut short': (
        'retinanet', lambda d: cut(d / IMAGE), 'error', 'unreadable image', IMAGE,
        'truncated'),
    'image empty': (
        'retinanet', lambda d: (d / IMAGE).write_bytes(b''), 'error', 'unreadable image',
        IMAGE, 'empty'),
    'image of no format': (
        'retinanet', lambda d: (d / IMAGE).write_text('<html>'), 'error', 'unreadable image',
        IMAGE, 'no format'),
    'image corrupt': (
        'retinanet', lambda d: tear(d / IMAGE), 'warning', 'corrupt image', IMAGE,
        'Corrupt JPEG data'),
    'animated PNG with a filter that there is not': (
        'retinanet', lambda d: break_animation(d / IMAGE), 'error', 'unreadable image', IMAGE,
        'the animated PNG is corrupt'),
    'image missing': (
        'retinanet', lambda d: (d / IMAGE).unlink(), 'error', 'missing image', IMAGE,
        'not there'),
    'image named in another case': (
        'retinanet', lambda d: (d / IMAGE).rename((d / IMAGE).with_suffix('.JPG')), 'error',
        'missing image', IMAGE, 'there is train_000001.JPG'),
    'image folder missing': (
        'retinanet', lambda d: shutil.rmtree(d / 'coco/train2017'), 'error', 'missing folder',
        'coco/train2017', 'no image folder'),
    'image of another size': (
        'retinanet', lambda d: Image.new('RGB', (90, 70)).save(d / IMAGE), 'error',
        'image of another size', IMAGE, '90x70 (width x height), but annotated as 128x128'),
    'EXIF orientation': (
        'retinanet',
        lambda d: (
            rotate_by_exif(d / IMAGE), edit(d / TRAIN, lambda c: c['images'][0].update(height=96))
        ), 'error', 'image of another size', IMAGE, 'EXIF'),
    'rotated, and of a kind that only OpenCV reads': (
        'retinanet',
        lambda d: (
            rotate_by_exif(d / IMAGE), overwrite(d / IMAGE, 3, b'\1'),
            edit(d / TRAIN, lambda c: c['images'][0].update(height=96)),
        ), 'error', 'image of another size', IMAGE, 'exchanged'),
    'one-pixel image': (
        'retinanet',
        lambda d: (
            Image.new('RGB', (1, 1)).save(d / IMAGE),
            edit(d / TRAIN, lambda c: c['images'][0].update(width=1, height=1)),
        ), 'warning', 'small image', IMAGE, 'min_size=32'),
    'image without objects': (
        'retinanet', content(detach), 'warning', 'image without objects', IMAGE,
        'filter_empty_gt=True'),
    'names that differ in case': (
        'retinanet', content(lambda c: c['images'][1].update(file_name='TRAIN_000001.jpg')),
        'warning', 'names that differ in case', 'coco/train2017/TRAIN_000001.jpg',
        'train_000001.jpg in case only'),
    'image listed twice': (
        'retinanet', content(lambda c: c['images'][1].update(file_name='train_000001.jpg')),
        'warning', 'image listed twice', IMAGE, 'image 1 and as image 2'),
    'image without width': (
        'retinanet', content(lambda c: c['images'][0].pop('width')), 'error', 'incomplete image',
        TRAIN, 'lacks width'),
    'image of infinite width': (
        'retinanet', content(lambda c: c['images'][0].update(width=INF)), 'error',
        'incomplete image', TRAIN, 'has no size: width inf'),
    'image id that is a list': (
        'retinanet', content(lambda c: c['images'][0].update(id=[1])), 'error', 'incomplete image',
        TRAIN, 'has [1] as id instead of a number or text'),
    'image whose name is a number': (
        'retinanet', content(lambda c: c['images'][0].update(file_name=7)), 'error',
        'incomplete image', TRAIN, 'has 7 as file_name instead of text'),
    'image whose name cannot be written': (
        'retinanet', content(lambda c: c['images'][0].update(file_name='\ud800.jpg')), 'error',
        'incomplete image', TRAIN, 'as file_name instead of text'),
    'all images too small': (
        'retinanet', content(lambda c: [i.update(width=20) for i in c['images']]), 'error',
        'no images', TRAIN, 'min_size=32'),
    'duplicate image id': (
        'retinanet', content(lambda c: c['images'][1].update(id=1)), 'error', 'duplicate image id',
        'coco/train2017/train_000002.jpg', 'image id 1'),
    'duplicate annotation id': (
        'retinanet', content(lambda c: c['annotations'][1].update(id=1)), 'error',
        'duplicate annotation id', IMAGE, 'more than one'),
    'duplicate category id': (
        'retinanet', content(lambda c: c['categories'][1].update(id=1)), 'error',
        'duplicate category id', TRAIN, "'disc' and 'square'"),
    'category without name': (
        'retinanet', content(lambda c: c['categories'][1].pop('name')), 'error',
        'incomplete category', TRAIN, 'lacks name'),
    'category id that is a list': (
        'retinanet', content(lambda c: c['categories'][1].update(id=[2])), 'error',
        'incomplete category', TRAIN, 'as id instead of'),
    'category ids of two kinds': (
        'retinanet', content(lambda c: c['categories'][1].update(id='two')), 'error',
        'annotation of no category', 'coco/train2017/train_000001.jpg', "'two'"),
    'category ids out of order': (
        'retinanet', content(lambda c: c['categories'].reverse()), 'warning',
        'categories out of order', TRAIN, 'order in the file'),
    'annotation of no image': (
        'retinanet', annotation(image_id=99), 'error', 'annotation of no image', TRAIN,
        'image_id 99'),
    'annotation of no category': (
        'retinanet', annotation(category_id=99), 'error', 'annotation of no category', IMAGE,
        'category_id 99'),
    'annotation without box': (
        'retinanet', content(lambda c: c['annotations'][0].pop('bbox')), 'error',
        'incomplete annotation', IMAGE, 'lacks bbox'),
    'annotation id that is a list': (
        'retinanet', annotation(id=[]), 'error', 'incomplete annotation', IMAGE, 'has [] as id'),
    'annotation of a image that is a list': (
        'retinanet', annotation(image_id=[1]), 'error', 'incomplete annotation', TRAIN,
        'has [1] as image_id'),
    'iscrowd that is neither 0 nor 1': (
        'retinanet', annotation(iscrowd='yes'), 'error', 'malformed iscrowd', IMAGE, "'yes'"),
    'no annotations': (
        'retinanet', content(lambda c: c.update(annotations=[])), 'error', 'unusable dataset',
        TRAIN, 'no annotations'),
    'no annotation of a class': (
        'retinanet', content(lambda c: [a.update(category_id=9) for a in c['annotations']]),
        'error', 'no objects', TRAIN, 'any of the classes'),
    'JSON cut short': (
        'retinanet', lambda d: cut(d / TRAIN), 'error', 'unusable dataset', TRAIN,
        'line 1 column'),
    'JSON nested too deep': (
        'retinanet', lambda d: (d / TRAIN).write_text('[' * 100_000), 'error',
        'unusable dataset', TRAIN, 'recursion'),
    'JSON with a number of 5,000 digits': (
        'retinanet', lambda d: (d / TRAIN).write_text('9' * 5000), 'error', 'unusable dataset',
        TRAIN, 'limit'),
    'JSON of something else': (
        'retinanet', lambda d: (d / TRAIN).write_text('[1]'), 'error', 'unusable dataset', TRAIN,
        'holds a list'),
    'box of three numbers': (
        'retinanet', annotation(bbox=[1, 2, 3]), 'error', 'malformed box', IMAGE, 'four numbers'),
    'box with NaN': (
        'retinanet', annotation(bbox=[1, NAN, 3, 4]), 'error', 'malformed box', IMAGE, 'finite'),
    'box with infinity': (
        'retinanet', annotation(bbox=[1, 2, INF, 4]), 'error', 'malformed box', IMAGE, 'finite'),
    'box without area': (
        'retinanet', annotation(bbox=[5, 5, 0, 9]), 'warning', 'box without area', IMAGE,
        'leaves the object out'),
    'box of negative width': (
        'retinanet', annotation(bbox=[5, 5, -4, 9]), 'warning', 'box without area', IMAGE,
        'leaves the object out'),
    'box outside': (
        'retinanet', annotation(bbox=[500, 5, 9, 9]), 'warning', 'box outside the image', IMAGE,
        'outside of 128x128'),
    'box beyond the border': (
        'retinanet', annotation(bbox=[-5, 5, 90, 90]), 'warning', 'box beyond the border', IMAGE,
        'reaches out'),
    'crowd': (
        'mask_rcnn',
        annotation(iscrowd=1, segmentation={'size': [128, 128], 'counts': [100, 50, 16234]}),
        'warning', 'crowd region', IMAGE, 'does not count'),
    'crowd polygon': (
        'mask_rcnn', annotation(iscrowd=1), 'warning', 'crowd region', IMAGE, 'polygon'),
    'polygon of two points': (
        'mask_rcnn', annotation(segmentation=[[1, 1, 5, 5]]), 'warning',
        'polygon of fewer than three points', IMAGE, 'ignored'),
    'polygon with NaN': (
        'mask_rcnn', annotation(segmentation=[[1, 1, 5, NAN, 9, 9]]), 'error', 'malformed mask',
        IMAGE, 'not finite'),
    'polygon far away': (
        'mask_rcnn', annotation(segmentation=[[1, 1, 5, 1e9, 9, 9]]), 'error', 'malformed mask',
        IMAGE, 'far outside'),
    'polygon not in a list': (
        'mask_rcnn', annotation(segmentation=[1, 1, 5, 5, 9, 9]), 'error', 'malformed mask',
        IMAGE, 'list of numbers'),
    'no mask': (
        'mask_rcnn', annotation(segmentation=[]), 'error', 'malformed mask', IMAGE, 'no mask'),
    'bad mask where none is read': (
        'retinanet', annotation(segmentation=[[1, 1, 5, NAN, 9, 9]]), 'warning', 'malformed mask',
        IMAGE, 'reads no masks'),
    'mask of another size': (
        'mask_rcnn', mask(64, 64, counts=[96, 4000]), 'error', 'malformed mask', IMAGE,
        'size [64, 64], the image [128, 128]'),
    'mask that does not add up': (
        'mask_rcnn', mask(128, 128, counts=[5, 3]), 'error', 'malformed mask', IMAGE, '8 pixels'),
    'mask of no encoding': (
        'mask_rcnn', mask(128, 128, counts='é'), 'error', 'malformed mask', IMAGE,
        'no run-length'),
    'segmentation: image cut short': (
        'fpn', lambda d: cut(d / SEG_IMAGE), 'error', 'unreadable image', SEG_IMAGE,
        'truncated'),
    'segmentation map missing': (
        'fpn', lambda d: (d / LABELS).unlink(), 'error', 'missing segmentation map', LABELS,
        'not there'),
    'segmentation map unreadable': (
        'fpn', lambda d: cut(d / LABELS), 'error', 'unreadable segmentation map', LABELS,
        'truncated'),
    'segmentation map in color': (
        'fpn', relabel(lambda labels: Image.fromarray(labels).convert('RGB')), 'error',
        'segmentation map in color', LABELS, 'mode is RGB'),
    'segmentation map as JPEG': (
        'fpn', relabel(Image.fromarray, format='JPEG'), 'error', 'segmentation map as JPEG', LABELS,
        'changes the numbers'),
    'segmentation map with a palette': (
        'fpn', relabel(with_palette), 'warning', 'segmentation map with a palette', LABELS,
        'index'),
    '16-bit segmentation map': (
        'fpn', relabel(wide), 'warning', '16-bit segmentation map', LABELS, 'nothing is lost'),
    '16-bit labels': (
        'fpn', relabel(lambda labels: wide(labels.astype(int) * 0 + 300)), 'error',
        '16-bit segmentation map', LABELS, 'holds 300, and mmseg keeps 8 bits of it, 44'),
    'segmentation map of another size': (
        'fpn', relabel(lambda labels: Image.fromarray(labels[:64])), 'error',
        'segmentation map of another size', LABELS,
        'it is 128x64 (width x height), its image 128x128'),
    'one-pixel segmentation map': (
        'fpn', to_one_pixel, 'error', 'one-pixel segmentation map', LABELS, 'single row'),
    'label of no class': (
        'fpn', relabel(lambda labels: Image.fromarray(labels * 0 + 8)), 'error',
        'label of no class', LABELS,
        '16384 pixels have the labels [8], of no class: the 7 classes are 1 to 7, ignored is 0'),
    'nothing labelled': (
        'fpn', relabel(lambda labels: Image.fromarray(labels * 0)), 'warning',
        'segmentation map without labels', LABELS, 'ignored'),
    'no images': (
        'fpn', lambda d: [file.unlink() for file in (d / 'ade/images/training').glob('*')],
        'error', 'unusable dataset', 'ade/images/training', "ends in '.jpg'"),
}  # fmt: skip


@pytest.mark.parametrize('fault', FAULTS)
def test_finds_every_fault(fault, data, check):
    task, corrupt, severity, kind, file, reason = FAULTS[fault]
    corrupt(data)
    found = [one for one in check(task).findings if one.kind == kind]
    assert [one.severity for one in found] == [severity] * len(found)
    matching = [one for one in found if one.file == str(data / file) and reason in one.reason]
    assert matching, found


@pytest.mark.parametrize('task', ['retinanet', 'mask_rcnn', 'fpn'])
def test_finds_nothing_in_a_whole_set(task, check):
    report = check(task, ('train', 'val', 'test'))
    assert report.findings == []
    # Testing reads what validation reads, once.
    assert sorted(report.images.values()) == [5, 8]


def test_several_processes_find_what_one_does(data, check):
    cut(data / IMAGE)
    cut(data / 'coco/train2017/train_000007.jpg')
    edit(data / TRAIN, lambda c: c['annotations'][3].update(bbox=[5, 5, 0, 9]))
    one, several = check('retinanet'), check('retinanet', workers=3)
    assert len(one.findings) == 3
    assert one == several


@pytest.mark.skipif(
    multiprocessing.get_start_method() != 'fork', reason='processes do not inherit the decoder'
)
def test_a_image_that_ends_the_process_is_named(data, check, monkeypatch):
    (data / IMAGE).write_bytes(b'deadly')
    decode = mmcv.imfrombytes

    def die(content: bytes, **options) -> np.ndarray:
        return os._exit(1) if content == b'deadly' else decode(content, **options)

    monkeypatch.setattr(mmcv, 'imfrombytes', die)
    report = check('retinanet', ('train', 'val'), workers=2)
    assert [one.file for one in report.findings] == [str(data / IMAGE)]
    assert 'the process that read it was ended' in report.findings[0].reason


def test_evaluation_needs_what_training_does_not(data, check):
    for path in (TRAIN, VAL):
        edit(data / path, lambda c: c['annotations'][0].pop('iscrowd'))
        edit(data / path, detach)
    found = {one.split: one for one in check('retinanet', ('train', 'val')).findings}
    assert 'left out of training' in found['train'].reason
    assert 'counts as false' in found['val'].reason


def test_a_validation_set_without_iscrowd_cannot_be_evaluated(data, check):
    edit(data / VAL, lambda c: c['annotations'][0].pop('iscrowd'))
    (found,) = check('retinanet', ('val',)).findings
    assert (found.severity, found.annotation) == ('error', 1)


def test_what_training_and_validation_read_is_checked_for_evaluation(data, check):
    edit(data / TRAIN, lambda c: c['annotations'][0].pop('iscrowd'))

    def validate_on_training_data(config: Config) -> None:
        for dataset in datasets_of(config, ('val',)):
            dataset.ann_file = config.train_dataloader.dataset.ann_file
            dataset.data_prefix = config.train_dataloader.dataset.data_prefix

    report = check('retinanet', ('train', 'val'), validate_on_training_data)
    (found,) = report.of('error')
    assert (found.split, found.annotation) == ('val', 1)
    assert len(report.images) == 1


def test_the_first_annotation_that_is_numbered_0_is_never_matched(data, check):
    """pycocotools' `evaluateImg` keeps ids of matched objects, and 0 for those that are not."""
    for path in (TRAIN, VAL):
        edit(data / path, lambda c: c['annotations'][0].update(id=0))
    (found,) = check('retinanet', ('train', 'val')).findings
    assert (found.severity, found.kind, found.split) == ('warning', 'annotation id 0', 'val')
    assert 'counts as false' in found.reason


def test_categories_in_another_order_than_in_training(data, check):
    edit(data / VAL, lambda c: c['categories'].reverse())
    kinds = {one.kind: one for one in check('retinanet', ('train', 'val')).of('error')}
    assert 'another order' in kinds['categories'].reason


def test_label_255_is_left_out_and_0_a_class_without_reduce_zero_label(data, check):
    relabel(lambda labels: Image.fromarray(np.where(labels == 1, 255, labels - 1).astype('u1')))(
        data
    )

    def count_from_zero(config: Config) -> None:
        for dataset in datasets_of(config):
            dataset.reduce_zero_label = False

    first = [
        one for one in check('fpn', change=count_from_zero).findings if 'train_000001' in one.file
    ]
    assert first == []


def test_other_types_of_data_have_their_images_read(data, check, capsys):
    cut(data / SEG_IMAGE)
    listed = {
        'metainfo': {'classes': ['disc']},
        'data_list': [{'img_path': Path(SEG_IMAGE).name}],
    }
    (data / 'mine.json').write_text(json.dumps(listed))

    def other_type(config: Config) -> None:
        config.train_dataloader.dataset = Config(
            {
                'type': 'mmdet.BaseDetDataset',
                'data_root': str(data),
                'ann_file': 'mine.json',
                'data_prefix': {'img_path': str(Path(SEG_IMAGE).parent)},
            }
        )._cfg_dict

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


def test_the_console_shows_the_first_of_many():
    checked = CheckedDataset('train', {}, 'coco', 'train.json')
    for number in range(30):
        checked.add('error', 'k', 'r', f'{number}.jpg')
    report = Report([checked])
    text = '\n'.join(report.lines())
    assert '19.jpg' in text
    assert '20.jpg' not in text
    assert 'and 10 more' in text
    assert len(report.as_dict()['findings']) == 30


def test_the_tool_lists_errors_and_exits_with_1(data, tiny_config, run_tool, tmp_path):
    cut(data / IMAGE)
    config = tiny_config('retinanet', shapes=data)
    done = run_tool('check_dataset.py', config, '--json', 'out/found.json', '--workers', '2')
    assert done.returncode == 1, done.stderr
    assert f'{data / IMAGE}: the file is truncated' in done.stdout
    written = json.loads((tmp_path / 'out/found.json').read_text())
    assert (written['errors'], written['warnings']) == (1, 0)
    assert written['findings'][0]['file'] == str(data / IMAGE)
    assert written['counts'] == [
        {'severity': 'error', 'split': 'train', 'kind': 'unreadable image', 'count': 1}
    ]


def test_warnings_alone_are_no_failure(data, tiny_config, run_tool):
    edit(data / TRAIN, detach)
    config = tiny_config('retinanet', shapes=data)
    done = run_tool('check_dataset.py', config, '--split', 'train')
    assert done.returncode == 0, done.stderr
    assert '8 images: 0 errors, 1 warning' in done.stdout


def test_a_wrong_config_exits_with_2(run_tool):
    done = run_tool('check_dataset.py', 'nowhere.py')
    assert done.returncode == 2
    assert 'there is no config nowhere.py' in done.stderr
    assert 'Traceback' not in done.stderr
