"""Checkpoints: fetching, writing, and reading them without running code that is inside.

A ``.pth`` file is a pickle, and a pickle can call any function while it is read. Here only tensors,
plain data and mmengine's logs and schedules are read; all else needs :func:`trust_checkpoints`.
"""

import ast
import hashlib
import http.client
import io
import json
import pickle
import re
import sys
import tarfile
import urllib.parse
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler
from mmengine.runner import checkpoint as mmengine_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor

from .efficientformer_v2 import checkpoint_keys
from .errors import CheckpointError, ConfigError, first_of, import_optional, in_one_line

MapLocation = str | torch.device | Callable | None

TIMM_NAMES = tuple(f'efficientformerv2_{arch}.snap_dist_in1k' for arch in ('s0', 's1', 's2', 'l'))
HOW_TO_GET_THEM = (
    f'The names are {", ".join(f"timm://{name}" for name in TIMM_NAMES)}. A file is fetched once '
    'and kept in the cache of huggingface_hub (HF_HOME sets its folder). Without a '
    'connection, copy a model.safetensors or .pth to this machine and give its path instead; '
    'for training: --cfg-options model.backbone.init_cfg.checkpoint=PATH'
)

# Schemes that mmengine resolves to a URL, and schemes whose clients read without protection.
MODEL_ZOOS = ('torchvision', 'modelzoo', 'open-mmlab', 'openmmlab', 'mmcls')
REFUSED = ('pavi://', r'(\S+\:)?s3://', r'(\S+\:)?petrel://')

# A hash as publish_model.py, mmdet and torchvision add it to names; 20240131 is a date.
HASH_IN_NAME = re.compile(r'-(?!20\d{6}\.)([0-9a-f]{8,64})\.\w+$')

# Methods that mmengine saves by their names: statistics of logs, and the curves of OneCycleLR.
NAMED_FUNCTIONS = {
    HistoryBuffer: ('min', 'max', 'current', 'mean'),
    OneCycleParamScheduler: ('_annealing_cos', '_annealing_linear'),
}

_trusted = False


def trust_checkpoints() -> None:
    """From now on, read ``.pth`` files without protection: they may run any code."""
    global _trusted
    _trusted = True


def are_checkpoints_trusted() -> bool:
    """Return whether :func:`trust_checkpoints` has been called."""
    return _trusted


def use_safe_loading(trust: bool = False) -> None:
    """From now on, let mmengine read all checkpoints of this process by :func:`load_checkpoint`.

    Every tool that loads checkpoints calls this; importing the package does not, because other
    models may need files that are refused here. ``trust`` calls :func:`trust_checkpoints`.
    """
    if trust:
        trust_checkpoints()
    schemes = ['', 'http://', 'https://', *REFUSED]
    CheckpointLoader.register_scheme(schemes, load_from_source, force=True)
    # The loaders of MODEL_ZOOS call these two with the URL or the file.
    mmengine_checkpoint.load_from_http = load_from_source
    mmengine_checkpoint._safe_torch_load = load_from_source


def load_checkpoint(source: str | Path, map_location: MapLocation = 'cpu') -> dict:
    """Read a checkpoint, and convert it to the form that mmengine uses.

    Arguments and errors are those of :func:`read_checkpoint`; after :func:`use_safe_loading`,
    ``source`` may also begin with ``torchvision://``, ``open-mmlab://`` or ``mmcls://``.

    Returns:
        A dict with ``state_dict``, ``meta`` and all other entries of the file. The keys of a bare
        EfficientFormerV2 get the prefix ``backbone.``, so that the result can be loaded into a
        whole model as well as into the backbone.
    """
    scheme = str(source).partition('://')[0]
    if scheme in MODEL_ZOOS and mmengine_checkpoint.load_from_http is load_from_source:
        try:
            return {'meta': {}, **CheckpointLoader.load_checkpoint(source, map_location)}
        except (KeyError, ImportError) as error:
            raise CheckpointError(f'mmengine cannot resolve {source}: {error!r}') from error
    checkpoint = read_checkpoint(source, map_location)
    tensors = checkpoint_keys.tensors_of(checkpoint)
    if checkpoint_keys.layout_of(tensors):
        tensors = {f'backbone.{key}': tensor for key, tensor in tensors.items()}
    others = {
        key: value
        for key, value in checkpoint.items()
        if key not in checkpoint_keys.WRAPPERS and not isinstance(value, Tensor)
    }
    meta = dict(others.pop('meta', None) or {})
    if not _trusted:
        # mmengine runs this text as Python when it resumes; its own files use the key 'cfg'.
        meta.pop('config', None)
    state_dict = OrderedDict(tensors)
    # Versions of the modules, which some modules of mmcv and mmdet check when they are loaded.
    state_dict._metadata = getattr(checkpoint.get('state_dict'), '_metadata', OrderedDict())
    return {**others, 'meta': meta, 'state_dict': state_dict}


