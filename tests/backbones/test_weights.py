"""Where weights come from, and what a file may hold without being refused."""

import functools
import json
import os
import pickle
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModule
from mmengine.runner import load_checkpoint as mmengine_load_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader

from backbones import CheckpointError, EfficientFormerV2, trust_checkpoints, weights
from backbones import weights as checkpoint_file

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / 'tests' / 'data' / 'golden'
sys.path.insert(0, str(GOLDEN))
from make_checkpoint import make_state_dict  # noqa: E402

NAME = 'efficientformerv2_s0.snap_dist_in1k'
TENSORS = {'a': torch.arange(6.0).view(2, 3), 'b': torch.tensor(3)}


class RunsCode:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


@pytest.fixture(autouse=True)
def no_trust(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_file, '_trusted', False)


@pytest.fixture(scope='module')
def timm_tensors() -> dict[str, torch.Tensor]:
    manifest = json.loads((GOLDEN / 'timm_s0_imagenet.json').read_text())
    return {key: torch.from_numpy(value) for key, value in make_state_dict(manifest).items()}


@pytest.fixture(scope='module')
def timm_backbone(timm_tensors: dict) -> EfficientFormerV2:
    backbone = EfficientFormerV2('s0')
    backbone.load_state_dict(timm_tensors)
    return backbone


def backbone_from(checkpoint: str | Path) -> EfficientFormerV2:
    init_cfg = dict(type='Pretrained', checkpoint=str(checkpoint))
    backbone = EfficientFormerV2('s0', init_cfg=init_cfg)
    backbone.init_weights()
    return backbone


def assert_same(a: torch.nn.Module, b: torch.nn.Module) -> None:
    torch.testing.assert_close(dict(a.state_dict()), dict(b.state_dict()), rtol=0, atol=0)


# What a file may hold.

SAVE = {
    'zip': torch.save,
    'zip, protocol 4': functools.partial(torch.save, pickle_protocol=4),
    'before torch 1.6': functools.partial(torch.save, _use_new_zipfile_serialization=False),
    'plain pickle': lambda content, path: path.write_bytes(pickle.dumps(content)),
    'plain pickle, protocol 0': lambda content, path: path.write_bytes(pickle.dumps(content, 0)),
}


@pytest.mark.parametrize('reader', ['_load_protected', '_load_restricted'])
@pytest.mark.parametrize('save', SAVE.values(), ids=SAVE)
@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_code_is_refused_by_name(save, reader, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_file, '_load_protected', getattr(checkpoint_file, reader))
    path, marker = tmp_path / 'evil.pth', tmp_path / 'marker'
    save({'state_dict': TENSORS, 'meta': {'x': RunsCode(marker)}}, path)
    with pytest.raises(CheckpointError, match=r'evil\.pth.*posix\.mkdir.*--trust-checkpoint'):
        checkpoint_file.read_checkpoint(path)
    assert not marker.exists()


def test_a_trusted_file_runs_its_code(tmp_path):
    path, marker = tmp_path / 'mine.pth', tmp_path / 'marker'
    torch.save({'state_dict': TENSORS, 'meta': {'x': RunsCode(marker)}}, path)
    trust_checkpoints()
    checkpoint_file.read_checkpoint(path)
    assert marker.exists()


def test_whole_modules_are_refused(tmp_path):
    torch.save(torch.nn.Linear(1, 1), tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match=r'torch\.nn\.modules\.linear\.Linear'):
        checkpoint_file.read_checkpoint(tmp_path / 'a.pth')


class Getattr:
    """Unpickled by ``getattr(owner, name)``."""

    def __init__(self, owner: object, name: str) -> None:
        self.arguments = (owner, name)

    def __reduce__(self) -> tuple:
        return getattr, self.arguments


@pytest.mark.parametrize('reader', ['_load_protected', '_load_restricted'])
@pytest.mark.parametrize('reach', [(HistoryBuffer, '__init__'), (np.ndarray, 'tofile')])
def test_getattr_reaches_nothing_but_statistics_of_logs(reach, reader, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_file, '_load_protected', getattr(checkpoint_file, reader))
    torch.save({'state_dict': TENSORS, 'x': Getattr(*reach)}, tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match=f"getattr of .*{reach[1]}'"):
        checkpoint_file.read_checkpoint(tmp_path / 'a.pth')


