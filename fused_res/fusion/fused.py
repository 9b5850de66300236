"""The generated subclass of a fused module's class: same object, same children, a forward that runs a program."""

from __future__ import annotations

import functools
import warnings
from typing import Any, NamedTuple

from torch import nn

from fused_res.nn import chain
from fused_res.nn.cached_call import Calls
from fused_res.nn.fusable_module import Unscriptable, generated_from
from fused_res.nn.packed import PackedProgram


class Settings(NamedTuple):
    """How a fused module runs; see :func:`fused_res.functional.residual_block`."""

    backend: str = "auto"
    recompute: str = "none"
    tune: bool = False


class Fusion:
    """What a fused module holds: its settings, its programs, and the inference graphs that it has prepared.

    Programs hold no modules, so that copies share them. They cannot be pickled: an unpickled module is fused again.

    Args:
        settings: arguments of the fused operators.
        packed: whether inference runs with packed weights.
        frozen: whether the module stays in evaluation mode.
        programs: generated forwards for the calls that were recorded, tried in order.

    Attributes:
        calls: cache of :func:`fused_res.nn.chain.run_fused`.
    """

    def __init__(self, settings: Settings, packed: bool, frozen: bool, programs: tuple[Any, ...] = ()) -> None:
        self.settings = settings
        self.packed = PackedProgram() if packed else None
        self.frozen = frozen
        self.programs = programs
        self.calls: Calls = {}
        self.has_warned = False

    def __deepcopy__(self, memo: Any) -> Fusion:
        return Fusion(self.settings, self.packed is not None, self.frozen, self.programs)

    def __reduce__(self) -> Any:
        return Fusion, (self.settings, self.packed is not None, self.frozen)


def fusion_of(module: nn.Module) -> Fusion | None:
    """Return what a fused module holds, or None."""
    return module.__dict__.get("_fused_res")


_fused_classes: dict[type, type | None] = {}


def fused_class(base: type[nn.Module]) -> type[nn.Module] | None:
    """Return the generated subclass of `base`, always the same class, with `base`'s name; None if there can be none."""
    if base not in _fused_classes:
        names = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
        try:
            made = _fused_classes[base] = type(base.__name__, (base,), names | _methods(base))
            generated_from[made] = base
        except Exception:  # the class, or its metaclass, does not allow it
            _fused_classes[base] = None
    return _fused_classes[base]


def _methods(base: Any) -> dict[str, Any]:
    """Return the methods of the subclass of `base`."""

    @functools.wraps(base.forward)  # torch.fx and inspect see the parameters of the stock forward
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        fusion = self.__dict__.get("_fused_res")
        if fusion is not None and chain.unsupported_context() is None:
            for program in fusion.programs:
                output = program.forward(self, *args, **kwargs)
                if output is not NotImplemented:
                    return output
        return base.forward(self, *args, **kwargs)

    def train(self: Any, mode: bool = True) -> Any:
        fusion = fusion_of(self)
        if not mode or fusion is None or not fusion.frozen:
            return base.train(self, mode)
        if not fusion.has_warned:
            fusion.has_warned = True
            warnings.warn(
                "this model is frozen for inference and stays in evaluation mode: train the model it was made from",
                stacklevel=2,
            )
        return self

    def reduce_ex(self: Any, protocol: Any) -> Any:
        # Generated classes cannot be pickled by name; an empty module is made from the base.
        reduced = base.__reduce_ex__(self, protocol)
        return (_empty, (base,), *reduced[2:]) if type(self) is _fused_classes[base] else reduced

    def setstate(self: Any, state: Any) -> None:
        base.__setstate__(self, state)
        fusion = fusion_of(self)
        if fusion is not None and not fusion.programs:
            from fused_res.fusion.convert import generate_programs

            generate_programs(self, fusion)

    return {
        "forward": forward, "train": train, "__reduce_ex__": reduce_ex, "__setstate__": setstate,
        "__prepare_scriptable__": Unscriptable.__prepare_scriptable__,
    }  # fmt: skip


def _empty(base: type[nn.Module]) -> nn.Module:
    cls = fused_class(base) or base
    return cls.__new__(cls)
