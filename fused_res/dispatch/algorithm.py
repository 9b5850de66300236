"""Descriptions of convolution problems, of the machine, and of the algorithms that a backend offers for them.

Every backend declares an ordered tuple of :class:`Algorithm`. Its last entry is ATen's convolution, which supports
everything. :func:`fused_res.dispatch.select` returns the first algorithm that supports a problem and that no heuristic
excludes. Support and heuristics are separate: ``Algorithm.unsupported_reason`` returns the reason why a problem cannot
be computed, and a :class:`Rule` is a heuristic, a predicate for problems where an algorithm is slower than a later one,
together with the measurement that justifies it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fused_res.ops.geometry import Geometry, conv_output_sizes

Operation = Literal["inference", "forward", "input_gradient", "weight_gradient"]
TRAINING_OPERATIONS: tuple[Operation, ...] = ("forward", "input_gradient", "weight_gradient")


class Machine(NamedTuple):
    """Properties of the processor that the selection of an algorithm depends on.

    Args:
        isa: instruction set of the backend's kernels, such as ``"avx2"``, or a GPU's architecture, such as ``"sm_90"``.
        onednn_dtypes: dtypes for which oneDNN has native kernels.
        cache_sizes: bytes of a core's L1 data cache, of its L2, and of the L3 that it uses; empty if unknown.
    """

    isa: str = ""
    onednn_dtypes: tuple[torch.dtype, ...] = ()
    cache_sizes: tuple[int, ...] = ()


class Problem(NamedTuple):
    """One convolution, forward or one of its gradients, described by everything that its selection may depend on.

    Args:
        operation: the computation. ``"inference"`` has an epilogue of bias, residual and ReLU; ``"forward"`` may also
            return partial statistics of its output.
        input: shape ``(N, C, ...)`` of the forward convolution's input.
        weight: shape ``(K, C / groups, ...)`` of the weight.
        stride, padding, dilation: geometry, one integer per spatial dimension.
        groups: number of convolution groups.
        dtype: dtype of all operands.
        device: device type of all operands, such as ``"cpu"``.
        channels_last: whether the input is in channels_last memory.
        weight_channels_last: whether the weight is in channels_last memory.
        prepacked: whether the caller packs the weight once and caches it, instead of packing it in every call.
        projection: whether the convolution is a block's projection shortcut.
        residual: whether the epilogue adds an operand: the residual in ``"inference"``, the gradient of an identity
            shortcut in ``"input_gradient"``. Without meaning for other operations.
        under_torch_dispatch: whether a torch_dispatch mode or a tensor subclass intercepts the call. Only ATen's
            operators are visible to it.
        allow_winograd: whether Winograd algorithms may be selected.
        relu_norms: whether the activations of the preceding and the following norm are ReLU or identity, the only ones
            of the operand prologues.
        machine: properties of the processor.
    """

    operation: Operation
    input: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    dtype: torch.dtype
    device: str
    channels_last: bool
    weight_channels_last: bool = False
    prepacked: bool = False
    projection: bool = False
    residual: bool = False
    under_torch_dispatch: bool = False
    allow_winograd: bool = True
    machine: Machine = Machine()
    relu_norms: bool = True

    @property
    def geometry(self) -> Geometry:
        """Stride, padding, dilation and groups."""
        return self.stride, self.padding, self.dilation, self.groups

    @property
    def output_size(self) -> tuple[int, ...]:
        """Spatial sizes of the forward convolution's output."""
        return conv_output_sizes(self.input[2:], self.weight[2:], self.stride, self.padding, self.dilation)

    @property
    def pointwise(self) -> bool:
        """Whether the kernel is 1x1 without padding."""
        return set(self.weight[2:]) == {1} and not any(self.padding)

    @property
    def symbolic(self) -> bool:
        """Whether the input has symbolic sizes, during tracing."""
        return any(isinstance(size, torch.SymInt) for size in self.input)


