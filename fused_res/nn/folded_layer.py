"""Layers with their batch norms folded in: one for each pair of a convolution and a norm, shared by all programs."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from fused_res.dispatch import PackedWeight, Problem, Selection
from fused_res.nn import chain
from fused_res.nn.chain import Unit
from fused_res.nn.snapshot import Snapshot
from fused_res.nn.spec_builder import build_block_spec
from fused_res.spec import BlockSpec, UnitTensors

#: Bound on the packed weights of a layer and on the prepared input shapes of a sequence of blocks. Some packings depend
#: on the input's shape, and a server's batch size varies. A packed weight occupies as much memory as the weight itself,
#: a transformed one (Winograd) four times as much.
MAX_CACHE_ENTRIES = 4
cache_lock = threading.Lock()


class FoldedLayer:
    """A convolution with its norm folded in: the folded bias, and the folded weight as packed for each algorithm.

    A linear layer is a 1x1 convolution.
    """

    __slots__ = (
        "__weakref__",
        "_packed",
        "bias",
        "eps",
        "geometry",
        "has_constant_norm",
        "like",
        "snapshot",
        "tensors",
    )

    def __init__(
        self, tensors: UnitTensors, geometry: tuple[Any, ...], eps: float, has_constant_norm: bool, snapshot: Snapshot
    ) -> None:
        self.tensors, self.geometry, self.eps, self.snapshot = tensors, geometry, eps, snapshot
        self.has_constant_norm = has_constant_norm
        self._packed: dict[Hashable, Tensor] = {}
        weight = tensors.weight
        _, self.bias = fold(tensors._replace(weight=weight[:, :0]), eps)
        #: Shape and memory format of the folded weight.
        self.like = torch.empty(weight.shape, device="meta", memory_format=weight_format(weight))

    def spec(self, unit: Unit, pool: tuple[Any, ...] | None) -> BlockSpec | None:
        """Return the specification of `unit` and of a pooling after it, or None if they are not supported.

        Args:
            unit: a unit of this layer.
            pool: kernel_size, stride and padding of the max pooling, or None.
        """
        key = (*self.geometry, self.tensors.weight.shape, self.eps, unit.activation, unit.negative_slope)
        spec = build_block_spec((key,), "none", pool)
        return None if isinstance(spec, str) else spec

    def operand(self, selected: Selection, problem: Problem) -> PackedWeight | Tensor:
        """Return the folded weight, packed if the selected algorithm packs it; computed at the first call."""
        algorithm = selected.algorithm
        packs = algorithm.pack is not None
        key = (packs, problem.dtype, algorithm.pack_key(problem) if packs else None)
        found = self._packed.get(key)
        if found is None:
            folded = fold(self.tensors, self.eps)[0].to(problem.dtype)
            found = folded if algorithm.pack is None else algorithm.pack(problem, folded)
            synchronize(found.device)
            insert_bounded(self._packed, key, found, MAX_CACHE_ENTRIES)
        return PackedWeight(found, problem.weight) if packs else found


#: The layers that programs hold, by the ids of the two modules' ``__dict__``, which the layer's snapshot keeps alive. A
#: layer must not be reachable from here: through a hook, its tensors and modules may refer to the whole model, which
#: would never be freed.
_layers: WeakValueDictionary[tuple[int, int], FoldedLayer] = WeakValueDictionary()


@torch.no_grad()
def fold(tensors: UnitTensors, eps: float) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a convolution with the following norm folded in, computed in float64.

    Args:
        tensors: the unit's tensors, with running statistics; all None for a convolution without a norm.
        eps: constant that is added to the variance.

    Returns:
        The weight ``(K, C / groups, ...)`` of its dtype, that of a 2-D convolution in channels_last memory, and the
        bias ``(K,)``, float64 for a float64 weight and float32 otherwise.
    """
    weight, *rest = tensors
    bias, norm_weight, norm_bias, mean, var = (None if tensor is None else tensor.double() for tensor in rest)
    if mean is None or var is None:
        folded, shift = weight, weight.new_zeros(len(weight)) if bias is None else bias
    else:
        # Folding a weight of ones returns the norm's scale, so that the weight itself is copied once.
        ones = mean.new_ones(len(weight), *[1] * (weight.dim() - 1))
        scale, shift = fuse_conv_bn_weights(ones, bias, mean, var, eps, norm_weight, norm_bias)
        folded = weight.to(torch.float64, copy=True).mul_(scale)
    format = weight_format(weight)
    bias_dtype = torch.float64 if weight.dtype is torch.float64 else torch.float32
    return folded.detach().to(weight.dtype, memory_format=format), shift.detach().to(bias_dtype)


