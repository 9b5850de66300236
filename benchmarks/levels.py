"""Every kernel of a training step or an inference at five levels of fusion, with its bytes and its FLOPs.

The rules are the tables below: for each step the kernels that do it, separated by ``;``, each as what it reads and what
it writes, ``reads > writes``. A step that a level's table leaves out is done by another step's kernel. Vectors of one
value a channel, the loss and its softmax are left out (below 0.1 %); no kernel is given what another one left in cache.

====================  ==============================================================================================
x, dx                 what a convolution reads, as far as it touches it, and the whole gradient of that; dxt: touched
w, dw                 the weight, and its gradient
z, a, y               raw output, normalised and clamped, the block's output; r: what is added, zs: a projection's z
da, dy, dz, dzs, g    gradients of these; g: masked by a ReLU
di                    gradient of the block's input, as the chain or the shortcut brings it; dr: what the next
                      block's shortcut brings to dy; carried: what the shortcut brings, where the first convolution's
                      dx takes it in, and cmask, the mask that an identity's has
mask, p, i8, i64      a bit an element, the max pool's output (gradient dp) and its indices of 1 or 8 bytes
prev                  x once more in an epilogue, where the norm before it takes its sums from there
v, o                  features and logits of the classifier, with gradients
====================  ==============================================================================================
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from benchmarks.cases import Mode
from benchmarks.network import Block, Convolution, Network
from fused_res.block.plan import Plan, Unit
from fused_res.block.program import NONE, Step
from fused_res.dispatch import Algorithm, Algorithms, Selected
from fused_res.spec import by_unit

#: What is not fused at any level. Under autocast masters are float32: weights are cast, their gradients cast back.
_COMMON = {
    "mean": "y > v",
    "classify": "v w > o",
    "classify dgrad": "do w > dv",
    "classify wgrad": "do v > dw",
    "mean backward": "dv > dy",
    "cast images": "images > x",
    "cast weights": "masters > w",
    "cast gradients": "dw > grads",
    # SGD with momentum, as foreach kernels: scale the buffer, add the gradient, add to the parameter.
    "optimizer": "buffers > buffers; buffers grads > buffers; masters buffers > masters",
}
_ATEN = {"conv": "x w > z", "dgrad": "dz w > dx", "wgrad": "dz x > dw"}

_EAGER = {
    "stats": "z >",
    "apply": "z > a; a > a",
    "end": "z > y; y r > y; y > y",
    "pair": "z > y; zs > r; y r > y; y > y",
    "pool": "z > a; a > a; a > p i64",
    "pool backward": "> da; dp i64 > da",
    "sums": "da a > g; g z >",
    "dx": "g z > dz",
    "end sums": "dy y > g; g z >",
    "end dx": "g z > dz",
    "pair sums": "dy y > g; g z >; g zs >",
    "pair dx": "g z > dz; g zs > dzs",
    "add identity": "di g > di",
    "add projection": "di di > di",
}
#: As Inductor fuses: whatever works by element goes into its reader, a reduction is a pass of its own.
_COMPILE = {
    "stats": "z >",
    "apply": "z > a",
    "end": "z r > y",
    "pair": "z zs > y",
    "pool": "z > a; a > p i8",
    "pool backward": "dp dr i8 > da",
    "sums": "da a z >",
    "dx": "da a z > dz",
    "end sums": "dy dr y z > g",
    "end dx": "g z > dz",
    "pair sums": "dy dr y z zs > g",
    "pair dx": "g z zs > dz dzs",
}
#: `batch_norm_act` as the block calls it: one pass behind the statistics, a bit for the ReLU behind an addition.
_NORM = {
    "stats": "z >",
    "apply": "z > a",
    "end": "z r > y mask",
    "pair": "z zs > y mask",
    "pool": "z > p i8",
    "pool backward": "dp i8 > da",
    "sums": "da mask z >",
    "dx": "da mask z > dz",
    "end sums": "dy mask z >",
    "end dx": "dy mask z > dz",
    "pair sums": "dy mask z zs >",
    "pair dx": "dy mask z zs > dz dzs",
    "add identity": "di dy mask > di",
    "add projection": "di di > di",
}
#: Where the planner takes the backend's convolutions: statistics from the epilogue, norm and ReLU in the prologue, dz
#: formed on load. Elsewhere as `_NORM`.
_FUSED = _NORM | {
    "fused conv": "x w > z",
    "fused dgrad": "dy mask z w prev carried cmask > dxt",
    "fused wgrad": "dy mask z x > dw",
    "add fused projection": "dxt dxt > dxt",
}
#: No kernel does this: every convolution fused, its two gradients one kernel, every sum from an epilogue, no mask.
_FEWEST = {
    "fused conv": "x w > z",
    "end": "z r > y",
    "pair": "z zs > y",
    "pool": "z > p",
    "fused backward": "dy z w x carried > dx dw",
    "fused projection backward": "dy z w x > dw",
    "fused pool backward": "dp z x > dw",
    "optimizer": "masters buffers grads > masters buffers",
}

_EAGER_INFERENCE = {name: _EAGER[name] for name in ("apply", "end", "pair", "pool")}
_COMPILE_INFERENCE = {name: _COMPILE[name] for name in ("apply", "end", "pair")} | {"pool": "z > a; a > p"}
_NORM_INFERENCE = {"apply": "z > a", "end": "z r > y", "pair": "z zs > y", "pool": "z > p i8"}
#: A frozen network: `conv_bias_act` everywhere, and PyTorch's pooling.
_FUSED_INFERENCE = {"fused conv": "x w r > y", "pool": "a > p i64"}
_FEWEST_INFERENCE = {"fused conv": "x w r > y", "pool": "a > p"}

_EVERY_ONE = Selected(Algorithm("fewest", lambda problem: None, {}, fused=True, compact=True), "no kernel does this")
_ALL_FUSED = Algorithms(_EVERY_ONE, _EVERY_ONE, _EVERY_ONE)


@dataclass(frozen=True)
class Level:
    """`convolutions`: whose they are in training; in inference they are fused where the table says how."""

    title: str
    convolutions: str  # "aten", "planned" or "fused"
    training: dict[str, str]
    inference: dict[str, str]

    def plan(self, block: Block, dtype: torch.dtype, mode: Mode, grad_input: bool) -> Plan:
        every = self.convolutions == "fused" or (self.convolutions == "planned" and mode == "eval")
        preference = "aten" if self.convolutions == "aten" else "planned"
        return block.plan(dtype, mode == "train", grad_input, "triton", preference, _ALL_FUSED if every else None)


LEVELS = {
    "eager": Level("PyTorch's kernels, one an operator", "aten", _ATEN | _EAGER, _ATEN | _EAGER_INFERENCE),
    "compile": Level("norms as Inductor fuses them", "aten", _ATEN | _COMPILE, _ATEN | _COMPILE_INFERENCE),
    "norm": Level("batch_norm_act behind PyTorch's convolutions", "aten", _ATEN | _NORM, _ATEN | _NORM_INFERENCE),
    "fused": Level("the convolutions that the planner fuses, too", "planned", _ATEN | _FUSED, _FUSED_INFERENCE),
    "fewest": Level("every tensor of a convolution once each way", "fused", _FEWEST, _FEWEST_INFERENCE),
}


class Kernel(NamedTuple):
    stage: str
    layer: str
    step: str
    moves: str
    bytes: float
    flops: float


def kernels(network: Network, level: Level, mode: Mode, dtype: torch.dtype) -> list[Kernel]:
    """Every kernel of a step, in the order of the forward, each backward beside its own forward."""
    rules = _COMMON | (level.training if mode == "train" else level.inference)
    made: list[Kernel] = []
    for index, block in enumerate(network.blocks):
        final = index == len(network.blocks) - 1
        made += _Walk(block, rules, level.plan(block, dtype, mode, index > 0), dtype, final)
    return made + list(_head(network, rules, mode, dtype)) + list(_parameters(network, rules, mode, dtype))


def _emit(
    stage: str, layer: str, step: str, rules: dict[str, str], sizes: dict[str, float], flops: float = 0
) -> Iterator[Kernel]:
    for rule in filter(None, map(str.strip, rules.get(step, "").split(";"))):
        yield Kernel(stage, layer, step, rule, sum(sizes[name] for name in rule.replace(">", " ").split()), flops)


#: The steps that each operator of a plan's programs computes. Other operators move vectors only (`merge_stats`), or
#: nothing in channels_last (`to_memory_format`). At the last norm of a residual block `{end}` and `{apply}` are its
#: kind, `end` or `pair`; at other norms `{end}` is empty and `{apply}` is `apply`.
_STEPS = {
    "convolution": "conv",
    "conv_bn_stats": "fused conv",
    "batch_norm_stats": "stats",
    "batch_norm_act_forward": "stats; {apply}",
    "batch_norm_act_apply": "{apply}",
    "batch_norm_act_inference_": "{apply}",
    "max_pool_forward": "pool",
    "max_pool_backward": "pool backward",
    "batch_norm_sums": "{end}sums",
    "batch_norm_act_dx": "dx",
    "batch_norm_act_backward": "{end}sums; {end}dx",
    "batch_norm_act_backward_pair": "{end}sums; {end}dx",
    "convolution_backward": "dgrad; wgrad",
    "conv_dgrad": "fused dgrad",
    "conv_wgrad": "fused wgrad; fused {part}backward",
    "add_masked_": "add identity",
    "add_": "add projection",
    "add_strided_": "add fused projection",
}
_ADDED = 11  # position of `added` and `added_mask` among the arguments of conv_dgrad


class _Walk:
    """One block's kernels: the steps of its plan's programs."""

    def __init__(self, block: Block, rules: dict[str, str], plan: Plan, dtype: torch.dtype, final: bool) -> None:
        self.block, self.rules, self.plan, self.final = block, rules, plan, final
        self.itemsize = dtype.itemsize
        shortcut = block.read.spec.shortcut
        self.kind = {"none": "", "identity": "end"}[shortcut] if isinstance(shortcut, str) else "pair"
        weights = [unit.weight for unit in by_unit(block.read.spec.tensor_names())]
        #: By the names of a unit's convolution output and weight.
        self.units = {name: unit for unit in plan.all_units for name in (unit.makes, weights[unit.index])}
        #: The units whose input gradient adds the shortcut's.
        self.carrying = [
            self._unit(step)
            for step in plan.backward.steps
            if step.operator == "conv_dgrad" and any(slot != NONE for slot in step.arguments[_ADDED:])
        ]

    def __iter__(self) -> Iterator[Kernel]:
        for step in self.plan.steps:
            unit = self._unit(step)
            convolution = self.block.convolutions[unit.index]
            for name in self._names(step, unit):
                flops = convolution.flops if name.endswith(("conv", "dgrad", "wgrad")) else 0
                if name.startswith("fused") and name.endswith("backward"):
                    flops = convolution.flops * (1 + unit.grad_reads)
                sizes = self._sizes(unit, convolution)
                yield from _emit(self.block.stage, convolution.name, name, self.rules, sizes, flops)

    def _unit(self, step: Step) -> Unit:
        """The unit whose convolution's output or weight comes first among a step's results and operands."""
        names = [self.plan.slots[slot] for slot in (*step.results, *step.operands) if slot != NONE]
        shortcut = self.plan.projection or self.plan.units[-1]  # an addition has neither
        return next((self.units[name] for name in names if name in self.units), shortcut)

    def _names(self, step: Step, unit: Unit) -> list[str]:
        kind = self.kind if unit is self.plan.units[-1] else ""
        part = "projection " if unit is self.plan.projection else "pool " if self.plan.config.spec.pool else ""
        end = f"{kind} " if kind else ""
        names = _STEPS.get(step.operator, "").format(apply=kind or "apply", end=end, part=part).split("; ")
        if step.operator == "convolution_backward":
            names = [name for name, slot in zip(names, step.results, strict=False) if slot != NONE]
        return names

    def _sizes(self, unit: Unit, convolution: Convolution) -> dict[str, float]:
        size = self.itemsize
        x, z, w = size * math.prod(convolution.x), size * math.prod(convolution.z), math.prod(convolution.weight)
        touched, y = size * convolution.touched, math.prod(self.block.y)
        ends = bool(self.kind) and (convolution.residual or unit.makes == "zs")
        sizes: dict[str, float] = dict.fromkeys(("z", "a", "y", "zs", "da", "dy", "dz", "dzs", "g"), z)
        sizes |= dict.fromkeys(("x", "dxt"), touched) | dict.fromkeys(("w", "dw"), size * w)
        return (
            sizes
            | dict.fromkeys(("p", "dp"), size * y)
            | {
                "dx": x,
                "di": size * math.prod(self.block.x),
                "r": z if convolution.residual else 0,
                "dr": 0 if self.final else size * y,
                "carried": x if unit in self.carrying else 0,
                "cmask": x / size / 8 if unit in self.carrying and self.kind == "end" else 0,
                "mask": z / size / 8 if ends else 0,
                "prev": touched if unit.reads != "x" else 0,
                "i8": y,
                "i64": 8 * y,
            }
        )


def _head(network: Network, rules: dict[str, str], mode: Mode, dtype: torch.dtype) -> Iterator[Kernel]:
    size = dtype.itemsize
    features, logits = network.batch * network.features, network.batch * network.classes
    weight = network.features * network.classes
    y = size * math.prod(network.blocks[-1].y)
    sizes: dict[str, float] = {"y": y, "dy": y, "w": size * weight, "dw": size * weight}
    sizes |= dict.fromkeys(("v", "dv"), size * features) | dict.fromkeys(("o", "do"), size * logits)
    flops = 2 * features * network.classes
    yield from _emit("head", "mean", "mean", rules, sizes)
    yield from _emit("head", "classifier", "classify", rules, sizes, flops)
    if mode == "train":
        for step in ("classify dgrad", "classify wgrad"):
            yield from _emit("head", "classifier", step, rules, sizes, flops)
        yield from _emit("head", "mean", "mean backward", rules, sizes)


def _parameters(network: Network, rules: dict[str, str], mode: Mode, dtype: torch.dtype) -> Iterator[Kernel]:
    """Inference is in one dtype; training in less than float32 is autocast's, with float32 parameters and images."""
    if mode == "eval":
        return
    size, count = dtype.itemsize, network.parameters
    images = math.prod(network.blocks[0].x)
    sizes: dict[str, float] = {"images": 4 * images, "x": size * images, "w": size * count, "dw": size * count}
    sizes |= dict.fromkeys(("masters", "grads", "buffers"), 4 * count)
    if dtype != torch.float32:
        for step in ("cast images", "cast weights", "cast gradients"):
            yield from _emit("parameters", "all", step, rules, sizes)
    yield from _emit("parameters", "all", "optimizer", rules, sizes)
