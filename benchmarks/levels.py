"""Memory traffic and FLOPs of every kernel of a training step or an inference, at five levels of fusion.

The traffic rules are the tables below. They list, for each step, the kernels that compute it, separated by ``;``, each
as ``reads > writes``. A step that is missing from a level's table is computed by the kernel of another step.
Per-channel vectors, the loss and its softmax are omitted (below 0.1 %). No cache reuse between kernels is assumed.

====================  ==============================================================================================
x, dx                 the elements that a convolution reads from its input, and the gradient of the whole input
dx_read               the gradient of the elements read
w, dw                 the weight and its gradient
z, a, y               a convolution's output, the same after norm and ReLU, and the block's output; r: the residual
                      operand; zs: the projection's z
da, dy, dz, dzs, g    their gradients; g: masked by a ReLU
block_dx              gradient of the block's input, from the main branch or from the shortcut
dr                    contribution of the next block's shortcut to dy
shortcut_grad         gradient of the shortcut where the first convolution's dgrad adds it
shortcut_mask         the ReLU mask of an identity shortcut's gradient
mask, p, i8, i64      ReLU mask (one bit per element), max pool output (gradient: dp) and its indices of 1 or 8 bytes
x_reread              x read again in an epilogue that accumulates the reductions of the preceding norm's backward
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
from fused_res.backends.implicit_gemm import IMPLICIT_GEMM
from fused_res.block.plan import Plan, Unit
from fused_res.block.program import NO_SLOT, Step
from fused_res.dispatch import Algorithm, Selection, TrainingAlgorithms
from fused_res.spec import group_by_unit

#: Not fused at any level. Under autocast the master weights are float32: weights are cast, their gradients cast back.
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
    "add identity": "block_dx g > block_dx",
    "add projection": "block_dx block_dx > block_dx",
}
#: As Inductor fuses: elementwise operations are fused into their consumer, a reduction is a separate kernel.
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
#: `batch_norm_act` as the block calls it: one kernel after the statistics, one mask bit for a ReLU after an addition.
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
    "add identity": "block_dx dy mask > block_dx",
    "add projection": "block_dx block_dx > block_dx",
}
#: Where the planner selects the backend's fused convolutions: statistics in the epilogue, norm and ReLU in the operand
#: prologue, dz computed in the operand prologue. Other convolutions as in `_NORM`.
_FUSED = _NORM | {
    "fused conv": "x w > z",
    "fused dgrad": "dy mask z w x_reread shortcut_grad shortcut_mask > dx_read",
    "adding dgrad": "dz w shortcut_grad shortcut_mask > dx",
    "fused wgrad": "dy mask z x > dw",
    "add fused projection": "dx_read dx_read > dx_read",
}
#: Lower bound, not implemented: all convolutions fused, both gradients in one kernel, reductions in epilogues, no mask.
_LOWER_BOUND_RULES = {
    "fused conv": "x w > z",
    "end": "z r > y",
    "pair": "z zs > y",
    "pool": "z > p",
    "fused backward": "dy z w x shortcut_grad > dx dw",
    "fused projection backward": "dy z w x > dw",
    "fused pool backward": "dp z x > dw",
    "optimizer": "masters buffers grads > masters buffers",
}

_EAGER_INFERENCE = {name: _EAGER[name] for name in ("apply", "end", "pair", "pool")}
_COMPILE_INFERENCE = {name: _COMPILE[name] for name in ("apply", "end", "pair")} | {"pool": "z > a; a > p"}
_NORM_INFERENCE = {"apply": "z > a", "end": "z r > y", "pair": "z zs > y", "pool": "z > p i8"}
#: A frozen network: `conv_bias_act` for all convolutions, and PyTorch's pooling.
_FUSED_INFERENCE = {"fused conv": "x w r > y", "pool": "a > p i64"}
_LOWER_BOUND_INFERENCE_RULES = {"fused conv": "x w r > y", "pool": "a > p"}

_LOWER_BOUND = Selection(
    Algorithm("lower_bound", lambda problem: None, {}, fused=True, compact_input_gradient=True), "lower bound"
)
_LOWER_BOUND_ALGORITHMS = TrainingAlgorithms(_LOWER_BOUND, _LOWER_BOUND, _LOWER_BOUND)
_FUSED_ALGORITHMS = TrainingAlgorithms(*(Selection(IMPLICIT_GEMM, ""),) * 3)


@dataclass(frozen=True)
class Level:
    """One level of fusion.

    Args:
        title: description in the printed tables.
        conv_source: convolutions: "aten", "fused" (1x1 fused with their norms in training, all in inference) or "bound"
            (the lower bound).
        training: traffic rules of a training step.
        inference: traffic rules of an inference.
    """

    title: str
    conv_source: str
    training: dict[str, str]
    inference: dict[str, str]

    def plan(self, block: Block, dtype: torch.dtype, mode: Mode, grad_input: bool) -> Plan:
        def algorithms(layer: Convolution) -> TrainingAlgorithms | None:
            if self.conv_source == "bound" or (self.conv_source == "fused" and mode == "eval"):
                return _LOWER_BOUND_ALGORITHMS
            return _FUSED_ALGORITHMS if self.conv_source == "fused" and set(layer.weight[2:]) == {1} else None

        per_unit = tuple(map(algorithms, block.convolutions))
        return block.plan(dtype, mode == "train", grad_input, "triton", "aten", per_unit)


LEVELS = {
    "eager": Level("one PyTorch kernel per operator", "aten", _ATEN | _EAGER, _ATEN | _EAGER_INFERENCE),
    "compile": Level("norms fused as by Inductor", "aten", _ATEN | _COMPILE, _ATEN | _COMPILE_INFERENCE),
    "norm": Level("batch_norm_act after PyTorch's convolutions", "aten", _ATEN | _NORM, _ATEN | _NORM_INFERENCE),
    "fused": Level("also 1x1 convolutions fused with their norms", "fused", _ATEN | _FUSED, _FUSED_INFERENCE),
    "fewest": Level(
        "lower bound: each convolution tensor is read or written once per direction",
        "bound",
        _LOWER_BOUND_RULES,
        _LOWER_BOUND_INFERENCE_RULES,
    ),
}


class Kernel(NamedTuple):
    stage: str
    layer: str
    step: str
    traffic_rule: str
    bytes: float
    flops: float


def kernels(network: Network, level: Level, mode: Mode, dtype: torch.dtype) -> list[Kernel]:
    """Return every kernel of a step, in the order of the forward; a block's backward follows its forward."""
    rules = _COMMON | (level.training if mode == "train" else level.inference)
    result: list[Kernel] = []
    for index, block in enumerate(network.blocks):
        final = index == len(network.blocks) - 1
        result += _BlockKernels(block, rules, level.plan(block, dtype, mode, index > 0), dtype, final)
    return result + list(_head(network, rules, mode, dtype)) + list(_parameters(network, rules, mode, dtype))


