"""Execution plan of a block: its algorithms, its forward and backward programs, and the tensors saved between the two.

A program's values are numbered slots with names: ``x`` is the block's input, ``z0, z1, ...`` are raw convolution
outputs (before the norm), ``a0, a1, ...`` are activations, ``zs`` is the raw output of the projection, ``grad z0`` is
the gradient with respect to ``z0``, and the units' tensors are named as in :meth:`fused_res.BlockSpec.tensor_names`.
A fused convolution reads ``z0`` where an unfused one reads ``a0``: it applies the norm and the ReLU in its operand
prologue.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor

from fused_res.block.program import NO_SLOT, LinkedProgram, Program, Slot, Step, link
from fused_res.dispatch import Machine, Problem, TrainingAlgorithms
from fused_res.dispatch.backend import Kernels
from fused_res.spec import BlockSpec, UnitSpec, UnitTensors


class BlockConfig(NamedTuple):
    """A block's options.

    Args:
        spec: the block's units, shortcut and pooling.
        training: for each unit, the projection last, whether its norm uses the statistics of the batch.
        backend: name of the backend that runs the plan.
        recompute: recompute level, see :func:`fused_res.block.backward.saveable_names`.
        preference: which algorithms are preferred, see :func:`fused_res.dispatch.select`.
        group: name of the process group whose processes share batch statistics; "" for this process only.
    """

    spec: BlockSpec
    training: tuple[bool, ...]
    backend: str
    recompute: str = "none"
    preference: str = "planned"
    group: str = ""


class PlanKey(NamedTuple):
    """Cache key of a plan: everything that the plan depends on.

    Args:
        config: the block's options.
        metas: fields of :class:`fused_res.block.checks.TensorMeta` of the input, then of each tensor; None for absent
            ones.
        channels_last: whether kernels treat the input as channels_last.
        requires_grad: flags of the input and of every tensor. They replace the tensors' own flags inside an operator,
            where autograd has cleared those. None: the tensors' own flags.
        algorithms: algorithms selected by measurement, one entry per unit; None where the backend's heuristics select.
        under_torch_dispatch, allow_winograd, machine: see :class:`fused_res.dispatch.Problem`.
    """

    config: BlockConfig
    metas: tuple[tuple[Any, ...] | None, ...]
    channels_last: bool
    requires_grad: tuple[bool, ...] | None
    algorithms: tuple[TrainingAlgorithms | None, ...] | None
    under_torch_dispatch: bool
    allow_winograd: bool
    machine: Machine


@dataclass(frozen=True)
class Unit:
    """A unit of a plan: its spec, the slots of its input and output, its algorithms and the required gradients."""

    spec: UnitSpec
    index: int  # position in the block; the index of the unit's tensors and statistics
    input_name: str
    output_name: str  # of the raw convolution output
    training: bool
    needs_input_grad: bool
    needs_grad: UnitTensors  # for each tensor, whether it requires a gradient
    has_master_weight: bool  # whether the weight is float32 and the input is not
    problem: Problem
    algorithms: TrainingAlgorithms

    @cached_property
    def raw_input_name(self) -> str:
        """Name of the value before the norm and ReLU that produce the unit's input."""
        return "x" if self.input_name == "x" else "z" + self.input_name[1:]

    @property
    def fused_forward(self) -> bool:
        """Whether the convolution normalizes its input in its operand prologue."""
        return self.algorithms.forward.algorithm.fused

    @property
    def fused_backward(self) -> bool:
        """Whether the convolution's gradient kernels run the backward of the norms around it."""
        return self.algorithms.fused_backward

    @property
    def separate_norm_backward(self) -> bool:
        """Whether the norm's input gradient is computed by a pass of its own."""
        return not self.fused_backward or self.algorithms.weight_gradient.algorithm.separate_norm_backward

    @property
    def adds_in_dgrad(self) -> bool:
        """Whether the input gradient's kernel can add another gradient in its epilogue."""
        algorithm = self.algorithms.input_gradient.algorithm
        return algorithm.fused or algorithm.implementations["input_gradient"] == "conv_dgrad"

    @cached_property
    def forward_input_name(self) -> str:
        """Name of the value that the forward convolution reads."""
        return self.raw_input_name if self.fused_forward else self.input_name

    @cached_property
    def needs_conv_grad(self) -> bool:
        """Whether the gradient with respect to the convolution's output is required."""
        return self.needs_input_grad or self.needs_grad.weight or self.needs_grad.bias

    @cached_property
    def needs_norm_grad(self) -> bool:
        """Whether any gradient through the norm is required."""
        return self.needs_conv_grad or self.needs_grad.norm_weight or self.needs_grad.norm_bias


