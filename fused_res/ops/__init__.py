"""The operators that backends implement: schemas, fakes, registration, argument checks, FLOP formulas."""

from fused_res.ops.library import bind, define, operator, overloads
from fused_res.ops.schemas import CPU_SCHEMAS, INVSTD, MEAN, SCALE, SCHEMAS, SHIFT, STEMS, VAR, stats_dtype

__all__ = [
    "CPU_SCHEMAS",
    "INVSTD",
    "MEAN",
    "SCALE",
    "SCHEMAS",
    "SHIFT",
    "STEMS",
    "VAR",
    "bind",
    "define",
    "operator",
    "overloads",
    "stats_dtype",
]
