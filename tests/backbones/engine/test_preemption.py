"""SIGTERM is kept for the end of a step, in the training's own process alone."""

import multiprocessing
import os
import signal
import time

import pytest

from backbones.engine.preemption import PreemptionHook


@pytest.mark.skipif(os.name == 'nt', reason='processes are not forked')
def test_a_process_forked_in_training_ends_by_sigterm():
    """As those in which VOCMetric computes: a training waited for them for ever."""
    hook = PreemptionHook()
    with hook.watch():
        forked = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))
        forked.start()
        time.sleep(0.5)
        forked.terminate()
        forked.join(20)
        ended = forked.exitcode
        forked.kill()
        assert ended == -signal.SIGTERM
        assert not hook.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert hook.requested
