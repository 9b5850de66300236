"""What a block will do, decided before it is done: checks, what to save, which kernel runs each step.

Planning is pure and cached: the same description gives the same plan, nothing is timed, no tensor is touched. Values
have names: ``x`` is the block's input, ``z0, z1, ...`` are raw convolution outputs, ``a0, a1, ...`` what the next
convolution reads, ``zs`` the projection's convolution. A fused convolution reads ``z0`` where another reads ``a0``:
it normalises as it loads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fused_res.checks import TensorMeta, check_block, check_tensors
from fused_res.choice import Choice, choose
from fused_res.layout import is_channels_last
from fused_res.spec import BlockSpec, UnitSpec


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
    kernels: Choice

    @cached_property
    def source(self) -> str:
        """The raw value behind what the convolution reads."""
        return "x" if self.reads == "x" else "z" + self.reads[1:]

    @cached_property
    def forward_reads(self) -> str:
        return self.source if self.kernels.forward == "fused" else self.reads

    @cached_property
    def backward_reads(self) -> str:
        return self.source if self.kernels.backward == "fused" else self.reads

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
    group: str  # of the processes whose batches together give the statistics; "" for this one alone
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
    choices: tuple[Choice | None, ...] | None = None,
    preference: str = "planned",
    group: str = "",
) -> Plan:
    """The plan for these tensors; raises ValueError or TypeError for any that do not fit the spec.

    ``requires_grad`` (the input's first) stands in for the tensors' own flags inside an operator that runs below
    autograd, where those say nothing; ``choices``, as far as they are not None, for the static ones;
    ``preference`` for :func:`fused_res.backends.registry.convolution`; ``group`` for
    :mod:`fused_res.distributed`.
    """
    # This runs for every block of every step: plain tuples, and one look into the cache.
    try:
        metas = tuple([None if t is None else (t.shape, t.dtype, t.requires_grad, t.device) for t in (input, *tensors)])
    except AttributeError:
        check_tensors(spec, tensors)
        raise
    if requires_grad is None and not torch.is_grad_enabled():
        requires_grad = (False,) * len(metas)
    # Fake tensors may have symbolic sizes, which cannot be dictionary keys.
    checked = _checked.__wrapped__ if isinstance(input, FakeTensor) else _checked
    channels_last = is_channels_last(input)
    return checked(spec, metas, channels_last, training, recompute, backend, requires_grad, choices, preference, group)


@lru_cache(maxsize=4096)
def _checked(
    spec: BlockSpec,
    metas: tuple[tuple | None, ...],
    channels_last: bool,
    training: tuple[bool, ...],
    recompute: str,
    backend: str,
    requires_grad: tuple[bool, ...] | None,
    choices: tuple[Choice | None, ...] | None,
    preference: str,
    group: str,
) -> Plan:
    input, *tensors = (None if meta is None else TensorMeta(*meta) for meta in metas)
    assert input is not None
    check_block(spec, input, tensors, training, alone=not group)
    if requires_grad is None:
        requires_grad = tuple(meta is not None and meta[2] for meta in metas)
    weights = [meta and meta.shape for meta in tensors[::6]]
    static = static_choices(spec, weights, input.dtype, channels_last, backend, preference)
    merged = tuple(given or own for given, own in zip(choices or static, static, strict=True))
    return decide(spec, requires_grad, channels_last, training, recompute, backend, merged, group)


def static_choices(
    spec: BlockSpec,
    weights: Sequence[Sequence[int] | None],
    dtype: torch.dtype,
    channels_last: bool,
    backend: str,
    preference: str,
) -> tuple[Choice, ...]:
    """Who computes each convolution, as far as that can be told without measuring; ``weights`` are their shapes."""
    return tuple(
        choose(unit, tuple(weight or ()), dtype, channels_last, unit is spec.projection, backend, preference)
        for unit, weight in zip(spec.convolutions, weights, strict=True)
    )


@lru_cache(maxsize=4096)
def decide(
    spec: BlockSpec,
    requires_grad: tuple[bool, ...],
    channels_last: bool,
    training: tuple[bool, ...],
    recompute: str,
    backend: str,
    choices: tuple[Choice, ...],
    group: str = "",
) -> Plan:
    """The plan, without a look at the tensors: what depends on their shapes is in ``choices``."""
    grad_input, *rest = requires_grad
    owned = [rest[6 * index : 6 * index + 6] for index in range(len(spec.convolutions))]

    units: list[Unit] = []
    reads, grad_reads = "x", grad_input
    for index, unit_spec in enumerate(spec.units):
        made = f"z{index}"
        units.append(_unit(unit_spec, index, reads, made, training[index], grad_reads, owned[index], choices[index]))
        reads, grad_reads = f"a{index}", units[-1].grad_norm
    projection = None
    if spec.projection is not None:
        last = len(spec.units)
        projection = _unit(spec.projection, last, "x", "zs", training[last], grad_input, owned[last], choices[last])

    all_units = units if projection is None else [*units, projection]
    grad = grad_input or any(unit.grad_norm for unit in all_units)
    # What a fused convolution reads is never in memory.
    skipped = {unit.reads for unit in units[1:] if unit.kernels.forward == "fused"}
    saved = saved_names(units, projection, kept_names(spec, recompute) - skipped, grad_input)
    steps = _steps(spec, all_units, saved, backend, group)
    return Plan(spec, tuple(units), projection, channels_last, backend, group, grad_input, grad, saved, steps)


def _unit(
    spec: UnitSpec,
    index: int,
    reads: str,
    makes: str,
    training: bool,
    grad_reads: bool,
    requires_grad: Sequence[bool],
    kernels: Choice,
) -> Unit:
    weight, bias, norm_weight, norm_bias = requires_grad[:4]
    grad_z = grad_reads or weight or bias
    return Unit(spec, index, reads, makes, training, grad_z, grad_reads, weight, bias, norm_weight, norm_bias, kernels)


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
            require(made_by[name].forward_reads)
        else:
            require("z" + name[1:])

    for unit in made_by.values():
        if unit.grad_weight:
            require(unit.backward_reads)
        if unit.grad_norm:
            require(unit.makes)
    return tuple(sorted(saved))


def _steps(spec: BlockSpec, units: Sequence[Unit], saved: Sequence[str], backend: str, group: str) -> tuple[Step, ...]:
    steps = []
    for unit in units:
        name, kernels = unit.makes, unit.kernels
        steps.append(Step(f"{unit.forward_reads} -> {name}", f"{kernels.kernels} convolution", kernels.reason))
        statistics = "batch statistics" if unit.training else "running statistics"
        if unit.training and group:
            statistics += " of all processes"
        if unit.index == len(spec.units):
            steps.append(Step(f"{name} -> statistics", backend, f"{statistics}, for the norm that adds it"))
            continue
        reason, extra = f"one pass behind {statistics}", ""
        if unit.index == len(spec.units) - 1 and spec.shortcut != "none":
            extra = " + residual"
            if spec.projection is not None:
                reason += ", normalises the projection in the same pass"
        elif unit.index < len(spec.units) - 1 and units[unit.index + 1].kernels.forward == "fused":
            reason = f"{statistics}; applied by the next convolution as it loads"
        act = f" + {unit.spec.activation}" if unit.spec.relu else ""
        steps.append(Step(f"{name} -> norm{extra}{act}", backend, reason))
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
