"""What all modules of this package have in common: a fused path, and the stock one beside it."""

from __future__ import annotations

from torch import nn

from fused_res.backends import registry
from fused_res.nn.chain import Refusal
from fused_res.plan import RECOMPUTE


def check_settings(backend: str, recompute: str) -> None:
    """Raises ValueError for an unknown name, BackendUnavailableError for a backend that cannot run here."""
    if backend not in registry.names():
        raise ValueError(f"backend must be one of {registry.names()}, got {backend!r}")
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute must be one of {RECOMPUTE}, got {recompute!r}")
    registry.require(backend)


class Unscriptable:
    """A module whose forward ``torch.jit.script``, which compiles sources, cannot read; it is told so."""

    def __prepare_scriptable__(self) -> None:
        raise RuntimeError(
            f"torch.jit.script cannot compile {type(self).__name__}: use torch.jit.trace or torch.export.export, or"
            " script a model of torchvision's or timm's before fused_res.fuse, or behind fused_res.unfuse"
        )


class Configured(Unscriptable, nn.Module):
    """A module that :func:`fused_res.fuse` and :func:`fused_res.unfuse` switch instead of replacing.

    A subclass's ``forward`` takes the fused path where ``fused`` is set and its modules and input allow it.
    """

    backend: str = "auto"
    recompute: str = "none"
    tune: bool = False
    fused: bool = True

    def configure(self, backend: str = "auto", recompute: str = "none", fused: bool = True, tune: bool = False) -> None:
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
