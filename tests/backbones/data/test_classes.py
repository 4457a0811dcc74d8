"""Class names come from the data, heads follow them, and keep what is theirs by design."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
from corrupt import edit
from mmengine.config import Config, ConfigDict

from backbones.data.classes import (
    check_class_weights,
    check_metainfo,
    class_heads,
    class_list,
    set_classes,
    set_num_classes,
)
from backbones.data.config_datasets import datasets_of
from backbones.engine.config import load_config
from backbones.errors import ConfigError, DataError


@pytest.fixture
def derived(tmp_path: Path) -> Callable[..., Config]:
    """A config on top of a stock one: ``derived('mmdet::...', 'more = lines')``."""

    def write(base: str, extra: str = '') -> Config:
        path = tmp_path / 'mine.py'
        path.write_text(f'_base_ = {base!r}\n{extra}\n')
        return load_config(str(path))

    return write


def counts(config: Config) -> list[int]:
    return [head[key] for head, key in class_heads(config.model)]


# A stock config, and the number of classes of its heads with data of three classes.
WITH_THREE_CLASSES = {
    'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py': [3],
    'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py': [3, 3],
    # The semantic head of these tells apart the stuff of COCO.
    'mmdet::htc/htc_r50_fpn_1x_coco.py': [3] * 6 + [183],
    'mmdet::scnet/scnet_r50_fpn_1x_coco.py': [3, 3, 3, 3, 183, 3],
    'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py': [3, 3],
    'mmseg::upernet/upernet_r50_4xb4-80k_ade20k-512x512.py': [3, 3],
    # One auxiliary head finds edges.
    'mmseg::stdc/stdc1_4xb12-80k_cityscapes-512x1024.py': [3, 3, 3, 2],
}


@pytest.mark.parametrize('base', WITH_THREE_CLASSES)
def test_heads_of_stock_configs_follow_the_data(base, derived):
    config = derived(base)
    set_num_classes(config, 3)
    assert counts(config) == WITH_THREE_CLASSES[base]


def test_weights_of_classes_follow(derived):
    config = derived('mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py')
    set_num_classes(config, 3)
    assert config.model.panoptic_head.loss_cls.class_weight == [1.0, 1.0, 1.0, 0.1]


@pytest.mark.parametrize(('weights', 'fit'), [([1.0, 5.0, 3.0], True), ([1.0, 5.0], False)])
def test_weights_of_another_number_of_classes_are_refused(weights, fit, tiny_config):
    loss = dict(type='CrossEntropyLoss', class_weight=weights)
    extra = f'model = dict(decode_head=dict(num_classes=3, loss_decode={loss}))'
    model = load_config(str(tiny_config('fpn', extra))).model
    with nullcontext() if fit else pytest.raises(ConfigError, match='class_weight'):
        check_class_weights(model)


@pytest.mark.parametrize(
    ('base', 'of_the_type'),
    [
        # Heads for things alone, for one class that is tracked, and for texts.
        ('mmdet::panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py', 133),
        ('mmdet::sort/sort_faster-rcnn_r50_fpn_8xb2-4e_mot17halftrain_test-mot17halfval.py', 13),
        ('mmdet::grounding_dino/grounding_dino_swin-t_pretrain_obj365_goldg_cap4m.py', 80),
        ('mmdet::htc/htc_r50_fpn_1x_coco.py', 80),
    ],
)
def test_stock_configs_with_their_own_data_stay(base, of_the_type, derived):
    config = derived(base)
    before = counts(config)
    set_num_classes(config, of_the_type)
    assert counts(config) == before


def test_a_head_that_was_chosen_is_not_rewritten(derived):
    config = derived('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py')
    for chosen in (5, 19, 20, 21, 60):
        config.model.roi_head.bbox_head.num_classes = chosen
        with pytest.raises(ConfigError, match=f'num_classes={chosen}'):
            set_num_classes(config, 3)


def test_data_of_another_type_than_the_base_config(derived):
    """80 came with the base config, whose dataset type no longer says so."""
    extra = "classes = ['disc', 'ring']\ntrain_dataloader = val_dataloader = test_dataloader = None"
    config = derived('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', extra)
    dataset = ConfigDict(type='VOCDataset', ann_file='train.txt', data_root='data')
    config.train_dataloader = ConfigDict(dataset=dataset)
    assert set_classes(config, ('train',)) == ('disc', 'ring')
    assert counts(config) == [2]
    assert dataset.metainfo.classes == ('disc', 'ring')


def test_classes_picked_by_metainfo_are_renumbered_by_mmseg(derived):
    extra = """
picked = dict(dataset=dict(metainfo=dict(classes=('car', 'road'))))
train_dataloader = val_dataloader = test_dataloader = picked
"""
    config = derived('mmseg::fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py', extra)
    assert set_classes(config, ('train', 'val')) == ('car', 'road')
    assert counts(config) == [2, 2]
    assert {dataset.type for dataset in datasets_of(config)} == {'CityscapesDataset'}


def test_datasets_with_different_classes_are_refused(derived):
    extra = """
train_dataloader = dict(dataset=dict(metainfo=dict(classes=('car', 'road'))))
val_dataloader = dict(dataset=dict(metainfo=dict(classes=('road', 'car'))))
"""
    with pytest.raises(ConfigError, match='same order'):
        set_classes(
            derived('mmseg::fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py', extra), ('train',)
        )


def test_a_file_of_other_classes_is_read(tmp_path):
    (tmp_path / 'classes.txt').write_text('car\nroad\n')
    dataset = ConfigDict(type='A', metainfo=dict(classes=str(tmp_path / 'classes.txt')))
    check_metainfo(dataset, ('car', 'road'))
    with pytest.raises(ConfigError, match="'car', 'road'"):
        check_metainfo(dataset, ('road', 'car'))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda c: c['categories'][2].update(name='pyramid'), "no category 'triangle'"),
        (lambda c: c['categories'].reverse(), 'another order'),
    ],
)
def test_coco_files_that_disagree_are_refused(change, message, data, tiny_config):
    edit(data / 'coco/annotations/instances_val2017.json', change)
    with pytest.raises(DataError, match=message):
        set_classes(load_config(str(tiny_config('retinanet', shapes=data))), ('train', 'val'))


@pytest.mark.parametrize(
    ('content', 'message'), [(b'dis\xff', 'UTF-8'), (b'\n', 'no names'), (None, 'no such file')]
)
def test_lists_of_classes_that_cannot_be_read(content, message, tmp_path):
    if content is not None:
        (tmp_path / 'classes.txt').write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        class_list(str(tmp_path / 'classes.txt'))


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    path = tmp_path / 'classes.txt'
    path.write_text('disc\nring\n', encoding='utf-8-sig')
    assert class_list(str(path)) == ('disc', 'ring')
