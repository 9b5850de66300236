"""The end of a frozen network, global average pooling and classifier, in the inference graph of the blocks before it.

Every spelling is one operator call. Hooks, changed weights and the training mode of a dropout have their effect.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_res import _extension, freeze, fuse, models, summarize
from fused_res.backends.cpu import inference_graph
from fused_res.nn import packed
from fused_res.testing import stub_torchvision_operators
from tests.support.cpu_backends import BACKENDS
from tests.support.model_comparison import randomize_norms, small_resnet

stub_torchvision_operators()

pytestmark = pytest.mark.skipif(
    "cpu" not in BACKENDS or _extension.cpu_isa() == "baseline", reason="needs the cpu backend's convolutions"
)

CHANNELS, CLASSES = 11, 5
#: Error relative to the output's norm: of a few convolutions in float32, of rounding each value once in the others.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}


class Block(nn.Module):
    """A residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.c2, self.n2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.n2(self.c2(F.relu(self.n1(self.c1(x))))))


class Network(nn.Module):
    """A stem and a block, with all layers that a head may use; `head` is called with the module and the feature map."""

    head: Callable[[Any, Tensor], Any]

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, CHANNELS, 3, 2), nn.BatchNorm2d(CHANNELS), nn.ReLU())
        self.block = Block(CHANNELS)
        self.avgpool, self.flatten, self.drop = nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Dropout(0.5)
        self.identity = nn.Identity()
        self.fc = nn.Linear(CHANNELS, CLASSES)
        self.second, self.scalar = nn.Linear(CLASSES, 3), nn.Linear(1, 2)
        self.classifier = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(CHANNELS, CLASSES)
        )

    def forward(self, x: Tensor) -> Any:
        return self.head(self.block(self.stem(x)))


def network(head: Callable[[Any, Tensor], Any]) -> Any:
    """Return a network whose forward ends with `head`, with random weights and statistics, in evaluation mode."""
    torch.manual_seed(0)
    kind: Any = type("Ending", (Network,), {"head": head})
    return randomize_norms(kind()).eval()


def images(batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, 21, 18, generator=torch.Generator().manual_seed(1)).to(dtype)


#: Heads that run in the graph: the name says how they are written.
HEADS: dict[str, Callable[[Any, Tensor], Any]] = {
    "torchvision": lambda m, x: m.fc(torch.flatten(m.avgpool(x), 1)),
    "flatten method": lambda m, x: m.fc(m.avgpool(x).flatten(1)),
    "flatten, keywords": lambda m, x: m.fc(torch.flatten(m.avgpool(x), start_dim=1, end_dim=-1)),
    "nn.Flatten": lambda m, x: m.fc(m.flatten(m.avgpool(x))),
    "view(size(0))": lambda m, x: _view(m, m.avgpool(x)),
    "view(size()[0])": lambda m, x: _view_shape(m, m.avgpool(x)),
    "reshape(shape[0])": lambda m, x: _reshape(m, m.avgpool(x)),
    "F.adaptive_avg_pool2d 1": lambda m, x: m.fc(F.adaptive_avg_pool2d(x, 1).flatten(1)),
    "F.adaptive_avg_pool2d (1, 1)": lambda m, x: m.fc(F.adaptive_avg_pool2d(x, output_size=(1, 1)).flatten(1)),
    "mean (2, 3)": lambda m, x: m.fc(x.mean((2, 3))),
    "mean [-1, -2]": lambda m, x: m.fc(x.mean([-1, -2])),
    "mean keywords": lambda m, x: m.fc(x.mean(dim=(3, 2), keepdim=False)),
    "torch.mean": lambda m, x: m.fc(torch.mean(x, dim=[2, 3])),
    "mean keepdim": lambda m, x: m.fc(x.mean((2, 3), keepdim=True).flatten(1)),
    "mean keepdim, positional": lambda m, x: m.fc(m.flatten(x.mean((2, -1), True))),
    "mean and flatten": lambda m, x: m.fc(torch.flatten(x.mean((2, 3)), 1)),
    "dropout": lambda m, x: m.fc(m.drop(m.flatten(m.avgpool(x)))),
    "dropout before flatten": lambda m, x: m.fc(m.drop(m.avgpool(x)).flatten(1)),
    "F.dropout": lambda m, x: m.fc(F.dropout(m.avgpool(x).flatten(1), p=0.3, training=m.training)),
    "identity": lambda m, x: m.fc(m.identity(m.flatten(m.identity(m.avgpool(m.identity(x)))))),
    "sequential": lambda m, x: m.classifier(x),
    "without bias": lambda m, x: m.fc(m.flatten(m.avgpool(x))),
    "pooling alone": lambda m, x: m.identity(m.avgpool(x).flatten(1)),
    "mean alone": lambda m, x: x.mean((2, 3)),
}  # fmt: skip


