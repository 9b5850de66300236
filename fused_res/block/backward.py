"""Builder of a block's backward program: recomputation and the gradients of norms, convolutions and the shortcut.

The unfused backward of a unit computes the gradient ``dz`` with respect to the convolution's output (batch norm
backward), then runs the convolution's two gradients on it. The input gradient of a block's first unit may add the
gradient of an identity shortcut in its epilogue.

The fused backward's gradient kernels normalize the convolution's input in their operand prologue, and return the sums
that the preceding norm's backward needs. They compute ``dz`` in their operand prologue too, from the output gradient,
the raw output and the reductions of the norm, unless the algorithm leaves it to a pass of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fused_res.block.forward import ForwardBuilder, negative_slope, pool_window, stats_name
from fused_res.block.plan import Unit
from fused_res.block.program import NO_SLOT, Slot
from fused_res.dispatch import Selection
from fused_res.ops.checks import Activation
from fused_res.spec import BlockSpec


def saveable_names(spec: BlockSpec, recompute: str) -> frozenset[str]:
    """Return the names of the values that a recompute level may save; backward recomputes the others.

    *none* saves all values. *norm* recomputes the activations (``a*``) from the raw outputs. *conv* recomputes, in
    addition, the raw outputs of 1x1 convolutions: a bottleneck's last convolution and the projection. The spec does not
    contain kernel sizes: a convolution without padding and with stride 1 is taken to be 1x1.
    """
    count = len(spec.units)
    saveable = {"x", "zs", *(f"z{index}" for index in range(count))}
    if recompute == "none":
        saveable |= {f"a{index}" for index in range(count)}
    if recompute == "conv":
        saveable.discard("zs")
        last = spec.units[-1]
        if count > 1 and set(last.padding) == {0} and set(last.stride) == {1}:
            saveable.discard(f"z{count - 1}")
    return frozenset(saveable)


@dataclass
class _OutputGrad:
    """Gradient with respect to a norm's output, with the reductions that are already computed.

    ``dy`` is the gradient with respect to the output of the activation after the norm, unless ``masked``.
    """

    dy: Slot
    mask: Slot = NO_SLOT  # saved bits of the ReLU
    masked: bool = False  # whether the activation's backward is already applied to dy
    sums: Slot = NO_SLOT  # (2, C): sums of the masked gradient, and of its product with the normalized input xhat
    #: The sums to pass to kernels, which divide them by the local number of values per channel: over all processes that
    #: share the statistics, times local count / global count.
    rescaled_sums: Slot = NO_SLOT
    dz: Slot = NO_SLOT  # gradient with respect to the norm's input

    def activation(self, unit: Unit) -> Activation:
        """Return the activation whose backward a kernel has to apply, from the activation's recomputed input."""
        return unit.spec.activation if self.mask == NO_SLOT and not self.masked else "identity"


