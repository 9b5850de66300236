"""Fused convolution, batch norm, addition and ReLU for PyTorch: residual networks that train and infer faster.

:func:`fuse` and :func:`freeze` convert existing models, :func:`summarize` and :func:`check` report what runs fused and
compare it with stock. :mod:`fused_res.nn` and :mod:`fused_res.models` contain modules and networks for new ones. All of
them call :mod:`fused_res.functional`; :mod:`fused_res.backends` selects the kernels.
"""

from fused_res import backends, env, functional, fusion, models, nn, report
from fused_res.backends import BackendUnavailableError
from fused_res.fusion import freeze, fuse, unfuse
from fused_res.nn import convert_sync_batchnorm
from fused_res.report import check, summarize
from fused_res.spec import BlockSpec, PoolSpec, UnitSpec

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "BlockSpec",
    "PoolSpec",
    "UnitSpec",
    "backends",
    "check",
    "convert_sync_batchnorm",
    "freeze",
    "functional",
    "fuse",
    "fusion",
    "models",
    "nn",
    "report",
    "summarize",
    "unfuse",
]

env.check()