def _view(m: Any, x: Tensor) -> Any:
    return m.fc(x.view(x.size(0), -1))


def _view_shape(m: Any, x: Tensor) -> Any:
    return m.fc(x.view((x.size()[0], -1)))


def _reshape(m: Any, x: Tensor) -> Any:
    return m.fc(torch.flatten(x.reshape(x.shape[0], -1), 1))


def build(name: str) -> Any:
    model = network(HEADS[name])
    if name == "without bias":
        model.fc.bias = None
    return model


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """The calls of ``conv_program``: number of steps, and shape of the output."""
    calls: list[SimpleNamespace] = []
    operator = inference_graph.conv_program

    def call(*arguments: Any) -> Tensor:
        output: Tensor = operator(*arguments)
        steps = len(arguments[3]) // sum(1 if number else 2 for number in _FIELD_IS_NUMBER)
        calls.append(SimpleNamespace(steps=steps, shape=tuple(output.shape)))
        return output

    monkeypatch.setattr(inference_graph, "conv_program", call)
    return calls


#: For each field of a step, whether it is one number and not a pair.
_FIELD_IS_NUMBER = [
    name not in ("kernel_size", "stride", "padding", "dilation") for name in _extension.cpp.GRAPH_STEP_FIELDS
]


def aten_operators(run: Callable[[], Any]) -> set[str]:
    """Return the names of the operators that `run` calls."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return {event.name for event in profile.events() if "::" in event.name}


def exact(model: nn.Module, x: Tensor) -> Any:
    return copy.deepcopy(model).double()(x.double())


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@torch.inference_mode()
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_is_one_call(name: str, dtype: torch.dtype, batch: int, programs: list[SimpleNamespace]) -> None:
    model, x = build(name).to(dtype), images(batch, dtype)
    frozen = freeze(model)
    outputs = [frozen(x), frozen(x)]
    steps = 4 if name.endswith("alone") else 5
    assert [call.steps for call in programs] == [steps, steps]
    expected = exact(model, x)
    assert torch.equal(*outputs) and outputs[0].dtype is dtype and outputs[0].is_contiguous()
    assert outputs[0].shape == expected.shape
    assert relative_error(outputs[0], expected) <= TOLERANCE[dtype]


#: Operators that return their input, or a view of it.
_FREE = {"aten::flatten", "aten::view", "aten::to"}


@torch.inference_mode()
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", ["ours", "torchvision"])
def test_resnet18_is_one_operator(kind: str, dtype: torch.dtype) -> None:
    """The whole network, without any other operator of PyTorch that computes something."""
    model: nn.Module
    if kind == "ours":
        model = randomize_norms(models.resnet18(num_classes=7)).to(dtype).eval()
    else:
        pytest.importorskip("torchvision")
        model = randomize_norms(small_resnet()).to(dtype).eval()
    frozen, x = freeze(model), torch.randn(2, 3, 40, 40, dtype=dtype).to(memory_format=torch.channels_last)
    frozen(x)
    assert aten_operators(lambda: frozen(x)) - _FREE == {"fused_res_cpu::conv_program"}
    assert relative_error(frozen(x), exact(model, x)) <= 4 * TOLERANCE[dtype]
    (row,) = summarize(frozen).rows
    assert row.fused and "global average pool + linear" in row.why and "linear" in row.why.split("backend=")[1]


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["torchvision", "mean (2, 3)", "pooling alone"])
def test_autocast(name: str, dtype: torch.dtype, programs: list[SimpleNamespace]) -> None:
    """The dtype is stock's, in an autocast region and by ``freeze(dtype=...)``; the errors over 8 networks, too."""
    errors = torch.zeros(2, dtype=torch.float64)
    for seed in range(8):
        model, x = build(name), images(16)
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        with torch.autocast("cpu", dtype):
            stock, ambient = model(x), freeze(model)(x)
        requested = freeze(model, dtype=dtype)(x)
        assert stock.dtype is ambient.dtype is requested.dtype is dtype
        assert torch.equal(ambient, requested)
        errors += torch.stack([(y - exact(model, x)).square().sum() for y in (requested, stock)])
    assert len(programs) == 16
    assert errors[0] <= 1.1 * errors[1]  # eight networks scatter by 10 %


