"""The operators that backends implement: schemas, fake implementations, registration, argument checks, FLOP formulas.

:mod:`fused_res.ops.schemas` specifies what each operator computes.
"""

from fused_res.ops.library import define, operator_overloads, overloads, register_python_operator
from fused_res.ops.schemas import CPU_SCHEMAS, INVSTD, MEAN, OP_FAMILIES, SCALE, SCHEMAS, SHIFT, VAR, stats_dtype

__all__ = [
    "CPU_SCHEMAS",
    "INVSTD",
    "MEAN",
    "OP_FAMILIES",
    "SCALE",
    "SCHEMAS",
    "SHIFT",
    "VAR",
    "define",
    "operator_overloads",
    "overloads",
    "register_python_operator",
    "stats_dtype",
]
