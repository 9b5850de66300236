"""The symbolic front end: what it records, that it changes no state, what it notes, and what it refuses."""

from __future__ import annotations

import copy
import functools
import math
import operator
import os
import pickle
import random
import types
import warnings
from collections.abc import Callable
from enum import Enum
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fused_res
from fused_res import freeze, fuse
from fused_res import nn as fnn
from fused_res.fusion import convert
from fused_res.graph import symbolic
from fused_res.graph.norms import batch_norm
from fused_res.graph.recording import Recording, Size, Untraceable
from tests.support.model_comparison import assert_near

SCALE = 2.0
ITEMS = [1, 2]
FUNCTIONS = {"relu": F.relu, "tanh": torch.tanh}
COUNTER = 0


class Kind(Enum):
    ADD = "add"


class Other:
    """An object of user code, which may change at any time."""

    scale = 2.0

    def method(self) -> float:
        return 2.0

    @property
    def last(self) -> float:
        return 2.0


class Dynamic:
    def __getattr__(self, name: str) -> float:
        if name != "scale":
            raise AttributeError(name)
        return 2.0


OBJECT = Other()


def helper(x: Tensor) -> Tensor:
    return x * SCALE


def scaled(scale: float, x: Tensor) -> Tensor:
    return x * scale


class Child(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Layers(nn.Module):
    width = 3

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()
        self.child, self.list = Child(), nn.ModuleList([nn.ReLU(), Child()])
        self.dict = nn.ModuleDict({"a": nn.Tanh(), "b": Child()})
        self.sequential = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.weight, self.shortcut = nn.Parameter(torch.ones(3, 1, 1)), None
        self.register_buffer("offset", torch.zeros(3, 1, 1))
        self.scale, self.kind, self.settings, self.order = 2.0, Kind.ADD, {"alpha": 1}, ["conv", "norm"]
        self.object, self.tensor, self.activation, self.dynamic = OBJECT, (torch.ones(3),), F.relu, Dynamic()
        self.partial = functools.partial(scaled, 2.0)

    def method(self, x: Tensor) -> Tensor:
        return self.relu(x)

    @property
    def last(self) -> nn.Module:
        return self.norm

    @staticmethod
    def static(x: Tensor) -> Tensor:
        return x.neg()

    @classmethod
    def of_class(cls, x: Tensor) -> Tensor:
        return x


def make(forward: Callable[..., Any], base: type[nn.Module] = Layers) -> nn.Module:
    return type("Net", (base,), {"forward": forward})()


def record(forward: Callable[..., Any], training: bool = True) -> Recording:
    return symbolic.record(make(forward), training)


def operations(recorded: Recording) -> list[Any]:
    """Return what was recorded, without arguments and parameters: paths of layers, names of methods, functions."""
    return [node.target for node in recorded.graph.nodes if node.op not in ("placeholder", "get_attr")]


def reads(recorded: Recording) -> set[tuple[str, str]]:
    """Return kind and name of every read, without the methods that run."""
    return {(kind, name) for frame in recorded.frames for kind, _, name in frame.reads if name != "forward"}


def state_of(model: nn.Module) -> list[Any]:
    """Return everything that a trace could change: the modules' dictionaries, their classes and values."""
    found: list[Any] = []
    for name, module in model.named_modules(remove_duplicate=False):
        state = {
            key: dict(value) if isinstance(value, dict) else value
            for key, value in vars(module).items()
            if key != "_fused_res"
        }
        found += [name, module, type(module), {key: id(value) for key, value in vars(module).items()}, state.keys()]
        found += [list(module._parameters), list(module._buffers), list(module._modules), list(module._forward_hooks)]
        found += [
            (t.data_ptr(), t._version, t.requires_grad, t.grad)
            for t in (*module._parameters.values(),)
            if t is not None
        ]
        found += [(t.data_ptr(), t._version, t.tolist()) for t in module._buffers.values() if t is not None]
    return found


class TestNoStateChanges:
    class Net(Layers):
        """Reads and calls everything that a forward may."""

        def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
            x = self.child(x)
            for layer in self.list:
                x = layer(x)
            for name in self.dict:
                x = self.dict[name](x)
            x = self.last(x) * self.weight
            x += self.offset
            x = x * torch.rand(1) + helper(x)
            x[:, 0] = 0
            x = F.dropout(self.sequential(x), 0.5, self.training)
            return {"out": x, "mean": x.mean() if self.training else None}

    @pytest.mark.parametrize("training", [True, False])
    def test_modules_buffers_and_random_state(self, training: bool) -> None:
        model = self.Net().train(training)
        before, seed, classes = state_of(model), torch.get_rng_state(), dict(vars(nn.Module))
        values, python_seed = (SCALE, list(ITEMS), dict(FUNCTIONS), COUNTER), random.getstate()
        methods = {kind: kind.forward for kind in (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Sequential)}
        for mode in (True, False):
            assert len(operations(symbolic.record(model, mode))) > 10
        assert state_of(model) == before
        assert torch.equal(torch.get_rng_state(), seed) and random.getstate() == python_seed
        assert (SCALE, list(ITEMS), dict(FUNCTIONS), COUNTER) == values
        assert dict(vars(nn.Module)) == classes
        assert all(kind.forward is method for kind, method in methods.items())

    def test_buffers_are_proxies(self) -> None:
        """A norm of another library counts its batches in Python; a trace must not execute that."""

        class Counting(nn.BatchNorm2d):
            def forward(self, x: Tensor) -> Tensor:
                if self.training and self.num_batches_tracked is not None:
                    self.num_batches_tracked.add_(1)
                return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)

        class Wrapper(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norm, self.last = Counting(3), nn.ReLU()

            def forward(self, x: Tensor) -> Tensor:
                return self.last(self.norm(x))

        model = Wrapper()
        before = state_of(model)
        assert operations(symbolic.record(model, True)) == ["add_", batch_norm, "last"]
        assert operations(symbolic.record(model, False)) == [batch_norm, "last"]
        assert model.norm.num_batches_tracked == 0 and state_of(model) == before

    def test_code_that_sets_attributes_is_not_run(self) -> None:
        def forward(self: Any, x: Tensor) -> Tensor:
            self.settings["alpha"] = 2
            return x

        model: Any = make(forward)
        with pytest.raises(Untraceable):
            symbolic.record(model, True)
        assert model.settings == {"alpha": 1}

    def test_nothing_is_recorded_in_a_forward(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

            def forward(self, x: Tensor) -> Tensor:
                return F.relu(self.norm(self.conv(x)) + x)

        fused, frozen = fuse(Net().double(), cache_eval=True), freeze(Net().double())

        def fail(*_: Any, **__: Any) -> Any:
            raise AssertionError("a forward was recorded")

        monkeypatch.setattr(convert, "record", fail)
        x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
        for model in (fused, frozen, copy.deepcopy(fused), copy.deepcopy(frozen)):
            for training in (True, False, True):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # a frozen model stays in evaluation mode
                    model.train(training)
                assert model(x).shape == x.shape
            handle = model.norm.register_forward_hook(lambda *_: None)  # a guard fails
            model(x), handle.remove(), model(x)


class TestOperations:
    """What is recorded for a forward."""

    @pytest.mark.parametrize(
        ("forward", "expected"),
        [
            (lambda self, x: self.relu(x), ["relu"]),
            (lambda self, x: self.method(x), ["relu"]),
            (lambda self, x: self.static(x), ["neg"]),
            (lambda self, x: self.activation(x), [F.relu]),
            (lambda self, x: nn.ReLU()(x), [F.relu]),
            (lambda self, x: FUNCTIONS["tanh"](x), [torch.tanh]),
            (lambda self, x: helper(x), [operator.mul]),
            (lambda self, x: getattr(self, self.order[0])(x), ["conv"]),
            (lambda self, x: self.child(x), ["child.conv", "child.norm"]),
            (lambda self, x: self.list[1](x), ["list.1.conv", "list.1.norm"]),
            (lambda self, x: self.list[-2](x), ["list.0"]),
            (lambda self, x: self.dict["a"](x), ["dict.a"]),
            (lambda self, x: self.sequential(x), ["sequential.0", "sequential.1"]),
            (lambda self, x: self.sequential[1](x), ["sequential.1"]),
            (lambda self, x: self.shortcut(x) if self.shortcut is not None else x, []),
            (lambda self, x: x if isinstance(self.relu, nn.ReLU) else -x, []),
            (lambda self, x: x.add_(x) if self.kind == Kind.ADD else x, ["add_"]),
            (lambda self, x: torch.add(x, x, **self.settings), [torch.add]),
            (lambda self, x: self.relu(x) if hasattr(self, "relu") and not hasattr(self, "act") else x, ["relu"]),
            (lambda self, x: x * math.sqrt(self.scale), [operator.mul]),
            (lambda self, x: -x if torch.jit.is_scripting() else x, []),
            (lambda self, x: self.partial(x), [operator.mul]),
            (lambda self, x: torch.cat([x for _ in range(self.width)], 1), [torch.cat]),
            (lambda self, x: self.last(x), ["norm"]),
        ],
    )  # fmt: skip
    def test_forwards(self, forward: Callable[..., Any], expected: list[Any]) -> None:
        assert operations(record(forward)) == expected

    @pytest.mark.parametrize(
        "name",
        ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "matmul", "lshift", "rshift"],
    )
    def test_in_place_operators_are_recorded_as_such(self, name: str) -> None:
        """``torch.fx`` records them as those that return a new tensor, so that later reads of the first are wrong."""
        function = getattr(operator, f"i{name}")

        def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
            return function(x, y)

        assert operations(record(forward)) == [function]

    def test_augmented_assignment_and_item_assignment(self) -> None:
        def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
            x += y
            x[:, 0] = y
            x[0] *= 2
            return x

        expected = [operator.iadd, operator.setitem, operator.getitem, operator.imul, operator.setitem]
        assert operations(record(forward)) == expected

    def test_random_numbers_are_drawn_in_every_call(self) -> None:
        recorded = record(lambda self, x: x + torch.rand(3, 1, 1))
        assert operations(recorded) == [torch.rand, operator.add]

    def test_forward_of_another_name(self) -> None:
        """A forward that is another method is that function, also where a subclass overrides the method."""

        class Base(Layers):
            def run(self, x: Tensor) -> Tensor:
                return self.relu(x)

            forward = run

        class Net(Base):
            def run(self, x: Tensor) -> Tensor:
                return self.conv(x)

        assert operations(symbolic.record(Net(), True)) == ["relu"]

        def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(self: Any, x: Tensor) -> Tensor:
                return function(self, x) + 1

            return wrapper

        recorded = record(decorated(Base.run))
        assert operations(recorded) == ["relu", operator.add]

    def test_forward_of_a_base_class(self) -> None:
        class Net(Child):
            def forward(self, x: Tensor) -> Tensor:
                return F.relu(super().forward(x))

        class Explicit(Net):
            def forward(self, x: Tensor) -> Tensor:
                return Child.forward(self, x)

        assert operations(symbolic.record(Net(), True)) == ["conv", "norm", F.relu]
        assert operations(symbolic.record(Explicit(), True)) == ["conv", "norm"]

    def test_calls_of_modules(self) -> None:
        recorded = record(lambda self, x: self.child(self.sequential(x)))
        root, first, second = recorded.frames
        assert [(frame.path, frame.parent) for frame in recorded.frames[1:]] == [("sequential", root), ("child", root)]
        assert first.outputs == second.inputs and second.within(root) and not second.within(first)
        frames = {node.target: node.meta["frame"] for node in recorded.graph.nodes if node.op == "call_module"}
        assert frames["child.conv"] is second and frames["sequential.1"] is first

    def test_own_modules_are_recorded_for_inference_only(self) -> None:
        model = nn.Sequential(fnn.BasicBlock(4, 4), nn.ReLU())
        assert operations(symbolic.record(model, True)) == ["0", "1"]
        assert symbolic.record(model, True).opaque == {"0": "is a module of fused_res.nn"}
        inlined = operations(symbolic.record(model, True, inline_fusable=True))
        assert [path for path in inlined if isinstance(path, str)] == [
            "0.conv1", "0.bn1", "0.relu", "0.conv2", "0.bn2", "0.relu", "1",
        ]  # fmt: skip

    def test_own_module_with_another_forward(self) -> None:
        class Shifted(fnn.BasicBlock):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) + 1

        class ShiftedOnce(Shifted):
            pass

        for model in (Shifted(4, 4), ShiftedOnce(4, 4)):
            assert operations(symbolic.record(nn.Sequential(model), False, inline_fusable=True)) == ["0"]
            x, model = torch.randn(2, 4, 5, 5, dtype=torch.float64), model.double().eval()
            assert_near(freeze(model)(x), model(x), "output")

    def test_child_that_cannot_be_recorded_is_one_operation(self) -> None:
        class Branches(Child):
            def forward(self, x: Tensor) -> Tensor:
                x = self.norm(self.conv(x))
                return x if x.mean() > 0 else -x

        model: Any = make(lambda self, x: self.relu(self.child(x)))
        model.child = Branches()
        recorded = symbolic.record(model, True)
        assert operations(recorded) == ["child", "relu"]
        assert recorded.opaque == {"child": "depends on the values of a tensor"}
        assert [frame.path for frame in recorded.frames] == [""]
        assert recorded.frames[0].conditions == []


