"""The inference modules that :func:`fused_res.freeze` creates: convolutions with their batch norm folded in.

Weights are packed once and cached; consecutive frozen modules run as one inference graph if the backend supports it.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_res import _torch_compat, functional
from fused_res.backends import registry
from fused_res.dispatch import PackedWeight, Problem, Selection
from fused_res.nn import chain
from fused_res.nn.fusable_module import Unscriptable
from fused_res.spec import BlockSpec, PoolSpec, UnitSpec


class PackedWeightEntry(NamedTuple):
    """A cached packed weight, and the weight tensor and version that it was packed from."""

    key: Hashable
    source: Tensor
    version: int
    tensor: Tensor


#: Bound on the packed weights that a layer caches and on the inference graphs that consecutive modules cache. Some
#: packings depend on the input's shape, and a server's batch size varies. A packed weight occupies as much memory as
#: the weight itself, a transformed one (Winograd) four times as much.
_MAX_CACHE_ENTRIES = 4
_cache_lock = threading.Lock()


class FrozenModule(Unscriptable, nn.Module):
    """Base class of modules without a training mode.

    Args:
        backend: name of the backend.
        origin: name of the class, or classes, that the module was created from, for ``summarize``.
    """

    def __init__(self, backend: str, origin: str) -> None:
        super().__init__()
        self.backend = backend
        self.origin = origin
        self.training = False

    def train(self: Any, mode: bool = True) -> Any:
        if mode:
            raise RuntimeError(
                "this module is frozen for inference: its batch norms are folded into the convolutions; train the"
                " original model"
            )
        return nn.Module.train(self, False)


class FrozenConv(FrozenModule):
    """Compute ``activation(conv(x, weight) + bias [+ residual])``, with ``weight`` and ``bias`` as buffers.

    Args:
        weight, bias: weight and bias of a convolution with the following batch norm folded in.
        spec: geometry and activation of the convolution.
        backend: see :func:`fused_res.functional.conv_bias_act`.
        origin: name of the class, or classes, that the module was created from.
        pool: max pooling after the activation, for a network's stem; default None.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        spec: UnitSpec,
        backend: str = "auto",
        origin: str = "",
        pool: PoolSpec | None = None,
    ) -> None:
        super().__init__(backend, origin)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.spec = spec
        self.pool = pool
        self._packed: dict[Hashable, PackedWeightEntry] = {}
        self._graph_cache = InferenceGraphCache()
        #: The algorithm selected by the last call, for human-readable reports only.
        self.last_selected: Selection | None = None

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        spec = self.spec
        compiling = torch.compiler.is_compiling()
        exporting = _torch_compat.is_exporting() or _torch_compat.is_fx_proxy(input)
        if exporting or (not compiling and _torch_compat.is_jit_tracing()):
            return self._max_pool(self._aten_forward(input, residual))
        if self.pool is not None:
            output = self._graph_cache.run((self,), input)
            if output is not None:
                return output
        self._check_input(input)
        pack_weight = None if compiling or type(input) is not Tensor else self._pack_weight
        output = functional.packed_conv_bias_act(
            input, self.weight, self.bias, residual, *spec.geometry, spec.activation, self.backend, pack_weight
        )
        return self._max_pool(output)

    def _check_input(self, input: Tensor) -> None:
        weight, groups = self.weight, self.spec.groups
        if input.dim() == 4 and input.shape[1] != weight.shape[1] * groups:
            raise ValueError(
                f"input must have the {weight.shape[1] * groups} channels that this layer was frozen for, got"
                f" {tuple(input.shape)}"
            )
        if input.dtype != weight.dtype and functional.autocast_dtype(input) is None:
            raise TypeError(f"input must be {weight.dtype}, which this layer was frozen for, got {input.dtype}")

    def _max_pool(self, output: Tensor) -> Tensor:
        pool = self.pool
        return output if pool is None else F.max_pool2d(output, pool.kernel_size, pool.stride, pool.padding)

    def layers(self) -> tuple[Any, ...]:
        return (self,)

    def as_block_spec(self) -> BlockSpec:
        return _cached_block_spec((self.spec,), "none", self.pool)

    def _aten_forward(self, input: Tensor, residual: Tensor | None) -> Tensor:
        """Compute the convolution with ATen operators only: traced and exported graphs must not need fused_res."""
        spec = self.spec
        y = F.conv2d(input, self.weight, self.bias, spec.stride, spec.padding, spec.dilation, spec.groups)
        if residual is not None:
            y = y + residual.to(y.dtype)
        return F.relu(y) if spec.relu else y

    def _pack_weight(self, selected: Selection, problem: Problem) -> PackedWeight | Tensor:
        self.last_selected = selected
        if selected.algorithm.pack is None:
            return self.weight
        return PackedWeight(self.packed_weight(selected, problem), problem.weight)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    def packed_weight(self, selected: Selection, problem: Problem) -> Tensor:
        return self.packed_entry(selected, problem).tensor

    def packed_entry(self, selected: Selection, problem: Problem) -> PackedWeightEntry:
        """Return the packed weight for an algorithm and a problem; packed once, until the weight changes."""
        key = selected.algorithm.pack_key(problem)
        cached = self._packed.get(key)
        if cached is not None and self.is_current(cached):
            return cached
        assert selected.algorithm.pack is not None
        entry = PackedWeightEntry(
            key, self.weight, _version(self.weight), selected.algorithm.pack(problem, self.weight)
        )
        _cache_insert(self._packed, key, entry)
        return entry

    def is_current(self, entry: PackedWeightEntry) -> bool:
        """Return whether `entry` is still cached and its weight unchanged; :meth:`to`, for example, replaces it."""
        source = entry.source
        return (
            self._buffers["weight"] is source
            and self._packed.get(entry.key) is entry
            and entry.version == _version(source)
        )

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        self._packed.clear()
        return super()._apply(*arguments, **options)

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        self._packed.clear()
        super()._load_from_state_dict(*arguments, **options)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": {}, "_graph_cache": InferenceGraphCache(), "last_selected": None}

    def extra_repr(self) -> str:
        outputs, inputs, *kernel = self.weight.shape
        spec = self.spec
        return (
            f"{inputs * spec.groups}, {outputs}, kernel_size={tuple(kernel)}, stride={spec.stride},"
            f" padding={spec.padding}, dilation={spec.dilation}, groups={spec.groups}, activation={spec.activation!r}"
        )