@pytest.mark.parametrize('reader', ['_load_protected', '_load_restricted'])
def test_what_mmengine_saves_is_read(reader, tmp_path):
    log = HistoryBuffer([1.0, 2.0, 4.0], [1, 1, 1])
    content = {
        'state_dict': TENSORS,
        'meta': {'dataset_meta': {'classes': ('a',), 'palette': [(1, 2, 3)]}, 'seed': 3},
        'message_hub': {'log_scalars': {'loss': log}, 'best': np.float64(0.5), 'n': np.int64(7)},
        'optimizer': {'state': {0: {'exp_avg': torch.ones(2)}}, 'param_groups': [{'lr': 0.1}]},
        'names': np.array(['x', 'yz']),
    }
    torch.save(content, tmp_path / 'a.pth')
    found = getattr(checkpoint_file, reader)(tmp_path / 'a.pth', 'cpu')
    read_log = found['message_hub']['log_scalars']['loss']
    assert read_log.statistics('mean') == log.statistics('mean')
    assert found['message_hub']['best'] == 0.5 and found['message_hub']['n'] == 7
    assert list(found['names']) == ['x', 'yz']
    assert found['meta'] == content['meta']


@pytest.mark.parametrize('core', ['core', '_core'])
def test_arrays_are_read_by_both_of_their_names(core, tmp_path):
    path = tmp_path / 'a.pth'
    torch.save({'state_dict': TENSORS, 'x': np.arange(3)}, path)
    rewrite_pickle(path, lambda data: data.replace(b'numpy._core.', f'numpy.{core}.'.encode()))
    assert list(checkpoint_file.read_checkpoint(path)['x']) == [0, 1, 2]


def rewrite_pickle(path: Path, change: Callable[[bytes], bytes]) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, 'w') as archive:
        for name, data in members.items():
            archive.writestr(name, change(data) if name.endswith('data.pkl') else data)


def test_text_that_mmengine_would_run_is_dropped(tmp_path):
    meta = {'config': 'import os', 'cfg': 'a = 1', 'epoch': 1}
    torch.save({'state_dict': TENSORS, 'meta': meta}, tmp_path / 'a.pth')
    loaded = CheckpointLoader.load_checkpoint(str(tmp_path / 'a.pth'), 'cpu')
    assert loaded['meta'] == {'cfg': 'a = 1', 'epoch': 1}


# Files that are no checkpoints.


