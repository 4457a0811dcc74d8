"""The config of a network that is taken: that of the search, with another model."""

import dataclasses
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from searching import SEARCH
from tiny import ROOT

from backbones.data.classes import set_classes
from backbones.engine.config import load_config
from backbones.errors import ConfigError
from backbones.search.space import Choice, Space
from backbones.search.take import changes, take_network, write_network
from backbones.weights import load_checkpoint

SMALL = f"_base_ = '{ROOT}/seg_configs/fpn_effv2_small.py'\nsearch = dict()\n"


def taken(path: Path, options: dict, choice: Choice | None = None) -> Path:
    """The config of a network, by default the smallest."""
    config = load_config(str(path), options)
    choice = choice or Space.from_config(config).smallest
    write_network(config, choice, {}, path.with_name('taken.py'), 'A network.', options)
    return path.with_name('taken.py')


def recipe(config) -> dict:
    """All but the model, and what says that it is not a search."""
    others = ('model', 'search', 'load_from')
    return {key: value for key, value in config.to_dict().items() if key not in others}


def test_the_recipe_is_that_of_the_search_with_its_options(tiny_config):
    path = tiny_config('fpn', SEARCH)
    # Followed by the datasets, a key of its own, and one of an item of a list.
    options = {'data_root': 'elsewhere', 'optim_wrapper.optimizer.lr': 0.5, 'search.seed': 1}
    options |= {'param_scheduler.0.factor': 0.25, 'model.decode_head.dropout_ratio': 0.5}
    found, expected = load_config(str(taken(path, options))), load_config(str(path), options)
    assert recipe(found) == recipe(expected) != recipe(load_config(str(path)))
    assert found.train_dataloader.dataset.data_root == 'elsewhere'
    assert found.model.decode_head.dropout_ratio == 0.5
    assert found.search is None and found.load_from.endswith('taken.pth')
    smallest = Space.from_config(expected).smallest
    assert tuple(found.model.backbone.arch.channels) == smallest.channels
    assert found.model.neck.out_channels == found.model.decode_head.channels == smallest.neck


def test_weights_have_the_names_of_their_classes(tiny_config, tmp_path):
    config = load_config(str(tiny_config('fpn', SEARCH)))
    classes, out = set_classes(config, ('train',)), tmp_path / 'taken.py'
    smallest = Space.from_config(config).smallest
    write_network(config, smallest, {'x': torch.ones(2)}, out, 'A network.', {})
    found = load_checkpoint(out.with_suffix('.pth'))
    assert found['meta']['dataset_meta']['classes'] == tuple(classes)
    assert torch.equal(found['state_dict']['x'], torch.ones(2))


@pytest.mark.parametrize('name', ['mine.py', 'mine.pth'])
def test_no_file_is_overwritten(name, tmp_path):
    (tmp_path / name).write_text('trained for days')
    config = Config(dict(work_dir=str(tmp_path)))
    with pytest.raises(ConfigError, match=name):
        take_network(config, 'supernet.pth', 1, tmp_path / 'mine.py', {})


def test_settings_are_followed_still(tmp_path):
    path, options = tmp_path / 'small.py', {'image_size': 320, 'epochs': 40}
    path.write_text(SMALL)
    new = taken(path, options)
    assert recipe(load_config(str(new))) == recipe(load_config(str(path), options))
    # Those of ImageNet have other shapes than the network that was taken.
    assert load_config(str(path), options).model.backbone.init_cfg
    assert load_config(str(new)).model.backbone.init_cfg is None
    assert 'image_size = 320' in new.read_text() and 'pipeline' not in new.read_text()
    assert load_config(str(new), {'image_size': 64}).crop_size == (64, 64)


def test_hidden_channels_are_those_of_the_weights(tiny_config):
    """7/3 of 48 channels are 112, and 111 of a ratio with six digits."""
    path = tiny_config('fpn', SEARCH)
    largest = Space.from_config(load_config(str(path))).largest
    choice = dataclasses.replace(largest, ratios=((7 / 3,), *largest.ratios[1:]))
    arch = load_config(str(taken(path, {}, choice))).model.backbone.arch
    assert int(48 * arch.mlp_ratios[0][0]) == 112


@pytest.mark.parametrize(
    ('new', 'expected'),
    [
        (dict(a=1, b=dict(c=2, d=[3])), {}),
        (dict(a=1, b=dict(c=4, d=[3], e=5)), dict(b=dict(c=4, e=5))),
        (dict(a=1, b=dict(c=2)), dict(b=dict(c=2, _delete_=True))),
        (dict(a=dict(f=1), b=dict(c=2, d=[3])), dict(a=dict(f=1, _delete_=True))),
        (dict(a=1, b=None), dict(b=None)),
    ],
)
def test_changes(new, expected):
    assert changes(new, dict(a=1, b=dict(c=2, d=[3]))) == expected