def _emit(
    stage: str, layer: str, step: str, rules: dict[str, str], sizes: dict[str, float], flops: float = 0
) -> Iterator[Kernel]:
    for rule in filter(None, map(str.strip, rules.get(step, "").split(";"))):
        yield Kernel(stage, layer, step, rule, sum(sizes[name] for name in rule.replace(">", " ").split()), flops)


#: The steps that each operator of a plan's programs computes. Other operators read and write only per-channel vectors
#: (`merge_stats`), or are no-ops in channels_last (`to_memory_format`). At the last norm of a residual block, `{end}`
#: and `{apply}` are its kind: `end` (identity shortcut) or `pair` (projection). At other norms `{end}` is empty and
#: `{apply}` is `apply`.
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
_OUTPUT_ARG_INDEX = 1  # `output` of conv_dgrad, absent without a prologue
_ADDEND_ARG_INDEX = 11  # `added` and `added_mask` are the last arguments of conv_dgrad


class _BlockKernels:
    """Iterator over the kernels of one block: the steps of its plan's programs."""

    def __init__(self, block: Block, rules: dict[str, str], plan: Plan, dtype: torch.dtype, final: bool) -> None:
        self.block, self.rules, self.plan, self.final = block, rules, plan, final
        self.itemsize = dtype.itemsize
        shortcut = block.unit_chain.spec.shortcut
        self.kind = {"none": "", "identity": "end"}[shortcut] if isinstance(shortcut, str) else "pair"
        weights = [unit.weight for unit in group_by_unit(block.unit_chain.spec.tensor_names())]
        #: Units by the names of their convolution's output and weight.
        self.units = {name: unit for unit in plan.all_units for name in (unit.output_name, weights[unit.index])}
        #: Units whose dgrad adds the shortcut's gradient in its epilogue.
        self.shortcut_grad_units = [
            self._unit(step)
            for step in plan.backward.steps
            if step.operator == "conv_dgrad" and any(slot != NO_SLOT for slot in step.arguments[_ADDEND_ARG_INDEX:])
        ]

    def __iter__(self) -> Iterator[Kernel]:
        for step in self.plan.steps:
            unit = self._unit(step)
            convolution = self.block.convolutions[unit.index]
            for name in self._names(step, unit):
                flops = convolution.flops if name.endswith(("conv", "dgrad", "wgrad")) else 0
                if name.startswith("fused") and name.endswith("backward"):
                    flops = convolution.flops * (1 + unit.needs_input_grad)
                sizes = self._sizes(unit, convolution)
                yield from _emit(self.block.stage, convolution.name, name, self.rules, sizes, flops)

    def _unit(self, step: Step) -> Unit:
        """Return the unit whose convolution output or weight comes first among the results and operands of `step`."""
        names = [self.plan.slot_names[slot] for slot in (*step.results, *step.operands) if slot != NO_SLOT]
        # An addition has neither of them among its names.
        shortcut = self.plan.projection or self.plan.units[-1]
        return next((self.units[name] for name in names if name in self.units), shortcut)

    def _names(self, step: Step, unit: Unit) -> list[str]:
        kind = self.kind if unit is self.plan.units[-1] else ""
        part = "projection " if unit is self.plan.projection else "pool " if self.plan.config.spec.pool else ""
        end = f"{kind} " if kind else ""
        names = _STEPS.get(step.operator, "").format(apply=kind or "apply", end=end, part=part).split("; ")
        if step.operator == "convolution_backward":
            names = [name for name, slot in zip(names, step.results, strict=False) if slot != NO_SLOT]
        if step.operator == "conv_dgrad" and step.arguments[_OUTPUT_ARG_INDEX] == NO_SLOT:
            names = ["adding dgrad"]
        return names

    def _sizes(self, unit: Unit, convolution: Convolution) -> dict[str, float]:
        size = self.itemsize
        x, z, w = size * math.prod(convolution.x), size * math.prod(convolution.z), math.prod(convolution.weight)
        x_read, y = size * convolution.elements_read, math.prod(self.block.y)
        ends_block = bool(self.kind) and (convolution.residual or unit.output_name == "zs")
        sizes: dict[str, float] = dict.fromkeys(("z", "a", "y", "zs", "da", "dy", "dz", "dzs", "g"), z)
        sizes |= dict.fromkeys(("x", "dx_read"), x_read) | dict.fromkeys(("w", "dw"), size * w)
        return (
            sizes
            | dict.fromkeys(("p", "dp"), size * y)
            | {
                "dx": x,
                "block_dx": size * math.prod(self.block.x),
                "r": z if convolution.residual else 0,
                "dr": 0 if self.final else size * y,
                "shortcut_grad": x if unit in self.shortcut_grad_units else 0,
                "shortcut_mask": x / size / 8 if unit in self.shortcut_grad_units and self.kind == "end" else 0,
                "mask": z / size / 8 if ends_block else 0,
                "x_reread": x_read if unit.input_name != "x" else 0,
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
    """Yield the kernels of the casts and the optimizer; inference has none, because it uses one dtype.

    Training below float32 uses autocast, with float32 parameters and images.
    """
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
