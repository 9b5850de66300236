"""Interface of a backend: the package that declares it (:class:`Backend`) and its loaded kernels (:class:`Kernels`)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor

from fused_res.dispatch.algorithm import Algorithm, Machine, Operation
from fused_res.dispatch.convolution import aten_forward
from fused_res.ops import OP_FAMILIES
from fused_res.ops.checks import ACTIVATIONS, Activation, relu_or_identity
from fused_res.ops.memory_format import conv_output_is_channels_last, to_memory_format


class Kernels(SimpleNamespace):
    """The loaded kernels of a backend, one attribute per operator of its op families.

    Attributes:
        name: name of the backend.
        op_families: operator families that it has kernels for.
        algorithms: convolution algorithms in order of priority, ATen's last.
        prepare_inference_graph: function that compiles consecutive blocks, with batch norms folded and weights packed,
            into one call (:func:`fused_res.backends.cpu.conv_bias_act.prepare_inference_graph`), or None.
        float32_bias: whether every inference convolution accepts a float32 bias with bfloat16 and float16 operands.
        activations: those that the kernels of batch norm have. Any other activation is computed in pieces
            (:mod:`fused_res.backends.pieces`).
        selects_per_call: whether the operator ``conv_bias_act`` itself selects the algorithm, from the sizes of each
            call.
    """

    name: str
    op_families: frozenset[str]
    algorithms: tuple[Algorithm, ...]
    prepare_inference_graph: Callable[..., Any] | None = None
    float32_bias: bool = False
    activations: tuple[Activation, ...] = ACTIVATIONS
    selects_per_call: bool = False

    def implementation(self, operation: Operation, algorithm: Algorithm) -> Callable[..., Any]:
        """Return the callable that implements an operation: the algorithm's own, or the operator that it names."""
        found = algorithm.implementations[operation]
        if not isinstance(found, str):
            return found
        operator: Callable[..., Any] = getattr(self, found)
        if operation != "inference":
            return operator
        return lambda input, weight, bias, residual, geometry, relu: operator(
            input, weight, bias, residual, *geometry, relu
        )

    def aten_conv_with_epilogue(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        relu: bool,
    ) -> Tensor:
        """Compute ``conv_bias_act``: ATen's convolution, then one in-place pass of the backend's norm kernel.

        The pass is a batch norm with mean 0 and variance 1, whose bias is the convolution's.
        """
        y, _ = aten_forward(input, weight, None, (tuple(stride), tuple(padding), tuple(dilation), groups), False)
        y = to_memory_format(y, conv_output_is_channels_last(input, weight))
        if bias is not None or residual is not None or relu:
            mean, var = _standard_statistics(y.shape[1], y.device)
            self.batch_norm_act_inference_(y, residual, None, None, bias, mean, var, 0.0, relu_or_identity(relu))
        return y


def _standard_statistics(channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a mean of 0 and a variance of 1 for each channel."""
    # A tensor that is created while a CUDA graph is captured must not outlive the graph.
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    create = _create_standard_statistics.__wrapped__ if capturing else _create_standard_statistics
    return create(channels, device)


@lru_cache(maxsize=64)
def _create_standard_statistics(channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.zeros(channels, device=device), torch.ones(channels, device=device)


class Backend(Protocol):
    """A package ``fused_res.backends.<name>``.

    Importing the package loads no kernels, so that ``unavailable()`` works where they cannot be loaded.
    """

    @property
    def OP_FAMILIES(self) -> tuple[str, ...]:
        """Operator families that the backend has kernels for, whether or not they can run on this machine."""

    def devices(self) -> tuple[str, ...] | None:
        """Return the device types that the kernels can run on, on this machine; None for every type."""

    def unavailable(self) -> str | None:
        """Return the reason why the backend cannot run on this machine, or None if it can."""

    def machine(self) -> Machine:
        """Return the properties of the processor that the selection depends on."""

    def load(self) -> Kernels:
        """Import the kernels and return them."""


def import_operators(package: str, op_families: Iterable[str]) -> dict[str, Callable[..., Any]]:
    """Return operator name -> function for a backend written in Python: one module per op family, named like it.

    Args:
        package: dotted name of the package that contains the modules.
        op_families: operator families to import.
    """
    modules = {op_family: importlib.import_module(f"{package}.{op_family}") for op_family in op_families}
    return {name: getattr(module, name) for op_family, module in modules.items() for name in OP_FAMILIES[op_family]}
