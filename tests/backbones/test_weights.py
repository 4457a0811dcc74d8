"""Where weights come from, and what a file may hold without being refused."""

import argparse
import functools
import hashlib
import io
import pickle
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from corrupt import RunsCode
from golden import published
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModule
from mmengine.optim import OneCycleLR
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler
from mmengine.runner import checkpoint as mmengine_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader
from tool_process import Started
from web import Handler, Server, serve

from backbones import CheckpointError, EfficientFormerV2, trust_checkpoints, weights
from backbones.errors import ConfigError
from backbones.weights import encode_checkpoint, load_checkpoint, read_checkpoint

NAME = 'efficientformerv2_s0.snap_dist_in1k'
TENSORS = {'a': torch.arange(6.0).view(2, 3), 'b': torch.tensor(3)}


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """A file whose reading creates a folder ``marker`` beside it."""
    path = tmp_path / 'evil.pth'
    torch.save({'state_dict': TENSORS, 'x': RunsCode(tmp_path / 'marker')}, path)
    return path


@pytest.fixture(scope='module')
def timm_tensors() -> dict[str, torch.Tensor]:
    return published('timm_s0_imagenet')


@pytest.fixture(scope='module')
def timm_backbone(timm_tensors: dict) -> EfficientFormerV2:
    backbone = EfficientFormerV2('s0')
    backbone.load_state_dict(timm_tensors)
    return backbone


# What a process notices of an import.

IMPORT = """
import argparse, sys, torch
assert 'backbones' not in sys.modules
from mmengine.runner import checkpoint
schemes, load = dict(checkpoint.CheckpointLoader._schemes), torch.load
functions = checkpoint.load_from_http, checkpoint._safe_torch_load
import backbones
found = dict(checkpoint.CheckpointLoader._schemes)
assert found.pop('timm://') is backbones.weights.load_from_source
assert found == schemes and torch.load is load
assert functions == (checkpoint.load_from_http, checkpoint._safe_torch_load)
loaded = checkpoint.CheckpointLoader.load_checkpoint(sys.argv[1])
assert loaded['args'].lr == 1 and loaded['state_dict']['buffer'].isnan()
"""


def test_importing_changes_nothing_but_the_timm_scheme(tmp_path):
    content = {
        'state_dict': {'buffer': torch.tensor(float('nan'))},
        'args': argparse.Namespace(lr=1),
    }
    torch.save(content, tmp_path / 'a.pth')
    (tmp_path / 'import.py').write_text(IMPORT)
    done = Started(tmp_path, [tmp_path / 'import.py', 'a.pth']).wait()
    assert done.returncode == 0, done.stderr


def test_after_use_safe_loading_no_scheme_runs_code(evil, monkeypatch):
    """Whatever scheme mmengine comes to know, its loader reads safely or refuses."""
    monkeypatch.setattr(weights, '_download', lambda url: evil)
    for name in ('get_torchvision_models', 'get_external_models', 'get_mmcls_models'):
        monkeypatch.setattr(mmengine_checkpoint, name, lambda: {'x': 'https://x.org/evil.pth'})
    weights.use_safe_loading()
    for scheme in CheckpointLoader._schemes:
        source = str(evil) if scheme == '' else scheme.replace(r'(\S+\:)?', '') + 'x'
        with pytest.raises(CheckpointError):
            CheckpointLoader.load_checkpoint(source)
        with pytest.raises(CheckpointError):
            load_checkpoint(source)
        assert not (evil.parent / 'marker').exists()


def test_model_zoos_are_read_by_name(tmp_path, monkeypatch):
    file = tmp_path / 'file.pth'
    torch.save(TENSORS, file)
    models = {'net': 'http://x/y'}
    monkeypatch.setattr(mmengine_checkpoint, 'get_torchvision_models', lambda: models)
    monkeypatch.setattr(weights, '_download', {'http://x/y': file}.__getitem__)
    weights.use_safe_loading()
    torch.testing.assert_close(dict(load_checkpoint('torchvision://net')['state_dict']), TENSORS)
    with pytest.raises(CheckpointError, match='other'):
        load_checkpoint('torchvision://other')


