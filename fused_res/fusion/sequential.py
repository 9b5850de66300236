"""Convolution, batch norm, ReLU and max pooling in a row inside ``nn.Sequential``: the order is certain."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from fused_res.fusion.adapter import Adapter, Fused, Settings
from fused_res.nn import chain
from fused_res.nn.chain import Refusal, Unit, untouched


class Run(NamedTuple):
    """Neighbours that may be computed together; `units` is empty for norm and ReLU, or a single module."""

    modules: tuple[nn.Module, ...]
    units: tuple[Unit, ...] = ()
    pool: nn.Module | None = None


def runs(modules: tuple[nn.Module, ...]) -> Iterator[Run]:
    """Splits the modules, in their order, into the longest runs."""
    norms = [[kind] for kind in chain.norms]
    kinds = [type(module) if untouched(module.__dict__) else None for module in modules]
    start = 0
    while start < len(kinds):
        units: list[Unit] = []
        stop = start
        while kinds[stop : stop + 1] == [nn.Conv2d] and kinds[stop + 1 : stop + 2] in norms:
            length = 3 if kinds[stop + 2 : stop + 3] == [nn.ReLU] else 2
            units.append(modules[stop : stop + length])
            stop += length
        pool = None
        if units and kinds[stop : stop + 1] == [nn.MaxPool2d] and chain.inspect_pool(modules[stop]) is None:
            pool = modules[stop]
            stop += 1
        if not units:
            stop += 2 if kinds[stop : stop + 2] == [nn.BatchNorm2d, nn.ReLU] else 1
        yield Run(modules[start:stop], tuple(units), pool)
        start = stop


class FusedSequential(Fused):
    def forward(self: Any, input: Tensor) -> Tensor:
        settings = self._fused_res
        if settings is None or chain.situation() is not None:
            return super().forward(input)  # type: ignore[misc]
        for run in runs(tuple(self._modules.values())):
            input = _run(input, run, settings)
        return input


def _run(input: Tensor, run: Run, settings: Settings) -> Tensor:
    output = None
    if run.units:
        output = chain.run(input, run.units, "none", run.pool, *settings)
        if output is None and len(run.units) > 1:
            # One of the units does not fit; the others still may.
            for part in _single_units(run):
                input = _run(input, part, settings)
            return input
    elif len(run.modules) == 2:
        output = chain.run_norm(input, run.modules[0], None, "relu", settings.backend)
    if output is not None:
        return output
    for module in run.modules:
        input = module(input)
    return input


def _single_units(run: Run) -> list[Run]:
    parts = [Run(unit, (unit,)) for unit in run.units]
    if run.pool is not None:
        last = parts.pop()
        parts.append(Run((*last.modules, run.pool), last.units, run.pool))
    return parts


class Sequential(Adapter):
    """Also its subclasses without a forward of their own, such as torchvision's Conv2dNormActivation."""

    home = "torch.nn"
    name = "Sequential"
    reads = (("forward", None), ("__iter__", None))
    front = FusedSequential

    @classmethod
    def refusal(cls, module: Any) -> Refusal | None:
        refusal = None
        for run in _worthwhile(module):
            if not run.units:
                return None
            for part in _single_units(run):
                refusal = chain.refusal_of(part.units, "none", part.pool)
                if refusal is None:
                    return None
        return refusal or Refusal("holds no convolution and norm, or norm and ReLU, in a row")

    @classmethod
    def covered(cls, module: Any) -> tuple[str, ...]:
        inside = {id(child) for run in _worthwhile(module) for child in run.modules}
        return tuple(name for name, child in module._modules.items() if id(child) in inside)


def _worthwhile(module: Any) -> list[Run]:
    return [run for run in runs(tuple(module._modules.values())) if len(run.modules) > 1]
