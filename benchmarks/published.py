"""Published timings of others' kernels, which the model of gpu_model.py must predict within 15 %.

Each timing is marked as fitted, if a constant of the model was adjusted to it, or as held out. All were known when the
constants were chosen. Timings that were found and are not predicted are listed in docs/predictions.md with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from benchmarks.events import Event, Touch, convolution_gemm
from benchmarks.gpu_model import GPUS, ISOLATED, Gpu, Product, Work, library_product, predict_all
from benchmarks.launch_model import bias_work, compiled_works, product_of
from benchmarks.launches import predict_stock, record_training
from benchmarks.network import build_network


@dataclass(frozen=True)
class Timing:
    """One published timing.

    Args:
        name: what was timed.
        gpu: key of :data:`benchmarks.gpu_model.GPUS`.
        kind: "convolution", "product", "pass" or "step".
        seconds: the published time.
        fitted: whether a constant of the model was adjusted to this timing.
        source: where it was published.
        predict: function of the GPU that returns the predicted seconds.
    """

    name: str
    gpu: str
    kind: str
    seconds: float
    fitted: bool
    source: str
    predict: Callable[[Gpu], float]

    @property
    def predicted(self) -> float:
        return self.predict(GPUS[self.gpu])

    @property
    def error(self) -> float:
        """Relative error of the prediction: positive if it is too long."""
        return self.predicted / self.seconds - 1


def _seconds(works: list[Work], gpu: Gpu) -> float:
    return sum(one.seconds for one in predict_all(works, gpu))


def _product(m: int, n: int, k: int) -> Callable[[Gpu], float]:
    """Time one 16-bit product by events, with cold caches."""

    def predict(gpu: Gpu) -> float:
        touches = [(0, 2 * m * k), (1, 2 * n * k), (2, 2 * m * n)]
        return _seconds(library_product(Product(m, n, k), touches, 2 * m * n, gpu), gpu) + ISOLATED

    return predict


def _passes(*tensors: int, launches: int = 1) -> Callable[[Gpu], float]:
    """Time one streaming kernel that passes once over tensors of these sizes in bytes, by events."""

    def predict(gpu: Gpu) -> float:
        works = [Work("pass", list(enumerate(tensors)))] + [Work("second stage", [])] * (launches - 1)
        return _seconds(works, gpu) + ISOLATED

    return predict


_PIXELS, _CHANNELS = 32 * 56 * 56, 64
_ACTIVATION = 2 * _PIXELS * _CHANNELS


def _convolution(gpu: Gpu) -> list[Work]:
    touches = [(0, _ACTIVATION), (1, 2 * 9 * _CHANNELS**2), (2, _ACTIVATION)]
    return library_product(Product(_PIXELS, _CHANNELS, 9 * _CHANNELS, im2col=True), touches, _ACTIVATION, gpu)


def _bias(gpu: Gpu) -> list[Work]:
    return [bias_work(Touch(2, _ACTIVATION))]


def _step(batch: int, norm: str) -> Callable[[Gpu], float]:
    return lambda gpu: predict_stock(_stock_step(batch), gpu, norm).gpu_seconds


@cache
def _stock_step(batch: int) -> list[Event]:
    return record_training("resnet50", batch)


def _inference(batch: int) -> Callable[[Gpu], float]:
    """Time the inference of ResNet-50 with batch norms folded and addition and ReLU fused into the convolutions."""

    def predict(gpu: Gpu) -> float:
        works: list[Work] = []
        for block in build_network("resnet50", batch, 224).blocks:
            for layer in block.convolutions:
                first, output = 10 * len(works), 2 * math.prod(layer.z)
                touches = [
                    (first, 2 * layer.elements_read),
                    (first + 1, 2 * math.prod(layer.weight)),
                    (first + 2, output),
                ]
                touches += [(first + 3, output)] if layer.residual else []
                product = product_of(convolution_gemm("forward", layer.x, layer.weight, layer.z))
                works += library_product(product, touches, output, gpu)
            if block.name == "stem":
                works.append(Work("max pool", [(-3, output), (-4, 2 * math.prod(block.y))]))
        return _seconds(works, gpu)

    return predict


_E, _G = 1 << 24, 1 << 30
_CONVOLUTION_PR = "https://github.com/gabrieldemarmiesse/torch-mojo-backend/pull/387"
_MACHINE = "a machine of the kind that `make gpu` is for, 2026-10-28"
_CCCL = "https://github.com/NVIDIA/cccl/pull/"
_GEMS = "https://github.com/flagos-ai/FlagGems/pull/"
TIMINGS = (
    Timing("cuDNN 3x3, C 64, 56x56, N 32, bf16", "h100-pcie", "convolution", 31.2e-6, True, _CONVOLUTION_PR,
           lambda gpu: _seconds(_convolution(gpu), gpu)),
    Timing("the same with PyTorch's bias kernel", "h100-pcie", "convolution", 58.8e-6, False, _CONVOLUTION_PR,
           lambda gpu: _seconds([*_convolution(gpu), *_bias(gpu)], gpu)),
    Timing("the bias kernel alone, after a contiguous convolution", "h100-pcie", "pass", 29.9e-6, True, _CONVOLUTION_PR,
           lambda gpu: _seconds(_bias(gpu), gpu)),
    Timing("bf16 product 4224x2048x8192, 780 TFLOP/s", "h100", "product", 181.7e-6, True,
           "https://gist.github.com/Chillee/2ec89696db8b7ed1c24461159e325405", _product(4224, 2048, 8192)),
    Timing("bf16 product 8192^3, random data, 788 TFLOP/s", "h200", "product", 2 * 8192**3 / 788e12, True, _MACHINE,
           _product(8192, 8192, 8192)),
    Timing("copy of 4.3 GB, PyTorch, 4.3 TB/s", "h200", "pass", 2.0e-3, False, _MACHINE, _passes(*[4_300_000_000] * 2)),
    Timing("16-bit product 2048^3", "h100", "product", 32.77e-6, False, _GEMS + "1288", _product(2048, 2048, 2048)),
    Timing("float32 a = b + s c, 2^28 elements", "h200", "pass", 730.7e-6, True, _CCCL + "6921",
           _passes(16 * _E * 4, 16 * _E * 4, 16 * _E * 4)),
    Timing("float32 a = b + s c, 2^24 elements", "h200", "pass", 52.9e-6, True, _CCCL + "6921", _passes(*[4 * _E] * 3)),
    Timing("int8 a = b + c, 2^28 elements", "h200", "pass", 197.8e-6, False, _CCCL + "5122", _passes(*[16 * _E] * 3)),
    Timing("int8 a = b + c, 2^24 elements", "h200", "pass", 19.1e-6, False, _CCCL + "5122", _passes(*[_E] * 3)),
    Timing("int32 sum, 2^28 elements", "h200", "pass", 249.3e-6, False, _CCCL + "9722", _passes(64 * _E, launches=2)),
    Timing("int32 sum, 2^24 elements", "h200", "pass", 25.73e-6, False, _CCCL + "9722", _passes(4 * _E, launches=2)),
    Timing("int32 sum, 2^20 elements", "h200", "pass", 7.126e-6, False, _CCCL + "9722", _passes(_E // 4, launches=2)),
    Timing("float32 add and ReLU in place, 2^30 elements", "h20", "pass", 3.074e-3, True, _GEMS + "5502",
           _passes(*[4 * _G] * 3)),
    Timing("bf16 add and ReLU in place, 2^30 elements", "h20", "pass", 1.687e-3, False, _GEMS + "5502",
           _passes(*[2 * _G] * 3)),
    Timing("float32 ReLU6 in place, 2^30 elements", "h20", "pass", 2.046e-3, False, _GEMS + "6514",
           _passes(*[4 * _G] * 2)),
    Timing("ResNet-50 fp16 inference, batch 256, TensorRT, 17,364 images/s", "a100", "step", 256 / 17364, True,
           "AITemplate's and NVIDIA's published results; page not at hand", _inference(256)),
    Timing("ResNet-50 fp16 inference, batch 256, AITemplate, 15,445 images/s", "a100", "step", 256 / 15445, True,
           "AITemplate's and NVIDIA's published results; page not at hand", _inference(256)),
    Timing("ResNet-50 fp16 inference, batch 32, AITemplate, 13,351 images/s", "a100", "step", 32 / 13351, False,
           "AITemplate's and NVIDIA's published results; page not at hand", _inference(32)),
    Timing("ResNet-50 AMP training, batch 256, PyTorch, 2,470 images/s", "a100", "step", 256 / 2470, False,
           "NVIDIA DeepLearningExamples, PyTorch/Classification/ConvNets/resnet50v1.5",
           _step(256, "cudnn")),
    Timing("ResNet-50 fp16 training, batch 256, PyTorch, 2,790 images/s", "h100-pcie", "step", 256 / 2790, False,
           "NVIDIA NGC 22.10; form factor not stated, PCIe assumed", _step(256, "cudnn")),
)  # fmt: skip


def compiled_seconds(gpu: Gpu, batch: int = 256) -> float:
    """Return the predicted seconds of a training step of ResNet-50 with torch.compile at its best."""
    return _seconds(compiled_works(_stock_step(batch), gpu), gpu)
