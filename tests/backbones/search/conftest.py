from pathlib import Path

import pytest
from tiny import draw_shapes


@pytest.fixture(scope='session')
def many_shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many shapes as a hold-out needs."""
    return draw_shapes(tmp_path_factory.mktemp('data') / 'many', train=24, val=4, size=64)
