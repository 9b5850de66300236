"""Helpers shared by tests and benchmarks: the accuracy criterion, and imports of an incompatible torchvision."""

import importlib.util
import pathlib
import sys

import torch
from torch import Tensor


def stub_torchvision_operators() -> None:
    """Make `import torchvision` (and therefore timm) succeed if its compiled operators do not load.

    A torchvision wheel is built for one torch version. With another version its library does not load, and the import
    fails on operators (non-maximum suppression) that classification models never call. This function declares the
    operators' schemas without a kernel, so that calling one raises. It does nothing if torchvision is not installed, is
    already imported, or loads.
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


def assert_within_stock_error(
    name: str, ours: Tensor, stock: Tensor, exact: Tensor, exact_for_stock: Tensor | None = None, floor: float = 0.0
) -> None:
    """Assert the accuracy criterion: the error is at most twice that of stock PyTorch.

    Both errors are maxima over all elements against float64, in the same dtype on the same input. The bound adds four
    units in the last place of the largest exact value.

    Args:
        name: name of the tensor in the message.
        ours, stock: results of fused_res and of stock PyTorch, of equal shape and dtype.
        exact: float64 reference.
        exact_for_stock: float64 reference for ``stock``, if it is another one: the ReLU masks of the two sides may
            differ, and each side's gradient is then compared with the exact gradient for its own mask.
        floor: additional absolute tolerance; the caller has to justify it.
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
            f" {share:.2%} of the elements exceed it"
        )
