"""Measures, on first use, whether a convolution is faster fused or as ATen's with passes of its own around it.

Asked for by ``fuse(..., tune=True)`` or ``torch.backends.cudnn.benchmark``. What was measured replaces the static
choice that :func:`fused_res.plan.plan` would take, and nothing else. Nothing is measured while a CUDA graph is
captured, while something compiles, or under deterministic algorithms, because two runs may decide differently.
"""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_res import convolution
from fused_res.backends.registry import Backend
from fused_res.choice import Choice, choose_inference, possible
from fused_res.layout import convolved, is_channels_last
from fused_res.spec import BlockSpec, UnitSpec

_WARM_UP = 2
_REPETITIONS = 5


class _Case(NamedTuple):
    """All that the speed of a unit's kernels depends on."""

    spec: UnitSpec
    input: tuple[int, ...]
    weight: tuple[int, ...]
    through: bool  # a norm, between the input and the convolution
    training: bool
    projection: bool
    dtype: torch.dtype
    device: str
    backend: str


class _InferenceCase(NamedTuple):
    spec: tuple[object, ...]
    input: tuple[int, ...]
    weight: tuple[int, ...]
    residual: bool
    dtype: torch.dtype
    device: str
    backend: str


_measured: dict[_Case | _InferenceCase, Choice] = {}
_lock = threading.Lock()


def wanted(input: Tensor, tune: bool, preference: str) -> bool:
    """Whether to take measured choices for a block with this input."""
    return (tune or (torch.backends.cudnn.benchmark and input.is_cuda)) and preference == "planned"


def choices(
    spec: BlockSpec, input: Tensor, tensors: Sequence[Tensor | None], training: Sequence[bool], backend: Backend
) -> tuple[Choice | None, ...]:
    """The measured choice for every convolution, the projection's last; None where the static one has to do."""
    # The CPU's rule is measured, and knows the shapes.
    if not is_channels_last(input) or backend.name == "cpu":
        return (None,) * len(spec.convolutions)
    found = []
    shape: tuple[int, ...] = tuple(input.shape)
    device = torch.cuda.get_device_name(input.device) if input.is_cuda else input.device.type
    for index, unit in enumerate(spec.convolutions):
        weight = tensors[6 * index]
        assert weight is not None
        projection = unit is spec.projection
        read = tuple(input.shape) if projection else shape
        case = _Case(
            unit, read, tuple(weight.shape), index > 0 and not projection, training[index], projection, input.dtype,
            device, backend.name,
        )  # fmt: skip
        found.append(_choice(case, input.device, backend))
        if not projection:
            shape = convolved(input.new_empty(read, device="meta"), weight, unit.stride, unit.padding, unit.dilation)
    return tuple(found)


def measured(backend: str) -> dict[tuple[UnitSpec, tuple[int, ...]], Choice]:
    """What was measured last for each unit and weight's shape, for people to read."""
    return {
        (case.spec, case.weight): choice
        for case, choice in _measured.items()
        if isinstance(case, _Case) and case.backend == backend
    }


def inference_choice(
    input: Tensor, weight: Tensor, backend: Backend, arguments: tuple[Any, ...], preference: str
) -> Choice:
    """Who computes ``conv_bias_act`` on a GPU: measured if that was asked for, else static."""
    bias, residual, stride, padding, dilation, groups, relu = arguments
    static = choose_inference.__wrapped__ if torch.compiler.is_compiling() else choose_inference
    shape = tuple(weight.shape)
    made = static(shape, padding, groups, input.dtype, is_channels_last(input), preference)
    if torch.compiler.is_compiling() or not wanted(input, False, preference) or not is_channels_last(input):
        return made
    spec = bias is None, stride, padding, dilation, groups, relu
    device = torch.cuda.get_device_name(input.device)
    case = _InferenceCase(spec, tuple(input.shape), shape, residual is not None, input.dtype, device, backend.name)
    if case not in _measured and _may_measure(input.device):
        ours = _seconds(lambda: backend.conv_bias_act(input, weight, *arguments), input.device)
        aten = _seconds(lambda: convolution.bias_act(input, weight, *arguments), input.device)
        reason = f"measured: fused {1e6 * ours:.0f} us, aten {1e6 * aten:.0f} us"
        _measured[case] = Choice(*("fused" if ours < aten else "aten",) * 2, reason)
    return _measured.get(case, made)


