"""What all modules of this package have in common: a fused path, and the stock one beside it."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from fused_res.backends import registry
from fused_res.block.checks import check_recompute
from fused_res.nn.chain import Refusal

#: Makes a norm from its number of channels.
NormLayer = Callable[[int], nn.Module]


def norm_layer_or_default(norm_layer: NormLayer | None) -> NormLayer:
    """:class:`torch.nn.BatchNorm2d` for None. Raises TypeError for what makes no norms, such as a norm."""
    if norm_layer is None:
        return nn.BatchNorm2d
    if isinstance(norm_layer, nn.Module) or not callable(norm_layer):
        raise TypeError(
            "norm_layer must make a norm from its number of channels, as the class torch.nn.BatchNorm2d does, got"
            f" {norm_layer!r}"
        )
    return norm_layer


def check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def check_settings(backend: str, recompute: str) -> None:
    """Raises ValueError for an unknown name, BackendUnavailableError for a backend that cannot run here."""
    if backend not in registry.names():
        raise ValueError(f"backend must be one of {registry.names()}, got {backend!r}")
    check_recompute(recompute)
    registry.require(backend)


class Unscriptable:
    """A module whose forward ``torch.jit.script``, which compiles sources, cannot read; it is told so."""

    def __prepare_scriptable__(self) -> None:
        raise RuntimeError(
            f"torch.jit.script cannot compile {type(self).__name__}: use torch.jit.trace or torch.export.export, or"
            " script a model of torchvision's or timm's before fused_res.fuse, or behind fused_res.unfuse"
        )


class Configured(Unscriptable, nn.Module):
    """The base of this package's modules: :func:`fused_res.fuse` and :func:`fused_res.unfuse` switch them.

    A subclass's ``forward`` takes the fused path where ``fused`` is set and its modules and input allow it.
    ``backend``, ``recompute`` and ``tune`` are those of :func:`fused_res.functional.residual_block`.
    """

    backend: str = "auto"
    recompute: str = "none"
    tune: bool = False
    fused: bool = True

    def configure(self, backend: str = "auto", recompute: str = "none", fused: bool = True, tune: bool = False) -> None:
        """Sets all four.

        Raises:
            ValueError: ``backend`` or ``recompute`` is not a known name.
            BackendUnavailableError: the backend was asked for by name and cannot run here.
        """
        check_settings(backend, recompute)
        self.backend, self.recompute, self.fused, self.tune = backend, recompute, fused, tune

    def refusal(self) -> Refusal | None:
        """Why `forward` would take the stock path at present, as far as that can be told without an input."""
        return None

    def covered(self) -> tuple[str, ...]:
        """Names of the children that the fused forward runs itself; the others stay modules to be fused."""
        return ()

    def settings_repr(self) -> str:
        """The end of an ``extra_repr``: whatever differs from the defaults."""
        parts = [f"{name}={getattr(self, name)!r}" for name in ("backend", "recompute", "tune", "fused")]
        defaults = ("backend='auto'", "recompute='none'", "tune=False", "fused=True")
        return "".join(f", {part}" for part in parts if part not in defaults)
