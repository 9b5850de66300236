"""The backward program of a block: recomputation, the gradients of norms and convolutions, and that of the shortcut."""

from __future__ import annotations

from dataclasses import dataclass

from fused_res.block.forward import ForwardBuilder, pool_window, stats_name
from fused_res.block.plan import Unit
from fused_res.block.program import NONE, Slot
from fused_res.spec import BlockSpec


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


class BackwardBuilder(ForwardBuilder):
    """Writes both programs of one block; backward recomputes with the steps of forward."""

    def _value(self, name: str) -> Slot:
        """A value of forward: saved, or computed again from what is."""
        if name not in self.available:
            self.available.add(name)
            unit = next(unit for unit in self.all_units if name in (unit.makes, f"a{unit.index}"))
            if name == unit.makes:
                return self._convolve(unit, self._value(unit.forward_reads), recomputed=True)[0]
            operands = self._value(unit.makes), self.slots[stats_name(unit)], NONE, NONE
            self._step("batch_norm_act_apply", *operands, unit.spec.relu, False, into=(name, ""), recomputed=True)
        return self.slots[name]

    def backward(self) -> None:
        """Write the backward program, from the gradient of the output to the slots ``grad ...``."""
        self.available = {name for name in kept_names(self.spec, self.config.recompute) if name in self.slots}
        last, projection, mask = self.units[-1], self.projection, self.slots.get("mask", NONE)
        self.names.append("dy")
        self.slots["dy"] = dy = Slot(len(self.names) - 1)
        if self.spec.shortcut != "none":
            dy = self._step("to_memory_format", dy, self.request.channels_last, into=("grad y",))
        grad: _OutputGrad | None = _OutputGrad(dy, mask)
        self.carried = (dy, mask) if self.spec.shortcut == "identity" else (NONE, NONE)  # the shortcut's gradient
        if self.spec.pool is not None:
            operands, window = (dy, mask, self._value(last.makes)), pool_window(self.spec.pool)
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
        z, stats = self._value(unit.makes), self.slots[stats_name(unit)]
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
        z, stats, name = self._value(unit.makes), self.slots[stats_name(unit)], f"grad {unit.makes}"
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
        stats, other_stats = self.slots[stats_name(unit)], self.slots[stats_name(other)]
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
            operands = grad.dy, self._value(unit.makes), self.slots[stats_name(unit)], grad.mask, grad.by_sign(unit)
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


def _is_compact(unit: Unit) -> bool:
    """Whether the input gradient comes for those pixels alone that a strided 1x1 convolution read."""
    return max(unit.spec.stride) > 1 and unit.algorithms.input_gradient.algorithm.compact
