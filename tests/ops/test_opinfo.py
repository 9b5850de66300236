"""Compare values and gradients with stock PyTorch on PyTorch's OpInfo sample inputs for batch_norm and conv2d."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fused_res
from fused_res import BlockSpec, UnitSpec
from fused_res.functional import batch_norm_act, conv_bias_act, residual_block
from tests.support.cpu_backends import FAST_BACKENDS

BACKENDS = [name for name in FAST_BACKENDS if name != "cuda"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
TOLERANCES: dict[torch.dtype, dict[str, float]] = {
    torch.float64: {},
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
    torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2},  # stock PyTorch rounds between its operations
}


#: Runs in a separate process, because its imports freeze the flags of torch.backends for the whole process.
DRAW = """
import sys, torch
from torch.testing._internal.common_methods_invocations import op_db
torch.manual_seed(0)
found = {}
for op in op_db:
    if op.name in ("nn.functional.batch_norm", "nn.functional.conv2d"):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            drawn = op.sample_inputs_func(op, "cpu", dtype, requires_grad=True)
            found[op.name, dtype] = [(s.input, s.args, s.kwargs) for s in drawn]
torch.save(found, sys.argv[1])
"""


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, list[Any]]:
    pytest.importorskip("expecttest", reason="torch.testing._internal needs expecttest")
    path = tmp_path_factory.mktemp("samples") / "samples.pt"
    subprocess.run([sys.executable, "-c", DRAW, path], check=True)
    return torch.load(path)


def compare(ours: Any, theirs: Any, tensors: list[Tensor | None], dtype: torch.dtype) -> None:
    """Compare the results of two functions of the tensors, and the gradients of the tensors that require grad."""
    results = []
    for function in (ours, theirs):
        mine = [None if t is None else t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
        y = function(*mine)
        leaves = [t for t in mine if t is not None and t.requires_grad]
        grad = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
        state = [t for t in mine if t is not None and not t.requires_grad]
        results.append([y.detach(), *torch.autograd.grad(y, leaves, grad), *state])
    torch.testing.assert_close(results[0], results[1], **TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_norm(backend: str, dtype: torch.dtype, samples: dict[Any, list[Any]]) -> None:
    """All samples are supported except inputs without a batch dimension, ``(C,)``."""
    count = 0
    for x, state, options in samples["nn.functional.batch_norm", dtype]:
        affine = state[2:] or (options.get("weight"), options.get("bias"))
        if x.dim() == 1:
            with pytest.raises(ValueError, match="input must have 2 to 5 dimensions"):
                batch_norm_act(x, *state[:2], *affine)
            continue

        def ours(x: Tensor, *tensors: Any, options: dict[str, Any] = options) -> Tensor:
            mean, var, weight, bias = tensors
            rest = {k: v for k, v in options.items() if k not in ("weight", "bias")}
            return batch_norm_act(x, mean, var, weight, bias, activation="identity", backend=backend, **rest)

        def theirs(x: Tensor, *tensors: Any, options: dict[str, Any] = options) -> Tensor:
            mean, var, weight, bias = tensors
            rest = {k: v for k, v in options.items() if k not in ("weight", "bias")}
            return F.batch_norm(x, mean, var, weight, bias, **rest)

        # Running statistics are constants, although the samples require their gradients.
        state = [None if t is None else t.detach() for t in state[:2]]
        compare(ours, theirs, [x, *state, *affine], dtype)
        count += 1
    assert count >= 10


def convolutions(samples: list[Any]) -> list[tuple[Tensor, Tensor, Tensor | None, dict[str, Any]]]:
    """Return input, weight, bias and keyword options of each conv2d sample."""
    names = ("stride", "padding", "dilation", "groups")
    found = []
    for x, (weight, *rest), options in samples:
        bias = rest[0] if rest else options.get("bias")
        keywords = dict(zip(names, rest[1:], strict=False)) | {k: v for k, v in options.items() if k in names}
        found.append((x, weight, bias, keywords))
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_conv2d(backend: str, dtype: torch.dtype, samples: dict[Any, list[Any]]) -> None:
    count = 0
    for x, weight, bias, options in convolutions(samples["nn.functional.conv2d", dtype]):
        error = expected_error(x, options)
        with torch.no_grad(), fused_res.backends.use("auto", winograd=False):
            if error is None:
                y = conv_bias_act(x, weight, bias, activation="identity", backend=backend, **options)
                torch.testing.assert_close(y, F.conv2d(x, weight, bias, **options), **TOLERANCES[dtype])
                count += 1
            else:
                with pytest.raises(ValueError, match=error):
                    conv_bias_act(x, weight, bias, activation="identity", backend=backend, **options)
    assert count >= 10


def expected_error(x: Tensor, options: dict[str, Any]) -> str | None:
    """Return the error message of conv_bias_act for an unsupported sample, or None for a supported one."""
    if x.dim() == 3:  # an unbatched image; conv_bias_act interprets three dimensions as (N, C, L)
        return "weight must have 3 dimensions like input, got 4"
    if options.get("padding") == "same":  # the samples have an even kernel, or a stride
        return "padding='same' must be symmetric"
    return None


@pytest.mark.parametrize("backend", BACKENDS)
def test_conv2d_with_gradients(backend: str, samples: dict[Any, list[Any]]) -> None:
    """Run the convolution as a block whose norm is the identity."""
    for x, weight, bias, options in convolutions(samples["nn.functional.conv2d", torch.float64]):
        if x.dim() == 3 or isinstance(options.get("padding"), str):
            continue  # a UnitSpec requires integers
        pairs = {k: (v, v) if isinstance(v, int) else tuple(v) for k, v in options.items() if k != "groups"}
        unit = UnitSpec(**pairs, groups=options.get("groups", 1), eps=0.0, activation="identity")
        one, zero = torch.ones(weight.shape[0]).double(), torch.zeros(weight.shape[0]).double()

        def ours(
            x: Tensor, weight: Tensor, bias: Tensor | None, unit: UnitSpec = unit, norm: Any = (one, zero)
        ) -> Tensor:
            tensors = [weight, bias, None, None, norm[1], norm[0]]
            return residual_block(x, BlockSpec((unit,)), tensors, training=False, backend=backend)

        def theirs(x: Tensor, weight: Tensor, bias: Tensor | None, options: dict[str, Any] = options) -> Tensor:
            return F.conv2d(x, weight, bias, **options)

        compare(ours, theirs, [x, weight, bias], torch.float64)
