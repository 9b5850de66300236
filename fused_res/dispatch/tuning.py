"""Measures, on first use, which algorithms of a backend are fastest for a convolution, and puts those first.

``fuse(..., tune=True)`` or ``torch.backends.cudnn.benchmark`` request it. Measuring reorders the backend's list and
does nothing else. Nothing is measured while a CUDA graph is captured, while something compiles, or under deterministic
algorithms, because two runs may decide differently.
"""

from __future__ import annotations

import importlib.util
import math
import threading
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_res.dispatch.algorithm import TRAINING, Algorithm, Operation, Problem
from fused_res.dispatch.backend import Kernels
from fused_res.dispatch.selection import Algorithms, Selected, candidates

#: Seconds that one algorithm is measured for on a CPU; on a GPU `do_bench_cudagraph` decides.
_SECONDS = 0.02


class _Case(NamedTuple):
    """Everything that the speed of a unit's algorithms depends on."""

    backend: str
    device: str
    problem: Problem
    reads_norm: bool  # a norm lies between the block's values and the convolution
    training: bool


_measured: dict[_Case, Algorithms] = {}
_inference: dict[tuple[str, str, Problem], Selected] = {}
_lock = threading.Lock()


def training(
    kernels: Kernels, problem: Problem, reads_norm: bool, training: bool, device: torch.device
) -> Algorithms | None:
    """Return the measured algorithms of a convolution and its gradients; None where nothing may be measured.

    Args:
        kernels: the backend.
        problem: the forward convolution.
        reads_norm: a norm precedes the convolution inside its block.
        training: the norm that follows uses the statistics of the batch.
        device: where to measure.
    """
    case = _Case(kernels.name, _name(device), problem, reads_norm, training)
    if case not in _measured and _may_measure(device):
        with _lock:
            if case not in _measured:
                _measured[case] = _measure(case, kernels, device)
    return _measured.get(case)


def inference(kernels: Kernels, problem: Problem, input: Tensor, weight: Tensor, *arguments: Any) -> Selected | None:
    """The measured algorithm of ``conv_bias_act`` with these arguments, or None."""
    key = kernels.name, _name(input.device), problem
    if key not in _inference and _may_measure(input.device):
        names = {one.name: one for one in candidates(kernels.algorithms, problem) if one.packs == "never"}
        runs = {name: kernels.implementation("inference", one) for name, one in names.items()}
        calls = {name: partial(run, input, weight, *arguments) for name, run in runs.items()}
        seconds = {name: _seconds(call, input.device) for name, call in calls.items()}
        best = min(seconds, key=seconds.__getitem__)
        _inference[key] = Selected(names[best], _spelled(seconds))
    return _inference.get(key)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _may_measure(device: torch.device) -> bool:
    if torch.compiler.is_compiling() or torch.are_deterministic_algorithms_enabled():
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


@torch.no_grad()
def _measure(case: _Case, kernels: Kernels, device: torch.device) -> Algorithms:
    """The fastest combination of a forward and two gradients, the gradients both fused or both not."""
    calls = _Calls(case, kernels, device)
    found: dict[Operation, dict[Algorithm, float]] = {
        operation: {
            one: _seconds(calls.of(operation, one), device)
            for one in candidates(kernels.algorithms, case.problem._replace(operation=operation))
        }
        for operation in TRAINING
    }
    apply = _seconds(calls.activation, device) if case.reads_norm else 0.0

    def fastest(operation: Operation, fused: bool) -> tuple[float, Algorithm | None]:
        times = ((seconds, one) for one, seconds in found[operation].items() if one.fused == fused)
        return min(times, key=itemgetter(0), default=(math.inf, None))

    options = []
    for forward, backward in product((True, False), repeat=2):
        picked = [*map(fastest, TRAINING, (forward, backward, backward))]
        # An activation that forward has not written is computed for backward.
        total = sum(seconds for seconds, _ in picked) + (apply if forward and not backward else 0)
        options.append((total, [one for _, one in picked if one is not None]))
    _, best = min(options, key=itemgetter(0))
    told = (_spelled({one.name: seconds for one, seconds in found[operation].items()}) for operation in TRAINING)
    return Algorithms(*map(Selected, best, told))


def _spelled(seconds: dict[str, float]) -> str:
    ordered = sorted(seconds, key=seconds.__getitem__)
    return "measured: " + ", ".join(f"{name} {1e6 * seconds[name]:.0f} us" for name in ordered)


class _Calls:
    """What each algorithm runs from one raw output to the next, and back, on tensors of the problem's shapes."""

    def __init__(self, case: _Case, kernels: Kernels, device: torch.device) -> None:
        self.case, self.kernels = case, kernels
        problem = self.problem = case.problem

        def images(shape: Sequence[int]) -> Tensor:
            x = torch.randn(tuple(shape), device=device).to(problem.dtype)
            return x.contiguous(memory_format=torch.channels_last) if problem.channels_last else x

        self.x, self.weight = images(problem.input), images(problem.weight)
        self.z = images((problem.input[0], problem.weight[0], *problem.output))
        self.dy = torch.randn_like(self.z)
        none = (None,) * 4
        self.x_stats = kernels.batch_norm_stats(self.x, *none, True, 1e-5) if case.reads_norm else None
        self.stats = kernels.batch_norm_stats(self.z, *none, True, 1e-5)
        self.norm = (self.dy, self.z, self.stats, None, True, torch.zeros_like(self.stats[:2]))
        self.count = self.z.numel() // max(self.z.shape[1], 1)

    def activation(self) -> Tensor:
        if self.x_stats is None:
            return self.x
        y: Tensor = self.kernels.batch_norm_act_apply(self.x, self.x_stats, None, None, True, False)[0]
        return y

    def of(self, operation: Operation, algorithm: Algorithm) -> Callable[[], object]:
        run = self.kernels.implementation(operation, algorithm)
        kernels, problem = self.kernels, self.problem
        x, weight, x_stats, training = self.x, self.weight, self.x_stats, self.case.training

        def forward() -> None:
            if algorithm.fused:
                run(x, weight, None, x_stats, True, *problem.geometry, training)
                return
            z, _ = run(self.activation(), weight, None, problem.geometry, training)
            if training and not algorithm.statistics:
                kernels.batch_norm_partials(z)

        def fused_gradient() -> None:
            if operation == "weight_gradient":
                run(*self.norm, self.count, weight, x, x_stats, True, problem.stride)
            else:
                run(*self.norm, self.count, weight, x if x_stats is not None else None, x_stats, True)

        def gradient() -> None:
            of_input = operation == "input_gradient"
            dz = kernels.batch_norm_act_dx(*self.norm, self.count) if of_input else self.dy
            dx, *_ = run(dz, x, weight, None, problem.geometry, (of_input, not of_input, False))
            if x_stats is not None and of_input and dx.shape == x.shape:
                kernels.batch_norm_sums(dx, x, x_stats, None, True, None, None)

        return forward if operation == "forward" else fused_gradient if algorithm.fused else gradient


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    """The median of several calls: of the device's own time on a GPU, of all threads on a CPU."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from triton.testing import do_bench_cudagraph

        return float(do_bench_cudagraph(function, return_mode="median")) / 1e3
    from torch.utils import benchmark  # with setuptools, a tenth of a second

    timer = benchmark.Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=_SECONDS).median)