def write_broken(path: Path, kind: str) -> None:
    torch.save({'state_dict': TENSORS}, path)
    whole = path.read_bytes()
    path.unlink()
    match kind:
        case 'missing':
            return
        case 'empty':
            path.write_bytes(b'')
        case 'cut short':
            path.write_bytes(whole[: len(whole) // 2])
        case 'cut short, before torch 1.6':
            torch.save({'state_dict': TENSORS}, path, _use_new_zipfile_serialization=False)
            path.write_bytes(path.read_bytes()[:-20])
        case 'a web page':
            path.write_text('<!DOCTYPE html><title>Sign in</title>')
        case 'a list':
            torch.save([1, 2, 3], path)
        case 'no tensors':
            torch.save({'state_dict': {'a': 1}}, path)
        case 'TorchScript':
            torch.jit.script(torch.nn.Linear(1, 1)).save(str(path))
        case 'NaN':
            torch.save({'state_dict': {**TENSORS, 'c': torch.tensor([1.0, float('nan')])}}, path)


@pytest.mark.parametrize(
    ('kind', 'said'),
    [
        ('missing', 'does not exist'),
        ('empty', 'is empty'),
        ('cut short', 'cut short'),
        ('cut short, before torch 1.6', 'cut short'),
        ('a web page', 'not a checkpoint.*begins with.*DOCTYPE'),
        ('a list', 'not a checkpoint.*no tensors'),
        ('no tensors', 'not a checkpoint.*no tensors'),
        ('TorchScript', 'TorchScript'),
        ('NaN', r'1 of its 3 tensors contain NaN.*\bc\b'),
    ],
)
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_broken_files_are_told_apart_and_named(kind, said, tmp_path):
    path = tmp_path / 'broken.pth'
    write_broken(path, kind)
    with pytest.raises(CheckpointError, match=said) as error:
        checkpoint_file.read_checkpoint(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize('content', [b'', b'\x10', b'x' * 100])
def test_broken_safetensors_are_named(content, tmp_path):
    path = tmp_path / 'broken.safetensors'
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r'broken\.safetensors'):
        checkpoint_file.read_checkpoint(path)


# Into mmengine and out of it.


def test_every_loader_of_mmengine_is_replaced():
    assert set(CheckpointLoader._schemes.values()) == {weights.load_from_source}


@pytest.mark.parametrize('source', ['s3://b/a.pth', 'pavi://a', 'petrel://a', 'ftp://a/b.pth'])
def test_sources_without_a_safe_way_are_refused(source):
    with pytest.raises(CheckpointError, match=r'not read from.*local path'):
        CheckpointLoader.load_checkpoint(source)


def test_model_zoos_are_looked_up():
    with pytest.raises(CheckpointError, match='no weights of that name'):
        CheckpointLoader.load_checkpoint('open-mmlab://nothing')


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_files_are_written_and_read_again(suffix, tmp_path):
    meta = {'cfg': 'a = 1', 'dataset_meta': {'classes': ['x', 'y'], 'palette': [[1, 2, 3]]}}
    content = checkpoint_file.encode_checkpoint(TENSORS, meta, suffix)
    assert {content} == {checkpoint_file.encode_checkpoint(TENSORS, meta, suffix) for _ in range(9)}
    path = tmp_path / f'a{suffix}'
    path.write_bytes(content)
    found = checkpoint_file.read_checkpoint(path)
    assert found['meta'] == meta
    torch.testing.assert_close(found['state_dict'], TENSORS)


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_a_bare_backbone_finds_its_place_in_a_whole_model(
    suffix, timm_tensors, timm_backbone, tmp_path
):
    path = tmp_path / f'timm{suffix}'
    path.write_bytes(checkpoint_file.encode_checkpoint(timm_tensors, {}, suffix))
    assert_same(backbone_from(path), timm_backbone)
    model = BaseModule()
    model.backbone, model.neck = EfficientFormerV2('s0'), torch.nn.Linear(1, 1)
    mmengine_load_checkpoint(model, str(path))
    assert_same(model.backbone, timm_backbone)


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / 'a.pth'
    path.write_bytes(b'before')
    with pytest.raises(KeyboardInterrupt), checkpoint_file.atomic_write(path) as partial:
        partial.write_bytes(b'hal')
        raise KeyboardInterrupt
    assert path.read_bytes() == b'before' and list(tmp_path.iterdir()) == [path]


# From the web and from the hub, both served on this machine.


class Server(ThreadingHTTPServer):
    """Serves ``files``, by path; each GET is noted in ``fetched``, and cut to ``limit`` bytes."""

    def __init__(self) -> None:
        super().__init__(('127.0.0.1', 0), Handler)
        self.files: dict[str, bytes] = {}
        self.fetched: list[str] = []
        self.limit: int | None = None

    @property
    def url(self) -> str:
        return f'http://127.0.0.1:{self.server_port}'


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        content = self.server.files.get(self.path)
        self.send_response(200 if content is not None else 404)
        if content is None:
            # By this the hub tells that the repository is there and the file is not.
            self.send_header('X-Error-Code', 'EntryNotFound')
        # What huggingface_hub asks of a hub.
        self.send_header('X-Repo-Commit', '0' * 40)
        self.send_header('ETag', f'"{hash(content):x}"')
        self.send_header('Content-Length', str(len(content or b'')))
        self.end_headers()

    def do_GET(self) -> None:
        self.server.fetched.append(self.path)
        self.do_HEAD()
        self.wfile.write(self.server.files.get(self.path, b'')[: self.server.limit])

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv('no_proxy', '*')
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def web_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    return tmp_path / 'torch'


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob('*') if path.is_file()]


def test_a_download_is_kept(server, web_cache):
    server.files['/a/epoch_12.pth'] = checkpoint_file.encode_checkpoint(TENSORS, {}, '.pth')
    for _ in range(2):
        loaded = CheckpointLoader.load_checkpoint(f'{server.url}/a/epoch_12.pth')
        torch.testing.assert_close(dict(loaded['state_dict']), TENSORS)
    assert server.fetched == ['/a/epoch_12.pth']


def test_files_of_one_name_are_told_apart(server, web_cache):
    for folder, value in (('a', 1.0), ('b', 2.0)):
        content = checkpoint_file.encode_checkpoint({'x': torch.tensor(value)}, {}, '.pth')
        server.files[f'/{folder}/epoch_12.pth'] = content
    for folder, value in (('a', 1.0), ('b', 2.0)):
        loaded = weights.load_checkpoint(f'{server.url}/{folder}/epoch_12.pth')
        assert loaded['state_dict']['x'] == value


def test_an_interrupted_download_leaves_nothing(server, web_cache):
    server.files['/a.pth'] = checkpoint_file.encode_checkpoint(TENSORS, {}, '.pth')
    server.limit = 500
    with pytest.raises(CheckpointError, match=r'a\.pth'):
        weights.load_checkpoint(f'{server.url}/a.pth')
    assert not files_in(web_cache)
    server.limit = None
    weights.load_checkpoint(f'{server.url}/a.pth')


def test_a_missing_page_is_an_error(server, web_cache):
    with pytest.raises(CheckpointError, match=r'a\.pth could not be fetched.*404'):
        weights.load_checkpoint(f'{server.url}/a.pth')
    assert not files_in(web_cache)


def test_downloads_run_no_code(server, web_cache, tmp_path):
    path, marker = tmp_path / 'evil.pth', tmp_path / 'marker'
    torch.save({'state_dict': TENSORS, 'x': RunsCode(marker)}, path)
    server.files['/evil.pth'] = path.read_bytes()
    with pytest.raises(CheckpointError, match=r'posix\.mkdir'):
        CheckpointLoader.load_checkpoint(f'{server.url}/evil.pth')
    assert not marker.exists()


LOAD = """
import sys, torch
from backbones import CheckpointError, EfficientFormerV2
init_cfg = dict(type='Pretrained', checkpoint=sys.argv[1])
backbone = EfficientFormerV2('s0', init_cfg=init_cfg)
try:
    backbone.init_weights()
except CheckpointError as error:
    sys.exit(f'refused: {error}')
torch.save(backbone.state_dict(), sys.argv[2])
"""


@pytest.fixture
def load_from_hub(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Loads a backbone in a process of its own, whose hub is ``endpoint``; writes loaded.pth."""

    def load(endpoint: str, name: str = NAME, **environment: str) -> subprocess.CompletedProcess:
        command = [sys.executable, '-c', LOAD, f'timm://{name}', str(tmp_path / 'loaded.pth')]
        own = {'HF_ENDPOINT': endpoint, 'HF_HOME': str(tmp_path / 'hf'), 'PYTHONPATH': str(ROOT)}
        for proxy in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY', 'all_proxy'):
            own[proxy] = ''
        return subprocess.run(
            command,
            env={**os.environ, **own, **environment},
            capture_output=True,
            text=True,
            timeout=600,
        )

    return load


@pytest.mark.parametrize('filename', ['model.safetensors', 'pytorch_model.bin'])
def test_the_hub_is_asked_once(
    filename, server, load_from_hub, timm_tensors, timm_backbone, tmp_path
):
    suffix = '.safetensors' if filename.endswith('.safetensors') else '.pth'
    path = f'/timm/{NAME}/resolve/main/{filename}'
    server.files[path] = checkpoint_file.encode_checkpoint(timm_tensors, {}, suffix)
    process = load_from_hub(server.url)
    assert process.returncode == 0, process.stderr
    loaded = torch.load(tmp_path / 'loaded.pth')
    torch.testing.assert_close(dict(loaded), dict(timm_backbone.state_dict()), rtol=0, atol=0)
    again = load_from_hub(server.url, HF_HUB_OFFLINE='1')
    assert again.returncode == 0, again.stderr
    assert [path for path in server.fetched if path.endswith(filename)] == [path]


def test_without_a_hub_the_ways_out_are_named(load_from_hub, tmp_path):
    process = load_from_hub('http://127.0.0.1:9', HF_HUB_OFFLINE='1')
    assert process.returncode == 1 and 'refused: ' in process.stderr
    for name in weights.TIMM_NAMES:
        assert f'timm://{name}' in process.stderr
    assert str(tmp_path / 'hf' / 'hub') in process.stderr
    assert 'init_cfg.checkpoint=PATH' in process.stderr


def test_an_interrupted_hub_download_is_not_taken_for_whole(server, load_from_hub, timm_tensors):
    path = f'/timm/{NAME}/resolve/main/model.safetensors'
    server.files[path] = checkpoint_file.encode_checkpoint(timm_tensors, {}, '.safetensors')
    server.limit = 5000
    process = load_from_hub(server.url)
    assert process.returncode == 1 and 'refused: ' in process.stderr
    offline = load_from_hub(server.url, HF_HUB_OFFLINE='1')
    assert offline.returncode == 1 and 'could not be fetched' in offline.stderr
    server.limit = None
    assert load_from_hub(server.url).returncode == 0


def test_unknown_names_are_not_asked_for():
    with pytest.raises(CheckpointError, match='no weights of that name') as error:
        CheckpointLoader.load_checkpoint('timm://efficientformerv2_s9')
    assert all(name in str(error.value) for name in weights.TIMM_NAMES)


DISTRIBUTED = """
import sys, torch
from backbones.weights import load_checkpoint
torch.distributed.init_process_group('gloo')
loaded = load_checkpoint(sys.argv[1])
assert loaded['state_dict']['b'] == 3
torch.distributed.destroy_process_group()
"""


def test_one_process_of_a_machine_downloads(server, web_cache, tmp_path):
    server.files['/a.pth'] = checkpoint_file.encode_checkpoint(TENSORS, {}, '.pth')
    script = tmp_path / 'load.py'
    script.write_text(DISTRIBUTED)
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    process = subprocess.run(
        [*command, str(script), f'{server.url}/a.pth'],
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr
    assert server.fetched == ['/a.pth']