class Rule(NamedTuple):
    """A heuristic: the problems for which an algorithm is slower than a later one of the list.

    Args:
        is_slower: predicate over problems.
        reason: human-readable form of the predicate, for a printed plan.
        measurement: the evidence: times and processor, or an estimate from bytes and FLOPs.
        operations: operations that the rule applies to; empty for all.
    """

    is_slower: Callable[[Problem], bool]
    reason: str
    measurement: str
    operations: tuple[Operation, ...] = ()


class PackedWeight(NamedTuple):
    """A weight in the packed layout of one algorithm.

    Args:
        tensor: the packed weight.
        shape: shape ``(K, C / groups, ...)`` of the original weight.
    """

    tensor: Tensor
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Algorithm:
    """One convolution algorithm of a backend.

    Args:
        name: short name for printed plans, such as ``"winograd_f4x4"``.
        unsupported_reason: function that returns the reason why a problem cannot be computed, or None.
        implementations: operation -> callable, or the name of an operator of :mod:`fused_res.ops`. *inference* is
            called with ``(input, weight, bias, residual, geometry, relu)``, where the weight may be a
            :class:`PackedWeight` (see ``weight_packing``). *forward* and the gradients have the signatures of
            :func:`fused_res.dispatch.convolution.aten_forward` and ``aten_backward``, with one callable for both
            gradients. Those of a ``fused`` algorithm are the operators ``conv_bn_stats``, ``conv_dgrad`` and
            ``conv_wgrad``, or ``conv_backward`` for both gradients (:attr:`joint_gradients`); that of an algorithm for
            the addition of a shortcut's gradient is ``conv_dgrad``.
        rules: heuristics that exclude the algorithm where a later one is faster.
        selection_reason: function that returns why the algorithm is fast for a problem, as text for a printed plan;
            "" for no text.
        fused: whether *forward* has the preceding norm and ReLU as operand prologue, and the gradients have the
            backward of the following norm as operand prologue.
        separate_norm_backward: whether the backward of the following norm is nevertheless a pass of its own.
        returns_partials: whether *forward* returns partial statistics of the output.
        special_case: whether the algorithm is for few problems only, so that a plan does not report why it was passed
            over.
        compact_input_gradient: whether the input gradient of a strided 1x1 convolution is compact: of the output's
            size, for the strided input positions only, without zero stuffing.
        packs_master_weight: whether *forward* and the gradients accept a float32 weight with inputs of another dtype,
            and return the weight's gradient in the weight's dtype.
        pack: function that packs a weight, given the problem and the weight.
        pack_key: function that returns, for a problem, the properties that the packed weight depends on, as a cache
            key.
        weight_packing: when *inference* needs a packed weight: ``"always"``, only if the caller caches it
            (``"cached"``), or ``"never"``.
    """

    name: str
    unsupported_reason: Callable[[Problem], str | None]
    implementations: Mapping[Operation, Callable[..., Any] | str]
    rules: tuple[Rule, ...] = ()
    selection_reason: Callable[[Problem], str] = field(default=lambda problem: "")
    fused: bool = False
    separate_norm_backward: bool = False
    returns_partials: bool = False
    special_case: bool = False
    compact_input_gradient: bool = False
    packs_master_weight: bool = False
    pack: Callable[[Problem, Tensor], Tensor] | None = None
    pack_key: Callable[[Problem], Hashable] = field(default=lambda problem: None)
    weight_packing: Literal["always", "cached", "never"] = "never"

    @property
    def joint_gradients(self) -> bool:
        """Whether one operator computes both gradients of a fused convolution."""
        return self.implementations.get("weight_gradient") == "conv_backward"

    @property
    def runs_in_graphs(self) -> bool:
        """Whether an inference graph can contain it: only the backend's own kernels require a packed weight."""
        return self.weight_packing == "always"

    def __repr__(self) -> str:
        return f"Algorithm({self.name!r})"
