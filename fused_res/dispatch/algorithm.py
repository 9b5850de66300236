"""Which algorithm computes a convolution: the first of a backend's list that supports it and is not known to be slower.

Every backend declares an ordered tuple of :class:`Algorithm`; ATen's convolution ends each of them and supports
everything. :func:`select` walks the list, as oneDNN walks its list of convolution implementations
(https://uxlfoundation.github.io/oneDNN/dev_guide_convolution.html). What an algorithm cannot compute is a reason that
``supports`` returns; where it is slower than one further down is a :class:`Rule`, data with the measurement that
justifies it. Measuring (:mod:`fused_res.dispatch.tuning`) only reorders the list.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fused_res.ops.geometry import Geometry, conv_output_sizes

Operation = Literal["inference", "forward", "input_gradient", "weight_gradient"]
TRAINING: tuple[Operation, ...] = ("forward", "input_gradient", "weight_gradient")


class Machine(NamedTuple):
    """What algorithms depend on besides the problem.

    Args:
        isa: instruction set of the backend's kernels.
        onednn: dtypes that oneDNN computes in.
        caches: bytes of the L1 data cache, the L2 and the L3 of one core; 0 where unknown.
    """

    isa: str = ""
    onednn: tuple[torch.dtype, ...] = ()
    caches: tuple[int, ...] = ()


class Problem(NamedTuple):
    """One convolution, forward or one of its gradients, described by everything its algorithm may depend on.

    Args:
        operation: what is computed. ``"inference"`` has the epilogue bias, residual, ReLU; ``"forward"`` may return
            statistics of its output.
        input, weight: shapes ``(N, C, ...)`` and ``(K, C / groups, ...)`` of the forward convolution.
        stride, padding, dilation, groups: its geometry.
        dtype, device: of all operands; ``device`` is a type such as ``"cpu"``.
        channels_last: whether kernels read the input as rows of channels.
        weight_channels_last: likewise for the weight.
        packed: the weight is packed once and kept, instead of once a call.
        projection: the convolution is a block's shortcut.
        traced: a dispatch mode or a tensor subclass observes the call, and sees ATen's operators only.
        winograd: Winograd's algorithm is allowed.
        machine: the processor.
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
    packed: bool = False
    projection: bool = False
    traced: bool = False
    winograd: bool = True
    machine: Machine = Machine()

    @property
    def geometry(self) -> Geometry:
        return self.stride, self.padding, self.dilation, self.groups

    @property
    def output(self) -> tuple[int, ...]:
        """Spatial sizes of the convolution's output."""
        return conv_output_sizes(self.input[2:], self.weight[2:], self.stride, self.padding, self.dilation)

    @property
    def pointwise(self) -> bool:
        """Whether the kernel is 1x1 without padding."""
        return set(self.weight[2:]) == {1} and not any(self.padding)

    @property
    def symbolic(self) -> bool:
        """Whether sizes are symbols of a trace."""
        return any(isinstance(size, torch.SymInt) for size in self.input)


class Rule(NamedTuple):
    """Where an algorithm is slower than one further down the list.

    Args:
        beaten: the predicate.
        reason: the predicate in words, for :func:`print` of a plan.
        measured: what was measured, on which processor; or the count of bytes and FLOPs.
        operations: those that the rule is about; empty for all.
    """

    beaten: Callable[[Problem], bool]
    reason: str
    measured: str
    operations: tuple[Operation, ...] = ()


class PackedWeight(NamedTuple):
    """A weight in the form that one algorithm reads."""

    tensor: Tensor
    shape: tuple[int, ...]  # of the weight that it was made from


@dataclass(frozen=True, eq=False)
class Algorithm:
    """One implementation of convolutions.

    Args:
        name: the algorithm's name in the literature, such as ``"winograd_f4x4"``.
        supports: the reason why a problem cannot be computed, or None.
        serves: for each operation the callable, or the name of the backend's operator of :mod:`fused_res.ops`.
            *inference* takes ``(input, weight, bias, residual, geometry, relu)``, with a :class:`PackedWeight` where it
            ``packs``; *forward* and the gradients are as in :mod:`fused_res.dispatch.convolution`, and one callable
            serves both gradients; those of ``fused`` ones are ``conv_bn_stats``, ``conv_dgrad`` and ``conv_wgrad``.
        rules: where it is slower than an algorithm further down.
        describe: the advantage, in words.
        fused: normalises its input as it loads it, and its gradients form the norm's gradient as they load.
        statistics: its forward returns partial statistics of the output.
        niche: for few problems; that it does not apply is no reason worth naming.
        compact: a strided 1x1's input gradient comes for the pixels that were read, without the zeros in between.
        pack, pack_key: from the problem, the input and the weight to the packed weight; and what that depends on.
        packs: whether ``inference`` needs a packed weight always, where the caller keeps it, or never.
    """

    name: str
    supports: Callable[[Problem], str | None]
    serves: Mapping[Operation, Callable[..., Any] | str]
    rules: tuple[Rule, ...] = ()
    describe: Callable[[Problem], str] = field(default=lambda problem: "")
    fused: bool = False
    statistics: bool = False
    niche: bool = False
    compact: bool = False
    pack: Callable[[Problem, Tensor, Tensor], Tensor] | None = None
    pack_key: Callable[[Problem], Hashable] = field(default=lambda problem: None)
    packs: Literal["always", "kept", "never"] = "never"

    def __repr__(self) -> str:
        return f"Algorithm({self.name!r})"