@pytest.mark.parametrize('scheme', ['s3', 'pavi', 'ftp', 'open-mmlab', 'torchvision'])
def test_other_sources_are_refused(scheme):
    with pytest.raises(CheckpointError, match=f'from {scheme}.*local path'):
        load_checkpoint(f'{scheme}://net')


# What a file may hold.

OLD_FORMAT = functools.partial(torch.save, _use_new_zipfile_serialization=False)
SAVE = {
    'zip': torch.save,
    'zip, protocol 4': functools.partial(torch.save, pickle_protocol=4),
    'before torch 1.6': OLD_FORMAT,
    'plain pickle': lambda content, path: path.write_bytes(pickle.dumps(content)),
}


@pytest.mark.parametrize('save', SAVE.values(), ids=SAVE)
@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_code_is_not_run(save, tmp_path):
    path, marker = tmp_path / 'evil.pth', tmp_path / 'marker'
    save({'state_dict': TENSORS, 'meta': {'x': RunsCode(marker)}}, path)
    with pytest.raises(CheckpointError, match=r'evil\.pth') as error:
        read_checkpoint(path)
    assert not marker.exists()
    if save in (torch.save, OLD_FORMAT):
        assert 'posix.mkdir' in str(error.value) and '--trust-checkpoint' in str(error.value)


def test_a_trusted_file_runs_its_code(evil):
    trust_checkpoints()
    read_checkpoint(evil)
    assert (evil.parent / 'marker').exists()


def write_tar(path: Path) -> None:
    """As torch before 0.4 saved, with code in the pickle that torch before 2.6 ran."""
    content = pickle.dumps(RunsCode(path.parent / 'marker'), 2)
    with tarfile.open(path, 'w') as archive:
        for member in ('storages', 'tensors', 'pickle'):
            entry = tarfile.TarInfo(member)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def write_tar_and_zip(path: Path) -> None:
    """Python's zipfile looks at the end of a file, torch at its beginning."""
    write_tar(path)
    with zipfile.ZipFile(path, 'a') as archive:
        archive.writestr('archive/data.pkl', pickle.dumps({}))


def write_torchscript(path: Path) -> None:
    torch.jit.script(torch.nn.Linear(1, 1)).save(str(path))


@pytest.mark.parametrize('write', [write_tar, write_tar_and_zip, write_torchscript])
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_archives_never_reach_torch(write, tmp_path, monkeypatch):
    """CVE-2025-32434: torch before 2.6 runs code in them in spite of ``weights_only``."""
    write(tmp_path / 'a.pth')
    monkeypatch.setattr(torch, 'load', lambda *_, **__: pytest.fail('torch.load was called'))
    with pytest.raises(CheckpointError, match=r'a\.pth is a'):
        read_checkpoint(tmp_path / 'a.pth')


class Getattr:
    """Unpickled by ``getattr(owner, name)``."""

    def __init__(self, owner: object, name: str) -> None:
        self.arguments = (owner, name)

    def __reduce__(self) -> tuple:
        return getattr, self.arguments


@pytest.mark.parametrize(
    'reach', [(HistoryBuffer, '__init__'), (OneCycleParamScheduler, 'step'), (np.ndarray, 'tofile')]
)
def test_getattr_reaches_nothing_but_what_mmengine_saves(reach, tmp_path):
    torch.save({'state_dict': TENSORS, 'x': Getattr(*reach)}, tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match=f"getattr of .*{reach[1]}'"):
        read_checkpoint(tmp_path / 'a.pth')


