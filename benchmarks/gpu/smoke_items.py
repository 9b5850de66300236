"""Items of the smoke tests: every kernel once, in bfloat16, against the reference backend in float64.

Networks come after the kernels: a training step captured in a CUDA graph against an eager one, and one against float64.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import fused_res
from benchmarks.check import ResultsDifferError, check_results, relative_error
from benchmarks.gpu.errors import CheckFailed
from benchmarks.gpu.journal import Record
from benchmarks.gpu.kernel_calls import CALLS, Operands
from benchmarks.gpu.settings import Settings
from benchmarks.steps import capture_cuda_graph
from fused_res import backends
from fused_res.nn import BasicBlock, Bottleneck

# Relative errors in the Euclidean norm. Rounding to bfloat16 has one of 1.7e-3, and results whose operands are rounded
# as well have up to 3.5e-3 (in the simulator). Sums and statistics are accumulated in float32. A missing tile or term
# has one above 0.05.
TOLERANCE = {torch.bfloat16: 8e-3, torch.float32: 1e-3, torch.float64: 1e-3}
# Sums that come out of an epilogue are of operands that were rounded to bfloat16, with cancellation.
SUMS_TOLERANCE = 1e-2
EPILOGUE_SUMS = ("conv_bn_stats", "conv_dgrad")
# Of the bytes of masks and positions: signs and maxima within rounding of a tie.
DIFFERENT_BYTES = 1e-2
# Of the gradients of a few blocks, in which ReLUs switch: in units of the error of stock PyTorch, and a floor.
BLOCK_FACTOR, BLOCK_FLOOR = 3.0, 1e-3


def items(settings: Settings) -> list[str]:
    names = list(CALLS)
    return [*names[:4], "CUDA graph", *names[4:], "contiguous memory", "planned blocks", "fused blocks"]


def run(item: str, settings: Settings) -> Iterator[Record]:
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    kernels = backends.resolve(settings.backend, torch.device(settings.device))
    if item in CALLS:
        errors = _check_call(item, kernels, Operands(settings))
    elif item == "contiguous memory":
        operands = Operands(settings, memory_format=torch.contiguous_format)
        errors = {}
        for name in ("norm forward", "norm backward", "max pool", "max pool backward"):
            errors |= {f"{name} {key}": error for key, error in _check_call(name, kernels, operands).items()}
    elif item == "CUDA graph":
        errors = _check_graph(settings)
    else:
        errors = _check_blocks(settings, item.removesuffix(" blocks"))
    yield {"errors": errors}


def _check(errors: dict[str, float], name: str, error: float, tolerance: float) -> None:
    errors[name] = float(f"{error:.2g}")
    if not error <= tolerance:  # also NaN
        raise CheckFailed(f"{name} has an error of {error:.2g}, expected at most {tolerance:.2g}")


def _check_call(name: str, kernels: Any, operands: Operands) -> dict[str, float]:
    call = CALLS[name](operands)
    expected = call.in_float64().on(operands.reference)
    errors: dict[str, float] = {}
    for index, (actual, exact) in enumerate(zip(call.on(kernels), expected, strict=True)):
        result = f"{call.operator}, result {index}"
        if actual.shape != exact.shape:
            raise CheckFailed(f"{result} has shape {tuple(actual.shape)}, expected {tuple(exact.shape)}")
        if not actual.is_floating_point():
            _check(errors, result, (actual != exact).double().mean().item() if actual.numel() else 0.0, DIFFERENT_BYTES)
        elif index and call.operator in EPILOGUE_SUMS:
            _check(errors, result, relative_error(actual, exact), SUMS_TOLERANCE)
        else:
            _check(errors, result, relative_error(actual, exact), TOLERANCE[actual.dtype])
    return errors


def _blocks(settings: Settings) -> tuple[nn.Module, Tensor]:
    """Return a bottleneck, one with projection, and a basic block; and an input."""
    torch.manual_seed(0)
    operands = Operands(settings)
    narrow = operands.narrow
    projection = nn.Sequential(nn.Conv2d(narrow, 2 * narrow, 1, 2, bias=False), nn.BatchNorm2d(2 * narrow))
    model = nn.Sequential(
        Bottleneck(narrow, narrow // 4),
        Bottleneck(narrow, narrow // 2, stride=2, downsample=projection),
        BasicBlock(2 * narrow, 2 * narrow),
    )
    model.to(settings.device)
    return model.to(memory_format=torch.channels_last), operands.activation(narrow, mean=1).float()


def _step(model: nn.Module, x: Tensor, settings: Settings) -> Callable[[], Tensor]:
    def step() -> Tensor:
        with torch.autocast(settings.device, torch.bfloat16, enabled=not settings.rehearse):
            loss = model(x).float().square().mean()
        loss.backward()
        return loss.detach()

    return step


def _check_graph(settings: Settings) -> dict[str, float]:
    """Check that a replayed training step has the gradients of an eager one."""
    model, x = _blocks(settings)
    model = fused_res.fuse(model, backend=settings.backend)
    step = _step(model, x, settings)

    def with_fresh_gradients() -> Tensor:
        model.zero_grad()
        return step()

    replay = capture_cuda_graph(with_fresh_gradients)
    replay(None)
    replayed = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    step()
    errors: dict[str, float] = {}
    for index, (actual, parameter) in enumerate(zip(replayed, model.parameters(), strict=True)):
        assert parameter.grad is not None
        _check(errors, f"gradient {index}", relative_error(actual, parameter.grad), 1e-5)
    return {"gradients": max(errors.values())}


def _check_blocks(settings: Settings, convolution: str) -> dict[str, float]:
    """Check the gradients of a training step, on another stream, against stock PyTorch in float64."""
    stock, x = _blocks(settings)
    stock = fused_res.unfuse(stock)

    def gradients(model: nn.Module, x: Tensor, autocast: bool) -> dict[str, Tensor]:
        _step(model, x, replace(settings, rehearse=not autocast))()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    autocast = not settings.rehearse
    exact = gradients(copy.deepcopy(stock).double(), x.double(), False)
    baseline = gradients(copy.deepcopy(stock), x, autocast)
    model = fused_res.fuse(stock, backend=settings.backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with backends.use("auto", convolution), torch.cuda.stream(stream):
        actual = gradients(model, x, autocast)
    stream.synchronize()
    try:
        share = check_results("blocks", actual, exact, [baseline], factor=BLOCK_FACTOR, floor=BLOCK_FLOOR)
    except ResultsDifferError as error:
        raise CheckFailed(str(error)) from None
    return {"share of the tolerance": share}
