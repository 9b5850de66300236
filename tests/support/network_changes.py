"""Changes that a user may make to a model between two calls, applied to two equal models alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils._pytree import tree_leaves, tree_map_only


class Side:
    """One of the two models, and what the changes have attached to it.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.seen: list[tuple[str, Any]] = []  # the values that hooks have received
        self.undo: list[Callable[[], None]] = []  # removes hooks and patches, in reverse order

    def restore(self) -> None:
        while self.undo:
            self.undo.pop()()

    def record(self, label: str, *values: Any) -> None:
        self.seen += [
            (label, value.detach().clone() if isinstance(value, Tensor) else value) for value in tree_leaves(values)
        ]


def halve(value: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t * 0.5 if t.is_floating_point() else t, value)


def pick(candidates: Iterable[Any], index: int) -> Any:
    """Return a candidate, or None if there is none."""
    candidates = list(candidates)
    return candidates[index % len(candidates)] if candidates else None


def module_of(side: Side, target: int, kind: Any = nn.Module) -> tuple[str, Any]:
    found = pick(((n, m) for n, m in side.model.named_modules() if isinstance(m, kind)), target)
    return ("", None) if found is None else found


def train(side: Side, target: int, variant: int) -> None:
    side.model.train()


def evaluate(side: Side, target: int, variant: int) -> None:
    side.model.eval()


def switch_mode(side: Side, target: int, variant: int) -> None:
    module = module_of(side, target)[1]
    module.train(not module.training)


def hook(side: Side, target: int, variant: int) -> None:
    """Add a hook that records, and in two of the five variants changes, what it receives."""
    name, module = module_of(side, target)

    def forward_hook(_: nn.Module, args: Any, output: Any) -> Any:
        side.record(f"hook {name}", args, output)
        return halve(output) if variant % 5 == 1 else None

    def pre_hook(_: nn.Module, args: Any) -> Any:
        side.record(f"pre-hook {name}", args)
        return halve(args) if variant % 5 == 3 else None

    def backward_hook(_: nn.Module, grad_inputs: Any, grad_outputs: Any) -> None:
        side.record(f"backward hook {name}", grad_inputs, grad_outputs)

    registered = (
        module.register_forward_hook(forward_hook)
        if variant % 5 < 2
        else module.register_forward_pre_hook(pre_hook)
        if variant % 5 < 4
        else module.register_full_backward_hook(backward_hook)
    )
    side.undo.append(registered.remove)


def restore(side: Side, target: int, variant: int) -> None:
    side.restore()


class OwnBatchNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.5


def replace_norm(side: Side, target: int, variant: int) -> None:
    name, norm = module_of(side, target, nn.BatchNorm2d)
    if norm is not None:
        channels = norm.num_features
        new = (
            nn.Identity(),
            nn.BatchNorm2d(channels, eps=0.1),
            nn.GroupNorm(1, channels),
            OwnBatchNorm(channels),
            nn.SyncBatchNorm(channels),
        )[variant % 5]
        side.model.set_submodule(name, new.to(next(side.model.parameters()).dtype).train(norm.training))


def wrap_child(side: Side, target: int, variant: int) -> None:
    """Replace a child by a Sequential of it and another module, or of it alone."""
    name, child = module_of(side, target)
    if name:
        more = ([nn.Tanh()], [], [nn.ReLU(inplace=True)])[variant % 3]
        side.model.set_submodule(name, nn.Sequential(child, *more).train(child.training))


def replace_activation(side: Side, target: int, variant: int) -> None:
    name, activation = module_of(side, target, nn.ReLU)
    if activation is not None:
        side.model.set_submodule(name, (nn.Sigmoid(), nn.LeakyReLU(0.1), nn.Identity(), nn.ReLU())[variant % 4])


def drop_shortcut(side: Side, target: int, variant: int) -> None:
    module = module_of(side, target)[1]
    if "shortcut" in module._modules:
        module.shortcut = None


def flip_flag(side: Side, target: int, variant: int) -> None:
    """Flip a bool attribute, such as nn.ReLU.inplace or a flag that a forward reads."""
    flags = [
        (module, name)
        for module in side.model.modules()
        for name, value in vars(module).items()
        if isinstance(value, bool) and not name.startswith("_") and name != "training"
    ]
    if flags:
        module, name = pick(flags, target)
        setattr(module, name, not getattr(module, name))


