"""`chain`: what each fusion of a residual block's convolutions and norms is worth in training on a CPU.

A basic block and a bottleneck of every stage run at five levels, each with one more fusion than the one before. The
kernels of the products are the same. In float32 only 1x1 convolutions with stride 1 are fused, so only bottlenecks run:

- *norm passes*: every norm reads its input for the statistics, and once more to normalize it.
- *statistics in epilogues*: each convolution also returns the statistics of its output.
- *norms in prologues*: the next convolution normalizes its input; the activation in between is never written.
- *and of gradients*: so do both gradients, which also return the sums of the preceding norm's backward and add the
  gradient of the shortcut.
- *fused gradients*: they compute the backward of the following norm, too.

Bytes are counted over the steps of each plan: every step reads its operands and writes its results once, and a norm of
two passes reads its operands twice. Caches are not counted, and the halo of a chunk that is read twice neither.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import ceilings, plots, progress, report
from benchmarks import options as common
from benchmarks.check import Results, check_results
from benchmarks.network import Block, build_network
from benchmarks.timing import Workload, measure_interleaved
from fused_res import backends
from fused_res.autograd.residual_block import ResidualBlock
from fused_res.backends import registry
from fused_res.backends.cpu.convolution import ALGORITHMS
from fused_res.block.plan import BlockConfig, Plan
from fused_res.block.planner import plan
from fused_res.block.program import NO_SLOT, Program, link
from fused_res.dispatch import Problem, Selection, TrainingAlgorithms, select_training
from fused_res.dispatch.selection import candidates
from fused_res.functional import residual_block
from fused_res.spec import group_by_unit

HELP = "fusions of a block in training, switched on one by one, on a CPU"

EAGER = "eager-channels-last"


class Level(NamedTuple):
    """Which of a convolution's algorithms are fused with norms, wherever they can be."""

    statistics: bool  # whether forward returns those of its output
    forward: bool
    gradients: bool
    norm_backward: bool  # whether the gradients compute the backward of the following norm

    def algorithms(self, problem: Problem) -> TrainingAlgorithms:
        """Return the algorithms of a convolution."""
        plain = select_training(_UNFUSED, problem, "planned")
        forward = plain.forward.algorithm
        if not self.statistics:
            forward = replace(forward, returns_partials=False)
        if self.forward:
            forward = next(iter(candidates(_FUSED, problem)), forward)
        gradients = [plain.input_gradient.algorithm, plain.weight_gradient.algorithm]
        if self.gradients:
            found = candidates(_FUSED, problem._replace(operation="weight_gradient"))
            gradients = [one for one in found if one.separate_norm_backward != self.norm_backward][:1] * 2 or gradients
        return TrainingAlgorithms(*(Selection(one, "benchmark") for one in (forward, *gradients)))


_FUSED = tuple(algorithm for algorithm in ALGORITHMS if algorithm.fused)
_UNFUSED = tuple(algorithm for algorithm in ALGORITHMS if not algorithm.fused)
LEVELS = {
    "norm passes": Level(False, False, False, False),
    "statistics in epilogues": Level(True, False, False, False),
    "norms in prologues": Level(True, True, False, False),
    "and of gradients": Level(True, True, True, False),
    "fused gradients": Level(True, True, True, True),
}
#: Operators of two passes -> positions of the arguments that both passes read.
_READ_TWICE = {
    "batch_norm_act_forward": (0,),
    "batch_norm_act_backward": (0, 1, 4),
    "batch_norm_act_backward_pair": (0, 1, 4, 7),
}

# As in `block`: ReLUs whose input is zero up to rounding switch.
ERROR_FACTOR = 3.0
#: float32: one that switches is an error of a gradient of 1 / sqrt(its values), up to 3e-3 in the last stage.
ERROR_FLOORS = {torch.float32: 1e-2, torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps}

#: The second block of each stage has an identity shortcut, the first a projection.
CASES = tuple(
    (model, f"layer{stage}.{index}")
    for model in ("resnet18", "resnet50")
    for stage, index in ((1, 1), (2, 0), (2, 1), (3, 1), (4, 1))
)


@dataclass(frozen=True)
class Case:
    model: str
    block: str

    @property
    def name(self) -> str:
        return f"{self.model} {self.block}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_timing(parser)
    common.add_device(parser)
    parser.set_defaults(dtype="bfloat16")
    common.add_cases(parser)


def unavailable(dtype: torch.dtype) -> str | None:
    """Return why this machine cannot run the benchmark, or None."""
    return ceilings.bf16_unavailable() if dtype == torch.bfloat16 else None


