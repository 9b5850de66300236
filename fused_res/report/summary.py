"""``summarize``: which modules run fused, which do not, and why, as data and as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain as concatenate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_res import functional
from fused_res._torch_compat import NormBase
from fused_res.backends import registry
from fused_res.block.plan import Plan
from fused_res.fusion.convert import recordings
from fused_res.fusion.fused import Settings, fusion_of
from fused_res.fusion.matcher import Segment, Unit, readers
from fused_res.fusion.program import Program
from fused_res.nn import chain
from fused_res.nn.batch_norm_act import BatchNormAct2d
from fused_res.nn.fusable_module import FusableModule, check_model, stock_class

NORMS = (NormBase, nn.GroupNorm, nn.LayerNorm)
_NOT_RUN = "algorithms are selected for the first input"


class Row(NamedTuple):
    """One module of a summarized model.

    Args:
        name: qualified name of the module.
        kind: name of its class.
        fused: whether it runs fused.
        why: how it runs fused, or the reason why it does not and what would change that.
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
        norms, norms_fused: number of normalization layers, and of those that run fused.
        bytes_fused: share of the fused ones in the bytes of all norms' inputs, 0 to 1; None without example inputs.
        notes: activations that no fused norm computes, each once.
    """

    rows: tuple[Row, ...]
    plans: Mapping[str, Plan] = field(default_factory=dict, compare=False)
    norms: int = 0
    norms_fused: int = 0
    bytes_fused: float | None = None
    notes: tuple[str, ...] = ()

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
        share = "" if self.bytes_fused is None else f", {self.bytes_fused:.0%} of their bytes"
        return "\n".join((*table, f"{self.norms_fused} of {self.norms} norms run fused{share}", *self.notes))


def summarize(model: nn.Module, *inputs: Any) -> Summary:
    """Summarize which modules of `model` run fused, which do not, and why; ``print`` the result for a table.

    There is one row for each module with a fused forward, for each module of :mod:`fused_res.nn`, and for each
    remaining norm. A module that a packed program runs as a part of a larger one has no row of its own. Rows of
    convolutions name the algorithms of the last call; they depend on the input size.

    Args:
        model: any module, fused, frozen or stock.
        inputs: example inputs. With them, one stock forward in evaluation mode measures how many bytes the norms read.

    Returns:
        A :class:`fused_res.report.Summary`; its ``steps`` list every step of the plans that the blocks ran last.

    Raises:
        TypeError: `model` is not a module.
    """
    check_model(model)
    fused_norms: set[nn.Module] = set()
    notes: dict[str, None] = {}
    rows = tuple(_rows(model, fused_norms, notes))
    norms = [module for module in model.modules() if _is_norm(module)]
    share = None
    if inputs:
        sizes = _norm_bytes(model, norms, inputs)
        share = sum(sizes[norm] for norm in norms if norm in fused_norms) / max(1, sum(sizes.values()))
    weights = {name: getattr(module, "weight", None) for name, module in model.named_modules()}
    ran = {name: functional.last_plan.get(one) for name, one in weights.items() if isinstance(one, Tensor)}
    plans = {name: plan for name, plan in ran.items() if plan is not None}
    return Summary(rows, plans, len(norms), sum(norm in fused_norms for norm in norms), share, tuple(sorted(notes)))


def _rows(model: nn.Module, fused_norms: set[nn.Module], notes: dict[str, None]) -> Iterator[Row]:
    """Yield all rows, and collect the norms that run fused and the activations that run after them."""
    names = {module: name for name, module in model.named_modules()}
    parents = {child: module for module in names for child in module.children()}
    context = chain.unsupported_context()
    rows: dict[nn.Module, Row] = {}
    covered: set[nn.Module] = set()  # norms that a row is about
    for module, name in names.items():
        kind = stock_class(type(module)).__name__
        fusion = fusion_of(module)
        if fusion is not None and fusion.programs:
            failures = [program.failing_guard(module) for program in fusion.programs]
            running = [p for p, failure in zip(fusion.programs, failures, strict=True) if failure is None]
            inside = {module.get_submodule(path) for p in fusion.programs for path in _present(p, module)}
            covered |= inside
            if fusion.packed is not None and inside and inside <= fused_norms:
                continue  # runs within the packed program of a module that contains it
            why = context.reason if context else failures[0]
            if context is None and running:
                why, found = _describe(module, running[0])
                fused_norms |= found
                notes |= dict.fromkeys(note for segment in running[0].segments for note in _separate(segment))
                rows[module] = Row(name, kind, bool(found), why)
            else:
                advice = ": move the hook to the block" if why is not None and " hook" in why and not context else ""
                rows[module] = Row(name, kind, False, f"runs its stock forward: {why}{advice}")
        elif isinstance(module, FusableModule):
            unsupported = context or module.unsupported_reason()
            inside = {child for child in _norms_of(module) if _is_norm(child)}
            covered |= inside
            if unsupported is None and module.fused:
                fused_norms |= inside
                rows[module] = Row(name, kind, True, _settings(module, module_settings(module), _chains_of(module)))
            else:
                why = _reason(module, unsupported) if unsupported else "switched off"
                rows[module] = Row(name, kind, False, str(why))
    norms: set[nn.Module] = {module for module in names if _is_norm(module)}
    remaining = norms - covered - fused_norms
    reasons = _reasons(model, remaining, names) if remaining else {}
    for module, name in names.items():
        if module in rows:
            yield rows[module]
        elif isinstance(module, torch.jit.ScriptModule) and not isinstance(parents.get(module), torch.jit.ScriptModule):
            yield Row(name, type(module).__name__, False, "is compiled by torch.jit: fuse the model before")
        elif module in remaining:
            yield Row(name, type(module).__name__, False, reasons[module])


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, NORMS) or chain.is_constant_norm(module.__dict__)


def _present(program: Program, module: nn.Module) -> Iterator[str]:
    modules = dict(module.named_modules(remove_duplicate=False))
    return (path for path in program.norms() if path in modules)


def _norms_of(module: FusableModule) -> list[nn.Module]:
    if isinstance(module, BatchNormAct2d):
        return [module]
    names = module.fused_children()
    return [inner for name, child in module.named_children() if name in names for inner in child.modules()]


def _describe(module: Any, program: Program) -> tuple[str, set[nn.Module]]:
    """Return how a program runs, and the norms that it runs fused."""
    kinds: Counter[str] = Counter()
    found: set[nn.Module] = set()
    refused: list[str] = []
    chains: list[list[Any]] = []
    for segment in program.segments:
        units, shortcut, pool = [_live(module, program, unit) for unit in segment.units], segment.shortcut, segment.pool
        unsupported: Any = None
        if units[0][0] is None or shortcut == "tensor":
            norm = next(unit[1] for unit in reversed(units) if unit[1] is not None)
            args = chain.read_norm(norm.__dict__)
            unsupported = chain.Unsupported(args, norm) if isinstance(args, str) else None
        else:
            projection = _live(module, program, shortcut) if isinstance(shortcut, Unit) else shortcut
            live_pool = None if pool is None else module.get_submodule(program.relative(pool.path))
            unsupported = chain.find_unsupported(units, projection, live_pool)
        if unsupported is not None:
            refused.append(str(_reason(module, unsupported)))
            continue
        kinds[_name_of(segment)] += 1
        found |= {
            module.get_submodule(program.relative(n.path))
            for n in segment.nodes
            if n.path and n.layer in _norm_layers(segment)
        }
        chains.append([unit[0] for unit in units if unit[0] is not None])
    for head in program.heads:
        kinds["global average pool" + " + linear" * (head.linear is not None)] += 1
    fusion = module._fused_res
    parts = [f"{count} x {kind}" if count > 1 else kind for kind, count in kinds.items()]
    text = "; ".join(parts) or "nothing"
    how = "packed " if fusion.packed is not None else ""
    settings = _settings(module, fusion.settings, chains)
    return f"{how}{text}: {settings}" + "".join(f"; stock: {why}" for why in dict.fromkeys(refused)), found


#: Functions and methods that are activations; no fused norm computes them, or not after an addition.
_ACTIVATIONS = {
    *(
        "relu6",
        "leaky_relu",
        "leaky_relu_",
        "silu",
        "hardtanh",
        "hardtanh_",
        "hardswish",
        "gelu",
        "elu",
        "elu_",
        "mish",
    ),
    *("prelu", "selu", "selu_", "celu", "celu_", "rrelu", "rrelu_", "softplus", "softsign", "hardsigmoid", "tanh"),
}


def _separate(segment: Segment) -> Iterator[str]:
    """Yield a note for each activation that follows a segment without activation."""
    if segment.units[-1].activation is not None or segment.pool is not None:
        return
    for reader in readers(segment.last):
        target = reader.source.target
        name = getattr(target, "__name__", target)
        if type(reader.layer).__module__ == nn.Hardswish.__module__:
            name = type(reader.layer).__name__
        elif name not in _ACTIVATIONS:
            continue
        yield f"activation {name} runs separately after the fused {'norm' if segment.add is None else 'addition'}"


def _norm_layers(segment: Segment) -> list[Any]:
    projection = (segment.shortcut,) if isinstance(segment.shortcut, Unit) else ()
    return [unit.norm.layer for unit in (*segment.units, *projection) if unit.norm is not None]


def _live(module: nn.Module, program: Program, unit: Unit) -> chain.Unit:
    """Return a unit's present modules."""
    conv = None if unit.conv is None else module.get_submodule(program.relative(unit.conv.path))
    norm = None if unit.norm is None else module.get_submodule(program.relative(unit.norm.path))
    return chain.Unit(conv, norm, *unit.settings)