class TestTrainingModes:
    def test_variants(self) -> None:
        def forward(self: Any, x: Tensor) -> Tensor:
            return self.conv(x) if self.training else self.relu(x)

        model = make(forward)
        for present in (True, False):
            model.train(present)
            assert operations(symbolic.record(model, True)) == ["conv"] and operations(
                symbolic.record(model, False)
            ) == ["relu"]
        assert symbolic.record(model, True).reads_training

    @pytest.mark.parametrize(
        ("forward", "expected"),
        [
            (lambda self, x: self.norm(self.conv(x)), False),  # the layers read it when they run
            (lambda self, x: self.child(x), False),
            (lambda self, x: F.dropout(x, 0.5, self.training), True),
            (lambda self, x: x if self.norm.training else -x, True),
        ],
    )
    def test_reads_training(self, forward: Callable[..., Any], expected: bool) -> None:
        assert record(forward).reads_training is expected

    def test_both_modes_are_recorded_only_if_they_differ(self, monkeypatch: pytest.MonkeyPatch) -> None:
        modes: list[bool] = []

        def spy(model: nn.Module, training: bool, inline_fusable: bool = False) -> Recording:
            modes.append(training)
            return symbolic.record(model, training, inline_fusable)

        monkeypatch.setattr(convert, "record", spy)
        fuse(nn.Sequential(Child()).eval())
        assert modes == [False]
        modes.clear()

        class Dropping(Child):
            def forward(self, x: Tensor) -> Tensor:
                return F.dropout(super().forward(x), 0.5, self.training)

        fuse(nn.Sequential(Dropping()))
        assert modes == [False, True]


