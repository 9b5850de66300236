"""Who computes: ``reference`` (plain PyTorch), ``cpu`` (C++), ``triton``, ``cuda``."""

from fused_res.backends.registry import BackendUnavailableError, names, resolve, table, unavailable, use

__all__ = ["BackendUnavailableError", "names", "resolve", "table", "unavailable", "use"]
