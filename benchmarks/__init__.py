"""Benchmarks of fused_res against stock PyTorch: time, memory and accuracy on the machine that runs them.

See `python -m benchmarks --help`.
"""
