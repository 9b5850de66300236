"""Builder of a block's forward program: convolutions, batch statistics, and one normalize-add-act pass per norm.

A fused consumer replaces that pass: it normalizes its input in its operand prologue, so the activation is never
written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fused_res.block.checks import TensorMeta
from fused_res.block.plan import PlanKey, Unit
from fused_res.block.program import NO_SLOT, Slot, Step
from fused_res.dispatch import Selection
from fused_res.ops.checks import RELU_OR_IDENTITY
from fused_res.spec import PoolSpec, UnitSpec, group_by_unit


class ForwardBuilder:
    """Appends the steps of one block to :attr:`steps` and allocates named slots for their results.

    Args:
        key: the plan's key.
        units: the block's units, the projection last.
        values_per_channel: for each unit, the number of values per channel of its output.
    """

    def __init__(self, key: PlanKey, units: Sequence[Unit], values_per_channel: Sequence[int]) -> None:
        config = key.config
        self.key, self.config, self.spec, self.group = key, config, config.spec, config.group
        input, *tensors = (None if meta is None else TensorMeta(*meta) for meta in key.metas)
        assert input is not None
        self.dtype = input.dtype
        self.input_names = ("x", *self.spec.tensor_names())
        self.names, self.slots = list(self.input_names), {name: Slot(at) for at, name in enumerate(self.input_names)}
        self.tensors = group_by_unit(
            [NO_SLOT if meta is None else Slot(at) for at, meta in enumerate(tensors, start=1)]
        )
        self.steps: list[Step] = []
        self.values_per_channel = values_per_channel
        self.all_units = tuple(units)
        chain = len(self.spec.units)
        self.units, self.projection = self.all_units[:chain], next(iter(self.all_units[chain:]), None)
        self.needs_input_grad = self.units[0].needs_input_grad
        self.needs_backward = self.needs_input_grad or any(unit.needs_norm_grad for unit in self.all_units)
        #: Index of a unit -> its weight in the input's dtype, where that is not the master weight's.
        self.cast_weights: dict[int, Slot] = {}
        #: Only the output is required: norms may overwrite the convolutions' outputs.
        self.inference = not self.needs_backward and not any(config.training)

    def _step(self, operator: str, *arguments: Any, into: Sequence[str] = (), **fields: Any) -> Slot:
        """Append a step with a new slot per name in ``into`` ("" for an unused result); return the first of them.

        If a name is used again, it refers to its latest slot.
        """
        results = []
        for name in into:
            self.names += [name] if name else []
            results.append(Slot(len(self.names) - 1) if name else NO_SLOT)
            self.slots |= {name: results[-1]} if name else {}
        self.steps.append(Step(operator, arguments, tuple(results), **fields))
        return results[0] if results else NO_SLOT

    def forward(self) -> Slot:
        """Append the forward program; return the slot of the block's output."""
        *inner, last = self.units
        x = y = self.slots["x"]
        for unit, following in zip(inner, self.units[1:], strict=True):
            z, partials = self._convolve(unit, y)
            if following.fused_forward:
                self._statistics(unit, z, partials)
                y = z
            else:
                y = self._normalize(unit, z, partials, NO_SLOT, NO_SLOT, f"a{unit.index}")
        z, partials = self._convolve(last, y)
        if self.spec.pool is not None:
            into = ("y", "indices" if self.needs_backward else "")
            if last.spec.activation in RELU_OR_IDENTITY:
                operands = z, self._statistics(last, z, partials), last.spec.relu
            else:  # the pooling's operand prologue does not have it
                name = f"a{last.index}"
                operands = self._normalize(last, z, partials, NO_SLOT, NO_SLOT, name), NO_SLOT, False
            return self._step("max_pool_forward", *operands, *pool_window(self.spec.pool), into=into)
        residual, residual_stats = x if self.spec.shortcut == "identity" else NO_SLOT, NO_SLOT
        if self.projection is not None:
            # The projection's normalized output is never materialized: the pass that adds it normalizes it as well.
            residual, residual_partials = self._convolve(self.projection, x)
            residual_stats = self._statistics(self.projection, residual, residual_partials)
        return self._normalize(last, z, partials, residual, residual_stats, "y")

    def _convolve(self, unit: Unit, x: Slot, recomputed: bool = False) -> tuple[Slot, Slot]:
        """Append a unit's convolution.

        Returns:
            The raw output, and its partial statistics if they are needed and the algorithm returns them.
        """
        operands = x, self._weight(unit, unit.algorithms.forward), self.tensors[unit.index].bias
        statistics = unit.training and not recomputed
        partials = f"partials{unit.index}" if statistics and unit.algorithms.forward.algorithm.returns_partials else ""
        fields: dict[str, Any] = {
            "into": (unit.output_name, partials),
            "algorithm": unit.algorithms.forward,
            "recomputed": recomputed,
        }
        if unit.fused_forward:
            self._step("conv_bn_stats", *operands, *self._input_norm(unit), *unit.spec.geometry, statistics, **fields)
        else:
            self._step("convolution", *operands, unit.spec.geometry, statistics, **fields)
        if self.spec.shortcut != "none" and unit.output_name in (self.units[-1].output_name, "zs"):
            # Both operands of the addition get the input's memory format, whichever format each convolution returns:
            # the bits of the ReLU mask follow the memory order of the sum.
            z = self.slots[unit.output_name]
            self._step("to_memory_format", z, self.key.channels_last, into=(unit.output_name,))
        return self.slots[unit.output_name], self.slots[partials] if partials else NO_SLOT

    def _weight(self, unit: Unit, selected: Selection) -> Slot:
        """Return the slot of a unit's weight, in the input's dtype unless the algorithm packs master weights."""
        weight = self.tensors[unit.index].weight
        if not unit.has_master_weight or selected.algorithm.packs_master_weight:
            return weight
        if unit.index not in self.cast_weights:
            self.cast_weights[unit.index] = self._step("to_dtype", weight, self.dtype, into=(f"weight{unit.index}",))
        return self.cast_weights[unit.index]

    def _input_norm(self, unit: Unit) -> tuple[Slot, bool]:
        """Return statistics and ReLU flag of the norm that precedes a fused convolution and runs in its prologue."""
        if unit.input_name == "x":
            return NO_SLOT, False
        previous = self.units[unit.index - 1]
        return self.slots[stats_name(previous)], previous.spec.relu

    def _statistics(self, unit: Unit, z: Slot, partials: Slot) -> Slot:
        """Append a norm's statistics pass; return the slot of ``stats``.

        With a process group, the statistics are merged from the partial statistics of all its processes.
        """
        norm, into = self.tensors[unit.index].norm, (f"partials{unit.index}",)
        if self.group and unit.training:
            local = self._step("batch_norm_partials", z, into=into) if partials == NO_SLOT else partials
            partials = self._step("gather_partials", local, self.group, into=into)
        into, eps = (stats_name(unit),), unit.spec.eps
        if partials == NO_SLOT:
            return self._step("batch_norm_stats", z, *norm, unit.training, eps, into=into)
        return self._step("merge_stats", partials, *norm[:2], eps, self.dtype == torch.float64, into=into)

    def _normalize(self, unit: Unit, z: Slot, partials: Slot, residual: Slot, residual_stats: Slot, name: str) -> Slot:
        """Append a norm with addition and activation; return the slot of its output, which gets the name ``name``."""
        operands, norm = (z, residual, residual_stats), self.tensors[unit.index].norm
        activation, slope = unit.spec.activation, negative_slope(unit.spec)
        if self.inference:
            self._step("batch_norm_act_inference_", *operands, *norm, unit.spec.eps, activation, *slope)
            return z
        # A ReLU after an addition needs a saved mask, one bit per element; other masks follow from `z` and `stats`.
        save_mask = self.needs_backward and residual != NO_SLOT and unit.spec.relu
        mask = "mask" if save_mask else ""
        if partials == NO_SLOT and not (self.group and unit.training):
            flags = unit.training, unit.spec.eps, activation, save_mask, *slope
            return self._step("batch_norm_act_forward", *operands, *norm, *flags, into=(name, stats_name(unit), mask))
        flags = activation, save_mask, *slope
        stats = self._statistics(unit, z, partials)
        return self._step("batch_norm_act_apply", z, stats, *operands[1:], *flags, into=(name, mask))


def negative_slope(spec: UnitSpec) -> tuple[float, ...]:
    """Return the last argument of the norm's operators for this unit, which only a leaky ReLU needs."""
    return (spec.negative_slope,) if spec.activation == "leaky_relu" else ()


def stats_name(unit: Unit) -> str:
    """Return the slot name of a unit's batch norm statistics."""
    return f"stats{unit.index}"


def pool_window(pool: PoolSpec) -> tuple[tuple[int, int], ...]:
    """Return kernel size, stride and padding, in the order of the operators' arguments."""
    return pool.kernel_size, pool.stride, pool.padding
