"""fused_res.models compared with torchvision: keys, initial weights, outputs, gradients; CIFAR and plain networks."""

import copy
import functools
import types

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fused_res import fuse, models, summarize
from fused_res.autograd import residual_block
from fused_res.block.plan import BlockConfig
from fused_res.nn import BasicBlock, Bottleneck, ResidualBlock
from fused_res.spec import BlockSpec, UnitSpec
from fused_res.testing import stub_torchvision_operators
from tests.support.model_comparison import record_fused_calls

stub_torchvision_operators()
torchvision_models = pytest.importorskip("torchvision.models")

IMAGENET = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "wide_resnet50_2",
)


def pair(name: str, seed: int = 0, **kwargs: object) -> tuple[nn.Module, nn.Module]:
    """Return this library's and torchvision's model, each created with the same seed."""
    created = []
    for module in (models, torchvision_models):
        torch.manual_seed(seed)
        created.append(getattr(module, name)(**kwargs))
    return created[0], created[1]


def assert_same_state(ours: nn.Module, theirs: nn.Module) -> None:
    state, expected = ours.state_dict(), theirs.state_dict()
    assert list(state) == list(expected)
    different = [key for key in state if not torch.equal(state[key], expected[key])]
    assert not different


@pytest.mark.parametrize("name", IMAGENET)
def test_structure_matches_torchvision(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = pair(name)
    state, expected = ours.state_dict(), theirs.state_dict()
    assert [(key, value.shape) for key, value in state.items()] == [(k, v.shape) for k, v in expected.items()]
    assert [key for key, _ in ours.named_parameters()] == [key for key, _ in theirs.named_parameters()]
    assert [key for key, _ in ours.named_children()] == [key for key, _ in theirs.named_children()]


# One model of each kind: the remaining ones differ only in the number of blocks.
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("resnet18", {}),
        ("resnet18", {"num_classes": 7, "zero_init_residual": True}),
        ("resnet50", {"zero_init_residual": True}),
        ("resnet50", {"replace_stride_with_dilation": [False, True, True]}),
        ("resnet18", {"norm_layer": functools.partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)}),
        ("resnet18", {"norm_layer": functools.partial(nn.GroupNorm, 32)}),
        ("resnext50_32x4d", {}),
        ("wide_resnet50_2", {"num_classes": 10}),
    ],
)
def test_initial_weights_match_torchvision_for_equal_seeds(name: str, kwargs: dict) -> None:
    assert_same_state(*pair(name, seed=3, **kwargs))


@pytest.mark.parametrize(
    ("name", "memory_format", "kwargs"),
    [
        ("resnet18", torch.contiguous_format, {}),
        ("resnet18", torch.channels_last, {}),
        ("resnet50", torch.channels_last, {"replace_stride_with_dilation": (False, False, True)}),
        ("resnext50_32x4d", torch.contiguous_format, {}),
        (
            "resnet18",
            torch.contiguous_format,
            {"norm_layer": functools.partial(nn.GroupNorm, 32)},
        ),  # stock path
    ],
)
def test_outputs_and_gradients_match_torchvision(name: str, memory_format: torch.memory_format, kwargs: dict) -> None:
    ours, theirs = (
        model.to(torch.float64, memory_format=memory_format) for model in pair(name, num_classes=5, **kwargs)
    )
    x = torch.randn(3, 3, 48, 40, dtype=torch.float64).to(memory_format=memory_format)
    weights = torch.randn(3, 5, dtype=torch.float64)
    outputs = []
    for model in (ours, theirs):
        output = model.train()(x)
        (output * weights).sum().backward()
        outputs += [output.detach(), model.eval()(x).detach()]
    torch.testing.assert_close(outputs[0], outputs[2])
    torch.testing.assert_close(outputs[1], outputs[3])
    expected = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key].grad, rtol=1e-6, atol=1e-8, msg=key)
    torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))


