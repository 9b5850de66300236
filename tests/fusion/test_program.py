"""Generated forwards: every guard, what they keep alive, compilation without recompilation, and how they are shared."""

from __future__ import annotations

import copy
import linecache
import traceback
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from fused_res import freeze, fuse, summarize, unfuse
from tests.support.model_comparison import assert_models_match, assert_near

SCALE = 1.0
SCALES = [1.0]


def scaled(x: Tensor) -> Tensor:
    return x * SCALE


def make_scaled(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x * factor


class Layers(nn.Module):
    """One fused segment, and one read of every kind."""

    flag = True
    times = staticmethod(make_scaled(1.0))

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()
        self.shortcut: nn.Module | None = None
        self.scale, self.sizes, self.settings = 1.0, (1, 2), {"alpha": 1}
        self.tail = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.list = nn.ModuleList([nn.Tanh(), nn.Identity()])

    @property
    def last(self) -> Any:
        return self.relu

    def method(self, x: Tensor) -> Tensor:
        return x * 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.norm(self.conv(x)) + x)
        if self.conv.bias is not None or self.shortcut is not None or hasattr(self, "gamma"):
            y = -y
        y = scaled(self.method(y)) * self.scale * self.sizes[0] if self.flag else -y
        y = torch.add(self.times(y), y, **self.settings) * SCALES[0]
        for layer in self.list:
            y = layer(y)
        return self.tail(y)


class Renamed(nn.Conv2d):
    pass


def network() -> Any:
    torch.manual_seed(0)
    return Layers().double()


