"""Batch norms that are written as operations: which are recognized, and that the results equal stock PyTorch.

Every recognized form has twins that differ from it in one detail; they run unchanged, with equal bits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_res import freeze, fuse, summarize
from fused_res.nn import chain
from fused_res.testing import stub_torchvision_operators
from tests.support.cpu_backends import BACKENDS
from tests.support.model_comparison import assert_near, randomize_norms

stub_torchvision_operators()

Make = Callable[[], nn.Module]

needs_cpu_backend = pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the cpu backend: others call ATen's norms")


class Functional(nn.BatchNorm2d):
    """A batch norm with its own forward, as timm's BatchNormAct2d and its relatives."""

    count: Any = 1

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        self.update()
        tracked = not self.training or self.track_running_stats
        mean, var = (self.running_mean, self.running_var) if tracked else (None, None)
        return self.compute(x, mean, var)

    def update(self) -> None:
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(self.count)

    def compute(self, x: Tensor, mean: Tensor | None, var: Tensor | None) -> Tensor:
        training = self.training or (mean is None and var is None)
        return F.batch_norm(x, mean, var, self.weight, self.bias, training, self.momentum or 0.0, self.eps)


class Keywords(Functional):
    def compute(self, x: Tensor, mean: Tensor | None, var: Tensor | None) -> Tensor:
        training = self.training or (mean is None and var is None)
        return F.batch_norm(
            x, mean, var, weight=self.weight, bias=self.bias, training=training, momentum=self.momentum, eps=self.eps
        )


class WithActivation(Functional):
    """timm's BatchNormAct2d: the module computes the following operations, too."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class CountsTwo(Functional):
    count = 2


class NotCounted(Functional):
    def update(self) -> None:
        pass


class CountsInFloat(Functional):
    count = True


class OtherMomentum(Functional):
    def compute(self, x: Tensor, mean: Tensor | None, var: Tensor | None) -> Tensor:
        return F.batch_norm(x, mean, var, self.weight, self.bias, self.training, 0.3, self.eps)


class OtherEps(Functional):
    def compute(self, x: Tensor, mean: Tensor | None, var: Tensor | None) -> Tensor:
        return F.batch_norm(x, mean, var, self.weight, self.bias, self.training, self.momentum, 1e-4)


class Unscaled(Functional):
    def compute(self, x: Tensor, mean: Tensor | None, var: Tensor | None) -> Tensor:
        return F.batch_norm(x, mean, var, None, self.bias, self.training, self.momentum, self.eps)


class Swapped(Functional):
    def compute(self, x: Tensor, mean: Tensor | None, var: Tensor | None) -> Tensor:
        return F.batch_norm(x, var, mean, self.weight, self.bias, self.training, self.momentum, self.eps)


class AlwaysTracked(Functional):
    """Uses the running statistics in both modes, which nn.BatchNorm2d does in evaluation only."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)


class OfAnother(Functional):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.other = nn.BatchNorm2d(channels)

    def compute(self, x: Tensor, mean: Tensor | None, var: Tensor | None) -> Tensor:
        return F.batch_norm(x, mean, var, self.other.weight, self.bias, self.training, self.momentum, self.eps)


class ReadsAgain(Functional):
    """Reads the running mean after its update."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.running_mean.mean()


def not_tracking(channels: int) -> nn.Module:
    return Functional(channels, track_running_stats=False)


def not_affine(channels: int) -> nn.Module:
    return Functional(channels, affine=False)


class Frozen(nn.Module):
    """A batch norm whose tensors are buffers, as in detection models."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.eps = 1e-5
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """As torchvision.ops.FrozenBatchNorm2d."""
        w, b = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)
        rv, rm = self.running_var.reshape(1, -1, 1, 1), self.running_mean.reshape(1, -1, 1, 1)
        scale = w * (rv + self.eps).rsqrt()
        return x * scale + (b - rm * scale)


class ReshapedLast(Frozen):
    """As the branch for gradients of detectron2's frozen norm."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        bias = self.bias - self.running_mean * scale
        dtype = x.dtype
        return x * scale.reshape(1, -1, 1, 1).to(dtype) + bias.reshape(1, -1, 1, 1).to(dtype)


class FrozenFunctional(Frozen):
    """As the branch without gradients of detectron2's frozen norm."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


class Detectron2(Frozen):
    """Arithmetic if the input requires a gradient, otherwise F.batch_norm."""

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            bias = self.bias - self.running_mean * scale
            scale = scale.reshape(1, -1, 1, 1)
            bias = bias.reshape(1, -1, 1, 1)
            out_dtype = x.dtype
            return x * scale.to(out_dtype) + bias.to(out_dtype)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


