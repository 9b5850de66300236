"""C++ kernels (``csrc/cpu``), registered with the dispatcher as ``fused_res_cpu::*``.

Outputs of a megabyte and more come from a cache of freed ones, because the page faults of a fresh block of that size
take longer than the kernel; ``FUSED_RES_CPU_CACHE`` and :func:`set_output_cache` bound it.
"""

from fused_res import ops
from fused_res._extension import output_cache_bytes, set_output_cache

__all__ = ["output_cache_bytes", "set_output_cache"]

ops.define("fused_res_cpu", internal=ops.CPU_SCHEMAS)