def test_state_dicts_are_interchangeable_with_torchvision() -> None:
    ours, theirs = models.resnet18(), torchvision_models.resnet18()
    ours.load_state_dict(theirs.state_dict())
    assert_same_state(ours, theirs)
    torchvision_models.resnet18().load_state_dict(ours.state_dict())


def test_loads_torchvision_weights() -> None:
    source = torchvision_models.resnet18(num_classes=4)
    weights = types.SimpleNamespace(
        meta={"categories": ["a", "b", "c", "d"]},
        get_state_dict=lambda progress, check_hash: source.state_dict(),
    )
    assert_same_state(models.resnet18(weights=weights), source)
    with pytest.raises(ValueError, match="num_classes must be 4"):
        models.resnet18(weights=weights, num_classes=3)
    with pytest.raises(ValueError, match="weights must be None for a plain network"):
        models.resnet18(weights=weights, plain=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": "IMAGENET1K_V1"}, "weights must be None or a member"),
        ({"replace_stride_with_dilation": [True]}, "replace_stride_with_dilation"),
        ({"plain": True, "zero_init_residual": True}, "zero_init_residual"),
        ({"backend": "fast"}, "backend must be one of"),
        ({"recompute": "everything"}, "recompute must be one of"),
        ({"replace_stride_with_dilation": True}, "replace_stride_with_dilation"),
        ({"num_classes": "ten"}, "num_classes must be a non-negative integer, got 'ten'"),
        ({"norm_layer": nn.BatchNorm2d(64)}, "norm_layer must construct a norm"),
    ],
)
def test_invalid_arguments_raise(arguments: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        models.resnet50(**arguments)


def test_invalid_blocks_and_layers_raise() -> None:
    for block in ("basic", nn.Conv2d, ResidualBlock):
        with pytest.raises(TypeError, match=r"block must be the class fused_res\.nn\.BasicBlock or Bottleneck"):
            models.ResNet(block, (1, 1, 1, 1))
    for layers in (4, (1, 1, 1), (1, 1, 1, 0), ("1", "1", "1", "1")):
        with pytest.raises(ValueError, match="layers must be the number of blocks of each of 4 stages"):
            models.ResNet(BasicBlock, layers)


def test_recompute_and_backend_reach_every_block() -> None:
    model = models.resnet50(recompute="conv", backend="reference")
    blocks = [module for module in model.modules() if isinstance(module, Bottleneck)]
    assert len(blocks) == 16
    for module in (model, *blocks):
        assert (module.recompute, module.backend) == ("conv", "reference")


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_cifar_depth_is_number_of_weighted_layers(depth: int) -> None:
    with torch.device("meta"):
        model = models.cifar_resnet(depth)
    blocks = [module for module in model.modules() if isinstance(module, BasicBlock)]
    assert 2 * len(blocks) + 2 == depth
    main_path = [
        m for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and "downsample" not in name
    ]
    assert len(main_path) == depth
    assert sum("downsample.0.weight" in key for key in model.state_dict()) == 2  # option B: where the shape changes


def test_cifar_resnet20_has_papers_parameter_count() -> None:
    """270 thousand parameters (He et al. 2015, table 6), plus the two projections of option B."""
    count = sum(parameter.numel() for parameter in models.cifar_resnet(20).parameters())
    projections = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert count - projections == 269_722


@pytest.mark.parametrize("depth", [0, 2, 3, 18, 21, -4, "20", 20.0, None])
def test_cifar_invalid_depth_raises(depth: int) -> None:
    with pytest.raises(ValueError, match=f"depth must be 6n \\+ 2.*got {depth!r}"):
        models.cifar_resnet(depth)


@pytest.mark.parametrize("plain", [False, True])
def test_cifar_training_reduces_loss(plain: bool) -> None:
    torch.manual_seed(0)
    model = models.cifar_resnet(8, num_classes=3, plain=plain, width=8)
    x, target = torch.randn(12, 3, 16, 16), torch.arange(12) % 3
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert model.eval()(x).shape == (12, 3)


@pytest.mark.parametrize(
    "build", [models.resnet18, functools.partial(models.cifar_resnet, 8)], ids=["resnet18", "cifar"]
)
def test_fuse_runs_projection_blocks_as_one(build) -> None:
    """The block's forward fuses the projection, so that `fuse` must not give it a forward of its own."""
    model = build(num_classes=3)
    hook = model.layer2[0].bn1.register_forward_hook(lambda *_: None)
    fuse(model)
    assert {row.name for row in summarize(model).left} == {"layer2.0"}
    hook.remove()
    assert not summarize(model).left
    with record_fused_calls() as calls:
        model(torch.randn(2, 3, 32, 32))
    blocks = sum(isinstance(module, ResidualBlock) for module in model.modules())
    assert calls == ["residual_block"] * (1 + blocks)  # the stem, and every block with its projection


@pytest.mark.parametrize(
    "build",
    [models.resnet18, models.resnet50, functools.partial(models.cifar_resnet, 20)],
    ids=["resnet18", "resnet50", "cifar20"],
)
def test_plain_network_has_same_layers_without_shortcuts(build) -> None:
    residual, plain = build().double(), build(plain=True).double()
    missing = residual.state_dict().keys() - plain.state_dict().keys()
    assert missing
    assert all(".downsample." in key for key in missing)
    plain.load_state_dict({key: residual.state_dict()[key] for key in plain.state_dict()})

    # A block whose last norm outputs zeros returns its (non-negative) input with a shortcut, and zeros without one.
    for model, expected in ((residual, True), (plain, False)):
        block = copy.deepcopy(model.layer1[-1])
        last = block.bn3 if isinstance(block, Bottleneck) else block.bn2
        nn.init.zeros_(last.weight)
        x = torch.rand(2, block.conv1.in_channels, 6, 6, dtype=torch.float64)
        torch.testing.assert_close(block(x), x if expected else torch.zeros_like(x))


def flops(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_flop_count_of_model_matches_stock() -> None:
    ours, theirs = pair("resnet50", num_classes=5)
    x = torch.randn(1, 3, 64, 64)
    assert flops(lambda: ours(x).sum().backward()) == flops(lambda: theirs(x).sum().backward())


@pytest.mark.parametrize("recompute", ["none", "norm", "conv"])
@pytest.mark.parametrize("input_grad", [False, True])
def test_flop_count_of_opaque_block_operators(recompute: str, input_grad: bool) -> None:
    """The FLOPs of a block's opaque operators under torch.compile include its convolutions and the recomputed ones."""
    spec = BlockSpec((UnitSpec(), UnitSpec(padding=(1, 1)), UnitSpec()), UnitSpec(activation="identity"))
    tensors: list[torch.Tensor | None] = []
    for cin, cout, kernel in ((8, 4, 1), (4, 4, 3), (4, 16, 1), (8, 16, 1)):
        tensors += [torch.randn(cout, cin, kernel, kernel, requires_grad=True), None]
        tensors += [torch.ones(cout, requires_grad=True), torch.zeros(cout, requires_grad=True), None, None]
    x = torch.randn(2, 8, 6, 6, requires_grad=input_grad)

    def step() -> None:
        config = BlockConfig(spec, (True,) * 4, "reference", recompute)
        residual_block.opaque_residual_block(config, x, tensors)[0].sum().backward()

    pixels = 2 * 6 * 6
    first, inner, last, projection = (2 * pixels * n for n in (8 * 4, 4 * 4 * 9, 4 * 16, 8 * 16))
    forward = first + inner + last + projection
    backward = 2 * forward if input_grad else 2 * forward - first - projection
    recomputed = last + projection if recompute == "conv" else 0
    assert flops(step) == forward + backward + recomputed
