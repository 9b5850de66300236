"""Parts of :func:`fused_res.check` that do not depend on fusing: reproducible runs, named tensors, errors in units."""

from __future__ import annotations

import contextlib
import math
import random
import statistics
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.overrides import TorchFunctionMode

#: Allowed error in units of stock PyTorch's error, as in fused_res.testing.assert_within_stock_error.
ALLOWED = 2.0
#: Allowed difference between fused and stock in float64, relative to a tensor's largest value. No mask flips there, and
#: rounding stays below 1e-11; an error of the implementation is larger.
ALLOWED_FLOAT64 = 1e-8
_SEED = 0
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_CASTS = (Tensor.float, Tensor.bfloat16, Tensor.half)

Named = dict[str, Tensor]


# Running a model


class Float64Mode(TorchFunctionMode):
    """Replace the float dtypes that a forward names by float64: `x.float()`, `x.to(torch.bfloat16)`, `dtype=...`."""

    used = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def replace(value: Any) -> Any:
            if not isinstance(value, torch.dtype) or value not in _FLOATS:
                return value
            self.used = True
            return torch.float64

        if func in _CASTS:
            self.used, func = True, Tensor.double
        return func(*map(replace, args), **{name: replace(one) for name, one in (kwargs or {}).items()})


def seed(device: torch.device) -> None:
    """Seed the generators of torch, Python and, if it is imported, NumPy."""
    torch.default_generator.manual_seed(_SEED)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(_SEED)
    random.seed(_SEED)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(_SEED)


@contextlib.contextmanager
def restored_random_state() -> Iterator[None]:
    """Restore the global generators of torch, Python and, if it is imported, NumPy."""
    numpy = sys.modules.get("numpy")
    state, numpy_state = random.getstate(), None if numpy is None else numpy.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


def named_tensors(name: str, value: Any) -> Named:
    """Return all tensors in a nesting of mappings, sequences and attributes of objects, with their paths."""
    found: Named = {}
    seen: set[int] = set()

    def visit(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            found[name] = value
            return
        if isinstance(value, str | bytes | int | float | None | type | nn.Module) or id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, Mapping):
            for key, one in value.items():
                visit(f"{name}[{key!r}]", one)
        elif isinstance(value, list | tuple):
            for index, one in enumerate(value):
                visit(f"{name}[{index}]", one)
        else:
            slots = [slot for cls in type(value).__mro__ for slot in getattr(cls, "__slots__", ())]
            for attribute in (*getattr(value, "__dict__", ()), *slots):
                visit(f"{name}.{attribute}", getattr(value, attribute, None))

    visit(name, value)
    return found


def backward(outputs: Named) -> None:
    """Run the backward of a projection of all outputs on fixed random signs, which are exact in every dtype."""
    generator = torch.Generator().manual_seed(_SEED)
    differentiable = [output for output in outputs.values() if output.requires_grad]
    signs = [torch.randint(0, 2, output.shape, generator=generator) * 2 - 1 for output in differentiable]
    grads = [sign.to(output) for sign, output in zip(signs, differentiable, strict=True)]
    if differentiable:
        torch.autograd.backward(differentiable, grads)


def count_stock_norms(outputs: Iterable[Tensor]) -> int:
    """Return the number of PyTorch's batch norms in the autograd graph; those of this package have other names."""
    stack: list[Node | None] = [output.grad_fn for output in outputs]
    visited: set[Node | None] = {None}
    count = 0
    while stack:
        node = stack.pop()
        if node in visited or node is None:
            continue
        visited.add(node)
        count += node.name().endswith("BatchNormBackward0")
        stack += [following for following, _ in node.next_functions]
    return count


