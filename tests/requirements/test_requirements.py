"""requirements/: all have a lower bound and the newest tested version, and one set is fixed."""

from collections import defaultdict
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
from install import normalized_name
from packaging.requirements import Requirement
from packaging.version import Version

FOLDER = Path(__file__).resolve().parents[2] / 'requirements'
PYTHONS = ('3.10', '3.11', '3.12', '3.13', '3.14')


def read(name: str) -> list[Requirement]:
    lines = (line.partition('#')[0].strip() for line in (FOLDER / name).read_text().splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith('-r ')]


REQUIRED = [one for path in FOLDER.glob('*.txt') if path.stem != 'constraints'
            for one in read(path.name)]  # fmt: skip


@pytest.fixture(scope='module')
def pins() -> dict[str, list[Requirement]]:
    """The lines of constraints.txt by distribution."""
    lines = defaultdict(list)
    for one in read('constraints.txt'):
        lines[normalized_name(one.name)].append(one)
    return lines


@pytest.mark.parametrize('required', REQUIRED, ids=str)
def test_bounds(required: Requirement, pins: dict[str, list[Requirement]]):
    bounds = {one.operator: Version(one.version) for one in required.specifier}
    pinned = [Version(str(one.specifier)[2:]) for one in pins[normalized_name(required.name)]]
    assert bounds['>='] <= min(pinned)
    if required.name != 'torch':  # nobody's CUDA build is to be replaced
        assert bounds['<='] == max(pinned)


def test_one_version_for_each_python(pins: dict[str, list[Requirement]]):
    for name, lines in pins.items():
        for line in lines:
            assert [one.operator for one in line.specifier] == ['=='], line
        for python in PYTHONS:
            chosen = [
                line
                for line in lines
                if not line.marker or line.marker.evaluate({'python_version': python})
            ]
            assert len(chosen) <= 1, (name, python)
            assert chosen or all(line.marker for line in lines), (name, python)


def test_all_that_is_installed_is_pinned(pins: dict[str, list[Requirement]]):
    """What a requirement requires, too; but not what another version than ours brings along."""
    waiting, seen = [*REQUIRED], set()
    while waiting:
        one = waiting.pop()
        name = normalized_name(one.name)
        if name in seen or (one.marker and not one.marker.evaluate({'extra': ''})):
            continue
        seen.add(name)
        assert name in pins, f'{name} has no line in constraints.txt'
        try:
            # Other versions, and other builds of torch, may require something else.
            is_pinned = name != 'torch' and any(
                version(name) in pin.specifier for pin in pins[name]
            )
            inner = requires(name) if is_pinned else None
        except PackageNotFoundError:
            continue
        waiting += map(Requirement, inner or [])
