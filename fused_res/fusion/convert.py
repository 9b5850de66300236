"""``fuse`` and ``unfuse``: replacement of module classes in place; parameters, buffers and children are unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import TypeVar

from torch import nn

from fused_res.backends import registry
from fused_res.fusion.fused import Fusion, Settings, fused_class
from fused_res.fusion.matcher import Head, Segment, find_heads, find_segments
from fused_res.fusion.program import Program, Unemittable, generate
from fused_res.graph.ir import build_graph
from fused_res.graph.recording import Frame, Recording, Untraceable
from fused_res.graph.symbolic import is_layer, opaque_reason, record
from fused_res.nn.fusable_module import FusableModule, check_model, check_settings, stock_class

Model = TypeVar("Model", bound=nn.Module)


def fuse(
    model: Model, backend: str = "auto", recompute: str = "none", tune: bool = False, cache_eval: bool = False
) -> Model:
    """Fuse every chain of `model` that a fused operator computes, in place.

    A chain is a convolution, batch norm and ReLU, any number of them, with a residual addition or a max pooling: see
    :mod:`fused_res.fusion.matcher`. What a module computes decides, not its class: its forward is recorded symbolically
    and the smallest module that contains a whole chain gets a forward that runs it fused, everything else unchanged and
    in its order. Parameters (an optimizer stays valid), buffers, ``state_dict`` keys, hooks, class names and
    ``isinstance`` do not change. The new forward verifies on every call that the module is as it was recorded, and
    otherwise runs the stock forward. Calling it again changes the settings, and records anew.

    Args:
        model: any module.
        backend: name of a backend, see :mod:`fused_res.backends`; default ``"auto"``.
        recompute, tune: see :func:`fused_res.functional.residual_block`; default ``"none"`` and False.
        cache_eval: in evaluation mode without gradients, run with batch norms folded into packed weights, as
            :func:`freeze` does, with the same `tune`; the weights are packed again after they have changed. Default
            False.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `backend` or `recompute` is not a known name.
        BackendUnavailableError: the named backend cannot run here; `model` is unchanged.
    """
    check_model(model)
    check_settings(backend, recompute)
    registry.check_devices(backend, {parameter.device for parameter in model.parameters()})
    unfuse(model)
    for module in model.modules():
        if isinstance(module, FusableModule):
            module.configure(backend, recompute, tune=tune)
    install(model, Settings(backend, recompute, tune), cache_eval)
    return model


def unfuse(model: Model) -> Model:
    """Revert :func:`fuse` in place.

    Fused modules get their classes back; modules of :mod:`fused_res.nn` run their stock layers.

    Args:
        model: any module, fused or not.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a module.
    """
    check_model(model)
    for module in model.modules():
        if isinstance(module, FusableModule):
            module.fused = False
        # If another library has derived a class from the generated one, its forward finds no program.
        module.__dict__.pop("_fused_res", None)
        # A slice of a fused container has the generated class, but no program.
        if (stock := stock_class(type(module))) is not type(module):
            object.__setattr__(module, "__class__", stock)
    return model


def install(model: nn.Module, settings: Settings, packed: bool, frozen: bool = False) -> None:
    """Give every module of `model` that contains a segment its generated forward.

    Args:
        model: any module.
        settings, packed, frozen: see :class:`fused_res.fusion.fused.Fusion`. A frozen model itself always gets a
            generated class.
    """
    recordable = opaque_reason(model, packed, called=False) is None
    programs: dict[nn.Module, list[Program]] = {model: []} if frozen and recordable else {}
    for recorded in recordings(model, packed):
        for module, program in recorded.programs(packed):
            found = programs.setdefault(module, [])
            if all(program.key != other.key for other in found):
                found.append(program)
    for module, found in programs.items():
        generated = fused_class(type(module))
        if generated is not None:
            object.__setattr__(module, "__class__", generated)  # the class may define its own __setattr__
            module.__dict__["_fused_res"] = Fusion(settings, packed, frozen, tuple(found))


def generate_programs(module: nn.Module, fusion: Fusion) -> None:
    """Generate the programs of a module that is fused already."""
    packed = fusion.packed is not None
    programs: list[Program] = []
    with suppress(Untraceable):
        for recorded in _record(module, packed):
            for owner, program in recorded.programs(packed):
                if owner is module and all(program.key != other.key for other in programs):
                    programs.append(program)
    fusion.programs = tuple(programs)


class Matched:
    """The recording of one module, and the segments in it.

    Args:
        root: the module.
        recorded: its recording.
        inference: whether no gradient is computed.
    """

    def __init__(self, root: nn.Module, recorded: Recording, inference: bool) -> None:
        self.root = root
        self.recording = recorded
        modules = dict(root.named_modules(remove_duplicate=False))
        self.graph = build_graph(recorded.graph, modules.__getitem__, recorded.frames)
        self.segments = find_segments(self.graph, inference)
        self.heads = find_heads(self.graph) if inference else []
        layers = {modules[str(node.target)] for node in recorded.graph.nodes if node.op == "call_module"}
        opaque = {modules[path] for path in recorded.opaque}
        #: Modules that need no recording of their own.
        self.visited = (layers - opaque) | {frame.module for frame in recorded.frames}

    def programs(self, packed: bool) -> Iterator[tuple[nn.Module, Program]]:
        """Yield every module that gets a forward, and that forward.

        Packed inference runs as much as possible in one call, so every module that contains a segment gets one;
        otherwise only the smallest module that contains the whole segment, so that hooks around it stay. With a head, a
        forward without it follows, for calls in which a guard of the head fails, for example because of a hook.
        """
        owners: dict[Frame, list[Segment]] = {}
        for segment in self.segments:
            frame = segment.frame
            while frame is not None:
                owners.setdefault(frame, []).append(segment)
                frame = frame.parent if packed else None
        pending = list(owners)
        while pending:
            frame = pending.pop()
            for heads in (self.heads, []) if packed and self.heads else ([],):
                try:
                    yield frame.module, self._generate(frame, packed, heads)
                except Unemittable:
                    if not packed and frame.parent is not None and frame.parent not in owners:
                        owners[frame.parent] = []
                        pending.append(frame.parent)

    def _generate(self, owner: Frame, packed: bool, heads: list[Head]) -> Program:
        """Generate a forward that runs all segments within the calls that it looks into, and those of `heads`."""
        inside = [segment for segment in self.segments if segment.frame.within(owner)]
        if not packed:
            own = [segment for segment in inside if segment.frame is owner] or inside
            while True:
                looked_into = {
                    frame for segment in own for node in segment.nodes for frame in _up_to(node.frame, owner)
                }
                for frame in self.recording.frames:
                    if frame.changes_arguments and frame.parent in looked_into:
                        looked_into.add(frame)
                more = [segment for segment in inside if segment.frame in looked_into]
                if len(more) <= len(own):
                    break
                own = more
            inside = own
        heads = [head for head in heads if all(node.frame.within(owner) for node in head.nodes)]
        return generate(self.graph, self.recording.frames, owner, inside, heads, packed)


def _up_to(frame: Frame, owner: Frame) -> Iterator[Frame]:
    while frame is not owner:
        yield frame
        assert frame.parent is not None
        frame = frame.parent
    yield owner


def recordings(model: nn.Module, packed: bool, failures: dict[str, str] | None = None) -> Iterator[Matched]:
    """Record `model`, and each part of it that a recording does not look into, for both training modes if they differ.

    Args:
        model: any module.
        packed: record the modules of :mod:`fused_res.nn`, too.
        failures: filled with the reason why each module that could not be recorded was not, by name.
    """
    visited: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in visited or is_layer(module):
            continue
        if isinstance(module, FusableModule) and not packed:
            unsupported = module.unsupported_reason()
            if unsupported is None or unsupported.transient:  # its own forward runs these children
                children = [child for name, child in module.named_children() if name in module.fused_children()]
                visited |= {inner for child in children for inner in child.modules()}
            continue
        try:
            for recorded in _record(module, packed):
                visited |= recorded.visited
                yield recorded
        except Untraceable as failure:
            if failures is not None:
                failures[name] = str(failure)


def _record(module: nn.Module, packed: bool) -> Iterator[Matched]:
    # Evaluation first: what is foreign in training (dropout, drop path) is nothing there, so more runs fused.
    for training in (False, True):
        recorded = record(module, training, inline_fusable=packed)
        yield Matched(module, recorded, inference=packed)
        if not recorded.reads_training:
            return
