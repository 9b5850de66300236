"""Other inference runtimes (OpenVINO, ONNX Runtime) on the CPU.

Each runtime gets the stock model and as many threads as PyTorch, and reads its input and writes its output in place. In
bfloat16 OpenVINO gets the float32 model and float32 images, as its users do, and computes in bfloat16 itself.
"""

import argparse
import importlib.util
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: The packages that each runtime requires.
PACKAGES = {"openvino": ("openvino",), "onnxruntime": ("onnxruntime", "onnx")}
NAMES = tuple(PACKAGES)
#: Runtimes with bfloat16 kernels on a CPU. ONNX Runtime's MLAS has float32 convolutions only.
BFLOAT16 = {"openvino": ("bfloat16",)}


def unavailable(name: str, options: argparse.Namespace) -> str | None:
    """Return why the runtime cannot be measured here, or None if it can."""
    missing = [package for package in PACKAGES[name] if importlib.util.find_spec(package) is None]
    if missing:
        return f"not installed (pip install {' '.join(missing)})"
    if options.device != "cpu":
        return "only measured on a CPU"
    if options.dtype not in (None, "float32", *BFLOAT16.get(name, ())):
        return f"no CPU kernels for {options.dtype}"
    if name == "onnxruntime" and options.isa == "avx2":
        return "its kernels cannot be restricted to AVX2"  # MLAS only uses the ISA that it detects
    return None


@dataclass(frozen=True)
class PeerModel:
    """A compiled model that reads `x` and writes `output` in place."""

    x: Tensor  # referenced here because the runtimes store only its address
    output: Tensor
    infer: Callable[[], Any]

    def __call__(self) -> Tensor:
        self.infer()
        return self.output


def build(name: str, stock: nn.Module, x: Tensor, dtype: torch.dtype = torch.float32) -> PeerModel:
    """Compile a model with a runtime.

    Args:
        name: name of the runtime.
        stock: float32 model.
        x: float32 input.
        dtype: dtype to compute in, one that `unavailable` accepts.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of the tracer
        return openvino(stock, x, dtype) if name == "openvino" else onnxruntime(stock, x)


def openvino(stock: nn.Module, x: Tensor, dtype: torch.dtype) -> PeerModel:
    import openvino

    model = openvino.convert_model(stock, example_input=x, input=list(x.shape))
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype],
    }
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    output = torch.empty(list(compiled.output(0).shape))
    request = compiled.create_infer_request()
    request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))
    request.set_output_tensor(openvino.Tensor(output.numpy(), shared_memory=True))
    return PeerModel(x, output, request.infer)


def onnxruntime(stock: nn.Module, x: Tensor) -> PeerModel:
    import onnxruntime

    # The tracing exporter takes half the time of the dynamo exporter, which also requires onnxscript. The exported
    # networks are equally fast.
    file = io.BytesIO()
    torch.onnx.export(stock, (x,), file, dynamo=False, input_names=["x"], output_names=["y"])
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file.getvalue(), settings, providers=["CPUExecutionProvider"])
    output = torch.empty(session.get_outputs()[0].shape)
    binding = session.io_binding()
    binding.bind_cpu_input("x", x.numpy())
    binding.bind_output("y", "cpu", 0, "float32", list(output.shape), output.data_ptr())
    return PeerModel(x, output, lambda: session.run_with_iobinding(binding))
