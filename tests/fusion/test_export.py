"""A model in another form: exported, traced, scripted, in ONNX, prepared for quantisation. It works, or says how."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_res import freeze, functional, fuse, models, unfuse
from fused_res.spec import BlockSpec, UnitSpec
from fused_res.testing import stub_torchvision_operators
from tests.support.model_comparison import counted, lively, small_resnet

stub_torchvision_operators()
timm = pytest.importorskip("timm")
pytest.importorskip("torchvision")

Model = Any
FORMS: dict[str, Callable[[Model], Model]] = {"fused": fuse, "frozen": freeze}


def pieces() -> Model:
    few = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16), "stem_width": 8, "num_classes": 3}
    return timm.create_model("seresnet50t", **few)


#: What is fused as one, what in pieces, and our own modules.
NETWORKS: dict[str, Callable[[], Model]] = {
    "torchvision": lambda: small_resnet("Bottleneck").float(),
    "timm": pieces,
    "ours": lambda: models.cifar_resnet(8, num_classes=3, width=8),
}


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(batch))


@pytest.fixture(params=NETWORKS)
def stock(request: pytest.FixtureRequest) -> Model:
    """As it comes out of training, but in evaluation."""
    torch.manual_seed(0)
    return unfuse(lively(NETWORKS[request.param]())).eval()


@pytest.fixture(params=FORMS)
def model(request: pytest.FixtureRequest, stock: Model) -> Model:
    return FORMS[request.param](copy.deepcopy(stock))


def assert_same(actual: Tensor, stock: Model, x: Tensor) -> None:
    with torch.no_grad():
        expected = stock(x)
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


BATCH = {0: torch.export.Dim("batch", min=1, max=64)}


@pytest.mark.parametrize("strict", [False, True])
def test_export(model: Model, stock: Model, strict: bool) -> None:
    """Plain ATen, which needs no fused_res where it runs."""
    with torch.no_grad():
        program = torch.export.export(model, (images(),), dynamic_shapes=(BATCH,), strict=strict)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert {target.namespace for target in targets if hasattr(target, "namespace")} == {"aten"}
    assert_same(program.module()(images(3)), stock, images(3))


@pytest.mark.parametrize("dynamo", [False, True])
def test_onnx(model: Model, stock: Model, dynamo: bool, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = str(tmp_path / "model.onnx")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the older of the two is deprecated
        if dynamo:
            torch.onnx.export(model, (images(),), path, dynamo=True, dynamic_shapes=(BATCH,), verbose=False)
        else:
            axes = {"x": {0: "batch"}}
            torch.onnx.export(model, (images(),), path, dynamo=False, input_names=["x"], dynamic_axes=axes)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: images(3).numpy()})
    assert_same(torch.from_numpy(output), stock, images(3))


def test_trace(model: Model, stock: Model) -> None:
    with torch.no_grad():
        assert_same(torch.jit.trace(model, images())(images(3)), stock, images(3))
        assert_same(torch.fx.symbolic_trace(model)(images(3)), stock, images(3))


def test_script(model: Model, stock: Model) -> None:
    modules = [type(module) for module in model.modules()]
    for one in (model, nn.Sequential(model)):
        with pytest.raises(RuntimeError, match=r"torch.jit.script cannot compile .*: use torch.jit.trace"):
            torch.jit.script(one)
    assert [type(module) for module in model.modules()] == modules
    if type(model).__name__.startswith("Fused"):
        assert_same(torch.jit.script(unfuse(model))(images(3)), stock, images(3))


def test_moved_about(model: Model, stock: Model) -> None:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        assert_same(torch.func.functional_call(model, state, (images(3),)), stock, images(3))
        shared = copy.deepcopy(model).share_memory()
        assert all(tensor.is_shared() for tensor in shared.state_dict().values())
        assert_same(shared(images(3)), stock, images(3))
        on_meta = copy.deepcopy(model).to("meta")
        assert on_meta(images(3).to("meta")).shape == stock(images(3)).shape
        empty = on_meta.to_empty(device="cpu")
        empty.load_state_dict(state)
        assert_same(empty(images(3)), stock, images(3))


def test_training_on_meta() -> None:
    model = fuse(small_resnet().float()).to("meta")
    model(images().to("meta")).sum().backward()
    assert all(parameter.grad.is_meta for parameter in model.parameters())


def test_functions_on_meta() -> None:
    x, weight, norm = (torch.ones(shape, device="meta") for shape in ((2, 4, 5, 5), (4, 4, 1, 1), (4,)))
    spec = BlockSpec((UnitSpec(),), "identity")
    assert functional.residual_block(x, spec, [weight, None, *[norm] * 4], training=True).shape == x.shape
    assert functional.conv_bias_act(x, weight, norm, x).shape == x.shape


def test_prepared_for_quantisation() -> None:
    """Observers are hooks: whatever they look at runs by itself, and sees what it would see in stock."""
    quantization = pytest.importorskip("torch.ao.quantization")
    ranges = []
    for form in (unfuse, fuse):
        model = form(lively(small_resnet().float()).eval())
        model.qconfig = quantization.get_default_qconfig()
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            quantization.prepare(model, inplace=True)
            with counted() as calls:
                model(images())
        assert not calls
        found = [m for m in model.modules() if isinstance(m, quantization.ObserverBase)]
        ranges.append([(float(m.min_val), float(m.max_val)) for m in found])
    assert ranges[0] == ranges[1] and len(ranges[0]) > 20