@torch.inference_mode()
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_error_of_the_head_is_at_most_stocks(dtype: torch.dtype, programs: list[SimpleNamespace]) -> None:
    """The stem's convolution is exact, so that all error is that of the pooling and of the linear layer.

    In 16 bits both round the pooled values and the logits once, so that the errors are equal up to ties. In float32 the
    order of stock's summation differs between processors: 1.03 times its squared error on a Xeon, less on a Zen 4.
    """
    for channels, size in ((48, 60), (1024, 7)):
        errors = torch.zeros(2, dtype=torch.float64)
        for seed in range(4):
            torch.manual_seed(seed)
            stem, norm = nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels, eps=0)
            stem.weight.data = torch.eye(channels)[:, :, None, None]
            head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 30)
            model = nn.Sequential(stem, norm, *head).to(dtype).eval()
            x = (torch.randn(8, channels, size, size) + 1).to(dtype)
            expected = exact(model, x)
            errors += torch.stack([(y - expected).square().sum() for y in (freeze(model)(x), model(x))])
        assert errors[0] > 0 and errors[0] <= (1.1 if dtype is torch.float32 else 1.01) * errors[1], channels
    assert [call.steps for call in programs] == [3] * 8


# Heads that are not, or only partly, in the graph


class Wider(nn.Linear):
    """A classifier with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _returns_features(m: Any, x: Tensor) -> Any:
    pooled = m.avgpool(x)
    return m.fc(torch.flatten(pooled, 1)), pooled, x


def _returns_flat(m: Any, x: Tensor) -> Any:
    flat = torch.flatten(m.avgpool(x), 1)
    return m.fc(flat), flat


def _writes(m: Any, x: Tensor) -> Any:
    pooled = m.avgpool(x)
    pooled.add_(1)
    return m.fc(torch.flatten(pooled, 1))


def _size_escapes(m: Any, x: Tensor) -> Any:
    pooled = m.avgpool(x)
    batch = pooled.size(0)
    return m.fc(pooled.view(batch, -1)).view(batch, 1, -1)


#: Heads, and the number of steps in the graph before or with them: 3 are the blocks', 4 with the pooling.
OTHER_HEADS: dict[str, tuple[Callable[[Any, Tensor], Any], int]] = {
    "returns the features": (_returns_features, 3),
    "returns the flat features": (_returns_flat, 4),
    "writes to the features": (_writes, 3),
    "size used elsewhere": (_size_escapes, 3),
    "size 2": (lambda m, x: m.fc(F.adaptive_avg_pool2d(x, 2).flatten(2).mean(2)), 3),
    "size 2, flattened": (lambda m, x: F.adaptive_avg_pool2d(x, 2).flatten(1), 3),
    "F.dropout of everything": (lambda m, x: m.fc(F.dropout(m.avgpool(x).flatten(1), 1.0, True)), 4),
    "size (1, None)": (lambda m, x: m.fc(F.adaptive_avg_pool2d(x, (1, None)).mean(3).flatten(1)), 3),
    "mean over one dimension": (lambda m, x: m.fc(x.mean(2).mean(2)), 3),
    "mean over channels": (lambda m, x: x.mean((1, 2)), 3),
    "mean of all": (lambda m, x: x.mean(), 3),
    "mean in float64": (lambda m, x: x.mean((2, 3), dtype=torch.float64), 3),
    "flatten all": (lambda m, x: torch.flatten(m.avgpool(x)), 3),
    "flatten 2": (lambda m, x: torch.flatten(m.avgpool(x), 2), 3),
    "linear over the width": (lambda m, x: m.scalar(m.avgpool(x)), 3),
    "functional linear": (lambda m, x: F.linear(m.avgpool(x).flatten(1), m.fc.weight, m.fc.bias), 4),
    "two linear layers": (lambda m, x: m.second(F.relu(m.fc(m.avgpool(x).flatten(1)))), 5),
    "activation first": (lambda m, x: m.fc(F.relu(m.avgpool(x).flatten(1))), 4),
    "convolution as classifier": (lambda m, x: F.conv2d(m.avgpool(x), m.fc.weight[:, :, None, None]), 3),
    "gate": (lambda m, x: m.fc((x * m.avgpool(x).sigmoid()).mean((2, 3))), 3),
}  # fmt: skip


def assert_equal_to_stock(model: Any, frozen: Any, x: Tensor) -> None:
    """Compare the outputs with those of the model in float64."""
    actual, expected = frozen(x), exact(model, x)
    for one, other in zip(*[y if isinstance(y, tuple) else (y,) for y in (actual, expected)], strict=True):
        assert one.shape == other.shape and relative_error(one, other) <= TOLERANCE[torch.float32]


@torch.inference_mode()
@pytest.mark.parametrize("name", OTHER_HEADS)
def test_other_heads(name: str, programs: list[SimpleNamespace]) -> None:
    head, steps = OTHER_HEADS[name]
    model = network(head)
    frozen = freeze(model)
    assert_equal_to_stock(model, frozen, images())
    assert [call.steps for call in programs] == [steps]
    heads = [head for program in frozen._fused_res.programs for head in program.heads]
    assert [head.linear is not None for head in heads] == ([steps == 5] if steps > 3 else [])


@torch.inference_mode()
def test_classifier_of_another_class(programs: list[SimpleNamespace]) -> None:
    model = network(HEADS["torchvision"])
    model.fc = Wider(CHANNELS, CLASSES)
    assert_equal_to_stock(model, freeze(model), images())
    assert [call.steps for call in programs] == [4]


@torch.inference_mode()
def test_fuse_without_packed_weights_keeps_stock_pooling_and_linear() -> None:
    model = network(HEADS["torchvision"])
    operators = aten_operators(lambda: fuse(copy.deepcopy(model))(images()))
    assert {"aten::linear", "aten::adaptive_avg_pool2d"} <= operators


@torch.inference_mode()
def test_oneDNN_or_float64_runs_the_linear_layer_of_pytorch(
    programs: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the graph cannot contain the linear layer, the blocks before still run as one graph."""
    model = network(HEADS["torchvision"])
    double = freeze(copy.deepcopy(model).double())
    assert relative_error(double(images(dtype=torch.float64)), exact(model, images())) <= 1e-12
    assert not programs and [type(step).__name__ for step in steps_of(double)] == [
        "_BlockStep",
        "_BlockStep",
        "_HeadStep",
    ]
    select = inference_graph.select

    def only_convolutions(algorithms: Any, problem: Any, preference: str) -> Any:
        if problem.weight[0] == CLASSES:
            algorithms = tuple([algorithm for algorithm in algorithms if algorithm.name == "onednn"])
        return select(algorithms, problem, preference)

    monkeypatch.setattr(inference_graph, "select", only_convolutions)
    inference_graph.plan.cache_clear()
    try:
        frozen = freeze(model)
        assert_equal_to_stock(model, frozen, images())
    finally:
        inference_graph.plan.cache_clear()
    assert [call.steps for call in programs] == [3]
    assert [type(step).__name__ for step in steps_of(frozen)] == ["_GraphStep", "_HeadStep"]


