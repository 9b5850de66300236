"""``torch.fx.GraphModule``: fused as any module, and unfused as soon as its graph is another one."""

from __future__ import annotations

import copy
import gc
import operator
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fused_res
from fused_res import freeze, fuse, unfuse
from fused_res.graph import graph_modules, symbolic
from fused_res.graph.recording import Untraceable
from fused_res.testing import stub_torchvision_operators
from tests.support.model_comparison import (
    assert_models_match,
    assert_near,
    randomize_norms,
    record_stock_norms,
    small_resnet,
)

stub_torchvision_operators()
extraction = pytest.importorskip("torchvision.models.feature_extraction")

NORMS = 12  # of small_resnet


class Last(nn.Module):
    """Returns the last feature of an extractor."""

    def __init__(self, extractor: nn.Module) -> None:
        super().__init__()
        self.extractor = extractor

    def forward(self, x: Tensor) -> Tensor:
        features = self.extractor(x)
        return features["first"].mean() + features["last"]


class Scale(nn.Module):
    """A residual block with its own forward, which ``torch.fx`` is told not to look into."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.conv(x)) + x)


class LeafTracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Scale) or super().is_leaf_module(m, module_qualified_name)


class Dropped(nn.Module):
    """Computes something else in each training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.other = Scale(), Scale()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first = self.scale(x)
        last = self.other.norm(self.other.conv(first)) * 2 if self.training else self.other(first)
        return {"first": first, "last": last}


def traced() -> fx.GraphModule:
    return fx.symbolic_trace(randomize_norms(small_resnet()))


def extracted() -> Any:
    names = {"layer2": "first", "layer4": "last"}
    return extraction.create_feature_extractor(randomize_norms(small_resnet()), names)


def two_graphs() -> Any:
    torch.manual_seed(0)
    model = randomize_norms(Dropped()).double()
    graphs = {mode: fx.Tracer().trace(model.train(mode)) for mode in (True, False)}
    for graph in graphs.values():
        for node in graph.nodes:
            node.type = None  # a graph module with annotations that are text cannot be pickled
    return extraction.DualGraphModule(model.train(), graphs[True], graphs[False])


MAKE: dict[str, Callable[[], Any]] = {
    "symbolic_trace": traced,
    "feature extractor": lambda: Last(extracted()),
    "two graphs": lambda: Last(two_graphs()),
}
IMAGES = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def graph_module(model: nn.Module) -> Any:
    return next(module for module in model.modules() if isinstance(module, fx.GraphModule))


def count_stock_norms(model: nn.Module) -> int:
    """Return how many norms of PyTorch run in one call, which leaves the model's statistics unchanged."""
    state = copy.deepcopy(model.state_dict())
    with record_stock_norms() as norms, torch.no_grad():
        model(IMAGES)
    model.load_state_dict(state)
    return len(norms)


def check_evaluation(ours: nn.Module, stock: nn.Module, stock_norms: int = 0) -> None:
    """Check that both models are equal in evaluation mode, and how many norms of `ours` run unfused."""
    with torch.no_grad():
        assert_near(ours.eval()(IMAGES), stock.eval()(IMAGES), "output")
    assert count_stock_norms(ours) == stock_norms


