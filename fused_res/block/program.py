"""Programs: flat lists of steps that compute a block, and the interpreter that runs them.

A step applies one operator to numbered slots. Everything that a block does is a step: convolutions with and without a
fused norm, the halves of a norm with a process group between them, recomputation, gradients. A program holds numbers,
booleans and names only, so that an interpreter in another language can run it as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_res import distributed
from fused_res.dispatch import Selected
from fused_res.dispatch.backend import Kernels
from fused_res.ops import SCALE
from fused_res.ops.memory_format import laid_out


class Slot(int):
    """The number of a tensor in a program, which tells it from other numbers among a step's arguments."""

    __slots__ = ()


#: The slot of an absent operand, and of a result that is not needed.
NONE = Slot(-1)


class Step(NamedTuple):
    """One operator applied to slots.

    Args:
        operator: an operator of :mod:`fused_res.ops`, a key of :data:`OPERATORS`, or one of :data:`CONVOLUTIONS`, which
            ``algorithm`` computes.
        arguments: in the operator's order; a :class:`Slot` is a tensor, all others are constants.
        results: slots of what it returns; none for an operator that works in place on its first argument.
        algorithm: which algorithm computes a convolution, and why.
        recomputed: whether backward computes again what forward had.
        frees: slots whose last use this is.
    """

    operator: str
    arguments: tuple[Any, ...]
    results: tuple[Slot, ...]
    algorithm: Selected | None = None
    recomputed: bool = False
    frees: tuple[Slot, ...] = ()

    @property
    def operands(self) -> tuple[Slot, ...]:
        """The slots among the arguments."""
        return tuple(argument for argument in self.arguments if type(argument) is Slot and argument != NONE)

    def text(self, slots: Sequence[str]) -> str:
        """The step in words, with the slots' names."""

        def named(numbers: Iterable[Slot]) -> str:
            return ", ".join(slots[number] for number in numbers if number != NONE)

        words = f"{self.operator}({named(self.operands)}) -> {named(self.results or self.arguments[:1])}"
        words += ", recomputed" * self.recomputed
        words += f": {self.algorithm}" if self.algorithm is not None else ""
        return words + (f"; frees {named(self.frees)}" if self.frees else "")


class Program(NamedTuple):
    """Steps in order, and the slots of their results."""

    steps: tuple[Step, ...]
    results: tuple[Slot, ...]

    def freeing(self, kept: Iterable[Slot]) -> Program:
        """The program with every slot freed after its last use, but for its results and those ``kept``."""
        last: dict[Slot, int] = {}
        for index, step in enumerate(self.steps):
            last |= dict.fromkeys((*step.operands, *step.results), index)
        never = {NONE, *kept, *self.results}
        frees: list[list[Slot]] = [[] for _ in self.steps]
        for slot, index in last.items():
            if slot not in never:
                frees[index].append(slot)
        steps = (step._replace(frees=tuple(slots)) for step, slots in zip(self.steps, frees, strict=True))
        return Program(tuple(steps), self.results)


#: The steps that an algorithm computes, and the operation under which it is found: one callable serves both gradients.
CONVOLUTIONS = {"convolution": "forward", "convolution_backward": "weight_gradient"}


class Linked(NamedTuple):
    """A step with its operator as a callable; ``arguments`` has gaps where ``places`` says which slot goes there."""

    function: Callable[..., Any]
    arguments: list[Any]
    places: list[tuple[int, Slot]]
    results: tuple[Slot, ...]
    frees: tuple[Slot, ...]


def link(program: Program, kernels: Kernels) -> list[Linked]:
    """The steps as calls of a backend's kernels."""
    linked = []
    for step in program.steps:
        if step.operator in CONVOLUTIONS:
            assert step.algorithm is not None
            operation: Any = CONVOLUTIONS[step.operator]
            function = kernels.implementation(operation, step.algorithm.algorithm)
        else:
            function = OPERATORS.get(step.operator) or getattr(kernels, step.operator)
        places = [(at, one) for at, one in enumerate(step.arguments) if type(one) is Slot and one != NONE]
        arguments = [None if type(one) is Slot else one for one in step.arguments]
        linked.append(Linked(function, arguments, places, step.results, step.frees))
    return linked


def run(linked: Sequence[Linked], slots: list[Tensor | None]) -> None:
    """Runs a linked program, in place on its slots."""
    for function, template, places, results, frees in linked:
        arguments = template.copy()
        for place, slot in places:
            arguments[place] = slots[slot]
        made = function(*arguments)
        if len(results) == 1:
            slots[results[0]] = made
        elif results:
            for slot, value in zip(results, made, strict=False):
                if slot != NONE:
                    slots[slot] = value
        arguments = made = None  # type: ignore[assignment]
        for slot in frees:
            slots[slot] = None


# Operators that no backend has kernels for


def _sum_over_channels(dz: Tensor) -> Tensor:
    """The gradient of a bias that is added to every channel."""
    return dz.sum([0, *range(2, dz.dim())])


def _norm_parameter_gradients(sums: Tensor, weight: Tensor | None) -> list[Tensor]:
    """Gradients of a norm's weight and bias. Copies: gradients accumulate in place, and must not share memory."""
    dtype = sums.dtype if weight is None else weight.dtype
    return [sums[1].to(dtype, copy=True), sums[0].to(dtype, copy=True)]


def _conv_bias_gradient(bias: Tensor, stats: Tensor, sums: Tensor | None, training: bool) -> Tensor:
    """Zero where the mean of the batch takes the bias away again."""
    assert training or sums is not None
    return torch.zeros_like(bias) if training else (stats[SCALE] * sums[0]).to(bias.dtype)  # type: ignore[index]


def _split_pair_sums(sums: Tensor) -> list[Tensor]:
    """The sums of a norm and of its residual's, which share the first row."""
    return [sums[:2], sums[::2].contiguous()]


def _spread_strided(grad: Tensor, x: Tensor, stride: Sequence[int]) -> Tensor:
    """A strided 1x1 convolution's input gradient with the zeros between the pixels that it read."""
    full = torch.zeros_like(x)
    full[(slice(None), slice(None), *(slice(None, None, step) for step in stride))] = grad
    return full


def _add_strided(grad: Tensor, added: Tensor, stride: Sequence[int]) -> None:
    """Adds a strided convolution's input gradient, which comes for the pixels that it read alone."""
    grad[(slice(None), slice(None), *(slice(None, None, step) for step in stride))].add_(added)


OPERATORS: dict[str, Callable[..., Any]] = {
    "to_memory_format": laid_out,
    "gather_partials": distributed.gather_partials,
    "total_sums": distributed.total_sums,
    "sum_over_channels": _sum_over_channels,
    "norm_parameter_gradients": _norm_parameter_gradients,
    "conv_bias_gradient": _conv_bias_gradient,
    "split_pair_sums": _split_pair_sums,
    "add_": Tensor.add_,
    "add_strided_": _add_strided,
    "spread_strided": _spread_strided,
}
