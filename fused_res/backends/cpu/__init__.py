"""Backend ``"cpu"``: C++ kernels (``csrc/cpu``), registered with the dispatcher as ``fused_res_cpu::*``.

Outputs of 128 KB or more are allocated from a cache of freed outputs, because the page faults of newly mapped
memory of that size take longer than the kernel. ``FUSED_RES_CPU_CACHE`` and :func:`set_output_cache` bound the cache.
"""

from __future__ import annotations

from fused_res import _extension
from fused_res._extension import output_cache_bytes, set_output_cache
from fused_res.dispatch import Machine
from fused_res.dispatch.backend import Kernels

__all__ = ["output_cache_bytes", "set_output_cache"]

OP_FAMILIES = ("batch_norm_act", "batch_norm_sync", "max_pool", "conv_bias_act", "conv_bn_stats")


def devices() -> tuple[str, ...]:
    return ("cpu",)


def unavailable() -> str | None:
    return None if _extension.loaded else _extension.unavailable_reason


def machine() -> Machine:
    from fused_res.backends.cpu import onednn

    return Machine(_extension.cpu_isa(), onednn.dtypes(), _extension.cpu_caches())


def load() -> Kernels:
    from fused_res.backends.cpu import conv_bias_act, conv_bn_stats, convolution, operators

    return Kernels(
        algorithms=convolution.ALGORITHMS,
        prepare_inference_graph=conv_bias_act.prepare_inference_graph,
        float32_bias=True,
        selects_per_call=True,
        **operators.OPERATORS,
        conv_backward=operators.conv_backward,
        conv_bias_act=conv_bias_act.conv_bias_act,
        conv_bn_stats=conv_bn_stats.conv_bn_stats,
    )
