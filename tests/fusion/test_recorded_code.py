"""Code that a symbolic recording could misread: `fuse` and `freeze` compute what it computes, or run stock.

A recording runs a forward once, with proxies. Whatever decides the path of the forward and is not recorded as an
operation has to be read correctly, verified on every call, or refused.
"""

from __future__ import annotations

import argparse
import copy
import functools
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from fused_res import freeze, fuse
from tests.support.model_comparison import assert_near, randomize_norms, record_fused_calls


class Body(nn.Module):
    """Two convolutions with norms, which subclasses call in unusual ways."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.prepare()

    def prepare(self) -> None:
        """Add what a subclass needs."""

    def first(self, x: Tensor) -> Tensor:
        return self.relu(self.bn1(self.conv1(x)))

    def second(self, y: Tensor) -> Tensor:
        return self.relu(self.bn2(self.conv2(y)) + y)

    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        return self.second(y * 2 if self.is_doubled(x, y) else y)

    def is_doubled(self, x: Tensor, y: Tensor) -> Any:
        return True


# Types and equality of values


class ListAttribute(Body):
    def prepare(self) -> None:
        self.sizes = [1, 2]

    def is_doubled(self, x: Tensor, y: Tensor) -> Any:
        return isinstance(self.sizes, list) and self.sizes == [1, 2]


class DictAttribute(Body):
    def prepare(self) -> None:
        self.options = {"gains": OrderedDict(last=[2.0])}

    def is_doubled(self, x: Tensor, y: Tensor) -> Any:
        return isinstance(self.options, dict) and isinstance(self.options["gains"], OrderedDict)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.options["gains"]["last"][0]


class SetAttribute(Body):
    def prepare(self) -> None:
        self.names = {"relu", "norm"}

    def is_doubled(self, x: Tensor, y: Tensor) -> Any:
        return isinstance(self.names, set) and "relu" in self.names


class NestedClassAttribute(Body):
    GAINS = ({"gain": 1.0}, {"gain": 2.0})

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.GAINS[1]["gain"]


class ScalarAttribute(Body):
    def prepare(self) -> None:
        self.gain, self.gains = 2.0, [2.0]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain * self.gains[0]


class ShapeInSet(Body):
    def is_doubled(self, x: Tensor, y: Tensor) -> Any:
        return x.size(2) in {6, 8}


class ShapeAsKey(Body):
    def prepare(self) -> None:
        self.table = {(2, 3, 6, 6): True}

    def is_doubled(self, x: Tensor, y: Tensor) -> Any:
        return self.table.get(x.shape, False)


class FormattedShape(Body):
    def prepare(self) -> None:
        self.table = {"3": True}

    def is_doubled(self, x: Tensor, y: Tensor) -> Any:
        return self.table.get(f"{x.shape[1]}", False)


class StringOfShape(FormattedShape):
    def is_doubled(self, x: Tensor, y: Tensor) -> Any:
        return self.table.get(str(x.shape[1]), False)


class PercentFormat(FormattedShape):
    def is_doubled(self, x: Tensor, y: Tensor) -> Any:
        return self.table.get("%s" % (x.shape[1],), False)  # noqa: UP031


class DtypeInSet(Body):
    def is_doubled(self, x: Tensor, y: Tensor) -> Any:
        return x.dtype in {torch.float64}


class MatchedShape(Body):
    def is_doubled(self, x: Tensor, y: Tensor) -> Any:
        match x.shape:
            case [_, _, _, _]:
                return True
        return False


class ModuleWithBool(Body):
    def __bool__(self) -> bool:
        return False


class BoolOfModule(Body):
    def prepare(self) -> None:
        if type(self) is BoolOfModule:
            self.child = ModuleWithBool()

    def is_doubled(self, x: Tensor, y: Tensor) -> Any:
        return not self.child


# Identity


class DtypeIdentity(Body):
    def is_doubled(self, x: Tensor, y: Tensor) -> Any:
        return x.dtype is torch.float64


class FlagIdentity(Body):
    def is_doubled(self, x: Tensor, y: Tensor) -> Any:
        return y.requires_grad is True


class TensorIdentity(Body):
    def is_doubled(self, x: Tensor, y: Tensor) -> Any:
        z = y + 1
        return F.relu_(z) is z


class ModuleIdentity(Body):
    def prepare(self) -> None:
        self.alias = self.relu

    def is_doubled(self, x: Tensor, y: Tensor) -> Any:
        return self.alias is self.relu


class ClassIdentity(Body):
    def is_doubled(self, x: Tensor, y: Tensor) -> Any:
        return self.relu.__class__ is nn.ReLU


class ClassEquality(Body):
    def is_doubled(self, x: Tensor, y: Tensor) -> Any:
        return self.relu.__class__ == nn.ReLU


class NoGradient(Body):
    def is_doubled(self, x: Tensor, y: Tensor) -> Any:
        return x.grad is None


class NoHistory(Body):
    def is_doubled(self, x: Tensor, y: Tensor) -> Any:
        return x.grad_fn is None


class MissingAttribute(Body):
    def is_doubled(self, x: Tensor, y: Tensor) -> Any:
        return not hasattr(x, "tensors")


class Opaque(nn.Module):
    """A module that cannot be recorded."""

    def __init__(self, returned: Any = None) -> None:
        super().__init__()
        self.returned, self.calls = returned, [0]

    def forward(self, x: Tensor, into: Any = None) -> Any:
        self.calls[0] += 1
        if isinstance(into, list):
            into.append(x * 2)
        elif isinstance(into, dict):
            into["doubled"] = True
        return self.returned


class NoneFromModule(Body):
    def prepare(self) -> None:
        self.child = Opaque()

    def is_doubled(self, x: Tensor, y: Tensor) -> Any:
        found = self.child(y)
        return found is None


class NoneFromLayer(Body):
    def prepare(self) -> None:
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        tokens = y.flatten(2).transpose(1, 2)
        tokens, weights = self.attention(tokens, tokens, tokens, need_weights=False)
        y = y + tokens.transpose(1, 2).reshape_as(y)
        return self.second(y * 2 if weights is None else y)


# Side effects


class CountingClass(Body):
    calls = 0

    def is_doubled(self, x: Tensor, y: Tensor) -> Any:
        __class__.calls += 1  # type: ignore[name-defined]
        return __class__.calls % 2  # type: ignore[name-defined]


class ListForModule(Body):
    def prepare(self) -> None:
        self.child = Opaque()

    def forward(self, x: Tensor) -> Any:
        found: list[Tensor] = []
        y = self.first(x)
        self.child(y, found)
        return self.second(y), found


class DictForModule(ListForModule):
    def forward(self, x: Tensor) -> Any:
        found: dict[str, bool] = {}
        y = self.first(x)
        self.child(y, found)
        return self.second(y * 2 if found.get("doubled") else y)


class Collecting(Body):
    def forward(self, x: Tensor, into: Any = None) -> Any:
        y = self.first(x)
        into.append(y)
        return self.second(y)


class ListForRecordedModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = Collecting()

    def forward(self, x: Tensor) -> Any:
        found: list[Tensor] = []
        return self.child(x, found), found


class ListForRecordedModuleOfStock(ListForRecordedModule):
    def __init__(self) -> None:
        super().__init__()
        self.calls = [0]

    def forward(self, x: Tensor) -> Any:
        self.calls[0] += 1
        return super().forward(x)


class GrowingSequential(Body):
    def prepare(self) -> None:
        self.layers = nn.Sequential(nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        self.layers.append(self.layers[0])
        return self.second(self.layers(self.first(x)))


class ClearedChildren(GrowingSequential):
    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.layers(self.first(x)))
        self.layers._modules.clear()
        return y


CALLS = [0]


def count(x: Tensor) -> Tensor:
    CALLS[0] += 1
    return x * 2


def apply(x: Tensor, function: Callable[[Tensor], Tensor] = count) -> Tensor:
    return function(x)


class FunctionAsDefault(Body):
    def forward(self, x: Tensor) -> Tensor:
        return apply(super().forward(x))


class WrittenWeight(Body):
    """Write a convolution's weight after the convolution and before its norm."""

    def first(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        self.conv1.weight.data.mul_(0.5)
        return self.relu(self.bn1(y))


# Changes after fuse


class OptionalParameter(Body):
    def prepare(self) -> None:
        self.gain = nn.Parameter(torch.full((4, 1, 1), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.gain is None else y * self.gain


class TorchSetting(Body):
    def is_doubled(self, x: Tensor, y: Tensor) -> Any:
        return torch.backends.cudnn.benchmark


class Edited(Body):
    """A forward whose code is replaced, as IPython's autoreload does."""

    def is_doubled(self, x: Tensor, y: Tensor) -> Any:
        return True


def scaled(x: Tensor, gain: float = 2.0) -> Tensor:
    return x * gain


class EditedDefault(Body):
    def forward(self, x: Tensor) -> Tensor:
        return scaled(super().forward(x))


class HiddenBuiltin(Body):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * max(1.0, 2.0)


class LogsSize(Body):
    """Formats a size for a function that is no assertion."""

    def prepare(self) -> None:
        self.gains = {"6": 2.0, "": 3.0}

    def keep(self, y: Tensor, key: str) -> None:
        y *= self.gains[key]

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x) * 1
        self.keep(y, f"{x.shape[-1]}")
        return y


class Options:
    """A configuration object."""

    offset = 1.0

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


class OtherOptions(Options):
    gain = 7.0

    def __getattribute__(self, name: str) -> Any:
        return 5.0 if name == "gain" else super().__getattribute__(name)


class FalsyOptions(Options):
    def __bool__(self) -> bool:
        return False


class SlotOptions:
    __slots__ = ("gain",)


class ComputedOptions(Options):
    reads = 0

    @property
    def gain(self) -> float:
        ComputedOptions.reads += 1
        return float(self.reads)


class ConfigurationObject(Body):
    def prepare(self) -> None:
        self.options = Options(gain=2.0, double=True, names=["relu"], inner=types.SimpleNamespace(gains=(1.0, 2.0)))
        self.slots = SlotOptions()
        self.slots.gain = 2.0
        self.parsed = argparse.Namespace(power=2)

    def is_doubled(self, x: Tensor, y: Tensor) -> Any:
        return self.options.double and "relu" in self.options.names and not hasattr(self.options, "missing")

    def forward(self, x: Tensor) -> Tensor:
        options = self.options
        y = super().forward(x) * options.gain * options.inner.gains[1] + options.offset * self.slots.gain
        return y * self.parsed.power if options is not None and options else y


class ComputedOption(Body):
    def prepare(self) -> None:
        self.options = ComputedOptions()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.options.gain


class ConfigurationIsWritten(Body):
    def prepare(self) -> None:
        self.options = Options(count=0)

    def forward(self, x: Tensor) -> Tensor:
        self.options.count += 1
        return super().forward(x) * self.options.count


class ConfigurationIsCompared(Body):
    def prepare(self) -> None:
        self.options, self.other = Options(gain=2.0), Options(gain=2.0)

    def is_doubled(self, x: Tensor, y: Tensor) -> Any:
        return self.options == self.other


MODULES: list[type[nn.Module]] = [
    LogsSize, ConfigurationObject, ComputedOption, ConfigurationIsWritten, ConfigurationIsCompared,
    ListAttribute, DictAttribute, SetAttribute, NestedClassAttribute, ScalarAttribute, ShapeInSet, ShapeAsKey,
    FormattedShape, StringOfShape, PercentFormat, DtypeInSet, MatchedShape, BoolOfModule, DtypeIdentity, FlagIdentity,
    TensorIdentity, ModuleIdentity, ClassIdentity, ClassEquality, NoGradient, NoHistory, MissingAttribute,
    NoneFromModule, NoneFromLayer, CountingClass, ListForModule, DictForModule, ListForRecordedModule,
    ListForRecordedModuleOfStock, GrowingSequential, ClearedChildren, FunctionAsDefault, WrittenWeight,
    OptionalParameter,
]  # fmt: skip
#: Modules in which the whole body runs fused all the same.
FUSED = (
    *(ListAttribute, DictAttribute, SetAttribute, NestedClassAttribute, ScalarAttribute, OptionalParameter),
    ConfigurationObject,
)


def set_all(name: str, value: Any) -> Callable[[nn.Module], None]:
    return lambda model: setattr(model, name, value)


def own_gain() -> Tensor:
    return torch.full((4, 1, 1), 3.0, dtype=torch.float64)


#: Changes of a model after `fuse` and `freeze`.
CHANGES: dict[str, tuple[type[nn.Module], Callable[[Any], None]]] = {
    "nested dict": (DictAttribute, lambda model: model.options["gains"]["last"].__setitem__(0, 5.0)),
    "number to tensor": (ScalarAttribute, set_all("gain", own_gain())),
    "number to scalar tensor": (ScalarAttribute, set_all("gain", torch.tensor(2.0).double().requires_grad_())),
    "number in a list to tensor": (ScalarAttribute, set_all("gains", [own_gain()])),
    "list to None": (ScalarAttribute, set_all("gains", None)),
    "list to array": (ScalarAttribute, set_all("gains", np.array([3.0, 4.0]))),
    "option": (ConfigurationObject, lambda model: setattr(model.options, "gain", 3.0)),
    "type of an option": (ConfigurationObject, lambda model: setattr(model.options, "double", 0)),
    "list among the options": (ConfigurationObject, lambda model: model.options.names.clear()),
    "nested option": (ConfigurationObject, lambda model: setattr(model.options.inner, "gains", (1.0, 3.0))),
    "nested options": (ConfigurationObject, lambda model: setattr(model.options, "inner", Options(gains=(1, 3.0)))),
    "option in a slot": (ConfigurationObject, lambda model: setattr(model.slots, "gain", 3.0)),
    "missing option": (ConfigurationObject, lambda model: setattr(model.options, "missing", None)),
    "default option": (ConfigurationObject, lambda model: setattr(model.options, "offset", 2.0)),
    "parsed option": (ConfigurationObject, lambda model: setattr(model.parsed, "power", 3)),
    "deleted option": (ConfigurationObject, lambda model: delattr(model.options, "gain")),
    "options": (ConfigurationObject, set_all("options", Options(gain=4.0, double=False))),
    "options to None": (ConfigurationObject, set_all("options", None)),
    "class of the options": (ConfigurationObject, lambda model: setattr(model.options, "__class__", OtherOptions)),
    "truth of the options": (ConfigurationObject, lambda model: setattr(model.options, "__class__", FalsyOptions)),
    "parameter to None": (OptionalParameter, set_all("gain", None)),
}


def edit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Edited.is_doubled, "__code__", (lambda self, x, y: False).__code__)


#: Changes of what both models share.
SHARED_CHANGES: dict[str, tuple[type[nn.Module], Callable[[pytest.MonkeyPatch], None]]] = {
    "nested class attribute": (NestedClassAttribute, lambda m: m.setitem(NestedClassAttribute.GAINS[1], "gain", 5.0)),
    "setting of torch": (TorchSetting, lambda m: m.setattr(torch.backends.cudnn, "benchmark", True)),
    "code": (Edited, edit_code),
    "default of an option": (ConfigurationObject, lambda m: m.setattr(Options, "offset", 3.0)),
    "default argument": (EditedDefault, lambda m: m.setattr(scaled, "__defaults__", (5.0,))),
    "hidden builtin": (HiddenBuiltin, lambda m: m.setitem(globals(), "max", min)),
}


def make(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return randomize_norms(kind()).double()


def call(model: nn.Module, grad: bool) -> tuple[list[Any], list[Tensor | None]]:
    """Return the outputs, or the exception's type, and the gradients of a call; class counters start at 0."""
    CountingClass.calls = ComputedOptions.reads = CALLS[0] = 0
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=grad)
    with torch.set_grad_enabled(grad):
        try:
            outputs = tree_leaves(model(x))
        except Exception as error:
            return [type(error)], []
    if grad:
        sum((output**2).sum() for output in outputs).backward()
    return [*outputs, CountingClass.calls, CALLS[0]], [x.grad, *(p.grad for p in model.parameters())]


def assert_same_call(ours: nn.Module, stock: nn.Module, grad: bool) -> None:
    (actual, gradients), (expected, expected_gradients) = call(ours, grad), call(stock, grad)
    assert len(actual) == len(expected)
    for mine, theirs in zip(actual + gradients, expected + expected_gradients, strict=True):
        if isinstance(theirs, Tensor):
            # A bias before a norm has a gradient of zero, up to the rounding of terms of about 1e3: 1.3e-11 on a Xeon.
            assert_near(mine, theirs, "output or gradient", tolerance=1e-9)
        else:
            assert mine == theirs
    for (name, tensor), (key, other) in zip(ours.state_dict().items(), stock.state_dict().items(), strict=True):
        assert name == key
        assert_near(tensor, other, name)
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in stock.named_modules()]


