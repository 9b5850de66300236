"""Plain PyTorch: defines the maths, runs on every device and dtype, and is the fallback that always works."""