def steps_of(frozen: Any) -> Any:
    """Return the steps of the last call of a frozen model."""
    (sequence,) = frozen._fused_res.packed._sequences.values()
    return sequence.last.steps


# Changes after freezing


class TestChanges:
    @torch.no_grad()
    @pytest.mark.parametrize(
        "change",
        [
            lambda m: m.fc.weight.mul_(2),
            lambda m: m.fc.bias.add_(1),
            lambda m: setattr(m.fc, "weight", nn.Parameter(m.fc.weight + 1)),
            lambda m: setattr(m.fc, "bias", None),
            lambda m: setattr(m.fc.weight, "data", m.fc.weight.data + 1),
            lambda m: setattr(m, "fc", nn.Linear(CHANNELS, 2)),
            lambda m: setattr(m, "fc", nn.Identity()),
            lambda m: setattr(m, "fc", Wider(CHANNELS, 4)),
            lambda m: setattr(m, "avgpool", nn.AdaptiveMaxPool2d(1)),
            lambda m: setattr(m, "flatten", nn.Sequential(nn.Flatten(), nn.Sigmoid())),
            lambda m: m.load_state_dict({name: value + 0.5 for name, value in m.state_dict().items()}),
        ],
        ids=["weight", "bias", "replaced", "no bias", "data", "new fc", "no fc", "other", "pool", "flatten", "state"],
    )  # fmt: skip
    def test_is_noticed(self, change: Callable[[Any], Any]) -> None:
        torch.manual_seed(5)
        model = network(HEADS["dropout"])
        frozen, x = freeze(model), images()
        before = frozen(x)
        state = torch.get_rng_state()
        for one in (model, frozen):
            torch.set_rng_state(state)
            change(one)
        assert frozen(x).shape != before.shape or not torch.allclose(frozen(x), before)
        assert_equal_to_stock(model, frozen, x)

    @torch.inference_mode()
    def test_settings_are_guarded(self) -> None:
        model = network(HEADS["nn.Flatten"])
        frozen, x = freeze(model), images()
        frozen(x)
        frozen.avgpool.output_size = 2
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            frozen(x)
        frozen.avgpool.output_size = (1, 1)
        assert_equal_to_stock(model, frozen, x)
        frozen.flatten.start_dim = 0
        with pytest.raises(RuntimeError, match="must match|mat1|size mismatch"):
            frozen(x)

    @torch.inference_mode()
    @pytest.mark.parametrize("name", ["avgpool", "flatten", "drop", "fc"])
    def test_hooks_see_and_change_values(self, name: str, programs: list[SimpleNamespace]) -> None:
        """The blocks before the head still run as one graph."""
        model = network(HEADS["dropout"])
        frozen, x = freeze(model), images()
        expected = frozen(x)
        seen: list[list[Tensor]] = []
        for one in (model, frozen):
            values: list[Tensor] = []
            handle = one.get_submodule(name).register_forward_hook(
                lambda _, args, y, values=values: (values.append(y.double()), 2 * y)[1]
            )
            output = one(x)
            seen.append([*values, output.double()])
            handle.remove()
        assert all(relative_error(a, b) <= 1e-5 for a, b in zip(*seen, strict=True)) and len(seen[0]) == 2
        assert torch.equal(frozen(x), expected)
        assert [call.steps for call in programs] == [5, 3, 5]

    def test_dropout_in_training_mode(self, programs: list[SimpleNamespace]) -> None:
        """Monte Carlo dropout: only the dropouts are in training mode."""
        model = network(HEADS["dropout"])
        frozen, x = freeze(model), images()
        outputs = []
        with torch.inference_mode():
            frozen(x)
            for one in (model, frozen):
                one.drop.training = True
                torch.manual_seed(2)
                outputs.append(one(x))
        assert relative_error(outputs[1], outputs[0]) <= 1e-5
        assert [call.steps for call in programs] == [5, 3]

    def test_gradients_of_the_input(self) -> None:
        model = network(HEADS["torchvision"])
        frozen = freeze(model)
        inputs = [images().requires_grad_() for _ in range(2)]
        for one, x in zip((model, frozen), inputs, strict=True):
            one(x).square().sum().backward()
        assert relative_error(inputs[1].grad, inputs[0].grad) <= 1e-4

    @torch.inference_mode()
    def test_copies_and_pickles(self, programs: list[SimpleNamespace]) -> None:
        frozen = freeze(models.resnet18(num_classes=3).eval())
        x = torch.randn(1, 3, 32, 32)
        expected = frozen(x)
        for same in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
            assert torch.equal(same(x), expected)
        assert len(programs) == 3

    @torch.inference_mode()
    @pytest.mark.parametrize("shape", [(0, 3, 21, 18), (2, 4, 21, 18), (3, 21, 18), (2, 3, 1, 1)])
    def test_unusual_inputs(self, shape: tuple[int, ...]) -> None:
        model = network(HEADS["torchvision"])
        results = []
        for one in (model, freeze(model)):
            try:
                results.append(str(one(torch.ones(shape)).shape))
            except (RuntimeError, ValueError) as error:
                results.append(f"{type(error).__name__}: {error}")
        assert results[0] == results[1]

    @torch.inference_mode()
    def test_compiled_and_exported(self) -> None:
        model = network(HEADS["dropout"])
        x = images()
        exported = torch.export.export(freeze(model), (x,)).module()
        assert relative_error(exported(x), exact(model, x)) <= 1e-5


