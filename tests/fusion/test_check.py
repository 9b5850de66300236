"""fused_res.check: right models are ok, wrong ones are named, and nothing of the user's changes."""

from __future__ import annotations

import copy
import dataclasses
import random
import threading
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fused_res
from fused_res import functional
from fused_res.report import check as check_function
from fused_res.report.comparison import ALLOWED, Errors, named_tensors
from fused_res.testing import assert_within_stock_error, stub_torchvision_operators
from tests.support.model_comparison import randomize_norms, small_resnet

KINDS = [
    ("training", "outputs"),
    ("training", "gradients"),
    ("training", "buffers"),
    ("evaluation", "outputs"),
    ("evaluation", "gradients"),
    ("frozen", "outputs"),
]


def conv_norm_relu(inputs: int = 3, outputs: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


class OwnBlock(nn.Module):
    """The most copied spelling of a residual block, with a dropout."""

    def __init__(self, planes: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.dropout(out, self.dropout, self.training)
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class OwnNet(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = conv_norm_relu()
        self.block = OwnBlock(8, dropout)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.block(self.stem(x)).mean((2, 3)))


def image(*shape: int) -> Tensor:
    return torch.randn(*(shape or (4, 3, 12, 12)), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# --- right models -------------------------------------------------------------------------------------------


def test_resnet() -> None:
    stub_torchvision_operators()
    pytest.importorskip("torchvision", reason="the model is torchvision's")
    model = randomize_norms(small_resnet("Bottleneck")).float()
    report = fused_res.check(model, image(2, 3, 32, 32), seconds=0.01)
    assert report.ok, report
    assert [(one.mode, one.kind) for one in report.comparisons] == KINDS
    assert report.norms == report.norms_fused == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    by_kind = {(one.mode, one.kind): one.errors for one in report.comparisons}
    assert set(by_kind["training", "gradients"]) == {name for name, _ in model.named_parameters()} | {"input 0"}
    assert set(by_kind["training", "buffers"]) == {name for name, _ in model.named_buffers()}
    assert list(by_kind["frozen", "outputs"]) == ["output"]
    assert 0 < report.float64_difference < 1e-9
    assert [timing.mode for timing in report.timings] == ["training step", "evaluation", "frozen"]
    assert all(timing.stock > 0 and timing.fused > 0 and timing.runs >= 3 for timing in report.timings)
    assert 0 < report.fused_bytes < report.stock_bytes
    text = str(report)
    assert 18 <= len(text.splitlines()) <= 30 and max(map(len, text.splitlines())) < 200
    assert "ok: fused and stock agree" in text and f"{report.norms} of {report.norms} batch norms run fused" in text


def test_saved_bytes_are_those_of_the_tensors() -> None:
    """A convolution saves its input, a batch norm its input and two vectors, a ReLU its output."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Sigmoid())
    report = fused_res.check(model, image(), seconds=0)
    assert report.stock_bytes == 4 * (4 * 12 * 12 * (3 + 8 + 8) + 2 * 8)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_own_network(dropout: float) -> None:
    report = fused_res.check(OwnNet(dropout), image(), seconds=0)
    assert report.ok, report
    assert report.norms == 3 and 1 <= report.norms_fused <= 3
    assert report.timings == () and "interleaved" not in str(report)
    # The float64 copy drops the same elements: otherwise stock's error would be of the order of the values.
    assert all(one.stock_error < 1e-4 for one in report.comparisons if one.kind == "outputs")


class Pair(NamedTuple):
    logits: Tensor
    features: list[Tensor]


@dataclasses.dataclass
class Prediction:
    classes: Tensor
    probabilities: Tensor
    name: str = "prediction"


class NestedOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = OwnNet()

    def forward(self, images: dict[str, Any]) -> dict[str, Any]:
        features = self.net.stem(images["left"] - images["more"][0])
        logits = self.net.fc(self.net.block(features).mean((2, 3)))
        prediction = Prediction(logits.argmax(1), logits.softmax(1))
        return {"pair": Pair(logits, [features]), "prediction": prediction, "scale": 2, "none": None}


def test_nested_inputs_and_outputs() -> None:
    inputs = {"left": image(), "more": (image(4, 1, 12, 12),), "flag": True}
    report = fused_res.check(NestedOutput(), inputs, seconds=0)
    assert report.ok, report
    names = {
        "output['pair'][0]",
        "output['pair'][1][0]",
        "output['prediction'].classes",
        "output['prediction'].probabilities",
    }
    by_kind = {(one.mode, one.kind): set(one.errors) for one in report.comparisons}
    for mode in ("training", "evaluation", "frozen"):
        assert by_kind[mode, "outputs"] == names
    assert {"input 0", "input 1"} <= by_kind["training", "gradients"]


def testnamed_tensors_of_cycles_and_slots() -> None:
    class Slots:
        __slots__ = ("tensor", "unset")

    value: dict[str, Any] = {"slots": Slots()}
    value["slots"].tensor = torch.ones(1)
    value["cycle"] = value
    assert list(named_tensors("output", value)) == ["output['slots'].tensor"]


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 3)
        self.layers = conv_norm_relu()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(self.embedding(tokens).permute(0, 3, 1, 2))


def test_integer_input() -> None:
    tokens = torch.randint(0, 10, (4, 6, 6))
    report = fused_res.check(Tokens(), tokens, seconds=0)
    assert report.ok and report.norms == report.norms_fused == 1
    report = fused_res.check(Tokens().requires_grad_(False), tokens, seconds=0.01)  # no gradient at all
    assert report.ok and ("training", "gradients") not in [(one.mode, one.kind) for one in report.comparisons]


def test_autocast_and_half_precision() -> None:
    """An error of bfloat16 would be large for float32: stock's errors show which dtype has run."""
    model = OwnNet()
    report = fused_res.check(model, image(), autocast=torch.bfloat16, seconds=0)
    assert report.ok and "autocast to torch.bfloat16" in str(report)
    half = fused_res.check(model.bfloat16(), image().bfloat16(), seconds=0)
    assert half.ok and "torch.bfloat16" in str(half)
    for one in (report, half):
        assert all(1e-4 < part.stock_error < 0.1 for part in one.comparisons if part.kind == "outputs")
    assert fused_res.check(model.double(), image().double(), seconds=0).ok


class Casts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = conv_norm_relu()

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x.to(torch.float32)).float()
        y = torch.einsum("oc,nchw->nohw", torch.eye(8), y)
        return F.softmax(y, 1, dtype=torch.float32)


def test_forward_that_names_dtypes_runs_in_float64() -> None:
    report = fused_res.check(Casts(), image(), seconds=0)
    assert report.ok and report.float64_difference < 1e-12


class KeepsNormInEvaluation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = conv_norm_relu()

    def forward(self, x: Tensor) -> Tensor:
        assert not self.layers[1].training, "the frozen norm is in training mode"
        return self.layers(x)


def test_norm_that_is_frozen_in_training_stays_frozen() -> None:
    model = KeepsNormInEvaluation()
    model.layers[1].eval()
    assert fused_res.check(model, image(), seconds=0.01).ok
    with pytest.raises(AssertionError, match="the frozen norm is in training mode"):
        fused_res.check(model.eval(), image(), seconds=0)  # check switches the training mode on


def test_elements_that_are_not_finite_are_not_compared() -> None:
    model = nn.Sequential(conv_norm_relu(), nn.Threshold(0.5, float("-inf")))
    report = fused_res.check(model, image(), seconds=0)
    assert not [name for name in report.differences if "outputs" in name], report


def test_fused_model_and_the_callers_modes() -> None:
    """The model may be fused already, and the caller may be in inference mode, autocast or no_grad."""
    model = fused_res.fuse(OwnNet())
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        report = fused_res.check(model, image(), seconds=0)
    assert report.ok and report.norms_fused >= 1
    assert all(one.stock_error < 1e-4 for one in report.comparisons if one.kind == "outputs")
    assert {"gradients"} <= {one.kind for one in report.comparisons}


# --- wrong models -------------------------------------------------------------------------------------------


def scale_output(output: Tensor, tensors: Any) -> Tensor:
    return output * 1.001


def scale_gradient(output: Tensor, tensors: Any) -> Tensor:
    if output.requires_grad:
        output.register_hook(lambda grad: grad * 1.001)
    return output


def scale_running_mean(output: Tensor, tensors: Any) -> Tensor:
    with torch.no_grad():
        tensors[4].mul_(1.001)
    return output


def change_dtype(output: Tensor, tensors: Any) -> Tensor:
    return output.bfloat16().to(torch.float64 if output.dtype == torch.float64 else torch.bfloat16)


@pytest.mark.parametrize(
    ("mistake", "name", "right"),
    [
        (scale_output, "training outputs output", "training buffers 1.running_mean"),
        (scale_output, "evaluation outputs output", "training buffers 1.running_mean"),
        (scale_gradient, "training gradients 0.weight", "training outputs output"),
        (scale_gradient, "training gradients input 0", "evaluation outputs output"),
        (scale_running_mean, "training buffers 1.running_mean", "training outputs output"),
        (change_dtype, "training outputs output", "training buffers 1.running_mean"),
    ],
)
def test_wrong_fused_forward_is_named(mistake: Any, name: str, right: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = functional.run_block

    def wrong(input: Tensor, spec: Any, tensors: Any, *arguments: Any) -> tuple[Tensor, None]:
        return mistake(original(input, spec, tensors, *arguments)[0], tensors), None

    model = conv_norm_relu()
    nn.init.constant_(model[1].running_mean, 0.1)
    assert fused_res.check(model, image(), seconds=0).ok
    monkeypatch.setattr(functional, "run_block", wrong)
    report = fused_res.check(model, image(), seconds=0)
    assert not report.ok and name in report.differences and right not in report.differences, report
    assert "NOT OK" in str(report) and f"  {name}: " in str(report)


def test_fused_forward_that_raises_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any) -> Tensor:
        raise RuntimeError("an error of the kernel\nwith details")

    monkeypatch.setattr(functional, "run_block", wrong)
    report = fused_res.check(conv_norm_relu(), image(), seconds=0.01)
    assert not report.ok
    assert report.differences["training"] == "raised RuntimeError: an error of the kernel, stock does not"
    assert "training step" not in [timing.mode for timing in report.timings]
    assert "an error of the kernel" in str(report)


def test_unit_is_that_of_the_accuracy_criterion() -> None:
    """At exactly ALLOWED units, assert_within_stock_error passes; it fails just above."""
    exact = torch.randn(100, dtype=torch.float64)
    stock = exact.float() + 1e-5 * torch.rand(100)
    stock_error = (stock.double() - exact).abs().max().item()
    last_place = torch.finfo(torch.float32).eps * exact.abs().max().item()
    for share, ok in ((0.98, True), (1.02, False)):
        ours = (exact + share * (2 * stock_error + 4 * last_place)).float()
        errors = Errors()
        errors.add({"x": ours}, {"x": stock}, {"x": exact})
        assert (errors.in_units()["x"] <= ALLOWED) is ok is not errors.exceeded()
        if ok:
            assert_within_stock_error("x", ours, stock, exact)
        else:
            with pytest.raises(AssertionError):
                assert_within_stock_error("x", ours, stock, exact)


def test_tensor_that_is_missing_or_of_another_shape() -> None:
    x = torch.ones(2)
    errors = Errors()
    errors.add({"a": x, "c": x[:1], "d": x * torch.nan}, {"a": x, "b": x, "c": x, "d": x}, dict.fromkeys("abcd", x))
    assert set(errors.exceeded()) == {"b", "c", "d"}
    assert errors.describe("b") == "exists in the stock model only"
    assert errors.describe("c") == "torch.float32 (1,) on cpu instead of torch.float32 (2,) on cpu"


def test_integer_tensors_may_differ_in_few_elements() -> None:
    """An argmax may differ by rounding; a counter may not."""
    exact = torch.zeros(1000, dtype=torch.int64)
    few, many = exact.clone(), exact.clone()
    few[:5], many[:20] = 1, 1
    errors = Errors()
    one = torch.ones(1, dtype=torch.int64)
    errors.add(
        {"few": few, "many": many, "counter": one},
        {"few": exact, "many": exact, "counter": 2 * one},
        {"few": exact, "many": exact, "counter": 2 * one},
    )
    assert set(errors.exceeded()) == {"many", "counter"}


# --- what does not change -----------------------------------------------------------------------------------


class WritesToItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = OwnNet(0.5)

    def forward(self, x: Tensor, images: list[Tensor]) -> Tensor:
        random.random(), np.random.rand()
        return self.net(x.sub_(0.5) + images[0].mul_(2))


@pytest.mark.parametrize("training", [True, False])
def test_nothing_changes(training: bool) -> None:
    model = WritesToItsInput().train(training)
    model.net.block.bn1.train(not training)
    model.net.fc.bias.requires_grad_(False)
    model.unused = nn.Parameter(torch.ones(2))
    model.unused.grad = torch.ones(2)
    first, second = image(), image()
    random.seed(7), np.random.seed(7)
    model(first.clone(), [second.clone()]).sum().backward()

    def snapshot() -> list[Any]:
        values: list[Any] = [first, second, *model.state_dict().values()]
        values += [p.grad for p in model.parameters() if p.grad is not None]
        flags = [(name, type(m), m.training, sorted(m.__dict__)) for name, m in model.named_modules()]
        flags += [(p.requires_grad, p.grad is None, id(p)) for p in model.parameters()]
        state = [torch.get_rng_state(), torch.from_numpy(np.random.get_state()[1].astype(np.int64))]
        return [*[value.clone() for value in (*values, *state)], flags, random.getstate(), torch.get_default_dtype()]

    before = snapshot()
    report = fused_res.check(model, first, [second], seconds=0.01)
    assert report.ok, report
    assert "unused" not in report.comparisons[1].errors, "a gradient that the model had before is compared"
    for old, new in zip(before, snapshot(), strict=True):
        assert torch.equal(old, new) if isinstance(old, Tensor) else old == new
    assert first.grad is None and not first.requires_grad


def test_scripted_part_gets_no_gradient() -> None:
    """The deep copy of a torch.jit module has clones of its parameters, whose gradients flow to the originals."""
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)))
    scripted[0].bias.requires_grad_(False)
    model = nn.Sequential(conv_norm_relu(), scripted)
    report = fused_res.check(model, torch.randn(2, 3, 9, 9), seconds=0)
    assert report.ok and all(parameter.grad is None for parameter in model.parameters())
    gradients = next(c for c in report.comparisons if (c.mode, c.kind) == ("training", "gradients"))
    assert len(gradients.errors) == 1 + 4 + 3