class FrozenBlock(FrozenModule):
    """Residual block of :class:`FrozenConv` modules.

    Children are ``conv1, conv2, ...``, the last of which adds the shortcut, and ``downsample``, the projection or None.
    """

    def __init__(
        self,
        units: Sequence[FrozenConv],
        shortcut: Literal["none", "identity"] | FrozenConv,
        backend: str = "auto",
        origin: str = "",
    ) -> None:
        super().__init__(backend, origin)
        for index, unit in enumerate(units, start=1):
            self.add_module(f"conv{index}", unit)
        self.downsample = None if isinstance(shortcut, str) else shortcut
        self.identity = shortcut == "identity"
        self._conv_names = tuple(f"conv{index}" for index in range(1, len(units) + 1))
        self._graph_cache = InferenceGraphCache()

    def layers(self) -> tuple[Any, ...]:
        """Return the convolutions of the main path, then the projection, if there is one."""
        children = self._modules
        main_path = tuple([children[name] for name in self._conv_names])
        return main_path if self.downsample is None else (*main_path, self.downsample)

    def as_block_spec(self) -> BlockSpec:
        layers = self.layers()
        shortcut = layers[-1].spec if self.downsample is not None else "identity" if self.identity else "none"
        return _cached_block_spec(tuple([layer.spec for layer in layers[: len(self._conv_names)]]), shortcut, None)

    def forward(self, x: Tensor) -> Tensor:
        output = self._graph_cache.run((self,), x)
        if output is not None:
            return output
        children: dict[str, Any] = self._modules
        *first, last = self._conv_names
        y = x
        for name in first:
            y = children[name](y)
        residual = x if self.identity else None
        if self.downsample is not None:
            residual = self.downsample(x)
        return children[last](y, residual)


