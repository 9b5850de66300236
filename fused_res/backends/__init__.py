"""Backends: the implementations of the operators, selected by ``backend=``, :func:`use` or ``FUSED_RES_BACKEND``.

- ``"reference"``: plain PyTorch, on any device; always available.
- ``"cpu"``: C++, on CPU tensors.
- ``"triton"``: Triton, on NVIDIA GPUs of compute capability 8.0 and newer; with ``TRITON_INTERPRET=1`` also on the CPU.
- ``"cuda"``: CUDA C++, on the same GPUs.
- ``"auto"``: the best backends that can run on the input's device, unless :func:`use` or ``FUSED_RES_BACKEND`` selects
  one. On a CPU that is ``"cpu"``; on a GPU ``"cuda"`` for norms and pooling with ``"triton"`` for convolutions, or one
  of the two for everything; ``"reference"`` if there is no other.

Every backend selects the algorithm of a convolution by heuristics, ATen's (cuDNN, oneDNN) included;
``use(convolution=...)`` overrides them.

Selecting a backend by name that cannot run raises :class:`BackendUnavailableError`; the message gives the reason and,
if there is one, the command that fixes it.
"""

from fused_res.backends.registry import BackendUnavailableError, names, resolve, table, unavailable, use

__all__ = ["BackendUnavailableError", "names", "resolve", "table", "unavailable", "use"]
