"""Fused convolution, batch norm, addition and ReLU for PyTorch: residual blocks that train faster.

:func:`fuse` and :func:`freeze` are for models that exist, :mod:`fused_res.nn` and :mod:`fused_res.models` for new ones,
:mod:`fused_res.functional` is what all of these call, and :mod:`fused_res.backends` says who computes.
"""

from fused_res import backends, env, functional, fusion, models, nn
from fused_res.backends import BackendUnavailableError
from fused_res.fusion import freeze, fuse, summarize, unfuse
from fused_res.nn import convert_sync_batchnorm
from fused_res.spec import BlockSpec, PoolSpec, UnitSpec

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "BlockSpec",
    "PoolSpec",
    "UnitSpec",
    "backends",
    "convert_sync_batchnorm",
    "freeze",
    "functional",
    "fuse",
    "fusion",
    "models",
    "nn",
    "summarize",
    "unfuse",
]

env.check()
