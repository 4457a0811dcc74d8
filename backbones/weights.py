"""Reading and writing a checkpoint file so that a stranger's file cannot run code.

A ``.pth`` file is a pickle, and a pickle can call any function while it is read. So only tensors,
plain data and what mmengine itself puts into a checkpoint are read; for anything else there is
:func:`trust_checkpoints`.
"""

import codecs
import hashlib
import http.client
import io
import json
import os
import pickle
import pickletools
import tarfile
import urllib.parse
import urllib.request
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from mmengine import dist
from mmengine.logging import HistoryBuffer
from mmengine.runner import checkpoint as mmengine_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor
from torch.hub import tqdm

from backbones.efficientformer_v2.checkpoint_keys import WRAPPERS, enumerate_keys, layout_of

from .errors import CheckpointError
from .files import atomic_write

# How files of torch.save begin: zip archives, and before torch 1.6 a number as a pickle.
TORCH_FORMATS = (b'PK', b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P')

# What torch.load may raise on a file that is damaged, besides UnpicklingError.
DAMAGED = (
    *(RuntimeError, EOFError, OSError, LookupError),
    *(ValueError, TypeError, AttributeError, ImportError),
)

MapLocation = str | torch.device | Callable | None

_trusted = False


def trust_checkpoints() -> None:
    """From now on, read ``.pth`` files without protection: they may run any code.

    Meant for files that one made oneself; the tools' ``--trust-checkpoint``.
    """
    global _trusted
    _trusted = True


def are_checkpoints_trusted() -> bool:
    """Whether :func:`trust_checkpoints` has been called."""
    return _trusted


def read_checkpoint(path: str | Path, map_location: MapLocation = 'cpu') -> dict:
    """Read a ``.pth`` or ``.safetensors`` file without letting it run code.

    Args:
        path: The file.
        map_location: Where tensors go, as for ``torch.load``. Default: 'cpu'.

    Returns:
        What the file holds. For ``.safetensors`` that is ``state_dict``, the tensors, and
        ``meta``, what :func:`encode_checkpoint` wrote beside them.

    Raises:
        CheckpointError: The file is missing, empty, cut short, no checkpoint, has NaN in it, or
            would need code of its own to be read. The message names the file.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        what = 'is a folder, not a checkpoint' if path.is_dir() else 'does not exist'
        raise CheckpointError(f'checkpoint {path} {what}')
    if path.stat().st_size == 0:
        raise CheckpointError(f'checkpoint {path} is empty')
    if path.suffix == '.safetensors':
        checkpoint = _read_safetensors(path, map_location)
    else:
        checkpoint = _read_pickle(path, map_location)
    tensors = tensors_of(checkpoint)
    if not tensors:
        raise CheckpointError(f'{path} is not a checkpoint: it holds no tensors by name')
    spoilt = [
        key
        for key, tensor in tensors.items()
        if tensor.is_floating_point() and tensor.isnan().any()
    ]
    if spoilt:
        raise CheckpointError(
            f'checkpoint {path} is spoilt: {len(spoilt)} of its {len(tensors)} tensors contain '
            f'NaN, as of a training that diverged: {enumerate_keys(spoilt)}'
        )
    return checkpoint


def tensors_of(checkpoint: object) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, out of the wrappers that they are published in."""
    if not isinstance(checkpoint, Mapping):
        return {}
    for wrapper in WRAPPERS:
        if isinstance(checkpoint.get(wrapper), Mapping):
            return tensors_of(checkpoint[wrapper])
    return {
        # Models are saved under 'module.' out of a wrapper for distributed training.
        key.removeprefix('module.'): value
        for key, value in checkpoint.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }


def encode_checkpoint(tensors: Mapping[str, Tensor], meta: dict, suffix: str) -> bytes:
    """The contents of a checkpoint file; the same ones always give the same bytes.

    Args:
        tensors: The model's tensors by name.
        meta: Plain data about them.
        suffix: '.pth' or '.safetensors', which takes ``meta`` as JSON.

    Raises:
        CheckpointError: Another suffix.
    """
    if suffix == '.safetensors':
        safetensors = _import_safetensors()
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        content = safetensors.save(contiguous, {'format': 'pt', 'meta': json.dumps(meta)})
        return _sort_header(content)
    if suffix == '.pth':
        # Through memory, because torch.save writes the name of a file into it.
        buffer = io.BytesIO()
        torch.save({'meta': meta, 'state_dict': dict(tensors)}, buffer)
        return buffer.getvalue()
    raise CheckpointError(f'a checkpoint ends in .pth or .safetensors, not in {suffix!r}')


def _sort_header(content: bytes) -> bytes:
    """Bring the header of a safetensors file, whose order changes from run to run, into one."""
    # Eight bytes with the length of the header, the header as JSON, the tensors.
    begin = 8 + int.from_bytes(content[:8], 'little')
    header = json.dumps(json.loads(content[8:begin]), sort_keys=True).encode()
    # Padded, so that the tensors stay aligned.
    header += b' ' * (-len(header) % 8)
    return len(header).to_bytes(8, 'little') + header + content[begin:]


def _read_safetensors(path: Path, map_location: MapLocation) -> dict:
    safetensors = _import_safetensors()
    device = map_location if isinstance(map_location, (str, torch.device)) else 'cpu'
    try:
        with safetensors.safe_open(path, framework='pt', device=str(device)) as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(
            f'checkpoint {path} cannot be read as safetensors: it is cut short, damaged or '
            f'something else ({error}). Fetch it again'
        ) from error
    try:
        meta = json.loads(metadata.pop('meta', '{}'))
    except json.JSONDecodeError as error:
        raise CheckpointError(f'checkpoint {path}: its metadata are not JSON: {error}') from error
    return {'meta': meta if isinstance(meta, dict) else {}, 'state_dict': tensors}


def _import_safetensors() -> SimpleNamespace:
    try:
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import save
    except ImportError as error:
        raise CheckpointError(
            f'.safetensors files need the package safetensors: pip install safetensors ({error})'
        ) from error
    return SimpleNamespace(SafetensorError=SafetensorError, safe_open=safe_open, save=save)


def _read_pickle(path: Path, map_location: MapLocation) -> object:
    _check_container(path)
    try:
        if _trusted:
            return torch.load(path, map_location=map_location, weights_only=False)
        return _load_protected(path, map_location)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_describe_refusal(path, error)) from error
    except DAMAGED as error:
        raise CheckpointError(_describe_damage(path, error)) from error


