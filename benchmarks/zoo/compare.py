"""Comparison of a fused and a frozen model with the stock model in float64: outputs, gradients, buffers, norms."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.zoo.count import count_stock_norms, is_norm
from fused_res import freeze, fuse, summarize
from fused_res.report.comparison import Errors, Named, backward, named_tensors, seed

#: Largest error of equal models in float64, relative to each tensor's largest value. Rounding stays below it in outputs
#: and buffers. At 64 x 64 pixels the last norms reduce over few values and amplify rounding in gradients: by 1e-8.
ALLOWED = {"outputs": 1e-9, "buffers": 1e-9, "gradients": 1e-6}

#: Largest number of reasons that a comparison gives.
MOST_REASONS = 3


class Comparison(NamedTuple):
    """Result of :func:`compare`.

    Args:
        errors: largest error by ``"MODE KIND"``, relative to each tensor's largest value; inf where a tensor is missing
            or has another shape.
        norms: for each of the modes training, evaluation and frozen, the number of norms that run fused, and of those
            that run in the stock model.
        reasons: why norms do not run fused, the most frequent reason first.
    """

    errors: dict[str, float]
    norms: dict[str, tuple[int, int]]
    reasons: list[str]


def randomize_norms(model: nn.Module) -> None:
    """Randomize parameters and statistics of all norms in place, of frozen norms, too.

    Newly initialized norms are the identity in evaluation, and zero-initialized last norms hide a block's branch.
    """
    with torch.no_grad():
        for norm in filter(is_norm, model.modules()):
            ranges = {"weight": (0.5, 1.0), "bias": (-1.0, 1.0), "running_mean": (-1.0, 1.0), "running_var": (0.5, 2.0)}
            for name, (low, high) in ranges.items():
                if isinstance(tensor := getattr(norm, name, None), Tensor):
                    tensor.uniform_(low, high)


def compare(model: nn.Module, shape: tuple[int, ...]) -> Comparison:
    """Compare `model` with its fused and frozen copies.

    Args:
        model: a stock model; it is converted to float64, and its norms are randomized.
        shape: shape of the input.
    """
    randomize_norms(model)
    stock = model.double()
    x = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors: dict[str, float] = {}
    norms: dict[str, tuple[int, int]] = {}

    def add(mode: str, other: nn.Module, reference: nn.Module, step: Callable[[nn.Module], dict[str, Named]]) -> None:
        counts, results = [], []
        for one in (other, reference):
            counts.append(count_stock_norms(one, lambda one=one: results.append(step(one))))  # type: ignore[misc]
        for kind, tensors in results[1].items():
            found = Errors()
            found.add(results[0][kind], tensors, tensors)
            errors[f"{mode} {kind}"] = max(found.ours.values(), default=0.0)
        norms[mode] = counts[1] - counts[0], counts[1]

    def infer(module: nn.Module) -> dict[str, Named]:
        with torch.no_grad():
            return {"outputs": run(module, x)}

    stock.eval()
    fused = fuse(copy.deepcopy(stock))
    add("evaluation", fused, stock, infer)
    frozen = freeze(stock)
    infer(frozen)  # packs the weights
    add("frozen", frozen, stock, infer)
    add("training", fused.train(), stock.train(), lambda module: train(module, x))
    return Comparison(errors, norms, reasons(fused) if norms["training"][0] < norms["training"][1] else [])


def reasons(fused: nn.Module) -> list[str]:
    """Return why norms of a fused model run stock, as :func:`fused_res.summarize` says."""
    rows = Counter(f"{row.kind} {row.why}" for row in summarize(fused).left)
    return [f"{count} x {text}" for text, count in rows.most_common(MOST_REASONS)]


def run(model: nn.Module, x: Tensor) -> Named:
    """Return the outputs of one forward; dropout draws the same numbers in every call."""
    seed(x.device)
    return named_tensors("output", model(x))


def train(model: nn.Module, x: Tensor) -> dict[str, Named]:
    """Return outputs and gradients of one training step, and the buffers after it."""
    x = x.clone().requires_grad_()
    outputs = run(model, x)
    backward(outputs)
    named: Named = {"input": x, **dict(model.named_parameters())}
    gradients = {name: tensor.grad for name, tensor in named.items() if tensor.grad is not None}
    return {
        "outputs": {name: tensor.detach() for name, tensor in outputs.items()},
        "gradients": gradients,
        "buffers": dict(model.named_buffers()),
    }


def excesses(errors: dict[str, float]) -> Iterator[str]:
    """Yield a description of each error above the allowed one."""
    for name, error in errors.items():
        allowed = ALLOWED[name.split()[-1]]
        if not error <= allowed:  # NaN exceeds it, too
            yield f"{name}: error {error:.1e}, allowed {allowed:.0e}"
