"""Bad configs and bad data end a training before it starts, with one message and no traceback."""

import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

TRAIN = 'coco/annotations/instances_train2017.json'
VAL = 'coco/annotations/instances_val2017.json'


@pytest.fixture
def data(shapes: Path, tmp_path: Path) -> Path:
    """A set of shapes to spoil."""
    return Path(shutil.copytree(shapes, tmp_path / 'shapes'))


def edit(path: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def label_map(data: Path) -> Path:
    return sorted((data / 'ade' / 'annotations' / 'training').glob('*.png'))[0]


def set_label(data: Path, label: int) -> None:
    labels = np.array(Image.open(label_map(data)))
    labels[:9, :9] = label
    Image.fromarray(labels).save(label_map(data))


def break_chunk(path: Path) -> None:
    """Make the name of a PNG's chunk of pixels one that no chunk can have."""
    path.write_bytes(path.read_bytes().replace(b'IDAT', b'\0\0\0\0'))


def claim_size(path: Path, side: int) -> None:
    """Let a PNG's header promise a picture of another size, with the right checksum."""
    content = path.read_bytes()
    header = b'IHDR' + struct.pack('>II', side, side) + content[24:29]
    checksum = struct.pack('>I', zlib.crc32(header))
    path.write_bytes(content[:12] + header + checksum + content[33:])


def empty(path: Path) -> None:
    path.write_text('')


def reverse_categories(content: dict) -> None:
    content['categories'].reverse()


def rename_category(content: dict) -> None:
    content['categories'][2]['name'] = 'pyramid'


# What is spoiled: task, how, config on top, and what the message has to say.
CASES = {
    'empty annotation file': ('retinanet', lambda d: empty(d / TRAIN), '', 'is empty'),
    'annotations not JSON': (
        'retinanet', lambda d: (d / TRAIN).write_text('{"images": ['), '', 'not JSON'),
    'annotations a list': ('retinanet', lambda d: (d / TRAIN).write_text('[]'), '', 'holds a list'),
    'no annotations': (
        'mask_rcnn', lambda d: edit(d / TRAIN, lambda c: c.update(annotations=[])), '',
        'has no annotations'),
    'annotation file missing': (
        'retinanet', lambda d: (d / VAL).unlink(), '', 'no annotation file'),
    'pictures missing': (
        'retinanet',
        lambda d: [p.unlink() for p in sorted((d / 'coco/train2017').glob('*'))[:3]], '',
        'missing picture (3)'),
    'picture folder missing': (
        'retinanet', lambda d: shutil.rmtree(d / 'coco/val2017'), '', 'no picture folder'),
    'category without name': (
        'retinanet', lambda d: edit(d / TRAIN, lambda c: c['categories'][0].pop('name')), '',
        'a category has no name'),
    'category id out of range': (
        'retinanet',
        lambda d: edit(d / TRAIN, lambda c: c['annotations'][0].update(category_id=99)), '',
        'category_id 99'),
    'annotation of no image': (
        'retinanet',
        lambda d: edit(d / TRAIN, lambda c: c['annotations'][0].update(image_id=99)), '',
        'image_id 99'),
    'duplicate image id': (
        'retinanet', lambda d: edit(d / TRAIN, lambda c: c['images'][1].update(id=1)), '',
        'train_000001.jpg has the image id 1 too'),
    'duplicate annotation id': (
        'mask_rcnn', lambda d: edit(d / TRAIN, lambda c: c['annotations'][1].update(id=1)), '',
        'train_000001.jpg, id 1: more than one annotation'),
    'duplicate annotation id in validation': (
        'retinanet', lambda d: edit(d / VAL, lambda c: c['annotations'][1].update(id=1)), '',
        'val_000001.jpg, id 1: more than one annotation'),
    'duplicate category id': (
        'retinanet', lambda d: edit(d / TRAIN, lambda c: c['categories'][1].update(id=1)), '',
        "'disc' and 'square' both have this id"),
    'annotation without box': (
        'retinanet', lambda d: edit(d / TRAIN, lambda c: c['annotations'][0].pop('bbox')), '',
        'lacks bbox'),
    'image without id': (
        'retinanet', lambda d: edit(d / TRAIN, lambda c: c['images'][0].pop('id')), '',
        'lacks id'),
    'categories in another order': (
        'retinanet', lambda d: edit(d / VAL, reverse_categories), '', 'another order'),
    'category missing in validation': (
        'retinanet', lambda d: edit(d / VAL, rename_category), '', "no category 'triangle'"),
    'two categories of one name': (
        'retinanet',
        lambda d: edit(d / TRAIN, lambda c: c['categories'][2].update(name='disc')), '',
        "called 'disc'"),
    'chosen class that the file lacks': (
        'retinanet', lambda d: None,
        "train_dataloader['dataset']['metainfo'] = dict(classes=('disc', 'cube'))",
        "no category 'cube'"),
    'head with another number of classes': (
        'retinanet', lambda d: None, "model['bbox_head']['num_classes'] = 5",
        'num_classes=5, but the data have 6'),
    'label out of range': ('fpn', lambda d: set_label(d, 9), '', 'label 9 belongs to no class'),
    'label map in colour': (
        'fpn', lambda d: Image.new('RGB', (128, 128)).save(label_map(d)), '', 'colour picture'),
    'label map unreadable': (
        'fpn', lambda d: label_map(d).write_bytes(b'no picture'), '', 'cannot be read'),
    'label map with a broken chunk': (
        'fpn', lambda d: break_chunk(label_map(d)), '', 'cannot be read'),
    'label map of a billion pixels': (
        'fpn', lambda d: claim_size(label_map(d), 2**15), '', 'cannot be read'),
    'label map missing': ('fpn', lambda d: label_map(d).unlink(), '', '1 of 8 files'),
    'label folder missing': (
        'fpn', lambda d: shutil.rmtree(d / 'ade/annotations/training'), '', 'no folder'),
    'pictures of another suffix': (
        'fpn', lambda d: None,
        "for loader in (train_dataloader, val_dataloader): loader['dataset']['img_suffix'] = '.tif'"
        '\ndel loader', "ends in '.tif'"),
    'class list not text': (
        'fpn', lambda d: (d / 'classes.txt').write_bytes(b'dis\xff'), '', 'not text in UTF-8'),
    'class list empty': ('fpn', lambda d: empty(d / 'classes.txt'), '', 'no names in it'),
    'class list missing': ('fpn', lambda d: None, "classes = 'nowhere.txt'", 'no such file'),
    'unknown scope': ('fpn', lambda d: None, "default_scope = 'mmpose'", "'mmdet', 'mmseg'"),
    'unknown dataset type': (
        'fpn', lambda d: None, "train_dataloader['dataset']['type'] = 'NoSuchSet'",
        "no dataset type 'NoSuchSet'"),
    'config that is no Python': ('fpn', lambda d: None, 'model = dict(', 'cannot be read'),
}  # fmt: skip


@pytest.mark.parametrize('case', CASES)
def test_says_what_is_wrong_before_training(case, data, tiny_config, run_tool, tmp_path):
    task, spoil, extra, message = CASES[case]
    spoil(data)
    done = run_tool('train.py', tiny_config(task, extra, shapes=data), '--work-dir', 'run')
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]
    assert message in done.stderr
    assert 'Traceback' not in done.stderr
    assert not (tmp_path / 'run').exists(), 'nothing was started'


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['nowhere.py'], 'there is no config nowhere.py'),
        (['{config}', '--resume', 'nowhere.pth'], 'no checkpoint nowhere.pth'),
        (['{config}', '--auto-scale-lr', '--cfg-options', 'auto_scale_lr=None'], 'base_batch_size'),
    ],
)
def test_wrong_arguments(arguments, message, tiny_config, run_tool):
    config = tiny_config('fpn')
    done = run_tool('train.py', *(a.format(config=config) for a in arguments))
    assert done.returncode == 1
    assert message in done.stderr
    assert 'Traceback' not in done.stderr


def test_a_dict_on_the_command_line_is_explained(tiny_config, run_tool):
    options = ['--cfg-options', "model.backbone.init_cfg=dict(type='Pretrained',checkpoint='a')"]
    done = run_tool('train.py', tiny_config('fpn'), *options)
    assert done.returncode == 2
    assert 'given one by one' in done.stderr
    assert 'Traceback' not in done.stderr


def test_missing_coco_and_ade20k_say_where_to_get_them(run_tool):
    root = Path(__file__).resolve().parents[2]
    for path, source in (
        ('det_configs/retinanet_effv2_s0.py', 'cocodataset.org'),
        ('seg_configs/fpn_effv2_s0.py', 'ADEChallengeData2016'),
    ):
        done = run_tool('train.py', root / path, '--cfg-options', 'model.backbone.init_cfg=None')
        assert done.returncode == 1
        assert source in done.stderr
        assert 'Traceback' not in done.stderr


def test_test_refuses_a_missing_checkpoint(tiny_config, run_tool):
    done = run_tool('test.py', tiny_config('fpn'), 'nowhere.pth')
    assert done.returncode == 1
    assert 'no checkpoint nowhere.pth' in done.stderr