def weight_format(weight: Tensor) -> torch.memory_format:
    return torch.channels_last if weight.dim() == 4 else torch.contiguous_format


def find_layer(conv: nn.Module, norm: nn.Module | None) -> FoldedLayer | None:
    """Return the current layer of a convolution and a norm, or of a linear layer; None if its state is unsupported."""
    norm_state = None if norm is None else norm.__dict__
    key = id(conv.__dict__), id(norm_state)
    with cache_lock:
        layer = _layers.get(key)
    if layer is None or not layer.snapshot.is_current():
        layer = _read_layer(conv.__dict__, norm_state, isinstance(conv, nn.Linear))
        if layer is not None:
            with cache_lock:
                _layers[key] = layer
    return layer


_GEOMETRY = ("stride", "padding", "dilation", "groups", "padding_mode")


#: Stride, padding, dilation, groups and padding mode of a linear layer.
_POINTWISE = (1, 0, 1, 1, "zeros")
#: Arguments of :func:`fold` for a convolution without a norm.
_NO_NORM: chain.NormArgs = (None, None, None, None, False, 0.0, None)


def _read_layer(conv: dict[str, Any], norm: dict[str, Any] | None, is_linear: bool) -> FoldedLayer | None:
    """Return the layer for the ``__dict__`` of a convolution and of a norm, or None if their state is not supported.

    Args:
        conv, norm: the ``__dict__`` of the two modules; None without a norm.
        is_linear: whether `conv` is that of a linear layer.
    """
    parameters = conv["_parameters"]
    norm_args = _NO_NORM if norm is None else chain.read_norm(norm)
    weight = parameters.get("weight")
    if weight is None or "bias" not in parameters or isinstance(norm_args, str):
        return None
    norm_weight, norm_bias, mean, var, batch_statistics, _, _ = norm_args
    norm_attributes = [] if norm is None else chain.norm_dependencies(norm)
    if batch_statistics or norm_attributes is None:
        return None
    tensors = UnitTensors(weight, parameters["bias"], norm_weight, norm_bias, mean, var)
    if any(type(t) is not Tensor and type(t) is not nn.Parameter for t in tensors if t is not None):
        return None
    attributes = () if is_linear else _GEOMETRY
    geometry = _POINTWISE if is_linear else tuple([conv[name] for name in attributes])
    if any(isinstance(value, list) for value in geometry):  # a change in place would not be detected
        return None
    if weight.dim() not in ((2,) if is_linear else (3, 4, 5)) or weight.numel() == 0:
        return None
    for tensor in tensors[1:]:
        if tensor is not None and (tensor.shape != weight.shape[:1] or tensor.device != weight.device):
            return None
    try:
        snapshot = Snapshot(
            [
                (conv, ("_parameters", *attributes)),
                (parameters, ("weight", "bias")),
                *norm_attributes,
            ]
        )
    except RuntimeError:  # a tensor without storage, such as one that was returned from inside a torch.func transform
        return None
    if is_linear:
        tensors = tensors._replace(weight=weight.detach()[:, :, None, None])
    eps, is_constant = (0.0, False) if norm is None else (norm["eps"], chain.is_constant_norm(norm))
    return FoldedLayer(tensors, geometry, eps, is_constant, snapshot)


def synchronize(device: torch.device) -> None:
    """Wait for the current stream: the next call may use what it computes on another stream."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def insert_bounded(cache: dict[Any, Any], key: Hashable, value: Any, limit: int) -> None:
    """Insert an entry; the oldest are removed beyond `limit`."""
    with cache_lock:
        while len(cache) >= limit and key not in cache:
            del cache[next(iter(cache))]
        cache[key] = value