_ACTIVATION_NAMES = {
    "identity": "", "relu": "ReLU", "relu6": "ReLU6", "leaky_relu": "leaky ReLU", "silu": "SiLU",
}  # fmt: skip


def _name_of(segment: Segment) -> str:
    """Return what a segment computes, in the field's words."""
    if isinstance(segment.shortcut, Unit) or segment.shortcut == "identity":
        shortcut = "projection" if isinstance(segment.shortcut, Unit) else "identity"
        return f"residual block of {len(segment.units)} units, {shortcut} shortcut"
    added = segment.shortcut == "tensor"  # before the last ReLU
    kinds: Counter[str] = Counter()
    for unit in segment.units:
        activation = "" if added and unit is segment.units[-1] else _ACTIVATION_NAMES[unit.settings[0]]
        layers = ["conv" * (unit.conv is not None), "norm" * (unit.norm is not None), activation]
        kinds["-".join(filter(None, layers))] += 1
    text = ", ".join(f"{kind} x{number}" if number > 1 else kind for kind, number in kinds.items())
    text += " + addition" * added + " + ReLU" * (added and segment.units[-1].activation is not None)
    text += " + max pool" * (segment.pool is not None)
    return text


def _reasons(model: nn.Module, norms: set[nn.Module], names: Mapping[nn.Module, str]) -> dict[nn.Module, str]:
    """Return why each of these norms is in no segment, and what would change that."""
    reasons: dict[nn.Module, str] = {}
    failures: dict[str, str] = {}
    for recorded in recordings(model, packed=False, failures=failures):
        ways = {node.layer: node for node in recorded.graph.nodes if node.layer is not None}
        segmented = {layer for segment in recorded.segments for layer in _norm_layers(segment)}
        for norm in norms & ways.keys():
            if norm in segmented:
                reasons[norm] = "not fused as yet: call fused_res.fuse"
            elif is_batch_norm(norm):
                reasons[norm] = "its input is written to by another operation, or its calls would change their order"
    for norm in norms:
        if norm in reasons:
            continue
        if not is_batch_norm(norm):
            reasons[norm] = f"is a {type(norm).__name__}: batch norms are fused"
            continue
        name = names[norm]
        above = [path for path in failures if not path or name == path or name.startswith(path + ".")]
        if above:
            path = max(above, key=len)
            advice = "move the hook to the block" if "hook" in failures[path] else "write its blocks with fused_res.nn"
            reasons[norm] = f"{path or 'the model'} {failures[path]}: {advice}"
        else:
            reasons[norm] = "no recorded forward calls it as a layer, or computes it exactly"
    return reasons