class BackwardBuilder(ForwardBuilder):
    """Builder of both programs of one block; backward recomputes values with the steps of forward."""

    def _forward_value(self, name: str) -> Slot:
        """Return the slot of a value of forward: saved, or recomputed from saved values."""
        if name not in self.available:
            self.available.add(name)
            unit = next(unit for unit in self.all_units if name in (unit.output_name, f"a{unit.index}"))
            if name == unit.output_name:
                return self._convolve(unit, self._forward_value(unit.forward_input_name), recomputed=True)[0]
            operands = self._forward_value(unit.output_name), self.slots[stats_name(unit)], NO_SLOT, NO_SLOT
            flags = unit.spec.activation, False, *negative_slope(unit.spec)
            self._step("batch_norm_act_apply", *operands, *flags, into=(name, ""), recomputed=True)
        return self.slots[name]

    def backward(self, saved_names: Sequence[str] | None = None) -> None:
        """Append the backward program, from the gradient ``dy`` of the output to the slots ``grad ...``.

        Args:
            saved_names: the values that forward saves. Default: those that backward needs, of the recompute level's.
        """
        self.cast_weights = {}
        names = saveable_names(self.spec, self.config.recompute) if saved_names is None else saved_names
        self.available = {name for name in names if name in self.slots}
        last, projection, mask = self.units[-1], self.projection, self.slots.get("mask", NO_SLOT)
        self.names.append("dy")
        self.slots["dy"] = dy = Slot(len(self.names) - 1)
        if self.spec.shortcut != "none":
            dy = self._step("to_memory_format", dy, self.key.channels_last, into=("grad y",))
        grad: _OutputGrad | None = _OutputGrad(dy, mask)
        # The gradient of the shortcut with respect to the block's input, and the ReLU mask that is still to be applied.
        self.shortcut_grad = (dy, mask) if self.spec.shortcut == "identity" else (NO_SLOT, NO_SLOT)
        if self.spec.pool is not None:
            operands = dy, self.slots["indices"], self._forward_value(last.output_name), *pool_window(self.spec.pool)
            grad = _OutputGrad(self._step("max_pool_backward", *operands, into=(f"grad a{last.index}",)))
        if projection is not None:
            # The projection has no ReLU of its own; its output gradient is masked by the ReLU after the addition.
            projection_grad = _OutputGrad(dy, mask)
            if last.needs_norm_grad and projection.needs_norm_grad:
                assert grad is not None
                self._norm_backward_pair(last, projection, grad, projection_grad)
            # The projection's backward comes before the chain's: it frees more memory than it allocates, and the
            # chain's last dgrad can accumulate its result.
            input_grad = self._unit_backward(projection, projection_grad)
            self.shortcut_grad = NO_SLOT if input_grad is None else input_grad.dy, NO_SLOT
        for unit in reversed(self.units):
            grad = self._unit_backward(unit, grad)
        if self.needs_input_grad and not self._adds_shortcut_grad(self.units[0]):
            dx, addend = self.slots["grad x"], self.shortcut_grad[0]
            if self.spec.shortcut == "identity":
                # The masked gradient is accumulated into dx in one pass and never materialized.
                self._step("add_masked_", dx, *self.shortcut_grad)
            elif projection is not None and _has_compact_input_grad(projection):
                self._step("add_strided_", dx, addend, projection.spec.stride)
            elif projection is not None:
                self._step("add_", dx, addend)

    def _adds_shortcut_grad(self, unit: Unit) -> bool:
        """Return whether the unit's dgrad adds the shortcut's gradient in its epilogue."""
        compact = self.projection is not None and _has_compact_input_grad(self.projection)
        return unit is self.units[0] and unit.adds_in_dgrad and self.shortcut_grad[0] != NO_SLOT and not compact

    def _unit_backward(self, unit: Unit, grad: _OutputGrad | None) -> _OutputGrad | None:
        """Append a unit's backward: from the gradient of its norm's output to that of the previous norm's output."""
        if grad is None or not unit.needs_norm_grad:
            return None
        name = "grad shortcut" if unit is self.projection else f"grad {unit.input_name}"
        return (self._fused_conv_backward if unit.fused_backward else self._conv_backward)(unit, grad, name)

    def _conv_backward(self, unit: Unit, grad: _OutputGrad, name: str) -> _OutputGrad | None:
        """Append an unfused backward: the norm's input gradient ``dz``, then the convolution's gradients."""
        dz = self._norm_backward(unit, grad)
        if not unit.needs_conv_grad:
            return None
        bias = self.tensors[unit.index].bias
        required = (unit.needs_input_grad, unit.needs_grad.weight, unit.needs_grad.bias)
        names = (name, *self._grad_names(unit, "weight", "bias"))
        _, input_gradient, weight_gradient = unit.algorithms
        if adds := required[0] and self._adds_shortcut_grad(unit):
            no_norms = (NO_SLOT, NO_SLOT, NO_SLOT, False, NO_SLOT, 0), (NO_SLOT, NO_SLOT, False)
            weight = self._weight(unit, input_gradient)
            dgrad_operands = dz, *no_norms[0], weight, *no_norms[1], *self.shortcut_grad
            self._step("conv_dgrad", *dgrad_operands, into=(name, ""), algorithm=input_gradient)
            required = (False, *required[1:])
        if not (required[0] or required[1]):
            if required[2]:
                self._step("sum_per_channel", dz, into=names[2:])
            return _OutputGrad(self.slots[name]) if adds else None
        # Only the weight gradient reads x. The input gradient needs its shape only, which the raw value has as well.
        x = self._forward_value(unit.input_name if unit.needs_grad.weight else unit.raw_input_name)
        calls = [(weight_gradient if required[1] else input_gradient, required)]
        if required[0] and required[1] and input_gradient.algorithm is not weight_gradient.algorithm:
            calls = [(input_gradient, (True, False, False)), (weight_gradient, (False, *required[1:]))]
        for algorithm, output_mask in calls:
            into = [result if flag else "" for result, flag in zip(names, output_mask, strict=True)]
            operands = dz, x, self._weight(unit, algorithm), bias, unit.spec.geometry, output_mask
            self._step("convolution_backward", *operands, into=into, algorithm=algorithm)
        self._cast_weight_grad(unit, weight_gradient)
        if not unit.needs_input_grad:
            return None
        if unit is not self.projection and _has_compact_input_grad(unit):
            self._step("scatter_strided", self.slots[name], x, unit.spec.stride, into=(name,))
        return _OutputGrad(self.slots[name])

    def _cast_weight_grad(self, unit: Unit, selected: Selection) -> None:
        """Append the cast of the weight's gradient to the master weight's dtype, if the algorithm does not do it."""
        if unit.has_master_weight and unit.needs_grad.weight and not selected.algorithm.packs_master_weight:
            (name,) = self._grad_names(unit, "weight")
            self._step("to_dtype", self.slots[name], torch.float32, into=(name,))

    def _fused_conv_backward(self, unit: Unit, grad: _OutputGrad, name: str) -> _OutputGrad | None:
        """Append a fused backward, which does not materialize the normalized input.

        Its kernels compute it in their operand prologues, from the raw output and the norm's statistics, and so the
        norm's input gradient ``dz``, unless the algorithm has a separate pass for it. Except for the block's first unit
        and the projection, the input gradient's kernel also returns the sums that the preceding norm's backward needs.
        """
        bias, needs_gradient = self.tensors[unit.index].bias, unit.needs_input_grad or unit.needs_grad.weight
        if unit.separate_norm_backward:
            dz = self._norm_backward(unit, grad)
            output_grad = (dz, NO_SLOT, NO_SLOT, NO_SLOT, False, NO_SLOT, 0)
            if unit.needs_grad.bias:
                self._step("sum_per_channel", dz, into=self._grad_names(unit, "bias"))
        else:
            z, stats = self._forward_value(unit.output_name), self.slots[stats_name(unit)]
            sums, rescaled_sums = self._norm_grad_sums(unit, grad), grad.rescaled_sums if unit.training else NO_SLOT
            mask_from_sign, count = grad.activation(unit) == "relu", self.values_per_channel[unit.index]
            output_grad = (grad.dy, z, stats, grad.mask, mask_from_sign, rescaled_sums, count)
            if unit.needs_grad.bias:
                self._step("conv_bias_gradient", bias, stats, sums, unit.training, into=self._grad_names(unit, "bias"))
        if not needs_gradient:
            return None
        common = (*output_grad, self._weight(unit, unit.algorithms.weight_gradient))
        x = self._forward_value(unit.raw_input_name)
        x_stats, x_relu = self._input_norm(unit)
        has_norm = x_stats != NO_SLOT
        addend = self.shortcut_grad if not has_norm and self._adds_shortcut_grad(unit) else (NO_SLOT, NO_SLOT)
        into = (name, f"sums{unit.index - 1}" if has_norm else "") if unit.needs_input_grad else ("", "")
        _, input_gradient, weight_gradient = unit.algorithms
        (weight_grad,) = self._grad_names(unit, "weight")
        joint = weight_gradient.algorithm.joint_gradients
        read = (*common, x, x_stats, x_relu)
        if joint:
            options = (*addend, *unit.spec.geometry[:3], (unit.needs_input_grad, unit.needs_grad.weight))
            self._step("conv_backward", *read, *options, into=(*into, weight_grad), algorithm=weight_gradient)
        else:
            if unit.needs_grad.weight:
                self._step("conv_wgrad", *read, unit.spec.stride, into=(weight_grad,), algorithm=weight_gradient)
                self._cast_weight_grad(unit, weight_gradient)
            if unit.needs_input_grad:
                norm = (x, x_stats, x_relu) if has_norm else (NO_SLOT, NO_SLOT, False)
                self._step("conv_dgrad", *common, *norm, *addend, into=into, algorithm=input_gradient)
        if not unit.needs_input_grad:
            return None
        if not has_norm:
            return _OutputGrad(self.slots[name])
        return _OutputGrad(self.slots[name], masked=not joint, sums=self.slots[into[1]])

    def _norm_backward(self, unit: Unit, grad: _OutputGrad) -> Slot:
        """Append a norm's backward, unless its result exists already; return the slot of its input gradient ``dz``."""
        if grad.dz != NO_SLOT:
            return grad.dz
        z, stats = self._forward_value(unit.output_name), self.slots[stats_name(unit)]
        name, slope = f"grad {unit.output_name}", negative_slope(unit.spec)
        if grad.masked or grad.sums != NO_SLOT or (self.group and unit.training):
            self._norm_grad_sums(unit, grad)
            rescaled_sums, count = grad.rescaled_sums if unit.training else NO_SLOT, self.values_per_channel[unit.index]
            dx_operands = (grad.dy, z, stats, grad.mask, grad.activation(unit), rescaled_sums, count)
            return self._step("batch_norm_act_dx", *dx_operands, *slope, into=(name,))
        weight, activation = self.tensors[unit.index].norm_weight, unit.spec.activation
        operands = (grad.dy, z, weight, stats, grad.mask, unit.training, activation)
        required = [unit.needs_conv_grad, False, unit.needs_grad.norm_weight, unit.needs_grad.norm_bias]
        into = (name if unit.needs_conv_grad else "", "", *self._grad_names(unit, "norm_weight", "norm_bias"))
        return self._step("batch_norm_act_backward", *operands, required, *slope, into=into)

    def _norm_backward_pair(self, unit: Unit, other: Unit, grad: _OutputGrad, other_grad: _OutputGrad) -> None:
        """Append the joint backward of the two norms whose outputs are added: they share one output gradient.

        One reduction computes the sums of both. One pass computes both input gradients as well, unless gradient kernels
        compute them, or a process group needs the sums first.
        """
        z, other_z = self._forward_value(unit.output_name), self._forward_value(other.output_name)
        stats, other_stats = self.slots[stats_name(unit)], self.slots[stats_name(other)]
        if self.group or not (unit.separate_norm_backward and other.separate_norm_backward):
            sums_operands = (grad.dy, z, stats, grad.mask, "identity", other_z, other_stats)
            sums = self._step("batch_norm_sums", *sums_operands, into=("sums of both",))
            grad.sums, other_grad.sums = self._split(sums, "sums", unit, other)
            grad.rescaled_sums, other_grad.rescaled_sums = grad.sums, other_grad.sums
            if self.group:
                count = self.values_per_channel[unit.index]
                rescaled_sums = self._step("total_sums", sums, count, self.group, into=("rescaled sums of both",))
                grad.rescaled_sums, other_grad.rescaled_sums = self._split(rescaled_sums, "rescaled sums", unit, other)
            return
        weights = (self.tensors[one.index].norm_weight for one in (unit, other))
        norms = ("norm_weight", "norm_bias")
        parameters = (getattr(one.needs_grad, norm) for one in (unit, other) for norm in norms)
        required = [unit.needs_conv_grad, other.needs_conv_grad, *parameters]
        operands = (grad.dy, z, next(weights), stats, other_z, next(weights), other_stats, grad.mask)
        names = (*self._grad_names(unit, *norms), *self._grad_names(other, *norms))
        into = (f"grad {unit.output_name}", "grad zs", *names)
        self._step("batch_norm_act_backward_pair", *operands, unit.training, other.training, required, into=into)
        grad.dz, other_grad.dz = self.slots[into[0]], self.slots[into[1]]

    def _split(self, sums: Slot, name: str, *units: Unit) -> list[Slot]:
        """Append the split of joint sums of two norms into those of each."""
        names = [f"{name}{unit.index}" for unit in units]
        self._step("split_pair_sums", sums, into=names)
        return [self.slots[result] for result in names]

    def _norm_grad_sums(self, unit: Unit, grad: _OutputGrad) -> Slot:
        """Append the reduction of a norm's backward, if it is needed, and the gradients of the norm's parameters.

        The parameters' gradients are local sums of this process, as those of any other layer: data-parallel training
        averages them over processes.
        """
        into = self._grad_names(unit, "norm_weight", "norm_bias")
        if not (unit.training or unit.needs_grad.bias or any(into)):
            return NO_SLOT
        if grad.sums == NO_SLOT:
            z, stats = self._forward_value(unit.output_name), self.slots[stats_name(unit)]
            operands = grad.dy, z, stats, grad.mask, grad.activation(unit), NO_SLOT, NO_SLOT
            into_sums = (f"sums{unit.index}",)
            grad.sums = self._step("batch_norm_sums", *operands, *negative_slope(unit.spec), into=into_sums)
        if unit.training and grad.rescaled_sums == NO_SLOT:
            options = self.values_per_channel[unit.index], self.group
            name = (f"rescaled sums{unit.index}",)
            grad.rescaled_sums = self._step("total_sums", grad.sums, *options, into=name) if self.group else grad.sums
        if any(into):
            self._step("norm_parameter_gradients", grad.sums, self.tensors[unit.index].norm_weight, into=into)
        return grad.sums

    def _grad_names(self, unit: Unit, *tensors: str) -> tuple[str, ...]:
        """Return slot names for the gradients of a unit's tensors, "" for those that are not required."""
        owner = "shortcut" if unit is self.projection else str(unit.index)
        return tuple(f"grad {owner}.{tensor}" if getattr(unit.needs_grad, tensor) else "" for tensor in tensors)


def _has_compact_input_grad(unit: Unit) -> bool:
    """Return whether a strided 1x1 convolution's input gradient covers the strided input positions only.

    A full gradient has zeros between those positions.
    """
    algorithm = unit.algorithms.input_gradient.algorithm
    return max(unit.spec.stride) > 1 and unit.problem.pointwise and algorithm.compact_input_gradient
