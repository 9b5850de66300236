"""Dispatch of convolutions: algorithms, their heuristics, selection and tuning; and the interface of a backend."""

from fused_res.dispatch.algorithm import TRAINING_OPERATIONS, Algorithm, Machine, Operation, PackedWeight, Problem, Rule
from fused_res.dispatch.selection import (
    Selection,
    TrainingAlgorithms,
    candidates,
    select,
    select_training,
    select_uncached,
)

__all__ = [
    "TRAINING_OPERATIONS",
    "Algorithm",
    "Machine",
    "Operation",
    "PackedWeight",
    "Problem",
    "Rule",
    "Selection",
    "TrainingAlgorithms",
    "candidates",
    "select",
    "select_training",
    "select_uncached",
]
