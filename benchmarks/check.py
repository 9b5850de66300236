"""Correctness checks: the results of every provider must match a reference within tolerance before it is timed.

The error of a result is ||result - reference|| / ||reference|| in the Euclidean norm. No fixed tolerance fits all
results: a float32 gradient of ResNet-50's early layers differs by 2 to 5 % from the float64 one in stock PyTorch (ReLUs
whose input is within rounding of zero switch, and 50 batch norms amplify the difference), while a single batch norm is
accurate to 1e-7. The tolerance is therefore `factor` times the error of stock PyTorch on the same tensors, plus `floor`
for rounding where stock PyTorch happens to be exact.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Results = Mapping[str, Tensor]


class ResultsDifferError(RuntimeError):
    """The results of a provider differ from the reference by more than the tolerance."""


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
    """Return the largest error of a provider's results, as a fraction of the tolerance.

    Args:
        provider: name for error messages.
        results: tensors of the provider, by name.
        reference: expected tensors, by name.
        stock: results of stock PyTorch, in one or more memory formats; the largest error sets the tolerance.
        factor: tolerance in units of the error of stock PyTorch.
        floor: tolerance where stock PyTorch is exact.

    Raises:
        ResultsDifferError: a tensor is missing, has the wrong shape, or has an error above the tolerance.
    """
    if results.keys() != reference.keys():
        raise ResultsDifferError(f"{provider} returned {sorted(results)}, expected {sorted(reference)}")
    largest = 0.0
    for name, expected in reference.items():
        if results[name].shape != expected.shape:
            raise ResultsDifferError(
                f"{provider}: {name} has shape {tuple(results[name].shape)}, expected {tuple(expected.shape)}"
            )
        error = relative_error(results[name], expected)
        stock_error = max(relative_error(other[name], expected) for other in stock)
        tolerance = factor * stock_error + floor
        if not error <= tolerance:  # also where the error is NaN
            raise ResultsDifferError(
                f"{provider}: {name} has a relative error of {error:.2e} (Euclidean norm), stock PyTorch of "
                f"{stock_error:.2e}; expected at most {tolerance:.2e}. Nothing was timed."
            )
        largest = max(largest, error / tolerance)
    return largest


@contextlib.contextmanager
def recorded(name: str, failures: dict[str, str] | None) -> Iterator[None]:
    """Record in `failures` why the provider `name` cannot be measured, instead of raising it.

    Args:
        name: name of the provider.
        failures: reasons by provider; None: raise.
    """
    try:
        yield
    except RuntimeError as error:
        if failures is None or is_sticky(error):
            raise
        failures[name] = f"{type(error).__name__}: {error}"


def is_sticky(error: Exception) -> bool:
    """Return whether an error leaves this process unable to use the GPU, for example an illegal access."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def is_supported(name: str, call: Callable[[], Any]) -> bool:
    """Return whether `call` runs on these operands, and print a line if not.

    The dtypes that cuDNN supports depend on its version, those of oneDNN on the processor.
    """
    try:
        call()
    except RuntimeError as error:
        print(f"{name} is skipped, not supported for these operands: {error}")
        return False
    return True