class TestReads:
    """Every value that the code depends on is noted, so that the generated forward can verify it."""

    @pytest.mark.parametrize(
        ("forward", "expected"),
        [
            (lambda self, x: x * self.scale, {("attribute", "scale")}),
            (lambda self, x: x * self.object.scale, {("kind", "object"), ("field", "object.scale")}),
            (
                lambda self, x: x if hasattr(self.object, "gamma") else -x,
                {("kind", "object"), ("field", "object.gamma")},
            ),
            (lambda self, x: x * self.width, {("absent", "width"), ("class", "width")}),
            (lambda self, x: self.method(x), {("absent", "method"), ("class", "method")}),
            (lambda self, x: self.last(x), {("class", "last")}),
            (lambda self, x: x if self.shortcut is None else -x, {("attribute", "shortcut")}),
            (lambda self, x: x if self.conv.bias is not None else -x, set()),
            (lambda self, x: x * SCALE, {("global", "SCALE")}),
            (lambda self, x: F.relu(x), {("global", "F"), ("global", "relu")}),
            (lambda self, x: helper(x), {("global", "helper"), ("global", "SCALE")}),
            (lambda self, x: x * len(ITEMS), {("global", "ITEMS")}),
            (lambda self, x: x if hasattr(self, "gamma") else -x, {("missing", "gamma")}),
            (lambda self, x: x if self.training else -x, {("attribute", "training")}),
            (lambda self, x: next(iter(self.list))(x), {("children", "")}),
            (lambda self, x: x * len(self.dict), {("children", "")}),
            (
                lambda self, x: x if self.kind == Kind.ADD else -x,
                {("attribute", "kind"), ("global", "Kind"), ("class", "ADD")},
            ),
        ],
    )
    def test_reads(self, forward: Callable[..., Any], expected: set[tuple[str, str]]) -> None:
        found = reads(record(forward)) - {("absent", "forward"), ("class", "forward")}
        assert expected <= found
        names = {"", "F", "relu", "torch", "functional", "nn", "weight", "bias", "len", "next", "iter", "hasattr"}
        assert {name for kind, name in found - expected} <= names | {"__code__", "__defaults__"}

    def test_closures(self) -> None:
        factor = 3.0

        def forward(self: Any, x: Tensor) -> Tensor:
            return x * factor

        assert ("cell", "factor") in reads(record(forward))

    def test_closures_of_a_function_that_several_calls_use(self) -> None:
        def inner(factor: float) -> Callable[[Tensor], Tensor]:
            return lambda x: x * factor

        def outer(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            return lambda x: function(x)

        function = outer(inner(2.0))

        class Scaled(Child):
            def __init__(self) -> None:
                super().__init__()
                self.function = function

            def forward(self, x: Tensor) -> Tensor:
                return self.function(self.conv(x))

        class Refused(Scaled):
            def forward(self, x: Tensor) -> Tensor:
                return self.function(self.conv(x)) * len(x)

        recorded = symbolic.record(nn.Sequential(Refused(), Scaled(), Scaled()), True)
        assert [frame.path for frame in recorded.frames] == ["", "1", "2"]
        for frame in recorded.frames[1:]:
            assert {name for kind, _, name in frame.reads if kind == "cell"} == {"function", "factor"}

    def test_missing_parameter(self) -> None:
        def forward(self: Any, x: Tensor) -> Tensor:
            return x if self.conv.bias is None else -x

        model: Any = make(forward)
        model.conv.bias = None
        recorded = symbolic.record(model, True)
        assert operations(recorded) == [] and ("_parameters", "bias") in reads(recorded)

    def test_reads_belong_to_the_call_that_made_them(self) -> None:
        class Scaled(Child):
            scale = 2.0

            def forward(self, x: Tensor) -> Tensor:
                return self.conv(x) * self.scale

        model: Any = make(lambda self, x: self.child(x) * self.scale)
        model.child = Scaled()
        root, child = symbolic.record(model, True).frames
        assert {name for kind, _, name in root.reads if kind == "attribute"} == {"scale"}
        assert {name for kind, _, name in child.reads if kind == "absent"} >= {"scale"}


class TestSizes:
    @pytest.mark.parametrize(
        ("forward", "branch", "condition"),
        [
            (lambda self, x: -x if x.numel() == 0 else x, [], "numel()"),
            (lambda self, x: -x if x.dim() == 3 else x, [], "ndim"),
            (lambda self, x: -x if x.ndim != 4 else x, [], "ndim"),
            (lambda self, x: -x if len(x.shape) == 3 else x, [], "ndim"),
            (lambda self, x: x if x.shape[1] == 3 else -x, [], "shape"),
            (lambda self, x: x if x.size(1) == 3 else -x, [], "shape"),
            (lambda self, x: -x if x.shape[2] < 8 else x, [], "shape"),
        ],
    )
    def test_decided_and_noted(self, forward: Callable[..., Any], branch: list[Any], condition: str) -> None:
        recorded = record(forward)
        assert [op for op in operations(recorded) if op is operator.neg] == branch
        ((expression, value),) = recorded.frames[0].conditions

        def sizes(expression: Any) -> list[str]:
            if isinstance(expression, Size):
                return [expression.name]
            return [name for part in expression for name in sizes(part)] if isinstance(expression, tuple) else []

        assert sizes(expression) == [condition] and isinstance(value, (bool, int))

    def test_sizes_that_are_only_computed_with_are_not_decided(self) -> None:
        recorded = record(lambda self, x: x.view(x.shape[0], -1) * x.size(1))
        assert recorded.frames[0].conditions == []

    @pytest.mark.parametrize(
        "forward",
        [
            lambda self, x: x if x.mean() > 0 else -x,
            lambda self, x: x if self.conv(x).shape[2] > 4 else -x,
            lambda self, x: x * int(x.sum()),
            lambda self, x: x * x.sum().item() if x.sum().item() > 1 else x,
            lambda self, x: next(iter(x)),
            lambda self, x: x * len(x),
        ],
    )
    def test_other_conditions_are_refused(self, forward: Callable[..., Any]) -> None:
        with pytest.raises(Untraceable):
            record(forward)

    @pytest.mark.parametrize("size", [(2, 3, 9, 9), (2, 3, 5, 5), (0, 3, 9, 9)])
    def test_guarded(self, size: tuple[int, ...]) -> None:
        def forward(self: Any, x: Tensor) -> Tensor:
            if x.numel() == 0:
                return x
            y = self.relu(self.norm(self.conv(x)))
            return -y if x.shape[2] < 8 else y

        stock = make(forward).double()
        fused = fuse(copy.deepcopy(stock))
        assert type(fused) is not type(stock)
        x = torch.randn(size, dtype=torch.float64)
        assert_near(fused(x), stock(x), "output")


def writes_global(self: Any, x: Tensor) -> Tensor:
    global COUNTER
    COUNTER += 1
    return x


def handles_exceptions(self: Any, x: Tensor) -> Tensor:
    try:
        return self.act(x)
    except AttributeError:
        return self.relu(x)


def no_grad(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return self.relu(x)


def sets_attribute(self: Any, x: Tensor) -> Tensor:
    self.features = x
    return x


def sets_child_attribute(self: Any, x: Tensor) -> Tensor:
    self.norm.eps = 1.0
    return x


def deletes_attribute(self: Any, x: Tensor) -> Tensor:
    del self.scale
    return x


def sets_tensor_attribute(self: Any, x: Tensor) -> Tensor:
    x.tag = 1
    return x


def hidden_by_except(self: Any, x: Tensor) -> Tensor:
    return hides(self, x)


def hides(self: Any, x: Tensor) -> Tensor:
    try:
        return x * self.dynamic.scale
    except BaseException:
        return x


def writes_object(self: Any, x: Tensor) -> Tensor:
    self.object.scale = 2
    return x


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "any arguments": (lambda self, *args: args[0], "cannot be recorded (IndexError"),
    "global written": (writes_global, "sets the global variable COUNTER"),
    "exceptions": (handles_exceptions, "handles exceptions, or uses a context manager"),
    "context manager": (no_grad, "handles exceptions, or uses a context manager"),
    "hidden": (hidden_by_except, "handles exceptions"),
    "attribute": (sets_attribute, "sets the attribute 'features' of a module"),
    "child's attribute": (sets_child_attribute, "sets the attribute 'eps' of a module"),
    "deleted": (deletes_attribute, "deletes the attribute 'scale' of a module"),
    "tensor's attribute": (sets_tensor_attribute, "sets the attribute 'tag' of a tensor"),
    "print": (lambda self, x: print(x), "print"),
    "random": (lambda self, x: x * random.random(), "reads the global variable random, a module"),
    "environment": (lambda self, x: x if os.environ.get("A") else -x, "reads the global variable os, a module"),
    "method of an object": (lambda self, x: x * self.object.method(), "calls object.method"),
    "property of an object": (lambda self, x: x * self.object.last, "calls object.last"),
    "object written": (writes_object, "sets the attribute 'scale' of an object"),
    "object compared": (lambda self, x: x if self.object == OBJECT else -x, "reads the global variable OBJECT"),
    "object as a key": (lambda self, x: x if self.object in (1, 2) else -x, "compares an object"),
    "object formatted": (lambda self, x: x if f"{self.object}" else -x, "formats an object"),
    "object passed on": (lambda self, x: torch.add(x, self.object), "passes a Other to an operation"),
    "object with its own access": (lambda self, x: x * self.dynamic.scale, "reads the attribute dynamic, a Dynamic"),
    "global object": (lambda self, x: x * OBJECT.scale, "reads the global variable OBJECT, a Other"),
    "plain tensor": (lambda self, x: x * self.tensor[0], "reads the attribute tensor, a Tensor"),
    "dictionary written": (lambda self, x: self.settings.update(alpha=2), "changes a dict"),
    "list written": (lambda self, x: self.order.append("x"), "changes a list"),
    "list of a module written": (lambda self, x: self.list.append(nn.ReLU()), ""),
    "internals": (lambda self, x: x * len(self._parameters), "reads _parameters"),
    "dictionary": (lambda self, x: x * len(self.__dict__), "reads __dict__"),
    "values": (lambda self, x: x if x.sum() > 0 else -x, "depends on the values of a tensor"),
    "makes a layer": (lambda self, x: nn.Conv2d(3, 3, 1)(x), "makes a Conv2d"),
    "makes an object": (lambda self, x: Other(), "makes a Other"),
    "class method": (lambda self, x: self.of_class(x), "calls the class method of_class"),
    "mode": (lambda self, x: torch.set_grad_enabled(False), "makes a set_grad_enabled"),
    "random seed": (lambda self, x: torch.manual_seed(0), "reads torch.manual_seed"),
    "grad mode": (lambda self, x: x if torch.is_grad_enabled() else -x, "reads torch.is_grad_enabled"),
    "checkpoint": (lambda self, x: torch.utils.checkpoint.checkpoint(self.child, x), ""),
    "import": (lambda self, x: __import__("math").sqrt(2) * x, "__import__"),
    "eval": (lambda self, x: eval("x"), "eval"),
    "returns an object": (lambda self, x: (x, set()), "passes a set to or from a module"),
    "mutable default": (lambda self, x, cache=[]: x, "has a default argument that may change"),
    "type of a value": (lambda self, x: x if isinstance(x.sum(), Tensor) else -x, "may not be a tensor"),
    "raises": (lambda self, x: self.nothing(x), "cannot be recorded (AttributeError"),
}


class TestRefused:
    @pytest.mark.parametrize("name", REFUSED)
    def test_reasons(self, name: str) -> None:
        forward, reason = REFUSED[name]
        model = make(forward)
        before = state_of(model)
        with pytest.raises(Untraceable) as caught:
            symbolic.record(model, True)
        assert reason in str(caught.value)
        assert state_of(model) == before and COUNTER == 0

    @pytest.mark.parametrize("name", REFUSED)
    def test_fuse_leaves_it_alone(self, name: str) -> None:
        model = make(REFUSED[name][0])
        kind = type(model)
        assert type(fuse(model)) is kind  # its children may be fused

    def test_modules(self) -> None:
        class OverridesCall(Child):
            def __call__(self, x: Tensor) -> Tensor:
                return super().__call__(x)

        class OverridesAccess(Child):
            def __getattr__(self, name: str) -> Any:
                return super().__getattr__(name)

        patched = Child()
        patched.forward = types.MethodType(lambda self, x: x, patched)  # type: ignore[method-assign]
        for model, reason in (
            (OverridesCall(), "overrides __call__"),
            (OverridesAccess(), "overrides attribute access"),
            (patched, "a forward of its own"),
            (torch.jit.script(nn.Sequential(nn.ReLU())), "is compiled by torch.jit"),
            (nn.DataParallel(Child()), "wraps a model for parallel execution"),
        ):
            with pytest.raises(Untraceable, match=reason):
                symbolic.record(model, True)
            assert (
                symbolic.record(nn.Sequential(model), True)
                .opaque["0"]
                .startswith(("overrides", "has a", "is ", "wraps"))
            )

    def test_hooks_run_around_a_recorded_forward(self) -> None:
        model = Child()
        model.register_forward_hook(lambda *_: None)
        assert operations(symbolic.record(model, True)) == ["conv", "norm"]
        recorded = symbolic.record(nn.Sequential(model), True)
        assert operations(recorded) == ["0"] and recorded.opaque == {"0": "has a hook, or a forward of its own"}
        fused = fuse(nn.Sequential(model))
        assert fused_res.summarize(fused).norms_fused == 1

    def test_caught_refusals_refuse(self) -> None:
        """Code that catches every exception cannot hide that a value was refused."""

        def forward(self: Any, x: Tensor) -> Tensor:
            return next(filter(None, map(self.attempt, [x])))

        class Net(Layers):
            def attempt(self, x: Tensor) -> Tensor:
                return x * self.dynamic.scale if hasattr(self, "dynamic") else x

        Net.forward = forward
        with pytest.raises(Untraceable, match="reads the attribute dynamic"):
            symbolic.record(Net(), True)

    def test_unpickled_module_is_recorded_anew(self) -> None:
        model = fuse(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()))
        other = pickle.loads(pickle.dumps(model))
        assert type(other) is type(model)
        x = torch.randn(2, 3, 4, 4)
        assert torch.equal(other(x), model(x))
        assert fused_res.summarize(other).norms_fused == 1
