"""Every entry point of timm's and torchvision's ResNet families, fused, unfused and frozen, compared with stock.

The tests shrink each network by its own arguments, and build it once where several entry points yield the same network.
To run all of them in full size and print a table of the fused and unfused modules:
``python -m tests.models.test_resnet_families [MODULE ...]``.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_res import freeze, fuse, models, summarize, unfuse
from fused_res.report.summary import Row
from fused_res.testing import stub_torchvision_operators
from tests.support.model_comparison import assert_near, randomize_norms, record_fused_calls

stub_torchvision_operators()
torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

Model = Any
#: Divisible by every stride: with other sizes the stock networks fail, because only some shortcuts pool with ceil_mode.
SIZE = (64, 64)


def images(size: tuple[int, int] = SIZE, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def tensors(output: Any) -> list[Tensor]:
    """Return all tensors of the tensor, list or dictionary that a model returns."""
    if isinstance(output, Tensor):
        return [output]
    return [tensor for part in (output.values() if isinstance(output, dict) else output) for tensor in tensors(part)]


def training_step(model: Model, x: Tensor) -> dict[str, Tensor | None]:
    """Return outputs, gradients and running statistics of one training step; restore `model`'s buffers afterwards."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train().zero_grad()
    torch.manual_seed(3)  # for networks with stochastic depth or DropBlock
    x = x.clone().requires_grad_()
    outputs = tensors(model(x))
    torch.autograd.backward([o for o in outputs if o.requires_grad], [torch.cos(o.detach()) for o in outputs])
    results: dict[str, Tensor | None] = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    results |= {"gradient of the input": x.grad} | {f"gradient of {n}": p.grad for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    for name, buffer in model.named_buffers():
        results[name] = buffer.clone()
        buffer.copy_(before[name])
    return results


def evaluate(model: Model, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return tensors(model.eval()(x))


def check_against_stock(model: Model, x: Tensor, calls: bool = True, tolerance: float = 1e-10) -> tuple[Row, ...]:
    """Compare the fused, unfused and frozen model with the stock one.

    Args:
        model: the stock model; fused and unfused in place.
        x: input.
        calls: whether any module of `model` is expected to run fused.
        tolerance: relative error allowed.

    Returns:
        The rows of ``summarize`` for the fused model.
    """
    randomize_norms(model.double())
    kinds, state, parameters = [type(m) for m in model.modules()], list(model.state_dict()), list(model.parameters())
    expected, expected_eval = training_step(model, x), evaluate(model, x)

    with record_fused_calls() as recorded:
        actual = training_step(fuse(model), x)
    assert bool(recorded) == calls
    assert list(actual) == list(expected)
    for name, value in actual.items():
        assert_near(value, expected[name], name, tolerance)
    assert list(model.state_dict()) == state
    assert all(ours is theirs for ours, theirs in zip(model.parameters(), parameters, strict=True))
    assert all(isinstance(module, kind) for module, kind in zip(model.modules(), kinds, strict=True))
    rows = summarize(model).rows
    assert any(row.fused for row in rows) == calls and all(row.why for row in rows)

    for other in (model, freeze(model), unfuse(model)):
        for output, expected_output in zip(evaluate(other, x), expected_eval, strict=True):
            assert_near(output, expected_output, "output in evaluation", tolerance)
    assert [type(m) for m in model.modules()] == kinds
    return rows


def small_timm_resnet(name: str, **options: Any) -> Model:
    """Return a timm ResNet of five blocks; the two pruned networks read their channels from a file, unchanged."""
    small = {"layers": (1, 1, 1, 2), "channels": (32, 32, 64, 64), "stem_width": 8, "num_classes": 3}
    torch.manual_seed(0)
    return timm.create_model(name, **small, **options)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """A second thread only adds synchronization overhead to networks of this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


_built: dict[str, str] = {}


@pytest.mark.parametrize("name", timm.list_models(module="resnet"))
def test_timm_resnets_match_stock(name: str) -> None:
    model = small_timm_resnet(name)
    if _built.setdefault(repr(model), name) != name:
        return
    batch_norms_only = not any(isinstance(m, nn.GroupNorm) for m in model.modules())
    rows = check_against_stock(model, images(), calls=batch_norms_only)
    assert not batch_norms_only or all(row.fused for row in rows)

    # Stochastic depth, DropBlock and activation checkpointing. The stock model runs without checkpointing, under which
    # it would update its running statistics twice per batch.
    model = unfuse(small_timm_resnet(name, drop_path_rate=0.5, drop_block_rate=0.2))
    randomize_norms(model.double())
    expected = training_step(model, images())
    model.set_grad_checkpointing()
    actual = training_step(fuse(model), images())
    for key, value in actual.items():
        assert_near(value, expected[key], key)


def test_average_pooled_shortcut_with_odd_sizes() -> None:
    """timm pools with ceil_mode=True and count_include_pad=False: 9 columns become 5, then 3."""
    rows = check_against_stock(small_timm_resnet("resnet50d"), images((64, 72)))
    assert all(row.fused for row in rows)


#: Related architectures of timm: with the same blocks, with its ResNet around other blocks, or with consecutive
#: convolution, norm and ReLU modules. Their results must not change, whatever is fused.
SHRINKABLE = ("resnest14d", "resnest50d_4s2x40d", "skresnet18", "skresnext50_32x4d", "res2net50d", "res2next50")
RELATED = ("legacy_seresnet18", "hrnet_w18_small", "dla46x_c", "ghostnet_050", "repvit_m1", "regnety_002")


@pytest.mark.parametrize("name", [*SHRINKABLE, *RELATED])
def test_related_timm_architectures_match_stock(name: str) -> None:
    torch.manual_seed(0)
    model = small_timm_resnet(name) if name in SHRINKABLE else timm.create_model(name, num_classes=3)
    check_against_stock(model, images())


def torchvision_resnets() -> list[str]:
    names = torchvision.models.list_models(module=torchvision.models)
    return [n for n in names if torchvision.models.get_model_builder(n).__module__ == "torchvision.models.resnet"]


@pytest.mark.parametrize(
    ("library", "name"),
    [
        (library, name)
        for library in (torchvision.models, models)
        for name in torchvision_resnets()
        if hasattr(library, name)
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_torchvision_resnets_match_stock(library: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, 4, 2)
    model = getattr(library, name)()
    model.fc = nn.Linear(model.inplanes, 3)
    if _built.setdefault(repr(model), name) == name:
        rows = check_against_stock(model, images())
        assert all(row.fused for row in rows)


@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_resnet50"])
def test_segmentation_models_match_stock(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, 1, 1)
    build = torchvision.models.segmentation.__dict__[name]
    model = build(weights=None, weights_backbone=None, num_classes=3, aux_loss=True)
    rows = check_against_stock(model, images((32, 32)))
    assert all(row.fused for row in rows)


@pytest.mark.parametrize("frozen", [False, True])
def test_detection_backbones_match_stock(frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, 4, 2)
    options = {} if frozen else {"norm_layer": nn.BatchNorm2d}
    make = torchvision.models.detection.backbone_utils.resnet_fpn_backbone
    model = make(backbone_name="resnet50", weights=None, trainable_layers=3, **options)
    rows = check_against_stock(model, images())
    assert all(row.fused for row in rows)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_quantizable_models_match_stock(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, 4, 2)
    model = torchvision.models.quantization.__dict__[name](quantize=False)
    model.fc = nn.Linear(model.inplanes, 3)
    rows = check_against_stock(model, images())
    assert all(row.fused for row in rows)


def shrink(monkeypatch: pytest.MonkeyPatch, divisor: int, limit: int) -> None:
    """Patch torchvision's and this library's ResNet: 1 / `divisor` of the channels, at most `limit` blocks a stage."""
    theirs, ours = torchvision.models.resnet.ResNet, models.network.ResidualNetwork
    make_layer, make_stage = theirs._make_layer, ours._make_stage

    def fewer_layers(self: Any, block: Any, planes: int, blocks: int, *rest: Any, **options: Any) -> nn.Module:
        return make_layer(self, block, planes // divisor, min(blocks, limit), *rest, **options)

    def fewer_blocks(self: Any, block: Any, stage: Any) -> nn.Module:
        return make_stage(self, block, replace(stage, planes=stage.planes // divisor, blocks=min(stage.blocks, limit)))

    monkeypatch.setattr(theirs, "_make_layer", fewer_layers)
    monkeypatch.setattr(ours, "_make_stage", fewer_blocks)


def report(modules: list[str]) -> None:
    """Check every model of these timm modules in full size; print what was fused and why the rest was not."""
    for module in modules:
        totals: Counter[str] = Counter()
        names = torchvision_resnets() if module == "torchvision" else timm.list_models(module=module)
        build = torchvision.models.get_model if module == "torchvision" else timm.create_model
        for name in names:
            start = time.perf_counter()
            torch.manual_seed(0)
            model = build(name)
            size = sum(p.numel() for p in model.parameters()) / 1e6
            calls = bool(summarize(fuse(model)).fused)
            # The networks have up to 420 layers, and training amplifies rounding errors from layer to layer. Batch 4,
            # because some norms follow global average pooling: batch norm maps any two distinct values to -1 and 1.
            rows = check_against_stock(unfuse(model), images((64, 64), 4), calls, 1e-5)
            reasons = Counter(_reason(row) for row in rows)
            totals += reasons
            print(f"{module}\t{name}\t{size:.1f}M\t{time.perf_counter() - start:.0f} s\t{dict(reasons)}", flush=True)
        print(f"{module}: {len(names)} models")
        for reason, count in totals.most_common():
            print(f"{count:6}  {reason}", flush=True)


def _reason(row: Row) -> str:
    if not row.fused:
        return f"{row.kind} left: {row.why}"
    return f"{row.kind} fused: {row.why.partition(':')[0]}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    report(sys.argv[1:] or ["resnet"])
