"""What it takes to know a block class, and the class that is put in front of it."""

from __future__ import annotations

import sys
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from fused_res.fusion import runs
from fused_res.fusion.runs import Settings
from fused_res.nn import chain
from fused_res.nn.chain import Shortcut, Unit, Unsupported, has_no_hooks
from fused_res.nn.fusable_module import Unscriptable


class Fused(Unscriptable):
    """Stands in front of a model's own class: same object, same children, a forward that can run fused.

    That forward looks at the children as they are on this call, and leaves to ``super()`` whatever is not
    exactly as it expects. All names begin with an underscore, because a child module may have any other.
    """

    _fused_res: Settings | None = None  # None: run the model's own forward
    _fused_res_adapter: ClassVar[type[Adapter]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Classes made at run time cannot be pickled by name; this one is made again from its base.
        reduced = super().__reduce_ex__(protocol)
        base = base_of(type(self))
        return reduced if base is None else (_rebuild, (base,), *reduced[2:])


class Adapter:
    """Knowledge of one class: which, in which version, and what in it makes a chain. Never instantiated."""

    #: Where the class is. Never imported from here: whoever has a model made of it has done that.
    home: ClassVar[str]
    name: ClassVar[str]
    #: The methods that this relies on, each with the names that it read, in order, when this was written.
    #: Where another version of a library reads others, its class is not known. None: any version will do.
    reads: ClassVar[tuple[tuple[str, str | None], ...]]
    front: ClassVar[type[Fused]]

    @classmethod
    def knows(cls, other: type[nn.Module]) -> bool:
        """Whether `other` is the class that this is written for, or a subclass that runs just as it does."""
        stock = getattr(sys.modules.get(cls.home), cls.name, None)
        if stock is None or not issubclass(other, stock):
            return False
        if other.__call__ is not nn.Module.__call__ or other.__getattr__ is not nn.Module.__getattr__:
            return False
        for method, names in cls.reads:
            function = getattr(other, method)
            if function is not getattr(stock, method):
                return False
            if names is not None and " ".join(function.__code__.co_names) != names:
                return False
        return True

    @classmethod
    def unsupported_reason(cls, module: Any) -> Unsupported | None:
        """Why `module`, fused or not, would run its own forward, as far as that is known without an input."""
        raise NotImplementedError

    @classmethod
    def fused_children(cls, module: Any) -> tuple[str, ...]:
        """Names of the children that the fused forward runs itself; the others stay modules to be fused."""
        return tuple(module._modules)


class Parts(NamedTuple):
    units: tuple[Unit, ...]
    shortcut: Shortcut = "none"


class Pieces(NamedTuple):
    """``activation(branch(x) + shortcut(x))``, where something in it has no place in a chain."""

    names: tuple[str, ...]
    branch: tuple[nn.Module, ...]  # the children of these names, one after the other
    shortcut: Shortcut
    activation: nn.Module

    def join(self) -> nn.Module | None:
        """The norm that ends the branch, if it can take in the addition and the activation."""
        norm, activation = self.branch[-1], self.activation
        if type(norm) not in chain.norm_types or type(activation) is not nn.ReLU:
            return None
        return norm if has_no_hooks(norm.__dict__) and has_no_hooks(activation.__dict__) else None

    def run(self, x: Tensor, settings: Settings) -> Tensor:
        norm = self.join()
        y = runs.run(x, self.branch if norm is None else self.branch[:-1], settings)
        added = x if isinstance(self.shortcut, str) else self.shortcut(x)
        if norm is not None:
            output = chain.run_fused_norm(y, norm, added, "relu", settings.backend)
            if output is not None:
                return output
            y = norm(y)
        y += added  # in place as in the block's own forward: so it keeps its dtype
        return self.activation(y)


class FusedBlock(Fused):
    _fused_res_adapter: ClassVar[type[BlockAdapter]]

    def forward(self, x: Tensor) -> Tensor:
        settings = self._fused_res
        if settings is not None:
            adapter = self._fused_res_adapter
            parts = adapter.parts(self)
            if type(parts) is Parts:
                output = chain.run_fused(x, parts.units, parts.shortcut, None, *settings)
                if output is not None:
                    return output
            pieces = adapter.pieces(self)
            if pieces is not None and chain.unsupported_context() is None and chain.inspect_input(x) is None:
                return pieces.run(x, settings)
        return super().forward(x)  # type: ignore[misc]


class BlockAdapter(Adapter):
    """A residual block that is one chain with a shortcut, from its input to its output, or at least in pieces."""

    front = FusedBlock

    @classmethod
    def parts(cls, module: Any) -> Parts | Unsupported:
        """The modules that the block's own forward runs through, or which of them has no place in a chain."""
        raise NotImplementedError

    @classmethod
    def pieces(cls, module: Any) -> Pieces | None:
        """What the block runs through if it is not one chain; None if it then runs its own forward."""
        return None

    @classmethod
    def hindrance(cls, module: Any) -> Unsupported | None:
        """Why the block is not one chain, as far as that is known without an input."""
        parts = cls.parts(module)
        return parts if isinstance(parts, Unsupported) else chain.find_unsupported(*parts)

    @classmethod
    def unsupported_reason(cls, module: Any) -> Unsupported | None:
        hindrance = cls.hindrance(module)
        if hindrance is not None:
            pieces = cls.pieces(module)
            if pieces is not None and runs.find_unsupported(pieces.branch) is None:
                return None
        return hindrance

    @classmethod
    def fused_children(cls, module: Any) -> tuple[str, ...]:
        pieces = cls.pieces(module)
        if pieces is None or cls.hindrance(module) is None:
            return super().fused_children(module)
        inside = {id(child) for run in runs.worthwhile(pieces.branch) for child in run.modules}
        inside |= {id(pieces.join()), id(pieces.activation)}
        return tuple(name for name, child in module._modules.items() if id(child) in inside)


class StemAdapter(Adapter):
    """A network that opens with a chain and a pooling, and goes on with modules, fused or not."""

    children: ClassVar[tuple[str, ...]]  # of the chain; the pooling may be a module with a chain of its own

    @classmethod
    def units(cls, module: Any) -> tuple[Unit, ...] | Unsupported:
        raise NotImplementedError

    @classmethod
    def unsupported_reason(cls, module: Any) -> Unsupported | None:
        units = cls.units(module)
        return units if isinstance(units, Unsupported) else chain.find_unsupported(units)

    @classmethod
    def fused_children(cls, module: Any) -> tuple[str, ...]:
        return cls.children

    @classmethod
    def run(cls, x: Tensor, module: Any, pool: nn.Module) -> Tensor | None:
        """What the network's own forward has behind its stem, or None if it has to run itself."""
        settings = module._fused_res
        units = cls.units(module)
        if settings is None or isinstance(units, Unsupported):
            return None
        # Whatever else someone put there (CIFAR models want no pooling at all) runs behind the chain.
        inside = pool if chain.inspect_pool(pool) is None else None
        output = chain.run_fused(x, units, "none", inside, *settings)
        return output if output is None or inside is not None else pool(output)


def shortcut_of(block: Any) -> Shortcut:
    """Blocks keep None in `downsample` where the shortcut is the input itself."""
    downsample = block.downsample
    return "identity" if downsample is None else downsample


_fused_classes: dict[type[nn.Module], type[nn.Module]] = {}


def fused_class(adapter: type[Adapter], base: type[nn.Module]) -> type[nn.Module]:
    """`base` with the adapter's front before it; always the same class."""
    made = _fused_classes.get(base)
    if made is None:
        namespace = {"_fused_res_adapter": adapter, "__module__": base.__module__, "__doc__": base.__doc__}
        made = _fused_classes[base] = type(f"Fused{base.__name__}", (adapter.front, base), namespace)
        if base is nn.Sequential:
            chain.fused_sequential_types.add(made)
    return made


def base_of(cls: type) -> type[nn.Module] | None:
    """The class that a fused one was made from, or None if `cls` is not one (only derived from one, say)."""
    base = cls.__bases__[-1]
    return base if _fused_classes.get(base) is cls else None


def _rebuild(base: type[nn.Module]) -> nn.Module:
    """An empty module for the unpickler to fill; of the plain class if this version has no adapter for it."""
    from fused_res.fusion.adapters import adapter_for

    adapter = adapter_for(base)
    cls = base if adapter is None else fused_class(adapter, base)
    return cls.__new__(cls)
