"""What :func:`fused_res.freeze` puts in the place of trained layers: convolutions that hold their batch norm."""

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
from fused_res.dispatch import PackedWeight, Problem, Selected
from fused_res.nn import chain
from fused_res.nn.configured import Unscriptable
from fused_res.spec import BlockSpec, PoolSpec, UnitSpec


class Kept(NamedTuple):
    """A packed weight, and what it was made of."""

    key: Hashable
    source: Tensor
    version: int
    tensor: Tensor


#: Packed weights that a layer keeps, and programs that modules in a row do: the form of some depends on the input's
#: shape, and a server's batch varies. Each weight takes as much memory as the weight itself, a transformed one
#: (Winograd) four times as much.
_SHAPES = 4
_packing = threading.Lock()


class Frozen(Unscriptable, nn.Module):
    """What has no training mode. ``origin``: the class, or classes, that it was made from."""

    def __init__(self, backend: str, origin: str) -> None:
        super().__init__()
        self.backend = backend
        self.origin = origin
        self.training = False

    def train(self: Any, mode: bool = True) -> Any:
        if mode:
            raise RuntimeError("frozen for inference, its batch norms are folded away; train the original model")
        return nn.Module.train(self, False)


class FrozenConv(Frozen):
    """``activation(conv(x, weight) + bias [+ residual])``, with ``weight`` and ``bias`` as buffers.

    Args:
        weight, bias: a convolution's, with the batch norm behind it folded in.
        spec: how it is applied.
        backend: see :func:`fused_res.functional.conv_bias_act`.
        pool: the max pooling behind it, of a stem.
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
        self._packed: dict[Hashable, Kept] = {}
        self._programs = Programs()
        #: The algorithm that ran last, for people to read.
        self.kernel: Selected | None = None

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        spec = self.spec
        compiling = torch.compiler.is_compiling()
        leaves = torch.compiler.is_exporting() or _torch_compat.is_fx_proxy(input)
        if leaves or (not compiling and _torch_compat.is_jit_tracing()):
            return self._pooled(self._plain(input, residual))
        if self.pool is not None:
            output = self._programs.run((self,), input)
            if output is not None:
                return output
        self._check(input)
        keep = None if compiling or type(input) is not Tensor else self._operand
        output = functional.packed_conv_bias_act(
            input, self.weight, self.bias, residual, *spec.geometry, spec.activation, self.backend, keep
        )
        return self._pooled(output)

    def _check(self, input: Tensor) -> None:
        weight, groups = self.weight, self.spec.groups
        if input.dim() == 4 and input.shape[1] != weight.shape[1] * groups:
            raise ValueError(
                f"input must have the {weight.shape[1] * groups} channels that this layer was frozen for, got"
                f" {tuple(input.shape)}"
            )
        if input.dtype != weight.dtype and functional.autocast_dtype(input) is None:
            raise TypeError(f"input must be {weight.dtype}, which this layer was frozen for, got {input.dtype}")

    def _pooled(self, output: Tensor) -> Tensor:
        pool = self.pool
        return output if pool is None else F.max_pool2d(output, pool.kernel_size, pool.stride, pool.padding)

    def layers(self) -> tuple[Any, ...]:
        return (self,)

    def block(self) -> BlockSpec:
        return _block((self.spec,), "none", self.pool)

    def _plain(self, input: Tensor, residual: Tensor | None) -> Tensor:
        """For graphs that leave this process: nothing but ATen."""
        spec = self.spec
        y = F.conv2d(input, self.weight, self.bias, spec.stride, spec.padding, spec.dilation, spec.groups)
        if residual is not None:
            y = y + residual.to(y.dtype)
        return F.relu(y) if spec.relu else y

    def _operand(self, selected: Selected, problem: Problem, input: Tensor) -> PackedWeight | Tensor:
        self.kernel = selected
        if selected.algorithm.pack is None:
            return self.weight
        return PackedWeight(self.keep(selected, problem, input).tensor, problem.weight)

    def keep(self, selected: Selected, problem: Problem, input: Tensor) -> Kept:
        """The packed weight that an algorithm reads for a problem, made once as long as the weight is the same."""
        key = selected.algorithm.pack_key(problem)
        found = self._packed.get(key)
        if found is not None and self.has(found):
            return found
        assert selected.algorithm.pack is not None
        kept = Kept(key, self.weight, _version(self.weight), selected.algorithm.pack(problem, input, self.weight))
        _remember(self._packed, key, kept)
        return kept

    def has(self, kept: Kept) -> bool:
        """Whether it is kept still, and the weight the same: :meth:`to` and others replace it, or write to it."""
        source = kept.source
        return (
            self._buffers["weight"] is source
            and self._packed.get(kept.key) is kept
            and kept.version == _version(source)
        )

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        self._packed.clear()
        return super()._apply(*arguments, **options)

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        self._packed.clear()
        super()._load_from_state_dict(*arguments, **options)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": {}, "_programs": Programs(), "kernel": None}

    def extra_repr(self) -> str:
        outputs, inputs, *kernel = self.weight.shape
        spec = self.spec
        return (
            f"{inputs * spec.groups}, {outputs}, kernel_size={tuple(kernel)}, stride={spec.stride},"
            f" padding={spec.padding}, dilation={spec.dilation}, groups={spec.groups}, activation={spec.activation!r}"
        )


class FrozenBlock(Frozen):
    """A residual block of :class:`FrozenConv`: ``conv1, conv2, ...``, the last of which adds, and ``downsample``."""

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
        self._names = tuple(f"conv{index}" for index in range(1, len(units) + 1))
        self._programs = Programs()

    def layers(self) -> tuple[Any, ...]:
        """The chain's, then the projection."""
        children = self._modules
        chain = tuple([children[name] for name in self._names])
        return chain if self.downsample is None else (*chain, self.downsample)

    def block(self) -> BlockSpec:
        layers = self.layers()
        shortcut = layers[-1].spec if self.downsample is not None else "identity" if self.identity else "none"
        return _block(tuple([layer.spec for layer in layers[: len(self._names)]]), shortcut, None)

    def forward(self, x: Tensor) -> Tensor:
        output = self._programs.run((self,), x)
        if output is not None:
            return output
        children: dict[str, Any] = self._modules
        *first, last = self._names
        y = x
        for name in first:
            y = children[name](y)
        residual = x if self.identity else None
        if self.downsample is not None:
            residual = self.downsample(x)
        return children[last](y, residual)


