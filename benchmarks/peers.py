"""Inference runtimes beside PyTorch, on the CPU in float32: each gets the stock model, as many threads as PyTorch has,
and memory for its input and output in place."""

import argparse
import importlib.util
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: Each with the packages that it takes.
PACKAGES = {"openvino": ("openvino",), "onnxruntime": ("onnxruntime", "onnx")}
NAMES = tuple(PACKAGES)


def unavailable(name: str, options: argparse.Namespace) -> str | None:
    """Why it cannot be measured here, if so."""
    missing = [package for package in PACKAGES[name] if importlib.util.find_spec(package) is None]
    if missing:
        return f"not installed (pip install {' '.join(missing)})"
    if options.device != "cpu" or options.dtype not in (None, "float32"):
        return "it is measured on a CPU in float32"
    if name == "onnxruntime" and options.isa == "avx2":
        return "nothing holds its kernels to AVX2"  # MLAS asks the processor alone
    return None


@dataclass(frozen=True)
class Network:
    """Computes `output` from `x`, in place of both."""

    x: Tensor  # the runtimes keep an address, not the tensor
    output: Tensor
    infer: Callable[[], Any]

    def __call__(self) -> Tensor:
        self.infer()
        return self.output


def build(name: str, stock: nn.Module, x: Tensor) -> Network:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing
        return {"openvino": openvino, "onnxruntime": onnxruntime}[name](stock, x)


def openvino(stock: nn.Module, x: Tensor) -> Network:
    import openvino

    model = openvino.convert_model(stock, example_input=x, input=list(x.shape))
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    output = torch.empty(list(compiled.output(0).shape))
    request = compiled.create_infer_request()
    request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))
    request.set_output_tensor(openvino.Tensor(output.numpy(), shared_memory=True))
    return Network(x, output, request.infer)


def onnxruntime(stock: nn.Module, x: Tensor) -> Network:
    import onnxruntime

    # By tracing: in half the time of the other exporter, which takes onnxscript, too; either network is as fast.
    file = io.BytesIO()
    torch.onnx.export(stock, (x,), file, dynamo=False, input_names=["x"], output_names=["y"])
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file.getvalue(), settings, providers=["CPUExecutionProvider"])
    output = torch.empty(session.get_outputs()[0].shape)
    binding = session.io_binding()
    binding.bind_cpu_input("x", x.numpy())
    binding.bind_output("y", "cpu", 0, "float32", list(output.shape), output.data_ptr())
    return Network(x, output, lambda: session.run_with_iobinding(binding))