def _check_container(path: Path) -> None:
    """Refuse archives that torch.load would unpack or run by other ways than its unpickler."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith('/constants.pkl') for name in archive.namelist()):
                raise CheckpointError(
                    f'{path} is a TorchScript program, not a checkpoint: save a state_dict instead'
                )
    elif tarfile.is_tarfile(path):
        raise CheckpointError(
            f'{path} is a tar archive. If there is a checkpoint inside, unpack it; the tar format '
            'of torch before 0.4 is not read, because it cannot be read safely'
        )


def _describe_refusal(path: Path, error: pickle.UnpicklingError) -> str:
    known = {*_torch_globals(), *(_name_of(function) for function in _mmengine_globals())}
    offenders = [name for name in globals_in(path) if name not in known]
    if not offenders and not zipfile.is_zipfile(path):
        return _describe_damage(path, error)
    # Where every name is known but is used for something else, torch says for what.
    reason = str(error).rpartition('error: ')[-1].strip().splitlines()[0]
    what = enumerate_keys(offenders) if offenders else reason
    return (
        f'checkpoint {path} is more than tensors and plain data: {what}. Reading it could run code '
        'of whoever made the file. If you made it yourself, or trust its maker as you would trust '
        'a program, add --trust-checkpoint (in Python: backbones.trust_checkpoints())'
    )


def globals_in(path: Path) -> list[str]:
    """The classes and functions that a pickle names, found without running it."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith('data.pkl')]
            content = b''.join(archive.read(name) for name in names)
    else:
        content = path.read_bytes()
    stream = io.BytesIO(content)
    found: dict[str, None] = {}
    strings = ['', '']
    # An old file is several pickles, one after the other, and ends in what is none.
    with suppress(ValueError, IndexError, UnicodeDecodeError):
        while stream.tell() < len(content):
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name == 'GLOBAL':
                    found['.'.join(argument.split(' ')).replace('__builtin__', 'builtins')] = None
                elif opcode.name == 'STACK_GLOBAL':
                    found['.'.join(strings[-2:])] = None
                elif isinstance(argument, str):
                    strings.append(argument)
    return list(found)


