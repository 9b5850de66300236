"""Selection of a convolution's algorithm: the first of a backend's list that supports it and that no rule excludes.

oneDNN walks its list of convolution implementations in the same way
(https://uxlfoundation.github.io/oneDNN/dev_guide_convolution.html). Measuring (:mod:`fused_res.dispatch.tuning`) only
reorders the list.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from fused_res.dispatch.algorithm import TRAINING, Algorithm, Problem


class Selected(NamedTuple):
    """An algorithm and why it was selected."""

    algorithm: Algorithm
    reason: str

    @property
    def name(self) -> str:
        return self.algorithm.name

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})" if self.reason else self.name


def candidates(algorithms: tuple[Algorithm, ...], problem: Problem) -> list[Algorithm]:
    """Every algorithm of the list that can compute the problem, in order."""
    return [one for one in algorithms if problem.operation in one.serves and one.supports(problem) is None]


def select_uncached(algorithms: tuple[Algorithm, ...], problem: Problem, preference: str) -> Selected:
    """The first algorithm that supports the problem and that no rule excludes.

    Args:
        preference: ``"planned"``; ``"aten"`` for ATen's convolution and nothing else; ``"fused"`` to disregard the
            rules of fused algorithms.
    """
    if preference == "aten":
        return Selected(algorithms[-1], "FUSED_RES_CONVOLUTION or backends.use()")
    excluded = ""
    for algorithm in algorithms:
        if problem.operation not in algorithm.serves:
            continue
        reason = algorithm.supports(problem) or _slower(algorithm, problem, preference)
        if reason is None:
            return Selected(algorithm, algorithm.describe(problem) or excluded)
        if not algorithm.niche:
            excluded = reason
    raise AssertionError("the last algorithm of a list supports everything")


def _slower(algorithm: Algorithm, problem: Problem, preference: str) -> str | None:
    """Why another algorithm is faster, or None."""
    if algorithm.fused and preference == "fused":
        return None
    for rule in algorithm.rules:
        if (not rule.operations or problem.operation in rule.operations) and rule.beaten(problem):
            return rule.reason
    return None


_cached = lru_cache(maxsize=8192)(select_uncached)


def select(algorithms: tuple[Algorithm, ...], problem: Problem, preference: str) -> Selected:
    """The first algorithm that supports the problem and that no rule excludes; cached but for symbolic sizes.

    Args:
        algorithms: a backend's list.
        preference: ``"planned"``; ``"aten"`` for ATen's convolution and nothing else; ``"fused"`` to disregard the
            rules of fused algorithms.
    """
    return (select_uncached if problem.symbolic else _cached)(algorithms, problem, preference)


class Algorithms(NamedTuple):
    """The algorithms of one convolution in training."""

    forward: Selected
    input_gradient: Selected
    weight_gradient: Selected

    @property
    def fused_backward(self) -> bool:
        return self.weight_gradient.algorithm.fused

    def __str__(self) -> str:
        if len(set(names := [one.name for one in self])) == 1:
            return str(self.forward)
        gradients = f"input gradient {names[1]}, weight gradient {names[2]}"
        return f"forward {self.forward}, {gradients}"


def select_training(algorithms: tuple[Algorithm, ...], problem: Problem, preference: str) -> Algorithms:
    """The algorithms for a convolution and its two gradients; both gradients are fused, or neither."""
    return Algorithms(*(select(algorithms, problem._replace(operation=one), preference) for one in TRAINING))
