"""tools/benchmark.py: what it counts is exact, and what it writes is complete."""

import dataclasses
import itertools
import json
from pathlib import Path
from shutil import which

import pytest
import torch
from exporting import needs_export
from tiny import ROOT

from backbones import ARCHITECTURES, EfficientFormerV2
from backbones.benchmark import benchmark as benchmarking
from backbones.benchmark import work
from backbones.benchmark.candidates import PEERS, Candidate, Group, group_configs
from backbones.benchmark.measure import Timed, count_macs
from backbones.benchmark.report import by_title, format_table
from backbones.benchmark.work import Setting, make_runner
from backbones.deploy import switch_to_deploy
from backbones.errors import ConfigError

FPN = str(ROOT / 'seg_configs' / 'fpn_effv2_s0.py')


def setting(
    part: str = 'backbone', step: str = 'predict', backend: str = 'torch', amp: bool = False
) -> Setting:
    return Setting(part, step, backend, (70, 100), 2, True, amp, 'cpu', 1)


@pytest.fixture
def compare(monkeypatch):
    """Measures a group in one round, without memory, which takes a process for each model."""
    monkeypatch.setattr(benchmarking, 'peak_memory', lambda *_: None)
    return lambda group, what: benchmarking.compare(group, what, 1, 0)


def group_of(config: object, with_peers: bool = False) -> Group:
    [group] = group_configs([str(config)], with_peers, {})
    return group


@pytest.fixture
def run_benchmark(run_tool, tmp_path):
    """Runs the tool on small images; returns the finished process and what it measured."""

    def run(*arguments: object) -> tuple:
        quick = ('--sizes', '64x96', '--rounds', 2, '--seconds', 0, '--out-dir', tmp_path / 'out')
        done = run_tool('benchmark.py', *arguments, *quick)
        written = tmp_path / 'out' / 'benchmark.json'
        return done, json.loads(written.read_text()) if written.is_file() else None

    return run


def test_one_command_compares_backbones_with_peers(run_benchmark, tiny_config, tmp_path):
    done, outcome = run_benchmark(tiny_config('fpn'), '--peers', '--part', 'backbone')
    assert done.returncode == 0, done.stderr[-3000:]
    results = {each['model']: each for each in outcome['results']}
    assert list(results) == ['EfficientFormerV2', *PEERS]
    assert [each['ours'] for each in results.values()] == [True, False, False, False]
    for name, each in results.items():
        latency = each['latency_ms']
        assert 0 < latency['p10'] <= latency['median'] <= latency['p90']
        assert len(latency['round_medians']) == 2
        assert each['images_per_second'] == pytest.approx(1000 / latency['median'])
        # At least the weights have to be there.
        assert each['peak_memory_mib'], done.stderr[-3000:]
        assert each['peak_memory_mib'] * 2**20 > 0.9 * 4 * each['parameters']
        assert name in done.stdout
    assert results['EfficientFormerV2']['ratio'] == 1
    assert outcome['deploy'] and outcome['machine']['versions']['torch'] == torch.__version__
    assert (tmp_path / 'out' / 'benchmark.md').read_text().strip() in done.stdout
    assert (tmp_path / 'out' / 'benchmark.png').read_bytes().startswith(b'\x89PNG\r\n')


@pytest.mark.parametrize(
    ('task', 'step', 'amp'),
    [
        *itertools.product(('fpn', 'ham', 'retinanet', 'mask_rcnn'), ('predict', 'train'), [False]),
        *(('fpn', 'train', True), ('mask_rcnn', 'train', True)),
    ],
)
def test_whole_models_predict_and_train(tiny_config, task, step, amp, compare):
    group = group_of(tiny_config(task))
    [result] = compare(group, setting('model', step, amp=amp))
    assert result['problem'] is None
    assert result['images_per_second'] == pytest.approx(2000 / result['latency_ms']['median'])
    assert result['input_size'] == ((70, 100) if task in ('fpn', 'ham') else (96, 128))
    [candidate] = group.candidates.values()
    # Those of the network as trained, not folded.
    assert result['parameters'] == sum(p.numel() for p in candidate.build().parameters())