def _describe_damage(path: Path, error: Exception) -> str:
    with path.open('rb') as file:
        begin = file.read(40)
    if not begin.startswith(TORCH_FORMATS):
        return f'{path} is not a checkpoint that torch.save has written: it begins with {begin!r}'
    return (
        f'checkpoint {path} ({path.stat().st_size} bytes) cannot be read, as if it were cut short '
        f'or damaged; if it is, fetch or copy it again ({first_line(error).split(". ")[0]})'
    )


# ------------------------------------------------------------------------------------------------
# What may be in a pickle
# ------------------------------------------------------------------------------------------------


def _history_statistic(owner: type, name: str) -> Callable:
    """Stands in for ``getattr``, by which mmengine's log buffers name their own methods.

    The real one leads from any object to every function that can be reached from it.
    """
    if owner is HistoryBuffer and name in ('min', 'max', 'current', 'mean'):
        return getattr(HistoryBuffer, name)
    raise pickle.UnpicklingError(f'getattr of {owner!r} and {name!r}')


def _known_as(name: str, function: Callable) -> Callable:
    """A function that a pickle finds under another name."""

    def stand_in(*args: Any) -> Any:
        return function(*args)

    module, _, function_name = name.rpartition('.')
    stand_in.__module__, stand_in.__qualname__ = module, function_name
    # torch before 2.7 goes by this one.
    stand_in.__name__ = function_name
    return stand_in


def _mmengine_globals() -> list[Callable]:
    """What mmengine puts into a checkpoint besides tensors and plain data: logs and numbers.

    NumPy 2 moved the functions by which arrays and numbers are pickled, so that there are files
    with the old name and with the new one.
    """
    moved = [
        _known_as(f'numpy.{core}.multiarray.{name}', value.__reduce__()[0])
        for core in ('core', '_core')
        for name, value in (('_reconstruct', np.zeros(1)), ('scalar', np.float64()))
    ]
    dtypes = {type(np.dtype(code)) for code in '?bBhHiIlLqQefdUS'}
    getattr_of_logs = _known_as('builtins.getattr', _history_statistic)
    # Bytes, in which an array has its contents, are pickled as encoded text.
    return [HistoryBuffer, np.ndarray, np.dtype, *dtypes, *moved, codecs.encode, getattr_of_logs]


def _name_of(function: Callable) -> str:
    return f'{function.__module__}.{function.__qualname__}'


def _torch_globals() -> dict[str, Any]:
    """What torch itself takes for safe, by name: tensors, their storages, and plain data."""
    from torch._weights_only_unpickler import _get_allowed_globals

    return dict(_get_allowed_globals())


def _load_protected(path: Path, map_location: MapLocation) -> object:
    if hasattr(torch.serialization, 'safe_globals'):
        with torch.serialization.safe_globals(_mmengine_globals()):
            return torch.load(path, map_location=map_location, weights_only=True)
    return _load_restricted(path, map_location)


def _load_restricted(path: Path, map_location: MapLocation) -> object:
    """For torch before 2.5, which cannot be told what else is safe: the same list by hand."""
    allowed = {**_torch_globals(), **{_name_of(f): f for f in _mmengine_globals()}}

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            full_name = f'{module.replace("__builtin__", "builtins")}.{name}'
            if full_name not in allowed:
                raise pickle.UnpicklingError(f'{full_name} is not on the list')
            return allowed[full_name]

    def load(file: io.BufferedIOBase, **kwargs: Any) -> Any:
        return Unpickler(file, **kwargs).load()

    restricted = SimpleNamespace(__name__='restricted', Unpickler=Unpickler, load=load)
    return torch.load(path, map_location=map_location, pickle_module=restricted, weights_only=False)


