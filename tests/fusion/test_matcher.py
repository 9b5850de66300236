"""The matcher on recorded graphs: every shape of segment, and what must not be part of one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_res.fusion.matcher import Segment, Unit, find_segments
from fused_res.graph import symbolic
from fused_res.graph.ir import Graph, Op, build_graph

Forward = Callable[..., Any]


class ConvNormRelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.n, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.n(self.c(x)))


class Functional(nn.Conv2d):
    """A convolution that calls the function itself, with `options` in place of its settings."""

    options: ClassVar[dict[str, Any]] = {}

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, **self.options)


class Padded(Functional):
    options: ClassVar[dict[str, Any]] = {"padding": 1}


class Scaled(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Renamed(nn.BatchNorm2d):
    pass


class Layers(nn.Module):
    """The layers that the forwards of this file use."""

    def __init__(self) -> None:
        super().__init__()
        for index in range(1, 5):
            self.add_module(f"c{index}", nn.Conv2d(4, 4, 3, padding=1))
            self.add_module(f"n{index}", nn.BatchNorm2d(4))
        self.relu, self.relu_ = nn.ReLU(), nn.ReLU(inplace=True)
        self.pool, self.identity, self.drop = nn.MaxPool2d(2), nn.Identity(), nn.Dropout(0.5)
        self.relu6, self.hardtanh, self.leaky = nn.ReLU6(inplace=True), nn.Hardtanh(0, 6), nn.LeakyReLU(0.1)
        self.silu, self.sigmoid, self.prelu = nn.SiLU(inplace=True), nn.Sigmoid(), nn.PReLU()
        self.b1, self.b2 = ConvNormRelu(), ConvNormRelu()
        self.chain = nn.Sequential(self.c1, self.n1, self.relu, self.c2, self.n2, self.relu, self.pool)


def record(forward: Forward, change: Callable[[Any], Any] | None = None) -> Graph:
    model = type("Net", (Layers,), {"forward": forward})()
    if change is not None:
        change(model)
    recorded = symbolic.record(model, training=True)
    modules = dict(model.named_modules(remove_duplicate=False))
    return build_graph(recorded.graph, modules.__getitem__, recorded.frames)


def describe(segment: Segment) -> str:
    """Return the layers of a segment in their order; what an addition adds follows a plus sign."""

    def unit(one: Unit, activation: str = "identity") -> list[str]:
        activations = [activation] if activation != "identity" else []
        return [node.path for node in (one.conv, one.norm) if node is not None] + activations

    words = [word for one in segment.units[:-1] for word in unit(one, one.settings[0])]
    last, shortcut = segment.units[-1], segment.shortcut
    words += unit(last)
    if shortcut == "tensor":
        assert segment.residual is not None
        words.append(f"+{segment.residual.source.name}")
    elif shortcut != "none":
        words.append("+identity" if isinstance(shortcut, str) else f"+({' '.join(unit(shortcut))})")
    words += [last.settings[0]] * (last.activation is not None) + ["pool"] * (segment.pool is not None)
    return " ".join(words)


def match(forward: Forward, inference: bool = False, change: Callable[[Any], Any] | None = None) -> list[str]:
    return [describe(segment) for segment in find_segments(record(forward, change), inference)]


#: Forwards, and the segments in them.
SHAPES: dict[str, tuple[Forward, list[str]]] = {
    "norm": (lambda self, x: self.n1(x), ["n1"]),
    "norm, relu": (lambda self, x: self.relu(self.n1(x)), ["n1 relu"]),
    "norm, addition, relu": (lambda self, x, y: self.relu(self.n1(x) + y), ["n1 +y relu"]),
    "unit": (lambda self, x: self.relu(self.n1(self.c1(x))), ["c1 n1 relu"]),
    "unit without relu": (lambda self, x: self.n1(self.c1(x)).tanh(), ["c1 n1"]),
    "unit, pool": (lambda self, x: self.pool(self.relu(self.n1(self.c1(x)))), ["c1 n1 relu pool"]),
    "unit, pool without relu": (lambda self, x: self.pool(self.n1(self.c1(x))), ["c1 n1 pool"]),
    "chain": (
        lambda self, x: self.n3(self.c3(self.n2(self.c2(self.relu(self.n1(self.c1(x))))))),
        ["c1 n1 relu c2 n2 c3 n3"],
    ),
    "chain in a Sequential": (lambda self, x: self.chain(x), ["chain.0 chain.1 relu chain.3 chain.4 relu pool"]),
    "identity": (lambda self, x: self.relu(self.n1(self.c1(x)) + x), ["c1 n1 +identity relu"]),
    "identity without relu": (lambda self, x: x + self.n1(self.c1(x)), ["c1 n1 +identity"]),
    "identity, two units": (
        lambda self, x: self.relu(self.n2(self.c2(self.relu(self.n1(self.c1(x))))) + x),
        ["c1 n1 relu c2 n2 +identity relu"],
    ),
    "identity, four units": (
        lambda self, x: x + self.n4(self.c4(self.n3(self.c3(self.relu(self.n2(self.c2(self.n1(self.c1(x))))))))),
        ["c1 n1 c2 n2 relu c3 n3 c4 n4 +identity"],
    ),
    "projection": (
        lambda self, x: self.relu(self.n2(self.c2(self.relu(self.n1(self.c1(x))))) + self.n3(self.c3(x))),
        ["c1 n1 relu c2 n2 +(c3 n3) relu"],
    ),
    # Both operands may be the main path: the longer one is.
    "projection, first": (
        lambda self, x: self.n3(self.c3(x)) + self.n2(self.c2(self.relu(self.n1(self.c1(x))))),
        ["c1 n1 relu c2 n2 +(c3 n3)"],
    ),
    "projection of another input": (
        lambda self, x, y: self.relu(self.n1(self.c1(x)) + self.n3(self.c3(y))),
        ["c1 n1", "c3 n3 +n1 relu"],
    ),
    "projection with a relu": (
        lambda self, x: self.n1(self.c1(x)) + self.relu(self.n3(self.c3(x))),
        ["c3 n3 relu", "c1 n1 +relu"],
    ),
    "any tensor": (
        lambda self, x, y: self.relu(self.n2(self.c2(self.relu(self.n1(self.c1(x))))) + y),
        ["c1 n1 relu c2 n2 +y relu"],
    ),
    "pooled shortcut": (lambda self, x: self.relu(self.n1(self.c1(x)) + self.pool(x)), ["c1 n1 +pool relu"]),
    "shortcut of the last unit": (
        lambda self, x: (h := self.relu(self.n1(self.c1(x)))) + self.n2(self.c2(h)),
        ["c1 n1 relu", "c2 n2 +identity"],
    ),
    # The input of a pre-activation block's addition is the input of its first norm.
    "pre-activation": (
        lambda self, x: self.c2(self.relu(self.n2(self.c1(self.relu(self.n1(x)))))) + x,
        ["n1 relu", "c1 n2 relu"],
    ),
    "two additions": (
        lambda self, x, y: self.relu((self.n1(self.c1(x)) + x) + (self.n2(self.c2(y)) + y)),
        ["c1 n1 +identity", "c2 n2 +identity"],
    ),
    "foreign operation in the branch": (
        lambda self, x: self.relu(self.n2(self.c2(self.relu(self.n1(self.c1(x))))).sigmoid() + x),
        ["c1 n1 relu c2 n2"],
    ),
    "foreign operation between units": (
        lambda self, x: self.relu(self.n2(self.c2(self.drop(self.relu(self.n1(self.c1(x)))))) + x),
        ["c1 n1 relu", "c2 n2 +x relu"],
    ),
    "nn.Identity anywhere": (
        lambda self, x: self.relu(
            self.identity(self.n2(self.identity(self.c2(self.relu(self.identity(self.n1(self.c1(x)))))))) + x
        ),
        ["c1 n1 relu c2 n2 +identity relu"],
    ),
    "branches of one input": (
        lambda self, x: torch.cat([self.relu(self.n1(self.c1(x))), self.relu(self.n2(self.c2(x)))], 1),
        ["c1 n1 relu", "c2 n2 relu"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str) -> None:
    forward, expected = SHAPES[name]
    assert match(forward) == expected


#: Ways to write a ReLU after a norm, which are all the same segment.
RELUS: list[Callable[[Any, Tensor], Tensor]] = [
    lambda self, y: self.relu(y),
    lambda self, y: self.relu_(y),
    lambda self, y: nn.ReLU()(y),
    lambda self, y: F.relu(y),
    lambda self, y: F.relu(y, True),
    lambda self, y: F.relu(y, inplace=True),
    lambda self, y: F.relu_(y),
    lambda self, y: torch.relu(y),
    lambda self, y: torch.relu_(y),
    lambda self, y: y.relu(),
    lambda self, y: y.relu_(),
]
#: Those with the gradient 1 at 0, which differs from a ReLU's.
CLAMPS: list[Callable[[Any, Tensor], Tensor]] = [
    lambda self, y: y.clamp(0),
    lambda self, y: y.clamp(min=0),
    lambda self, y: y.clamp_(min=0.0),
    lambda self, y: y.clamp_min(0),
    lambda self, y: y.clamp_min_(0),
    lambda self, y: torch.clamp(y, min=0),
    lambda self, y: torch.clamp(y, 0, None),
    lambda self, y: torch.clamp_min(y, 0),
]
#: Spellings of the activations that a norm without an addition may have, by what the matcher calls them.
ACTIVATIONS: list[tuple[Callable[[Any, Tensor], Tensor], tuple[Any, ...]]] = [
    (lambda self, y: F.relu6(y), ("relu6",)),
    (lambda self, y: F.relu6(y, inplace=True), ("relu6",)),
    (lambda self, y: F.hardtanh(y, 0.0, 6.0), ("relu6",)),
    (lambda self, y: F.hardtanh(y, min_val=0, max_val=6, inplace=True), ("relu6",)),
    (lambda self, y: F.hardtanh_(y, 0.0, 6.0), ("relu6",)),
    (lambda self, y: F.leaky_relu(y), ("leaky_relu", 0.01)),
    (lambda self, y: F.leaky_relu(y, 0.2, True), ("leaky_relu", 0.2)),
    (lambda self, y: F.leaky_relu(y, negative_slope=0), ("leaky_relu", 0.0)),
    (lambda self, y: F.leaky_relu_(y, 0.3), ("leaky_relu", 0.3)),
    (lambda self, y: F.silu(y), ("silu",)),
    (lambda self, y: F.silu(y, inplace=True), ("silu",)),
    (lambda self, y: y * torch.sigmoid(y), ("silu",)),
    (lambda self, y: y.sigmoid() * y, ("silu",)),
    (lambda self, y: torch.mul(y, F.sigmoid(y)), ("silu",)),
    (lambda self, y: y.mul(self.sigmoid(y)), ("silu",)),
    (lambda self, y: y.mul_(y.sigmoid()), ("silu",)),
    (lambda self, y: self.relu6(y), ("relu6",)),
    (lambda self, y: self.hardtanh(y), ("relu6",)),
    (lambda self, y: self.leaky(y), ("leaky_relu", 0.1)),
    (lambda self, y: self.silu(y), ("silu",)),
]
ADDITIONS: list[Callable[[Any, Tensor, Tensor], Tensor]] = [
    lambda self, y, x: y + x,
    lambda self, y, x: x + y,
    lambda self, y, x: y.add(x),
    lambda self, y, x: x.add(y),
    lambda self, y, x: y.add_(x),
    lambda self, y, x: torch.add(y, x),
    lambda self, y, x: torch.add(x, y, alpha=1),
    lambda self, y, x: y.__iadd__(x),
]


class TestSpellings:
    @staticmethod
    def unit(activation: Callable[[Any, Tensor], Tensor]) -> Forward:
        # The closure is a constant of the forward; the function in it is recorded.
        def forward(self: Any, x: Tensor) -> Tensor:
            return activation(self, self.n1(self.c1(x)))

        return forward

    @pytest.mark.parametrize("index", range(len(RELUS)))
    def test_relu(self, index: int) -> None:
        assert match(self.unit(RELUS[index])) == ["c1 n1 relu"]

    @pytest.mark.parametrize("index", range(len(CLAMPS)))
    def test_clamp_is_a_relu_without_gradients_only(self, index: int) -> None:
        forward = self.unit(CLAMPS[index])
        assert match(forward) == ["c1 n1"]
        assert match(forward, inference=True) == ["c1 n1 relu"]
        (segment,) = find_segments(record(forward), inference=True)
        assert segment.has_clamp

    @pytest.mark.parametrize("index", range(len(ACTIVATIONS)))
    def test_activation(self, index: int) -> None:
        activation, settings = ACTIVATIONS[index]
        for inference in (False, True):
            (segment,) = find_segments(record(self.unit(activation)), inference)
            assert segment.units[0].settings == settings
            assert describe(segment) == f"c1 n1 {settings[0]}"

    @pytest.mark.parametrize("index", range(len(ACTIVATIONS)))
    def test_activation_in_a_block(self, index: int) -> None:
        """A unit before another may have any, and no addition or pooling may follow it."""
        activation, (name, *_) = ACTIVATIONS[index]

        def block(self: Any, x: Tensor) -> Tensor:
            return self.relu(self.n2(self.c2(activation(self, self.n1(self.c1(x))))) + x)

        def after_addition(self: Any, x: Tensor) -> Tensor:
            return activation(self, self.n1(self.c1(x)) + x)

        def before_addition(self: Any, x: Tensor) -> Tensor:
            return activation(self, self.n1(self.c1(x))) + x

        def pooled(self: Any, x: Tensor) -> Tensor:
            return self.pool(activation(self, self.n1(self.c1(x))))

        assert match(block) == [f"c1 n1 {name} c2 n2 +identity relu"]
        assert match(after_addition) == ["c1 n1 +identity"]
        assert match(before_addition) == [f"c1 n1 {name}"]
        assert match(pooled) == [f"c1 n1 {name}"]

    def test_clamp_to_6_is_a_relu6_without_gradients_only(self) -> None:
        for clamp in (lambda self, y: y.clamp(0, 6), lambda self, y: torch.clamp_(y, min=0, max=6.0)):
            forward = self.unit(clamp)
            assert match(forward) == ["c1 n1"]
            assert match(forward, inference=True) == ["c1 n1 relu6"]

    @pytest.mark.parametrize(
        "activation",
        [
            lambda self, y: y.clamp(0, 5),
            lambda self, y: y.clamp(0, y.max()),
            lambda self, y: F.hardtanh(y),
            lambda self, y: F.hardtanh(y, 0.0, 5.0),
            lambda self, y: F.leaky_relu(y, -0.1),
            lambda self, y: F.leaky_relu(y, math.inf),
            lambda self, y: F.hardswish(y),
            lambda self, y: F.gelu(y),
            lambda self, y: self.prelu(y),
            lambda self, y: y * torch.sigmoid(1.702 * y),
            lambda self, y: y * torch.sigmoid(self.identity(y) + y),
            lambda self, y: y * torch.tanh(y),
            lambda self, y: (gate := torch.sigmoid(y)) * y * gate,
            lambda self, y: y.clamp(min=1),
            lambda self, y: y.clamp(max=0),
            lambda self, y: torch.clamp(y, y),
            lambda self, y: F.threshold(y, 0, 0),
            lambda self, y: y.maximum(y),
            lambda self, y: self.relu(self.drop(y)),
        ],
    )
    def test_other_activations(self, activation: Callable[[Any, Tensor], Tensor]) -> None:
        for inference in (False, True):
            assert match(self.unit(activation), inference) == ["c1 n1"]

    @pytest.mark.parametrize("index", range(len(ADDITIONS)))
    def test_addition(self, index: int) -> None:
        addition = ADDITIONS[index]

        def forward(self: Any, x: Tensor) -> Tensor:
            return self.relu_(addition(self, self.n1(self.c1(x)), x))

        assert match(forward) == ["c1 n1 +identity relu"]

    def test_augmented_addition(self) -> None:
        def forward(self: Any, x: Tensor) -> Tensor:
            y = self.n1(self.c1(x))
            y += x
            return self.relu(y)

        graph = record(forward)
        assert [describe(segment) for segment in find_segments(graph)] == ["c1 n1 +identity relu"]
        (add,) = (node for node in graph.nodes if node.op is Op.ADD)
        assert add.in_place and add.writes == (add.operands[0].storage,)

    @pytest.mark.parametrize(
        "addition",
        [
            lambda y, x: y + 1,
            lambda y, x: torch.add(y, x, alpha=2),
            lambda y, x: y.add(x, alpha=-1),
            lambda y, x: y - x,
            lambda y, x: sum([y, x]),  # starts with 0 + y
        ],
    )
    def test_other_additions(self, addition: Callable[[Tensor, Tensor], Tensor]) -> None:
        def forward(self: Any, x: Tensor) -> Tensor:
            return self.relu(addition(self.n1(self.c1(x)), x))

        assert match(forward) == ["c1 n1"]


class TestLayers:
    """Which modules are convolutions, norms and poolings."""

    @staticmethod
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.pool(self.relu(self.n1(self.c1(x))))

    @pytest.mark.parametrize(
        ("name", "layer", "expected"),
        [
            ("n1", lambda: nn.SyncBatchNorm(4), ["c1 n1 relu pool"]),
            ("n1", lambda: Renamed(4), ["c1 n1 relu pool"]),
            ("n1", lambda: nn.BatchNorm2d(4, affine=False, track_running_stats=False), ["c1 n1 relu pool"]),
            ("n1", lambda: Scaled(4), ["c1 n1"]),
            ("n1", lambda: nn.BatchNorm3d(4), ["n1 relu"]),  # the stock layers run, and raise
            ("n1", lambda: nn.GroupNorm(2, 4), []),
            ("n1", lambda: nn.InstanceNorm2d(4), []),
            ("c1", lambda: Padded(4, 4, 3, padding=1), ["c1 n1 relu pool"]),
            ("c1", lambda: Functional(4, 4, 3), ["c1 n1 relu pool"]),
            ("c1", lambda: Functional(4, 4, 3, padding=1), ["n1 relu"]),  # does not pass its padding
            ("c1", lambda: nn.Conv2d(4, 4, 3, padding_mode="circular"), ["n1 relu"]),
            ("c1", lambda: nn.ConvTranspose2d(4, 4, 3), ["n1 relu"]),
            ("c1", lambda: nn.Linear(4, 4), ["n1 relu"]),
            ("c1", lambda: nn.Conv1d(4, 4, 3), ["n1 relu"]),
            ("c1", lambda: nn.Conv2d(6, 4, 3, groups=2, dilation=2, padding="same"), ["c1 n1 relu pool"]),
            ("relu", lambda: nn.ReLU6(), ["c1 n1 relu6"]),
            ("relu", lambda: nn.Hardtanh(0, 6), ["c1 n1 relu6"]),
            ("relu", lambda: nn.Hardtanh(0, 5), ["c1 n1"]),
            ("relu", lambda: nn.LeakyReLU(-0.1), ["c1 n1"]),
            ("relu", lambda: nn.SiLU(), ["c1 n1 silu"]),
            ("relu", lambda: nn.Hardswish(), ["c1 n1"]),
            ("relu", lambda: nn.PReLU(), ["c1 n1"]),
            ("pool", lambda: nn.AvgPool2d(2), ["c1 n1 relu"]),
            ("pool", lambda: nn.MaxPool2d(2, ceil_mode=True), ["c1 n1 relu"]),
            ("pool", lambda: nn.MaxPool2d(2, dilation=2), ["c1 n1 relu"]),
        ],
    )
    def test_layers(self, name: str, layer: Callable[[], nn.Module], expected: list[str]) -> None:
        assert match(TestLayers.forward, change=lambda model: setattr(model, name, layer())) == expected

    def test_unsupported_convolution_splits_a_chain(self) -> None:
        def circular(model: Any) -> None:
            model.chain[3].padding_mode = "circular"

        assert match(SHAPES["chain in a Sequential"][0], change=circular) == ["chain.0 chain.1 relu", "chain.4 relu"]

    @pytest.mark.parametrize("read", ["running_mean", "num_batches_tracked", "weight"])
    def test_norm_whose_tensors_are_read(self, read: str) -> None:
        """Fusion may change the order in which its running statistics are updated and read."""

        def forward(self: Any, x: Tensor) -> Any:
            return self.relu(self.n1(self.c1(x))), getattr(self.n1, read)

        assert match(forward) == []


class TestOtherReaders:
    """A result that anything else reads, or that leaves the forward, is not inside a segment."""

    @pytest.mark.parametrize(
        ("forward", "expected"),
        [
            (lambda self, x: (self.n1(h := self.c1(x)), h), ["n1"]),
            (lambda self, x: (self.relu(h := self.n1(self.c1(x))), h), ["c1 n1"]),
            (lambda self, x: (self.relu(h := self.n1(self.c1(x)) + x), h), ["c1 n1 +identity"]),
            (lambda self, x: (self.pool(h := self.relu(self.n1(self.c1(x)))), h), ["c1 n1 relu"]),
            (lambda self, x: (self.n2(self.c2(h := self.relu(self.n1(self.c1(x))))), h), ["c1 n1 relu", "c2 n2"]),
            (lambda self, x: (h := self.n1(self.c1(x))) + h, ["c1 n1"]),
            (lambda self, x: self.n1(h := self.c1(x)) + h, ["n1 +c1"]),
            (lambda self, x: self.relu(h := self.n1(self.c1(x))) * h.mean(), ["c1 n1"]),
            (lambda self, x: (self.n1(h := self.c1(x)), self.identity(h)), ["n1"]),
        ],
    )
    def test_readers(self, forward: Forward, expected: list[str]) -> None:
        assert match(forward) == expected

    def test_results_of_a_child_with_two_outputs(self) -> None:
        class Both(ConvNormRelu):
            def forward(self, x: Tensor) -> Any:
                h = self.n(self.c(x))
                return h, F.relu(h)

        def forward(self: Any, x: Tensor) -> Tensor:
            return self.b1(x)[1]  # a program of the child alone has to return both

        assert match(forward, change=lambda model: setattr(model, "b1", Both())) == ["b1.c b1.n"]


class TestWrites:
    """In-place operations: the fused operator runs where the last operation of a segment was, and writes to nothing."""

    @pytest.mark.parametrize(
        "forward",
        [
            lambda self, x: self.relu(x.add_(self.n1(self.c1(x)))),
            lambda self, x: self.relu(x.__iadd__(self.n1(self.c1(x)))),
            lambda self, x, y: self.relu(y.add_(self.n1(self.c1(x)))),
        ],
    )
    def test_in_place_on_an_input_is_refused(self, forward: Forward) -> None:
        assert match(forward) == ["c1 n1"]

    def test_in_place_on_a_result_outside_is_refused(self) -> None:
        def forward(self: Any, x: Tensor) -> Tensor:
            h = self.c2(x)
            h += self.n1(self.c1(x))
            return self.relu(h)

        assert match(forward) == ["c1 n1"]

    @pytest.mark.parametrize(
        "write",
        [
            lambda self, x, y: x.mul_(2),
            lambda self, x, y: y.mul_(2),  # the two arguments may be one tensor
            lambda self, x, y: x.__imul__(2),
            lambda self, x, y: self.relu_(x),
            lambda self, x, y: F.relu_(x),
            lambda self, x, y: F.dropout(x, 0.5, True, True),
            lambda self, x, y: x[:, :2].mul_(2),
            lambda self, x, y: x.view(2, -1).mul_(2),
            lambda self, x, y: x.__setitem__((0,), 0),
            lambda self, x, y: self.identity(x).zero_(),
            lambda self, x, y: torch.add(y, 1, out=x),
        ],
    )
    def test_write_between_is_refused(self, write: Callable[..., Any]) -> None:
        def between(self: Any, x: Tensor, y: Tensor) -> Any:
            h = self.c1(x)
            write(self, x, y)
            return self.relu(self.n1(h)), x

        def residual(self: Any, x: Tensor, y: Tensor) -> Any:
            h = self.n1(self.c1(x))
            write(self, x, y)
            return self.relu(h + x)

        assert match(between) == ["n1 relu"]
        assert match(residual) == ["c1 n1"]

    @pytest.mark.parametrize(
        "forward",
        [
            lambda self, x: (x.mul_(2), self.relu(self.n1(self.c1(x)))),  # before
            lambda self, x: (self.relu(self.n1(self.c1(x))), x.mul_(2)),  # after
            lambda self, x: (h := self.c1(x), x.mul(2), self.relu(self.n1(h)))[1:],  # not in place
            lambda self, x, y: (h := self.c1(x), self.c2(y).mul_(2), self.relu(self.n1(h)))[1:],  # to something else
        ],
    )
    def test_other_writes_are_accepted(self, forward: Forward) -> None:
        assert match(forward) == ["c1 n1 relu"]

    def test_reads_after_a_write_have_it_as_their_producer(self) -> None:
        def forward(self: Any, x: Tensor) -> Tensor:
            y = self.n1(self.c1(x))
            self.relu_(y)  # the name stays
            return self.n2(self.c2(y))

        assert match(forward) == ["c1 n1 relu c2 n2"]


class TestNormCalledTwice:
    """Each call updates the running statistics, so the calls have to stay in their order."""

    def test_in_order(self) -> None:
        def forward(self: Any, x: Tensor) -> Any:
            a = self.relu(self.n1(self.c1(x)))
            return self.relu(self.n1(self.c2(a)))

        assert match(forward) == ["c1 n1 relu", "c2 n1 relu"]

    def test_other_order_is_refused(self) -> None:
        def forward(self: Any, x: Tensor) -> Any:
            a, b = self.n1(self.c1(x)), self.n1(self.c2(x))
            b = self.relu(b)
            return self.relu(a), b, self.n2(self.c3(x))

        assert match(forward) == ["c3 n2"]

    def test_moved_past_a_call_outside_of_segments_is_refused(self) -> None:
        def forward(self: Any, x: Tensor) -> Any:
            a = self.n1(self.c1(x))
            b = self.n1(self.c2(x).squeeze(0)[None])
            return self.relu(a), b

        assert match(forward) == []


class TestModules:
    """A segment belongs to the smallest module that contains all of it."""

    def test_blocks_after_each_other_are_not_joined(self) -> None:
        segments = find_segments(record(lambda self, x: self.b2(self.b1(x))))
        assert [describe(segment) for segment in segments] == ["b1.c b1.n relu", "b2.c b2.n relu"]
        assert [segment.frame.path for segment in segments] == ["b1", "b2"]

    def test_units_in_modules_of_a_block_are_joined_by_its_addition(self) -> None:
        (segment,) = find_segments(record(lambda self, x: self.n1(self.c1(self.b1(x))) + x))
        assert describe(segment) == "b1.c b1.n relu c1 n1 +identity" and segment.frame.path == ""

    def test_chain_ends_where_a_module_ends(self) -> None:
        assert match(lambda self, x: self.pool(self.b1(x))) == ["b1.c b1.n relu pool"]
        assert match(lambda self, x: self.relu(self.chain(x))) == ["chain.0 chain.1 relu chain.3 chain.4 relu pool"]
