"""What a block will do, decided before it is done: checks, what to save, which kernel runs each step.

Planning is pure and cached: the same description gives the same plan, nothing is timed, no tensor is touched. Values
have names: ``x`` is the block's input, ``z0, z1, ...`` are raw convolution outputs, ``a0, a1, ...`` what the next
convolution reads, ``zs`` the projection's convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fused_res.ops import is_channels_last
from fused_res.spec import BlockSpec, UnitSpec

#: How much a block recomputes in backward instead of keeping it.
RECOMPUTE = ("none", "norm", "conv")


class TensorMeta(NamedTuple):
    """What planning needs to know of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool


class Step(NamedTuple):
    """One line of a plan as a person reads it."""

    name: str
    kernel: str
    reason: str


@dataclass(frozen=True)
class Unit:
    """A unit inside a plan: its spec, the names of what it reads and makes, and which gradients are wanted."""

    spec: UnitSpec
    index: int  # of its six tensors, and of its statistics
    reads: str
    makes: str
    training: bool
    grad_z: bool  # whether the gradient has to reach the convolution's output
    grad_reads: bool
    grad_weight: bool
    grad_bias: bool
    grad_norm_weight: bool
    grad_norm_bias: bool

    @cached_property
    def grad_norm(self) -> bool:
        """Whether the norm has a backward at all."""
        return self.grad_z or self.grad_norm_weight or self.grad_norm_bias

    @cached_property
    def grads(self) -> tuple[bool, bool, bool, bool]:
        """Which of the unit's first four tensors want a gradient."""
        return self.grad_weight, self.grad_bias, self.grad_norm_weight, self.grad_norm_bias


@dataclass(frozen=True)
class Plan:
    spec: BlockSpec
    units: tuple[Unit, ...]
    projection: Unit | None
    channels_last: bool  # the memory that an addition, its mask and its gradient agree on
    backend: str
    grad_input: bool
    grad: bool
    saved: tuple[str, ...]
    steps: tuple[Step, ...]

    @cached_property
    def all_units(self) -> tuple[Unit, ...]:
        return self.units if self.projection is None else (*self.units, self.projection)

    @cached_property
    def added(self) -> tuple[str, ...]:
        """The convolution outputs that meet in the addition, once normalised."""
        if self.spec.shortcut == "none":
            return ()
        return (self.units[-1].makes, "zs")

    @cached_property
    def inference(self) -> bool:
        """Nobody will ask for anything but the output: norms may write over the convolutions' outputs."""
        return not self.grad and not any(unit.training for unit in self.all_units)

    @cached_property
    def save_mask(self) -> bool:
        """The last ReLU's mask needs a bit an element where a residual was added; else ``z`` and ``stats`` give it."""
        return self.grad and self.spec.shortcut != "none" and self.spec.units[-1].relu

    def __str__(self) -> str:
        width = max(len(step.name) for step in self.steps)
        return "\n".join(f"{step.name:<{width}}  {step.kernel}: {step.reason}" for step in self.steps)


def plan(
    spec: BlockSpec,
    input: Tensor,
    tensors: Sequence[Tensor | None],
    training: tuple[bool, ...],
    recompute: str,
    backend: str,
    requires_grad: tuple[bool, ...] | None = None,
) -> Plan:
    """The plan for these tensors; raises ValueError or TypeError for any that do not fit the spec.

    ``requires_grad`` (the input's first) stands in for the tensors' own flags inside an operator that runs below
    autograd, where those say nothing.
    """
    # This runs for every block of every step: plain tuples, and one look into the cache.
    metas = tuple([None if t is None else (t.shape, t.dtype, t.requires_grad) for t in (input, *tensors)])
    if requires_grad is None and not torch.is_grad_enabled():
        requires_grad = (False,) * len(metas)
    # Fake tensors may have symbolic sizes, which cannot be dictionary keys.
    checked = _checked.__wrapped__ if isinstance(input, FakeTensor) else _checked
    return checked(spec, metas, is_channels_last(input), training, recompute, backend, requires_grad)


