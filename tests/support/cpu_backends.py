"""The backends that take CPU tensors here: compiled for them, interpreted (Triton) or simulated (CUDA C++)."""

from fused_res.backends import cuda, registry, triton

#: Fast enough for a test of hundreds of calls.
FAST = [name for name in ("reference", "cpu") if registry.unavailable(name) is None]
if cuda.simulating() and registry.unavailable("cuda") is None:
    FAST.append("cuda")
BACKENDS = [*FAST]
if triton.interpreting() and registry.unavailable("triton") is None:
    BACKENDS.append("triton")
