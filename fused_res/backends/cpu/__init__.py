"""C++ kernels (``csrc/cpu``), registered with the dispatcher as ``fused_res_cpu::*``."""

from fused_res import ops

ops.define("fused_res_cpu")
