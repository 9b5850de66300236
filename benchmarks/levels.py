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
from fused_res.choice import Choice
from fused_res.plan import Unit, static_choices

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

_ALL_FUSED = Choice("fused", "fused", "every one")


@dataclass(frozen=True)
class Level:
    """`convolutions`: whose they are in training; in inference they are fused where the table says how."""

    title: str
    convolutions: str  # "aten", "planned" or "fused"
    training: dict[str, str]
    inference: dict[str, str]

    def choices(self, block: Block, dtype: torch.dtype, mode: Mode) -> tuple[Choice, ...]:
        read = block.read
        if self.convolutions == "planned" and mode == "train":
            weights = [convolution.weight for convolution in block.convolutions]
            return static_choices(read.spec, weights, dtype, True, "triton", "planned")
        choice = Choice() if self.convolutions == "aten" else _ALL_FUSED
        return (choice,) * len(block.convolutions)


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
        made += _Walk(block, rules, level.choices(block, dtype, mode), mode, dtype, grad_input=index > 0, final=final)
    return made + list(_head(network, rules, mode, dtype)) + list(_parameters(network, rules, mode, dtype))


def _emit(
    stage: str, layer: str, step: str, rules: dict[str, str], sizes: dict[str, float], flops: float = 0
) -> Iterator[Kernel]:
    for rule in filter(None, map(str.strip, rules.get(step, "").split(";"))):
        yield Kernel(stage, layer, step, rule, sum(sizes[name] for name in rule.replace(">", " ").split()), flops)


class _Walk:
    """One block's kernels: its executors' steps (:mod:`fused_res.block`), as the plan has them."""

    def __init__(
        self,
        block: Block,
        rules: dict[str, str],
        choices: tuple[Choice, ...],
        mode: Mode,
        dtype: torch.dtype,
        grad_input: bool,
        final: bool,
    ) -> None:
        self.block, self.rules, self.final = block, rules, final
        self.training, self.itemsize = mode == "train", dtype.itemsize
        self.plan = block.plan(choices, self.training, grad_input, "triton")
        shortcut = block.read.spec.shortcut
        self.kind = {"none": "", "identity": "end"}[shortcut] if isinstance(shortcut, str) else "pair"

    def __iter__(self) -> Iterator[Kernel]:
        yield from self._forward()
        if self.training:
            yield from self._backward()

    def _forward(self) -> Iterator[Kernel]:
        *inner, last = self.plan.units
        for unit, following in zip(inner, self.plan.units[1:], strict=True):
            yield from self._convolve(unit)
            if following.kernels.forward != "fused":
                yield from self._step("apply", unit)
        yield from self._convolve(last)
        if self.plan.projection is not None:
            yield from self._convolve(self.plan.projection)
        yield from self._step("pool" if self.plan.spec.pool else self.kind or "apply", last)

    def _convolve(self, unit: Unit) -> Iterator[Kernel]:
        fused = unit.kernels.forward == "fused"
        yield from self._step("fused conv" if fused else "conv", unit, self._convolution(unit).flops)
        if self.training and not fused:
            yield from self._step("stats", unit)

    def _backward(self) -> Iterator[Kernel]:
        *_, last = self.plan.units
        projection = self.plan.projection
        fused = [unit for unit in (last, projection) if unit is not None and unit.kernels.backward == "fused"]
        summed, formed = bool(self.kind), bool(self.kind) and not fused
        if self.plan.spec.pool is not None and not fused:
            yield from self._step("pool backward", last)
        if summed:
            yield from self._step(f"{self.kind} sums", last)
        if formed:
            yield from self._step(f"{self.kind} dx", last)
        for unit in reversed(self.plan.units):
            yield from self._unit_backward(unit, summed, formed)
            # A fused gradient of the input brings the sums of the norm before it.
            summed, formed = unit.kernels.backward == "fused", False
        if projection is not None:
            yield from self._unit_backward(projection, True, not fused)
        if self.plan.grad_input and self.kind and not self._carries(self.plan.units[0]):
            source = {"end": "identity"}.get(self.kind, "fused projection" if projection in fused else "projection")
            yield from self._step(f"add {source}", projection or last)

    def _carries(self, unit: Unit) -> bool:
        """Whether the convolution's input gradient takes in the shortcut's: :func:`fused_res.block.backward`."""
        if unit.reads != "x" or unit.makes == "zs" or not self.kind or unit.kernels.backward != "fused":
            return False
        projection = self.plan.projection
        strided = projection is not None and projection.spec.stride != (1, 1)
        return not (strided and projection is not None and projection.kernels.backward == "fused")

    def _unit_backward(self, unit: Unit, summed: bool, formed: bool) -> Iterator[Kernel]:
        flops = self._convolution(unit).flops
        fused = "fused " if unit.kernels.backward == "fused" else ""
        together = {"zs": "projection backward"}.get(unit.makes, "pool backward" if self.plan.spec.pool else "backward")
        if fused and fused + together in self.rules:
            yield from self._step(fused + together, unit, flops * (1 + unit.grad_reads))
            return
        if not summed:
            yield from self._step("sums", unit)
        if not fused and not formed:
            yield from self._step("dx", unit)
        if unit.grad_reads:
            yield from self._step(f"{fused}dgrad", unit, flops)
        yield from self._step(f"{fused}wgrad", unit, flops)

    def _convolution(self, unit: Unit) -> Convolution:
        return self.block.convolutions[unit.index]

    def _step(self, step: str, unit: Unit, flops: float = 0) -> Iterator[Kernel]:
        convolution = self._convolution(unit)
        return _emit(self.block.stage, convolution.name, step, self.rules, self._sizes(unit, convolution), flops)

    def _sizes(self, unit: Unit, convolution: Convolution) -> dict[str, float]:
        size = self.itemsize
        x, z, w = size * math.prod(convolution.x), size * math.prod(convolution.z), math.prod(convolution.weight)
        touched, y = size * convolution.touched, math.prod(self.block.y)
        ends = bool(self.kind) and (convolution.residual or unit.makes == "zs")
        sizes: dict[str, float] = dict.fromkeys(("z", "a", "y", "zs", "da", "dy", "dz", "dzs", "g"), z)
        return sizes | {
            "x": touched,
            "dxt": touched,
            "dx": x,
            "di": size * math.prod(self.block.x),
            "w": size * w,
            "dw": size * w,
            "r": z if convolution.residual else 0,
            "dr": 0 if self.final else size * y,
            "carried": x if self._carries(unit) else 0,
            "cmask": x / size / 8 if self._carries(unit) and self.kind == "end" else 0,
            "mask": z / size / 8 if ends else 0,
            "prev": touched if unit.reads != "x" else 0,
            "p": size * y,
            "dp": size * y,
            "i8": y,
            "i64": 8 * y,
        }


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
