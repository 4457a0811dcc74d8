"""What a search asks of its user."""

from argparse import Namespace
from pathlib import Path

import pytest
from searching import write_latency, write_search_config, write_supernet

from backbones.data.classes import set_classes
from backbones.engine.config import fit_to_device, load_config
from backbones.errors import ConfigError
from backbones.search.find import find_networks
from backbones.search.methods import EXPONENTS

# What `search.py find` gives where nothing is asked for.
DEFAULTS = dict(
    cfg_options={},
    max_latency=None,
    max_parameters=None,
    backend=None,
    method='greedy',
    evaluations=250,
    exponents=EXPONENTS,
    measures=True,
)


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
    path = write_search_config(tmp_path, 'fpn', many_shapes)
    config = load_config(str(path))
    config.work_dir, config.launcher = str(tmp_path), 'none'
    fit_to_device(config)
    set_classes(config, ('train',))
    if latency is not None:
        write_latency(config, tmp_path, noise=latency)
    supernet = write_supernet(config, tmp_path / 'supernet.pth')
    args = Namespace(config=str(path), checkpoint=str(supernet), **DEFAULTS | request_)
    with pytest.raises(ConfigError, match=word):
        find_networks(config, args)
