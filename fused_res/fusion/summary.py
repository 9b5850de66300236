"""What was fused, what was left, and why: as data, and as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain as concatenate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_res import functional
from fused_res._torch_compat import NormBase
from fused_res.backends import registry
from fused_res.block.plan import Plan
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

NORMS = (NormBase, nn.GroupNorm, nn.LayerNorm)
_NOT_RUN = "algorithms are selected for the first input"


class Row(NamedTuple):
    """One module of the model."""

    name: str
    kind: str  # its class, the one before fusing
    fused: bool
    why: str  # how it runs fused, or why it does not


@dataclass(frozen=True)
class Summary:
    """All rows, in the model's order; prints as a table that puts equal rows together.

    Attributes:
        plans: what each block ran last, by the name of its first convolution.
    """

    rows: tuple[Row, ...]
    plans: Mapping[str, Plan] = field(default_factory=dict, compare=False)

    @property
    def steps(self) -> str:
        """Every step of these plans: forward, what is saved, backward."""
        return "\n\n".join(f"{name}\n{plan}" for name, plan in self.plans.items())

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
    convolutions they name the algorithms that ran last; those are selected for each size of input.

    Args:
        model: any module, fused, frozen or stock.

    Returns:
        A :class:`fused_res.fusion.Summary`; its ``steps`` print every step that the blocks ran last.

    Raises:
        TypeError: `model` is no module.
    """
    rows = tuple(_rows(model))
    weights = {name: getattr(module, "weight", None) for name, module in model.named_modules()}
    ran = {name: functional.last_plan.get(one) for name, one in weights.items() if isinstance(one, Tensor)}
    return Summary(rows, {name: plan for name, plan in ran.items() if plan is not None})


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
                name, parents[name], False, f"what surrounds it in {parents.get(parent, 'the model')} is not known"
            )


def _frozen_in_pieces(module: nn.Module, adapter: Any) -> bool:
    """Whether this is a block that :func:`fused_res.freeze` left, with frozen layers in it."""
    if adapter is None or not issubclass(adapter, BlockAdapter) or "_fused_res_left" not in module.__dict__:
        return False
    return any(isinstance(child, Frozen) for child in module.children())


def _frozen_row(name: str, module: Frozen) -> Row:
    layers = [(name, child) for name, child in module.named_modules() if isinstance(child, FrozenConv)]
    ran = [f"{name} {child.kernel}".strip() for name, child in layers if child.kernel is not None]
    how = "; ".join(ran) or _NOT_RUN
    return Row(name, module.origin, True, f"frozen, backend={_backend(module, module.backend)}, {how}")


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
    parts.append("; ".join(_ran(_chains_of(module))))
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


def _ran(chains: list[Parts]) -> list[str]:
    """The algorithms that ran last, each with the kernel sizes that it was selected for."""
    sizes: dict[str, list[str]] = {}
    for chained in chains:
        weight = chained.units[0][0].weight if chained.units else None
        plan = functional.last_plan.get(weight) if isinstance(weight, Tensor) else None
        for unit in plan.all_units if plan is not None else ():
            found = sizes.setdefault(str(unit.algorithms), [])
            size = "x".join(map(str, unit.problem.weight[2:]))
            found += [] if size in found else [size]
    made = [f"{', '.join(found)} {algorithms}" for algorithms, found in sizes.items()]
    return made or ([_NOT_RUN] if chains else [])


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