class TestEqualsStock:
    @pytest.mark.parametrize("name", MAKE)
    def test_in_both_modes(self, name: str) -> None:
        stock, ours = MAKE[name](), fuse(MAKE[name]())
        for training in (True, False, True):
            assert_models_match(ours.train(training), stock.train(training), IMAGES, steps=1)
            assert count_stock_norms(ours) == 0 < count_stock_norms(stock)

    @pytest.mark.parametrize("name", MAKE)
    def test_fused_in_evaluation_mode(self, name: str) -> None:
        stock, ours = MAKE[name](), fuse(MAKE[name]().eval())
        check_evaluation(ours, stock)
        assert_models_match(ours.train(), stock.train(), IMAGES, steps=1)
        assert count_stock_norms(ours) == 0

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("name", MAKE)
    def test_frozen(self, name: str, training: bool) -> None:
        stock, source = MAKE[name](), MAKE[name]().train(training)
        frozen = freeze(source)
        assert source.training == training and not any(module.training for module in frozen.modules())
        for ours in (frozen, copy.deepcopy(frozen)):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                check_evaluation(ours, stock)
        with pytest.warns(UserWarning, match="frozen"):
            frozen.train()
        check_evaluation(frozen, stock)

    def test_leaves_with_a_forward_of_their_own(self) -> None:
        torch.manual_seed(0)
        root = randomize_norms(nn.Sequential(Scale(), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())).double()
        stock = fx.GraphModule(root, LeafTracer().trace(root))
        assert {node.target for node in stock.graph.nodes if node.op == "call_module"} == {"0", "1", "2", "3"}
        ours = fuse(copy.deepcopy(stock))
        assert_models_match(ours, stock, IMAGES)
        assert count_stock_norms(ours) == 0

    def test_nested(self) -> None:
        class Outer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = traced()

            def forward(self, x: Tensor) -> Tensor:
                return self.inner(x) * 2

        stock, ours = Outer(), fuse(Outer())
        assert_models_match(ours, stock, IMAGES)
        assert count_stock_norms(ours) == 0
        check_evaluation(copy.deepcopy(ours), stock)

    def test_functions_of_the_user(self) -> None:
        root = randomize_norms(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))).double()
        stock = fx.symbolic_trace(root)
        node = next(node for node in stock.graph.nodes if node.target == "1")
        with stock.graph.inserting_after(node):
            added = stock.graph.call_function(double, (node,))
        node.replace_all_uses_with(added, delete_user_cb=lambda user: user is not added)
        stock.recompile()
        ours = fuse(copy.deepcopy(stock))
        assert_models_match(ours, stock, IMAGES)
        assert count_stock_norms(ours) == 0

    def test_extractor_of_a_fused_model(self) -> None:
        """It captures the layers of the model, and is fused by itself."""
        names = {"layer2": "first", "layer4": "last"}
        extractor = extraction.create_feature_extractor(fuse(randomize_norms(small_resnet())), names)
        stock = Last(extracted())
        check_evaluation(Last(extractor), stock, count_stock_norms(stock))
        check_evaluation(fuse(Last(extractor)), stock)

    @pytest.mark.parametrize("transform", [fuse, freeze], ids=["fuse", "freeze"])
    def test_traced_again(self, transform: Callable[[nn.Module], Any]) -> None:
        stock = traced().eval()
        again = fx.symbolic_trace(transform(traced().eval()))
        check_evaluation(again, stock, NORMS)
        check_evaluation(fuse(again), stock)

    def test_compiled(self) -> None:
        stock, ours = MAKE["two graphs"](), fuse(MAKE["two graphs"]())
        compiled = torch.compile(ours, backend="eager", fullgraph=True)
        try:
            with torch.no_grad():
                assert_near(compiled(IMAGES), stock(IMAGES), "output in training")
                assert_near(compiled.eval()(IMAGES), stock.eval()(IMAGES), "output in evaluation")
        finally:
            torch._dynamo.reset()

    def test_interpreted(self) -> None:
        stock, ours = traced().eval(), fuse(traced().eval())
        assert_near(fx.Interpreter(ours).run(IMAGES), stock(IMAGES), "output")


def double(x: Tensor) -> Tensor:
    return x * 2


def pickled(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


class TestCopies:
    @pytest.mark.parametrize("name", MAKE)
    @pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, pickled], ids=["deepcopy", "copy", "pickle"])
    def test_are_fused(self, name: str, duplicate: Callable[[Any], Any]) -> None:
        stock, ours = MAKE[name](), fuse(MAKE[name]())
        if (
            name != "symbolic_trace"
        ):  # torch makes one graph of the two by pickling, and a copy without them by copy.copy
            stock, ours = stock.eval(), ours.eval()
        made = duplicate(ours)
        if duplicate is copy.copy or name == "symbolic_trace":
            assert made.training == ours.training
        check_evaluation(made, stock)
        check_evaluation(ours, stock)
        assert fused_res.summarize(made).norms_fused == fused_res.summarize(ours).norms_fused

    def test_are_independent(self) -> None:
        """A copy's graph is edited: the source runs its own, and neither runs the other's program."""
        ours = fuse(traced().eval())
        made = copy.deepcopy(ours)
        scale_additions(made)
        stock, edited = traced().eval(), traced().eval()
        scale_additions(edited)
        check_evaluation(ours, stock)
        check_evaluation(made, edited, NORMS)

    def test_program_of_another_graph_module(self) -> None:
        """A program is moved by hand to a module with another graph: it does not run there."""
        ours, other = fuse(traced().eval()), traced().eval()
        scale_additions(other)
        expected = other(IMAGES)
        fuse(other)._fused_res.programs = ours._fused_res.programs
        assert_near(other(IMAGES), expected, "output")

    def test_classes_are_garbage_with_their_instance(self) -> None:
        ours = fuse(fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))))
        kinds = [weakref.ref(kind) for kind in type(ours).__mro__[:2]]
        del ours
        gc.collect()
        assert [kind() for kind in kinds] == [None, None]


def scale_additions(module: fx.GraphModule) -> None:
    """Double the result of every residual addition."""
    for node in module.graph.find_nodes(op="call_function", target=operator.iadd) or module.graph.find_nodes(
        op="call_function", target=operator.add
    ):
        with module.graph.inserting_after(node):
            doubled = module.graph.call_function(torch.mul, (node, 2.0))
        node.replace_all_uses_with(doubled, delete_user_cb=lambda user, doubled=doubled: user is not doubled)
    module.recompile()


