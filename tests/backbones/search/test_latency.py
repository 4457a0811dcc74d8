"""The model of latency finds what the parts of networks take, and says how good it is."""

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from tiny import ROOT

from backbones.benchmark.measure import Timed
from backbones.benchmark.work import Setting
from backbones.engine.config import load_config
from backbones.errors import ConfigError
from backbones.search import measurements
from backbones.search.latency import (
    MAX_ERROR,
    LatencyModel,
    cross_validate,
    find_latency,
    fit,
    identify,
    latency_path,
    solve,
    terms_of,
)
from backbones.search.measurements import (
    COLUMNS,
    CSV_NAME,
    NETWORKS_NAME,
    choose_networks,
    measure,
    read_measurements,
    write_files,
)
from backbones.search.space import Space


def config_of(arch: str, **options) -> Config:
    return load_config(str(ROOT / f'seg_configs/fpn_effv2_{arch}.py'), {'search': {}, **options})


@pytest.fixture(scope='module')
def config() -> Config:
    return config_of('s1')


@pytest.fixture(scope='module')
def space(config) -> Space:
    return Space.from_config(config)


def additive(space: Space, choices, padding: int = 1) -> list[float]:
    """Latencies in which every term has a part of similar size."""
    largest = terms_of(space, space.largest, padding)
    shares = np.random.default_rng(5).uniform(1, 10, len(largest))
    weights = {name: s / max(largest[name], 1) for name, s in zip(largest, shares, strict=True)}
    return [
        sum(weights[name] * value for name, value in terms_of(space, choice, padding).items())
        for choice in choices
    ]


@pytest.mark.parametrize('padding', [1, 16])
def test_an_additive_latency_is_found(space, padding):
    choices = choose_networks(space, 0, 80)
    latencies = additive(space, choices, padding)
    model = fit(space, choices[:60], latencies[:60])
    assert model.padding == padding and model.error < 1e-3 and model.tau > 0.99
    predicted = [model.predict(choice) for choice in choices]
    np.testing.assert_allclose(predicted, latencies, rtol=1e-3)


def test_the_error_on_noisy_measurements_is_about_the_noise(space):
    choices = choose_networks(space, 0, 40)
    noise = np.random.default_rng(1).normal(1, 0.02, 40)
    model = fit(space, choices, additive(space, choices) * noise)
    assert 0.01 < model.error < 0.05 and model.tau > 0.9
    noise = np.random.default_rng(1).uniform(0.3, 3, 40)
    assert fit(space, choices, additive(space, choices) * noise).error > MAX_ERROR


def test_terms_follow_what_they_are_named_after(space):
    """A fit gives any terms the weights that suit it best."""
    largest = terms_of(space, space.largest)
    for attention, differences in (((1, 2), [1, 120]), ((2, 1), [1, 224])):
        fewer = dataclasses.replace(space.largest, num_attention_blocks=attention)
        terms = terms_of(space, fewer)
        assert sorted(largest[n] - terms[n] for n in terms if terms[n] != largest[n]) == differences
    # 120 channels take as long as 128 where a device computes 16 at once.
    name = 'stage 3: attention blocks x channels'
    assert terms_of(space, space.largest, 16)[name] == 2 * 128


def test_errors_are_relative_and_of_networks_that_a_fit_has_not_seen():
    # The weight w with the least (w / 1 - 1)^2 + (w / 3 - 1)^2.
    assert solve(np.ones((2, 1)), np.array([1.0, 3.0])) == pytest.approx([1.2])
    # Every network has a part that no other has.
    assert not cross_validate(np.eye(10), np.full(10, 5.0)).any()


def test_networks_are_the_extremes_and_published_and_others(space):
    few, many = choose_networks(space, 3, 20), choose_networks(space, 3, 35)
    assert many[:20] == few and len(set(many)) == 35
    assert few[:2] == [space.largest, space.smallest]
    assert len(set(few[1:]) & set(space.published().values())) == 5
    assert all(choice in space for choice in many)


def test_a_model_is_read_for_its_own_networks_only(config, space, tmp_path):
    config = copy.deepcopy(config)
    config.work_dir = str(tmp_path)
    for backend, advice in (
        (None, ''),
        ('openvino', ' --backend openvino'),
        ('csv', ' --from DIR'),
    ):
        with pytest.raises(ConfigError, match=f'latency CONFIG{advice}'):
            find_latency(config, backend)
    choices = choose_networks(space, 0, 12)
    model = fit(space, choices, additive(space, choices))
    path = latency_path(tmp_path, 'torch')
    model.save(path, config, dict(zip(choices, additive(space, choices), strict=True)))
    assert find_latency(config) == find_latency(config, 'torch') == model
    weights = {'model.backbone.init_cfg.checkpoint': 'other.pth'}
    assert LatencyModel.load(path, config_of('s1', **weights)) == model
    for other in (config_of('s0'), config_of('s1', **{'model.decode_head.num_classes': 7})):
        with pytest.raises(ConfigError, match='other networks'):
            LatencyModel.load(path, other)
    model.save(latency_path(tmp_path, 'csv'), config, {})
    with pytest.raises(ConfigError, match='--backend'):
        find_latency(config)
    path.write_text('{}')
    with pytest.raises(ConfigError, match='torch'):
        LatencyModel.load(path, config)


def write_table(config: Config, folder, lines: list[str]):
    space = Space.from_config(config)
    choices = enumerate(choose_networks(space, 0, 4))
    files = {f'n{k}.onnx': dataclasses.asdict(choice) for k, choice in choices}
    (folder / NETWORKS_NAME).write_text(json.dumps(dict(files=files, **identify(config))))
    (folder / CSV_NAME).write_text('\n'.join([','.join(COLUMNS), *lines]))
    return folder / CSV_NAME


