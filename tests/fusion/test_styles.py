"""Every style of benchmarks/styles, fused and frozen, equals stock PyTorch in float64, and its norms run fused."""

from __future__ import annotations

import contextlib
import copy
import functools
import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.styles import BY_NAME, STYLES, Style
from fused_res import freeze, fuse, summarize, unfuse
from fused_res._torch_compat import BatchNorm
from tests.support.model_comparison import assert_near, randomize_norms

#: Only the order of rounding differs.
TOLERANCE = 1e-9
LAYOUTS = (torch.contiguous_format, torch.channels_last)
#: Stock networks that pickle does not support, because they hold a lambda.
#: An unpickled module is recorded by itself, with tensors as its arguments: these blocks get a list.
PICKLED_AS_STOCK = ("densenet",)
NOT_PICKLABLE = ("cifar-option-a", "shortcut-kinds")

each_style = pytest.mark.parametrize("style", STYLES, ids=lambda style: style.name)


@functools.cache
def pristine(name: str) -> nn.Module:
    """Return the stock network of a style, in float64. It is shared: copy it before a call."""
    torch.manual_seed(0)
    return randomize_norms(BY_NAME[name].build(8)).double()


def stock_of(style: Style) -> nn.Module:
    return copy.deepcopy(pristine(style.name))


def as_layout(input: Tensor, layout: torch.memory_format) -> Tensor:
    """Return a batch in the memory format of its rank; one of signals or vectors is as it is."""
    if layout is torch.channels_last and input.dim() == 5:
        layout = torch.channels_last_3d
    return input.to(memory_format=layout) if input.dim() >= 4 else input


def inputs_of(style: Style, layout: torch.memory_format = torch.contiguous_format, step: int = 0) -> list[Tensor]:
    torch.manual_seed(1)
    inputs = torch.randn(style.inputs, 3, *style.shape, dtype=torch.float64) + 0.1 * step
    return [as_layout(input, layout).requires_grad_() for input in inputs]


def tensors_in(output: Any, name: str = "output") -> dict[str, Tensor]:
    """Return the tensors in a nested output by their path, which contains the type of each container."""
    if isinstance(output, Tensor):
        return {name: output}
    if output is None:
        return {}
    name = f"{name}:{type(output).__name__}"
    if isinstance(output, Mapping):
        items = output.items()
    elif isinstance(output, (tuple, list)):
        items = dict(enumerate(output)).items()
    else:
        items = vars(output).items()
    return {path: tensor for key, value in items for path, tensor in tensors_in(value, f"{name}.{key}").items()}


def call(model: nn.Module, inputs: list[Tensor]) -> dict[str, Tensor]:
    """Call a model with the same random numbers every time."""
    torch.manual_seed(2)
    return tensors_in(model(*inputs))


def assert_all_near(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], when: str) -> None:
    assert list(actual) == list(expected), f"names of tensors {when}"
    for name, tensor in expected.items():
        assert_near(actual[name], tensor, f"{name} {when}", TOLERANCE)


def gradients(model: nn.Module, inputs: list[Tensor]) -> dict[str, Tensor]:
    named = {f"input {index}": tensor for index, tensor in enumerate(inputs)} | dict(model.named_parameters())
    return {name: tensor.grad for name, tensor in named.items() if tensor.grad is not None}


def assert_training_matches(
    actual: nn.Module, stock: nn.Module, style: Style, layout: torch.memory_format = torch.contiguous_format
) -> None:
    """Compare outputs, gradients and state over two training steps, then an evaluation with the state they leave."""
    models = (actual.train(), stock.train())
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-2) for model in models]
    for step in range(2):
        when = f"in step {step}"
        inputs = [inputs_of(style, layout, step) for _ in models]
        outputs = [call(model, x) for model, x in zip(models, inputs, strict=True)]
        assert_all_near(*outputs, when)
        for tensors in outputs:
            weights = [torch.linspace(-1, 2, t.numel(), dtype=t.dtype).view(t.shape) for t in tensors.values()]
            torch.autograd.backward(list(tensors.values()), weights)
        assert_all_near(*(gradients(model, x) for model, x in zip(models, inputs, strict=True)), f"'s gradient {when}")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert_all_near(*(model.state_dict() for model in models), f"after step {step}")
    assert_evaluation_matches(actual.eval(), stock.eval(), style, layout)


def assert_evaluation_matches(
    actual: nn.Module, stock: nn.Module, style: Style, layout: torch.memory_format = torch.contiguous_format
) -> None:
    x = inputs_of(style, layout)
    with torch.no_grad():
        assert_all_near(call(actual, x), call(stock, x), "in evaluation")


@contextlib.contextmanager
def stock_norms(model: nn.Module) -> Iterator[set[str]]:
    """Collect the names of the batch norms of `model` that stock PyTorch computes."""
    names = {
        id(tensor): name
        for name, module in model.named_modules()
        if isinstance(module, BatchNorm)
        for tensor in (module.running_mean, module.weight)
        if tensor is not None
    }
    ran: set[str] = set()
    original = F.batch_norm

    def batch_norm(
        input: Tensor, running_mean: Any, running_var: Any, weight: Any = None, *rest: Any, **more: Any
    ) -> Any:
        ran.update(names[id(tensor)] for tensor in (running_mean, weight) if id(tensor) in names)
        return original(input, running_mean, running_var, weight, *rest, **more)

    F.batch_norm = batch_norm
    try:
        yield ran
    finally:
        F.batch_norm = original