def _choice(case: _Case, device: torch.device, backend: Backend) -> Choice | None:
    if case not in _measured and _may_measure(device):
        could = possible(case.spec, case.weight, case.dtype, True, case.projection, case.backend)
        with _lock:
            if case not in _measured:
                _measured[case] = could if could.forward == "aten" else _measure(case, could, device, backend)
    return _measured.get(case)


def _may_measure(device: torch.device) -> bool:
    if torch.compiler.is_compiling() or torch.are_deterministic_algorithms_enabled():
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


@torch.no_grad()
def _measure(case: _Case, could: Choice, device: torch.device, backend: Backend) -> Choice:
    """The fastest of the up to four combinations; the static choice says what is possible."""
    forward, backward = _candidates(case, device, backend)
    seconds = {("forward", name): _seconds(function, device) for name, function in forward.items()}
    for name, function in backward.items():
        if name != "fused" or could.backward == "fused":
            seconds["backward", name] = _seconds(function, device)

    def total(choice: tuple[str, str]) -> float:
        # An activation that forward has not made is made for ATen's backward.
        extra = seconds["backward", "apply"] if choice == ("fused", "aten") else 0.0
        return seconds["forward", choice[0]] + seconds["backward", choice[1]] + extra

    combinations = [(f, b) for f in ("aten", "fused") for b in ("aten", "fused") if ("backward", b) in seconds]
    best = min(combinations, key=total)
    spelled = ", ".join(f"{'/'.join(c)} {1e6 * total(c):.0f} us" for c in sorted(combinations, key=total))
    return Choice(*best, f"measured: {spelled}")


def _candidates(
    case: _Case, device: torch.device, backend: Backend
) -> tuple[dict[str, Callable[[], object]], dict[str, Callable[[], object]]]:
    """What each kind runs from one raw output to the next, and back."""
    spec = case.spec

    def images(shape: Sequence[int]) -> Tensor:
        x = torch.randn(tuple(shape), dtype=torch.float32, device=device).to(case.dtype)
        return x.contiguous(memory_format=torch.channels_last)

    x, weight = images(case.input), images(case.weight)
    z = images(convolved(x, weight, spec.stride, spec.padding, spec.dilation))
    dy = torch.randn_like(z)
    x_stats = backend.batch_norm_stats(x, None, None, None, None, True, spec.eps)
    stats = backend.batch_norm_stats(z, None, None, None, None, True, spec.eps)
    sums, count = torch.zeros_like(stats[:2]), z.numel() // z.shape[1]
    through = x_stats if case.through else None
    common = dy, z, stats, None, spec.relu, sums, count

    def apply() -> Tensor:
        return backend.batch_norm_act_apply(x, x_stats, None, None, True, False)[0] if case.through else x

    def aten_forward() -> None:
        made = convolution.forward(apply(), weight, None, spec)
        if case.training:
            backend.batch_norm_partials(made)

    def fused_forward() -> None:
        backend.conv_bn_stats(
            x, weight, None, through, True, spec.stride, spec.padding, spec.dilation, spec.groups, case.training
        )

    def aten_backward() -> None:
        dz = backend.batch_norm_act_dx(*common)
        dx, *_ = convolution.backward(dz, x, weight, None, spec, [True, True, False])
        if case.through:
            assert dx is not None
            backend.batch_norm_sums(dx, x, x_stats, None, True, None, None)

    def fused_backward() -> None:
        backend.conv_wgrad(*common, weight, x, through, True, spec.stride)
        backend.conv_dgrad(*common, weight, x if case.through else None, through, True)

    return (
        {"aten": aten_forward, "fused": fused_forward},
        {"aten": aten_backward, "fused": fused_backward, "apply": apply},
    )


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    """The median of a few calls, of the device's own time."""
    for _ in range(_WARM_UP):
        function()
    if device.type != "cuda":
        times = []
        for _ in range(_REPETITIONS):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return statistics.median(times)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(_REPETITIONS + 1)]
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    events[-1].synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events)) / 1e3
