"""What fused_res costs and saves beside stock PyTorch, measured on the machine it runs on: `python -m
benchmarks --help`."""