@lru_cache(maxsize=4096)
def _checked(
    spec: BlockSpec,
    metas: tuple[tuple | None, ...],
    channels_last: bool,
    training: tuple[bool, ...],
    recompute: str,
    backend: str,
    requires_grad: tuple[bool, ...] | None,
) -> Plan:
    input, *tensors = (None if meta is None else TensorMeta(*meta) for meta in metas)
    assert input is not None
    check_block(spec, input, tensors, training)
    if requires_grad is None:
        requires_grad = tuple(meta is not None and meta[2] for meta in metas)
    return decide(spec, requires_grad, channels_last, training, recompute, backend)


@lru_cache(maxsize=4096)
def decide(
    spec: BlockSpec,
    requires_grad: tuple[bool, ...],
    channels_last: bool,
    training: tuple[bool, ...],
    recompute: str,
    backend: str,
) -> Plan:
    """The plan, without a look at the tensors: nothing in it depends on their shapes as yet."""
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute must be one of {RECOMPUTE}, got {recompute!r}")
    grad_input, *rest = requires_grad
    owned = [rest[6 * index : 6 * index + 6] for index in range(len(spec.convolutions))]

    units: list[Unit] = []
    reads, grad_reads = "x", grad_input
    for index, unit_spec in enumerate(spec.units):
        units.append(_unit(unit_spec, index, reads, f"z{index}", training[index], grad_reads, owned[index]))
        reads, grad_reads = f"a{index}", units[-1].grad_norm
    projection = None
    if spec.projection is not None:
        last = len(spec.units)
        projection = _unit(spec.projection, last, "x", "zs", training[last], grad_input, owned[last])

    all_units = units if projection is None else [*units, projection]
    grad = grad_input or any(unit.grad_norm for unit in all_units)
    saved = saved_names(units, projection, kept_names(spec, recompute), grad_input)
    steps = _steps(spec, all_units, saved, backend)
    return Plan(spec, tuple(units), projection, channels_last, backend, grad_input, grad, saved, steps)


def _unit(
    spec: UnitSpec,
    index: int,
    reads: str,
    makes: str,
    training: bool,
    grad_reads: bool,
    requires_grad: Sequence[bool],
) -> Unit:
    weight, bias, norm_weight, norm_bias = requires_grad[:4]
    grad_z = grad_reads or weight or bias
    return Unit(spec, index, reads, makes, training, grad_z, grad_reads, weight, bias, norm_weight, norm_bias)


def kept_names(spec: BlockSpec, recompute: str) -> frozenset[str]:
    """Which values a recompute level is willing to keep; the others are made again in backward, when asked for.

    *none* keeps all; *norm* gives up what a normalise and a ReLU bring back (``a*``); *conv* gives up as well the raw
    outputs that a 1x1 convolution brings back: a bottleneck's last, and the projection's. A convolution without
    padding and with stride 1 passes for 1x1.
    """
    count = len(spec.units)
    kept = {"x", "zs", *(f"z{index}" for index in range(count))}
    if recompute == "none":
        kept |= {f"a{index}" for index in range(count)}
    if recompute == "conv":
        kept.discard("zs")
        last = spec.units[-1]
        if count > 1 and set(last.padding) == {0} and set(last.stride) == {1}:
            kept.discard(f"z{count - 1}")
    return frozenset(kept)


def saved_names(
    units: Sequence[Unit], projection: Unit | None, kept: frozenset[str], grad_input: bool
) -> tuple[str, ...]:
    """The values that backward reads, and no others, each kept or replaced by what it is recomputed from."""
    made_by = {unit.makes: unit for unit in units} | ({} if projection is None else {"zs": projection})
    # A gradient of the input needs its shape, and a second derivative the input itself; stock PyTorch keeps it too.
    saved = {"x"} if grad_input else set()

    def require(name: str) -> None:
        if name in kept:
            saved.add(name)
        elif name in made_by:
            require(made_by[name].reads)
        else:
            require("z" + name[1:])

    for unit in made_by.values():
        if unit.grad_weight:
            require(unit.reads)
        if unit.grad_norm:
            require(unit.makes)
    return tuple(sorted(saved))


