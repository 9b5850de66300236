"""The generated subclass of a fused module's class: same object, same children, a forward that runs a program."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from fused_res.graph.graph_modules import known_forward
from fused_res.nn import chain
from fused_res.nn.cached_call import Calls
from fused_res.nn.fusable_module import STOCK_CLASS, Unscriptable
from fused_res.nn.packed import PackedProgram


class Settings(NamedTuple):
    """How a fused module runs; see :func:`fused_res.functional.residual_block`."""

    backend: str = "auto"
    recompute: str = "none"
    tune: bool = False
    autocast: torch.dtype | None = None  # dtype of an autocast region around the forward


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
        self.packed = PackedProgram(settings.tune) if packed else None
        self.frozen = frozen
        self.programs = programs
        self.calls: Calls = {}
        self.has_warned = False

    def record(self, module: nn.Module) -> None:
        """Generate the programs of `module` anew, because it was unpickled or the class of a layer has changed."""
        from fused_res.fusion.convert import generate_programs

        self.calls.clear()
        self.packed = None if self.packed is None else PackedProgram(self.settings.tune)
        generate_programs(module, self)

    def __deepcopy__(self, memo: Any) -> Fusion:
        return Fusion(self.settings, self.packed is not None, self.frozen, self.programs)

    def __reduce__(self) -> Any:
        return Fusion, (self.settings, self.packed is not None, self.frozen)


def fusion_of(module: nn.Module) -> Fusion | None:
    """Return what a fused module holds, or None."""
    return module.__dict__.get("_fused_res")


_fused_classes: dict[type, type | None] = {}
_FUSED_CLASS = "_fused_res_class"  # attribute of a graph module's class, which is garbage with its only instance


def fused_class(base: type[nn.Module]) -> type[nn.Module] | None:
    """Return the generated subclass of `base`, always the same class, with `base`'s name; None if there can be none."""
    if issubclass(base, fx.GraphModule):
        if _FUSED_CLASS not in vars(base):
            setattr(base, _FUSED_CLASS, _generate(base, _graph_module_methods(base)))
        return vars(base)[_FUSED_CLASS]
    if base not in _fused_classes:
        try:
            _fused_classes[base] = _generate(base, _picklable_methods(base))
        except Exception:  # the class, or its metaclass, does not allow it
            _fused_classes[base] = None
    return _fused_classes[base]


def _generate(base: Any, methods: dict[str, Any]) -> type[nn.Module]:
    names = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(base.__name__, (base,), names | _methods(base) | methods | {STOCK_CLASS: base})


def _forward(base: Any) -> Callable[..., Any]:
    """Return the forward of the subclass of `base`."""

    @functools.wraps(base.forward)  # torch.fx and inspect see the parameters of the stock forward
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        fusion = self.__dict__.get("_fused_res")
        dtype = None if fusion is None else fusion.settings.autocast
        if dtype is not None and not torch.is_autocast_enabled(device := _device_type(args, kwargs)):
            with torch.autocast(device, dtype):
                return forward(self, *args, **kwargs)
        if fusion is not None and chain.unsupported_context() is None:
            for program in fusion.programs:
                output = program.forward(self, *args, **kwargs)
                if output is not NotImplemented:
                    return output
        return base.forward(self, *args, **kwargs)

    return forward


def _device_type(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Return the device type of the first tensor among the arguments, or "cpu"."""
    return next((value.device.type for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), "cpu")


def run_under_autocast(model: nn.Module, dtype: torch.dtype) -> None:
    """Make the forward of a frozen model run under autocast; an autocast region of the caller has precedence.

    Raises:
        ValueError: the forward of `model` cannot be replaced.
    """
    fusion = fusion_of(model)
    if fusion is None:
        raise ValueError(f"dtype: expected None for a {type(model).__name__}, whose forward cannot be replaced")
    fusion.settings = fusion.settings._replace(autocast=dtype)


def _methods(base: Any) -> dict[str, Any]:
    """Return the methods of every subclass of a `base`."""

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

    return {"forward": _forward(base), "train": train, "__prepare_scriptable__": Unscriptable.__prepare_scriptable__}


def _picklable_methods(base: Any) -> dict[str, Any]:
    """Return the methods that copy and pickle instances of the subclass of `base`."""

    def reduce_ex(self: Any, protocol: Any) -> Any:
        # Generated classes cannot be pickled by name; an empty module is made from the base.
        reduced = base.__reduce_ex__(self, protocol)
        return (_empty, (base,), *reduced[2:]) if type(self) is _fused_classes[base] else reduced

    def setstate(self: Any, state: Any) -> None:
        base.__setstate__(self, state)
        fusion = fusion_of(self)
        if fusion is not None and not fusion.programs:
            fusion.record(self)

    return {"__reduce_ex__": reduce_ex, "__setstate__": setstate}


def _empty(base: type[nn.Module]) -> nn.Module:
    cls = fused_class(base) or base
    return cls.__new__(cls)


# Graph modules: a copy has another class, so that it gets programs of its own.


def _graph_module_methods(base: Any) -> dict[str, Any]:
    """Return the methods that copy, pickle and recompile the only instance of `base`, the class of a graph module."""

    def deepcopy(self: Any, memo: Any) -> nn.Module:
        return _copied(self, lambda: base.__deepcopy__(self, memo))

    def shallow_copy(self: Any) -> nn.Module:
        return _copied(self, lambda: base.__copy__(self))

    def reduce_ex(self: Any, protocol: Any) -> Any:
        function, (body, *arguments), *rest = base.__reduce_ex__(self, protocol)
        body = {name: value for name, value in body.items() if name != "_fused_res"}
        return (_unpickled, (fusion_of(self), function, (body, *arguments)), *rest)

    def recompile(self: Any) -> Any:
        # It sets methods of the object's class: the stock one, whose forward the guards of the programs verify.
        generated = type(self)
        self.__class__ = base
        try:
            return base.recompile(self)
        finally:
            self.__class__ = generated
            base.forward = known_forward(base, base.forward)
            functools.update_wrapper(generated.forward, base.forward)

    return {
        "__deepcopy__": deepcopy, "__copy__": shallow_copy, "__reduce_ex__": reduce_ex, "recompile": recompile,
    }  # fmt: skip


def _copied(module: nn.Module, copy: Callable[[], nn.Module]) -> nn.Module:
    """Return a copy of a graph module, fused as `module` is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the constructor of some classes switches to training mode
        copied = copy()
    return _fused_as(fusion_of(module), copied)


def _unpickled(fusion: Fusion | None, function: Callable[..., nn.Module], arguments: Any) -> nn.Module:
    return _fused_as(fusion, function(*arguments))


def _fused_as(fusion: Fusion | None, module: nn.Module) -> nn.Module:
    """Fuse a graph module with the settings of `fusion`."""
    cls = fused_class(type(module))
    if fusion is None or cls is None:
        return module
    if fusion.frozen:
        module.eval()
    own = Fusion(fusion.settings, fusion.packed is not None, fusion.frozen)
    module.__dict__["_fused_res"] = own
    own.record(module)
    object.__setattr__(module, "__class__", cls)
    return module
