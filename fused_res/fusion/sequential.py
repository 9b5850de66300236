"""Convolution, batch norm, ReLU and max pooling in a row inside ``nn.Sequential``: the order is certain."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fused_res.fusion import runs
from fused_res.fusion.adapter import Adapter, Fused
from fused_res.nn import chain
from fused_res.nn.chain import Unsupported


class FusedSequential(Fused):
    def forward(self: Any, input: Tensor) -> Tensor:
        settings = self._fused_res
        if settings is None or chain.unsupported_context() is not None:
            return super().forward(input)  # type: ignore[misc]
        return runs.run(input, tuple(self._modules.values()), settings)


class Sequential(Adapter):
    """Also its subclasses without a forward of their own, such as torchvision's Conv2dNormActivation."""

    home = "torch.nn"
    name = "Sequential"
    reads = (("forward", None), ("__iter__", None))
    front = FusedSequential

    @classmethod
    def unsupported_reason(cls, module: Any) -> Unsupported | None:
        return runs.find_unsupported(tuple(module._modules.values()))

    @classmethod
    def fused_children(cls, module: Any) -> tuple[str, ...]:
        inside = {id(child) for run in runs.worthwhile(tuple(module._modules.values())) for child in run.modules}
        return tuple(name for name, child in module._modules.items() if id(child) in inside)
