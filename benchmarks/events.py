"""What a recorder records: launches (:class:`Event`), their passes over tensors, and their matrix products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Gemm:
    """The matrix product of one launch, ``groups`` times ``m x n x k``; if not ``pointwise``, of an im2col view."""

    operation: str  # "forward", "input_gradient", "weight_gradient" or "gemm"
    m: int
    n: int
    k: int
    groups: int = 1
    pointwise: bool = True
    channels: int = 0  # of one filter tap, for an im2col view

    @property
    def flops(self) -> float:
        return 2.0 * self.groups * self.m * self.n * self.k


@dataclass(frozen=True)
class Touch:
    """One pass of a launch over a tensor: identity of the tensor's storage and number of bytes."""

    tensor: int
    bytes: int


@dataclass
class Event:
    """One launch of a kernel of ours, or one call of a PyTorch operator.

    Args:
        operator: the operator that launched the kernel.
        kernel: the kernel's name; of a PyTorch operator, its name.
        reads, writes: passes over tensors; of our kernels all are in ``reads``, since arguments have no direction.
        gemm: the matrix product that the launch computes, if any.
        grid, threads, shared: launch configuration; shared memory in bytes. Unknown (0) for operators of PyTorch.
        variant: identifies the compiled kernel, for its resource usage.
        tile: rows, columns and depth of a GEMM kernel's block.
        handle: what :func:`benchmarks.resources.measure` needs to compile the kernel.
        formed: whether a GEMM kernel forms its operands, rows and columns, in a prologue.
        statistics: whether a GEMM kernel computes per-channel sums of its output.
    """

    operator: str
    kernel: str
    reads: list[Touch]
    writes: list[Touch] = field(default_factory=list)
    gemm: Gemm | None = None
    grid: tuple[int, ...] = ()
    threads: int = 0
    shared: int = 0
    variant: str = ""
    tile: tuple[int, int, int] | None = None
    handle: Any = None
    formed: tuple[bool, bool] = (False, False)
    statistics: bool = False

    @property
    def backend(self) -> str:
        return self.operator.partition("::")[0]

    @property
    def blocks(self) -> int:
        return math.prod(self.grid)


def convolution_gemm(
    operation: str, x: Sequence[int], weight: Sequence[int], z: Sequence[int], groups: int = 1
) -> Gemm:
    """Return the implicit GEMM of a convolution or of one of its gradients.

    Args:
        operation: ``"forward"``, ``"input_gradient"`` or ``"weight_gradient"``.
        x: input shape ``(N, C, H, W)``.
        weight: weight shape ``(K, C / groups, R, S)``.
        z: output shape ``(N, K, P, Q)``.
        groups: number of convolution groups.
    """
    taps, pixels = math.prod(weight[2:]), z[0] * math.prod(z[2:])
    outputs, inputs = weight[0] // groups, weight[1]
    pointwise = taps == 1
    if operation == "forward":
        return Gemm(operation, pixels, outputs, inputs * taps, groups, pointwise, inputs)
    if operation == "weight_gradient":
        return Gemm(operation, outputs, inputs * taps, pixels, groups, pointwise, inputs)
    # A strided gradient is computed per residue class of the stride: the same multiplications as the forward.
    return Gemm(
        operation, x[0] * math.prod(x[2:]), inputs, _strided_depth(x, weight, z, outputs), groups, pointwise, outputs
    )


def _strided_depth(x: Sequence[int], weight: Sequence[int], z: Sequence[int], outputs: int) -> int:
    taps, pixels_in, pixels_out = math.prod(weight[2:]), math.prod(x[2:]), math.prod(z[2:])
    return max(1, outputs * taps * pixels_out // pixels_in)


def library_gemm(name: str, args: Sequence[Any]) -> Gemm | None:
    operands = {"mm": args[:2], "addmm": args[1:3]}.get(name)
    if operands is None:
        return None
    a, b = operands
    return Gemm("gemm", a.shape[0], b.shape[1], a.shape[1])


def operator_gemm(name: str, arguments: Sequence[Any], returned: Any) -> tuple[Gemm | None, tuple[Tensor, int] | None]:
    first = returned[0] if isinstance(returned, (tuple, list)) else returned
    if name in ("conv_bias_act", "conv_bn_stats"):
        x, weight = arguments[:2]
        stride, groups = (arguments[4], arguments[7]) if name == "conv_bias_act" else (arguments[5], arguments[8])
        gemm = convolution_gemm("forward", tuple(x.shape), tuple(weight.shape), tuple(first.shape), groups)
        strided = gemm.pointwise and max(stride) > 1
        return gemm, (x, math.prod(stride)) if strided else None
    if name == "conv_dgrad":
        dz, weight = arguments[0], arguments[7]
        shape = tuple(first.shape)
        return convolution_gemm("input_gradient", shape, tuple(weight.shape), tuple(dz.shape)), None
    if name == "conv_wgrad":
        z, weight, x, stride = arguments[1], arguments[7], arguments[8], arguments[11]
        gemm = convolution_gemm("weight_gradient", tuple(x.shape), tuple(weight.shape), tuple(z.shape))
        return gemm, (x, math.prod(stride)) if max(stride) > 1 else None
    return None, None
