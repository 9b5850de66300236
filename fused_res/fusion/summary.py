"""What was fused, what was left, and why: as data, and as a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain as concatenate
from typing import Any, NamedTuple

import torch
from torch import nn

from fused_res import tune
from fused_res.backends import registry
from fused_res.choice import Choice, choose_inference, describe
from fused_res.fusion import runs
from fused_res.fusion.adapter import BlockAdapter, Fused, Parts, StemAdapter, base_of
from fused_res.fusion.convert import CLOSED, candidates
from fused_res.fusion.runs import Settings
from fused_res.fusion.sequential import Sequential
from fused_res.models.network import ResidualNetwork
from fused_res.nn import ConvBNAct2d, ResidualBlock, chain
from fused_res.nn.chain import Refusal
from fused_res.nn.configured import Configured
from fused_res.nn.frozen import Frozen, FrozenConv
from fused_res.plan import static_choices

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


class Row(NamedTuple):
    """One module of the model."""

    name: str
    kind: str  # its class, the one before fusing
    fused: bool
    why: str  # how it runs fused, or why it does not


@dataclass(frozen=True)
class Summary:
    """All rows, in the model's order; prints as a table that puts equal rows together."""

    rows: tuple[Row, ...]

    @property
    def fused(self) -> tuple[Row, ...]:
        """The rows of what runs fused."""
        return tuple(row for row in self.rows if row.fused)

    @property
    def left(self) -> tuple[Row, ...]:
        """All other rows."""
        return tuple(row for row in self.rows if not row.fused)

    def __str__(self) -> str:
        groups: dict[tuple[bool, str, str], list[str]] = {}
        for row in self.rows:
            groups.setdefault((row.fused, row.kind, row.why), []).append(row.name or "(model)")
        lines = [("", "count", "module", "where", "how, or why not")]
        for (fused, kind, why), names in sorted(groups.items(), key=lambda item: not item[0][0]):
            where = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"
            lines.append(("fused" if fused else "left", str(len(names)), kind, where, why))
        widths = [max(len(line[column]) for line in lines) for column in range(4)]
        table = [
            "  ".join((*(cell.ljust(width) for cell, width in zip(line[:4], widths, strict=True)), line[4])).rstrip()
            for line in lines
        ]
        return "\n".join((*table, f"{len(self.fused)} fused, {len(self.left)} left"))


def summarize(model: nn.Module) -> Summary:
    """What of `model` runs fused at present, what does not, and why; ``print`` it for a table.

    Rows are the modules that :func:`fused_res.fuse` knows, those of :mod:`fused_res.nn`, and all other norms. For
    convolutions they say who computes them, where that does not depend on the batch, or who did last.

    Args:
        model: any module, fused, frozen or stock.

    Returns:
        A :class:`fused_res.fusion.Summary`.

    Raises:
        TypeError: `model` is no module.
    """
    return Summary(tuple(_rows(model)))


def _rows(model: nn.Module) -> Iterator[Row]:
    parents: dict[str, str] = {}
    left: set[str] = set()
    frozen: set[str] = set()
    for name, module, adapter, refusal in candidates(model):
        parent = name.rpartition(".")[0]
        kind = type(module)
        parents[name] = (base_of(kind) or kind).__name__
        if parent in frozen:
            continue
        if isinstance(module, Frozen):
            frozen.add(name)
            yield _frozen_row(name, module)
        elif _frozen_in_pieces(module, adapter):
            frozen.add(name)
            why = _reason(module, module.__dict__["_fused_res_left"])
            yield Row(name, parents[name], True, f"frozen in pieces: {why}")
        elif refusal is not None and isinstance(refusal.module, Frozen):
            if isinstance(module, Configured):  # what it covers is not visited; of others the stem is a row below
                yield _frozen_row(f"{name}.conv1" if name else "conv1", refusal.module)
        elif isinstance(module, Fused | Configured):
            why = _reason(module, refusal)
            if why is None:
                why = None if _switched_on(module) else "switched off"
            yield Row(name, parents[name], why is None, why or _settings(module))
        elif isinstance(module, CLOSED):
            yield Row(name, parents[name], False, refusal.why if refusal else "")
        elif adapter is Sequential and refusal is not None and refusal.module is None:
            continue  # a Sequential of other things
        elif adapter is not None:
            left.add(name)
            refusal = refusal or module.__dict__.get("_fused_res_left")
            yield Row(name, parents[name], False, _reason(module, refusal) or "not fused as yet")
        elif isinstance(module, NORMS) and parent not in left:
            yield Row(
                name,
                parents[name],
                False,
                f"what surrounds it in {parents.get(parent, 'the model')} is not known",
            )