class OneBranchDiffers(Frozen):
    def forward(self, x: Tensor) -> Tensor:
        if not x.requires_grad:
            return super().forward(x)
        return super().forward(x) * 2


class Divided(Frozen):
    def forward(self, x: Tensor) -> Tensor:
        deviation = torch.sqrt(self.eps + self.running_var)[None, :, None, None]
        y = (x - self.running_mean[:, None, None]) / deviation
        return torch.add(self.bias.view(1, -1, 1, 1), torch.mul(self.weight.view(-1, 1, 1), y))


class Power(Frozen):
    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps) ** -0.5
        shift = -self.running_mean * scale + self.bias
        return shift.unsqueeze(-1).unsqueeze(-1) + scale.unsqueeze(-1).unsqueeze(-1) * x


class Parameters(Frozen):
    """The affine tensors are parameters, and get gradients."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        for name in ("weight", "bias"):
            tensor = getattr(self, name)
            delattr(self, name)
            setattr(self, name, nn.Parameter(tensor))


class FrozenConstant(Frozen):
    """Has its settings as constants in the forward."""

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.weight * (self.running_var + 1e-5).rsqrt()).reshape(1, -1, 1, 1)
        return x * scale + (self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale)


class FunctionalConstant(Functional):
    def compute(self, x: Tensor, mean: Tensor | None, var: Tensor | None) -> Tensor:
        return F.batch_norm(x, mean, var, self.weight, self.bias, self.training, 0.1, 1e-5)


class FrozenWithActivation(Frozen):
    """As timm's FrozenBatchNormAct2d."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class FrozenOtherEps(Frozen):
    def forward(self, x: Tensor) -> Tensor:
        scale = (self.weight * (self.running_var + 1.0001e-5).rsqrt()).reshape(1, -1, 1, 1)
        return x * scale + (self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale)


class WrongSign(Frozen):
    def forward(self, x: Tensor) -> Tensor:
        scale = (self.weight * (self.running_var + self.eps).rsqrt()).reshape(1, -1, 1, 1)
        return x * scale + (self.bias.reshape(1, -1, 1, 1) + self.running_mean.reshape(1, -1, 1, 1) * scale)


class NoShift(Frozen):
    def forward(self, x: Tensor) -> Tensor:
        scale = (self.weight * (self.running_var + self.eps).rsqrt()).reshape(1, -1, 1, 1)
        return x * scale + self.bias.reshape(1, -1, 1, 1)


class FrozenOfAnother(Frozen):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.other = Frozen(channels)

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.other.weight * (self.running_var + self.eps).rsqrt()).reshape(1, -1, 1, 1)
        return x * scale + (self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale)


class InFloat(Frozen):
    """Rounds the scale to float32."""

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.weight * (self.running_var + self.eps).rsqrt()).float().double().reshape(1, -1, 1, 1)
        return x * scale + (self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale)


class WrittenBetween(Frozen):
    """Changes the input between the operations of the norm."""

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.weight * (self.running_var + self.eps).rsqrt()).reshape(1, -1, 1, 1)
        shift = self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale
        y = x * scale
        x.add_(1)
        return y + shift + x * 0


class ScaleIsReturned(Frozen):
    """Another operation reads a part of the norm."""

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.weight * (self.running_var + self.eps).rsqrt()).reshape(1, -1, 1, 1)
        y = x * scale + (self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale)
        return y * torch.sigmoid(scale)


