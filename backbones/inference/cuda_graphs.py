"""CUDA graphs: networks on a GPU without the time that it takes to launch their operators.

A GPU computes an image faster than Python can launch the operators. A CUDA graph records all
launches for inputs of one shape, and replays them at once.
"""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from backbones.deploy import works_channels_last

# Calls before a shape is recorded, since recording takes as long as many calls.
CALLS_BEFORE_RECORDING = 2
# The most shapes to record: each keeps its inputs and outputs on the GPU.
MAX_SHAPES = 8
# A process records one graph at a time, also for different models.
RECORDING = threading.Lock()
# These parts, and necks and heads that work in channels last, can be recorded: their results depend
# only on their inputs, their weights, and the shape of the inputs.
KNOWN = {'EfficientFormerV2', 'ResNet', 'ResNetV1c', 'MobileNetV2', 'FixedLightHamHead'}


def use_cuda_graphs(model: nn.Module) -> None:
    """Record the known parts of a detector or segmentor as CUDA graphs, and replay them.

    Backbone and neck become one graph for each shape of images, a dense head another. Unknown
    parts, and calls with gradients, run as before. The model is changed in place; its weights must
    not move in memory afterwards.
    """
    # Graphs share their memory: what one returns is copied before the next runs.
    pool = torch.cuda.graph_pool_handle()
    parts = dict(model.named_children())
    if 'backbone' in parts and all(is_known(parts[n]) for n in ('backbone', 'neck') if n in parts):
        model.extract_feat = Recorded(model.extract_feat, pool)
    for name in ('decode_head', 'rpn_head', 'bbox_head'):
        if name in parts and is_known(parts[name]):
            parts[name].forward = Recorded(parts[name].forward, pool)


def is_known(part: nn.Module) -> bool:
    """Return whether a part can be recorded."""
    return type(part).__name__ in KNOWN or works_channels_last(part)


class Recorded:
    """A function of feature maps, recorded for shapes that are repeated.

    It maps a tensor, or a sequence of them, to tensors in tuples and lists, without side effects:
    its Python code does not run again.
    """

    def __init__(self, function: Callable[[Any], Any], pool: tuple | None = None) -> None:
        self.function, self.pool = function, pool or torch.cuda.graph_pool_handle()
        self.calls: Counter[tuple] = Counter()
        # None if recording failed.
        self.graphs: dict[tuple, Graph | None] = {}

    def __call__(self, maps: Tensor | Sequence[Tensor]) -> Any:
        each = (maps,) if isinstance(maps, Tensor) else tuple(maps)
        # Before torch 2.4, other functions returned the state of CUDA's autocast.
        can_record = hasattr(torch, 'get_autocast_dtype') and all(x.is_cuda for x in each)
        if torch.is_grad_enabled() or not can_record:
            return self.function(maps)
        shapes = tuple((x.shape, x.stride(), x.dtype, x.device) for x in each)
        precision = torch.is_autocast_enabled('cuda') and torch.get_autocast_dtype('cuda')
        key = (shapes, precision, torch.is_inference_mode_enabled())
        if key not in self.graphs and len(self.graphs) < MAX_SHAPES:
            self.calls[key] += 1
            if self.calls[key] > CALLS_BEFORE_RECORDING:
                self.graphs[key] = record(self.function, maps, self.pool)
        graph = self.graphs.get(key)
        return graph.replay(maps) if graph else self.function(maps)


def record(function: Callable[[Any], Any], maps: Any, pool: tuple) -> 'Graph | None':
    """Return a graph that computes the same as a function, or None if there is none."""
    try:
        with RECORDING:
            graph = Graph(function, maps, pool)
        return graph if is_close(graph.replay(maps), function(maps)) else None
    except RuntimeError:
        # There was not enough memory, or an operator waits for the GPU.
        return None


class Graph:
    """The recorded operators of a function, for inputs of one shape."""

    def __init__(self, function: Callable[[Any], Any], maps: Any, pool: tuple) -> None:
        self.inputs = copy_of(maps)
        self.graph = torch.cuda.CUDAGraph()
        device = (maps if isinstance(maps, Tensor) else maps[0]).device
        # Autocast as it is, but without its cache: a weight that was cast before, or is kept for
        # later, would be memory that a graph shares with others.
        precision = torch.get_autocast_dtype('cuda'), torch.is_autocast_enabled('cuda')
        autocast = torch.autocast('cuda', *precision, cache_enabled=False)
        with torch.cuda.device(device), autocast:
            stream = stream_of(pool, device)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                function(self.inputs)
            # Other threads may use the GPU meanwhile.
            options = dict(pool=pool, stream=stream, capture_error_mode='thread_local')
            with torch.cuda.graph(self.graph, **options):
                self.outputs = function(self.inputs)

    def replay(self, maps: Any) -> Any:
        """Return the function's result for other inputs of this shape."""
        if isinstance(maps, Tensor):
            self.inputs.copy_(maps)
        else:
            for old, new in zip(self.inputs, maps, strict=True):
                old.copy_(new)
        self.graph.replay()
        return copy_of(self.outputs)


@cache
def stream_of(pool: tuple, device: torch.device) -> torch.cuda.Stream:
    """Return the stream that records all graphs of a pool: others may not use memory it freed."""
    return torch.cuda.Stream(device)


def is_close(found: Any, expected: Any) -> bool:
    """Return whether tensors, also in tuples and lists, differ by a hundredth at most."""
    if isinstance(found, Tensor):
        difference = (found.float() - expected.float()).norm()
        return bool(difference <= 0.01 * expected.float().norm())
    return all(map(is_close, found, expected))


def copy_of(tensors: Any) -> Any:
    """Return copies of a tensor, or of tensors in tuples and lists."""
    if isinstance(tensors, Tensor):
        return tensors.clone()
    return type(tensors)(map(copy_of, tensors))
