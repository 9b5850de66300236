"""``check``: compare a user's own model, stock and fused, with a float64 copy, and measure speed and memory."""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_res._torch_compat import tree_map_only
from fused_res.backends import registry
from fused_res.fusion.convert import fuse, unfuse
from fused_res.fusion.freeze import freeze
from fused_res.nn import chain
from fused_res.nn.fusable_module import check_model, check_settings
from fused_res.report.comparison import (
    Errors,
    Float64Mode,
    Named,
    backward,
    count_stock_norms,
    named_tensors,
    restored_random_state,
    saved_bytes,
    seed,
)

#: Rounding flips the masks of ReLUs, differently in stock and fused forwards, and one flipped element may dominate a
#: gradient's error: that of ResNet-50 on 96x96 pixels is 2e-2 with flips and 1e-6 without. A tensor differs only if the
#: smallest error of fused in up to this many runs, whose weights differ in the last place, exceeds the allowed error
#: for the largest of stock. The comparison in float64, without flips, detects what this criterion then allows.
_RUNS = 4


@dataclass(frozen=True)
class Comparison:
    """Errors of the fused model's tensors of one kind, in one mode.

    Args:
        mode: ``"training"``, ``"evaluation"``, or ``"frozen"``, which is the evaluation of ``freeze(model)``.
        kind: ``"outputs"``, ``"gradients"`` (of parameters and inputs), or ``"buffers"`` (after a training step).
        errors: error of each tensor relative to the float64 copy, in units of stock PyTorch's error; at most 2 is ok.
        stock_error: median of stock PyTorch's errors, relative to each tensor's largest value.
    """

    mode: str
    kind: str
    errors: Mapping[str, float]
    stock_error: float


@dataclass(frozen=True)
class Timing:
    """Medians of interleaved runs, in seconds.

    Args:
        mode: ``"training step"`` (forward and backward), ``"evaluation"`` or ``"frozen"``, both without gradients.
        stock, fused: seconds of stock PyTorch and of the fused or frozen model. Frozen is compared with evaluation.
        runs: number of runs.
    """

    mode: str
    stock: float
    fused: float
    runs: int


