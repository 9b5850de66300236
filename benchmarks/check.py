"""Providers must agree before they are timed.

The error of a result is its distance from the reference in the Euclidean norm, relative to the reference. No
fixed tolerance fits all results: a float32 gradient of ResNet-50's early layers is 2 to 5 % away from the
float64 one in stock PyTorch (ReLUs whose input is within rounding of zero switch, and 50 batch norms amplify
it), while a single batch norm is right to 1e-7. So the yardstick is stock PyTorch's own error on the same
tensors: a provider may have `factor` times that, plus `floor` for rounding where stock happens to be exact.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Results = Mapping[str, Tensor]


class ResultsDifferError(RuntimeError):
    """A provider computed something else than stock PyTorch."""


def relative_error(value: Tensor, reference: Tensor) -> float:
    reference = reference.double()
    norm = torch.linalg.vector_norm(reference)
    distance = torch.linalg.vector_norm(value.double() - reference)
    if norm == 0:
        return float(distance)
    return float(distance / norm)


def check_results(
    provider: str, results: Results, reference: Results, stock: Sequence[Results], *, factor: float, floor: float
) -> float:
    """Raises ResultsDifferError unless every tensor is close enough; returns the largest error in units of
    what is allowed."""
    if results.keys() != reference.keys():
        raise ResultsDifferError(f"{provider} returned {sorted(results)}, expected {sorted(reference)}")
    worst = 0.0
    for name, expected in reference.items():
        if results[name].shape != expected.shape:
            raise ResultsDifferError(
                f"{provider}: {name} has shape {tuple(results[name].shape)}, expected {tuple(expected.shape)}"
            )
        error = relative_error(results[name], expected)
        stock_error = max(relative_error(other[name], expected) for other in stock)
        allowed = factor * stock_error + floor
        if not error <= allowed:  # also where the error is NaN
            raise ResultsDifferError(
                f"{provider}: {name} is off by {error:.2e} (relative, Euclidean norm); stock PyTorch is off "
                f"by {stock_error:.2e}, allowed are {allowed:.2e}. Nothing was timed."
            )
        worst = max(worst, error / allowed)
    return worst


def accepts(name: str, call: Callable[[], Any]) -> bool:
    """Whether `name` runs on these operands: cuDNN's dtypes depend on its version, oneDNN's on the processor."""
    try:
        call()
    except RuntimeError as error:
        print(f"{name} is left out, it refuses: {error}")
        return False
    return True
