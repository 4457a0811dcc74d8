"""tools/search.py: what its commands write, on tiny networks."""

import json
from dataclasses import asdict

import pytest
import search

from backbones.engine.config import load_config
from backbones.errors import ConfigError
from backbones.search.latency import find_latency, identify
from backbones.search.measurements import COLUMNS, CSV_NAME, NETWORKS_NAME, choose_networks
from backbones.search.space import Space

SEARCH = 'search = dict(necks=(8, 16))\n'
QUICK = ('--size', '64x96', '--rounds', 1, '--seconds', 0, '--networks', 12)


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
    code, output = call_tool(*command)
    assert code == 1 and output.endswith(f'error: on {device}\n')


def test_find_says_which_backends_there_are(call_tool):
    code, said = call_tool('search.py', 'find', 'a.py', 'a.pth', '--backend', 'onnx')
    assert code == 2 and 'onnxruntime' in said and 'csv' in said


def test_what_another_device_has_measured_is_read(tiny_config, call_tool, tmp_path):
    """As `--write-files` leaves the table, with the milliseconds filled in."""
    path = tiny_config('fpn', SEARCH)
    config = load_config(str(path))
    space = Space.from_config(config)
    choices = choose_networks(space, 0, 12)
    files = {f'n{number}.onnx': asdict(choice) for number, choice in enumerate(choices)}
    names = json.dumps(dict(files=files, **identify(config)))
    (tmp_path / NETWORKS_NAME).write_text(names)
    times = [sum(space.widths(choice).values()) for choice in choices]
    lines = [f'{name},{ms}' for name, ms in zip(files, times, strict=True)]
    (tmp_path / CSV_NAME).write_text('\n'.join([','.join(COLUMNS), *lines]))
    command = ('latency', path, '--work-dir', tmp_path / 'out', '--from', tmp_path / CSV_NAME)
    code, said = call_tool('search.py', *command)
    assert code == 0 and 'latency_csv.json' in said and 'tau' in said, said
    config.work_dir = str(tmp_path / 'out')
    model = find_latency(config, 'csv')
    assert model.setting is None
    assert model.predict(choices[0]) == pytest.approx(times[0], rel=0.2)