def test_random_state_is_restored_after_an_error() -> None:
    model = OwnNet()
    state, default = torch.get_rng_state(), torch.get_default_dtype()
    with pytest.raises(RuntimeError, match="expected input"):
        fused_res.check(model, image(2, 5, 8, 8))
    assert torch.equal(torch.get_rng_state(), state) and torch.get_default_dtype() is default


# --- errors -------------------------------------------------------------------------------------------------


class NotInFloat64(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.filters = torch.randn(4, 3, 3, 3)  # not a buffer, so that double() does not convert it

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.filters)


def test_errors() -> None:
    locked = OwnNet()
    locked.lock = threading.Lock()
    with pytest.raises(ValueError, match="model must support copy.deepcopy.*TypeError: cannot pickle"):
        fused_res.check(locked, image())
    with pytest.raises(ValueError, match="model must also run in float64.*RuntimeError"):
        fused_res.check(NotInFloat64(), image())
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        fused_res.check(1)  # type: ignore[arg-type]
    for dtype in (torch.float32, "bfloat16"):
        with pytest.raises(ValueError, match="autocast must be"):
            fused_res.check(OwnNet(), image(), autocast=dtype)  # type: ignore[arg-type]
    for seconds in (-1, float("nan"), "2"):
        with pytest.raises(ValueError, match="seconds must be"):
            fused_res.check(OwnNet(), image(), seconds=seconds)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend must be one of"):
        fused_res.check(OwnNet(), image(), backend="quick")
    report = fused_res.check(OwnNet(), image(), seconds=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.norms = 1  # type: ignore[misc]
    assert copy.deepcopy(report) == report and check_function is fused_res.check
