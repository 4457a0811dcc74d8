"""One model computes every network of a space, and gives each of them away."""

import copy
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmcv.cnn.bricks import DropPath
from mmengine.config import Config
from mmengine.registry import MODELS
from tiny import ROOT, with_random_weights, write_tiny_config
from torch import Tensor, nn

from backbones.deploy import switch_to_deploy
from backbones.efficientformer_v2.backbone import ARCHITECTURES
from backbones.engine.config import fit_to_device, load_config
from backbones.errors import CheckpointError, ConfigError
from backbones.search.elastic import Layout, make_elastic, set_choice
from backbones.search.space import Choice, Space
from backbones.search.supernet import SpaceHook, SupernetRunner

FPN = 'seg_configs/fpn_effv2_{}.py'
SEARCH = 'search = dict(necks=(8,), channels=((2, 4), (4, 8), (4, 8), (8, 16)))\n'


def read(path: str | Path, **options: object) -> Config:
    config = load_config(str(ROOT / path), {'search': {}, **options})
    fit_to_device(config)
    config.model.backbone.init_cfg = None
    return config


def build(config: Config, choice: Choice | None = None) -> nn.Module:
    """The model of a config, or that of a network of its space."""
    if choice is not None:
        config = copy.deepcopy(config)
        config.merge_from_dict(Space.from_config(config).options(choice, config))
    return MODELS.build(config.model).double().eval()


