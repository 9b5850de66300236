"""Autotuning: on first use, time a backend's algorithms for a convolution and select the fastest.

``fuse(..., tune=True)`` requests it for training, ``freeze(..., tune=True)`` for inference on the CPU. Only algorithms
that support the problem are timed; their rules are ignored. Nothing is timed during CUDA graph capture and compilation,
nor under ``torch.use_deterministic_algorithms``, because two runs may select different algorithms.
"""

from __future__ import annotations

import importlib.util
import math
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from itertools import product
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from fused_res.dispatch.algorithm import TRAINING_OPERATIONS, Algorithm, Operation, PackedWeight, Problem
from fused_res.dispatch.backend import Kernels
from fused_res.dispatch.selection import Measured, Selection, TrainingAlgorithms, candidates, measured, select

#: Seconds for which an algorithm is timed on a CPU. On a GPU `do_bench_cudagraph` chooses the number of calls.
_MIN_RUN_TIME = 0.02


class _TuningKey(NamedTuple):
    """Everything that the speed of the algorithms of a conv-BN-act unit depends on."""

    backend: str
    device: str
    problem: Problem
    normalizes_input: bool  # a norm precedes the convolution inside its block
    training: bool


_training_cache: dict[_TuningKey, TrainingAlgorithms] = {}
_lock = threading.Lock()


def tuned_training_algorithms(
    kernels: Kernels, problem: Problem, normalizes_input: bool, training: bool, device: torch.device
) -> TrainingAlgorithms | None:
    """Return the fastest algorithms of a convolution and its gradients, or None where timing is not possible.

    Args:
        kernels: the backend.
        problem: the forward convolution.
        normalizes_input: whether a norm precedes the convolution inside its block.
        training: whether the following norm uses the statistics of the batch.
        device: device to time on.
    """
    key = _TuningKey(kernels.name, _name(device), problem, normalizes_input, training)
    if key not in _training_cache and can_measure(device):
        with _lock:
            if key not in _training_cache:
                _training_cache[key] = _measure(key, kernels, device)
    return _training_cache.get(key)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def can_measure(device: torch.device) -> bool:
    """Return whether algorithms may be timed in the current context."""
    if torch.compiler.is_compiling() or torch.are_deterministic_algorithms_enabled():
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


@torch.no_grad()
def _measure(key: _TuningKey, kernels: Kernels, device: torch.device) -> TrainingAlgorithms:
    """Return the fastest combination of forward and two gradients, where both gradients are fused or neither is."""
    calls = _TimedCalls(key, kernels, device)
    found: dict[Operation, dict[Algorithm, float]] = {
        operation: {
            algorithm: _median_time(calls.call_for(operation, algorithm), device)
            for algorithm in candidates(kernels.algorithms, key.problem._replace(operation=operation))
        }
        for operation in TRAINING_OPERATIONS
    }
    apply = _median_time(calls.activation, device) if key.normalizes_input else 0.0

    def fastest(operation: Operation, fused: bool) -> tuple[float, Algorithm | None]:
        times = ((seconds, algorithm) for algorithm, seconds in found[operation].items() if algorithm.fused == fused)
        return min(times, key=itemgetter(0), default=(math.inf, None))

    options = []
    for forward, backward in product((True, False), repeat=2):
        fastest_of_each = [*map(fastest, TRAINING_OPERATIONS, (forward, backward, backward))]
        # A fused forward does not write the activation, and an unfused backward has to recompute it.
        total = sum(seconds for seconds, _ in fastest_of_each) + (apply if forward and not backward else 0)
        options.append((total, [algorithm for _, algorithm in fastest_of_each if algorithm is not None]))
    _, best = min(options, key=itemgetter(0))
    timings = (
        _format_timings({algorithm.name: seconds for algorithm, seconds in found[operation].items()})
        for operation in TRAINING_OPERATIONS
    )
    return TrainingAlgorithms(*map(Selection, best, timings))


# Inference

#: Bytes that are written before each timed call, as the other layers of a network do between two calls of one. Weights
#: are evicted from an L3 of 32 MB and remain in one of 300 MB, as those of a network do.
_EVICTING_BYTES = 64 << 20
#: Timed calls of each algorithm. After the second, algorithms that are slower by the given factor are dropped.
_ROUNDS, _HOPELESS = 7, 3.0
#: The rules' choice, and a whole graph, are kept unless something else takes less than this part of their time.
_TIE = 0.97
_faster_with_graph: dict[Hashable, bool] = {}


