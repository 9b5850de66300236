"""FusableModule, the base class of this package's modules: a fused forward and the unfused PyTorch forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fused_res.backends import registry
from fused_res.block.checks import check_recompute
from fused_res.nn.chain import Unsupported

#: Constructs a norm from its number of channels.
NormLayer = Callable[[int], nn.Module]


def norm_layer_or_default(norm_layer: NormLayer | None) -> NormLayer:
    """Return `norm_layer`, or :class:`torch.nn.BatchNorm2d` for None.

    Raises:
        TypeError: `norm_layer` is not callable, or is a module instead of a class or function that constructs one.
    """
    if norm_layer is None:
        return nn.BatchNorm2d
    if isinstance(norm_layer, nn.Module) or not callable(norm_layer):
        raise TypeError(
            "norm_layer must construct a norm from its number of channels, as the class torch.nn.BatchNorm2d does, got"
            f" {norm_layer!r}"
        )
    return norm_layer


def check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def check_settings(backend: str, recompute: str) -> None:
    """Validate the names of a backend and of a recompute level.

    Raises:
        ValueError: `backend` or `recompute` is not a known name.
        BackendUnavailableError: the explicitly selected backend cannot run here.
    """
    if backend not in registry.names():
        raise ValueError(f"backend must be one of {registry.names()}, got {backend!r}")
    check_recompute(recompute)
    registry.require_available(backend)


#: Attribute of each class that :func:`fused_res.fuse` generates: the class that it was generated from.
STOCK_CLASS = "_fused_res_stock_class"


def stock_class(cls: type) -> Any:
    """Return the class whose forward computes the unfused result: `cls`, or what it was generated from."""
    return vars(cls).get(STOCK_CLASS, cls)


class Unscriptable:
    """Base of modules whose forward ``torch.jit.script`` cannot compile; it raises an error with the alternatives."""

    def __prepare_scriptable__(self) -> None:
        raise RuntimeError(
            f"torch.jit.script cannot compile {type(self).__name__}: use torch.jit.trace or torch.export.export, or"
            " script a model without modules of fused_res.nn before fused_res.fuse or after fused_res.unfuse"
        )


class FusableModule(Unscriptable, nn.Module):
    """Base class of this package's modules; :func:`fused_res.fuse` and :func:`fused_res.unfuse` switch their forward.

    A subclass's ``forward`` runs fused where ``fused`` is True and its child modules and input are supported.
    ``backend``, ``recompute`` and ``tune`` are the arguments of :func:`fused_res.functional.residual_block`.
    """

    backend: str = "auto"
    recompute: str = "none"
    tune: bool = False
    fused: bool = True

    def configure(self, backend: str = "auto", recompute: str = "none", fused: bool = True, tune: bool = False) -> None:
        """Set the module's backend, recomputation, fusion and tuning.

        Args:
            backend, recompute, tune: arguments of :func:`fused_res.functional.residual_block`.
            fused: whether the fused forward is enabled.

        Raises:
            ValueError: ``backend`` or ``recompute`` is not a known name.
            BackendUnavailableError: the explicitly selected backend cannot run here.
        """
        check_settings(backend, recompute)
        self.backend, self.recompute, self.fused, self.tune = backend, recompute, fused, tune

    def unsupported_reason(self) -> Unsupported | None:
        """Return the reason why `forward` would run unfused, regardless of the input, or None."""
        return None

    def fused_children(self) -> tuple[str, ...]:
        """Return the names of the children that the fused forward computes; other children are fused separately."""
        return ()

    def settings_repr(self) -> str:
        """Return the settings that differ from the defaults, as the end of an ``extra_repr``."""
        parts = [f"{name}={getattr(self, name)!r}" for name in ("backend", "recompute", "tune", "fused")]
        defaults = ("backend='auto'", "recompute='none'", "tune=False", "fused=True")
        return "".join(f", {part}" for part in parts if part not in defaults)