@torch.inference_mode()
def test_head_of_a_step_is_checked() -> None:
    """Bad sizes of a pooling step raise an error that names the argument."""
    fields = _extension.cpp.GRAPH_STEP_FIELDS
    kind = _extension.cpp.GRAPH_STEP_KINDS[2]
    good: dict[str, Any] = dict.fromkeys(fields, 0) | {"kernel_size": (1, 1), "stride": (1, 1)}
    good |= {
        "padding": (0, 0),
        "dilation": (1, 1),
        "kind": kind,
        "input": -1,
        "output": -2,
        "residual": -3,
        "weight": -1,
    }
    good |= {"channels": 5, "height": 3, "width": 2, "out_channels": 5}
    x = torch.randn(2, 5, 3, 2)

    def run(sizes: tuple[int, ...] = (2, 5, 1, 1), arena: int = 0, **changes: Any) -> Tensor:
        values = [(good | changes)[field] for field in fields]
        steps = [item for value in values for item in (value if isinstance(value, tuple) else (value,))]
        output: Tensor = inference_graph.conv_program(x, [], [], steps, arena, 2, sizes)
        return output

    assert torch.allclose(run()[..., 0, 0], x.mean((2, 3)), atol=1e-6)
    for changes in ({"channels": 6}, {"height": 4}, {"width": 3}, {"sizes": (2, 4, 1, 1)}, {"output": 0, "arena": 4}):
        with pytest.raises(ValueError, match="steps: a value does not fit into its location"):
            run(**changes)
    for changes in ({"channels": 0}, {"height": -1}, {"width": 0}):
        with pytest.raises(ValueError, match="steps: expected positive channels, height and width"):
            run(**changes)
    for value in (3, -1):
        with pytest.raises(ValueError, match="steps: expected a kind of 0 to 2, got"):
            run(kind=value)


def test_packed_head_alone_of_a_program() -> None:
    """A head needs a block before it, and at most one linear layer of the block's channels."""
    conv, norm = nn.Conv2d(3, 6, 3).requires_grad_(False), nn.BatchNorm2d(6).eval().requires_grad_(False)
    block = packed.Block((packed.Unit(conv, norm, "relu"),))
    head = packed.Head(nn.Linear(7, 2).requires_grad_(False))
    with torch.inference_mode():
        assert packed.PackedProgram().run(images(), (block, head)) is None  # PyTorch raises the error