# mmengine logs the end of the function's name, and passes `filename` by keyword.
def load_from_source(filename: str, map_location: MapLocation = 'cpu') -> dict:
    """Call :func:`load_checkpoint`, with mmengine's signature."""
    return load_checkpoint(filename, map_location)


def read_checkpoint(source: str | Path, map_location: MapLocation = 'cpu') -> dict:
    """Read a ``.pth`` or ``.safetensors`` file without letting it run code.

    ``source`` is a path, ``https://...``, or ``timm://NAME`` with one of :data:`TIMM_NAMES`, and
    optionally ``@REVISION`` for a certain commit on the Hugging Face hub. Downloads are cached; a
    hash in the file's name is verified. A ``.safetensors`` file gives ``state_dict`` and ``meta``,
    as :func:`encode_checkpoint` wrote them. Raises CheckpointError, which names the file, if it
    cannot be fetched or read, or if reading it would run code; ConfigError if huggingface_hub or
    safetensors is not installed.
    """
    scheme, separator, name = str(source).partition('://')
    if not separator:
        return _read_file(Path(source).expanduser(), map_location)
    if scheme == 'timm':
        return _read_file(_fetch_from_hub(name), map_location)
    if scheme not in ('http', 'https'):
        raise CheckpointError(
            f'{source}: checkpoints cannot be read from {scheme}://. Give a local path, '
            'timm://NAME or https://...'
        )
    return _read_file(_download(str(source)), map_location)


def config_of(checkpoint: dict) -> Config | None:
    """Return the config that :func:`load_checkpoint` found in a file, or None if there is none.

    mmengine saves it as Python text and runs this text to read it. Here it is parsed as data;
    CheckpointError is raised if it has more than names and plain values.
    """
    text = checkpoint['meta'].get('cfg')
    if not text:
        return None
    try:
        values = {}
        for statement in ast.parse(text).body:
            match statement:
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    values[name] = ast.literal_eval(_DictCalls().visit(value))
                case _:
                    raise ValueError(f'line {statement.lineno} is no assignment')
        return Config(values)
    except (SyntaxError, ValueError, TypeError) as error:
        raise CheckpointError(
            f'the config inside the checkpoint is not plain data: {error}'
        ) from error


class _DictCalls(ast.NodeTransformer):
    """Turns mmengine's ``dict(a=value)`` and ``dict({'a.b': value})`` into literals."""

    def visit_Call(self, node: ast.Call) -> ast.expr:
        match self.generic_visit(node):
            case ast.Call(func=ast.Name(id='dict'), args=[ast.Dict() as inner], keywords=[]):
                return inner
            case ast.Call(func=ast.Name(id='dict'), args=[], keywords=keywords):
                names = [ast.Constant(keyword.arg) for keyword in keywords if keyword.arg]
                if len(names) == len(keywords):
                    return ast.Dict(names, [keyword.value for keyword in keywords])
        return node


