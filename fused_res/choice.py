"""Who computes a convolution: ATen (cuDNN, oneDNN), or a backend's kernel, fused with the norms around it.

That cuDNN is ahead outside of 1x1 kernels is what others have published, not what was measured with these kernels.
On the CPU the kernels are our own without fusion: they read and write what ATen's would, and bring statistics; which
of them runs depends on the batch, and is said in :mod:`fused_res.backends.cpu.choice`.

The static choice looks at what does not change from batch to batch, so that a compiled graph keeps it. Where it was
measured (:mod:`fused_res.tune`), the measurement counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from fused_res.backends import registry
from fused_res.spec import UnitSpec

#: Fewer channels leave most of a matrix instruction idle.
_LEAST_CHANNELS = 16
_HALF = (torch.bfloat16, torch.float16)

_NAMED = "the backend was asked for by name, or FUSED_RES_CONVOLUTION says so"
_SAYS_SO = "FUSED_RES_CONVOLUTION or backends.use() says so"
_TOO_FEW = "its channels do not fill matrix instructions and 16-byte loads"


class Choice(NamedTuple):
    """``"aten"``, ``"fused"`` or, with the operands that ATen's have, ``"own"`` for each direction, and why."""

    forward: str = "aten"
    backward: str = "aten"
    reason: str = "nothing else was asked for"

    @property
    def fused(self) -> bool:
        return self.forward == "fused"

    @property
    def kernels(self) -> str:
        if self.forward == self.backward:
            return {"aten": "ATen"}.get(self.forward, self.forward)
        return "fused forward, ATen backward" if self.forward == "fused" else "ATen forward, fused backward"


def possible(
    spec: UnitSpec, weight: tuple[int, ...], dtype: torch.dtype, channels_last: bool, projection: bool, backend: str
) -> Choice:
    """Where the backend's kernels can stand in for ATen, at whatever speed."""
    stems = registry.stems(backend)
    if not {"conv_bn_stats", "conv_dgrad", "conv_wgrad", "batch_norm_sync"} <= stems:
        return Choice(reason=f"backend {backend!r} has no fused convolution")
    if len(weight) != 4 or not channels_last:
        return Choice(reason="fused convolutions read images in channels_last memory")
    if dtype == torch.float64 and backend != "reference":
        return Choice(reason="float64 has no fused convolution")
    if spec.groups > 1:
        return Choice(reason="grouped convolutions are not fused")
    if weight[0] == 1:
        return Choice(reason="a single channel has no rows of channels")
    pointwise = weight[2:] == (1, 1) and spec.padding == (0, 0)
    if not pointwise:
        return Choice("fused", "aten", "the fused backward is for 1x1 convolutions")
    # The fused input gradient knows no stride; a projection's is added where its pixels are.
    if spec.stride != (1, 1) and not projection:
        return Choice("fused", "aten", "the fused backward of a chain has stride 1")
    return Choice("fused", "fused", "1x1: normalises as it loads, brings the statistics with it")


@lru_cache(maxsize=4096)
def choose(
    spec: UnitSpec,
    weight: tuple[int, ...],
    dtype: torch.dtype,
    channels_last: bool,
    projection: bool,
    backend: str,
    preference: str,
) -> Choice:
    """The static choice; ``preference`` is ``"planned"``, or ``"aten"`` or ``"fused"`` wherever that is possible."""
    if preference == "aten":
        return Choice(reason=_SAYS_SO)
    if backend == "cpu":
        return _choose_cpu(spec, weight, dtype, channels_last)
    choice = possible(spec, weight, dtype, channels_last, projection, backend)
    if preference == "fused" or choice.forward == "aten":
        return choice
    if backend == "reference":
        return Choice(reason="plain PyTorch has nothing to gain")
    if choice.backward == "aten":
        return Choice(reason="cuDNN's kernels are ahead, and their backward needs the activation in memory")
    if dtype not in _HALF:
        return Choice(reason=f"{_name(dtype)} gains less from fusion than cuDNN's kernels are ahead")
    return choice if _fills(weight) else Choice(reason=_TOO_FEW)


def _choose_cpu(spec: UnitSpec, weight: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> Choice:
    if dtype != torch.float32 or not channels_last or len(weight) != 4:
        return Choice(reason="our own convolutions are for float32 images in channels_last memory")
    if spec.groups > 1:
        return Choice(reason="grouped")
    if has_winograd(weight, spec.stride, spec.dilation):
        return Choice("own", "own", "Winograd where there are images enough and it is not switched off, else as ATen")
    return Choice("own", "own", "direct, each where it measured faster than ATen's")


def has_winograd(weight: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]) -> bool:
    """Whether the CPU's Winograd kernels compute this convolution."""
    return weight[2:] == (3, 3) and stride in ((1, 1), (2, 2)) and dilation == (1, 1)


def _fills(weight: tuple[int, ...]) -> bool:
    return min(weight[:2]) >= _LEAST_CHANNELS and not weight[0] % 8 and not weight[1] % 8


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@lru_cache(maxsize=4096)
def choose_inference(
    weight: tuple[int, ...],
    padding: tuple[int, ...],
    groups: int,
    dtype: torch.dtype,
    channels_last: bool,
    preference: str,
) -> Choice:
    """Likewise for a convolution with its epilogue (``conv_bias_act``) on a GPU, where cuDNN has one, too."""
    if preference == "aten":
        return Choice(reason=_SAYS_SO)
    if len(weight) != 4:
        return Choice(reason="fused convolutions are for images")
    if dtype == torch.float64:
        return Choice(reason="float64 has no fused convolution")
    fused = Choice("fused", "fused", "1x1: bias, residual and ReLU cost no pass of their own")
    if preference == "fused":
        return fused._replace(reason=_NAMED)
    if not channels_last:
        return Choice(reason="fused convolutions read channels_last memory")
    if weight[2:] != (1, 1) or any(padding) or groups > 1:
        return Choice(reason="cuDNN's kernels are ahead")
    if dtype not in _HALF:
        return Choice(reason=f"cuDNN's kernels are ahead in {_name(dtype)}")
    if not _fills(weight):
        return Choice(reason=_TOO_FEW)
    return fused


def describe(choices: Sequence[tuple[tuple[int, ...], Choice]]) -> str:
    """Who computes the convolutions with these weights' shapes, and why, each answer once."""
    sizes: dict[tuple[str, str], list[str]] = {}
    for weight, choice in choices:
        kind = sizes.setdefault((choice.kernels, choice.reason), [])
        name = "x".join(map(str, weight[2:]))
        if name not in kind:
            kind.append(name)
    return "; ".join(f"{', '.join(kind)} {kernels} ({reason})" for (kernels, reason), kind in sizes.items())