@dataclass(frozen=True, eq=False)
class Plan:
    """The selected algorithms of a block and its forward and backward programs.

    Attributes:
        slot_names: names of all slots: the input, the tensors, then the results of the steps.
        saved_slots: slots saved for backward: the block's input, activations and raw outputs, statistics, and the ReLU
            mask or the indices of the max pooling.
        stats_slots: slots of every unit's batch norm statistics.
        needs_backward: whether any gradient is required.
    """

    key: PlanKey
    units: tuple[Unit, ...]
    projection: Unit | None
    slot_names: tuple[str, ...]
    forward: Program
    backward: Program
    saved_slots: tuple[Slot, ...]
    stats_slots: tuple[Slot, ...]
    needs_backward: bool
    _linked_programs: dict[str, LinkedProgram] = field(default_factory=dict, repr=False)

    @property
    def config(self) -> BlockConfig:
        return self.key.config

    @property
    def all_units(self) -> tuple[Unit, ...]:
        return self.units if self.projection is None else (*self.units, self.projection)

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps of forward, then those of backward."""
        return self.forward.steps + self.backward.steps

    @cached_property
    def kept_tensors(self) -> tuple[Slot, ...]:
        """Slots of the parameters, which backward may need.

        It must not read the running statistics, because the next training step changes them; ``stats`` contains the
        values that forward used.
        """
        names = [name.rpartition(".")[2] for name in self.config.spec.tensor_names()]
        metas = enumerate(zip(names, self.key.metas[1:], strict=True), start=1)
        return tuple(Slot(at) for at, (name, meta) in metas if meta is not None and not name.startswith("running_"))

    @cached_property
    def live_slots(self) -> tuple[Slot, ...]:
        """The slots whose values autograd's context saves: :attr:`kept_tensors`, then :attr:`saved_slots`."""
        return self.kept_tensors + self.saved_slots

    @cached_property
    def differentiable(self) -> tuple[int, ...]:
        """Indices of the input (0) and the tensors that backward computes gradients of."""
        return tuple(index for index, slot in enumerate(self.backward.results) if slot != NO_SLOT)

    @cached_property
    def _dy_slot(self) -> int:
        return self.slot_names.index("dy")

    def run_forward(self, kernels: Kernels, input: Tensor, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Run the forward program.

        Returns:
            The values of all slots; index it with ``forward.results``, :attr:`saved_slots` and :attr:`stats_slots`.
        """
        slots: list[Tensor | None] = [input, *tensors]
        slots += [None] * (len(self.slot_names) - len(slots))
        self._linked("forward", kernels)(slots)
        return slots

    def run_backward(self, kernels: Kernels, grad_output: Tensor, values: Mapping[Slot, Tensor | None]) -> list[Tensor]:
        """Run the backward program.

        Args:
            kernels: the backend.
            grad_output: gradient of the output.
            values: slots of :attr:`kept_tensors` and :attr:`saved_slots` -> their values.

        Returns:
            The gradients of :attr:`differentiable`.
        """
        slots: list[Any] = [None] * len(self.slot_names)
        for slot, value in values.items():
            slots[slot] = value
        slots[self._dy_slot] = grad_output
        self._linked("backward", kernels)(slots)
        return [slots[slot] for slot in self.backward.results if slot != NO_SLOT]

    def _linked(self, direction: str, kernels: Kernels) -> LinkedProgram:
        linked = self._linked_programs.get(direction)
        if linked is None:
            program: Program = getattr(self, direction)
            live_out = (*self.saved_slots, *self.stats_slots) if direction == "forward" else ()
            linked = link(program, kernels, live_out, self.key.under_torch_dispatch)
            self._linked_programs[direction] = linked
        return linked

    def __str__(self) -> str:
        titles = [f"{direction}:" for direction in ("forward", "backward")]
        steps = [
            [f"  {step.text(self.slot_names)}" for step in program.steps] for program in (self.forward, self.backward)
        ]
        saved = ", ".join(self.slot_names[slot] for slot in self.saved_slots) or "nothing"
        backward = [titles[1], *steps[1]] if self.needs_backward else ["no gradient is required"]
        return "\n".join([titles[0], *steps[0], f"saved for backward: {saved}", *backward])