class _Packed:
    """A saved tensor, alive as long as the autograd graph refers to it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # a saved output would otherwise refer to the node that holds it


def saved_bytes(forward: Callable[[], Any], model: nn.Module) -> int:
    """Return the bytes of all storages that a forward saves for its backward, except parameters and buffers."""
    packed: weakref.WeakSet[_Packed] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Packed:
        item = _Packed(tensor)
        packed.add(item)
        return item

    with saved_tensors_hooks(pack, lambda item: item.tensor):
        output = forward()
    storages = [item.tensor.untyped_storage() for item in packed]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    for tensor in (*model.parameters(), *model.buffers()):
        sizes.pop(tensor.untyped_storage().data_ptr(), None)
    del output
    return sum(sizes.values())


# Judging tensors


class Errors:
    """Errors of the tensors of one kind, relative to each tensor's largest value; of several runs, see `_RUNS`."""

    def __init__(self) -> None:
        self.ours: dict[str, float] = {}
        self.stock: dict[str, float] = {}
        self.last_place: dict[str, float] = {}
        self.mismatches: dict[str, str] = {}  # errors that are not errors of values

    def add(self, ours: Named, stock: Named, exact: Named) -> None:
        """Add the tensors of a run."""
        scales = {name: _largest(tensor) for name, tensor in exact.items()}
        largest = max(scales.values(), default=0.0)
        for name in {**stock, **ours}:
            if name not in ours or name not in stock:
                self.mismatch(name, f"exists in the {'stock' if name in stock else 'fused'} model only")
                continue
            a, b, reference = ours[name], stock[name], exact[name]
            if a.dtype != b.dtype or a.shape != b.shape or a.device != b.device:
                kinds = (f"{t.dtype} {tuple(t.shape)} on {t.device}" for t in (a, b))
                self.mismatch(name, " instead of ".join(kinds))
                continue
            # A tensor that is zero except for float64's rounding, such as the gradient of a convolution's bias before a
            # batch norm, has no scale of its own.
            scale = scales[name] if scales[name] > 1e-9 * largest else largest
            if b.is_floating_point():
                self.last_place[name] = ALLOWED_FLOAT64 / 4 if b.dtype is torch.float64 else torch.finfo(b.dtype).eps
                scale = max(scale, torch.finfo(b.dtype).smallest_normal)
            else:  # the error is the share of differing elements: an argmax may differ by rounding
                self.last_place[name], scale = 0.0025, 1.0
            self.ours[name] = min(self.ours.get(name, math.inf), _error(a, b, reference) / scale)
            self.stock[name] = max(self.stock.get(name, 0.0), _error(b, b, reference) / scale)

    def mismatch(self, name: str, text: str) -> None:
        self.ours[name], self.mismatches[name] = math.inf, text
        self.stock[name] = self.last_place[name] = 0.0

    def typical(self) -> float:
        """Return the median of stock's errors."""
        return statistics.median(self.stock.values()) if self.stock else 0.0

    def in_units(self) -> dict[str, float]:
        """Return our errors in units such that `ALLOWED` units are twice stock's error plus four in the last place.

        In float64, where stock is the reference, they are `ALLOWED_FLOAT64`. Stock's error in a tensor of a few
        elements is small at times, by chance: it counts at least as the median.
        """
        typical = self.typical()
        units = {name: max(error, typical) + 2 * self.last_place[name] for name, error in self.stock.items()}
        return {name: math.inf if name in self.mismatches else error / units[name] for name, error in self.ours.items()}

    def exceeded(self) -> list[str]:
        return [name for name, error in self.in_units().items() if not error <= ALLOWED]

    def describe(self, name: str) -> str:
        text = f"error {self.ours[name]:.1e} of the largest value, stock's {self.stock[name]:.1e}"
        return self.mismatches.get(name, text)


def _largest(tensor: Tensor) -> float:
    finite = tensor.detach().double().nan_to_num(0.0, 0.0, 0.0).abs()
    return finite.max().item() if tensor.numel() else 0.0


def _error(ours: Tensor, stock: Tensor, exact: Tensor) -> float:
    """Return the largest error of finite elements; of tensors that are not float, the share of differing elements.

    Elements that are not finite in the stock model or in float64 are not compared.
    """
    if not ours.numel():
        return 0.0
    if not ours.is_floating_point():
        return (ours != exact.to(ours.dtype)).double().mean().item()
    error = (ours.double() - exact.double()).abs().nan_to_num(math.inf)
    return error.where(stock.isfinite() & exact.isfinite(), 0.0).max().item()