def is_batch_norm(norm: nn.Module) -> bool:
    return isinstance(norm, tuple(chain.norm_types)) or chain.is_constant_norm(norm.__dict__)


def _norm_bytes(model: nn.Module, norms: Sequence[nn.Module], inputs: Sequence[Any]) -> dict[nn.Module, int]:
    """Return the bytes of each norm's inputs in a forward in evaluation mode."""
    sizes = dict.fromkeys(norms, 0)
    modes = {module: module.training for module in model.modules()}

    def add(norm: nn.Module, args: Sequence[Any]) -> None:
        sizes[norm] += args[0].numel() * args[0].element_size()

    with ExitStack() as stack, torch.no_grad():
        for norm in norms:
            stack.callback(norm.register_forward_pre_hook(add).remove)
        try:
            for module in modes:
                module.training = False
            model(*inputs)
        finally:
            for module, mode in modes.items():
                module.training = mode
    return sizes


def module_settings(module: FusableModule) -> Settings:
    return Settings(module.backend, module.recompute, module.tune)


def _settings(module: nn.Module, settings: Settings, chains: list[list[Any]]) -> str:
    tensors = concatenate(module.parameters(), module.buffers())
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    backend = registry.resolve(settings.backend, device).name
    parts = [f"backend={backend}", f"recompute={settings.recompute}", "tune=True" * settings.tune]
    parts.append("; ".join(_ran(module, chains)))
    return ", ".join(filter(None, parts))