class Step:
    """Forward and backward of one block: float32 parameters, an input of `dtype` and a gradient of the output."""

    def __init__(self, block: Block, dtype: torch.dtype, seed: int) -> None:
        self.dtype = dtype
        generator = torch.Generator().manual_seed(seed)

        def randn(shape: torch.Size) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.spec, self.count = block.unit_chain.spec, len(block.convolutions)
        self.tensors: list[Tensor | None] = []
        for unit in group_by_unit(block.unit_chain.tensors):
            weight = randn(unit.weight.shape) * (2 / unit.weight[0].numel()) ** 0.5
            channels = weight.shape[:1]
            norm = (1 + 0.2 * randn(channels), 0.2 * randn(channels), torch.zeros(channels), torch.ones(channels))
            self.tensors += [weight.contiguous(memory_format=torch.channels_last), None, *norm]
        self.x, self.grad = (
            randn(torch.Size(shape)).to(dtype).contiguous(memory_format=torch.channels_last)
            for shape in (block.x, block.y)
        )
        self.x.requires_grad_()
        self.parameters = [t.requires_grad_() for i, t in enumerate(self.tensors) if t is not None and i % 6 < 4]

    def plan(self, level: Level) -> Plan:
        config = BlockConfig(self.spec, (True,) * self.count, "cpu")
        problems = [unit.problem for unit in plan(config, self.x, self.tensors).all_units]
        return plan(config, self.x, self.tensors, None, tuple(level.algorithms(problem) for problem in problems))

    def workload(self, level: Level) -> Workload:
        kernels, planned, operands = registry.resolve("cpu", self.x.device), self.plan(level), (self.x, *self.tensors)
        differentiable = [operands[index] for index in planned.differentiable]
        return self._phases(lambda: ResidualBlock.apply(planned, kernels, operands, *differentiable)[0])

    def eager_workload(self) -> Workload:
        """Return the workload of stock PyTorch under autocast."""

        def forward() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                return self._stock(self.x)

        return self._phases(forward)

    def _phases(self, forward: Callable[[], Tensor]) -> Workload:
        return {
            "forward": lambda _: forward(),
            "backward": lambda y: torch.autograd.grad(y, [self.x, *self.parameters], self.grad),
        }

    def _stock(self, x: Tensor) -> Tensor:
        units, functional = group_by_unit(self.tensors), nn.functional
        *inner, last = range(len(self.spec.units))

        def unit(index: int, x: Tensor) -> Tensor:
            spec, tensors = self.spec.convolutions[index], units[index]
            z = functional.conv2d(x, tensors.weight, None, spec.stride, spec.padding)
            norm = tensors.running_mean, tensors.running_var, tensors.norm_weight, tensors.norm_bias
            return functional.batch_norm(z, *norm, True, 0.0, spec.eps)

        y = x
        for index in inner:
            y = functional.relu(unit(index, y), inplace=True)
        return functional.relu(unit(last, y) + (x if self.spec.projection is None else unit(last + 1, x)), inplace=True)

    def results(self, workload: Workload) -> Results:
        y = workload["forward"](None)
        names = ["input", *(str(index) for index in range(len(self.parameters)))]
        gradients = zip(names, workload["backward"](y), strict=True)
        return {"output": y.detach(), **{f"gradient of {name}": gradient for name, gradient in gradients}}

    def reference(self) -> Results:
        """Return the results in float64."""
        wide = [None if t is None else t.detach().double() for t in self.tensors]
        x = self.x.detach().double().requires_grad_()
        parameters = [t.requires_grad_() for i, t in enumerate(wide) if t is not None and i % 6 < 4]
        with backends.use("reference"):
            y = residual_block(x, self.spec, wide, training=True)
        names = ["input", *(str(index) for index in range(len(parameters)))]
        gradients = torch.autograd.grad(y, [x, *parameters], self.grad.double())
        return {"output": y.detach(), **{f"gradient of {n}": g for n, g in zip(names, gradients, strict=True)}}