def norms_left_stock(actual: nn.Module, stock: nn.Module, style: Style) -> tuple[set[str], set[str]]:
    """Return the names of the norms that stock PyTorch computes in a call of `actual`, and in a call of `stock`."""
    with stock_norms(actual) as left:
        call(actual, inputs_of(style))
    with stock_norms(stock) as every:
        call(stock, inputs_of(style))
    return left, every


def assert_share(style: Style, left: set[str], every: set[str], when: str) -> None:
    share = 1 - len(left) / len(every)
    assert share >= style.share, f"{share:.0%} of the norms ran fused {when}, not {sorted(left)}"


@each_style
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_fused_matches_stock(style: Style, layout: torch.memory_format) -> None:
    stock = stock_of(style)
    for parameter in stock.parameters():
        parameter.data = as_layout(parameter.data, layout)
    assert_training_matches(fuse(copy.deepcopy(stock)), stock, style, layout)


@each_style
def test_share_of_fused_norms(style: Style) -> None:
    stock = stock_of(style)
    fused = fuse(copy.deepcopy(stock))
    for training, when in ((True, "in training"), (False, "in evaluation")):
        assert_share(style, *norms_left_stock(fused.train(training), stock.train(training), style), when)


@functools.cache
def frozen_of(name: str) -> nn.Module:
    return freeze(stock_of(BY_NAME[name]).eval())


@each_style
def test_summary_names_the_norms_that_are_left(style: Style) -> None:
    fused = fuse(stock_of(style))
    every = {name for name, module in fused.named_modules() if isinstance(module, BatchNorm)}
    assert_share(style, {row.name for row in summarize(fused).left} & every, every, "according to summarize")


@each_style
def test_frozen_matches_stock(style: Style) -> None:
    stock, frozen = stock_of(style).eval(), frozen_of(style.name)
    assert_evaluation_matches(frozen, stock, style)
    assert_evaluation_matches(frozen, stock, style, torch.channels_last)
    assert_all_near(frozen.state_dict(), stock.state_dict(), "of the frozen model")


@each_style
def test_share_of_fused_norms_of_frozen(style: Style) -> None:
    stock = stock_of(style).eval()
    with torch.no_grad():
        left, every = norms_left_stock(frozen_of(style.name), stock, style)
    # A norm without running statistics cannot be folded into its convolution.
    left = {name for name in left if stock.get_submodule(name).running_mean is not None}
    assert_share(style, left, every, "in the frozen model")


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@each_style
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_copy_of_fused_is_fused(style: Style, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    stock = stock_of(style)
    if duplicate is pickled and style.name in NOT_PICKLABLE:
        with pytest.raises((AttributeError, pickle.PicklingError)):
            pickled(stock)
        pytest.skip("the stock network holds a lambda")
    fused = duplicate(fuse(copy.deepcopy(stock)))
    assert_training_matches(fused, stock, style)
    if duplicate is not pickled or style.name not in PICKLED_AS_STOCK:
        assert_share(style, *norms_left_stock(fused.train(), stock.train(), style), "in the copy")


@each_style
def test_unfuse_restores_stock(style: Style) -> None:
    stock = stock_of(style)
    restored = unfuse(fuse(copy.deepcopy(stock)))
    for (name, ours), theirs in zip(restored.named_modules(), stock.modules(), strict=True):
        assert type(ours) is type(theirs) and vars(ours).keys() == vars(theirs).keys(), name
    left, every = norms_left_stock(restored, stock, style)
    assert left == every


@pytest.mark.parametrize("name", ["cifar-basic", "mmcv-conv-module", "detectron2", "signal-1d"])
def test_compiled_is_one_graph_and_matches_stock(name: str) -> None:
    graphs: list[torch.fx.Graph] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(module.graph)
        return lookup_backend("aot_eager")(module, inputs)

    style = BY_NAME[name]
    fused = fuse(stock_of(style))
    torch._dynamo.reset()
    fused.compile(fullgraph=True, backend=backend)
    assert_training_matches(fused, stock_of(style), style)
    assert len(graphs) == 2  # one in training, one in evaluation
    left = [node for graph in graphs for node in graph.nodes if node.target in (F.batch_norm, torch.batch_norm)]
    assert not left


#: Parts of the names of ATen's operators.
KINDS = {"relu": "relu", "clamp": "relu", "add": "add", "convolution": "conv", "batch_norm": "norm", "max_pool": "pool"}


class OperatorCounter(TorchDispatchMode):
    """Counts convolutions, norms, additions, ReLUs and max pools with the shapes of their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for part, kind in KINDS.items():
            if part in func._schema.name:
                shapes = [tuple(arg.shape) for arg in args if isinstance(arg, Tensor)]
                self.counted[kind, *shapes] += 1
        return func(*args, **(kwargs or {}))


def architecture(style: Style) -> tuple[Counter, Counter]:
    """Return the operators of a forward and the shapes of the parameters."""
    model, inputs = stock_of(style).eval(), inputs_of(style)
    with OperatorCounter() as operators, torch.no_grad():
        model(*inputs)
    return operators.counted, Counter(tuple(parameter.shape) for parameter in model.parameters())


@pytest.mark.parametrize("style", [style for style in STYLES if style.twin], ids=lambda style: style.name)
def test_twin_has_the_same_architecture(style: Style) -> None:
    operators, parameters = architecture(style)
    assert (operators, parameters) == architecture(BY_NAME[style.twin])
    assert {kind for kind, *_ in operators} >= {"conv", "norm", "add", "relu"}


def test_names_are_unique() -> None:
    assert len(BY_NAME) == len(STYLES)
