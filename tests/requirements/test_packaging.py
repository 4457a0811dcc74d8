"""What `pip install .` brings: the package, its configs, and extras."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from doctor import LINES
from mmengine.registry import MODELS
from packaging.requirements import Requirement

from backbones.engine.config import fit_to_device, load_config

ROOT = Path(__file__).resolve().parents[2]
SEGMENTOR = "_base_ = 'backbones::seg_configs/fpn_effv2_s1.py'"
DETECTOR = "_base_ = 'backbones::det_configs/retinanet_effv2_s0.py'"
# Before anything is imported, as in mmdet's and mmseg's own tools.
PLAIN = """
_base_ = __import__('backbones').__path__[0] + '/.mim/configs/det_configs/mask_rcnn_effv2_l.py'
"""
LOAD = """
from mmengine.config import Config
print(Config.fromfile('plain.py').model.backbone.arch)
import backbones.engine.config as config
print(config.load_config('segmentor.py').model.backbone.arch, config.__file__)
"""


def test_an_installed_package_brings_the_configs(tmp_path):
    source, site, other = (tmp_path / name for name in ('source', 'site', 'other'))
    for name in ('backbones', 'det_configs', 'seg_configs'):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    for name in ('pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--no-build-isolation']
    subprocess.run([*pip, '--no-index', '--target', site, source], check=True, timeout=300)
    assert (site / 'backbones' / 'py.typed').is_file()

    other.mkdir()
    (other / 'segmentor.py').write_text(SEGMENTOR)
    (other / 'plain.py').write_text(PLAIN)
    process = subprocess.run(
        [sys.executable, '-c', LOAD],
        cwd=other,
        env={**os.environ, 'PYTHONPATH': str(site)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    expected = ['l', 's1', str(site / 'backbones' / 'engine' / 'config.py')]
    assert process.stdout.split()[-3:] == expected


@pytest.mark.parametrize(
    ('text', 'library'), [(SEGMENTOR, 'mmseg'), (DETECTOR, 'mmdet')], ids=['mmseg', 'mmdet']
)
def test_a_config_of_another_folder_builds(text, library, tmp_path):
    (tmp_path / 'mine.py').write_text(text)
    config = load_config(str(tmp_path / 'mine.py'))
    fit_to_device(config)
    assert type(MODELS.build(config.model)).__module__.startswith(library)


def test_extras_have_the_bounds_of_the_requirements():
    tomllib = pytest.importorskip('tomllib', reason='Python 3.10 has no tomllib')
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    assert project['dependencies'] == []
    required = {}
    for name in ('runtime', 'export', 'int8', 'search', 'scale', 'app', 'tracking'):
        lines = (ROOT / 'requirements' / f'{name}.txt').read_text().splitlines()
        listed = [line.partition('#')[0].strip() for line in lines]
        required[name] = {one for one in map(Requirement, filter(None, listed))}
    extras = {
        extra: set(map(Requirement, requirements))
        for extra, requirements in project['optional-dependencies'].items()
    }
    for name in ('export', 'int8', 'search', 'scale', 'app', 'tracking'):
        assert extras[name] == required[name]
    theirs = {'torch', *(maintained for maintained, _, _ in LINES.values())}
    parts = Requirement(f'{project["name"]}[hub,video]')
    assert parts in extras['tools']
    tools = extras['tools'] - {parts} | extras['hub'] | extras['video']
    assert tools == {each for each in required['runtime'] if each.name not in theirs}
    all_others = 'tools,export,int8,search,scale,app,tracking'
    assert extras['all'] == {Requirement(f'{project["name"]}[{all_others}]')}
