"""Backends that accept CPU tensors here: the CPU backends, interpreted Triton and simulated CUDA C++."""

from fused_res.backends import cuda, registry, triton

#: Fast enough for a test of hundreds of calls.
FAST_BACKENDS = [name for name in ("reference", "cpu") if registry.unavailable(name) is None]
if cuda.is_simulated() and registry.unavailable("cuda") is None:
    FAST_BACKENDS.append("cuda")
BACKENDS = [*FAST_BACKENDS]
if triton.is_interpreted() and registry.unavailable("triton") is None:
    BACKENDS.append("triton")