def test_what_mmengine_saves_is_read(tmp_path):
    log = HistoryBuffer([1.0, 2.0, 4.0], [1, 1, 1])
    content = {
        'state_dict': TENSORS,
        'meta': {'dataset_meta': {'classes': ('a',), 'palette': [(1, 2, 3)]}, 'seed': 3},
        'message_hub': {'log_scalars': {'loss': log}, 'best': np.float64(0.5), 'n': np.int64(7)},
        'optimizer': {'state': {0: {'exp_avg': torch.ones(2)}}, 'param_groups': [{'lr': 0.1}]},
        'names': np.array(['x', 'yz']),
    }
    torch.save(content, tmp_path / 'a.pth')
    found = read_checkpoint(tmp_path / 'a.pth')
    read_log = found['message_hub']['log_scalars']['loss']
    assert read_log.statistics('mean') == log.statistics('mean')
    assert found['message_hub']['best'] == 0.5 and found['message_hub']['n'] == 7
    assert list(found['names']) == ['x', 'yz']
    assert found['meta'] == content['meta']


def test_a_schedule_of_one_cycle_is_read(tmp_path):
    """Its state names the function that computes the curve."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)
    state = OneCycleLR(optimizer, eta_max=1.0, total_steps=10).state_dict()
    torch.save({'state_dict': TENSORS, 'param_schedulers': [state]}, tmp_path / 'x.pth')
    assert read_checkpoint(tmp_path / 'x.pth')['param_schedulers'] == [state]


@pytest.mark.parametrize('core', ['core', '_core'])
def test_arrays_are_read_by_both_of_their_names(core, tmp_path):
    torch.save({'state_dict': TENSORS, 'x': np.arange(3)}, tmp_path / 'given.pth')
    with (
        zipfile.ZipFile(tmp_path / 'given.pth') as given,
        zipfile.ZipFile(tmp_path / 'a.pth', 'w') as made,
    ):
        for name in given.namelist():
            content = given.read(name)
            if name.endswith('data.pkl'):
                content = content.replace(b'numpy._core.', f'numpy.{core}.'.encode())
            made.writestr(name, content)
    assert list(read_checkpoint(tmp_path / 'a.pth')['x']) == [0, 1, 2]


def test_versions_of_modules_are_kept(tmp_path):
    """Some modules of mmcv and mmdet rename what was saved by an older version."""
    state_dict = torch.nn.Sequential(torch.nn.BatchNorm2d(1)).state_dict()
    torch.save({'state_dict': state_dict}, tmp_path / 'a.pth')
    found = load_checkpoint(tmp_path / 'a.pth')['state_dict']._metadata
    assert found == state_dict._metadata and found['0']['version'] == 2


def test_text_that_mmengine_would_run_is_dropped(tmp_path):
    meta = {'config': 'import os', 'cfg': 'a = 1', 'epoch': 1}
    torch.save({'state_dict': TENSORS, 'meta': meta}, tmp_path / 'a.pth')
    assert load_checkpoint(str(tmp_path / 'a.pth'))['meta'] == {'cfg': 'a = 1', 'epoch': 1}


# Files that are no checkpoints.


def cut(path: Path, save: Callable = torch.save, end: int = -400) -> None:
    save({'state_dict': TENSORS}, path)
    path.write_bytes(path.read_bytes()[:end])


# What is written, and what has to be said.
BROKEN = [
    (lambda path: None, 'does not exist'),
    (lambda path: path.write_bytes(b''), 'is empty'),
    (cut, 'cut short'),
    (lambda path: cut(path, OLD_FORMAT, -20), 'cut short'),
    (lambda path: path.write_text('<!DOCTYPE html>'), 'not a checkpoint.*DOCTYPE'),
    (lambda path: torch.save([1, 2, 3], path), 'no tensors'),
    (lambda path: torch.save({'state_dict': {'a': 1}}, path), 'no tensors'),
    (lambda path: torch.save(torch.nn.Linear(1, 1), path), r'torch\.nn\.modules\.linear\.Linear'),
]


@pytest.mark.parametrize(('write', 'said'), BROKEN)
def test_broken_files_are_told_apart_and_named(write, said, tmp_path):
    path = tmp_path / 'broken.pth'
    write(path)
    with pytest.raises(CheckpointError, match=said) as error:
        read_checkpoint(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize('content', [b'', b'\x10', b'x' * 100])
def test_broken_safetensors_are_named(content, tmp_path):
    path = tmp_path / 'broken.safetensors'
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r'broken\.safetensors'):
        read_checkpoint(path)


# Written and read again.


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_files_are_written_and_read_again(suffix, tmp_path):
    meta = {'cfg': 'a = 1', 'dataset_meta': {'classes': ['x', 'y'], 'palette': [[1, 2, 3]]}}
    content = encode_checkpoint(TENSORS, meta, suffix)
    assert {content} == {encode_checkpoint(TENSORS, meta, suffix) for _ in range(9)}
    path = tmp_path / f'a{suffix}'
    path.write_bytes(content)
    found = read_checkpoint(path)
    assert found['meta'] == meta
    torch.testing.assert_close(found['state_dict'], TENSORS)


def test_tensors_that_share_memory_are_written(tmp_path):
    tensors = {'a': (ones := torch.ones(2, 3)), 'b': ones, 'c': ones.t()}
    (tmp_path / 'a.safetensors').write_bytes(encode_checkpoint(tensors, {}, '.safetensors'))
    # A Path will do as a name does.
    torch.testing.assert_close(
        dict(load_checkpoint(tmp_path / 'a.safetensors')['state_dict']), tensors
    )


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_a_bare_backbone_finds_its_place_in_a_whole_model(
    suffix, timm_tensors, timm_backbone, tmp_path
):
    path = tmp_path / f'timm{suffix}'
    path.write_bytes(encode_checkpoint(timm_tensors, {}, suffix))
    weights.use_safe_loading()
    model = BaseModule()
    model.backbone, model.neck = EfficientFormerV2('s0'), torch.nn.Linear(1, 1)
    alone = EfficientFormerV2('s0', init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    mmengine_checkpoint.load_checkpoint(model, str(path))
    alone.init_weights()
    for found in (model.backbone, alone):
        expected = dict(timm_backbone.state_dict())
        torch.testing.assert_close(dict(found.state_dict()), expected, rtol=0, atol=0)


# From the web and from the hub, both served on this machine.


class Hub(Handler):
    """Also says what huggingface_hub asks of a hub."""

    def end_headers(self) -> None:
        self.send_header('X-Repo-Commit', hashlib.sha1(self.path.encode()).hexdigest())
        self.send_header('ETag', f'"{hash(self.server.pages.get(self.path)):x}"')
        super().end_headers()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """A server, and an empty cache for what is downloaded from it, ``tmp_path / 'torch'``."""
    monkeypatch.setenv('no_proxy', '*')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    with serve({}, Hub) as server:
        yield server


def cached_files(tmp_path: Path) -> list[Path]:
    files = (tmp_path / 'torch').rglob('*')
    return [path for path in files if path.is_file() and path.suffix != '.lock']


def test_downloads_are_kept_and_files_of_one_name_told_apart(server):
    for folder, value in (('a', 1.0), ('b', 2.0)):
        content = encode_checkpoint({'x': torch.tensor(value)}, {}, '.pth')
        server.pages[f'/{folder}/epoch_12.pth'] = content
    for folder, value in (('a', 1.0), ('b', 2.0), ('a', 1.0)):
        loaded = load_checkpoint(f'{server.url}/{folder}/epoch_12.pth')
        assert loaded['state_dict']['x'] == value
    assert server.asked == ['/a/epoch_12.pth', '/b/epoch_12.pth']


@pytest.mark.parametrize('digits', [8, 64])
def test_the_hash_in_a_name_is_verified(digits, server, tmp_path):
    content = encode_checkpoint(TENSORS, {}, '.pth')
    right = hashlib.sha256(content).hexdigest()[:digits]
    wrong = right[:-1] + '0123456789abcdef'[int(right[-1], 16) - 1]
    server.pages = {f'/a-{right}.pth': content, f'/a-{wrong}.pth': content}
    with pytest.raises(CheckpointError, match=wrong):
        read_checkpoint(f'{server.url}/a-{wrong}.pth')
    assert not cached_files(tmp_path)
    torch.testing.assert_close(
        read_checkpoint(f'{server.url}/a-{right}.pth')['state_dict'], TENSORS
    )


def test_a_date_in_a_name_is_no_hash(server):
    server.pages['/a-20240131.pth'] = encode_checkpoint(TENSORS, {}, '.pth')
    assert read_checkpoint(f'{server.url}/a-20240131.pth')


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_a_missing_page_or_an_interrupted_download_leaves_nothing(suffix, server, tmp_path):
    url = f'{server.url}/a{suffix}'
    with pytest.raises(CheckpointError, match=r'\ba\..*404'):
        load_checkpoint(url)
    content = encode_checkpoint(TENSORS, {}, suffix)
    server.pages[f'/a{suffix}'] = ('application/octet-stream', content[:100], len(content) - 100)
    with pytest.raises(CheckpointError, match=r'\ba\.'):
        load_checkpoint(url)
    assert not cached_files(tmp_path)
    server.pages[f'/a{suffix}'] = content
    load_checkpoint(url)


@pytest.mark.parametrize('name', ['huggingface_hub', 'safetensors'])
def test_a_missing_package_is_installed_by_itself(name, tmp_path, monkeypatch):
    """Not with requirements/runtime.txt, whose OpenMMLab would overwrite the original line."""
    path = tmp_path / 'a.safetensors'
    path.write_bytes(encode_checkpoint(TENSORS, {}, '.safetensors'))
    monkeypatch.setitem(sys.modules, name, None)
    source = f'timm://{NAME}' if name == 'huggingface_hub' else str(path)
    with pytest.raises(ConfigError, match=f'pip install {name} '):
        read_checkpoint(source)


# In a process of its own, for huggingface_hub reads its settings when it is imported.
FROM_HUB = """
import sys, torch
assert 'huggingface_hub' not in sys.modules
from backbones import CheckpointError, EfficientFormerV2
for source in sys.argv[2:]:
    backbone = EfficientFormerV2('s0', init_cfg=dict(type='Pretrained', checkpoint=source))
    try:
        backbone.init_weights()
    except CheckpointError as error:
        print('refused:', error)
    else:
        print('loaded')
        torch.save(backbone.state_dict(), sys.argv[1])
