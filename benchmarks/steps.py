"""One step of a module, as a workload to time and as results to compare: for blocks and for whole models."""

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


def named(module: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
    """Parameters and floating buffers; a compiled module's under their own names."""
    module = getattr(module, "_orig_mod", module)
    buffers = {name: buffer for name, buffer in module.named_buffers() if buffer.is_floating_point()}
    return dict(module.named_parameters()), buffers


def calibrate(model: nn.Module, x: Tensor) -> None:
    """Sets the running statistics to those of `x`: without that, a fresh network in eval mode normalises
    nothing and its activations grow from block to block."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        # Statistics need more than one value a channel, which a single small image does not give in the last
        # stage.
        model.train()(x if len(x) > 1 else torch.cat([x, x.flip(3)]))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Under which a float32 module computes in `dtype`, if that is less."""
    if dtype not in (torch.bfloat16, torch.float16):
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def recorded(call: Callable[[], Tensor]) -> Callable[[Any], Tensor]:
    """Replays what `call` launches on the GPU; the output is the same tensor each time."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # algorithms are chosen and kernels compiled before the recording
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
    """Forward and, in training, the gradients of the input and of every parameter for a given output
    gradient."""

    def __init__(self, module: nn.Module, x: Tensor, grad_output: Tensor, mode: Mode) -> None:
        self.module = module.train(mode == "train")
        self.x = x.requires_grad_(mode == "train")
        self.grad_output = grad_output
        self.mode = mode
        self.parameters, self.buffers = named(module)

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
    """A training step (cross entropy, backward, SGD with momentum, zero_grad) or an inference of a whole
    model; in less than float32 under autocast. (No loss scaling for float16: it changes no time.)"""

    module: nn.Module
    x: Tensor
    target: Tensor
    mode: Mode
    dtype: torch.dtype = torch.float32
    graph: bool = False

    def __post_init__(self) -> None:
        self.module.train(self.mode == "train")
        self.parameters, self.buffers = named(self.module)
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
        """All of it; a recorded one writes the same gradients each time it is replayed."""
        self.optimizer.zero_grad()
        loss = self.forward()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def workload(self) -> Workload:
        if self.graph:
            return {"graph": recorded(self.infer if self.mode == "eval" else self.step)}
        if self.mode == "eval":
            return {"forward": self.infer}
        # The loss is the only thing that leaves backward; freeing the graph is part of it.
        return {"forward": self.forward, "backward": Tensor.backward, "optimizer": self.update}
