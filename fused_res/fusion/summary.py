"""``summarize``: which modules run fused, which do not, and why, as data and as a table."""

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
from fused_res.nn.chain import Unsupported
from fused_res.nn.frozen import FrozenConv, FrozenModule
from fused_res.nn.fusable_module import FusableModule

NORMS = (NormBase, nn.GroupNorm, nn.LayerNorm)
_NOT_RUN = "algorithms are selected for the first input"


class Row(NamedTuple):
    """One module of a summarized model.

    Args:
        name: qualified name of the module.
        kind: name of its class before fusing.
        fused: whether it runs fused.
        why: how it runs fused, or the reason why it does not.
    """

    name: str
    kind: str
    fused: bool
    why: str


@dataclass(frozen=True)
class Summary:
    """The result of :func:`fused_res.summarize`; prints as a table that groups equal rows.

    Args:
        rows: all rows, in the model's order.
        plans: the plan that each block ran last, by the name of its first convolution.
    """

    rows: tuple[Row, ...]
    plans: Mapping[str, Plan] = field(default_factory=dict, compare=False)

    @property
    def steps(self) -> str:
        """All steps of :attr:`plans` as text: forward, saved tensors, backward."""
        return "\n\n".join(f"{name}\n{plan}" for name, plan in self.plans.items())

    @property
    def fused(self) -> tuple[Row, ...]:
        """The rows of fused modules."""
        return tuple(row for row in self.rows if row.fused)

    @property
    def left(self) -> tuple[Row, ...]:
        """The rows of modules that are not fused."""
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
    """Summarize which modules of `model` run fused, which do not, and why; ``print`` the result for a table.

    There is one row for each module that :func:`fused_res.fuse` supports, for each module of :mod:`fused_res.nn`, and
    for each remaining norm. Rows of convolutions name the algorithms of the last call; they depend on the input size.

    Args:
        model: any module, fused, frozen or stock.

    Returns:
        A :class:`fused_res.fusion.Summary`; its ``steps`` list every step of the plans that the blocks ran last.

    Raises:
        TypeError: `model` is not a module.
    """
    rows = tuple(_rows(model))
    if not chain.enabled:
        rows = tuple(row._replace(fused=False, why="FUSED_RES=0 is set") if row.fused else row for row in rows)
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
        if isinstance(module, FrozenModule):
            frozen.add(name)
            yield _frozen_row(name, module)
        elif _frozen_in_pieces(module, adapter):
            frozen.add(name)
            why = _reason(module, module.__dict__["_fused_res_left"])
            yield Row(name, parents[name], True, f"frozen in pieces: {why}")
        elif refusal is not None and isinstance(refusal.module, FrozenModule):
            if isinstance(module, FusableModule):  # what it covers is not visited; of others the stem is a row below
                yield _frozen_row(f"{name}.conv1" if name else "conv1", refusal.module)
        elif isinstance(module, Fused | FusableModule):
            why = _reason(module, refusal)
            if why is None:
                why = None if _switched_on(module) else "switched off"
            yield Row(name, parents[name], why is None, why or _settings(module))
        elif isinstance(module, CLOSED):
            yield Row(name, parents[name], False, refusal.reason if refusal else "")
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
    return any(isinstance(child, FrozenModule) for child in module.children())


def _frozen_row(name: str, module: FrozenModule) -> Row:
    layers = [(name, child) for name, child in module.named_modules() if isinstance(child, FrozenConv)]
    ran = [f"{name} {child.last_selected}".strip() for name, child in layers if child.last_selected is not None]
    how = "; ".join(ran) or _NOT_RUN
    return Row(name, module.origin, True, f"frozen, backend={_backend(module, module.backend)}, {how}")


def _switched_on(module: Fused | FusableModule) -> bool:
    return module.fused if isinstance(module, FusableModule) else module._fused_res is not None


def _settings(module: Fused | FusableModule) -> str:
    assert isinstance(module, nn.Module)
    if isinstance(module, FusableModule):
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
        units, shortcut = module._units_and_shortcut()
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
        if isinstance(parts, Parts) and chain.find_unsupported(*parts) is None:
            return [parts]
        return [] if pieces is None else [Parts(run.units) for run in runs.split(pieces.branch) if run.units]
    if issubclass(adapter, StemAdapter):
        stem = adapter.units(fused)
        return [] if isinstance(stem, Unsupported) else [Parts(stem)]
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


def _reason(module: nn.Module | Fused, refusal: Unsupported | None) -> str | None:
    if refusal is None or refusal.module is None:
        return refusal and refusal.reason
    assert isinstance(module, nn.Module)
    names = [name for name, child in module.named_modules(remove_duplicate=False) if child is refusal.module]
    return f"{names[0] if names else 'a child'} {refusal.reason}"
