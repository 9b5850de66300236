"""Selection of a convolution's algorithm: the first of a backend's list that supports it and is not excluded by a rule.

oneDNN selects from its list of convolution implementations in the same way
(https://uxlfoundation.github.io/oneDNN/dev_guide_convolution.html). Tuning (:mod:`fused_res.dispatch.tuning`) replaces
the heuristics by measured times.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from fused_res.dispatch.algorithm import TRAINING_OPERATIONS, Algorithm, Problem


class Selection(NamedTuple):
    """A selected algorithm and the human-readable reason for its selection."""

    algorithm: Algorithm
    reason: str

    @property
    def name(self) -> str:
        """Name of the algorithm."""
        return self.algorithm.name

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})" if self.reason else self.name


def unsupported_reason(algorithm: Algorithm, problem: Problem) -> str | None:
    """Return the reason why an algorithm cannot compute a problem, or None if it can."""
    if algorithm.fused and not problem.relu_norms:
        return "its operand prologues have no activation but ReLU"
    return algorithm.unsupported_reason(problem)


def candidates(algorithms: tuple[Algorithm, ...], problem: Problem) -> list[Algorithm]:
    """Return the algorithms of the list that support the problem, in order."""
    return [
        algorithm
        for algorithm in algorithms
        if problem.operation in algorithm.implementations and unsupported_reason(algorithm, problem) is None
    ]


def select_uncached(algorithms: tuple[Algorithm, ...], problem: Problem, preference: str) -> Selection:
    """Implement :func:`select` without its cache."""
    if preference == "aten":
        return Selection(algorithms[-1], "requested by FUSED_RES_CONVOLUTION or backends.use()")
    skipped = ""
    for algorithm in algorithms:
        if problem.operation not in algorithm.implementations:
            continue
        reason = unsupported_reason(algorithm, problem) or _exclusion_reason(algorithm, problem, preference)
        if reason is None:
            return Selection(algorithm, algorithm.selection_reason(problem) or skipped)
        if not algorithm.special_case:
            skipped = f"{algorithm.name} not selected: {reason}"
    raise AssertionError("the last algorithm of a list supports everything")


def _exclusion_reason(algorithm: Algorithm, problem: Problem, preference: str) -> str | None:
    """Return the reason of the first rule that excludes the algorithm, or None."""
    if algorithm.fused and preference == "fused":
        return None
    for rule in algorithm.rules:
        if (not rule.operations or problem.operation in rule.operations) and rule.is_slower(problem):
            return rule.reason
    return None


_cached = lru_cache(maxsize=8192)(select_uncached)


class Measured(NamedTuple):
    """The fastest algorithms of one inference problem: of all, and of those that an inference graph can contain."""

    fastest: Selection
    fastest_in_graph: Selection


#: What tuning (:func:`fused_res.dispatch.tuning.measure_inference`) has found. Entries are never replaced, so that
#: selections and the graphs that are planned from them do not change.
measured: dict[tuple[tuple[Algorithm, ...], Problem], Measured] = {}


def select(algorithms: tuple[Algorithm, ...], problem: Problem, preference: str) -> Selection:
    """Return the first algorithm that supports the problem and that no rule excludes.

    Results are cached, except for problems with symbolic sizes.

    Args:
        algorithms: a backend's list, in order of priority.
        problem: the convolution.
        preference: ``"planned"`` for selection by the rules; ``"aten"`` for ATen's convolution only; ``"fused"`` to
            ignore the rules of fused algorithms; ``"tuned"`` for the fastest measured algorithm, ``"tuned_graph"`` for
            the fastest that an inference graph can contain, both by the rules where nothing was measured.
    """
    if preference in ("tuned", "tuned_graph") and (found := measured.get((algorithms, problem))) is not None:
        return found.fastest if preference == "tuned" else found.fastest_in_graph
    return (select_uncached if problem.symbolic else _cached)(algorithms, problem, preference)


class TrainingAlgorithms(NamedTuple):
    """The algorithms of one convolution in training: forward, input gradient and weight gradient."""

    forward: Selection
    input_gradient: Selection
    weight_gradient: Selection

    @property
    def fused_backward(self) -> bool:
        """Whether the gradients are fused with the norms around the convolution."""
        return self.weight_gradient.algorithm.fused

    def __str__(self) -> str:
        if len(set(names := [selection.name for selection in self])) == 1:
            return str(self.forward)
        gradients = f"input gradient {names[1]}, weight gradient {names[2]}"
        return f"forward {self.forward}, {gradients}"


def select_training(algorithms: tuple[Algorithm, ...], problem: Problem, preference: str) -> TrainingAlgorithms:
    """Return the algorithms for a convolution and its two gradients; both gradients are fused, or neither.

    Args:
        algorithms: a backend's list, in order of priority.
        problem: the forward convolution, with the ``residual`` of its input gradient.
        preference: as of :func:`select`.
    """
    return TrainingAlgorithms(
        *(select(algorithms, problem._replace(operation=operation), preference) for operation in TRAINING_OPERATIONS)
    )
