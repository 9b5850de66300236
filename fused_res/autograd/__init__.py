"""Thin autograd Functions over the backends' kernels and the plans of blocks."""
