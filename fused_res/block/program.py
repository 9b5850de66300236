"""Intermediate representation of a block's forward and backward, and its interpreter.

A program is a flat list of steps; a step applies one operator to numbered slots. Every operation of a block is a step:
fused and unfused convolutions, the statistics and normalization passes of a norm and the collective between them,
recomputation, gradients. Apart from a convolution's algorithm, a step contains only numbers, booleans, dtypes,
names and sequences of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_res import distributed
from fused_res.dispatch import Selection
from fused_res.dispatch.backend import Kernels
from fused_res.ops import SCALE
from fused_res.ops.memory_format import to_memory_format


class Slot(int):
    """Index of a tensor of a program; its type distinguishes it from the integer constants of a step."""

    __slots__ = ()


#: The block's input.
INPUT_SLOT = Slot(0)
#: Placeholder for an absent operand and for a result that is not needed.
NO_SLOT = Slot(-1)


class Step(NamedTuple):
    """One operator applied to slots.

    Args:
        operator: name of an operator of :mod:`fused_res.ops`, a key of :data:`OPERATORS`, or a key of
            :data:`CONVOLUTION_OPERATORS`, whose implementation is that of ``algorithm``.
        arguments: the operator's arguments in order: a :class:`Slot` per tensor, constants otherwise.
        results: slots of the returned tensors; empty for an operator that modifies its first argument in place.
        algorithm: a convolution's algorithm and the reason for its selection.
        recomputed: whether backward recomputes a value of forward.
        last_uses: slots that are freed after the step, because no later step reads them.
    """

    operator: str
    arguments: tuple[Any, ...]
    results: tuple[Slot, ...]
    algorithm: Selection | None = None
    recomputed: bool = False
    last_uses: tuple[Slot, ...] = ()

    @property
    def operands(self) -> tuple[Slot, ...]:
        """The tensor arguments."""
        return tuple(argument for argument in self.arguments if type(argument) is Slot and argument != NO_SLOT)

    def text(self, slot_names: Sequence[str]) -> str:
        """Format the step as one line of text."""

        def names(slots: Iterable[Slot]) -> str:
            return ", ".join(slot_names[slot] for slot in slots if slot != NO_SLOT)

        line = f"{self.operator}({names(self.operands)}) -> {names(self.results or self.arguments[:1])}"
        line += ", recomputed" * self.recomputed
        line += f": {self.algorithm}" if self.algorithm is not None else ""
        return line + (f"; frees {names(self.last_uses)}" if self.last_uses else "")


class Program(NamedTuple):
    """Steps in execution order, and the slots of the program's results."""

    steps: tuple[Step, ...]
    results: tuple[Slot, ...]

    def with_last_uses(self, live_out: Iterable[Slot]) -> Program:
        """Return the program with the last uses of all slots filled in (liveness analysis).

        Args:
            live_out: slots that outlive the program, in addition to its results.
        """
        last_step: dict[Slot, int] = {}
        for index, step in enumerate(self.steps):
            last_step |= dict.fromkeys((*step.operands, *step.results), index)
        never_freed = {NO_SLOT, *live_out, *self.results}
        last_uses: list[list[Slot]] = [[] for _ in self.steps]
        for slot, index in last_step.items():
            if slot not in never_freed:
                last_uses[index].append(slot)
        steps = (step._replace(last_uses=tuple(slots)) for step, slots in zip(self.steps, last_uses, strict=True))
        return Program(tuple(steps), self.results)


#: Operators that a step's algorithm implements -> the operation whose entry in ``Algorithm.implementations`` is called.
#: One callable computes both gradients, so ``convolution_backward`` calls the entry of ``"weight_gradient"``.
CONVOLUTION_OPERATORS = {"convolution": "forward", "convolution_backward": "weight_gradient"}


#: A program whose operators are resolved: runs in place on a list of all slots.
LinkedProgram = Callable[[list[Any]], None]