class TestChanges:
    """The graph changes after :func:`fuse`."""

    @pytest.mark.parametrize("transform", [fuse, freeze], ids=["fuse", "freeze"])
    def test_edited_in_place(self, transform: Callable[[nn.Module], Any]) -> None:
        ours, stock = transform(traced().eval()), traced().eval()
        for model in (ours, stock):
            scale_additions(model)
        check_evaluation(ours, stock, NORMS)
        check_evaluation(fuse(ours), stock)
        check_evaluation(unfuse(ours), stock, NORMS)

    def test_assigned(self) -> None:
        ours, stock, other = fuse(traced().eval()), traced().eval(), traced().eval()
        before = ours.graph
        scale_additions(other)
        ours.graph = copy.deepcopy(other.graph)
        check_evaluation(ours, other, NORMS)
        ours.graph = before
        check_evaluation(ours, stock)

    def test_edited_without_recompile(self) -> None:
        """The module computes what the last ``recompile`` generated."""
        ours, stock = fuse(traced().eval()), traced().eval()
        for node in ours.graph.find_nodes(op="call_module", target="fc"):
            node.replace_all_uses_with(node.args[0])
        check_evaluation(ours, stock)
        ours.recompile()
        assert ours(IMAGES).shape != stock(IMAGES).shape

    def test_same_text_with_another_function(self) -> None:
        """Only a global variable of the generated code differs, and the text is the same."""
        root = randomize_norms(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))).double().eval()
        ours = fx.symbolic_trace(root)
        with ours.graph.inserting_before(ours.graph.output_node()):
            node = ours.graph.call_function(double, (ours.graph.output_node().args[0],))
        ours.graph.output_node().args = (node,)
        ours.recompile()
        code, expected = ours.code, ours(IMAGES)
        fuse(ours)
        assert_near(ours(IMAGES), expected, "output")

        def triple(x: Tensor) -> Tensor:
            return x * 3

        triple.__name__, triple.__qualname__ = double.__name__, double.__qualname__
        node.target = triple
        ours.recompile()
        assert ours.code == code
        assert_near(ours(IMAGES), expected * 1.5, "output of the edited graph")

    @pytest.mark.parametrize("name", MAKE)
    def test_recompiled_without_a_change(self, name: str) -> None:
        ours, stock = fuse(MAKE[name]()), MAKE[name]()
        graph_module(ours).recompile()
        check_evaluation(ours, stock)
        module = graph_module(ours)
        module.graph = module.graph
        check_evaluation(ours, stock)

    @pytest.mark.parametrize("mode", [True, False])
    def test_one_of_two_graphs_edited(self, mode: bool) -> None:
        """An edited graph takes effect at the next switch to its mode."""
        ours, stock = fuse(Last(two_graphs())), Last(two_graphs())
        for model in (ours, stock):
            module = graph_module(model.train(not mode))
            graph = module.train_graph if mode else module.eval_graph
            node = graph.find_nodes(op="call_module", target="scale.conv")[0]
            with graph.inserting_after(node):
                scaled = graph.call_function(torch.mul, (node, 3.0))
            node.replace_all_uses_with(scaled, delete_user_cb=lambda user, scaled=scaled: user is not scaled)
        for training in (not mode, mode):
            assert_near(ours.train(training)(IMAGES), stock.train(training)(IMAGES), f"output, training={training}")
            assert (count_stock_norms(ours) == 0) == (training != mode)

    def test_forward_of_the_class_replaced(self) -> None:
        ours, stock = fuse(traced().eval()), traced().eval()
        forward = type(ours).__mro__[1].forward
        type(ours).__mro__[1].forward = lambda self, x: forward(self, x) + 1
        assert_near(ours(IMAGES), stock(IMAGES) + 1, "output")

    def test_printed_and_reverted(self) -> None:
        ours, stock = fuse(traced().eval()), traced().eval()
        assert str(ours) == str(stock) and ours.code == stock.code
        assert ours.print_readable(print_output=False) == stock.print_readable(print_output=False)
        kind = type(ours).__mro__[1]
        assert type(unfuse(ours)) is kind and "_fused_res" not in vars(ours)
        check_evaluation(ours, stock, NORMS)


class TestRefused:
    def test_overridden_call(self) -> None:
        class Counted(fx.GraphModule):
            calls = 0

            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                Counted.calls += 1
                return super().__call__(*args, **kwargs)

        class Compiled(fx.GraphModule):
            def recompile(self) -> Any:
                return super().recompile()

        root = nn.Sequential(Scale())
        graph = fx.symbolic_trace(root).graph
        for kind, reason in ((Counted, "overrides __call__"), (Compiled, "compiled in another way")):
            with pytest.raises(Untraceable, match=reason):
                symbolic.record(kind(root, copy.deepcopy(graph)), True)

    def test_functions_are_equal_by_value(self) -> None:
        first, second = traced(), traced()
        assert graph_modules.known_forward(type(first), type(second).forward) is not type(first).forward
        known = graph_modules.known_forward(type(first), type(first).forward)
        assert graph_modules.known_forward(type(first), traced().forward.__func__) in (known, type(second).forward)