def first_line(error: Exception) -> str:
    """What an error says first, or what it is where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


TIMM_NAMES = tuple(f'efficientformerv2_{arch}.snap_dist_in1k' for arch in ('s0', 's1', 's2', 'l'))
HUB_FILES = ('model.safetensors', 'pytorch_model.bin')


def fetch(source: str) -> Path:
    """The local file of a checkpoint, downloaded first where that is needed.

    Args:
        source: A path, or an address with one of the schemes in the table of this module.

    Raises:
        CheckpointError: It cannot be had; the message says what can.
    """
    scheme, separator, rest = source.partition('://')
    if not separator:
        return Path(source)
    if scheme == 'timm':
        return _first_in_node(lambda: _fetch_from_hub(rest))
    if scheme in ('http', 'https'):
        return _first_in_node(lambda: _fetch_from_web(source))
    if scheme in ZOOS:
        return _fetch_from_zoo(scheme, rest)
    raise CheckpointError(
        f'{source}: checkpoints are not read from {scheme}://. Give a local path, timm://NAME or '
        'https://...'
    )


def _first_in_node(download: Callable[[], Path]) -> Path:
    """In a distributed run one process of each machine downloads, the others then find the file."""
    if int(os.environ.get('LOCAL_RANK', dist.get_rank())) == 0:
        try:
            return download()
        finally:
            dist.barrier()
    dist.barrier()
    return download()


def _fetch_from_hub(name: str) -> Path:
    if name not in TIMM_NAMES:
        raise CheckpointError(
            f'timm://{name}: there are no weights of that name. {_how_to_get_weights()}'
        )
    try:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
        from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError as error:
        raise CheckpointError(
            f'timm://{name} needs the package huggingface_hub: pip install huggingface_hub '
            f'({error}). {_how_to_get_weights()}'
        ) from error
    repository = f'timm/{name}'
    for filename in HUB_FILES:
        try:
            return Path(hf_hub_download(repository, filename))
        except LocalEntryNotFoundError as error:
            reason: Exception = error
            break
        except EntryNotFoundError as error:
            reason = error
        # Which errors there are depends on the client that this version of huggingface_hub uses.
        except Exception as error:
            reason = error
            break
    # Out of reach, and the file that was asked for is not in the cache. The other one may be.
    cached = try_to_load_from_cache(repository, HUB_FILES[-1])
    if isinstance(cached, str):
        return Path(cached)
    raise CheckpointError(
        f'timm://{name} could not be fetched from the Hugging Face hub: {first_line(reason)} '
        f'{_how_to_get_weights()}'
    ) from reason


def _how_to_get_weights() -> str:
    try:
        from huggingface_hub.constants import HF_HUB_CACHE as cache
    except ImportError:
        cache = 'of huggingface_hub'
    return (
        f'The names are {", ".join(f"timm://{name}" for name in TIMM_NAMES)}. What was fetched '
        f'once is kept in the cache folder {cache} and needs no connection (HF_HOME moves it). '
        'Without a connection, copy a model.safetensors or .pth here by other means and give its '
        'path instead, for training: --cfg-options model.backbone.init_cfg.checkpoint=PATH'
    )


def _fetch_from_web(url: str) -> Path:
    """Download into torch.hub's cache; a file is there only once it is whole."""
    name = Path(urllib.parse.urlparse(url).path).name or 'checkpoint'
    # Many trainings end in an epoch_12.pth, so the name alone does not tell files apart.
    key = hashlib.sha256(url.encode()).hexdigest()[:8]
    path = Path(torch.hub.get_dir()) / 'checkpoints' / key / name
    if path.is_file():
        return path
    request = urllib.request.Request(url, headers={'User-Agent': 'efficientformer-v2-dense'})
    try:
        with (
            urllib.request.urlopen(request, timeout=60) as response,
            atomic_write(path) as partial,
        ):
            size = int(response.headers.get('Content-Length') or 0) or None
            bar = tqdm(total=size, desc=name, unit='B', unit_scale=True, leave=False)
            with partial.open('wb') as file, bar:
                while chunk := response.read(2**20):
                    file.write(chunk)
                    bar.update(len(chunk))
            received = partial.stat().st_size
            if size is not None and received != size:
                raise CheckpointError(
                    f'{url}: the connection ended after {received} of {size} bytes'
                )
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise CheckpointError(f'{url} could not be fetched: {error}') from error
    return path