def measure_inference(
    kernels: Kernels,
    problem: Problem,
    operand: Callable[[Algorithm], PackedWeight | Tensor],
    bias: Tensor | None,
    relu: bool,
) -> None:
    """Time the algorithms of an inference problem on the CPU, once a process, for :func:`fused_res.dispatch.select`.

    Args:
        kernels: the backend.
        problem: the convolution.
        operand: function that returns the weight, packed for an algorithm that packs it.
        bias: ``(K,)`` or None.
        relu: whether the epilogue has a ReLU.
    """
    key = kernels.algorithms, problem
    if key not in measured:
        with _lock:
            if key not in measured:
                measured[key] = _measure_inference(kernels, problem, operand, bias, relu)


@torch.no_grad()
def _measure_inference(
    kernels: Kernels,
    problem: Problem,
    operand: Callable[[Algorithm], PackedWeight | Tensor],
    bias: Tensor | None,
    relu: bool,
) -> Measured:
    def images(*shape: int) -> Tensor:
        x = torch.randn(shape).to(problem.dtype)
        return x.contiguous(memory_format=torch.channels_last) if problem.channels_last and x.dim() == 4 else x

    source, x = images(*problem.input), images(*problem.input)
    residual = images(problem.input[0], problem.weight[0], *problem.output_size) if problem.residual else None
    found = candidates(kernels.algorithms, problem)
    operands = {algorithm: operand(algorithm) for algorithm in found}
    other_data = torch.empty(_EVICTING_BYTES, dtype=torch.uint8)
    planned = select(kernels.algorithms, problem, "planned").algorithm
    times: dict[Algorithm, list[float]] = {algorithm: [] for algorithm in found}
    for round in range(_ROUNDS):
        for algorithm in found:
            run = kernels.implementation("inference", algorithm)
            other_data.fill_(round)
            x.copy_(source)  # the preceding layer has just written the input
            begin = time.perf_counter()
            run(x, operands[algorithm], bias, residual, problem.geometry, relu)
            times[algorithm].append(time.perf_counter() - begin)
        if round == 1:
            limit = _HOPELESS * min(map(min, times.values()))
            found = [algorithm for algorithm in found if algorithm is planned or min(times[algorithm]) <= limit]
    reason = _format_timings({algorithm.name: min(seconds) for algorithm, seconds in times.items()})

    def fastest(among: Sequence[Algorithm]) -> Selection:
        best = min(among, key=lambda algorithm: min(times[algorithm]))
        kept = planned in among and not _is_faster(times[best], times[planned])
        return Selection(planned if kept else best, reason)

    in_graphs = [algorithm for algorithm in times if algorithm.runs_in_graphs]
    return Measured(fastest([*times]), fastest(in_graphs or [*times]))


def _is_faster(times: Sequence[float], baseline: Sequence[float]) -> bool:
    """Return whether an algorithm takes clearly less time than another that was timed in the same rounds.

    Other processes may share the cores and stop a call for longer than it takes. So the shortest times are compared,
    and besides the algorithm must have been faster in all rounds but one, which chance achieves in one case of 16.
    """
    wins = sum(a < b for a, b in zip(times, baseline, strict=False))
    return min(times) < _TIE * min(baseline) and wins >= _ROUNDS - 1


def graph_is_faster(key: Hashable, graph: Callable[[], object], separate: Callable[[], object]) -> bool:
    """Return whether blocks run at least as fast as one graph as with the fastest algorithm for each convolution.

    An algorithm that a graph cannot contain splits it, which costs calls and memory traffic that the times of single
    convolutions do not show.

    Args:
        key: the blocks and the input's shape; each key is measured once a process.
        graph, separate: the two ways to run the blocks.
    """
    with _lock:
        if key not in _faster_with_graph:
            times: tuple[list[float], list[float]] = ([], [])
            for _ in range(_ROUNDS):
                for call, seconds in zip((graph, separate), times, strict=True):
                    begin = time.perf_counter()
                    call()
                    seconds.append(time.perf_counter() - begin)
            _faster_with_graph[key] = not _is_faster(times[1], times[0])
        return _faster_with_graph[key]


def _format_timings(seconds: dict[str, float]) -> str:
    ordered = sorted(seconds, key=seconds.__getitem__)
    return "measured: " + ", ".join(f"{name} {1e6 * seconds[name]:.0f} us" for name in ordered)