@pytest.mark.parametrize('part', ['backbone', 'model'])
def test_mixed_precision_is_bfloat16_on_a_cpu(tiny_config, part):
    model = Candidate(str(tiny_config('fpn'))).build()
    seen = []
    model.backbone.stages[-1].register_forward_hook(lambda *args: seen.append(args[2].dtype))
    for amp in (False, True):
        make_runner(model, setting(part, amp=amp))()
    assert seen == [torch.float32, torch.bfloat16]


@pytest.mark.slow
@needs_export
def test_mixed_precision_of_a_file(tiny_config, compare):
    [found] = compare(group_of(tiny_config('fpn')), setting(backend='openvino', amp=True))
    assert found['problem'] is None and found['latency_ms']['median'] > 0


def test_what_fails_for_one_model_leaves_the_others(tiny_config, monkeypatch, compare):
    def fail_on_resnet_50(model, what, file):
        if sum(p.numel() for p in model.backbone.parameters()) > 20e6:
            raise RuntimeError('not enough memory')
        return make_runner(model, what, file)

    monkeypatch.setattr(benchmarking, 'make_runner', fail_on_resnet_50)
    results = compare(group_of(tiny_config('fpn'), with_peers=True), setting())
    assert [each['problem'] for each in results] == [None, None, None, 'not enough memory']
    assert ['latency_ms' in each for each in results] == [True, True, True, False]
    assert 'ResNet-50: not enough memory' in format_table(results)


def test_a_model_that_cannot_train_leaves_what_was_measured(tiny_config, compare):
    """UPerNet pools to one pixel, of which a batch of one has too few for BatchNorm."""
    upernet = """
        model.update(neck=None, decode_head=dict(
            _delete_=True, type='UPerHead', in_channels=[4, 8, 8, 16], in_index=[0, 1, 2, 3],
            pool_scales=(1, 2), channels=8, num_classes=7, norm_cfg=dict(type='BN'),
            loss_decode=dict(type='CrossEntropyLoss')))
    """
    group = group_of(tiny_config('fpn', upernet))
    [result] = compare(group, dataclasses.replace(setting('model', 'train'), batch=1))
    assert 'more than 1 value' in result['problem'] and 'latency_ms' not in result


def test_an_error_while_models_take_turns_is_theirs(tiny_config, monkeypatch, compare):
    def fail(*_):
        raise RuntimeError('not enough memory')

    monkeypatch.setattr(benchmarking, 'measure_in_turns', fail)
    [result] = compare(group_of(tiny_config('fpn')), setting())
    assert result['problem'] == 'not enough memory' and result['parameters'] > 0


@pytest.mark.skipif(not (which('g++') or which('clang++')), reason='no C++ compiler')
def test_compiling_freezes_the_weights(monkeypatch):
    """Without it, convolutions are those of eager mode, and compiled models hardly faster."""
    from torch._dynamo.utils import counters

    model = torch.nn.Module()
    model.backbone = torch.nn.Conv2d(3, 8, 3).eval()
    monkeypatch.setattr(work, 'make_batch', lambda *_: (torch.randn(1, 3, 32, 32), []))
    monkeypatch.setattr(work, 'switch_to_deploy', lambda model: model)
    counters.clear()
    make_runner(model, setting(backend='compile'))()
    assert counters['inductor']['mkldnn_conv_weight_pack_matcher_count'] == 1


def test_threads_are_those_of_the_environment_or_the_cores(monkeypatch):
    monkeypatch.setattr(benchmarking, 'one_cpu_per_core', lambda: [0, 2, 4])
    for value, threads in (('2', 2), ('', 3), ('4,2', 4), ('auto', 3)):
        monkeypatch.setenv('OMP_NUM_THREADS', value)
        assert benchmarking.default_threads() == threads


def test_counts_s2_as_the_paper_does():
    """1.25 G at 224x224 with the classifiers, two because of distillation (Table 2)."""
    holder = torch.nn.Module()
    holder.backbone = EfficientFormerV2('s2').eval()
    macs = count_macs(holder, 'backbone', (224, 224))
    assert macs == pytest.approx(1.246e9, rel=0.001)
    classifiers = 2 * 1000 * ARCHITECTURES['s2']['channels'][-1]
    assert macs + classifiers == pytest.approx(1.25e9, rel=0.01)


