"""Who is measured: our operators and stock PyTorch, each in the ways a user would run it, all from the same
weights."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.timing import Workload
from fused_res import backends, freeze, fuse, summarize
from fused_res.functional import batch_norm_act

# (input, running_mean, running_var, weight, bias, residual) -> output
BatchNormAct = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Provider:
    name: str
    fused: bool = False
    frozen: bool = False  # for inference only
    compiled: bool = False
    channels_last: bool = False
    mode: str | None = None  # of torch.compile
    cudnn: bool = False  # its batch norm, which PyTorch does not choose for every dtype
    graph: bool = False  # a step recorded once and replayed: without the cost of calling
    backend: str = ""  # of ours; else the one that --backend says
    runtime: str = ""  # another one than PyTorch, see peers.py
    winograd: bool = True
    convolution: str = "auto"  # who computes them, see fused_res.backends.use
    on_request: bool = False  # takes long, or is for one way of running only

    def workload(self, workload: Workload) -> Workload:
        """The same under this provider's settings."""
        if self.winograd and self.convolution == "auto":
            return workload

        def under_settings(phase: Callable[[Any], Any]) -> Callable[[Any], Any]:
            def run(value: Any) -> Any:
                with backends.use("auto", self.convolution, self.winograd):
                    return phase(value)

            return run

        return {name: under_settings(phase) for name, phase in workload.items()}

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format


def by_name(*providers: Provider) -> dict[str, Provider]:
    return {provider.name: provider for provider in providers}


PROVIDERS = by_name(
    Provider("ours", fused=True, channels_last=True),
    Provider("ours+compile", fused=True, compiled=True, channels_last=True),
    Provider("ours-triton", fused=True, channels_last=True, backend="triton", on_request=True),
    Provider("ours-cuda", fused=True, channels_last=True, backend="cuda", on_request=True),
    Provider("eager", channels_last=False),
    Provider("eager-channels-last", channels_last=True),
    # What each of our parts is worth, by leaving it out.
    Provider("ours-direct", fused=True, channels_last=True, winograd=False, on_request=True),
    Provider("ours-norms", fused=True, channels_last=True, convolution="aten", on_request=True),
    Provider("compile", compiled=True),
    Provider("compile-channels-last", compiled=True, channels_last=True),
    Provider("compile-max-autotune", compiled=True, channels_last=True, mode="max-autotune", on_request=True),
)
#: For a single norm.
NORMS = PROVIDERS | {"cudnn": Provider("cudnn", channels_last=True, cudnn=True, on_request=True)}
#: For whole networks on a GPU.
GRAPHS = PROVIDERS | by_name(
    Provider("ours+graph", fused=True, channels_last=True, graph=True, on_request=True),
    Provider("eager-channels-last+graph", channels_last=True, graph=True, on_request=True),
)
EAGER = PROVIDERS["eager"]
EAGER_CHANNELS_LAST = PROVIDERS["eager-channels-last"]
#: For networks that are not trained any more.
INFERENCE = by_name(
    Provider("ours", fused=True, frozen=True, channels_last=True),
    Provider("ours-triton", fused=True, frozen=True, channels_last=True, backend="triton", on_request=True),
    Provider("ours-cuda", fused=True, frozen=True, channels_last=True, backend="cuda", on_request=True),
    Provider("ours+graph", fused=True, frozen=True, channels_last=True, graph=True, on_request=True),
    Provider("ours-direct", fused=True, frozen=True, channels_last=True, winograd=False, on_request=True),
    Provider("ours-folded", fused=True, frozen=True, channels_last=True, backend="reference", on_request=True),
    EAGER,
    EAGER_CHANNELS_LAST,
    Provider("eager-channels-last+graph", channels_last=True, graph=True, on_request=True),
    Provider("compile-freezing", frozen=True, compiled=True, channels_last=True),
    Provider(
        "compile-max-autotune", frozen=True, compiled=True, channels_last=True, mode="max-autotune", on_request=True
    ),
    *(Provider(name, runtime=name) for name in peers.NAMES),
)
#: Who infers networks that are not trained any more, as we do.
PEERS = ("compile-freezing", *peers.NAMES)


def stock_batch_norm_act(activation: Literal["relu", "identity"], training: bool, cudnn: bool = False) -> BatchNormAct:
    """Stock PyTorch at its best: the addition and the ReLU in place, as in torchvision's blocks.

    ``cudnn``: cuDNN's norm whether or not PyTorch would choose it; fails where it does not apply.
    """

    def run(
        input: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None
    ) -> Tensor:
        if cudnn:
            output = torch.cudnn_batch_norm(input, weight, bias, running_mean, running_var, training, 0.1, 1e-5)[0]
        else:
            output = F.batch_norm(input, running_mean, running_var, weight, bias, training)
        if residual is not None:
            output += residual
        return F.relu_(output) if activation == "relu" else output

    return run


def build_batch_norm_act(
    provider: Provider, activation: Literal["relu", "identity"], training: bool, backend: str
) -> BatchNormAct:
    def ours(*tensors: Tensor | None) -> Tensor:
        return batch_norm_act(*tensors, training, activation=activation, backend=provider.backend or backend)

    run = ours if provider.fused else stock_batch_norm_act(activation, training, provider.cudnn)
    return torch.compile(run, dynamic=False, mode=provider.mode) if provider.compiled else run


def build_module(provider: Provider, stock: nn.Module, backend: str = "auto", recompute: str = "none") -> nn.Module:
    """A copy of the stock module, run the provider's way."""
    module: Any = copy.deepcopy(stock).to(memory_format=provider.memory_format)
    if provider.fused:
        backend = provider.backend or backend
        module = freeze(module, backend) if provider.frozen else fuse(module, backend=backend, recompute=recompute)
        if not summarize(module).fused:
            raise RuntimeError(f"nothing was fused, stock would be measured as ours:\n{summarize(module)}")
    if provider.compiled:
        if provider.frozen:  # takes either a mode or options
            options = torch._inductor.list_mode_options(provider.mode) if provider.mode else {}
            module = torch.compile(module, dynamic=False, options={**options, "freezing": True})
        else:
            module = torch.compile(module, dynamic=False, mode=provider.mode)
    return module
