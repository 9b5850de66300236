"""Selection of the algorithm that computes a convolution, from the list that its backend declares."""

from fused_res.dispatch.algorithm import TRAINING, Algorithm, Machine, Operation, PackedWeight, Problem, Rule
from fused_res.dispatch.selection import Algorithms, Selected, candidates, select, select_training, select_uncached

__all__ = [
    "TRAINING",
    "Algorithm",
    "Algorithms",
    "Machine",
    "Operation",
    "PackedWeight",
    "Problem",
    "Rule",
    "Selected",
    "candidates",
    "select",
    "select_training",
    "select_uncached",
]