def change_option(side: Side, target: int, variant: int) -> None:
    """Change an option of a layer, or the dict that a forward reads."""
    options = [m for m in side.model.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    options += [v for m in side.model.modules() for v in vars(m).values() if isinstance(v, dict) and "gain" in v]
    chosen = pick(options, target)
    if isinstance(chosen, nn.Conv2d):
        chosen.padding, chosen._reversed_padding_repeated_twice = (0, 0), [0, 0, 0, 0]
    elif isinstance(chosen, nn.BatchNorm2d):
        name, value = (("momentum", 0.5), ("momentum", None), ("eps", 0.1))[variant % 3]
        setattr(chosen, name, value)
    elif chosen is not None:
        chosen["gain"] = 2.0


def patch_instance(side: Side, target: int, variant: int) -> None:
    module = module_of(side, target)[1]
    name = "_conv_forward" if isinstance(module, nn.Conv2d) and variant % 2 else "forward"
    original = getattr(module, name)
    had = name in vars(module)
    setattr(module, name, lambda *args, **kwargs: halve(original(*args, **kwargs)))
    side.undo.append(lambda: setattr(module, name, original) if had else delattr(module, name))


def switch_requires_grad(side: Side, target: int, variant: int) -> None:
    for parameter in module_of(side, target)[1].parameters():
        if parameter.is_leaf:
            parameter.requires_grad_(not parameter.requires_grad)


def write_tensor(side: Side, target: int, variant: int) -> None:
    """Write to a parameter or floating-point buffer, or replace it, in ways that PyTorch counts."""
    owners = [
        (owner, name)
        for module in side.model.modules()
        for owner in (module._parameters, module._buffers)
        for name, value in owner.items()
        if value is not None and value.is_floating_point()
    ]
    if owners:
        owner, name = pick(owners, target)
        tensor = owner[name]
        if variant % 3 == 0:
            with torch.no_grad():
                tensor.mul_(0.5)
        elif variant % 3 == 1:
            tensor.data = tensor.data * 0.5
        else:
            with torch.no_grad():
                new = tensor * 0.5
            owner[name] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


def write_uncounted(side: Side, target: int, variant: int) -> None:
    """Write through ``.data``, which PyTorch does not count."""
    parameter = pick(side.model.parameters(), target)
    if parameter is not None:
        parameter.data.mul_(0.5)


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.5


def derive_weight(side: Side, target: int, variant: int) -> None:
    """Prune or parametrize a convolution's weight."""
    conv = module_of(side, target, nn.Conv2d)[1]
    if conv is not None and "weight" in conv._parameters:
        if variant % 2:
            prune.l1_unstructured(conv, "weight", 0.3)
        else:
            parametrize.register_parametrization(conv, "weight", Halved())


#: Changes of one side's model, after which a frozen model must equal stock, too.
FROZEN = {
    f.__name__: f
    for f in (
        hook,
        restore,
        replace_norm,
        wrap_child,
        replace_activation,
        drop_shortcut,
        flip_flag,
        change_option,
        patch_instance,
        write_tensor,
    )
}
#: All changes of one side's model.
LOCAL = {
    f.__name__: f for f in (evaluate, train, switch_mode, switch_requires_grad, write_uncounted, derive_weight)
} | FROZEN


def patch_class(stock: nn.Module, generated: Any, target: int, variant: int) -> Callable[[], None]:
    """Replace the forward, or Conv2d._conv_forward, of the class of one of the stock model's modules."""
    module = pick(stock.modules(), target)
    cls, name = type(module), "_conv_forward" if isinstance(module, nn.Conv2d) and variant % 2 else "forward"
    original, had = getattr(cls, name), name in vars(cls)
    setattr(cls, name, lambda *args, **kwargs: halve(original(*args, **kwargs)))
    return lambda: setattr(cls, name, original) if had else delattr(cls, name)


def set_global(stock: nn.Module, generated: Any, target: int, variant: int) -> Callable[[], None]:
    """Change a global, or a class attribute, that a forward reads."""
    gains = [(cls, "gain") for cls in vars(generated).values() if isinstance(cls, type) and "gain" in vars(cls)]
    found = pick(([(generated, "SCALE")] if hasattr(generated, "SCALE") else []) + gains, target)
    if found is None:
        return lambda: None
    original = getattr(*found)
    setattr(*found, 2.0)
    return lambda: setattr(*found, original)


def replace_helper(stock: nn.Module, generated: Any, target: int, variant: int) -> Callable[[], None]:
    """Replace a function of the network's module."""
    name = pick((n for n in ("rectify", "merge") if hasattr(generated, n)), target)
    if name is None:
        return lambda: None
    original = getattr(generated, name)
    setattr(generated, name, lambda *args: original(*args) * 0.5)
    return lambda: setattr(generated, name, original)


def hook_all(stock: nn.Module, generated: Any, target: int, variant: int) -> Callable[[], None]:
    """Add a hook on all modules of the process."""
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: halve(output))
    return handle.remove


#: Changes that both sides share; each returns the function that reverts it.
SHARED = {f.__name__: f for f in (patch_class, set_global, replace_helper, hook_all)}