def pairs(kind: type[nn.Module]) -> Iterator[tuple[nn.Module, nn.Module, bool]]:
    """Yield a fused and a frozen model, each with its stock counterpart and whether gradients are compared."""
    for frozen in (False, True):
        stock = make(kind)
        CountingClass.calls = ComputedOptions.reads = CALLS[0] = 0
        ours = freeze(stock) if frozen else fuse(copy.deepcopy(stock))
        assert CountingClass.calls == ComputedOptions.reads == CALLS[0] == 0, "recording has run code with side effects"
        yield ours, stock.eval() if frozen else stock, not frozen


@pytest.mark.parametrize("kind", MODULES, ids=lambda kind: kind.__name__)
def test_code_runs_as_written(kind: type[nn.Module]) -> None:
    for ours, stock, grad in pairs(kind):
        for _ in range(2):
            assert_same_call(ours, stock, grad)


@pytest.mark.parametrize("kind", FUSED, ids=lambda kind: kind.__name__)
def test_code_that_is_understood_is_fused(kind: type[nn.Module]) -> None:
    with record_fused_calls() as calls:
        fuse(make(kind))(torch.randn(2, 3, 6, 6, dtype=torch.float64))
    assert len(calls) == 2


@pytest.mark.parametrize("name", CHANGES)
def test_change_is_detected(name: str) -> None:
    kind, change = CHANGES[name]
    for ours, stock, grad in pairs(kind):
        assert_same_call(ours, stock, grad)
        change(ours)
        change(stock)
        assert_same_call(ours, stock, grad)