def images() -> Tensor:
    return torch.randn(2, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


Change = Callable[[Any, pytest.MonkeyPatch], Any]


def other_method(self: Any, x: Tensor) -> Tensor:
    return x * 3


def other_forward(self: Any, x: Tensor) -> Tensor:
    return self.tail(self.norm(self.conv(x)))


def other_convolution() -> nn.Module:
    torch.manual_seed(1)
    return nn.Conv2d(4, 4, 1).double()


#: Changes that the guards have to see, and what ``summarize`` says.
CHANGES: dict[str, tuple[Change, str]] = {
    "attribute": (lambda m, patch: patch.setattr(m, "scale", 2.0), "scale has changed"),
    "attribute of another type": (lambda m, patch: patch.setattr(m, "scale", torch.tensor(2.0)), "scale has changed"),
    "attribute deleted": (lambda m, patch: patch.delitem(vars(m), "sizes"), "sizes has changed"),
    "tuple": (lambda m, patch: patch.setattr(m, "sizes", (2, 2)), "sizes has changed"),
    "dictionary written": (lambda m, patch: patch.setitem(m.settings, "alpha", 2), "settings has changed"),
    "attribute that was missing": (lambda m, patch: patch.setattr(m, "gamma", 1, raising=False), "gamma has changed"),
    "module that was None": (
        lambda m, patch: patch.setitem(vars(m), "shortcut", nn.Identity()),
        "shortcut has changed",
    ),
    "bias that was None": (
        lambda m, patch: patch.setitem(m.conv._parameters, "bias", nn.Parameter(torch.ones(4).double())),
        "conv.bias has changed",
    ),
    "class attribute": (lambda m, patch: patch.setattr(Layers, "flag", False), "flag has changed"),
    "instance attribute over a class attribute": (
        lambda m, patch: patch.setitem(vars(m), "flag", False),
        "flag has changed",
    ),
    "static method": (
        lambda m, patch: patch.setattr(Layers, "times", staticmethod(make_scaled(3.0))),
        "times has changed",
    ),
    "closure": (
        lambda m, patch: patch.setattr(Layers.times.__closure__[0], "cell_contents", 3.0),  # type: ignore[index]
        "factor has changed",
    ),
    "method": (lambda m, patch: patch.setattr(Layers, "method", other_method), "method has changed"),
    "method of one instance": (
        lambda m, patch: patch.setitem(vars(m), "method", types.MethodType(other_method, m)),
        "method has changed",
    ),
    "property": (
        lambda m, patch: patch.setattr(Layers, "last", property(lambda self: self.list[0])),
        "last has changed",
    ),
    "forward": (lambda m, patch: patch.setattr(Layers, "forward", other_forward), "forward has changed"),
    "forward of one instance": (
        lambda m, patch: patch.setitem(vars(m.conv), "forward", lambda x: 2 * x),
        "conv has a hook, or a forward of its own",
    ),
    "_conv_forward of one instance": (
        lambda m, patch: patch.setitem(vars(m.conv), "_conv_forward", lambda x, weight, bias: 2 * x),
        "conv has a hook, or a forward of its own",
    ),
    "global": (lambda m, patch: patch.setitem(globals(), "SCALE", 2.0), "SCALE has changed"),
    "global list": (lambda m, patch: patch.setitem(globals(), "SCALES", [2.0]), "SCALES has changed"),
    "global function": (lambda m, patch: patch.setitem(globals(), "scaled", make_scaled(2.0)), "scaled has changed"),
    "function of torch": (lambda m, patch: patch.setattr(torch, "add", torch.sub), "add has changed"),
    "hook": (lambda m, patch: patch.setitem(m.norm._forward_hooks, 0, lambda *_: None), "norm has a hook"),
    "pre-hook": (lambda m, patch: patch.setitem(m.conv._forward_pre_hooks, 0, lambda *_: None), "conv has a hook"),
    "backward hook": (lambda m, patch: patch.setitem(m.relu._backward_hooks, 0, lambda *_: None), "relu has a hook"),
    "class": (lambda m, patch: patch.setattr(m.conv, "__class__", Renamed), "conv has another class"),
    "layer of another class": (lambda m, patch: patch.setitem(m._modules, "relu", nn.Tanh()), "relu has another class"),
    "layer appended": (lambda m, patch: patch.setitem(m.list._modules, "2", nn.Tanh()), "list has changed"),
    "another convolution": (
        lambda m, patch: patch.setitem(m._modules, "conv", other_convolution()),
        "conv.bias has changed",
    ),
}


def outcome(model: nn.Module, *inputs: Any) -> Any:
    with torch.no_grad():
        try:
            return model(*inputs)
        except Exception as error:
            return type(error), str(error)


@pytest.fixture
def stock_norms(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of what stock batch norms have read."""
    found: list[int] = []
    batch_norm = F.batch_norm

    def count(x: Tensor, *args: Any, **options: Any) -> Tensor:
        found.append(x.numel())
        return batch_norm(x, *args, **options)

    monkeypatch.setattr(F, "batch_norm", count)
    return found


TRANSFORMS: dict[str, Callable[[Any], Any]] = {
    "fuse": lambda model: fuse(copy.deepcopy(model)),
    "freeze": freeze,
}


class TestGuards:
    @pytest.mark.parametrize("name", CHANGES)
    @pytest.mark.parametrize("transform", TRANSFORMS)
    def test_changed_and_changed_back(
        self, name: str, transform: str, monkeypatch: pytest.MonkeyPatch, stock_norms: list[int]
    ) -> None:
        """Changed: the stock forward runs, and ``summarize`` says so. Changed back: the module runs fused again."""
        change, reason = CHANGES[name]
        stock = network().eval()
        fused = TRANSFORMS[transform](stock)

        def check(fused_norms: int) -> None:
            expected = outcome(stock, images())
            stock_norms.clear()
            actual = outcome(fused, images())
            if isinstance(expected, Tensor):
                assert_near(actual, expected, "output")
                assert 2 - len(stock_norms) == fused_norms
            else:
                assert actual == expected
            assert summarize(fused).norms_fused == fused_norms

        check(2)
        with monkeypatch.context() as patch:
            change(fused, patch)
            change(stock, patch)
            check(1)  # the other part is a module of its own
            assert reason in str(summarize(fused))
        check(2)

    def test_layers_read_their_present_settings(self, stock_norms: list[int]) -> None:
        """What the fused operators read on every call is no guard."""
        stock = network()
        fused = fuse(copy.deepcopy(stock))
        for model in (stock, fused):
            model.conv = nn.Conv2d(4, 4, 5, padding=2, bias=False).double()
            nn.init.constant_(model.conv.weight, 0.1)
            model.norm.eps, model.norm.momentum, model.relu.inplace = 0.1, None, True
            model.norm.eval()
        stock_norms.clear()
        copy.deepcopy(fused)(images())
        assert not stock_norms
        assert_models_match(fused, stock, images())

    @pytest.mark.parametrize(
        "inputs",
        [
            (torch.ones(2, 4, 6, 6),),
            (torch.ones(2, 4, 6, 6), torch.ones(2, 4, 6, 6)),
            (torch.ones(2, 4, 6, 6), None, True),
            (torch.ones(2, 4, 6, 6), None, 0),
            (torch.ones(2, 4, 6, 6), None, False, (1, 2)),
            (torch.ones(2, 4, 6, 6), None, False, [1, 1]),
            (torch.ones(4, 6, 6),),
            (torch.ones(0, 4, 6, 6),),
            (torch.ones(2, 3, 6, 6),),
            (2.0,),
            (),
            (torch.ones(2, 4, 6, 6), None, False, (1, 1), None),
        ],
        ids=lambda inputs: str([getattr(x, "shape", x) for x in inputs]),
    )
    def test_arguments(self, inputs: tuple[Any, ...]) -> None:
        """Arguments unlike those that were recorded run stock, with stock's result or error."""

        class Net(Layers):
            def forward(self, x: Any, y: Any = None, flag: Any = False, sizes: Any = (1, 1)) -> Any:
                x = self.relu(self.norm(self.conv(x)))
                x = x if y is None else x + y
                return (-x if flag else x) * sizes[1]

        stock = Net().eval()
        fused = fuse(copy.deepcopy(stock))
        expected, actual = outcome(stock, *inputs), outcome(fused, *inputs)
        if isinstance(expected, Tensor):
            assert_near(actual, expected, "output")
        else:
            assert actual[0] is expected[0] and expected[1].endswith(actual[1])

    def test_one_tensor_for_two_arguments(self, stock_norms: list[int]) -> None:
        class Block(Layers):
            def forward(self, x: Tensor, y: Tensor) -> Tensor:
                return self.relu(self.norm(self.conv(x)) + y)

        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.block = Block()

            def forward(self, x: Tensor) -> Tensor:
                return self.block(x, x)

        stock = Twice().double()
        fused: Any = fuse(copy.deepcopy(stock))
        x = images()
        for inputs in ((x,), (x + 1,)):
            assert_near(fused(*inputs), stock(*inputs), "output")
        for other in (x, x.clone()):
            assert_near(fused.block(x, other), stock.block(x, other), "output")

    def test_tensor_subclasses_run_stock(self, stock_norms: list[int]) -> None:
        class Tagged(Tensor):
            pass

        counts = []
        for model in (network(), fuse(network())):
            stock_norms.clear()
            assert type(model(images().as_subclass(Tagged))) is Tagged
            counts.append(len(stock_norms))
        assert counts[0] == counts[1] > 0


def allocated(model: nn.Module, x: Tensor) -> int:
    """Return the peak of the memory that a forward allocates, in bytes."""
    model(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        model(x)
    current = peak = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    return peak


class TestMemory:
    class Chain(nn.Module):
        """Segments with an operation between them, in one forward."""

        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList([nn.Conv2d(8, 8, 1, bias=False) for _ in range(12)])
            self.norms = nn.ModuleList([nn.BatchNorm2d(8) for _ in range(12)])

        def forward(self, x: Tensor) -> Tensor:
            for conv, norm in zip(self.convs, self.norms, strict=True):
                x = F.relu(norm(conv(x))).sigmoid()
            return x

    @pytest.mark.parametrize("transform", TRANSFORMS)
    def test_values_are_released_after_their_last_use(self, transform: str) -> None:
        x = torch.randn(4, 8, 160, 160).contiguous(memory_format=torch.channels_last)
        stock = self.Chain().eval()
        fused = TRANSFORMS[transform](stock)
        (program,) = fused._fused_res.programs
        assert len(program.segments) == 12
        with torch.no_grad():
            peaks = [allocated(model, x) for model in (fused, stock)]
        assert peaks[1] >= 2 * x.nbytes
        assert peaks[0] <= peaks[1] + x.nbytes // 8

    def test_inputs_are_not_kept(self) -> None:
        """A caller that drops its reference frees the input during the forward, as in stock."""
        import weakref

        freed = []

        class Net(self.Chain):  # type: ignore[name-defined]
            def forward(self, x: Tensor) -> Tensor:
                for conv, norm in zip(self.convs, self.norms, strict=True):
                    x = F.relu(norm(conv(x))).sigmoid()
                return self.last(x)

        class Last(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                freed.append(reference() is None)
                return x

        model = Net().eval()
        model.last = Last()
        outcomes = []
        for one in (model, fuse(copy.deepcopy(model))):
            x = [torch.randn(1, 8, 8, 8)]
            reference = weakref.ref(x[0])
            with torch.no_grad():
                one(x.pop())
            outcomes.append(freed.pop())
        assert outcomes[1] >= outcomes[0]


class Modes(Layers):
    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm(self.conv(x)) + x)
        return self.tail(F.dropout(y, 0.5, self.training))


class TestCompiled:
    @pytest.mark.parametrize("transform", TRANSFORMS)
    def test_one_graph_and_no_recompilation(self, transform: str) -> None:
        """Guards of generated forwards add no graph, and switching between modes compiles each mode once."""
        stock = Modes().double()
        fused = TRANSFORMS[transform](stock)
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(fused, fullgraph=True, backend=counter)
        modes = (True, False) if transform == "fuse" else (False,)
        for repetition in range(4):
            for training in modes:
                fused.train(training)
                torch.manual_seed(0)
                actual = compiled(images())
                torch.manual_seed(0)
                assert_near(actual, stock.train(training)(images()), "output")
            assert counter.frame_count == len(modes), repetition

    def test_changes_are_seen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stock = network()
        fused = fuse(copy.deepcopy(stock))
        torch._dynamo.reset()
        compiled = torch.compile(fused, fullgraph=True, backend="eager")
        for name in (
            "attribute",
            "bias that was None",
            "class attribute",
            "global",
            "global function",
            "layer appended",
        ):
            assert_near(compiled(images()), stock(images()), "output")
            with monkeypatch.context() as patch:
                for model in (fused, stock):
                    CHANGES[name][0](model, patch)
                assert_near(compiled(images()), stock(images()), name)

    def test_changes_before_the_compilation_are_seen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stock = network()
        fused = fuse(copy.deepcopy(stock))
        for name in ("class attribute", "global", "global list", "method", "forward"):
            torch._dynamo.reset()
            with monkeypatch.context() as patch:
                CHANGES[name][0](stock, patch)
                assert_near(torch.compile(fused, backend="eager")(images()), stock(images()), name)


class TestPrograms:
    def test_equal_programs_are_stored_once(self) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.block = Layers()

            def forward(self, x: Tensor) -> Tensor:
                x = self.block(self.block(x))
                return F.dropout(x, 0.5, self.training)  # recorded for both modes

        fused: Any = fuse(Twice())
        assert len(fused.block._fused_res.programs) == 1 and len(fused.block.tail._fused_res.programs) == 1

    def test_one_program_for_each_mode_that_differs(self, stock_norms: list[int]) -> None:
        class Branches(Layers):
            def forward(self, x: Tensor) -> Tensor:
                y = self.norm(self.conv(x))
                return self.relu(y + x) if self.training else self.relu(y)

        stock = Branches().double()
        fused: Any = fuse(copy.deepcopy(stock))
        assert len(fused._fused_res.programs) == 2
        stock_norms.clear()
        for training in (True, False):
            copy.deepcopy(fused).train(training)(images())
        assert not stock_norms
        assert_models_match(fused, stock, images())
        assert_models_match(fused.eval(), stock.eval(), images())

    def test_copies_share_programs_and_hold_no_modules(self) -> None:
        fused: Any = fuse(network())
        other: Any = copy.deepcopy(fused)
        assert other._fused_res is not fused._fused_res
        assert all(a is b for a, b in zip(other._fused_res.programs, fused._fused_res.programs, strict=True))
        nn.init.constant_(other.conv.weight, 0.0)
        with torch.no_grad():
            assert not torch.equal(other(images()), fused(images()))
        assert type(unfuse(other)) is Layers and len(fused._fused_res.programs) == 1

    def test_source_is_in_tracebacks(self) -> None:
        fused: Any = fuse(network())
        (program,) = fused._fused_res.programs
        filename = program.forward.__code__.co_filename
        assert "".join(linecache.getlines(filename)) == program.source
        compile(program.source, filename, "exec")

        class Fails(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                raise RuntimeError("failed")

        class Net(Layers):
            def forward(self, x: Tensor) -> Tensor:
                return self.list[0](self.relu(self.norm(self.conv(x))))

        failing: Any = Net()
        failing.list[0] = Fails()
        with pytest.raises(RuntimeError, match="failed") as caught:
            fuse(failing)(images().float())
        text = "".join(traceback.format_exception(caught.value))
        assert "m_list_0(" in text
