"""Peak rates of GPUs according to their data sheets: dense, without sparsity."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    name: str
    bandwidth: float  # of device memory, bytes/s
    half: float  # FLOP/s of the tensor cores, bfloat16 or float16 with float32 accumulators
    tf32: float
    fp32: float  # without the tensor cores
    l2: int  # bytes
    source: str

    def rate(self, dtype: str) -> float:
        """Return the peak FLOP/s in `dtype`."""
        return {"bf16": self.half, "fp16": self.half, "tf32": self.tf32, "fp32": self.fp32}[dtype]


_HOPPER = "H100 Tensor Core GPU Architecture whitepaper (rates, L2)"
DEVICES = {
    "h200": Device(
        "H200 SXM", 4.8e12, 989.4e12, 494.7e12, 66.9e12, 50 << 20, f"NVIDIA H200 datasheet (bandwidth); {_HOPPER}"
    ),
    "h100": Device("H100 SXM", 3.35e12, 989.4e12, 494.7e12, 66.9e12, 50 << 20, f"NVIDIA H100 datasheet; {_HOPPER}"),
    "a100": Device(
        "A100 SXM 80 GB", 2.039e12, 312e12, 156e12, 19.5e12, 40 << 20,
        "NVIDIA A100 datasheet; A100 Tensor Core GPU Architecture whitepaper (L2)",
    ),
    "rtx4090": Device(
        "RTX 4090", 1.008e12, 165.2e12, 82.6e12, 82.6e12, 72 << 20, "NVIDIA Ada GPU Architecture whitepaper"
    ),
}  # fmt: skip