class Block(nn.Module):
    """A residual block with a projection, whose three norms are made by a function of the number of channels."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 5, 3, padding=1), norm(5)
        self.conv2, self.bn2 = nn.Conv2d(5, 4, 3, stride=2, padding=1, bias=False), norm(4)
        self.conv3, self.bn3 = nn.Conv2d(3, 4, 1, stride=2, bias=False), norm(4)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.bn3(self.conv3(x)))


def torchvision_frozen(channels: int) -> nn.Module:
    return pytest.importorskip("torchvision.ops").FrozenBatchNorm2d(channels)


def timm_norm(channels: int) -> nn.Module:
    return pytest.importorskip("timm.layers").BatchNormAct2d(channels)


def timm_frozen(channels: int) -> nn.Module:
    return pytest.importorskip("timm.layers").FrozenBatchNormAct2d(channels)


RECOGNIZED: dict[str, Callable[[int], nn.Module]] = {
    "functional": Functional, "keywords": Keywords, "functional, not tracking": not_tracking,
    "functional, not affine": not_affine, "with activation": WithActivation, "timm": timm_norm,
    "timm, frozen": timm_frozen, "torchvision, frozen": torchvision_frozen, "frozen": Frozen,
    "frozen, reshaped last": ReshapedLast, "frozen, functional": FrozenFunctional, "frozen, divided": Divided,
    "frozen, detectron2": Detectron2, "frozen, power": Power, "frozen, parameters": Parameters,
    "frozen, with activation": FrozenWithActivation, "frozen, constant": FrozenConstant,
    "functional, constant": FunctionalConstant,
}  # fmt: skip
TWINS: dict[str, Callable[[int], nn.Module]] = {
    "counts two": CountsTwo, "not counted": NotCounted, "counts True": CountsInFloat, "other momentum": OtherMomentum,
    "other eps": OtherEps, "unscaled": Unscaled, "swapped": Swapped, "always tracked": AlwaysTracked,
    "weight of another": OfAnother, "reads again": ReadsAgain, "frozen, other eps": FrozenOtherEps,
    "frozen, wrong sign": WrongSign, "frozen, no shift": NoShift, "frozen, scale of another": FrozenOfAnother,
    "frozen, one branch differs": OneBranchDiffers, "frozen, in float": InFloat,
    "frozen, written between": WrittenBetween, "frozen, scale is read": ScaleIsReturned,
}  # fmt: skip


def stock_block(norm: Callable[[int], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = randomize_norms(Block(norm)).double()
    for module in model.modules():
        if isinstance(module, Frozen) or "running_var" in module._buffers:
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if tensor.is_floating_point():
                    tensor.data.uniform_(0.5, 2) if name.startswith("running_") else tensor.data.normal_()
    return model


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def stock_norms(run: Callable[[], Any]) -> int:
    """Return how many norms run as ATen operations, of which each contains one of these."""
    names = ("aten::batch_norm", "aten::rsqrt", "aten::pow", "aten::sqrt")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return sum(event.count for event in profile.key_averages() if event.key in names)


def train(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Return output, gradients and state of a training step."""
    x = x.clone().requires_grad_()
    output = model(x)
    output.backward(torch.linspace(-1, 2, output.numel(), dtype=x.dtype).view_as(output))
    gradients = {f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()}
    return {"output": output, "input's gradient": x.grad} | gradients | dict(model.state_dict())


