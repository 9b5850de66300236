"""Who computes: the names that ``backend=``, :func:`use` and ``FUSED_RES_BACKEND`` take.

- ``"reference"``: plain PyTorch, on any device; always there.
- ``"cpu"``: C++, on CPU tensors.
- ``"triton"``: Triton, on NVIDIA GPUs of compute capability 8.0 and newer; with ``TRITON_INTERPRET=1`` on the CPU, too.
- ``"cuda"``: CUDA C++, on the same GPUs.
- ``"auto"``: the best that can run on the input's device, unless :func:`use` or ``FUSED_RES_BACKEND`` names one.

A backend that is asked for by name and cannot run raises :class:`BackendUnavailableError`, which says why, and what to
type.
"""

from fused_res.backends.registry import BackendUnavailableError, names, resolve, table, unavailable, use

__all__ = ["BackendUnavailableError", "names", "resolve", "table", "unavailable", "use"]
