"""The first process prepares a config for all, however long it takes, and fails for all."""

import os
import socket
import subprocess
import sys

import pytest

PROGRAM = """
import os, sys, time
from mmengine.config import Config
from backbones.engine.distributed import prepare_on_first
from backbones.errors import DataError, exit_on_user_error

def prepare(config):
    print('reading', flush=True)
    time.sleep(1)
    if sys.argv[1] == 'fail':
        raise DataError('no data')
    if sys.argv[1] == 'die':
        os._exit(3)
    config.classes = ['disc']

with exit_on_user_error():
    config = prepare_on_first(Config(dict(launcher='pytorch')), prepare)
    print(config.classes)
"""


def run_two(outcome: str) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of both processes; nothing but themselves ends them."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    address = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port), 'WORLD_SIZE': '2'}
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', PROGRAM, outcome],
            env={**os.environ, **address, 'RANK': rank, 'CUDA_VISIBLE_DEVICES': ''},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in '01'
    ]
    ends = [process.communicate(timeout=300) for process in processes]
    return [(process.returncode, *end) for process, end in zip(processes, ends, strict=True)]


def test_one_process_prepares_for_both():
    first, second = run_two('succeed')
    assert first[:2] == (0, "reading\n['disc']\n"), first
    assert second[:2] == (0, "['disc']\n"), second


@pytest.mark.parametrize(('outcome', 'code'), [('fail', 1), ('die', 3)])
def test_when_the_first_fails_both_end_with_its_message(outcome, code):
    first, second = run_two(outcome)
    assert (first[0], second[0]) == (code, 1)
    assert 'no data' in first[2] or outcome == 'die'
    assert 'Traceback' not in first[2] + second[2]
    assert 'error' not in second[2]
