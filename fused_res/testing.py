"""Helpers that tests and benchmarks share."""

import importlib.util
import pathlib
import sys

import torch
from torch import Tensor


def stub_torchvision_operators() -> None:
    """Let `import torchvision` (and so timm) succeed when its compiled operators do not load.

    torchvision's wheels are built for one torch; beside another one its library is refused, and the import then fails
    on operators (box suppression) that classification models never call. This declares their schemas, without a kernel:
    calling one raises. Does nothing where torchvision is missing, is imported already, or loads as it should.
    """
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None or "torchvision" in sys.modules:
        return
    try:
        for library in pathlib.Path(found.origin).parent.glob("_C*.so"):
            torch.ops.load_library(str(library))
    except OSError:
        pass
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def assert_as_exact_as(
    name: str, ours: Tensor, stock: Tensor, exact: Tensor, exact_for_stock: Tensor | None = None, floor: float = 0.0
) -> None:
    """The precision contract: our error against float64 is at most twice that of stock PyTorch in the same dtype on
    the same input, plus four units in the last place of the largest value, plus a ``floor`` that the caller explains.

    ``exact_for_stock`` is for gradients behind a ReLU, where each side has the exact gradient for its own mask.
    """
    assert ours.dtype == stock.dtype and ours.shape == stock.shape, f"{name}: {ours.dtype} {tuple(ours.shape)}"
    if exact.numel() == 0:
        return
    error = (ours.double() - exact).abs()
    stock_error = (stock.double() - (exact if exact_for_stock is None else exact_for_stock)).abs()
    ulp = torch.finfo(ours.dtype).eps * exact.abs().max().clamp(min=torch.finfo(ours.dtype).smallest_normal)
    allowed = 2 * stock_error.max() + 4 * ulp + floor
    worst = error.max()
    if not worst <= allowed:  # NaN fails, too
        where = tuple(int(i) for i in torch.unravel_index(error.nan_to_num(float("inf")).argmax(), error.shape))
        share = (~(error <= allowed)).double().mean()
        raise AssertionError(
            f"{name}: error {worst:.3g} at {where}, allowed {allowed:.3g} (stock {stock_error.max():.3g});"
            f" {share:.2%} of the elements are outside"
        )