@pytest.mark.parametrize("name", SHARED_CHANGES)
def test_shared_change_is_detected(name: str) -> None:
    kind, change = SHARED_CHANGES[name]
    for ours, stock, grad in pairs(kind):
        assert_same_call(ours, stock, grad)
        with pytest.MonkeyPatch.context() as monkeypatch:
            change(monkeypatch)
            assert_same_call(ours, stock, grad)


class Variadic(Body):
    def forward(self, *tensors: Tensor, **options: Any) -> Any:
        return super().forward(tensors[0])


class CallsVariadic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = Variadic()

    def forward(self, x: Tensor) -> Any:
        return self.child(x, scale=2)


def test_variadic_forward_is_fused_inside_another() -> None:
    with record_fused_calls() as calls:
        fuse(make(CallsVariadic))(torch.randn(2, 3, 6, 6, dtype=torch.float64))
    assert len(calls) == 2
    for ours, stock, grad in pairs(CallsVariadic):
        assert_same_call(ours, stock, grad)


class VariadicRoot(Body):
    def forward(self, x: Tensor, *tensors: Tensor, gain: Any, **options: Any) -> Any:
        return super().forward(x) * gain + sum(tensors) + options.get("offset", 0.0)


@pytest.mark.parametrize(
    ("arguments", "options", "fused"),
    [((), {}, 2), ((1.0,), {}, 0), ((), {"offset": 3.0}, 0), ((2.0,), {"offset": 3.0}, 0)],
)
def test_variadic_forward(arguments: tuple[float, ...], options: dict[str, float], fused: int) -> None:
    """It is recorded without further arguments, and runs stock with any."""
    x, gain = torch.randn(2, 3, 6, 6, dtype=torch.float64), torch.full((4, 1, 1), 2.0, dtype=torch.float64)
    for ours, stock, trained in pairs(VariadicRoot):
        with record_fused_calls() as calls:
            actual = ours(x, *arguments, gain=gain, **options)
        assert len(calls) == fused or not trained
        assert_near(actual, stock(x, *arguments, gain=gain, **options), "output")
        assert_near(ours(x, gain=2.0), stock(x, gain=2.0), "output with a number in place of a tensor")