def _chains_of(module: Any) -> list[list[Any]]:
    """Return the convolutions of a module of fused_res.nn."""
    return [[unit[0] for unit in module.layers().units]] if hasattr(module, "layers") else []


def _ran(module: Any, chains: list[list[Any]]) -> list[str]:
    """Return the algorithms that ran last, each with the kernel sizes that it was selected for."""
    sizes: dict[str, list[str]] = {}
    fusion = module.__dict__.get("_fused_res")
    packed = fusion.packed.selected() if fusion is not None and fusion.packed is not None else {}
    for conv, selection in packed.items():
        _append(sizes, str(selection), conv.weight.shape)
    for convs in chains if not sizes else ():
        weight = convs[0].weight if convs else None
        plan = functional.last_plan.get(weight) if isinstance(weight, Tensor) else None
        for unit in plan.all_units if plan is not None else ():
            _append(sizes, str(unit.algorithms), unit.problem.weight)
    made = [f"{', '.join(found)} {algorithms}" for algorithms, found in sizes.items()]
    return made or ([_NOT_RUN] if any(chains) else [])


def _append(sizes: dict[str, list[str]], algorithm: str, weight: Sequence[int]) -> None:
    size = "x".join(map(str, weight[2:])) or "linear"
    if size not in sizes.setdefault(algorithm, []):
        sizes[algorithm].append(size)


def _reason(module: nn.Module, unsupported: chain.Unsupported) -> str:
    if unsupported.module is None:
        return unsupported.reason
    names = [name for name, child in module.named_modules(remove_duplicate=False) if child is unsupported.module]
    return f"{names[0] if names else 'a child'} {unsupported.reason}"