class _TimedCalls:
    """Calls to time, on random tensors of the problem's shapes.

    A timed forward computes this convolution's raw output and its partial statistics from the preceding convolution's
    raw output. A timed input gradient includes the elementwise backward of the following norm and the reduction of the
    preceding norm's backward, or, at the start of a block with an identity shortcut, the addition of its gradient. So
    every algorithm is charged for the work that a fused algorithm does in its prologue and epilogue.
    """

    def __init__(self, key: _TuningKey, kernels: Kernels, device: torch.device) -> None:
        self.key, self.kernels = key, kernels
        problem = self.problem = key.problem

        def images(shape: Sequence[int]) -> Tensor:
            x = torch.randn(tuple(shape), device=device).to(problem.dtype)
            return x.contiguous(memory_format=torch.channels_last) if problem.channels_last else x

        self.x, self.weight = images(problem.input), images(problem.weight)
        self.z = images((problem.input[0], problem.weight[0], *problem.output_size))
        self.dy = torch.randn_like(self.z)
        none = (None,) * 4
        self.x_stats = kernels.batch_norm_stats(self.x, *none, True, 1e-5) if key.normalizes_input else None
        self.stats = kernels.batch_norm_stats(self.z, *none, True, 1e-5)
        sums = torch.zeros_like(self.stats[:2])
        self.norm_dx_operands = (self.dy, self.z, self.stats, None, "relu", sums)
        #: Those of the operand prologues of the gradients' fused kernels.
        self.prologue_operands = (self.dy, self.z, self.stats, None, True, sums)
        self.count = self.z.numel() // max(self.z.shape[1], 1)
        self.added = torch.randn_like(self.x) if problem.residual else None

    def activation(self) -> Tensor:
        """Return the convolution's input: the raw output of the preceding convolution after norm and ReLU."""
        if self.x_stats is None:
            return self.x
        y: Tensor = self.kernels.batch_norm_act_apply(self.x, self.x_stats, None, None, "relu", False)[0]
        return y

    def call_for(self, operation: Operation, algorithm: Algorithm) -> Callable[[], object]:
        """Return the call to time for one operation of one algorithm."""
        run = self.kernels.implementation(operation, algorithm)
        kernels, problem = self.kernels, self.problem
        x, weight, x_stats, training = self.x, self.weight, self.x_stats, self.key.training

        def forward() -> None:
            if algorithm.fused:
                run(x, weight, None, x_stats, True, *problem.geometry, training)
                return
            z, _ = run(self.activation(), weight, None, problem.geometry, training)
            if training and not algorithm.returns_partials:
                kernels.batch_norm_partials(z)

        def fused_gradient() -> None:
            if operation == "weight_gradient":
                run(*self.prologue_operands, self.count, weight, x, x_stats, True, problem.stride)
            else:
                input_norm = x if x_stats is not None else None, x_stats, True
                run(*self.prologue_operands, self.count, weight, *input_norm, self.added)

        def adding_gradient() -> None:
            dz = kernels.batch_norm_act_dx(*self.norm_dx_operands, self.count)
            run(dz, None, None, None, False, None, 0, weight, None, None, False, self.added)

        def gradient() -> None:
            is_dgrad = operation == "input_gradient"
            dz = kernels.batch_norm_act_dx(*self.norm_dx_operands, self.count) if is_dgrad else self.dy
            dx, *_ = run(dz, x, weight, None, problem.geometry, (is_dgrad, not is_dgrad, False))
            if x_stats is not None and is_dgrad and dx.shape == x.shape:
                kernels.batch_norm_sums(dx, x, x_stats, None, "relu", None, None)
            if self.added is not None and is_dgrad:
                kernels.add_masked_(dx, self.added, None)

        if operation == "forward":
            return forward
        if algorithm.implementations[operation] == "conv_dgrad" and not algorithm.fused:
            return adding_gradient
        return fused_gradient if algorithm.fused else gradient


def _median_time(function: Callable[[], object], device: torch.device) -> float:
    """Return the median time of a call in seconds: device time on a GPU, wall time with all threads on a CPU."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from triton.testing import do_bench_cudagraph

        return float(do_bench_cudagraph(function, return_mode="median")) / 1e3
    from torch.utils import benchmark  # imports setuptools, which takes a tenth of a second

    timer = benchmark.Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=_MIN_RUN_TIME).median)
