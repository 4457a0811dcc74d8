"""What a search asks of its user."""

import json
import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import pytest
from mmengine.config import Config
from searching import write_latency, write_search_config, write_supernet

from backbones.benchmark.work import Setting
from backbones.data.classes import set_classes
from backbones.engine.config import fit_to_device, load_config
from backbones.errors import ConfigError
from backbones.search.find import find_networks
from backbones.search.latency import latency_path
from backbones.search.methods import EXPONENTS, METHODS

# What `search.py find` gives where nothing is asked for.
DEFAULTS = dict(
    cfg_options={},
    max_latency=None,
    max_parameters=None,
    backend=None,
    method='greedy',
    evaluations=250,
    exponents=EXPONENTS,
    seed=0,
    measures=True,
)


def prepare(
    folder: Path, shapes: Path, latency: float | None, **request: object
) -> tuple[Config, Namespace]:
    """What is given to a search in a folder, where a latency of so much noise was measured."""
    path = write_search_config(folder, 'fpn', shapes)
    config = load_config(str(path))
    config.work_dir, config.launcher = str(folder), 'none'
    fit_to_device(config)
    set_classes(config, ('train',))
    if latency is not None:
        write_latency(config, folder, noise=latency)
    supernet = write_supernet(config, folder / 'supernet.pth')
    return config, Namespace(config=str(path), checkpoint=str(supernet), **DEFAULTS | request)


@pytest.mark.parametrize(
    ('request_', 'latency', 'word'),
    [
        (dict(), 0.0, 'max-latency'),
        (dict(max_latency=50), None, 'search.py latency'),
        (dict(max_latency=50, backend='openvino'), 0.0, 'openvino'),
        (dict(max_latency=50), 0.5, 'mean error'),
        (dict(max_latency=0.1), 0.0, 'smallest'),
        (dict(max_parameters=10), None, 'smallest'),
    ],
)
def test_errors(request_, latency, word, tmp_path: Path, many_shapes):
    config, args = prepare(tmp_path, many_shapes, latency, **request_)
    with pytest.raises(ConfigError, match=word):
        find_networks(config, args)


@pytest.mark.parametrize(
    ('setting', 'word'), [(dict(device='cuda:7'), 'cuda:7'), (dict(backend='openvino'), 'openvino')]
)
def test_what_cannot_be_measured_again_is_said_before_the_search(
    tmp_path, many_shapes, monkeypatch, setting, word
):
    config, args = prepare(tmp_path, many_shapes, 0.0, max_latency=50)
    file = latency_path(tmp_path, 'csv')
    model = {**json.loads(file.read_text()), 'setting': asdict(Setting(size=(64, 64), **setting))}
    file.write_text(json.dumps(model))
    # As where the package is not installed.
    monkeypatch.setitem(sys.modules, 'openvino', None)
    with pytest.raises(ConfigError, match=f'{word}.*--no-measure'):
        find_networks(config, args)
    assert not (tmp_path / 'search').exists()


def test_the_seed_of_a_method_is_not_that_of_the_hold_out(tmp_path, many_shapes, monkeypatch):
    def stop(search):
        raise InterruptedError(f'seed {search.seed}')

    monkeypatch.setitem(METHODS, 'random', stop)
    request = dict(max_parameters=1e5, method='random', seed=5)
    with pytest.raises(InterruptedError, match='seed 5'):
        find_networks(*prepare(tmp_path, many_shapes, None, **request))