# Schemes that stand for a list of addresses, which mmengine keeps.
ZOOS: dict[str, Callable[[], dict[str, str]]] = {
    'torchvision': mmengine_checkpoint.get_torchvision_models,
    'modelzoo': mmengine_checkpoint.get_torchvision_models,
    'open-mmlab': mmengine_checkpoint.get_external_models,
    'openmmlab': mmengine_checkpoint.get_external_models,
    'mmcls': mmengine_checkpoint.get_mmcls_models,
}


def _fetch_from_zoo(scheme: str, name: str) -> Path:
    try:
        addresses = ZOOS[scheme]()
    except ImportError as error:
        raise CheckpointError(f'{scheme}://{name} needs another package: {error}') from error
    if name not in addresses:
        name = mmengine_checkpoint.get_deprecated_model_names().get(name, name)
    if name not in addresses:
        raise CheckpointError(f'{scheme}://{name}: mmengine knows no weights of that name')
    address = addresses[name]
    if address.startswith(('http://', 'https://')):
        return fetch(address)
    return Path(mmengine_checkpoint._get_mmengine_home()) / address


# ------------------------------------------------------------------------------------------------
# In mmengine's place
# ------------------------------------------------------------------------------------------------


def load_checkpoint(source: str, map_location: MapLocation = 'cpu') -> dict:
    """Fetch and read a checkpoint, and bring it into the form that mmengine works with.

    Args:
        source: A path or an address, see :func:`fetch`.
        map_location: Where tensors go, as for ``torch.load``. Default: 'cpu'.

    Returns:
        A dict with ``state_dict``, ``meta`` and whatever else the file holds. The tensors of a
        bare EfficientFormerV2 are under ``backbone.``, so that they find their place in a whole
        model as well as in the backbone.

    Raises:
        CheckpointError: See :func:`fetch` and :func:`read_checkpoint`.
    """
    checkpoint = read_checkpoint(fetch(source), map_location)
    tensors = tensors_of(checkpoint)
    if layout_of(tensors):
        tensors = {f'backbone.{key}': tensor for key, tensor in tensors.items()}
    elif source.startswith('mmcls://'):
        prefix = 'backbone.'
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    others = {
        key: value
        for key, value in checkpoint.items()
        if key not in WRAPPERS and not isinstance(value, Tensor)
    }
    meta = dict(others.pop('meta', None) or {})
    if not are_checkpoints_trusted():
        # mmengine runs this text as Python when it resumes; its own files have it under 'cfg'.
        meta.pop('config', None)
    state_dict = OrderedDict(tensors)
    # Versions of the modules, which some of mmcv's and mmdet's ask for when they are loaded.
    state_dict._metadata = getattr(checkpoint.get('state_dict'), '_metadata', OrderedDict())
    return {**others, 'meta': meta, 'state_dict': state_dict}


# mmengine's log has the end of this name: "Loads checkpoint by source backend from path: ...".
def load_from_source(filename: str, map_location: MapLocation = 'cpu') -> dict:
    """:func:`load_checkpoint`, as mmengine calls it."""
    return load_checkpoint(filename, map_location)


def register_loaders() -> None:
    """Take the place of all of mmengine's loaders, which can fall back to unprotected reading."""
    schemes = ['', 'timm://', 'http://', 'https://', *(f'{zoo}://' for zoo in ZOOS)]
    # Storage that needs clients of its own: better refused than read without protection.
    refused = ['pavi://', r'(\S+\:)?s3://', r'(\S+\:)?petrel://']
    CheckpointLoader.register_scheme([*schemes, *refused], load_from_source, force=True)