def _frozen_in_pieces(module: nn.Module, adapter: Any) -> bool:
    """Whether this is a block that :func:`fused_res.freeze` left, with frozen layers in it."""
    if adapter is None or not issubclass(adapter, BlockAdapter) or "_fused_res_left" not in module.__dict__:
        return False
    return any(isinstance(child, Frozen) for child in module.children())


def _frozen_row(name: str, module: Frozen) -> Row:
    backend = _backend(module, module.backend)
    how = f"frozen, backend={backend}"
    if backend in ("triton", "cuda"):
        how += ", " + describe([_frozen_choice(child) for child in module.modules() if isinstance(child, FrozenConv)])
    elif backend == "cpu":
        layers = [(name, child) for name, child in module.named_modules() if isinstance(child, FrozenConv)]
        chosen = [f"{name} {child.kernel} ({child.kernel.reason})".strip() for name, child in layers if child.kernel]
        how += ", " + ("; ".join(chosen) or "kernels are chosen for the first input")
    return Row(name, module.origin, True, how)


def _frozen_choice(module: FrozenConv) -> tuple[tuple[int, ...], Choice]:
    shape, spec, preference = tuple(module.weight.shape), module.spec, registry.convolution(module.backend)
    return shape, choose_inference(shape, spec.padding, spec.groups, module.weight.dtype, True, preference)


def _switched_on(module: Fused | Configured) -> bool:
    return module.fused if isinstance(module, Configured) else module._fused_res is not None


def _settings(module: Fused | Configured) -> str:
    assert isinstance(module, nn.Module)
    if isinstance(module, Configured):
        settings = Settings(module.backend, module.recompute, module.tune)
    else:
        settings = module._fused_res or Settings()
    backend = _backend(module, settings.backend)
    parts = [f"backend={backend}", f"recompute={settings.recompute}", "tune=True" * settings.tune]
    preference = registry.convolution(settings.backend)
    pairs = [pair for units, shortcut in _chains_of(module) for pair in _choices(units, shortcut, backend, preference)]
    parts.append(describe(pairs))
    adapter: Any = module._fused_res_adapter if isinstance(module, Fused) else None
    if adapter is not None and issubclass(adapter, BlockAdapter) and (hindrance := adapter.hindrance(module)):
        parts.append(f"in pieces: {_reason(module, hindrance)}")
    return ", ".join(filter(None, parts))


def _chains_of(module: Any) -> list[Parts]:
    """What a fused module runs as one block each."""
    if isinstance(module, ResidualBlock):
        units, shortcut = module._parts()
        return [Parts(tuple(units), shortcut)]
    if isinstance(module, ConvBNAct2d):
        return [Parts(tuple(module._units()))]
    if isinstance(module, ResidualNetwork):
        return [Parts(tuple(module._stem_units()))]
    if not isinstance(module, Fused):
        return []
    fused: Any = module
    adapter = fused._fused_res_adapter
    if issubclass(adapter, BlockAdapter):
        parts, pieces = adapter.parts(fused), adapter.pieces(fused)
        if isinstance(parts, Parts) and chain.refusal_of(*parts) is None:
            return [parts]
        return [] if pieces is None else [Parts(run.units) for run in runs.split(pieces.branch) if run.units]
    if issubclass(adapter, StemAdapter):
        stem = adapter.units(fused)
        return [] if isinstance(stem, Refusal) else [Parts(stem)]
    return [Parts(run.units) for run in runs.split(tuple(fused._modules.values())) if run.units]


def _choices(units: Any, shortcut: Any, backend: str, preference: str) -> Iterator[tuple[tuple[int, ...], Choice]]:
    """The static choice for each convolution, in channels_last memory and the parameters' dtype."""
    read = chain.read(units, shortcut)
    if isinstance(read, Refusal):
        return
    weights = [weight.shape for weight in read.tensors[::6] if weight is not None]
    dtype = read.tensors[0].dtype if read.tensors[0] is not None else torch.float32
    static = static_choices(read.spec, weights, dtype, True, backend, preference)
    measured = tune.measured(backend)
    for unit, weight, choice in zip(read.spec.convolutions, weights, static, strict=True):
        yield tuple(weight), measured.get((unit, tuple(weight)), choice)


def _backend(module: nn.Module, backend: str) -> str:
    tensors = concatenate(module.parameters(), module.buffers())
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    return registry.resolve(backend, device).name


def _reason(module: nn.Module | Fused, refusal: Refusal | None) -> str | None:
    if refusal is None or refusal.module is None:
        return refusal and refusal.why
    assert isinstance(module, nn.Module)
    names = [name for name, child in module.named_modules(remove_duplicate=False) if child is refusal.module]
    return f"{names[0] if names else 'a child'} {refusal.why}"
