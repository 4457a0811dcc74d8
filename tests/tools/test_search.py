"""tools/search.py: what its commands write, on tiny networks."""

import json

import pytest
import search

from backbones.errors import ConfigError

SEARCH = 'search = dict(necks=(8, 16))\n'
QUICK = ('--size', '64x96', '--rounds', 1, '--seconds', 0, '--networks', 10, '--held-out', 2)


def test_latency_is_measured_and_predicted(run_tool, tiny_config, tmp_path):
    command = ('search.py', 'latency', tiny_config('fpn', SEARCH), '--work-dir', 'out', *QUICK)
    done = run_tool(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    file, log = (tmp_path / 'out' / f'latency_torch.{suffix}' for suffix in ('json', 'jsonl'))
    model = json.loads(file.read_text())
    assert len(model['networks']) == 12 and all(each['ms'] > 0 for each in model['networks'])
    assert model['setting']['size'] == [64, 96]
    shown = ('64x96', 'smallest', 'largest', 'tau', str(file.name))
    assert all(name in done.stdout for name in shown)
    assert not log.exists()


@pytest.mark.parametrize(('backend', 'device'), [('torch', 'cuda:0'), ('openvino', 'cpu')])
def test_openvino_is_measured_on_the_cpu_of_a_machine_with_a_gpu(
    call_tool, tiny_config, monkeypatch, backend, device
):
    def measure(config, options, setting, *counts):
        raise ConfigError(f'on {setting.device}')

    monkeypatch.setattr(search, 'choose_device', lambda name: name or 'cuda:0')
    monkeypatch.setattr(search, 'measure_latency', measure)
    command = ('search.py', 'latency', tiny_config('fpn', SEARCH), '--backend', backend)
    assert call_tool(*command) == (1, f'\nerror: on {device}\n')