def test_a_filled_in_table_is_read(config, space, tmp_path):
    table = write_table(config, tmp_path, ['n1.onnx,12.5', 'n0.onnx, 40', ''])
    assert read_measurements(table, config) == {space.smallest: 12.5, space.largest: 40}
    with pytest.raises(ConfigError, match='at least'):
        fit(space, [space.smallest, space.largest], [12.5, 40])
    for other in (config_of('s0'), config_of('s1', **{'model.decode_head.num_classes': 7})):
        with pytest.raises(ConfigError, match='other networks'):
            read_measurements(table, other)
    table.with_name(NETWORKS_NAME).unlink()
    with pytest.raises(ConfigError, match=f'{NETWORKS_NAME}.*--write-files'):
        read_measurements(table, config)


@pytest.mark.parametrize(
    'line',
    [
        'n2.onnx,',
        'n2.onnx',
        'n2.onnx,x',
        'n2.onnx,-1',
        'n2.onnx,nan',
        'n2.onnx,12,5',
        'n9.onnx,3',
        'n1.onnx,3',
    ],
)
def test_a_line_of_a_table_that_is_wrong_is_named(config, tmp_path, line):
    table = write_table(config, tmp_path, ['n1.onnx,12.5', line, 'n3.onnx,7'])
    with pytest.raises(ConfigError, match='line 3'):
        read_measurements(table, config)


def test_a_table_is_written_last_and_kept(tiny_config, tmp_path, monkeypatch):
    written = []

    def export(candidate, model, setting, path):
        written.append(path.name)
        path.write_text('')
        if len(written) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(measurements, 'export_model', export)
    monkeypatch.setattr(measurements, 'check_packages', lambda suffix: None)
    config, folder = str(tiny_config('fpn')), tmp_path / 'phone'
    options = {'search': dict(necks=(8, 16))}
    with pytest.raises(KeyboardInterrupt):
        write_files(config, options, folder, size=(64, 96), number=10)
    table = write_files(config, options, folder, size=(64, 96), number=10)
    assert len(written) == 14 and len(set(written)) == 10
    lines = table.read_text().splitlines()
    table.write_text('\n'.join([lines[0], *(line + '7' for line in lines[1:])]))
    read = load_config(config, options)
    space, measured = Space.from_config(read), read_measurements(table, read)
    assert list(measured.values()) == [7] * 10
    assert fit(space, list(measured), list(measured.values())).predict(space.smallest) > 6
    with pytest.raises(ConfigError, match='new folder'):
        write_files(config, options, folder, size=(64, 96), number=10)
    assert len(written) == 14


NO_DATA = {f'{split}_dataloader': None for split in ('train', 'val', 'test')}


@pytest.mark.parametrize(('options', 'classes'), [({}, 6), (NO_DATA, 80)])
def test_heads_of_files_have_the_classes_of_the_data(
    tiny_config, tmp_path, monkeypatch, options, classes
):
    counts = []

    def export(candidate, model, setting, path):
        counts.append(model.bbox_head.num_classes)
        path.write_text('')

    monkeypatch.setattr(measurements, 'export_model', export)
    monkeypatch.setattr(measurements, 'check_packages', lambda suffix: None)
    config, options = str(tiny_config('retinanet')), {'search': {}, **options}
    table = write_files(config, options, tmp_path / 'phone', size=(64, 64), number=10)
    assert counts == [classes] * 10
    # No milliseconds were filled in, but it is the table of this config.
    with pytest.raises(ConfigError, match='line 2'):
        read_measurements(table, load_config(config, options))


def test_measuring_compares_all_groups_with_one_network(tiny_config, tmp_path, monkeypatch):
    """A machine that is three times as slow in the second group changes nothing."""
    config, options = str(tiny_config('fpn')), {'search': dict(necks=(8, 16))}
    space = Space.from_config(load_config(config, options))
    choices = choose_networks(space, 0, 12)
    true_ms = {choice: 1.0 + number for number, choice in enumerate(choices)}
    monkeypatch.setattr(measurements, 'make_network', lambda *arguments: arguments)
    timed = []

    def in_turns(runners, *_):
        slowness = 3 if len(timed) == 1 else 1
        timed.append(list(runners))
        # The one that all are compared with need not be one of them.
        return {c: Timed([[true_ms.get(c, 5) * slowness / 1e3] * 3]) for c in runners}

    monkeypatch.setattr(measurements, 'measure_in_turns', in_turns)
    monkeypatch.setattr(measurements, 'use_threads', lambda threads: None)
    setting = Setting(size=(64, 96))
    log = tmp_path / 'out' / 'log.jsonl'
    found = measure(config, options, choices[:7], setting, log=log)
    found = measure(config, options, choices, setting, log=log)
    np.testing.assert_allclose(found, list(true_ms.values()))
    # 5, 2, and after the first call 5 others, beside one that is the same in all.
    assert [len(group) for group in timed] in ([5, 3, 6], [6, 3, 6], [6, 2, 6])
    assert len({group[0] for group in timed}) == 1
    measure(config, options, choices, setting, log=log)
    assert len(timed) == 3 and len(log.read_text().splitlines()) == 12
    # Another size is measured, not taken from the log.
    measure(config, options, choices[:1], dataclasses.replace(setting, size=(32, 32)), log=log)
    assert len(timed) == 4
    # So is another model, though its space is the same.
    with Path(config).open('a') as file:
        file.write('model.update(test_cfg=dict(mode="slide", crop_size=(64, 64), stride=(32, 32)))')
    measure(config, options, choices[:1], setting, log=log)
    assert len(timed) == 5
