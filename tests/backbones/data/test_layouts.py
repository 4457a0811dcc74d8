"""Layouts other than COCO's and ADE20K's, lists and wrappers: one rule for all tools."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, METRICS, MODELS
from PIL import Image

from backbones.data import Report, check_dataset
from backbones.data.classes import set_classes
from backbones.data.config_datasets import datasets_of
from backbones.data.labels import LabelRules, ignored_label
from backbones.data.skip_bad import leave_out_bad
from backbones.engine.config import load_config
from backbones.engine.preflight import check_training
from backbones.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[3]
CLASSES = ('disc', 'square', 'triangle', 'star', 'cross', 'ring')
XML = 'voc/Annotations/train_000001.xml'
IMAGE = 'voc/JPEGImages/train_000001.jpg'


@pytest.fixture
def data(data: Path) -> Path:
    """The shapes, in the layout of PASCAL VOC too (``voc``)."""
    (data / 'voc/Annotations').mkdir(parents=True)
    for split in ('train', 'val'):
        shutil.copytree(data / f'coco/{split}2017', data / 'voc/JPEGImages', dirs_exist_ok=True)
        content = json.loads((data / f'coco/annotations/instances_{split}2017.json').read_text())
        names = {category['id']: category['name'] for category in content['categories']}
        stems = {image['id']: Path(image['file_name']).stem for image in content['images']}
        (data / f'voc/{split}.txt').write_text('\n'.join(stems.values()) + '\n')
        for number, stem in stems.items():
            objects = [
                object_xml(names[one['category_id']], one['bbox'])
                for one in content['annotations']
                if one['image_id'] == number
            ]
            size = '<size><width>128</width><height>128</height></size>'
            text = f'<annotation>{size}{"".join(objects)}</annotation>'
            (data / f'voc/Annotations/{stem}.xml').write_text(text)
    return data


def object_xml(name: str, box: list[float]) -> str:
    x, y, width, height = map(int, box)
    corners = {'xmin': x + 1, 'ymin': y + 1, 'xmax': x + width, 'ymax': y + height}
    box = ''.join(f'<{key}>{value}</{key}>' for key, value in corners.items())
    return f'<object><name>{name}</name><bndbox>{box}</bndbox></object>'


@pytest.fixture
def voc(data: Path, tiny_config: Callable[..., Path], tmp_path: Path) -> Callable[..., Config]:
    """Reads a tiny detector of the VOC layout: ``voc(type, wrap, **options)``."""

    def read(
        kind: str = 'XMLDataset', wrap: Callable[[dict], dict] = lambda d: d, **options: object
    ) -> Config:
        config = load_config(str(tiny_config('retinanet', shapes=data)))
        config.work_dir = str(tmp_path / 'run')
        for split in ('train', 'val', 'test'):
            loader = config[f'{split}_dataloader']
            dataset = dict(
                type=kind,
                data_root=str(data / 'voc'),
                data_prefix=dict(sub_data_root=''),
                ann_file='train.txt' if split == 'train' else 'val.txt',
                pipeline=loader.dataset.pipeline,
                **options,
            )
            loader.dataset = ConfigDict(wrap(dataset) if split == 'train' else dataset)
        config.val_evaluator = config.test_evaluator = ConfigDict(type='VOCMetric')
        return config

    return read


WRAPPERS = {
    'none': lambda d: d,
    'repeated': lambda d: dict(type='RepeatDataset', times=2, dataset=d),
    'joined': lambda d: dict(type='ConcatDataset', datasets=[d, d]),
    'balanced': lambda d: dict(type='ClassBalancedDataset', oversample_thr=0.1, dataset=d),
    'mixed': lambda d: dict(type='MultiImageMixDataset', dataset=d, pipeline=[]),
    'nested': lambda d: dict(
        type='RepeatDataset', times=2, dataset=dict(type='ConcatDataset', datasets=[d])
    ),
}


@pytest.mark.parametrize('wrapper', WRAPPERS)
def test_voc_with_classes_of_its_own_trains(wrapper, voc):
    config = voc(wrap=WRAPPERS[wrapper])
    config.classes = CLASSES
    check_training(config)
    assert config.model.bbox_head.num_classes == 6
    for dataset in datasets_of(config):
        assert dataset.metainfo.classes == CLASSES
    dataset = DATASETS.build(config.train_dataloader.dataset)
    assert len(dataset) >= 8
    assert dataset.metainfo['classes'] == CLASSES
    items = [dataset[index]['data_samples'] for index in range(len(dataset))]
    labels = {int(label) for item in items for label in item.gt_instances.labels}
    assert labels == set(range(6))


def test_classes_of_metainfo_set_the_head(voc):
    config = voc('VOCDataset', metainfo=dict(classes=('star', 'ring')))
    check_training(config)
    assert config.model.bbox_head.num_classes == 2
    assert {found.kind for found in check_dataset(config, ('train',)).findings} <= {
        'objects of other classes', 'image without objects'
    }  # fmt: skip


def test_voc_without_its_classes_or_with_masks_is_refused(voc):
    with pytest.raises(ConfigError, match=r'cross.*disc.*triangle'):
        check_training(voc())
    with pytest.raises(DataError, match='no objects'):
        check_training(voc('VOCDataset'))
    config = voc()
    config.classes = CLASSES
    for transform in config.train_dataloader.dataset.pipeline:
        if transform['type'].endswith('LoadAnnotations'):
            transform['with_mask'] = True
    with pytest.raises(DataError, match='masks'):
        check_training(config)


def replace_text(old: str, new: str) -> Callable[[Path], None]:
    def change(data: Path) -> None:
        text = (data / XML).read_text()
        assert old in text
        (data / XML).write_text(text.replace(old, new, 1))

    return change


def set_first_box(*box: int) -> Callable[[Path], None]:
    return lambda data: replace_text('<object>', object_xml('disc', box) + '<object>')(data)


INCOMPLETE = ('error', 'incomplete annotation', XML)
# What is wrong, its severity, kind and file.
FAULTS = [
    (lambda d: (d / XML).unlink(), 'error', 'missing annotation', XML),
    (lambda d: (d / XML).write_text('<a>'), *INCOMPLETE),
    (replace_text('<width>128', '<width>0'), *INCOMPLETE),
    (replace_text('<name>', '<nam>'), *INCOMPLETE),
    (replace_text('<xmin>', '<xmin>x'), *INCOMPLETE),
    (replace_text('bndbox', 'box'), *INCOMPLETE),
    (set_first_box(9, 9, 1, 20), 'error', 'box without area', XML),
    (set_first_box(300, 9, 20, 20), 'error', 'box outside the image', XML),
    (set_first_box(9, 9, 200, 20), 'warning', 'box beyond the border', XML),
    (lambda d: (d / IMAGE).unlink(), 'error', 'missing image', IMAGE),
    (lambda d: Image.new('RGB', (90, 70)).save(d / IMAGE), 'error', 'image of another size', IMAGE),
    (replace_text('<name>', '<name>big '), 'warning', 'objects of other classes', 'voc/train.txt'),
    (lambda d: (d / 'voc/train.txt').write_bytes(b'\xff'), 'error', 'unusable dataset',
     'voc/train.txt'),
]  # fmt: skip


def check(config: Config) -> Report:
    return check_dataset(config, ('train',), workers=1)


@pytest.mark.parametrize(('corrupt', 'severity', 'kind', 'file'), FAULTS)
def test_faults_of_voc_are_found(corrupt, severity, kind, file, data, voc):
    corrupt(data)
    config = voc()
    config.classes = CLASSES
    found = check(config).findings
    assert [(one.severity, one.kind, one.file) for one in found] == [
        (severity, kind, str(data / file))
    ]


def test_a_voc_set_without_what_is_wrong_trains(data, voc):
    (data / XML).write_text('')
    config = voc()
    config.classes = CLASSES
    set_classes(config, ('train', 'val'))
    leave_out_bad(config, ('train', 'val'))
    dataset = DATASETS.build(config.train_dataloader.dataset)
    names = [dataset.get_data_info(index)['img_id'] for index in range(len(dataset))]
    assert names == [f'train_00000{number}' for number in range(2, 9)]


@pytest.fixture
def seg(data: Path, tiny_config: Callable[..., Path], tmp_path: Path) -> Callable[..., Config]:
    """Reads a tiny segmentor, ``seg(extra, **options)``; the options go to all its datasets."""

    def read(extra: str = '', **options: object) -> Config:
        config = load_config(str(tiny_config('fpn', extra, shapes=data)))
        config.work_dir = str(tmp_path / 'run')
        for dataset in datasets_of(config):
            dataset.update(options)
        return config

    return read


def test_a_list_of_images_is_read_and_left_out_of(data, seg):
    (data / 'ade/some.txt').write_text('train_000001\ntrain_000002\ntrain_000003\n')
    config = seg()
    config.train_dataloader.dataset.ann_file = 'some.txt'
    check_training(config)
    (data / 'ade/annotations/training/train_000002.png').unlink()
    # What the list does not name may be wrong.
    (data / 'ade/annotations/training/train_000004.png').unlink()
    assert [found.kind for found in check(config).findings] == ['missing segmentation map']
    with pytest.raises(DataError, match='train_000002'):
        check_training(config)
    leave_out_bad(config, ('train',))
    assert Path(config.train_dataloader.dataset.ann_file).read_text().split() == [
        'train_000001', 'train_000003'
    ]  # fmt: skip


def test_images_of_another_suffix_are_not_lost_in_silence(data, seg):
    for number, suffix in ((2, '.JPG'), (3, '.png')):
        path = data / f'ade/images/training/train_00000{number}.jpg'
        path.rename(path.with_suffix(suffix))
    (found,) = check(seg()).findings
    assert (found.severity, found.file) == ('warning', str(data / 'ade/images/training'))
    assert found.reason.startswith('2 images, such as train_000002.JPG')


def relabel(data: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    for path in (data / 'ade/annotations').glob('*/*.png'):
        Image.fromarray(change(np.array(Image.open(path))).astype(np.uint8)).save(path)


@pytest.mark.parametrize(
    'where',
    [
        "train_dataloader['dataset']['ignore_index'] = 11",
        "model['decode_head']['ignore_index'] = 11",
        'val_evaluator = dict(ignore_index=11)',
    ],
)
def test_an_ignored_label_is_the_same_everywhere(where, data, seg):
    """CamVid's 11: padding, 255 by default, would be trained as a class that there is not."""
    relabel(data, lambda labels: np.where(labels == 1, 11, labels - 1 * (labels > 0)))
    config = seg(where, reduce_zero_label=False)
    pad = ConfigDict(type='Pad', size=(160, 160))
    config.train_dataloader.dataset.pipeline.insert(2, pad)
    check_training(config)
    assert check(config).findings == []
    assert config.model.decode_head.ignore_index == 11
    assert pad.pad_val == dict(img=0, seg=11)

    dataset = DATASETS.build(config.train_dataloader.dataset)
    config.model.data_preprocessor.size = (160, 160)
    config.model.backbone.init_cfg = None
    config.model.decode_head.norm_cfg = ConfigDict(type='BN')
    model = MODELS.build(config.model)
    batch = model.data_preprocessor(pseudo_collate([dataset[0], dataset[1]]), True)
    labels = torch.cat([sample.gt_sem_seg.data for sample in batch['data_samples']])
    assert 11 in labels and 255 not in labels
    assert model(**batch, mode='loss')['decode.loss_ce'].isfinite()

    metric = METRICS.build(config.val_evaluator)
    metric.dataset_meta = dataset.metainfo
    labels, predicted = torch.tensor([[0, 1, 11, 11]]), torch.tensor([[0, 1, 2, 1]])
    sample = dict(pred_sem_seg=dict(data=predicted), gt_sem_seg=dict(data=labels))
    metric.process({}, [sample])
    assert metric.evaluate(1)['aAcc'] == 100


