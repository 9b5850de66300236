"""Steps of blocks and of full models: workloads to time, and results to compare."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import Mode
from benchmarks.check import Results
from benchmarks.timing import Workload

LEARNING_RATE = 1e-3
MOMENTUM = 0.9


def named_tensors(module: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
    """Return parameters and floating-point buffers by name; of a compiled module, under the original names."""
    module = getattr(module, "_orig_mod", module)
    buffers = {name: buffer for name, buffer in module.named_buffers() if buffer.is_floating_point()}
    return dict(module.named_parameters()), buffers


def calibrate_batch_norm(model: nn.Module, x: Tensor) -> None:
    """Set the running statistics of all batch norms to the statistics of `x`.

    Otherwise a newly initialized network does not normalize in eval mode, and its activations grow from block to block.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        # Batch statistics require more than one value per channel, and a single small image has one in the last stage.
        model.train()(x if len(x) > 1 else torch.cat([x, x.flip(3)]))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which a float32 module computes in `dtype`: autocast for bfloat16 and float16, else none."""
    if dtype not in (torch.bfloat16, torch.float16):
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def capture_cuda_graph(call: Callable[[], Tensor]) -> Callable[[Any], Tensor]:
    """Capture `call` in a CUDA graph and return its replay, which writes to the same output tensor each time."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # algorithms are selected and kernels compiled before the capture
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()

    def replay(_: Any) -> Tensor:
        graph.replay()
        return output

    return replay


class BlockStep:
    """Forward and, in training, the gradients of the input and of every parameter, for a given output gradient."""

    def __init__(self, module: nn.Module, x: Tensor, grad_output: Tensor, mode: Mode) -> None:
        self.module = module.train(mode == "train")
        self.x = x.requires_grad_(mode == "train")
        self.grad_output = grad_output
        self.mode = mode
        self.parameters, self.buffers = named_tensors(module)

    def forward(self, _: Any = None) -> Tensor:
        with autocast(self.x.device, self.x.dtype):
            return self.module(self.x)

    def infer(self, _: Any = None) -> Tensor:
        with torch.no_grad():
            return self.forward()

    def backward(self, output: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, [self.x, *self.parameters.values()], self.grad_output)

    def results(self) -> Results:
        if self.mode == "eval":
            return {"output": self.infer()}
        output = self.forward()
        grads = self.backward(output)
        names = ["grad of input", *(f"grad of {name}" for name in self.parameters)]
        buffers = {name: buffer.clone() for name, buffer in self.buffers.items()}
        return {"output": output.detach(), **dict(zip(names, grads, strict=True)), **buffers}

    def workload(self) -> Workload:
        if self.mode == "eval":
            return {"forward": self.infer}
        return {"forward": self.forward, "backward": self.backward}


@dataclass(eq=False)
class ModelStep:
    """A training step (cross entropy, backward, SGD with momentum, zero_grad) or an inference of a full model.

    bfloat16 and float16 run under autocast; float16 without loss scaling, which would not change the time.
    """

    module: nn.Module
    x: Tensor
    target: Tensor
    mode: Mode
    dtype: torch.dtype = torch.float32
    cuda_graph: bool = False

    def __post_init__(self) -> None:
        self.module.train(self.mode == "train")
        self.parameters, self.buffers = named_tensors(self.module)
        self.optimizer = torch.optim.SGD(self.parameters.values(), LEARNING_RATE, MOMENTUM)

    def infer(self, _: Any = None) -> Tensor:
        with torch.no_grad(), autocast(self.x.device, self.dtype):
            return self.module(self.x)

    def forward(self, _: Any = None) -> Tensor:
        with autocast(self.x.device, self.dtype):
            return F.cross_entropy(self.module(self.x), self.target)

    def update(self, _: Any = None) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def results(self) -> Results:
        if self.mode == "eval":
            (infer,) = self.workload().values()
            return {"output": infer(None)}
        loss = self.forward()
        loss.backward()
        grads = {f"grad of {name}": parameter.grad for name, parameter in self.parameters.items()}
        buffers = {name: buffer.clone() for name, buffer in self.buffers.items()}
        self.optimizer.zero_grad()
        return {"loss": loss.detach(), **grads, **buffers}

    def step(self) -> Tensor:
        """Run a full training step; replays of a captured step write to the same gradient tensors."""
        self.optimizer.zero_grad()
        loss = self.forward()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def workload(self) -> Workload:
        if self.cuda_graph:
            return {"graph": capture_cuda_graph(self.infer if self.mode == "eval" else self.step)}
        if self.mode == "eval":
            return {"forward": self.infer}
        # The backward phase drops the loss, so freeing the autograd graph is part of its time.
        return {"forward": self.forward, "backward": Tensor.backward, "optimizer": self.update}
