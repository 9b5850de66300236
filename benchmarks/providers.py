"""The measured providers: fused_res and stock PyTorch in the configurations that users run, with equal weights."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
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
    frozen: bool = False  # inference only
    compiled: bool = False
    channels_last: bool = False
    compile_mode: str | None = None  # `mode` of torch.compile
    cudnn: bool = False  # cuDNN's batch norm, which PyTorch does not select for every dtype
    cuda_graph: bool = False  # the step is captured in a CUDA graph and replayed: no launch overhead
    backend: str = ""  # fused_res backend; empty: that of the option --backend
    runtime: str = ""  # runtime other than PyTorch, see peers.py
    winograd: bool = True
    convolution: str = "planned"  # source of the convolutions, see fused_res.backends.use
    opt_in: bool = False  # measured only if named in --providers

    def settings(self) -> contextlib.AbstractContextManager[None]:
        """Return a context with this provider's settings of fused_res."""
        if self.winograd and self.convolution == "planned":
            return contextlib.nullcontext()
        return backends.use(self.backend or "auto", self.convolution, self.winograd)

    def workload(self, workload: Workload) -> Workload:
        """Return `workload` with every phase under this provider's settings."""
        if self.winograd and self.convolution == "planned":
            return workload

        def under_settings(phase: Callable[[Any], Any]) -> Callable[[Any], Any]:
            def run(value: Any) -> Any:
                with self.settings():
                    return phase(value)

            return run

        return {name: under_settings(phase) for name, phase in workload.items()}

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format


def by_name(*providers: Provider) -> dict[str, Provider]:
    return {provider.name: provider for provider in providers}


def with_graph(provider: Provider) -> Provider:
    return replace(provider, name=f"{provider.name}+graph", cuda_graph=True, opt_in=True)


def _gpu_backends() -> Iterator[Provider]:
    """Yield each GPU backend with the planned convolutions, with ATen's only, and with its own wherever possible."""
    for backend in ("triton", "cuda"):
        for suffix, convolution in (("", "planned"), ("-norms", "aten"), ("-fused", "fused")):
            yield Provider(
                f"ours-{backend}{suffix}", fused=True, channels_last=True, backend=backend, convolution=convolution,
                opt_in=True,
            )  # fmt: skip


PROVIDERS = by_name(
    Provider("ours", fused=True, channels_last=True),
    Provider("ours+compile", fused=True, compiled=True, channels_last=True),
    *_gpu_backends(),
    Provider("eager", channels_last=False),
    Provider("eager-channels-last", channels_last=True),
    # Ablations: fused_res without one of its components.
    Provider("ours-direct", fused=True, channels_last=True, winograd=False, opt_in=True),
    Provider("ours-norms", fused=True, channels_last=True, convolution="aten", opt_in=True),
    Provider("compile", compiled=True),
    Provider("compile-channels-last", compiled=True, channels_last=True),
    Provider("compile-max-autotune", compiled=True, channels_last=True, compile_mode="max-autotune", opt_in=True),
    Provider("compile-reduce-overhead", compiled=True, channels_last=True, compile_mode="reduce-overhead", opt_in=True),
)
#: Providers of single batch norms.
NORM_PROVIDERS = PROVIDERS | {"cudnn": Provider("cudnn", channels_last=True, cudnn=True, opt_in=True)}
#: Providers of full networks; the additional ones need a GPU.
NETWORK_PROVIDERS = PROVIDERS | by_name(
    *(
        with_graph(PROVIDERS[name])
        for name in ("ours", "ours-norms", *(one.name for one in _gpu_backends()), "eager-channels-last")
    )
)
EAGER = PROVIDERS["eager"]
EAGER_CHANNELS_LAST = PROVIDERS["eager-channels-last"]
#: Providers of inference.
INFERENCE_PROVIDERS = by_name(
    Provider("ours", fused=True, frozen=True, channels_last=True),
    Provider("ours-triton", fused=True, frozen=True, channels_last=True, backend="triton", opt_in=True),
    Provider("ours-cuda", fused=True, frozen=True, channels_last=True, backend="cuda", opt_in=True),
    Provider("ours+graph", fused=True, frozen=True, channels_last=True, cuda_graph=True, opt_in=True),
    Provider("ours-direct", fused=True, frozen=True, channels_last=True, winograd=False, opt_in=True),
    Provider("ours-folded", fused=True, frozen=True, channels_last=True, backend="reference", opt_in=True),
    EAGER,
    EAGER_CHANNELS_LAST,
    Provider("eager-channels-last+graph", channels_last=True, cuda_graph=True, opt_in=True),
    Provider("compile-freezing", frozen=True, compiled=True, channels_last=True),
    Provider(
        "compile-max-autotune", frozen=True, compiled=True, channels_last=True, compile_mode="max-autotune", opt_in=True
    ),
    *(Provider(name, runtime=name) for name in peers.NAMES),
)
#: Peers: other providers that optimize a network for inference only.
INFERENCE_PEERS = ("compile-freezing", *peers.NAMES)
#: Peers in training: PyTorch in either memory format.
TRAINING_PEERS = ("eager", "eager-channels-last", "compile", "compile-channels-last")


def stock_batch_norm_act(activation: Literal["relu", "identity"], training: bool, cudnn: bool = False) -> BatchNormAct:
    """Return stock PyTorch's fastest composition: addition and ReLU in place, as in torchvision's blocks.

    Args:
        activation: final activation.
        training: whether to normalize with batch statistics.
        cudnn: whether to call cuDNN's batch norm even where PyTorch would not select it; the call fails for operands
            that cuDNN does not support.
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
    return torch.compile(run, dynamic=False, mode=provider.compile_mode) if provider.compiled else run


def build_module(provider: Provider, stock: nn.Module, backend: str = "auto", recompute: str = "none") -> nn.Module:
    """Return a copy of the stock module in the configuration of the provider."""
    module: Any = copy.deepcopy(stock).to(memory_format=provider.memory_format)
    if provider.fused:
        backend = provider.backend or backend
        module = freeze(module, backend) if provider.frozen else fuse(module, backend=backend, recompute=recompute)
        if not summarize(module).fused:
            raise RuntimeError(f"nothing was fused, stock PyTorch would be measured as fused_res:\n{summarize(module)}")
    if provider.compiled:
        if provider.frozen:  # torch.compile accepts either a mode or options
            options = torch._inductor.list_mode_options(provider.compile_mode) if provider.compile_mode else {}
            module = torch.compile(module, dynamic=False, options={**options, "freezing": True})
        else:
            module = torch.compile(module, dynamic=False, mode=provider.compile_mode)
    return module