def encode_checkpoint(tensors: Mapping[str, Tensor], meta: dict, suffix: str) -> bytes:
    """Return the bytes of a '.pth' or '.safetensors' file; the same tensors give the same bytes.

    Raises CheckpointError for NaN, unless :func:`trust_checkpoints` was called.
    """
    if suffix not in ('.pth', '.safetensors'):
        raise ConfigError(f'checkpoints are written as .pth or .safetensors, not as {suffix!r}')
    if not _trusted:
        checkpoint_keys.check_nan(tensors)
    if suffix == '.pth':
        # In memory, because torch.save writes the name of a file into the file.
        buffer = io.BytesIO()
        torch.save({'meta': meta, 'state_dict': dict(tensors)}, buffer)
        return buffer.getvalue()
    safetensors = import_optional('safetensors.torch', 'writing .safetensors', 'runtime')
    # safetensors refuses tensors that share memory, as in heads that share convolutions.
    apart = {k: each.clone(memory_format=torch.contiguous_format) for k, each in tensors.items()}
    # One key, since the order of several would change from run to run.
    return safetensors.save(apart, {'meta': json.dumps(meta)})


def _fetch_from_hub(name: str) -> Path:
    """Fetch ``NAME`` or ``NAME@REVISION``; return the file in huggingface_hub's cache."""
    repository, _, revision = name.partition('@')
    if repository not in TIMM_NAMES:
        raise CheckpointError(f'timm://{name}: there are no such weights. {HOW_TO_GET_THEM}')
    hub = import_optional('huggingface_hub', f'timm://{name}', 'runtime')
    try:
        path = hub.hf_hub_download(
            f'timm/{repository}', 'model.safetensors', revision=revision or None
        )
    # The errors depend on the client that this version of huggingface_hub uses.
    except Exception as error:
        raise CheckpointError(
            f'timm://{name} could not be fetched from the Hugging Face hub: {in_one_line(error)} '
            f'{HOW_TO_GET_THEM}'
        ) from error
    return Path(path)


def _download(url: str) -> Path:
    """Download a URL; return the file in torch.hub's cache."""
    name = Path(urllib.parse.urlparse(url).path).name or 'checkpoint'
    folder = Path(torch.hub.get_dir()) / 'checkpoints'
    found = HASH_IN_NAME.search(name)
    if not found:
        # Many trainings write an epoch_12.pth, so the name alone does not tell files apart.
        folder /= hashlib.sha256(url.encode()).hexdigest()[:8]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    # One process on a machine downloads; the others wait and find the file.
    with FileLock(f'{path}.lock'):
        if path.is_file():
            return path
        try:
            torch.hub.download_url_to_file(
                url, str(path), found and found[1], progress=sys.stderr.isatty()
            )
        # It raises RuntimeError for a wrong hash.
        except (OSError, ValueError, http.client.HTTPException, RuntimeError) as error:
            raise CheckpointError(f'{url} could not be fetched: {error}') from error
        try:
            _read_file(path, 'cpu')
        except CheckpointError:
            # For example, it was truncated, or it is a login page.
            path.unlink()
            raise
    return path


def _read_file(path: Path, map_location: MapLocation) -> dict:
    """Return the content of a local file, which has to include tensors."""
    if not path.is_file():
        what = 'is a folder, not a checkpoint' if path.is_dir() else 'does not exist'
        raise CheckpointError(f'checkpoint {path} {what}')
    if path.stat().st_size == 0:
        raise CheckpointError(f'checkpoint {path} is empty')
    read = _read_safetensors if path.suffix == '.safetensors' else _read_pickle
    checkpoint = read(path, map_location)
    if not checkpoint_keys.tensors_of(checkpoint):
        raise CheckpointError(f'{path} is not a checkpoint: it holds no tensors with names')
    return checkpoint


def _read_safetensors(path: Path, map_location: MapLocation) -> dict:
    safetensors = import_optional('safetensors', 'reading .safetensors', 'runtime')
    device = map_location if isinstance(map_location, (str, torch.device)) else 'cpu'
    try:
        with safetensors.safe_open(path, framework='pt', device=str(device)) as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        meta = json.loads(metadata.get('meta', '{}'))
    except (safetensors.SafetensorError, OSError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f'checkpoint {path} cannot be read as safetensors. It may be cut short or corrupt: '
            f'fetch or copy it again ({error})'
        ) from error
    return {'meta': meta if isinstance(meta, dict) else {}, 'state_dict': tensors}