def count_bytes(step: Step, planned: Plan) -> int:
    """Return the bytes that the steps of a plan read and write."""
    kernels = registry.resolve("cpu", step.x.device)
    slots: list[Any] = [step.x.detach(), *(None if t is None else t.detach() for t in step.tensors)]
    slots += [None] * (len(planned.slot_names) - len(slots))
    total = 0
    for program in (planned.forward, planned.backward):
        steps = tuple(one._replace(last_uses=()) for one in program.steps)
        if program is planned.backward:
            slots[planned.slot_names.index("dy")] = step.grad
        every = [slot for one in steps for slot in one.results]
        link(Program(steps, program.results), kernels, every)(slots)
        for one in steps:
            if one.operator == "to_memory_format":
                continue  # everything is in channels_last
            twice = [one.arguments[position] for position in _READ_TWICE.get(one.operator, ())]
            read = [*one.operands, *(slot for slot in twice if slot != NO_SLOT)]
            # A step without results writes its first argument in place.
            written = [slot for slot in one.results or one.arguments[:1] if slot != NO_SLOT]
            total += sum(slots[slot].nbytes for slot in (*read, *written) if slots[slot] is not None)
    return total


def measure(options: argparse.Namespace) -> dict[str, Any]:
    dtype = common.dtype_of(options)
    if dtype not in ERROR_FLOORS:
        raise SystemExit("chain: --dtype must be float32 or bfloat16")
    if reason := unavailable(dtype):
        raise SystemExit(f"chain: {reason}")
    batch, size = (2, 64) if options.quick else (common.batch_of(options), 224)
    every = [Case(*case) for case in CASES if dtype == torch.bfloat16 or case[0] == "resnet50"]
    chosen = common.filter_cases(options, [every[0], every[len(every) // 2 + 1]] if options.quick else every)
    measured = []
    for case in progress.cases(chosen, "chain"):
        (block,) = (b for b in build_network(case.model, batch, size).blocks if b.name == case.block)
        step = Step(block, dtype, options.seed)
        workloads = {name: step.workload(level) for name, level in LEVELS.items()}
        workloads[EAGER] = step.eager_workload()
        reference, stock = step.reference(), step.results(workloads[EAGER])
        checks = {
            name: check_results(
                f"{name}, {case.name}", step.results(workloads[name]), reference, [stock],
                factor=ERROR_FACTOR, floor=ERROR_FLOORS[dtype],
            )
            for name in LEVELS
        }  # fmt: skip
        samples = measure_interleaved(workloads, **common.timing(options), label=case.name)
        measured.append(
            {
                "name": case.name,
                "input_shape": list(block.x),
                "share_of_allowed_error": checks,
                "bytes": {name: count_bytes(step, step.plan(level)) for name, level in LEVELS.items()},
                "flops": 3 * sum(convolution.flops for convolution in block.convolutions),
                "providers": {name: values.summary() for name, values in samples.items()},
            }
        )
    return {"dtype": common.dtype_name(options), "cases": measured}


def _floor(run: dict[str, Any], case: dict[str, Any], level: str) -> tuple[float, float]:
    """Return the seconds of a level's bytes at copy bandwidth, and of the products at their peak."""
    rates = run["ceilings"]
    peak = rates["fma_flops_per_s" if run.get("dtype") == "float32" else "bf16_flops_per_s"]
    return case["bytes"][level] / rates["copy_bytes_per_s"], case["flops"] / peak


def tables(run: dict[str, Any]) -> str:
    rows = []
    for case in run["cases"]:
        first = case["providers"][next(iter(LEVELS))]["median_s"]
        for name, provider in case["providers"].items():
            cells = ["", "", ""]
            if name in LEVELS:
                memory, products = _floor(run, case, name)
                cells = [
                    report.megabytes(case["bytes"][name]),
                    report.milliseconds(memory),
                    report.milliseconds(products),
                ]
            time = f"{report.milliseconds(provider['median_s'])} ±{report.spread(provider)}"
            rows.append([case["name"], name, time, report.ratio(first / provider["median_s"]), *cells])
    header = ["block", "level", "median ms", "speed", "MB", "MB at copy bandwidth, ms", "products at peak, ms"]
    return report.table(header, rows) + "\n\n" + summary(run)


def summary(run: dict[str, Any]) -> str:
    first = next(iter(LEVELS))
    rows = [
        [
            name,
            report.milliseconds(sum(case["providers"][name]["median_s"] for case in run["cases"])),
            report.ratio(report.geometric_mean(report.ratios(run["cases"], first, name))),
        ]
        for name in [*LEVELS, EAGER]
    ]
    title = f"chain: sums and geometric means over {len(run['cases'])} blocks, {report.allocator_title(run)}"
    return title + "\n" + report.table(["level", "sum ms", f"speed relative to {first}"], rows)


def plot(document: dict[str, Any], path: Path) -> None:
    plots.waterfall(document, path, list(LEVELS), EAGER, _floor)
