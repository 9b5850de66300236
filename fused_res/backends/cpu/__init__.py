"""Backend ``"cpu"``: C++ kernels (``csrc/cpu``), registered with the dispatcher as ``fused_res_cpu::*``.

Outputs of one megabyte or more are allocated from a cache of freed outputs, because the page faults of newly mapped
memory of that size take longer than the kernel. ``FUSED_RES_CPU_CACHE`` and :func:`set_output_cache` bound the cache.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

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

    return Machine(_extension.cpu_isa(), onednn.dtypes(), cache_sizes())


@cache
def cache_sizes() -> tuple[int, ...]:
    """Return the sizes in bytes of core 0's L1 data, L2 and L3 cache; 0 for a level that Linux does not report."""
    sizes = {1: 0, 2: 0, 3: 0}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        level, kind, size = (index.joinpath(name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction" and int(level) in sizes and size.endswith("K"):
            sizes[int(level)] = int(size[:-1]) << 10
    return tuple(sizes.values())


def load() -> Kernels:
    from fused_res.backends.cpu import conv_bias_act, conv_bn_stats, convolution, operators

    return Kernels(
        algorithms=convolution.ALGORITHMS,
        prepare_inference_graph=conv_bias_act.prepare_inference_graph,
        selects_per_call=True,
        **operators.OPERATORS,
        conv_bias_act=conv_bias_act.conv_bias_act,
        conv_bn_stats=conv_bn_stats.conv_bn_stats,
    )
