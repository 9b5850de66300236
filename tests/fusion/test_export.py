"""Fused and frozen models under torch.export, ONNX, TorchScript, torch.fx, quantization and device moves.

Each either works or raises an error that names the alternative.
"""

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
from tests.support.model_comparison import randomize_norms, record_fused_calls, small_resnet

stub_torchvision_operators()
timm = pytest.importorskip("timm")
pytest.importorskip("torchvision")

Model = Any
CONVERSIONS: dict[str, Callable[[Model], Model]] = {"fused": fuse, "frozen": freeze}


def partially_fused_network() -> Model:
    small = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16), "stem_width": 8, "num_classes": 3}
    return timm.create_model("seresnet50t", **small)


#: A network whose blocks are fused as a whole, one whose blocks are partially fused, and one of fused_res.models.
NETWORKS: dict[str, Callable[[], Model]] = {
    "torchvision": lambda: small_resnet("Bottleneck").float(),
    "timm": partially_fused_network,
    "ours": lambda: models.cifar_resnet(8, num_classes=3, width=8),
}


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(batch))


@pytest.fixture(params=NETWORKS)
def stock(request: pytest.FixtureRequest) -> Model:
    """A network with randomized norms, as after training, in eval mode."""
    torch.manual_seed(0)
    return unfuse(randomize_norms(NETWORKS[request.param]())).eval()


@pytest.fixture(params=CONVERSIONS)
def model(request: pytest.FixtureRequest, stock: Model) -> Model:
    return CONVERSIONS[request.param](copy.deepcopy(stock))


def assert_matches_stock(actual: Tensor, stock: Model, x: Tensor) -> None:
    with torch.no_grad():
        expected = stock(x)
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


BATCH = {0: torch.export.Dim("batch", min=1, max=64)}


@pytest.mark.parametrize("strict", [False, True])
def test_export_contains_only_aten(model: Model, stock: Model, strict: bool) -> None:
    """The exported program contains ATen operators only, so it runs without fused_res."""
    with torch.no_grad():
        program = torch.export.export(model, (images(),), dynamic_shapes=(BATCH,), strict=strict)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert {target.namespace for target in targets if hasattr(target, "namespace")} == {"aten"}
    assert_matches_stock(program.module()(images(3)), stock, images(3))


@pytest.mark.parametrize("dynamo", [False, True])
def test_onnx_export_matches_stock(model: Model, stock: Model, dynamo: bool, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = str(tmp_path / "model.onnx")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # dynamo=False is deprecated
        if dynamo:
            torch.onnx.export(model, (images(),), path, dynamo=True, dynamic_shapes=(BATCH,), verbose=False)
        else:
            axes = {"x": {0: "batch"}}
            torch.onnx.export(model, (images(),), path, dynamo=False, input_names=["x"], dynamic_axes=axes)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: images(3).numpy()})
    assert_matches_stock(torch.from_numpy(output), stock, images(3))


def test_jit_trace_and_fx_trace_match_stock(model: Model, stock: Model) -> None:
    with torch.no_grad():
        assert_matches_stock(torch.jit.trace(model, images())(images(3)), stock, images(3))
        assert_matches_stock(torch.fx.symbolic_trace(model)(images(3)), stock, images(3))


def test_jit_script_raises_unless_unfused(model: Model, stock: Model) -> None:
    modules = [type(module) for module in model.modules()]
    for one in (model, nn.Sequential(model)):
        with pytest.raises(RuntimeError, match=r"torch.jit.script cannot compile .*: use torch.jit.trace"):
            torch.jit.script(one)
    assert [type(module) for module in model.modules()] == modules
    if type(model).__name__.startswith("Fused"):
        assert_matches_stock(torch.jit.script(unfuse(model))(images(3)), stock, images(3))


def test_functional_call_shared_memory_and_meta_device(model: Model, stock: Model) -> None:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        assert_matches_stock(torch.func.functional_call(model, state, (images(3),)), stock, images(3))
        shared = copy.deepcopy(model).share_memory()
        assert all(tensor.is_shared() for tensor in shared.state_dict().values())
        assert_matches_stock(shared(images(3)), stock, images(3))
        on_meta = copy.deepcopy(model).to("meta")
        assert on_meta(images(3).to("meta")).shape == stock(images(3)).shape
        empty = on_meta.to_empty(device="cpu")
        empty.load_state_dict(state)
        assert_matches_stock(empty(images(3)), stock, images(3))


def test_training_on_meta_device() -> None:
    model = fuse(small_resnet().float()).to("meta")
    model(images().to("meta")).sum().backward()
    assert all(parameter.grad.is_meta for parameter in model.parameters())


def test_functional_on_meta_device() -> None:
    x, weight, norm = (torch.ones(shape, device="meta") for shape in ((2, 4, 5, 5), (4, 4, 1, 1), (4,)))
    spec = BlockSpec((UnitSpec(),), "identity")
    assert functional.residual_block(x, spec, [weight, None, *[norm] * 4], training=True).shape == x.shape
    assert functional.conv_bias_act(x, weight, norm, x).shape == x.shape


def test_quantization_observers_record_same_ranges_as_stock() -> None:
    """Observers are hooks, so the observed modules run unfused and record the same ranges as in the stock model."""
    quantization = pytest.importorskip("torch.ao.quantization")
    ranges = []
    for convert in (unfuse, fuse):
        model = convert(randomize_norms(small_resnet().float()).eval())
        model.qconfig = quantization.get_default_qconfig()
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            quantization.prepare(model, inplace=True)
            with record_fused_calls() as calls:
                model(images())
        assert not calls
        observers = [m for m in model.modules() if isinstance(m, quantization.ObserverBase)]
        ranges.append([(float(m.min_val), float(m.max_val)) for m in observers])
    assert ranges[0] == ranges[1] and len(ranges[0]) > 20