def test_contradictions_about_the_ignored_label(seg):
    head = "model['decode_head']['ignore_index'] = 11"
    with pytest.raises(ConfigError, match='7'):
        ignored_label(seg(f'{head}\nval_evaluator = dict(ignore_index=7)'))
    with pytest.raises(ConfigError, match='reduce_zero_label'):
        ignored_label(seg(head))


@pytest.mark.parametrize('reduce_zero_label', [False, True])
@pytest.mark.parametrize('label_map', [(), ((0, 255), (1, 0), (2, 255), (3, 1))])
def test_labels_are_read_as_mmseg_reads_them(reduce_zero_label, label_map, tmp_path):
    from mmseg.datasets.transforms import LoadAnnotations

    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / 'all.png')
    read = dict(
        seg_map_path=str(tmp_path / 'all.png'),
        reduce_zero_label=reduce_zero_label,
        label_map=dict(label_map) or None,
        seg_fields=[],
    )
    labels = LoadAnnotations().transform(read)['gt_seg_map'].ravel()
    expected = np.where(labels == 255, -1, np.where(labels < 2, labels.astype(int), -2))
    rules = LabelRules(2, reduce_zero_label, label_map)
    assert rules.classes_of_values().tolist() == expected.tolist()


@pytest.mark.parametrize(('number', 'classes'), [(0, 6), (1, 2), (2, 7)])
def test_the_configs_of_the_docs_load_and_pass(number, classes, data, tmp_path):
    text = (ROOT / 'docs/own_data.md').read_text()
    config = text.split('```python\n')[number + 1].split('```')[0]
    for old, new in {
        "'det_configs": f"'{ROOT}/det_configs",
        "'seg_configs": f"'{ROOT}/seg_configs",
        'data/cells': str(data / ('coco' if number == 0 else 'voc')),
        'data/streets': str(data / 'ade'),
        'train.json': 'annotations/instances_train2017.json',
        'val.json': 'annotations/instances_val2017.json',
        "img='train/'": "img='train2017/'",
        "img='val/'": "img='val2017/'",
        "['red', 'white']": "['disc', 'ring']",
        "['sky', 'building', 'road']": f"'{data}/classes.txt'",
    }.items():
        config = config.replace(old, new)
    (tmp_path / 'mine.py').write_text(config)
    mine = load_config(str(tmp_path / 'mine.py'), {'model.backbone.init_cfg': None})
    check_training(mine)
    (head,) = (mine.model.get(key) for key in ('bbox_head', 'decode_head') if key in mine.model)
    assert head.num_classes == classes
    for dataset in datasets_of(mine):
        assert len(DATASETS.build(dataset)) in (5, 6, 7, 8)
