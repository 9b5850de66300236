"""What :func:`fused_res.freeze` puts in the place of trained layers: convolutions that hold their batch norm."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_res import functional
from fused_res.backends.registry import Backend
from fused_res.spec import UnitSpec


class _Packed(NamedTuple):
    source: Tensor
    version: int
    tensor: Tensor


#: Shapes of input for which a layer keeps a packed weight. A server's batch varies; each takes as much memory as the
#: weight itself.
_SHAPES = 4
_packing = threading.Lock()


class Frozen(nn.Module):
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
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, spec: UnitSpec, backend: str = "auto", origin: str = "") -> None:
        super().__init__(backend, origin)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.spec = spec
        self._packed: dict[tuple[Any, ...], _Packed] = {}

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        spec = self.spec
        compiling = torch.compiler.is_compiling()
        if torch.compiler.is_exporting() or (not compiling and torch._C._get_tracing_state() is not None):
            return self._plain(input, residual)
        return functional.packed_conv_bias_act(
            input,
            self.weight,
            self.bias,
            residual,
            spec.stride,
            spec.padding,
            spec.dilation,
            spec.groups,
            spec.activation,
            self.backend,
            None if compiling or type(input) is not Tensor else self._pack,
        )

    def _plain(self, input: Tensor, residual: Tensor | None) -> Tensor:
        """For graphs that leave this process: nothing but ATen."""
        spec = self.spec
        y = F.conv2d(input, self.weight, self.bias, spec.stride, spec.padding, spec.dilation, spec.groups)
        if residual is not None:
            y = y + residual.to(y.dtype)
        return F.relu(y) if spec.relu else y

    def _pack(self, kernels: Backend, input: Tensor, weight: Tensor, *how: Any) -> Tensor:
        pack: Callable[..., Tensor | None] | None = getattr(kernels, "pack_weight", None)
        if pack is None:
            return weight
        key = (kernels.name, input.shape, input.dtype, torch.get_num_threads())
        source, version = self.weight, _version(self.weight)
        found = self._packed.get(key)
        # The buffer may have been replaced (.to, functional_call) or written to (load_state_dict).
        if found is not None and found.source is source and found.version == version:
            return found.tensor
        packed = pack(input, weight, *how)
        if packed is None:
            return weight
        with _packing:
            while len(self._packed) >= _SHAPES:
                del self._packed[next(iter(self._packed))]
            self._packed[key] = _Packed(source, version, packed)
        return packed

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        self._packed.clear()
        return super()._apply(*arguments, **options)

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        self._packed.clear()
        super()._load_from_state_dict(*arguments, **options)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": {}}

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

    def forward(self, x: Tensor) -> Tensor:
        children: dict[str, Any] = self._modules
        *first, last = self._names
        y = x
        for name in first:
            y = children[name](y)
        residual = x if self.identity else None
        if self.downsample is not None:
            residual = self.downsample(x)
        return children[last](y, residual)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