def test_counts_resnet_18_as_is_known():
    """1.814 G with its classifier of 512 x 1000, at 224x224 (He et al.: 1.8 G)."""
    macs = count_macs(Candidate(FPN, 'ResNet-18').build(), 'backbone', (224, 224))
    assert macs + 512 * 1000 == pytest.approx(1.814e9, rel=0.001)


@pytest.mark.parametrize('peer', PEERS)
def test_peers_are_folded_too(peer):
    model = Candidate(FPN, peer).build().backbone
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(images)
        after = switch_to_deploy(model)(images)
    assert not any(isinstance(each, torch.nn.BatchNorm2d) for each in model.modules())
    for one, other, stride in zip(before, after, (4, 8, 16, 32), strict=True):
        assert one.shape[2:] == (64 // stride, 64 // stride)
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(one.std()))


def test_models_that_differ_in_more_than_the_backbone_are_not_compared():
    """Peers are under the same head; those of segmentors without a neck, too."""
    ham = FPN.replace('fpn_', 'ham_')
    configs = [FPN, ham, FPN.replace('s0', 's1'), ham.replace('s0', 's2')]
    segmentors, without_neck = group_configs(configs, True, {})
    ours = 'EfficientFormerV2-S0', 'EfficientFormerV2-S1', 'EfficientFormerV2-S2'
    assert list(segmentors.candidates) == [*ours[:2], *PEERS]
    assert list(without_neck.candidates) == [*ours[::2], *PEERS]
    head = without_neck.candidates['ResNet-18'].load().model.decode_head
    assert head.in_channels == [128, 256, 512] and head.channels == 256
    with pytest.raises(ConfigError, match='--peers'):
        Candidate(ham, 'ResNet-18', {'model.auxiliary_head': dict(type='FCNHead')}).load()
    with pytest.raises(ConfigError, match='twice'):
        group_configs([FPN, FPN, FPN], False, {})


def test_one_backbone_under_different_necks_stands_in_two_tables():
    groups = group_configs([FPN, FPN.replace('s0', 's0_neck96')], False, {})
    results = [dict(dataclasses.asdict(setting()), head=group.name) for group in groups]
    assert len(by_title(results)) == 2


def test_configs_of_one_name_in_several_folders(tiny_config, tmp_path):
    text, paths = tiny_config('fpn').read_text(), []
    for folder in 'abc':
        paths.append(tmp_path / folder / 'net.py')
        paths[-1].parent.mkdir()
        paths[-1].write_text(text)
    [group] = group_configs(list(map(str, paths)), False, {})
    assert [each.config_path for each in group.candidates.values()] == list(map(str, paths))
    assert not any('/' in name for name in group.candidates)


def test_light_heads_are_light():
    """Semantic FPN takes 28 G multiply-adds at 512x512."""
    model = Candidate(str(ROOT / 'seg_configs' / 'ham_effv2_s2.py')).build()
    assert count_macs(model, 'model', (512, 512)) == pytest.approx(9.0e9, rel=0.01)


def test_ratio_is_that_of_rounds():
    """Where the machine becomes slower for all, the ratio stays."""
    first, second = Timed([[1.0], [10.0], [100.0]]), Timed([[2.0], [20.0], [200.0]])
    assert second.ratio_to(first) == 2


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [((FPN, '--sizes', '512'), '512'), ((FPN, '--batch', '0'), "'0'"), (('none.py',), 'none.py')],
)
def test_bad_arguments_are_said(arguments, message, call_tool, tmp_path: Path):
    code, said = call_tool('benchmark.py', *arguments, '--out-dir', tmp_path / 'out')
    assert code in (1, 2) and message in said
    assert not (tmp_path / 'out').exists()


def test_a_folder_that_cannot_be_made_is_said_before_measuring(
    monkeypatch, call_tool, tmp_path: Path
):
    (tmp_path / 'file').touch()
    monkeypatch.setattr(benchmarking, 'benchmark', None)
    code, said = call_tool('benchmark.py', FPN, '--out-dir', tmp_path / 'file' / 'out')
    assert code == 1 and str(tmp_path / 'file') in said and 'Traceback' not in said