class FrozenStage(nn.Sequential):
    """Blocks in a row, which may run as one program; else one after the other, as in any nn.Sequential."""

    def __init__(self, *blocks: FrozenBlock) -> None:
        super().__init__(*blocks)
        self._programs = Programs()

    def forward(self, x: Tensor) -> Tensor:
        blocks = tuple(self._modules.values())
        output = self._programs.run(blocks, x) if all(type(block) is FrozenBlock for block in blocks) else None
        return super().forward(x) if output is None else output


_block = cache(BlockSpec)


class Programs:
    """Frozen modules in a row as one call of the backend, which prepares it once for inputs of a kind."""

    def __init__(self) -> None:
        self._prepared: dict[Hashable, Any] = {}

    def __reduce__(self) -> tuple[type[Programs], tuple[()]]:
        return Programs, ()  # with the module's weights, packed or not, a copy has nothing in common

    def run(self, modules: Sequence[Any], x: Tensor) -> Tensor | None:
        """None: the modules have to run one by one."""
        if torch.compiler.is_compiling() or chain.situation() or chain.inspect_input(x):
            return None
        if x.dtype is not torch.float32 or torch.is_autocast_enabled("cpu") or _torch_compat.is_observed():
            return None
        backend = modules[0].backend
        kernels = registry.resolve(backend, x.device)
        prepare = kernels.prepare_blocks
        if prepare is None:
            return None
        layers = [layer for module in modules for layer in module.layers()]
        for module in modules:
            if module.backend != backend or not chain.untouched(module.__dict__):
                return None
        for layer in layers:
            if type(layer) is not FrozenConv or not chain.untouched(layer.__dict__):
                return None
        if torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (x, *[t for layer in layers for t in (layer.weight, layer.bias)])
        ):
            return None
        preference = registry.convolution(backend)
        key = (x.shape, preference, *registry.settings(kernels.name))
        prepared = self._prepared.get(key)
        if prepared is None or not prepared.current(layers):
            prepared = prepare(tuple([module.block() for module in modules]), layers, x, preference)
            if prepared is None:
                return None
            _remember(self._prepared, key, prepared)
        return prepared.run(x)


def _remember(memory: dict[Hashable, Any], key: Hashable, value: Any) -> None:
    with _packing:
        while len(memory) >= _SHAPES:
            del memory[next(iter(memory))]
        memory[key] = value


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