"""


def load_from_hub(folder: Path, endpoint: str, *names: str) -> list[str]:
    """What happened with each name, with a cache in the folder; writes loaded.pth."""
    (folder / 'from_hub.py').write_text(FROM_HUB)
    command = [folder / 'from_hub.py', 'loaded.pth', *(f'timm://{name}' for name in names)]
    proxies = ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY', 'all_proxy')
    own = {'HF_ENDPOINT': endpoint, 'HF_HOME': str(folder / 'hf'), **dict.fromkeys(proxies, '')}
    done = Started(folder, command, **own).wait()
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith(('loaded', 'refused'))]


def test_the_hub_is_asked_once_for_each_revision(server, timm_tensors, timm_backbone, tmp_path):
    revision = '1' * 40
    paths = [f'/timm/{NAME}/resolve/{r}/model.safetensors' for r in ('main', revision)]
    for tensors, path in zip((TENSORS, timm_tensors), paths, strict=True):
        server.pages[path] = encode_checkpoint(tensors, {}, '.safetensors')
    names = NAME, f'{NAME}@{revision}', f'{NAME}@{revision}'
    lines = load_from_hub(tmp_path, server.url, *names)
    assert [line[:7] for line in lines] == ['refused', 'loaded', 'loaded']
    expected = dict(timm_backbone.state_dict())
    torch.testing.assert_close(dict(torch.load(tmp_path / 'loaded.pth')), expected, rtol=0, atol=0)
    assert [path for path in server.asked if path.startswith('/timm')] == paths


def test_without_a_hub_the_ways_out_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    (refused,) = load_from_hub(tmp_path, 'http://127.0.0.1:9', NAME)
    assert all(f'timm://{name}' in refused for name in weights.TIMM_NAMES)
    assert 'HF_HOME' in refused and 'init_cfg.checkpoint=PATH' in refused


def test_unknown_names_are_not_asked_for():
    with pytest.raises(CheckpointError, match='no such weights'):
        CheckpointLoader.load_checkpoint('timm://efficientformerv2_s9')
