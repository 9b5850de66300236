"""Plans a block: selects the algorithms of its convolutions and writes its forward and backward programs.

Planning is pure and cached: the same request gives the same plan, nothing is timed, no tensor is touched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fused_res import _torch_compat
from fused_res._torch_compat import FakeTensor
from fused_res.backends import registry
from fused_res.checks import TensorMeta, check_block, check_tensors
from fused_res.dispatch import Algorithms, Problem, select_training
from fused_res.layout import is_channels_last
from fused_res.plan import BlockConfig, Plan, Request, Unit
from fused_res.program import NONE, Program, Slot, Step
from fused_res.spec import BlockSpec, PoolSpec, by_unit


def plan(
    config: BlockConfig,
    input: Tensor,
    tensors: Sequence[Tensor | None],
    requires_grad: tuple[bool, ...] | None = None,
    algorithms: tuple[Algorithms | None, ...] | None = None,
) -> Plan:
    """The plan for these tensors; raises ValueError or TypeError for any that do not fit the spec.

    ``requires_grad`` and ``algorithms`` are those of :class:`Request`.
    """
    # This runs for every block of every step: plain tuples, and one look into the cache.
    try:
        metas = (_meta(input), *[None if t is None else _meta(t) for t in tensors])
    except AttributeError:
        check_tensors(config.spec, tensors)
        raise
    if requires_grad is None and not torch.is_grad_enabled():
        requires_grad = (False,) * len(metas)
    traced, settings = _is_traced(input, *tensors), registry.settings(config.backend)
    request = Request(config, metas, is_channels_last(input), requires_grad, algorithms, traced, *settings)
    # Fake tensors may have symbolic sizes, which cannot be dictionary keys.
    return _check_and_plan(request) if isinstance(input, FakeTensor) else _checked(request)


def plan_backward(
    config: BlockConfig,
    grad_output: Tensor,
    size: Sequence[int],
    channels_last: bool,
    tensors: Sequence[Tensor | None],
    requires_grad: tuple[bool, ...],
) -> Plan:
    """The plan of a forward that was checked, from what its backward has: the input's size, no running statistics."""
    input = tuple(size), (), grad_output.dtype, False, grad_output.device
    metas = (input, *[None if t is None else _meta(t) for t in tensors])
    traced, settings = _is_traced(grad_output, *tensors), registry.settings(config.backend)
    request = Request(config, metas, channels_last, requires_grad, None, traced, *settings)
    return _plan(request) if isinstance(grad_output, FakeTensor) else plan_for(request)