class AssertsSize(Body):
    """Checks sizes as timm's patch embeddings do, also of an intermediate tensor."""

    size = 6

    def forward(self, x: Tensor) -> Tensor:
        _, _, height, width = x.shape
        torch._assert(height == self.size, f"height {height} is not {self.size}")
        torch._assert(width == self.size, f"{width}")
        return super().forward(x)


class AssertsSizeOfIntermediate(Body):
    """The norm of the child and the addition are one segment."""

    def prepare(self) -> None:
        self.first_conv, self.child = nn.Conv2d(3, 3, 1, stride=2), AssertsSize()

    def forward(self, x: Tensor) -> Tensor:
        return self.child(self.first_conv(x)) + 1


class AssertsSizeOfOutput(Body):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        torch._assert(y.shape[-2] == 6, f"height {y.shape[-2]} is not 6 in {y.ndim} dimensions")
        return y


@pytest.mark.parametrize(
    ("kind", "size"), [(AssertsSize, 6), (AssertsSizeOfIntermediate, 12), (AssertsSizeOfOutput, 6)]
)
def test_messages_of_assertions(kind: type[nn.Module], size: int) -> None:
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    for ours, stock, trained in pairs(kind):
        with record_fused_calls() as calls:
            actual = ours(x)
        assert len(calls) == 2 or not trained
        assert_near(actual, stock(x), "output")
        for model in (ours, stock):
            with pytest.raises(AssertionError, match="height 5 is not 6"):
                model(x[:, :, : 10 if size == 12 else 5])