@torch.no_grad()
def infer(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


@needs_cpu_backend
class TestRecognized:
    @pytest.mark.parametrize("name", RECOGNIZED)
    def test_training(self, name: str) -> None:
        stock = stock_block(RECOGNIZED[name]).train()
        fused = fuse(copy.deepcopy(stock))
        results: list[dict[str, Any]] = []
        assert stock_norms(lambda: results.append(train(fused, images()))) == 0
        expected = train(stock, images())
        assert results[0].keys() == expected.keys()
        for key, value in expected.items():
            assert_near(results[0][key], value, key)

    @pytest.mark.parametrize("name", RECOGNIZED)
    def test_inference(self, name: str) -> None:
        stock = stock_block(RECOGNIZED[name]).eval()
        expected = infer(stock, images())
        for model in (fuse(copy.deepcopy(stock)), freeze(stock), fuse(copy.deepcopy(stock), cache_eval=True)):
            assert_near(infer(model, images()), expected, "output")
            if name != "functional, not tracking" or model._fused_res.packed is None:  # freeze folds fixed statistics
                assert stock_norms(lambda model=model: infer(model, images())) == 0

    @pytest.mark.parametrize("name", RECOGNIZED)
    def test_inputs_that_the_fused_operators_refuse(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The recorded operations run one by one, or the module itself: equal bits."""
        stock = stock_block(RECOGNIZED[name]).train()
        fused = fuse(copy.deepcopy(stock))
        monkeypatch.setattr(chain, "inspect_input", lambda input: chain.Unsupported("refused in this test"))
        actual, expected = train(fused, images()), train(stock, images())
        for key, value in expected.items():
            assert value is None or torch.equal(actual[key], value), key
        assert torch.equal(infer(fused.eval(), images()), infer(stock.eval(), images()))
        assert torch.equal(infer(freeze(stock), images()), infer(stock, images()))

    @pytest.mark.parametrize(
        "name",
        [
            "functional",
            "with activation",
            "frozen",
            "frozen, parameters",
            "frozen, detectron2",
            "frozen, constant",
            "functional, constant",
        ],
    )
    def test_settings_may_change(self, name: str) -> None:
        """The generated forward runs stock, or with the new settings."""
        stock = stock_block(RECOGNIZED[name]).eval()
        fused = fuse(copy.deepcopy(stock))
        frozen = freeze(stock)
        infer(frozen, images())
        for model in (stock, fused, frozen):
            model.bn1.eps = 0.1
        expected = infer(stock, images())
        for model in (fused, frozen):
            assert_near(infer(model, images()), expected, "output")
        for model in (stock, fused, frozen):
            model.bn2.running_mean.add_(1)
            weight = torch.full((4,), 2.0, dtype=torch.float64)
            model.bn2.weight = nn.Parameter(weight) if isinstance(model.bn2.weight, nn.Parameter) else weight
        expected = infer(stock, images())
        for model in (fused, frozen):
            assert_near(infer(model, images()), expected, "output")

    def test_other_dtypes_of_frozen_norms(self) -> None:
        """Arithmetic on tensors of two dtypes promotes the smaller one, a batch norm does not."""
        stock = stock_block(Frozen).float().eval()
        fused, frozen = fuse(copy.deepcopy(stock)), freeze(stock)
        x = images().float()
        with torch.autocast("cpu", torch.bfloat16):
            expected = infer(stock, x)
            for model in (fused, frozen):
                actual = infer(model, x)
                assert actual.dtype is expected.dtype is torch.float32
                assert torch.equal(actual, expected)

    def test_statistics_that_require_a_gradient(self) -> None:
        def trained(channels: int) -> nn.Module:
            norm = Frozen(channels)
            mean = norm.running_mean
            del norm.running_mean
            norm.running_mean = nn.Parameter(mean)
            return norm

        stock = stock_block(trained).train()
        fused = fuse(copy.deepcopy(stock))
        actual, expected = train(fused, images()), train(stock, images())
        assert expected["gradient of bn1.running_mean"] is not None
        for key, value in expected.items():
            assert_near(actual[key], value, key)

    def test_frozen_norms_are_folded_again_after_a_change(self) -> None:
        frozen = freeze(stock_block(Frozen))
        before = infer(frozen, images())
        frozen.bn1.running_var.mul_(4)
        after = infer(frozen, images())
        assert not torch.allclose(before, after)
        reference = stock_block(Frozen).eval()
        reference.bn1.running_var.mul_(4)
        assert_near(after, infer(reference, images()), "output")


class TestTwins:
    @pytest.mark.parametrize("name", TWINS)
    def test_training(self, name: str) -> None:
        stock = stock_block(TWINS[name]).train()
        fused = fuse(copy.deepcopy(stock))
        actual, expected = train(fused, images()), train(stock, images())
        for key, value in expected.items():
            assert value is None or torch.equal(actual[key], value), key

    @pytest.mark.parametrize("name", TWINS)
    def test_inference(self, name: str) -> None:
        """In evaluation, some are batch norms."""
        stock = stock_block(TWINS[name]).eval()
        expected = infer(stock, images())
        for model in (fuse(copy.deepcopy(stock)), freeze(stock)):
            assert_near(infer(model, images()), expected, "output")


class TestRank:
    """An assertion about the rank of a norm's input holds wherever the norm runs fused, and fails as in stock."""

    class Concatenated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = WithActivation(6), nn.Conv2d(6, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.norm(torch.cat((x, x), 1)))

    def test_input_that_no_argument_implies(self) -> None:
        stock = self.Concatenated().double()
        fused = fuse(copy.deepcopy(stock))
        assert_near(fused(images()), stock(images()), "output")
        if "cpu" in BACKENDS:
            assert stock_norms(lambda: fused(images())) == 0
        x = torch.randn(2, 3, 8, dtype=torch.float64)
        for model in (stock, fused):
            with pytest.raises(AssertionError, match="expected 4D input .got 3D input."):
                model(x)
        assert torch.equal(fused.norm.num_batches_tracked, stock.norm.num_batches_tracked + ("cpu" in BACKENDS))


@pytest.mark.parametrize("name", RECOGNIZED)
def test_summary_counts(name: str) -> None:
    model = stock_block(RECOGNIZED[name])
    assert (summarize(model).norms, summarize(model).norms_fused) == (3, 0)
    assert {row.why for row in summarize(model).rows} == {"not fused as yet: call fused_res.fuse"}
    summary = summarize(fuse(model))
    assert (summary.norms, summary.norms_fused) == (3, 3)


def test_summary_of_a_twin() -> None:
    summary = summarize(fuse(stock_block(WrongSign)))
    assert (summary.norms, summary.norms_fused) == (3, 0)
    assert {row.why for row in summary.rows} == {"no recorded forward calls it as a layer, or computes it exactly"}
