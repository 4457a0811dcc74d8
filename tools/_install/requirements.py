"""The pinned set in requirements/, and how another torch changes it."""

import re
from collections.abc import Collection
from typing import Any

_NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9._-]*')


def distribution_name(requirement: str) -> str:
    """Return the name in a requirement, spelled the way the registries compare names."""
    match = _NAME.match(requirement.strip())
    return re.sub(r'[-_.]+', '-', match.group()).lower() if match else ''


def read_pins(constraints: str) -> dict[str, str]:
    """Return the version of every distribution that is pinned for all Pythons alike."""
    pins = {}
    for line in constraints.splitlines():
        requirement = line.partition('#')[0].strip()
        if '==' in requirement and ';' not in requirement:
            pins[distribution_name(requirement)] = requirement.partition('==')[2].strip()
    return pins


def lowest_versions(requirements: str) -> dict[str, str]:
    """Return the lower bound of every distribution in lines such as ``av>=17.1,<=18.1.0``."""
    versions = {}
    for line in requirements.splitlines():
        name, at_least, bounds = line.partition('#')[0].partition('>=')
        if at_least:
            versions[distribution_name(name)] = bounds.partition(',')[0].strip()
    return versions


def replace_pins(constraints: str, versions: dict[str, str]) -> str:
    """Put other versions of some distributions into the pinned set."""
    kept = [line for line in constraints.splitlines() if distribution_name(line) not in versions]
    return '\n'.join([*kept, *(f'{name}=={version}' for name, version in versions.items())]) + '\n'


def same_release(version: str | None, pin: str) -> bool:
    """Compare versions, whatever build (`+cpu`, `+cu126`) the first one is."""
    return version is not None and version.partition('+')[0] == pin


def constraints_for_torch(constraints: str, version: str, required: Collection[str]) -> str:
    """Adapt the pinned set to the torch that is installed.

    Args:
        constraints: The pinned set.
        version: The installed torch.
        required: What that torch requires. Its own limits on them go before our pins.
    """
    if same_release(version, read_pins(constraints)['torch']):
        return constraints
    free = {'torch', *map(distribution_name, required)}
    kept = [line for line in constraints.splitlines() if distribution_name(line) not in free]
    return '\n'.join([*kept, f'torch=={version}']) + '\n'


def choose_torch(
    asked: str, default: str, installed: str | None, record: dict[str, Any] | None
) -> str | None:
    """Decide which torch to install; None keeps the one that is there.

    Args:
        asked: What the user asked for with TORCH, '' for nothing.
        default: The requirement of the pinned set.
        installed: Version in the environment.
        record: `requirement` and `version` of the last torch that was installed from here.
    """
    ours = record is not None and record['version'] == installed
    if asked:
        return None if ours and record['requirement'] == asked else asked
    if installed is None:
        return default
    # Whoever chose a torch, by TORCH or by pip, keeps it; only our own choice follows the pin.
    followed_pin = ours and record['default']
    return default if followed_pin and record['requirement'] != default else None
