"""The forward program of a block: convolutions, statistics, and one normalise-add-ReLU pass for each norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fused_res.block.checks import TensorMeta
from fused_res.block.plan import Request, Unit
from fused_res.block.program import NONE, Slot, Step
from fused_res.spec import PoolSpec, by_unit


class ForwardBuilder:
    """Writes the steps of one block into :attr:`steps`, and names the slots that they fill.

    Args:
        request: the plan's request.
        units: the block's units, the projection last.
        counts: for each unit, the number of values per channel of its output.
    """

    def __init__(self, request: Request, units: Sequence[Unit], counts: Sequence[int]) -> None:
        config = request.config
        self.request, self.config, self.spec, self.group = request, config, config.spec, config.group
        input, *tensors = (None if meta is None else TensorMeta(*meta) for meta in request.metas)
        assert input is not None
        self.dtype = input.dtype
        self.given = ("x", *self.spec.tensor_names())
        self.names, self.slots = list(self.given), {name: Slot(at) for at, name in enumerate(self.given)}
        self.tensors = by_unit([NONE if meta is None else Slot(at) for at, meta in enumerate(tensors, start=1)])
        self.steps: list[Step] = []
        self.counts = counts
        self.all_units = tuple(units)
        chain = len(self.spec.units)
        self.units, self.projection = self.all_units[:chain], next(iter(self.all_units[chain:]), None)
        self.grad_input = self.units[0].grad_reads
        self.grad = self.grad_input or any(unit.grad_norm for unit in self.all_units)
        #: Only the output is wanted: norms may write over the convolutions' outputs.
        self.inference = not self.grad and not any(config.training)

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

    def forward(self) -> Slot:
        """Write the forward program; return the slot of the block's output."""
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
            return self._step("max_pool_forward", z, stats, last.spec.relu, *pool_window(self.spec.pool), into=into)
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
        return self.slots[stats_name(before)], before.spec.relu

    def _statistics(self, unit: Unit, z: Slot, partials: Slot) -> Slot:
        """``stats``; where a group of processes shares them, from the partial statistics of all."""
        norm, into = self.tensors[unit.index].norm, (f"partials{unit.index}",)
        if self.group and unit.training:
            own = self._step("batch_norm_partials", z, into=into) if partials == NONE else partials
            partials = self._step("gather_partials", own, self.group, into=into)
        into, eps = (stats_name(unit),), unit.spec.eps
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
            return self._step("batch_norm_act_forward", *operands, *norm, *how, into=(name, stats_name(unit), mask))
        stats = self._statistics(unit, z, partials)
        return self._step("batch_norm_act_apply", z, stats, *operands[1:], relu, save_mask, into=(name, mask))


def stats_name(unit: Unit) -> str:
    return f"stats{unit.index}"


def pool_window(pool: PoolSpec) -> tuple[tuple[int, int], ...]:
    return pool.kernel_size, pool.stride, pool.padding