def _read_pickle(path: Path, map_location: MapLocation) -> object:
    try:
        if _trusted:
            return torch.load(path, map_location=map_location, weights_only=False)
        _refuse_archives(path)
        with _mmengine_globals_allowed():
            return torch.load(path, map_location=map_location, weights_only=True)
    except CheckpointError:
        raise
    # torch raises nearly any error on a corrupt file.
    except Exception as error:
        raise CheckpointError(_describe_failure(path, error)) from error


def _refuse_archives(path: Path) -> None:
    """Refuse archives whose code torch < 2.6 runs despite ``weights_only`` (CVE-2025-32434)."""
    # A file may be both kinds of archive at once.
    if tarfile.is_tarfile(path):
        raise CheckpointError(
            f'{path} is a tar archive, which cannot be read safely; unpack the checkpoint inside it'
        )
    if _first_bytes(path).startswith(b'PK\x03\x04'):
        with torch.serialization._open_zipfile_reader(str(path)) as archive:
            if torch.serialization._is_torchscript_zip(archive):
                raise CheckpointError(
                    f'{path} is a TorchScript program, not a checkpoint: save a state_dict instead'
                )


def _mmengine_globals_allowed() -> AbstractContextManager:
    """Let torch read the logs and numbers that mmengine saves beside the tensors.

    torch before 2.5 does not support this; it reads published files, but no training checkpoints.
    """
    if not hasattr(torch.serialization, 'safe_globals'):
        return nullcontext()
    moved = [
        # Files of NumPy 1 and of NumPy 2 name these functions differently.
        _known_as(f'numpy.{core}.multiarray', name, value.__reduce__()[0])
        for core in ('core', '_core')
        for name, value in (('_reconstruct', np.zeros(1)), ('scalar', np.float64()))
    ]
    dtypes = {type(np.dtype(code)) for code in '?bBhHiIlLqQefdUS'}
    safe_getattr = _known_as('builtins', 'getattr', _named_function)
    kinds = (*NAMED_FUNCTIONS, np.ndarray, np.dtype)
    return torch.serialization.safe_globals([*kinds, *dtypes, *moved, safe_getattr])


def _known_as(module: str, name: str, function: Callable) -> Callable:
    """Return a function that a pickle finds under another name."""

    def stand_in(*args: Any) -> Any:
        return function(*args)

    # torch 2.6 compares __name__, later versions compare __qualname__.
    stand_in.__module__, stand_in.__name__, stand_in.__qualname__ = module, name, name
    return stand_in


def _named_function(owner: type, name: str) -> Callable:
    """Replace ``getattr``, by which pickles name methods; the real one allows any attribute."""
    if name in NAMED_FUNCTIONS.get(owner, ()):
        return getattr(owner, name)
    raise pickle.UnpicklingError(f'getattr of {owner!r} and {name!r}')


def _describe_failure(path: Path, error: Exception) -> str:
    """Return why a file was not read: it is no pickle, is corrupt, or could run code."""
    begin = _first_bytes(path)
    # Zip archives; before torch 1.6, a pickled number.
    if not begin.startswith((b'PK', b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P')):
        return f'{path} is not a checkpoint that torch.save has written: it begins with {begin!r}'
    # torch adds its own advice to the message of its unpickler.
    reason = in_one_line(error.__context__ or error).split('. ')[0]
    if not isinstance(error, pickle.UnpicklingError):
        return (
            f'checkpoint {path} ({path.stat().st_size} bytes) cannot be read. It may be cut short '
            f'or corrupt: fetch or copy it again ({reason})'
        )
    with suppress(Exception), _mmengine_globals_allowed():
        # There are none, for example, if getattr is used for something else than logs.
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        reason = first_of(sorted(names)) if names else reason
    return (
        f'checkpoint {path} is corrupt, or more than tensors and plain data: {reason}. Reading it '
        'could run code that is inside. If you made it yourself, or trust its author as you would '
        'trust a program, add --trust-checkpoint (in Python: backbones.trust_checkpoints())'
    )


def _first_bytes(path: Path) -> bytes:
    with path.open('rb') as file:
        return file.read(40)
