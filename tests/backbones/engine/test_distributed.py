"""The first process prepares a config for all, however long it takes, and fails for all."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from tool_process import run_in_two

PROGRAM = """
import os, sys, time
from mmengine.config import Config
from backbones.engine.distributed import prepare_on_first
from backbones.errors import DataError, exit_on_user_error

def prepare(config):
    print('reading', flush=True)
    time.sleep(0.2)
    if sys.argv[1] == 'fail':
        raise DataError('no data')
    if sys.argv[1] == 'die':
        os._exit(3)
    config.classes = ['disc']

with exit_on_user_error():
    config = prepare_on_first(Config(dict(launcher='pytorch')), prepare)
    print(config.classes)
"""


@pytest.fixture
def run_two(tmp_path: Path) -> Callable[[str], tuple]:
    """Runs the program in two processes, which nothing but themselves ends."""
    program = tmp_path / 'program.py'
    program.write_text(PROGRAM)
    return partial(run_in_two, tmp_path, program)


def test_one_process_prepares_for_both(run_two):
    first, second = run_two('succeed')
    assert (first.returncode, first.stdout) == (0, "reading\n['disc']\n"), first
    assert (second.returncode, second.stdout) == (0, "['disc']\n"), second


@pytest.mark.parametrize(('outcome', 'code'), [('fail', 1), ('die', 3)])
def test_when_the_first_fails_both_end_with_its_message(outcome, code, run_two):
    first, second = run_two(outcome)
    assert (first.returncode, second.returncode) == (code, 1)
    assert 'no data' in first.stderr or outcome == 'die'
    assert 'Traceback' not in first.stderr + second.stderr
    assert 'error' not in second.stderr
