"""Where weights come from: files, the Hugging Face hub, the web.

Importing ``backbones`` puts the loaders at the end of this module in the place of mmengine's own,
so that every ``init_cfg``, ``load_from`` and resumed training goes through them:

| a checkpoint given as                            | comes from                              |
| ------------------------------------------------ | --------------------------------------- |
| ``folder/file.pth``, ``folder/file.safetensors`` | that file                               |
| ``timm://efficientformerv2_s2.snap_dist_in1k``   | the Hugging Face hub, kept in its cache |
| ``https://...``                                  | the web, kept in torch.hub's cache      |
| ``torchvision://...``, ``open-mmlab://...``, ... | the web, by mmengine's lists            |
"""

import hashlib
import http.client
import os
import urllib.parse
import urllib.request
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
from mmengine import dist
from mmengine.runner import checkpoint as mmengine_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor
from torch.hub import tqdm

from .checkpoint import WRAPPERS, CheckpointError, layout_of
from .checkpoint_file import (
    MapLocation,
    are_checkpoints_trusted,
    first_line,
    read_checkpoint,
    tensors_of,
    written_whole,
)

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
            written_whole(path) as partial,
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
