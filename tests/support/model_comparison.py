"""Compare a fused model with its stock PyTorch counterpart over training steps: outputs, gradients and state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_res import functional
from fused_res.nn import chain

#: In float64 only the order of rounding differs: any error in the implementation is orders of magnitude larger.
RELATIVE_TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-3, torch.bfloat16: 5e-2}


def assert_near(actual: Tensor | None, expected: Tensor | None, name: str, tolerance: float | None = None) -> None:
    """Check that the largest absolute difference is small relative to the largest expected value."""
    assert (actual is None) == (expected is None), name
    if actual is None or expected is None:
        return
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, name
    if not expected.is_floating_point():
        assert torch.equal(actual, expected), f"{name}: {actual} instead of {expected}"
        return
    assert torch.equal(actual.isfinite(), expected.isfinite()), name
    error = (actual - expected).abs().max().item() if expected.numel() else 0.0
    scale = expected.abs().max().item() if expected.numel() else 0.0
    # Some gradients are zero up to rounding (a bias before a norm) and have no scale of their own.
    limit = (tolerance or RELATIVE_TOLERANCE[expected.dtype]) * (scale + 0.1)
    assert error <= limit, f"{name}: error {error:.3e}, values up to {scale:.3e}"


def assert_models_match(fused: nn.Module, stock: nn.Module, input: Tensor, steps: int = 2, **extra: Any) -> None:
    """Run both models for some steps and compare outputs, gradients and state; train them if they have parameters.

    Args:
        fused: the model under test.
        stock: the same model with stock PyTorch operators and equal weights.
        input: the input of step 0; each further step adds 0.1. Its gradient is compared if it requires grad.
        steps: number of steps.
        extra: keyword arguments of the models.
    """
    trained = [p for p in stock.parameters() if p.requires_grad]
    optimizers = (
        [torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3) for model in (fused, stock)]
        if trained
        else []
    )
    for step in range(steps):
        inputs = [(input + 0.1 * step).detach().requires_grad_(input.requires_grad) for _ in range(2)]
        outputs = [model(x, **extra) for model, x in zip((fused, stock), inputs, strict=True)]
        assert_near(outputs[0], outputs[1], f"output of step {step}")
        assert outputs[0].requires_grad == outputs[1].requires_grad
        if outputs[1].requires_grad:
            grad = torch.linspace(-1, 2, outputs[1].numel(), dtype=outputs[1].dtype).view_as(outputs[1])
            for output in outputs:
                output.backward(grad)
            assert_near(inputs[0].grad, inputs[1].grad, f"input's gradient in step {step}")
            for (name, actual), expected in zip(fused.named_parameters(), stock.parameters(), strict=True):
                assert_near(actual.grad, expected.grad, f"gradient of {name} in step {step}")
        for (name, actual), (key, expected) in zip(fused.state_dict().items(), stock.state_dict().items(), strict=True):
            assert name == key
            assert_near(actual, expected, f"{name} after step {step}")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def randomize_norms(model: nn.Module) -> Any:
    """Randomize weights, biases and running statistics of all batch norms in place, and return the model.

    Newly initialized norms are the identity in evaluation, and timm's zero-initialized last norms hide a block's
    residual branch.
    """
    torch.manual_seed(3)
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None:
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            if norm.affine:
                nn.init.uniform_(norm.weight, 0.5, 1)
                nn.init.normal_(norm.bias)
    return model


def small_resnet(kind: str = "BasicBlock", planes: Sequence[int] = (8, 6, 4, 8), **options: Any) -> Any:
    """Return torchvision's ResNet with one block per stage and few channels, in float64."""
    from torchvision.models import resnet

    torch.manual_seed(0)
    block = getattr(resnet, kind)
    with torch.device("meta"):
        model = resnet.ResNet(block, [1, 1, 1, 1], num_classes=5, **options)
    model.inplanes, model.dilation = 8, 1
    model.conv1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
    model.bn1 = nn.BatchNorm2d(8)
    dilate = [False, *options.get("replace_stride_with_dilation", [False] * 3)]
    for stage in range(4):
        layer = model._make_layer(block, planes[stage], 1, stride=1 if stage == 0 else 2, dilate=dilate[stage])
        setattr(model, f"layer{stage + 1}", layer)
    model.fc = nn.Linear(planes[-1] * block.expansion, 5)
    return model.double()


@contextlib.contextmanager
def record_fused_calls() -> Iterator[list[str]]:
    """Record the names of the fused functions that are called in the block.

    Without this check a test could compare stock PyTorch with itself.
    """
    calls: list[str] = []

    def spy(function: str, name: str) -> Any:
        original = getattr(functional, function)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return original(*args, **kwargs)

        return call

    class FunctionalSpy:
        run_block = staticmethod(spy("run_block", "residual_block"))
        run_planned_block = staticmethod(spy("run_planned_block", "residual_block"))  # of cached calls
        batch_norm_act = staticmethod(spy("batch_norm_act", "batch_norm_act"))
        run_norm = staticmethod(spy("run_norm", "batch_norm_act"))  # of cached calls
        is_recomputing = staticmethod(functional.is_recomputing)
        autocast_dtype = staticmethod(functional.autocast_dtype)

    original = chain.functional
    chain.functional = FunctionalSpy  # type: ignore[assignment]
    try:
        yield calls
    finally:
        chain.functional = original


@contextlib.contextmanager
def record_stock_norms() -> Iterator[list[tuple[int, ...]]]:
    """Record the input's shape of each batch norm that runs as PyTorch's function in the block."""
    shapes: list[tuple[int, ...]] = []
    batch_norm = F.batch_norm

    def call(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shapes.append(tuple(input.shape))
        return batch_norm(input, *args, **kwargs)

    F.batch_norm = call
    try:
        yield shapes
    finally:
        F.batch_norm = batch_norm
