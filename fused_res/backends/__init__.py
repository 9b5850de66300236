"""Backends: the implementations of the operators, selected by ``backend=``, :func:`use` or ``FUSED_RES_BACKEND``.

- ``"reference"``: plain PyTorch, on any device; always available.
- ``"cpu"``: C++, on CPU tensors.
- ``"triton"``: Triton, on NVIDIA GPUs of compute capability 8.0 and newer; with ``TRITON_INTERPRET=1`` also on the CPU.
- ``"cuda"``: CUDA C++, on the same GPUs.
- ``"auto"``: the fastest backend that can run on the input's device, unless :func:`use` or ``FUSED_RES_BACKEND``
  selects one.

A backend that is selected by name but cannot run raises :class:`BackendUnavailableError`, whose message has the reason
and a command that helps.
"""

from fused_res.backends.registry import BackendUnavailableError, names, resolve, table, unavailable, use

__all__ = ["BackendUnavailableError", "names", "resolve", "table", "unavailable", "use"]
