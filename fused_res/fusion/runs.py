"""Modules that run one after the other: neighbors that can be one fused call, and the others by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from fused_res.nn import chain
from fused_res.nn.chain import Unit, Unsupported, has_no_hooks


class Settings(NamedTuple):
    """How a fused module runs; see :func:`fused_res.functional.residual_block`."""

    backend: str = "auto"
    recompute: str = "none"
    tune: bool = False


class Run(NamedTuple):
    """Neighbors that may be computed together; `units` is empty for norm and ReLU, or a single module."""

    modules: tuple[nn.Module, ...]
    units: tuple[Unit, ...] = ()
    pool: nn.Module | None = None


def split(modules: tuple[nn.Module, ...]) -> Iterator[Run]:
    """The modules, in their order, as the longest runs."""
    norms = [[kind] for kind in chain.norm_types]
    kinds = [type(module) if has_no_hooks(module.__dict__) else None for module in modules]
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


def run(input: Tensor, modules: tuple[nn.Module, ...], settings: Settings) -> Tensor:
    """What the modules, called one after the other, would give."""
    for part in split(modules):
        input = _run(input, part, settings)
    return input


def _run(input: Tensor, run: Run, settings: Settings) -> Tensor:
    output = None
    if run.units:
        output = chain.run_fused(input, run.units, "none", run.pool, *settings)
        if output is None and len(run.units) > 1:
            # One of the units does not fit; the others still may.
            for part in _single_units(run):
                input = _run(input, part, settings)
            return input
    elif len(run.modules) == 2:
        output = chain.run_fused_norm(input, run.modules[0], None, "relu", settings.backend)
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


def worthwhile(modules: tuple[nn.Module, ...]) -> list[Run]:
    return [run for run in split(modules) if len(run.modules) > 1]


def find_unsupported(modules: tuple[nn.Module, ...]) -> Unsupported | None:
    """None if any of these would run fused, as far as that can be told without an input."""
    refusal = None
    for run in worthwhile(modules):
        if not run.units:
            return None
        for part in _single_units(run):
            refusal = chain.find_unsupported(part.units, "none", part.pool)
            if refusal is None:
                return None
    return refusal or Unsupported("holds no convolution and norm, or norm and ReLU, in a row")