@dataclass(frozen=True)
class Report:
    """The result of :func:`fused_res.check`; prints as a readable report.

    Args:
        model: name of the model's class, the inputs, dtype, device and backend.
        norms, norms_fused: number of batch norms that the stock training step runs, and of those that run fused.
        comparisons: errors of the outputs, gradients and buffers in every mode.
        float64_difference: largest difference between stock and fused if both compute in float64, relative to each
            tensor's largest value; at most 1e-8 is ok.
        differences: name of every tensor that differs by more than rounding, with a description; empty if none does.
        timings: medians of the training step, evaluation and frozen evaluation; empty if ``seconds`` is 0.
        memory: what ``stock_bytes`` and ``fused_bytes`` are.
        stock_bytes, fused_bytes: bytes saved for the backward of a training step; on CUDA, its peak memory.
        notes: remarks on what was not compared or how.
    """

    model: str
    norms: int = 0
    norms_fused: int = 0
    comparisons: tuple[Comparison, ...] = ()
    float64_difference: float = 0.0
    differences: Mapping[str, str] = field(default_factory=dict)
    timings: tuple[Timing, ...] = ()
    memory: str = "saved for backward"
    stock_bytes: int = 0
    fused_bytes: int = 0
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the fused model computes what the stock model computes, up to rounding."""
        return not self.differences

    def __str__(self) -> str:
        verdict = "ok: fused and stock agree up to rounding" if self.ok else "NOT OK: fused and stock differ"
        lines = [f"fused_res.check: {verdict}", self.model]
        lines.append(f"{self.norms_fused} of {self.norms} batch norms run fused in the training step")
        if self.norms_fused < self.norms:
            lines[-1] += "; print(fused_res.summarize(fused_res.fuse(model))) lists the others"
        lines += ["", "Error against float64 in units of stock PyTorch's error; allowed: 2"]
        rows: list[tuple[str, ...]] = [("", "", "tensors", "stock's error", "median", "largest", "tensor")]
        for one in self.comparisons:
            worst = max(one.errors, key=one.errors.__getitem__)
            values = (f"{one.stock_error:.1e}", f"{statistics.median(one.errors.values()):.2f}")
            rows.append((one.mode, one.kind, str(len(one.errors)), *values, f"{one.errors[worst]:.2f}", worst))
        lines += _table(rows)
        lines.append(f"In float64, fused and stock differ by at most {self.float64_difference:.1e}; allowed: 1e-08")
        if self.timings:
            runs = min(timing.runs for timing in self.timings)
            lines += ["", f"Time, median of at least {runs} interleaved runs"]
            rows = [("", "stock", "fused", "speedup")]
            for timing in self.timings:
                seconds = (f"{1e3 * timing.stock:.3g} ms", f"{1e3 * timing.fused:.3g} ms")
                rows.append((timing.mode, *seconds, f"{timing.stock / timing.fused:.2f}x"))
            lines += _table(rows)
        if self.stock_bytes:
            stock, fused = (f"{size / 2**20:.1f} MiB" for size in (self.stock_bytes, self.fused_bytes))
            share = self.fused_bytes / self.stock_bytes
            lines += ["", f"Memory of a training step, {self.memory}: stock {stock}, fused {fused} ({share:.2f}x)"]
        if self.differences:
            lines += ["", f"{len(self.differences)} differences:"]
            lines += [f"  {name}: {text}" for name, text in list(self.differences.items())[:_MOST_LINES]]
            if len(self.differences) > _MOST_LINES:
                lines.append(f"  and {len(self.differences) - _MOST_LINES} more, see Report.differences")
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)])


_MOST_LINES = 10


def check(
    model: nn.Module,
    *inputs: Any,
    backend: str = "auto",
    recompute: str = "none",
    tune: bool = False,
    autocast: torch.dtype | None = None,
    seconds: float = 2.0,
) -> Report:
    """Compare stock and fused results of `model` with a float64 copy, and measure speed and memory; print the result.

    Compared are the outputs, the gradients of parameters and float inputs, and the buffers (running statistics), in a
    training step and in evaluation, and the outputs of :func:`fused_res.freeze`. An error may be twice that of stock
    PyTorch plus four units in the last place; if both compute in float64, they must agree. The loss is a fixed random
    projection of all float outputs. Every forward starts from the same random seed. All of it runs on deep copies:
    `model`, its gradients and modes, the inputs and the random generators do not change. Submodules that are in
    evaluation in a model that trains stay so.

    Args:
        model: any module that can be deep-copied, fused or stock; of any dtype, on any device.
        inputs: positional arguments of its forward: tensors, in lists, tuples and dicts, and other values.
        backend, recompute, tune: see :func:`fused_res.fuse`.
        autocast: dtype of :class:`torch.autocast` for the stock and fused forwards, default None: none.
        seconds: time to measure the speed for, default 2.0; at least three runs are measured. 0 omits it.

    Returns:
        A :class:`fused_res.report.Report`, whose ``ok`` is False if fused and stock differ. An exception that only a
        fused forward raises is a difference, too.

    Raises:
        TypeError, ValueError: an argument is invalid, `model` cannot be deep-copied, or does not run in float64.
        BackendUnavailableError: the named backend cannot run here.
        Exception: whatever the stock forward or backward raises.
    """
    check_model(model)
    check_settings(backend, recompute)
    registry.check_devices(backend, {parameter.device for parameter in model.parameters()})
    if autocast is not None and autocast not in (torch.bfloat16, torch.float16):
        raise ValueError(f"autocast must be torch.bfloat16, torch.float16 or None, got {autocast!r}")
    if not (isinstance(seconds, int | float) and 0 <= seconds < math.inf):
        raise ValueError(f"seconds must be a non-negative number, got {seconds!r}")
    with restored_random_state(), torch.inference_mode(False), torch.enable_grad():
        try:
            copied = unfuse(_copy(model))  # parameters are copied without their gradients
        except Exception as error:
            raise ValueError(
                f"model must support copy.deepcopy, because check runs copies, but it raised {_text(error)}"
            ) from error
        return _Check(copied, inputs, backend, recompute, tune, autocast).report(seconds)


def _copy(model: nn.Module) -> Any:
    """Return a deep copy without autograd history: torch.jit clones parameters, with their gradients flowing back."""
    with torch.no_grad():
        copied = copy.deepcopy(model)
    for parameter, original in zip(copied.parameters(), model.parameters(), strict=True):
        parameter.requires_grad_(original.requires_grad)
    return copied


class _Step(NamedTuple):
    """Results of one forward and backward, by kind, and the number of stock batch norms in it."""

    tensors: dict[str, Named]
    norms: int


class _Check:
    """The stock model, how its variants are made, and what has been found."""

    def __init__(
        self, stock: nn.Module, inputs: Any, backend: str, recompute: str, tune: bool, autocast: torch.dtype | None
    ) -> None:
        self.source = stock
        self.inputs = inputs
        self.backend = backend
        self.autocast = autocast
        self.variants: dict[str, Callable[[nn.Module], nn.Module]] = {
            "stock": lambda model: model,
            "training": lambda model: fuse(model, backend, recompute, tune),
            "evaluation": lambda model: fuse(model, backend, recompute, tune),
            "frozen": lambda model: freeze(model, backend),
        }
        tensors = [*stock.parameters(), *stock.buffers(), *named_tensors("input", inputs).values()]
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self.casts = False  # whether the forward names a float dtype
        self.float64_difference = 0.0
        self.differences: dict[str, str] = {}
        self.notes: list[str] = []

    def report(self, seconds: float) -> Report:
        found, norms, left = self.compare("training")
        comparisons = [*found, *self.compare("evaluation")[0], *self.compare("frozen")[0]]
        raised = {name for name in self.variants if name in self.differences}
        stock_bytes, fused_bytes = (0 if "training" in raised else self.memory(name) for name in ("stock", "training"))
        return Report(
            self.describe(),
            norms,
            norms - left,
            tuple(comparisons),
            self.float64_difference,
            self.differences,
            self.timings(seconds, raised) if seconds else (),
            "peak of allocated memory" if self.device.type == "cuda" else "saved for backward",
            stock_bytes,
            fused_bytes,
            tuple(self.notes),
        )

    def describe(self) -> str:
        inputs = named_tensors("", self.inputs).values()
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in inputs)
        dtypes = {str(t.dtype) for t in (*inputs, *self.source.parameters()) if t.is_floating_point()}
        dtype = " and ".join(sorted(dtypes)) + (f" under autocast to {self.autocast}" if self.autocast else "")
        backend = registry.resolve(self.backend, self.device).name
        off = "" if chain.enabled else ", FUSED_RES=0: fused runs stock"
        count = torch.get_num_threads()
        threads = f", {count} thread{'s' * (count > 1)}" if self.device.type == "cpu" else ""
        name = type(self.source).__name__
        return f"{name}, input {shapes}, {dtype} on {self.device}{threads}, backend {backend}{off}"

    def build(self, variant: str, run: int = 0, double: bool = False) -> nn.Module:
        """Return a copy of the model; from run 1 on, its weights differ at random by up to one unit in the last place.

        Args:
            variant: ``"stock"``, or the mode that a fused or frozen copy is for.
            run: number of the run.
            double: whether to convert the copy to float64, before it is fused.
        """
        model = _copy(self.source)
        generator = torch.Generator().manual_seed(run)
        for parameter in model.parameters() if run else ():
            if parameter.is_floating_point():
                eps = torch.finfo(self.autocast or parameter.dtype).eps
                noise = torch.randint(-1, 2, parameter.shape, generator=generator)
                parameter.data.mul_(1 + eps * noise.to(parameter.device, parameter.dtype))
        return self.variants[variant](model.double() if double else model)

    def compare(self, mode: str) -> tuple[list[Comparison], int, int]:
        """Compare one mode in up to `_RUNS` runs; return its comparisons and the batch norms of stock and of fused."""
        kinds: dict[str, Errors] = {}
        for run in range(_RUNS):
            stock = self.step(self.build("stock", run), mode)
            exact = self.step_in_float64("stock", mode, run)
            try:
                fused = self.step(self.build(mode, run), mode)
                double = None if run else self.step_in_float64(mode, mode)
            except Exception as error:
                self.differences[mode] = f"raised {_text(error)}, stock does not"
                return [], stock.norms, stock.norms
            for kind, tensors in stock.tensors.items():
                errors = kinds.setdefault(kind, Errors())
                errors.add(fused.tensors[kind], tensors, exact.tensors[kind])
                if double is not None:
                    self.compare_in_float64(f"{mode} {kind}", double.tensors[kind], exact.tensors[kind])
            if not any(errors.exceeded() for errors in kinds.values()):
                break
        if run:
            self.notes.append(
                f"{mode} ran {run + 1} times, with weights that differ in the last place, because rounding flips masks"
                " of ReLUs; errors are the smallest of fused and the largest of stock"
            )
        for kind, errors in kinds.items():
            for name in errors.exceeded():
                self.differences.setdefault(f"{mode} {kind} {name}", errors.describe(name))
        found = [Comparison(mode, kind, one.in_units(), one.typical()) for kind, one in kinds.items() if one.ours]
        return found, stock.norms, fused.norms

    def compare_in_float64(self, title: str, fused: Named, stock: Named) -> None:
        errors = Errors()
        errors.add(fused, stock, stock)
        self.float64_difference = max(self.float64_difference, *errors.ours.values(), 0.0)
        for name in errors.exceeded():
            self.differences[f"{title} {name}"] = f"differs in float64: {errors.describe(name)}"

    def step(self, model: nn.Module, mode: str) -> _Step:
        """Return the results of one forward and, unless `mode` is frozen, one backward."""
        training, differentiate = mode == "training", mode != "frozen"
        _set_training(model, training)
        leaves: list[Tensor] = []
        tensors: dict[str, Named] = {}
        with torch.set_grad_enabled(differentiate):
            outputs = named_tensors("output", self.call(model, leaves if differentiate else None))
            tensors["outputs"] = {name: output.detach().clone() for name, output in outputs.items()}
            norms = count_stock_norms(outputs.values())
            if differentiate:
                backward(outputs)
                named: Named = {name: p for name, p in model.named_parameters() if p.requires_grad}
                named |= {f"input {index}": leaf for index, leaf in enumerate(leaves)}
                tensors["gradients"] = {name: t.grad for name, t in named.items() if t.grad is not None}
        if training:
            tensors["buffers"] = dict(model.named_buffers())
        return _Step(tensors, norms)

    def step_in_float64(self, variant: str, mode: str, run: int = 0) -> _Step:
        """Return the results of :meth:`step` in float64; raise ValueError if the stock model does not run in it."""
        inputs, autocast, dtype = self.inputs, self.autocast, torch.get_default_dtype()
        model = self.build(variant, run, double=True)
        self.inputs = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)
        self.autocast = None
        torch.set_default_dtype(torch.float64)  # for tensors that the forward creates
        try:
            # Fused forwards choose kernels by dtype: the mode is entered for them only if the model's forward needs it.
            casts = Float64Mode()
            with casts if variant == "stock" or self.casts else contextlib.nullcontext():
                result = self.step(model, mode)
            self.casts = self.casts or casts.used
            return result
        except Exception as error:
            if variant != "stock":
                raise
            raise ValueError(
                f"model must also run in float64, which check compares with, but it raised {_text(error)}"
            ) from error
        finally:
            self.inputs, self.autocast = inputs, autocast
            torch.set_default_dtype(dtype)

    def call(self, model: nn.Module, leaves: list[Tensor] | None = None) -> Any:
        """Run the forward on copies of the inputs; if `leaves` is given, append those whose gradients are wanted."""

        def copied(tensor: Tensor) -> Tensor:
            tensor = tensor.detach().clone()
            if leaves is None or not tensor.is_floating_point():
                return tensor
            leaves.append(tensor.requires_grad_())
            return tensor.clone()  # not a leaf: the forward may write to it

        inputs = tree_map_only(Tensor, copied, self.inputs)
        seed(self.device)
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            return model(*inputs)

    def timings(self, seconds: float, raised: set[str]) -> tuple[Timing, ...]:
        def training_step(model: nn.Module) -> None:
            for parameter in model.parameters():
                parameter.grad = None
            backward(named_tensors("output", self.call(model)))

        def evaluation(model: nn.Module) -> None:
            with torch.no_grad():
                self.call(model)

        found = []
        for run, modes in ((training_step, ["training"]), (evaluation, ["evaluation", "frozen"])):
            modes = [mode for mode in modes if mode not in raised]
            models = {mode: self.build(mode) for mode in ["stock", *modes]}
            for model in models.values():
                _set_training(model, run is training_step)
            medians, runs = self.interleaved(run, models, seconds / 2)
            for mode in modes:
                name = "training step" if mode == "training" else mode
                found.append(Timing(name, medians["stock"], medians[mode], runs))
        return tuple(found)

    def interleaved(
        self, call: Callable[[nn.Module], None], models: dict[str, nn.Module], seconds: float
    ) -> tuple[dict[str, float], int]:
        """Return the median seconds of calls with each model, one after the other in each round, and the rounds."""
        for model in models.values():
            call(model)  # algorithms are selected and weights packed in the first call
        samples: dict[str, list[float]] = {name: [] for name in models}
        rounds, end = 0, time.perf_counter() + seconds
        while rounds < 3 or time.perf_counter() < end:
            rounds += 1
            for name, model in models.items():
                self.synchronize()
                started = time.perf_counter()
                call(model)
                self.synchronize()
                samples[name].append(time.perf_counter() - started)
        return {name: statistics.median(values) for name, values in samples.items()}, rounds

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def memory(self, variant: str) -> int:
        """Return the bytes that a training step saves for its backward; on CUDA, its peak memory."""
        model = self.build(variant)
        _set_training(model, True)
        if self.device.type != "cuda":
            return saved_bytes(lambda: self.call(model), model)
        backward(named_tensors("output", self.call(model)))  # libraries allocate their workspaces
        for parameter in model.parameters():
            parameter.grad = None
        self.synchronize()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        backward(named_tensors("output", self.call(model)))
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before


def _set_training(model: nn.Module, training: bool) -> None:
    """Set the mode; in a model that trains already, keep submodules that are in evaluation."""
    if not (training and model.training):
        model.train(training)


def _text(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