def check_block(
    spec: BlockSpec,
    input: TensorMeta,
    tensors: Sequence[TensorMeta | None],
    training: Sequence[bool],
) -> None:
    """Raises for the first tensor that does not fit, by name, before anything is computed or written."""
    names = spec.tensor_names()
    if len(tensors) != len(names):
        raise ValueError(f"tensors must hold {len(names)} entries ({names[0]!r} ... {names[-1]!r}), got {len(tensors)}")
    spatial = len(spec.units[0].stride)
    if len(input.shape) != spatial + 2:
        raise ValueError(f"input must have {spatial + 2} dimensions (N, C, ...), got {len(input.shape)}")
    shape = tuple(input.shape)
    for index, unit in enumerate(spec.units):
        shape = _check_unit(unit, str(index), shape, input.dtype, tensors[6 * index :], training[index])
    if spec.projection is None:
        shortcut = tuple(input.shape)
    else:
        last = len(spec.units)
        shortcut = _check_unit(
            spec.projection, "shortcut", tuple(input.shape), input.dtype, tensors[6 * last :], training[last]
        )
    if spec.shortcut != "none" and shortcut != shape:
        raise ValueError(f"shortcut has the shape {shortcut}, the chain's output {shape}: they cannot be added")
    if spec.pool is not None and spatial != 2:
        raise ValueError(f"pool is for images: input must have 4 dimensions, got {spatial + 2}")


def _check_unit(
    spec: UnitSpec,
    owner: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    tensors: Sequence[TensorMeta | None],
    training: bool,
) -> tuple[int, ...]:
    weight, bias, *norm = tensors[:6]
    if weight is None or len(weight.shape) != len(shape):
        got = None if weight is None else tuple(weight.shape)
        raise ValueError(f"{owner}.weight must have {len(shape)} dimensions, got {got}")
    for name, meta in (("weight", weight), ("bias", bias)):
        if meta is not None and meta.dtype != dtype:
            raise TypeError(f"{owner}.{name} must have the input's dtype {dtype}, got {meta.dtype}")
    if weight.shape[1] * spec.groups != shape[1]:
        raise ValueError(
            f"{owner}.weight {tuple(weight.shape)} with groups={spec.groups} reads"
            f" {weight.shape[1] * spec.groups} channels, and is given {shape[1]}"
        )
    channels = weight.shape[0]
    if channels % spec.groups:
        raise ValueError(f"{owner}.weight makes {channels} channels, which groups={spec.groups} does not divide")
    for name, meta in zip(
        ("bias", "norm_weight", "norm_bias", "running_mean", "running_var"), (bias, *norm), strict=True
    ):
        if meta is not None and tuple(meta.shape) != (channels,):
            raise ValueError(f"{owner}.{name} must have the shape ({channels},), got {tuple(meta.shape)}")
    if not training and (norm[2] is None or norm[3] is None):
        raise ValueError(f"{owner}.running_mean and running_var are needed where training is False")
    taps = zip(shape[2:], weight.shape[2:], spec.stride, spec.padding, spec.dilation, strict=True)
    output = [
        (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1 for size, kernel, stride, pad, dilation in taps
    ]
    if any(size < 1 for size in output):
        raise ValueError(f"{owner}: input of {shape[2:]} is too small for a kernel of {tuple(weight.shape[2:])}")
    made = (shape[0], channels, *output)
    if training:
        check_batch(made)
    return made


def check_batch(shape: Sequence[int]) -> None:
    """PyTorch's own check, in its own words: one value has no variance."""
    values = shape[0]
    for size in shape[2:]:
        values *= size
    if values == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {list(shape)}")


def _steps(spec: BlockSpec, units: Sequence[Unit], saved: Sequence[str], backend: str) -> tuple[Step, ...]:
    steps = []
    for unit in units:
        statistics = "batch statistics" if unit.training else "running statistics"
        is_last = unit.index == len(spec.units) - 1
        extra = " + residual" if is_last and spec.shortcut != "none" else ""
        act = f" + {unit.spec.activation}" if unit.spec.relu else ""
        steps.append(Step(f"{unit.reads} -> {unit.makes}", "aten.convolution", "the only convolution of this version"))
        steps.append(Step(f"{unit.makes} -> norm{extra}{act}", backend, f"one pass behind {statistics}"))
    if spec.pool is not None:
        steps.append(Step("max pool", backend, "normalises while it pools, keeps 1-byte indices"))
    steps.append(
        Step(
            "saved",
            ", ".join(saved) or "nothing",
            "what backward reads" if saved else "no gradient asked for",
        )
    )
    return tuple(steps)
