"""The plan of a block: its algorithms, what it saves, and every step of both directions.

Slots have names: ``x`` is the block's input, ``z0, z1, ...`` are raw convolution outputs, ``a0, a1, ...`` activations,
``zs`` the projection's convolution, ``grad z0`` the gradient of ``z0``, and the units' tensors are called as in
:meth:`fused_res.BlockSpec.tensor_names`. A fused convolution reads ``z0`` where another reads ``a0``: it normalises as
it loads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor

from fused_res.block.program import NONE, Linked, Program, Slot, Step, link, run
from fused_res.dispatch import Algorithms, Machine, Problem
from fused_res.dispatch.backend import Kernels
from fused_res.spec import BlockSpec, UnitSpec, UnitTensors


class BlockConfig(NamedTuple):
    """How a block runs.

    Args:
        training: whether each unit's norm takes the statistics of the batch, the projection's last.
        backend: name of the backend that runs.
        recompute: see :func:`kept_names`.
        preference: see :func:`fused_res.dispatch.select`.
        group: of the processes whose batches together give the statistics; "" for this one alone.
    """

    spec: BlockSpec
    training: tuple[bool, ...]
    backend: str
    recompute: str = "none"
    preference: str = "planned"
    group: str = ""


class Request(NamedTuple):
    """Everything that a plan depends on.

    Args:
        metas: of the input, then of the tensors.
        channels_last: memory format of the input, as kernels see it.
        requires_grad: of the input and every tensor; stands in for their own flags below autograd, where those are off.
        algorithms: measured ones for each convolution; None where the backend's rules decide.
        traced, winograd, machine: see :class:`fused_res.dispatch.Problem`.
    """

    config: BlockConfig
    metas: tuple[tuple[Any, ...] | None, ...]
    channels_last: bool
    requires_grad: tuple[bool, ...] | None
    algorithms: tuple[Algorithms | None, ...] | None
    traced: bool
    winograd: bool
    machine: Machine


@dataclass(frozen=True)
class Unit:
    """A unit inside a plan: its spec, the names of its input and output, its algorithms, and the gradients wanted."""

    spec: UnitSpec
    index: int  # of its tensors, and of its statistics
    reads: str
    makes: str
    training: bool
    grad_reads: bool
    grads: UnitTensors  # which of its tensors require a gradient
    problem: Problem
    algorithms: Algorithms

    @cached_property
    def source(self) -> str:
        """The raw value whose activation the convolution reads."""
        return "x" if self.reads == "x" else "z" + self.reads[1:]

    @property
    def fused_forward(self) -> bool:
        """Whether the convolution normalises its input as it loads it."""
        return self.algorithms.forward.algorithm.fused

    @property
    def fused_backward(self) -> bool:
        """Whether its gradients form that of the norm as they load."""
        return self.algorithms.fused_backward

    @cached_property
    def forward_reads(self) -> str:
        return self.source if self.fused_forward else self.reads

    @cached_property
    def grad_z(self) -> bool:
        """Whether a gradient has to reach the convolution's output."""
        return self.grad_reads or self.grads.weight or self.grads.bias

    @cached_property
    def grad_norm(self) -> bool:
        """Whether the norm has a backward at all."""
        return self.grad_z or self.grads.norm_weight or self.grads.norm_bias


@dataclass(frozen=True, eq=False)
class Plan:
    """A block's algorithms, and its two programs.

    Attributes:
        slots: names of all slots. The input and the tensors come first, then what the steps make.
        saved: slots that forward leaves for backward: values, statistics, mask.
    """

    request: Request
    units: tuple[Unit, ...]
    projection: Unit | None
    slots: tuple[str, ...]
    forward: Program
    backward: Program
    saved: tuple[Slot, ...]
    stats: tuple[Slot, ...]
    grad: bool
    _linked: dict[str, list[Linked]] = field(default_factory=dict, repr=False)

    @property
    def config(self) -> BlockConfig:
        return self.request.config

    @property
    def all_units(self) -> tuple[Unit, ...]:
        return self.units if self.projection is None else (*self.units, self.projection)

    @property
    def steps(self) -> tuple[Step, ...]:
        """Forward, then backward."""
        return self.forward.steps + self.backward.steps

    def run_forward(self, kernels: Kernels, input: Tensor, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The slots after forward, from which :attr:`forward`, :attr:`saved` and :attr:`stats` say what is where."""
        return self._run("forward", kernels, [input, *tensors])

    def run_backward(
        self, kernels: Kernels, grad_output: Tensor, tensors: Sequence[Tensor | None], saved: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Gradients of the input and of every tensor, in their order; None where the plan has none."""
        made = self._run("backward", kernels, [None, *tensors], grad_output, saved)
        return [None if slot == NONE else made[slot] for slot in self.backward.results]

    def _run(
        self,
        direction: str,
        kernels: Kernels,
        given: list[Tensor | None],
        grad_output: Tensor | None = None,
        saved: Sequence[Tensor | None] = (),
    ) -> list[Tensor | None]:
        if direction not in self._linked:
            self._linked[direction] = link(getattr(self, direction), kernels)
        slots = given + [None] * (len(self.slots) - len(given))
        if grad_output is not None:
            slots[self.slots.index("dy")] = grad_output
        for slot, value in zip(self.saved, saved, strict=False):
            slots[slot] = value
        run(self._linked[direction], slots)
        return slots

    def __str__(self) -> str:
        lines = [f"{direction}:" for direction in ("forward", "backward")]
        both = [[f"  {step.text(self.slots)}" for step in program.steps] for program in (self.forward, self.backward)]
        saved = ", ".join(self.slots[slot] for slot in self.saved) or "nothing"
        backward = [lines[1], *both[1]] if self.grad else ["no gradient is required"]
        return "\n".join([lines[0], *both[0], f"saved for backward: {saved}", *backward])