class PadsToEvenSize(Body):
    """Pads by the remainder of a size, as TensorFlow's convolutions do."""

    def forward(self, x: Tensor) -> Tensor:
        height = int(x.shape[-2])
        pad = 0 if height % 2 == 0 else 2 - int(height % 2)
        return super().forward(F.pad(x, [0, 0, 0, pad]) if pad else x)


@pytest.mark.parametrize("height", [6, 7])
def test_integers_of_sizes(height: int) -> None:
    x = torch.randn(2, 3, height, 6, dtype=torch.float64)
    for ours, stock, trained in pairs(PadsToEvenSize):
        with record_fused_calls() as calls:
            actual = ours(x)
        assert len(calls) == (2 if height == 6 else 0) or not trained
        assert_near(actual, stock(x), "output")


def with_default(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(self: Any, x: Tensor, gain: float = 3.0) -> Any:
        return function(self, x, gain)

    return wrapper


class Decorated(Body):
    """A decorated forward, whose signature is not that of the function that it wraps."""

    @with_default
    def forward(self, x: Tensor, gain: float = 2.0) -> Tensor:
        return self.second(self.first(x)) * gain


@pytest.mark.parametrize("arguments", [(), (2.0,), (3.0,)])
def test_decorated_forward_has_the_wrappers_defaults(arguments: tuple[float, ...]) -> None:
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    for ours, stock, _ in pairs(Decorated):
        assert_near(ours(x, *arguments), stock(x, *arguments), "output")


class Stages(nn.Module):
    """Branches in a list that is written in place, as in HRNet; norms and additions of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)) for _ in "ab"])
        self.fuse = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        for index, branch in enumerate(self.branches):
            tensors[index] = branch(tensors[index])
        return [F.relu(tensors[0] + self.fuse(tensors[1])), tensors[1]]


class CallsStages(Body):
    def prepare(self) -> None:
        self.stages = nn.Sequential(Stages(), Stages())

    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        given = [y, y * 2]
        return self.second(self.stages(given)[0]), given


class AssertsIntermediateSize(Body):
    """Selective kernels: an assertion about the size of an intermediate tensor."""

    def first(self, x: Tensor) -> Tensor:
        y = super().first(x)
        y = torch.stack([y, y], 1)
        torch._assert(y.shape[1] == self.paths, "two paths")
        torch._assert(x.ndim == 4, f"expected rank 4, got {x.ndim}")
        return y.sum(1)

    def prepare(self) -> None:
        self.paths = 2


@pytest.mark.parametrize(("kind", "expected"), [(CallsStages, 8), (AssertsIntermediateSize, 2)])
def test_unusual_code_is_fused(kind: type[nn.Module], expected: int) -> None:
    model = fuse(make(kind))
    with record_fused_calls() as calls:
        model(torch.randn(2, 3, 6, 6, dtype=torch.float64))
    assert len(calls) == expected
    for ours, stock, grad in pairs(kind):
        assert_same_call(ours, stock, grad)
    if kind is AssertsIntermediateSize:
        for ours, stock, grad in pairs(kind):
            ours.paths = stock.paths = 3  # type: ignore[assignment]
            assert_same_call(ours, stock, grad)


@pytest.mark.parametrize("kind", [ScalarAttribute, DictAttribute, OptionalParameter, CallsStages])
def test_guards_compile_to_one_graph(kind: type[nn.Module]) -> None:
    model, x = fuse(make(kind)).eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(2):
        for actual, expected in zip(tree_leaves(compiled(x)), tree_leaves(model(x)), strict=True):
            assert_near(actual, expected, "output")
    assert len(graphs) == 1