def link(
    program: Program, kernels: Kernels, live_out: Iterable[Slot] = (), under_torch_dispatch: bool = False
) -> LinkedProgram:
    """Resolve the operators of a program to a backend's kernels, and compile it to a Python function.

    Straight-line code with a local variable per slot runs in half the time of a loop over the steps.

    Args:
        program: the program.
        kernels: the backend.
        live_out: slots that outlive the program, in addition to its results; others are not written to the list.
        under_torch_dispatch: whether the operators must be visible to a dispatch mode or a tensor subclass; otherwise
            operators written in Python are called without their dispatching wrapper.
    """
    namespace: dict[str, Any] = {}
    body: list[str] = []
    defined: set[Slot] = set()
    for index, step in enumerate(program.steps):
        if step.operator in CONVOLUTION_OPERATORS:
            assert step.algorithm is not None
            operation: Any = CONVOLUTION_OPERATORS[step.operator]
            function = kernels.implementation(operation, step.algorithm.algorithm)
        else:
            function = OPERATORS.get(step.operator) or getattr(kernels, step.operator)
        if not under_torch_dispatch:
            function = getattr(function, "implementation", function)
        body += [f"s{slot} = slots[{slot}]" for slot in dict.fromkeys(step.operands) if slot not in defined]
        defined.update(step.operands)
        arguments = []
        for position, argument in enumerate(step.arguments):
            if type(argument) is Slot:
                arguments.append("None" if argument == NO_SLOT else f"s{argument}")
            elif argument is None or type(argument) in (bool, int, str):
                arguments.append(repr(argument))
            else:
                arguments.append(f"c{index}_{position}")
                namespace[arguments[-1]] = argument
        namespace[f"f{index}"] = function
        call = f"f{index}({', '.join(arguments)})"
        used = [(position, slot) for position, slot in enumerate(step.results) if slot != NO_SLOT]
        if len(step.results) == 1 and used:
            body.append(f"s{step.results[0]} = {call}")
        elif used:
            body += [f"r = {call}", *(f"s{slot} = r[{position}]" for position, slot in used), "del r"]
        else:
            body.append(call)
        defined.update(slot for _, slot in used)
        freed = [f"s{slot}" for slot in step.last_uses if slot in defined]
        body += [f"{name} = None" for name in freed]
        body += [f"slots[{slot}] = None" for slot in step.last_uses]
    written = {slot for step in program.steps for slot in step.results if slot != NO_SLOT}
    body += [f"slots[{slot}] = s{slot}" for slot in dict.fromkeys((*program.results, *live_out)) if slot in written]
    exec("def run(slots):\n    " + "\n    ".join(body or ["pass"]), namespace)
    linked: LinkedProgram = namespace["run"]
    return linked


# Operators implemented with PyTorch's own, for all backends


def _sum_per_channel(dz: Tensor) -> Tensor:
    """Return the gradient of a convolution's bias: the sum over the batch and all spatial positions."""
    return dz.sum([0, *range(2, dz.dim())])


def _norm_parameter_gradients(sums: Tensor, weight: Tensor | None) -> list[Tensor]:
    """Return the gradients of a norm's weight and bias: rows of ``sums``, in the dtype of the weight.

    Autograd may accumulate into gradients in place. The rows do not overlap, and only steps of the same backward, which
    come before that, read ``sums``.
    """
    if sums._is_view():
        sums = sums.clone()  # the gradients would keep the whole of a reduction's buffer
    bias_grad, weight_grad = sums.unbind()
    if weight is None or weight.dtype == sums.dtype:
        return [weight_grad, bias_grad]
    return [weight_grad.to(weight.dtype), bias_grad.to(weight.dtype)]


def _conv_bias_gradient(bias: Tensor, stats: Tensor, sums: Tensor | None, training: bool) -> Tensor:
    """Return the gradient of the bias of a convolution that a norm follows.

    It is zero in training, where the norm subtracts the mean of the batch and with it the bias.
    """
    assert training or sums is not None
    return torch.zeros_like(bias) if training else (stats[SCALE] * sums[0]).to(bias.dtype)  # type: ignore[index]


def _split_pair_sums(sums: Tensor) -> list[Tensor]:
    """Split the sums of two norms whose outputs are added; they share the first row, the sum of the gradient."""
    return [sums[:2], sums[::2].contiguous()]


def _scatter_strided(compact: Tensor, x: Tensor, stride: Sequence[int]) -> Tensor:
    """Expand the compact input gradient of a strided 1x1 convolution: zero for the pixels that it did not read."""
    full = torch.zeros_like(x)
    full[(slice(None), slice(None), *(slice(None, None, step) for step in stride))] = compact
    return full


def _add_strided(grad: Tensor, compact: Tensor, stride: Sequence[int]) -> None:
    """Add the compact input gradient of a strided 1x1 convolution to ``grad`` in place."""
    grad[(slice(None), slice(None), *(slice(None, None, step) for step in stride))].add_(compact)


OPERATORS: dict[str, Callable[..., Any]] = {
    "to_dtype": Tensor.to,
    "to_memory_format": to_memory_format,
    "gather_partials": distributed.gather_partials,
    "total_sums": distributed.total_sums,
    "sum_per_channel": _sum_per_channel,
    "norm_parameter_gradients": _norm_parameter_gradients,
    "conv_bias_gradient": _conv_bias_gradient,
    "split_pair_sums": _split_pair_sums,
    "add_": Tensor.add_,
    "add_strided_": _add_strided,
    "scatter_strided": _scatter_strided,
}
