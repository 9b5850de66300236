"""Autograd Functions, one for each operator; thin: the work is in the executors and the kernels."""