def _meta(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad, tensor.device


def _is_traced(*tensors: Tensor | None) -> bool:
    if _torch_compat.is_observed():
        return True
    return any(kind is not Tensor and kind is not Parameter and kind is not NoneType for kind in map(type, tensors))


def _check_and_plan(request: Request) -> Plan:
    input, *tensors = (None if meta is None else TensorMeta(*meta) for meta in request.metas)
    assert input is not None
    config = request.config
    check_block(config.spec, input, tensors, config.training, alone=not config.group)
    return _plan(request)


def _plan(request: Request) -> Plan:
    return _Planner(request).plan()


_checked = lru_cache(maxsize=4096)(_check_and_plan)
#: The plan for a request whose tensors were checked.
plan_for = lru_cache(maxsize=4096)(_plan)


def kept_names(spec: BlockSpec, recompute: str) -> frozenset[str]:
    """The values that a recompute level may save; backward computes the others again.

    *none* saves all; *norm* recomputes activations (``a*``) from raw outputs; *conv* recomputes as well the raw outputs
    of 1x1 convolutions: a bottleneck's last, and the projection's. A convolution without padding and with stride 1
    passes for 1x1.
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


@dataclass
class _OutputGrad:
    """The gradient with respect to a norm's output, and the reductions of it that are computed already."""

    dy: Slot
    mask: Slot = NONE  # bits of the ReLU between the two
    masked: bool = False  # that ReLU is applied already
    sums: Slot = NONE  # (2, C): of the masked gradient, and of it times xhat
    totals: Slot = NONE  # these over all processes that share the statistics
    dz: Slot = NONE  # the gradient of the norm's input

    def by_sign(self, unit: Unit) -> bool:
        """Whether the ReLU is still to be applied, by the sign of its input."""
        return unit.spec.relu and self.mask == NONE and not self.masked


class _Planner:
    """Selects the algorithms of one block and writes its programs."""

    def __init__(self, request: Request) -> None:
        config = request.config
        self.request, self.config, self.spec, self.group = request, config, config.spec, config.group
        input, *tensors = (None if meta is None else TensorMeta(*meta) for meta in request.metas)
        assert input is not None
        self.dtype = input.dtype
        flags = request.requires_grad or tuple(bool(meta and meta.requires_grad) for meta in (input, *tensors))
        self.given = ("x", *self.spec.tensor_names())
        self.names, self.slots = list(self.given), {name: Slot(at) for at, name in enumerate(self.given)}
        self.tensors = by_unit([NONE if meta is None else Slot(at) for at, meta in enumerate(tensors, start=1)])
        self.steps: list[Step] = []
        self.counts: list[int] = []  # values a channel of each unit's output
        units: list[Unit] = []
        for unit, owned, wanted in zip(self.spec.convolutions, by_unit(tensors), by_unit(flags[1:]), strict=True):
            index = len(units)
            projection = index == len(self.spec.units)
            if index == 0 or projection:
                reads, shape, grad_reads = "x", tuple(input.shape), flags[0]
            problem = Problem(
                "forward", shape, tuple(owned.weight.shape), *unit.geometry, self.dtype, input.device.type,
                request.channels_last and (reads == "x" or shape[1] > 1),
                weight_channels_last=_is_channels_last_contiguous(owned.weight), projection=projection,
                traced=request.traced, winograd=request.winograd, machine=request.machine,
            )  # fmt: skip
            algorithms = (request.algorithms and request.algorithms[index]) or select_training(
                registry.algorithms(config.backend), problem, config.preference
            )
            makes = "zs" if projection else f"z{index}"
            training = config.training[index]
            units.append(Unit(unit, index, reads, makes, training, grad_reads, wanted, problem, algorithms))
            shape = shape[0], owned.weight.shape[0], *problem.output
            self.counts.append(math.prod((shape[0], *shape[2:])))
            reads, grad_reads = f"a{index}", units[-1].grad_norm
        self.all_units = tuple(units)
        self.projection = units.pop() if self.spec.projection is not None else None
        self.units, self.grad_input = tuple(units), flags[0]
        self.grad = self.grad_input or any(unit.grad_norm for unit in self.all_units)
        #: Only the output is wanted: norms may write over the convolutions' outputs.
        self.inference = not self.grad and not any(config.training)

    def plan(self) -> Plan:
        output = self._forward()
        stats = tuple(self.slots[name] for name in map(_stats, self.all_units) if name in self.slots)
        forward, self.steps = self.steps, []
        if self.grad:
            self._backward()
        grads = tuple(self.slots.get(f"grad {name}", NONE) for name in self.given)
        backward, fixed = Program(tuple(self.steps), grads), {self.slots[name] for name in self.given}
        saved = self._saved(backward, fixed, stats) if self.grad else ()
        return Plan(
            self.request, self.units, self.projection, tuple(self.names),
            Program(tuple(forward), (output,)).freeing({*fixed, *saved, *stats}), backward.freeing(fixed),
            saved, stats, self.grad,
        )  # fmt: skip

    def _saved(self, backward: Program, fixed: set[Slot], stats: Sequence[Slot]) -> tuple[Slot, ...]:
        """What backward reads and does not make, and the input, which a second derivative starts from."""
        made = {self.slots["dy"], *(slot for step in backward.steps for slot in step.results)}
        read = {*stats, *(slot for step in backward.steps for slot in step.operands)} - made
        x = self.slots["x"]
        read = read - fixed | ({x} if self.grad_input or x in read else set())
        # An order that does not depend on the algorithms: fake tensors have others. The mask last, as in caches of
        # Inductor, which does not see a change of an operator's results.
        return tuple(sorted(read, key=lambda slot: (self.names[slot] == "mask", self.names[slot])))

    def _step(self, operator: str, *arguments: Any, into: Sequence[str] = (), **how: Any) -> Slot:
        """Appends a step that writes new slots of these names, "" for a result that is not needed; returns the first.

        A name stands for its latest slot.
        """
        results = []
        for name in into:
            self.names += [name] if name else []
            results.append(Slot(len(self.names) - 1) if name else NONE)
            self.slots |= {name: results[-1]} if name else {}
        self.steps.append(Step(operator, arguments, tuple(results), **how))
        return results[0] if results else NONE

    # Forward

    def _forward(self) -> Slot:
        *inner, last = self.units
        x = y = self.slots["x"]
        for unit, following in zip(inner, self.units[1:], strict=True):
            z, partials = self._convolve(unit, y)
            if following.fused_forward:
                self._statistics(unit, z, partials)
                y = z
            else:
                y = self._normalise(unit, z, partials, NONE, NONE, f"a{unit.index}")
        z, partials = self._convolve(last, y)
        if self.spec.pool is not None:
            stats, into = self._statistics(last, z, partials), ("y", "mask" if self.grad else "")
            return self._step("max_pool_forward", z, stats, last.spec.relu, *_window(self.spec.pool), into=into)
        residual, residual_stats = x if self.spec.shortcut == "identity" else NONE, NONE
        if self.projection is not None:
            # Never written normalised: that happens where it is added.
            residual, its_partials = self._convolve(self.projection, x)
            residual_stats = self._statistics(self.projection, residual, its_partials)
        return self._normalise(last, z, partials, residual, residual_stats, "y")

    def _convolve(self, unit: Unit, x: Slot, recomputed: bool = False) -> tuple[Slot, Slot]:
        """The raw output, and its partial statistics where they are needed and the algorithm returns them."""
        operands = (x, *self.tensors[unit.index][:2])
        statistics = unit.training and not recomputed
        partials = f"partials{unit.index}" if statistics and unit.algorithms.forward.algorithm.statistics else ""
        how: dict[str, Any] = {
            "into": (unit.makes, partials),
            "algorithm": unit.algorithms.forward,
            "recomputed": recomputed,
        }
        if unit.fused_forward:
            self._step("conv_bn_stats", *operands, *self._norm_before(unit), *unit.spec.geometry, statistics, **how)
        else:
            self._step("convolution", *operands, unit.spec.geometry, statistics, **how)
        if self.spec.shortcut != "none" and unit.makes in (self.units[-1].makes, "zs"):
            # The operands of the addition have one layout, that of the mask's bits, whatever each convolution returns.
            z = self.slots[unit.makes]
            self._step("to_memory_format", z, self.request.channels_last, into=(unit.makes,))
        return self.slots[unit.makes], self.slots[partials] if partials else NONE

    def _norm_before(self, unit: Unit) -> tuple[Slot, bool]:
        """Statistics and ReLU of the norm between a raw output and a fused convolution that reads it."""
        if unit.reads == "x":
            return NONE, False
        before = self.units[unit.index - 1]
        return self.slots[_stats(before)], before.spec.relu

    def _statistics(self, unit: Unit, z: Slot, partials: Slot) -> Slot:
        """``stats``; where a group of processes shares them, from the partial statistics of all."""
        norm, into = self.tensors[unit.index].norm, (f"partials{unit.index}",)
        if self.group and unit.training:
            own = self._step("batch_norm_partials", z, into=into) if partials == NONE else partials
            partials = self._step("gather_partials", own, self.group, into=into)
        into, eps = (_stats(unit),), unit.spec.eps
        if partials == NONE:
            return self._step("batch_norm_stats", z, *norm, unit.training, eps, into=into)
        return self._step("merge_stats", partials, *norm[:2], eps, self.dtype == torch.float64, into=into)

    def _normalise(self, unit: Unit, z: Slot, partials: Slot, residual: Slot, residual_stats: Slot, name: str) -> Slot:
        operands, norm, relu = (z, residual, residual_stats), self.tensors[unit.index].norm, unit.spec.relu
        if self.inference:
            self._step("batch_norm_act_inference_", *operands, *norm, unit.spec.eps, relu)
            return z
        # The last ReLU's mask needs a bit an element where a residual was added; else `z` and `stats` give it.
        save_mask = self.grad and residual != NONE and relu
        mask = "mask" if save_mask else ""
        if partials == NONE and not (self.group and unit.training):
            how = unit.training, unit.spec.eps, relu, save_mask
            return self._step("batch_norm_act_forward", *operands, *norm, *how, into=(name, _stats(unit), mask))
        stats = self._statistics(unit, z, partials)
        return self._step("batch_norm_act_apply", z, stats, *operands[1:], relu, save_mask, into=(name, mask))

    # Backward

    def _value(self, name: str) -> Slot:
        """A value of forward: saved, or computed again from what is."""
        if name not in self.available:
            self.available.add(name)
            unit = next(unit for unit in self.all_units if name in (unit.makes, f"a{unit.index}"))
            if name == unit.makes:
                return self._convolve(unit, self._value(unit.forward_reads), recomputed=True)[0]
            operands = self._value(unit.makes), self.slots[_stats(unit)], NONE, NONE
            self._step("batch_norm_act_apply", *operands, unit.spec.relu, False, into=(name, ""), recomputed=True)
        return self.slots[name]

    def _backward(self) -> None:
        self.available = {name for name in kept_names(self.spec, self.config.recompute) if name in self.slots}
        last, projection, mask = self.units[-1], self.projection, self.slots.get("mask", NONE)
        self.names.append("dy")
        self.slots["dy"] = dy = Slot(len(self.names) - 1)
        if self.spec.shortcut != "none":
            dy = self._step("to_memory_format", dy, self.request.channels_last, into=("grad y",))
        grad: _OutputGrad | None = _OutputGrad(dy, mask)
        self.carried = (dy, mask) if self.spec.shortcut == "identity" else (NONE, NONE)  # the shortcut's gradient
        if self.spec.pool is not None:
            operands, window = (dy, mask, self._value(last.makes)), _window(self.spec.pool)
            grad = _OutputGrad(self._step("max_pool_backward", *operands, *window, into=(f"grad a{last.index}",)))
        if projection is not None:
            # The projection's norm has no ReLU, but precedes the block's: its gradient is masked by that one.
            its = _OutputGrad(dy, mask)
            if last.grad_norm and projection.grad_norm:
                assert grad is not None
                self._pair(last, projection, grad, its)
            # First, because it frees more than it makes, and the chain can add its result.
            reached = self._through(projection, its)
            self.carried = NONE if reached is None else reached.dy, NONE
        for unit in reversed(self.units):
            grad = self._through(unit, grad)
        if self.grad_input and not self._adds_carried(self.units[0]):
            dx, added = self.slots["grad x"], self.carried[0]
            if self.spec.shortcut == "identity":
                # The masked gradient is added into the first convolution's: it is never a tensor of its own.
                self._step("add_masked_", dx, *self.carried)
            elif projection is not None and _is_compact(projection):
                self._step("add_strided_", dx, added, projection.spec.stride)
            elif projection is not None:
                self._step("add_", dx, added)

    def _adds_carried(self, unit: Unit) -> bool:
        """Whether the unit's fused input gradient adds the shortcut's."""
        compact = self.projection is not None and _is_compact(self.projection)
        return unit is self.units[0] and unit.fused_backward and self.carried[0] != NONE and not compact

    def _through(self, unit: Unit, grad: _OutputGrad | None) -> _OutputGrad | None:
        """From the gradient of a unit's norm's output to that of the previous norm's."""
        if grad is None or not unit.grad_norm:
            return None
        name = "grad shortcut" if unit is self.projection else f"grad {unit.reads}"
        return (self._fused if unit.fused_backward else self._plain)(unit, grad, name)

    def _plain(self, unit: Unit, grad: _OutputGrad, name: str) -> _OutputGrad | None:
        dz = self._through_norm(unit, grad)
        if not unit.grad_z:
            return None
        weight, bias = self.tensors[unit.index][:2]
        wanted = (unit.grad_reads, unit.grads.weight, unit.grads.bias)
        names = (name, *self._into(unit, "weight", "bias"))
        if not (wanted[0] or wanted[1]):
            self._step("sum_over_channels", dz, into=names[2:])
            return None
        # Only the weight's gradient reads x; the input's takes its shape, which the previous raw output has as well.
        x = self._value(unit.reads if unit.grads.weight else unit.source)
        _, of_input, of_weight = unit.algorithms
        parts = [(of_weight if wanted[1] else of_input, wanted)]
        if wanted[0] and wanted[1] and of_input.algorithm is not of_weight.algorithm:
            parts = [(of_input, (True, False, False)), (of_weight, (False, *wanted[1:]))]
        for algorithm, mask in parts:
            into = [one if flag else "" for one, flag in zip(names, mask, strict=True)]
            operands = dz, x, weight, bias, unit.spec.geometry, mask
            self._step("convolution_backward", *operands, into=into, algorithm=algorithm)
        if not unit.grad_reads:
            return None
        if unit is not self.projection and _is_compact(unit):
            self._step("spread_strided", self.slots[name], x, unit.spec.stride, into=(name,))
        return _OutputGrad(self.slots[name])

    def _fused(self, unit: Unit, grad: _OutputGrad, name: str) -> _OutputGrad | None:
        """Without the gradient of the norm's input, and without the activation that the convolution read."""
        z, stats = self._value(unit.makes), self.slots[_stats(unit)]
        weight, bias = self.tensors[unit.index][:2]
        sums, terms = self._sums(unit, grad), grad.totals if unit.training else NONE
        count = self.counts[unit.index]
        common = (grad.dy, z, stats, grad.mask, grad.by_sign(unit), terms, count, weight)
        x = self._value(unit.source) if unit.grad_reads or unit.grads.weight else NONE
        x_stats, x_relu = self._norm_before(unit)
        _, of_input, of_weight = unit.algorithms
        if unit.grads.weight:
            operands, into = (*common, x, x_stats, x_relu, unit.spec.stride), self._into(unit, "weight")
            self._step("conv_wgrad", *operands, into=into, algorithm=of_weight)
        if unit.grads.bias:
            self._step("conv_bias_gradient", bias, stats, sums, unit.training, into=self._into(unit, "bias"))
        if not unit.grad_reads:
            return None
        if x_stats == NONE:
            carried = self.carried if self._adds_carried(unit) else (NONE, NONE)
            dx = self._step("conv_dgrad", *common, NONE, NONE, False, *carried, into=(name, ""), algorithm=of_input)
            return _OutputGrad(dx)
        into = name, f"sums{unit.index - 1}"
        dx = self._step("conv_dgrad", *common, x, x_stats, x_relu, into=into, algorithm=of_input)
        return _OutputGrad(dx, masked=True, sums=self.slots[into[1]])

    def _through_norm(self, unit: Unit, grad: _OutputGrad) -> Slot:
        if grad.dz != NONE:
            return grad.dz
        z, stats, name = self._value(unit.makes), self.slots[_stats(unit)], f"grad {unit.makes}"
        if grad.masked or grad.sums != NONE or (self.group and unit.training):
            self._sums(unit, grad)
            terms = grad.totals if unit.training else NONE
            given = (grad.dy, z, stats, grad.mask, grad.by_sign(unit), terms, self.counts[unit.index])
            return self._step("batch_norm_act_dx", *given, into=(name,))
        operands = (grad.dy, z, self.tensors[unit.index].norm_weight, stats, grad.mask, unit.training, unit.spec.relu)
        wanted = [unit.grad_z, False, unit.grads.norm_weight, unit.grads.norm_bias]
        into = (name if unit.grad_z else "", "", *self._into(unit, "norm_weight", "norm_bias"))
        return self._step("batch_norm_act_backward", *operands, wanted, into=into)

    def _pair(self, unit: Unit, other: Unit, grad: _OutputGrad, its: _OutputGrad) -> None:
        """One reduction for the two norms that meet in the addition; one pass, too, unless convolutions do the rest."""
        z, other_z = self._value(unit.makes), self._value(other.makes)
        stats, other_stats = self.slots[_stats(unit)], self.slots[_stats(other)]
        if self.group or unit.fused_backward or other.fused_backward:
            given = (grad.dy, z, stats, grad.mask, False, other_z, other_stats)
            sums = self._step("batch_norm_sums", *given, into=("sums of both",))
            grad.sums, its.sums = self._split(sums, "sums", unit, other)
            grad.totals, its.totals = grad.sums, its.sums
            if self.group:
                totals = self._step("total_sums", sums, self.counts[unit.index], self.group, into=("totals of both",))
                grad.totals, its.totals = self._split(totals, "totals", unit, other)
            return
        weights = (self.tensors[one.index].norm_weight for one in (unit, other))
        norms = ("norm_weight", "norm_bias")
        wanted = [unit.grad_z, other.grad_z, *(getattr(one.grads, norm) for one in (unit, other) for norm in norms)]
        operands = (grad.dy, z, next(weights), stats, other_z, next(weights), other_stats, grad.mask)
        into = (f"grad {unit.makes}", "grad zs", *self._into(unit, *norms), *self._into(other, *norms))
        self._step("batch_norm_act_backward_pair", *operands, unit.training, other.training, wanted, into=into)
        grad.dz, its.dz = self.slots[into[0]], self.slots[into[1]]

    def _split(self, sums: Slot, name: str, *units: Unit) -> list[Slot]:
        names = [f"{name}{unit.index}" for unit in units]
        self._step("split_pair_sums", sums, into=names)
        return [self.slots[one] for one in names]

    def _sums(self, unit: Unit, grad: _OutputGrad) -> Slot:
        """The reduction of a norm's backward, if it is needed; from it come the gradients of the norm's parameters.

        Those are of this process's values: averaging gradients over processes averages these as well.
        """
        into = self._into(unit, "norm_weight", "norm_bias")
        if not (unit.training or unit.grads.bias or any(into)):
            return NONE
        if grad.sums == NONE:
            operands = grad.dy, self._value(unit.makes), self.slots[_stats(unit)], grad.mask, grad.by_sign(unit)
            grad.sums = self._step("batch_norm_sums", *operands, NONE, NONE, into=(f"sums{unit.index}",))
        if unit.training and grad.totals == NONE:
            how = self.counts[unit.index], self.group
            into_totals = (f"totals{unit.index}",)
            grad.totals = self._step("total_sums", grad.sums, *how, into=into_totals) if self.group else grad.sums
        if any(into):
            self._step("norm_parameter_gradients", grad.sums, self.tensors[unit.index].norm_weight, into=into)
        return grad.sums

    def _into(self, unit: Unit, *tensors: str) -> tuple[str, ...]:
        """Names for the gradients of a unit's tensors, "" where none is required."""
        owner = "shortcut" if unit is self.projection else str(unit.index)
        return tuple(f"grad {owner}.{tensor}" if getattr(unit.grads, tensor) else "" for tensor in tensors)


def _stats(unit: Unit) -> str:
    return f"stats{unit.index}"


def _window(pool: PoolSpec) -> tuple[tuple[int, int], ...]:
    return pool.kernel_size, pool.stride, pool.padding


def _is_compact(unit: Unit) -> bool:
    """Whether the input gradient comes for those pixels alone that a strided 1x1 convolution read."""
    return max(unit.spec.stride) > 1 and unit.algorithms.input_gradient.algorithm.compact


def _is_channels_last_contiguous(meta: TensorMeta) -> bool:
    """Whether a weight of images is dense in channels_last memory."""
    expected = 1
    for dim in (1, 3, 2, 0) if len(meta.shape) == 4 else ():
        if meta.shape[dim] != 1 and meta.stride[dim] != expected:
            return False
        expected *= meta.shape[dim]
    return len(meta.shape) == 4