@torch.no_grad()
def compute(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Logits of a segmentor, scores and offsets of RetinaNet, feature maps of Mask R-CNN."""
    features = model.eval().extract_feat(images)
    if hasattr(model, 'decode_head'):
        return [model.decode_head(features)]
    if hasattr(model, 'bbox_head'):
        return [level for kind in model.bbox_head(features) for level in kind]
    return list(features)


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest, as a part of the largest value."""
    return max(float((x - y).abs().max() / x.abs().max()) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope='module', params=['fpn', 'retinanet', 'mask_rcnn'])
def sorted_model(request, shapes, tmp_path_factory) -> tuple:
    """A task's config and a model of it with sorted channels, and what both models compute.

    Semantic FPN's is one of the family, in whose space there are published networks. The neck of
    Mask R-CNN keeps its width, and may have other norms than BatchNorm.
    """
    torch.manual_seed(0)
    path, task, options = FPN.format('s1'), request.param, {}
    if task != 'fpn':
        path = write_tiny_config(tmp_path_factory.mktemp(task), task, shapes, SEARCH)
    if task == 'mask_rcnn':
        options = {'model.neck.norm_cfg': dict(type='GN', num_groups=2)}
    config = read(path, **options)
    space = Space.from_config(config)
    model = with_random_weights(build(config)).double()
    layout = Layout(model, space, config)
    # Odd, and no multiple of 32.
    images = torch.randn(2, 3, 75, 97, dtype=torch.double)
    before = compute(model, images)
    layout.sort_channels(model)
    return config, layout, model, images, before


def test_sorting_changes_nothing_and_puts_the_important_first(sorted_model):
    *_, model, images, before = sorted_model
    assert difference(before, compute(model, images)) < 1e-10
    read_by = model.backbone.stages[1].blocks[0].mlp.fc2.conv.weight.abs().sum(dim=(0, 2, 3))
    assert torch.equal(read_by, read_by.sort(descending=True).values)


def test_a_network_by_itself_computes_what_the_elastic_model_does(sorted_model):
    config, layout, model, images, before = sorted_model
    space, rng = layout.space, np.random.default_rng(0)
    elastic = make_elastic(copy.deepcopy(model), layout)
    assert elastic.state_dict().keys() == model.state_dict().keys()
    assert difference(before, compute(elastic, images)) < 1e-10
    choices = [space.smallest, *(space.sample(rng) for _ in range(4)), *space.published().values()]
    for choice in choices[:8]:
        assert choice in space
        alone = build(config, choice)
        alone.load_state_dict(layout.extract(elastic.state_dict(), choice))
        assert layout.count_parameters(choice) == sum(p.numel() for p in alone.parameters())
        set_choice(elastic, layout, choice)
        expected = compute(elastic, images)
        assert difference(expected, compute(alone, images)) < 1e-10
        assert difference(expected, compute(switch_to_deploy(alone), images)) < 1e-4


@pytest.mark.parametrize('arch', ['s1', 's2', 'l'])
def test_smaller_published_networks_are_in_the_space_of_larger_ones(arch):
    space = Space.from_config(read(FPN.format(arch)))
    names = list(ARCHITECTURES)
    expected = names[: names.index(arch) + 1]
    published = space.published()
    assert published.keys() == {f'{name}, neck {neck}' for name in expected for neck in space.necks}
    for name in expected:
        found = published[f'{name}, neck 256'].architecture()
        row = ARCHITECTURES[name]
        assert found['channels'] == tuple(row['channels'])
        assert found['depths'] == tuple(row['depths'])
        assert found['num_attention_blocks'] == (row['num_attention_blocks'],) * 2
        assert found['mlp_ratios'] == tuple(map(tuple, row['mlp_ratios']))


def test_shallower_networks_drop_fewer_paths():
    config = read(FPN.format('l'))
    space = Space.from_config(config)
    for choice in (space.largest, space.smallest):
        arch = space.options(choice, config)['model.backbone.arch']
        # At the same rate from block to block.
        assert arch['drop_path_rate'] / sum(arch['depths']) == pytest.approx(0.1 / 35, rel=1e-2)


def test_networks_of_a_space():
    space = Space.from_config(read(FPN.format('s2')))
    rng = np.random.default_rng(0)
    sampled = [space.sample(rng) for _ in range(200)]
    assert all(choice in space for choice in sampled)
    saved = json.dumps(list(map(dataclasses.asdict, sampled)))
    assert list(map(Choice.from_dict, json.loads(saved))) == sampled
    channels = np.array([choice.channels[2] for choice in sampled])
    # From the smallest to the largest, where independent draws would gather in the middle.
    assert (channels == 144).mean() > 0.15 and (channels == min(space.channels[2])).mean() > 0.15
    for choice in (space.largest, *sampled[:20]):
        for action, smaller in space.smaller(choice).items():
            assert smaller in space and smaller != choice, action
        for action, larger in space.larger(choice).items():
            assert larger in space and larger != choice, action
    assert not space.smaller(space.smallest) and not space.larger(space.largest)
    # Step by step, the smallest is reached from the largest.
    choice, steps = space.largest, 0
    while actions := space.smaller(choice):
        choice, steps = list(actions.values())[steps % len(actions)], steps + 1
    assert choice.channels == space.smallest.channels and choice.neck == space.smallest.neck


@pytest.mark.parametrize(
    ('options', 'problem'),
    [
        ({'model.backbone.frozen_stages': 1}, 'frozen_stages'),
        ({'model.backbone.out_indices': (0, 1)}, 'out_indices'),
        ({'model.neck.type': 'PAFPN'}, 'PAFPN'),
        ({'model.neck.norm_cfg': dict(type='GN', num_groups=8)}, 'GN'),
        ({'model.decode_head.norm_cfg': dict(type='GN', num_groups=8)}, 'GN'),
        ({'model.backbone.norm_cfg': dict(type='naiveSyncBN')}, 'naiveSyncBN'),
        ({'model.backbone.type': 'ResNet'}, 'EfficientFormerV2'),
        ({'search.neck': [64]}, "'neck'"),
        ({'search.min_depths': [1, 1, 7, 1]}, 'min_depths'),
        ({'search.channels': [[32], [64], [96], [176]]}, 'channels'),
        ({'search.channels': [24, 32, 48, 64]}, 'channels'),
        ({'search.channels': [[24], [32], [48]]}, 'channels'),
        ({'search.channels': 24}, 'channels'),
        ({'search.min_depths': (1, 1, 2)}, 'min_depths'),
        ({'search.necks': 128}, 'necks'),
        ({'search.ratios': 3}, 'ratios'),
        ({'search.channels': [[24.5], [32], [48], [88]]}, r'24\.5.*whole'),
        ({'search.min_depths': (1, 1, 2.5, 1)}, r'2\.5.*whole'),
        ({'search.necks': (64.5,)}, r'64\.5.*whole'),
        ({'search.ratios': ['3']}, 'ratios'),
        ({'search': True}, 'True'),
        ({'search.seed': -1}, 'seed.*-1'),
        ({'search.calibration_images': 0}, 'calibration_images.*0'),
        ({'search.calibration_images': 'all'}, 'calibration_images.*all'),
        ({'model.neck': [dict(type='FPN'), dict(type='BFP')]}, 'FPN as its neck.*BFP'),
    ],
)
def test_what_cannot_be_searched_is_refused(options, problem):
    with pytest.raises(ConfigError, match=problem):
        Space.from_config(read(FPN.format('s0'), **options))


def test_a_head_of_default_width_is_searched():
    config = read('det_configs/retinanet_effv2_s0.py')
    expected = Space.from_config(config)
    del config.model.bbox_head.feat_channels
    assert Space.from_config(config) == expected


def test_models_without_a_neck_are_refused():
    with pytest.raises(ConfigError, match=r'FPN as its neck.*none'):
        Space.from_config(read('seg_configs/ham_effv2_s0.py'))


@pytest.mark.parametrize(
    ('options', 'named'),
    [
        ({'model.decode_head.norm_cfg': dict(type='BN', momentum=None)}, 'momentum'),
        ({'model.decode_head.norm_cfg': dict(type='BN', affine=False)}, 'affine'),
        ({'model.neck.conv_cfg': dict(type='DCNv2')}, 'Deform'),
    ],
)
def test_layers_that_cannot_be_sliced_are_refused(options, named):
    config = read(FPN.format('s0'), **options)
    model = build(config)
    with pytest.raises(ConfigError, match=named):
        make_elastic(model, Layout(model, Space.from_config(config), config))


def test_only_the_largest_network_moves_running_statistics_and_drops_paths():
    config = read(FPN.format('s1'))
    config.model.backbone.update(norm_eval=False, drop_path_rate=0.3)
    model = build(config)
    layout = Layout(model, Space.from_config(config), config)
    make_elastic(model, layout)
    images = torch.randn(2, 3, 64, 64, dtype=torch.double)

    def moved_by(choice: Choice) -> set[str]:
        before = copy.deepcopy(model.state_dict())
        model.train()
        set_choice(model, layout, choice)
        drops = {module.training for module in model.modules() if isinstance(module, DropPath)}
        assert drops == {choice == layout.space.largest}
        model.decode_head(model.extract_feat(images))
        after = model.state_dict()
        return {name for name in after if not torch.equal(before[name], after[name])}

    statistics = {name for name in model.state_dict() if 'running_' in name}
    assert moved_by(layout.space.smallest) == set()
    assert moved_by(layout.space.largest) == statistics


def test_each_step_draws_other_networks():
    config = read(FPN.format('s0'))
    runner = SimpleNamespace(cfg=config, iter=5)
    supernet = SupernetRunner.wrap_model(runner, None, build(config))
    again, drawn = (supernet.layout.space.sample(supernet.generator()) for _ in range(2))
    assert again == drawn
    runner.iter += 1
    assert supernet.layout.space.sample(supernet.generator()) != drawn


def test_a_checkpoint_of_another_space_is_refused():
    ours = Space.from_config(read(FPN.format('s0')))
    other = Space.from_config(read(FPN.format('s1')))
    assert ours.check_checkpoint({'search_space': ours.to_json()})
    assert not ours.check_checkpoint({})
    # As training resumes.
    with pytest.raises(CheckpointError, match='another space'):
        SpaceHook(ours).after_load_checkpoint(None, {'search_space': other.to_json()})


def test_blocks_that_a_stage_needs_return_from_its_end():
    """Only the last blocks of a stage can have attention."""
    space = Space.from_config(read(FPN.format('s2')))
    nothing = tuple((0,) * len(ratios) for ratios in space.largest.ratios)
    possible = space.possible(dataclasses.replace(space.largest, ratios=nothing))
    for stage, (ratios, fewest) in enumerate(zip(possible.ratios, space.min_depths, strict=True)):
        assert possible.blocks(stage) == list(range(len(ratios)))[-fewest:]


def test_a_neck_that_reads_some_stages_gets_their_channels():
    levels = {'model.backbone.out_indices': (1, 2, 3), 'model.neck.start_level': 0}
    config = read('det_configs/retinanet_effv2_s0.py', **levels)
    space = Space.from_config(config)
    channels = space.options(space.smallest, config)['model.neck.in_channels']
    assert channels == list(space.smallest.channels[1:])