class FrozenStage(nn.Sequential):
    """Consecutive frozen blocks, run as one inference graph where supported, otherwise as an nn.Sequential."""

    def __init__(self, *blocks: FrozenBlock) -> None:
        super().__init__(*blocks)
        self._graph_cache = InferenceGraphCache()

    def forward(self, x: Tensor) -> Tensor:
        blocks = tuple(self._modules.values())
        output = self._graph_cache.run(blocks, x) if all(type(block) is FrozenBlock for block in blocks) else None
        return super().forward(x) if output is None else output


_cached_block_spec = cache(BlockSpec)


class InferenceGraphCache:
    """Cache of inference graphs: consecutive frozen modules run as one backend call, prepared once per input shape."""

    def __init__(self) -> None:
        self._graphs: dict[Hashable, Any] = {}

    def __reduce__(self) -> tuple[type[InferenceGraphCache], tuple[()]]:
        return InferenceGraphCache, ()  # a copy of the module has different weight tensors, so its cache starts empty

    def run(self, modules: Sequence[Any], x: Tensor) -> Tensor | None:
        """Return the output of the inference graph, or None if the modules have to run one by one."""
        if torch.compiler.is_compiling() or chain.unsupported_context() or chain.inspect_input(x):
            return None
        if x.dtype is not torch.float32 or torch.is_autocast_enabled("cpu") or _torch_compat.has_torch_dispatch_mode():
            return None
        backend = modules[0].backend
        kernels = registry.resolve(backend, x.device)
        prepare = kernels.prepare_inference_graph
        if prepare is None:
            return None
        layers = [layer for module in modules for layer in module.layers()]
        for module in modules:
            if module.backend != backend or not chain.has_no_hooks(module.__dict__):
                return None
        for layer in layers:
            if type(layer) is not FrozenConv or not chain.has_no_hooks(layer.__dict__):
                return None
        if torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (x, *[t for layer in layers for t in (layer.weight, layer.bias)])
        ):
            return None
        preference = registry.conv_preference()
        key = (x.shape, preference, *registry.selection_settings(kernels.name))
        prepared = self._graphs.get(key)
        if prepared is None or not prepared.is_current(layers):
            if any(t.dtype is not torch.float32 or t.device != x.device for one in layers for t in one.buffers()):
                return None
            if not all(layer.bias.is_contiguous() for layer in layers):  # a copy would miss in-place changes
                return None
            specs = tuple([module.as_block_spec() for module in modules])
            bound = prepare(specs, layers, tuple(x.shape), preference)
            if bound is None:
                return None
            graph = bound.graph
            packed = zip(layers, graph.selections, graph.problems, strict=True)
            entries = [layer.packed_entry(selection, problem) for layer, selection, problem in packed]
            prepared = _PreparedGraph(bound, layers, [layer.spec for layer in layers], entries, bound.biases)
            _cache_insert(self._graphs, key, prepared)
        return prepared.run(x)


class _PreparedGraph(NamedTuple):
    bound: Any
    layers: Sequence[FrozenConv]
    specs: list[UnitSpec]
    entries: list[PackedWeightEntry]
    biases: list[Tensor]

    def is_current(self, layers: Sequence[FrozenConv]) -> bool:
        return len(layers) == len(self.layers) and all(
            layer.spec is spec and layer.bias is bias and layer.is_current(entry)
            for layer, spec, entry, bias in zip(layers, self.specs, self.entries, self.biases, strict=True)
        )

    def run(self, input: Tensor) -> Tensor:
        for layer, selection in zip(self.layers, self.bound.graph.selections, strict=True):
            layer.last_selected = selection
        output: Tensor = self.bound.run(input)
        return output


def _cache_insert(cache: dict[Hashable, Any], key: Hashable, value: Any) -> None:
    with _cache_lock:
        while len(cache) >= _MAX_CACHE_ENTRIES:
            del cache[next(iter(cache))]
        cache[key] = value


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
