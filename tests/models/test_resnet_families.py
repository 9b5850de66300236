"""Every entrypoint of timm's and torchvision's ResNet families, fused, unfused and frozen against stock.

Here each is shrunk by its own arguments, and built once where several come to the same network. All of them in full
size, with the table of what was fused and what was left: ``python tests/models/test_resnet_families.py [MODULE ...]``.
"""

from __future__ import annotations

import re
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
from fused_res.fusion.summary import Row
from fused_res.testing import stub_torchvision_operators
from tests.support.model_comparison import assert_near, counted, lively

stub_torchvision_operators()
torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

Model = Any
#: Even all the way down: stock itself fails on others where some shortcuts pool with rounding up, others do not.
SIZE = (64, 64)


def images(size: tuple[int, int] = SIZE, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def tensors(output: Any) -> list[Tensor]:
    """Of the tensor, list or dictionary that a model returns."""
    if isinstance(output, Tensor):
        return [output]
    return [tensor for part in (output.values() if isinstance(output, dict) else output) for tensor in tensors(part)]


def step(model: Model, x: Tensor) -> dict[str, Tensor | None]:
    """One training step's outputs, gradients and statistics; `model` has the statistics from before it again."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train().zero_grad()
    torch.manual_seed(3)  # some drop at random
    x = x.clone().requires_grad_()
    outputs = tensors(model(x))
    torch.autograd.backward([o for o in outputs if o.requires_grad], [torch.cos(o.detach()) for o in outputs])
    seen: dict[str, Tensor | None] = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    seen |= {"gradient of the input": x.grad} | {f"gradient of {n}": p.grad for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    for name, buffer in model.named_buffers():
        seen[name] = buffer.clone()
        buffer.copy_(before[name])
    return seen


def evaluated(model: Model, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return tensors(model.eval()(x))


def check(model: Model, x: Tensor, calls: bool = True, tolerance: float = 1e-10) -> tuple[Row, ...]:
    """Stock, fused, unfused and frozen, one after the other: the same in all that can be seen. What `fuse` did."""
    lively(model.double())
    kinds, state, parameters = [type(m) for m in model.modules()], list(model.state_dict()), list(model.parameters())
    expected, answers = step(model, x), evaluated(model, x)

    with counted() as seen:
        actual = step(fuse(model), x)
    assert bool(seen) == calls
    assert list(actual) == list(expected)
    for name, value in actual.items():
        assert_near(value, expected[name], name, tolerance)
    assert list(model.state_dict()) == state
    assert all(ours is theirs for ours, theirs in zip(model.parameters(), parameters, strict=True))
    assert all(isinstance(module, kind) for module, kind in zip(model.modules(), kinds, strict=True))
    rows = summarize(model).rows
    assert any(row.fused for row in rows) == calls and all(row.why for row in rows)

    for other in (model, freeze(model), unfuse(model)):
        for output, answer in zip(evaluated(other, x), answers, strict=True):
            assert_near(output, answer, "output in evaluation", tolerance)
    assert [type(m) for m in model.modules()] == kinds
    return rows


def shrunk(name: str, **options: Any) -> Model:
    """A timm ResNet of five blocks; the two that were pruned have their channels from a file and keep them."""
    few = {"layers": (1, 1, 1, 2), "channels": (32, 32, 64, 64), "stem_width": 8, "num_classes": 3}
    torch.manual_seed(0)
    return timm.create_model(name, **few, **options)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Networks as small as these only wait for a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


_seen: dict[str, str] = {}


@pytest.mark.parametrize("name", timm.list_models(module="resnet"))
def test_timm(name: str) -> None:
    model = shrunk(name)
    if _seen.setdefault(repr(model), name) != name:
        return
    normal = not any(isinstance(m, nn.GroupNorm) for m in model.modules())
    rows = check(model, images(), calls=normal)
    assert not normal or all(row.fused for row in rows)

    # Dropping at random and activation checkpointing; stock would count a batch twice if it was checkpointed itself.
    model = unfuse(shrunk(name, drop_path_rate=0.5, drop_block_rate=0.2))
    lively(model.double())
    expected = step(model, images())
    model.set_grad_checkpointing()
    actual = step(fuse(model), images())
    for what, value in actual.items():
        assert_near(value, expected[what], what)


def test_average_pooling_over_odd_sizes() -> None:
    """Rounded up, and without counting what is outside: 9 columns become 5, and those 3."""
    rows = check(shrunk("resnet50d"), images((64, 72)))
    assert [row.name for row in rows if "in pieces: downsample" in row.why] == ["layer2.0", "layer3.0", "layer4.0"]


#: Of timm's families with these blocks, with its ResNet around others, or with convolution, norm and ReLU in a row here
#: and there: whatever is fused in them, they compute what they did. Some have nothing to fuse.
SHRUNK = ("resnest14d", "resnest50d_4s2x40d", "skresnet18", "skresnext50_32x4d", "res2net50d", "res2next50")
RELATIVES = ("legacy_seresnet18", "hrnet_w18_small", "dla46x_c", "ghostnet_050", "repvit_m1", "regnety_002")


@pytest.mark.parametrize("name", [*SHRUNK, *RELATIVES])
def test_relatives(name: str) -> None:
    torch.manual_seed(0)
    model = shrunk(name) if name in SHRUNK else timm.create_model(name, num_classes=3)
    check(model, images(), calls=name != "regnety_002")


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
def test_torchvision(library: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, 4, 2)
    model = getattr(library, name)()
    model.fc = nn.Linear(model.inplanes, 3)
    if _seen.setdefault(repr(model), name) == name:
        rows = check(model, images())
        assert all(row.fused for row in rows)


@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_resnet50"])
def test_segmentation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, 1, 1)
    build = torchvision.models.segmentation.__dict__[name]
    model = build(weights=None, weights_backbone=None, num_classes=3, aux_loss=True)
    rows = check(model, images((32, 32)))
    # The backbone is a dictionary of the network's children: where its stem ends cannot be seen.
    left = {row.name: row.why for row in rows if not row.fused}
    assert left.pop("backbone.bn1") == "what surrounds it in IntermediateLayerGetter is not known"
    assert set(left.values()) <= {"what surrounds it in ASPPPooling is not known"}


@pytest.mark.parametrize("frozen", [False, True])
def test_detection_backbone(frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, 4, 2)
    options = {} if frozen else {"norm_layer": nn.BatchNorm2d}
    make = torchvision.models.detection.backbone_utils.resnet_fpn_backbone
    model = make(backbone_name="resnet50", weights=None, trainable_layers=3, **options)
    rows = check(model, images(), calls=not frozen)
    assert not frozen or "is FrozenBatchNorm2d, not exactly BatchNorm2d" in rows[0].why


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_quantizable(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their forwards are their own: they are left, all but the projections of the stages."""
    shrink(monkeypatch, 4, 2)
    model = torchvision.models.quantization.__dict__[name](quantize=False)
    model.fc = nn.Linear(model.inplanes, 3)
    rows = check(model, images())
    assert {row.kind for row in rows if row.fused} == {"Sequential"}


def shrink(monkeypatch: pytest.MonkeyPatch, divisor: int, most: int) -> None:
    """Has torchvision's networks and ours made of fewer channels, and of `most` blocks a stage."""
    theirs, ours = torchvision.models.resnet.ResNet, models.network.ResidualNetwork
    make_layer, make_stage = theirs._make_layer, ours._make_stage

    def fewer_layers(self: Any, block: Any, planes: int, blocks: int, *rest: Any, **options: Any) -> nn.Module:
        return make_layer(self, block, planes // divisor, min(blocks, most), *rest, **options)

    def fewer_blocks(self: Any, block: Any, stage: Any) -> nn.Module:
        return make_stage(self, block, replace(stage, planes=stage.planes // divisor, blocks=min(stage.blocks, most)))

    monkeypatch.setattr(theirs, "_make_layer", fewer_layers)
    monkeypatch.setattr(ours, "_make_stage", fewer_blocks)


def report(modules: list[str]) -> None:
    """Every model of these modules of timm, in full size; prints what was fused, and why the rest was left."""
    for module in modules:
        why: Counter[str] = Counter()
        names = torchvision_resnets() if module == "torchvision" else timm.list_models(module=module)
        build = torchvision.models.get_model if module == "torchvision" else timm.create_model
        for name in names:
            start = time.perf_counter()
            torch.manual_seed(0)
            model = build(name)
            size = sum(p.numel() for p in model.parameters()) / 1e6
            calls = bool(summarize(fuse(model)).fused)
            # As deep as 420 layers: training amplifies rounding from one to the next. Four images, because some norms
            # follow an average over the whole image: of two values, all that a norm leaves is which one is larger.
            rows = check(unfuse(model), images((64, 64), 4), calls, 1e-5)
            reasons = Counter(_reason(row) for row in rows)
            why += reasons
            print(f"{module}\t{name}\t{size:.1f}M\t{time.perf_counter() - start:.0f} s\t{dict(reasons)}", flush=True)
        print(f"{module}: {len(names)} models")
        for reason, count in why.most_common():
            print(f"{count:6}  {reason}", flush=True)


def _reason(row: Row) -> str:
    if not row.fused:
        return f"{row.kind} left: {row.why}"
    pieces = re.search("in pieces: .*", row.why)
    return f"{row.kind} fused {pieces[0] if pieces else 'as one'}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    report(sys.argv[1:] or ["resnet"])
