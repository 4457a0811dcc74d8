"""What tools measure on a GPU."""

import json

import torch
from trained_tiny import write_trained


def test_benchmark_measures_time_and_memory(shapes, tmp_path, run_tool):
    config, _ = write_trained(tmp_path, 'fpn', shapes)
    options = ['--sizes', '128x128', '--batch', 1, 4, '--train', '--seconds', 0.1]
    done = run_tool('benchmark.py', config, *options, '--backend', 'torch', '--out-dir', 'out')
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / 'out' / 'benchmark.json').read_text())
    assert found['machine']['gpu'] == torch.cuda.get_device_name()
    peaks = [each['peak_memory_mib'] for each in found['results']]
    assert all(peak > 0 for peak in peaks)
    # Of a larger batch, more.
    assert max(peaks) > 2 * min(peaks)
