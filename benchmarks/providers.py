"""Who is measured: our operators and stock PyTorch, each in the ways a user would run it, all from the same
weights."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_res import fuse, summarize
from fused_res.functional import batch_norm_act

# (input, running_mean, running_var, weight, bias, residual) -> output
BatchNormAct = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Provider:
    name: str
    fused: bool = False
    compiled: bool = False
    channels_last: bool = False

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("ours", fused=True, channels_last=True),
        Provider("ours+compile", fused=True, compiled=True, channels_last=True),
        Provider("eager", channels_last=False),
        Provider("eager-channels-last", channels_last=True),
        Provider("compile", compiled=True),
        Provider("compile-channels-last", compiled=True, channels_last=True),
    )
}
EAGER = PROVIDERS["eager"]
EAGER_CHANNELS_LAST = PROVIDERS["eager-channels-last"]


def stock_batch_norm_act(activation: Literal["relu", "identity"], training: bool) -> BatchNormAct:
    """Stock PyTorch at its best: the addition and the ReLU in place, as in torchvision's blocks."""

    def run(
        input: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
    ) -> Tensor:
        output = F.batch_norm(input, running_mean, running_var, weight, bias, training)
        if residual is not None:
            output += residual
        return F.relu_(output) if activation == "relu" else output

    return run


def build_batch_norm_act(
    provider: Provider, activation: Literal["relu", "identity"], training: bool, backend: str
) -> BatchNormAct:
    def ours(
        input: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
    ) -> Tensor:
        return batch_norm_act(
            input,
            running_mean,
            running_var,
            weight,
            bias,
            residual,
            training,
            activation=activation,
            backend=backend,
        )

    run = ours if provider.fused else stock_batch_norm_act(activation, training)
    return torch.compile(run, dynamic=False) if provider.compiled else run


def build_module(provider: Provider, stock: nn.Module, backend: str = "auto", recompute: str = "none") -> nn.Module:
    """A copy of the stock module, run the provider's way."""
    module: Any = copy.deepcopy(stock).to(memory_format=provider.memory_format)
    if provider.fused:
        fuse(module, backend=backend, recompute=recompute)
        if not summarize(module).fused:
            raise RuntimeError(f"nothing was fused, stock would be measured as ours:\n{summarize(module)}")
    if provider.compiled:
        module = torch.compile(module, dynamic=False)
    return module
