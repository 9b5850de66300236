"""Packed inference on live modules: results against float64, currency of the packed weights, and what is refused."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

import fused_res
from fused_res import _extension
from fused_res.backends import registry
from fused_res.nn import folded_layer, packed, snapshot
from fused_res.nn.packed import Block, PackedProgram, Unit
from tests.support.cpu_backends import BACKENDS, FAST_BACKENDS

#: Relative error of a convolution with Winograd in float32; errors of consecutive convolutions add in quadrature.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 4e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
needs_cpu_backend = pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the cpu backend")


def unit(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, relu: bool = True, affine: bool = True, **options: Any
) -> Unit:
    """Return a unit with random weights and statistics, in eval mode and without gradients."""
    options = {"padding": kernel // 2, "bias": False} | options
    conv, norm = nn.Conv2d(inputs, outputs, kernel, stride, **options), nn.BatchNorm2d(outputs, affine=affine)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    if affine:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    activation = "relu" if relu else "identity"
    return Unit(conv.requires_grad_(False), norm.eval().requires_grad_(False), activation)


def stem() -> Block:
    return Block((unit(3, 20, 7, 2),), "none", nn.MaxPool2d(3, 2, 1))


def basic(channels: int = 20) -> Block:
    return Block((unit(channels, channels), unit(channels, channels)), "identity")


def strided(inputs: int = 20, outputs: int = 24) -> Block:
    main = unit(inputs, 9, 1), unit(9, 9, 3, 2), unit(9, outputs, 1)
    return Block(main, unit(inputs, outputs, 1, 2, relu=False))


#: Blocks, number of steps in which the cpu backend runs them in float32, and channels of the input.
CASES: dict[str, tuple[Callable[[], tuple[Block, ...]], int, int]] = {
    "unit": (lambda: (Block((unit(5, 7),)),), 1, 5),
    "unit without relu": (lambda: (Block((unit(5, 7, relu=False),)),), 1, 5),
    "bias, not affine": (lambda: (Block((unit(5, 7, bias=True, affine=False),)),), 1, 5),
    "identity": (lambda: (basic(5),), 1, 5),
    "identity without relu": (lambda: (Block((unit(5, 6), unit(6, 5, relu=False)), "identity"),), 1, 5),
    "projection": (lambda: (strided(),), 1, 20),
    "projection without relu": (lambda: (Block((unit(5, 7, relu=False),), unit(5, 7, 1, relu=False)),), 1, 5),
    "tensor": (lambda: (Block((unit(5, 7),), "tensor"),), 1, 5),
    "tensor without relu, two units": (lambda: (Block((unit(5, 6), unit(6, 7, relu=False)), "tensor"),), 1, 5),
    "tensor and pool": (lambda: (Block((unit(5, 7),), "tensor", nn.MaxPool2d(2)),), 1, 5),
    "stem": (lambda: (stem(),), 1, 3),
    "stem and blocks": (lambda: (stem(), basic(), strided(), basic(24)), 1, 3),
    "pool, pool": (lambda: (Block((unit(3, 8),), "none", nn.MaxPool2d(2, 1)),
                            Block((unit(8, 8),), "none", nn.MaxPool2d((3, 2), (2, 1), (1, 0)))), 1, 3),
    "identity and pool": (lambda: (basic(), Block(basic().units, "identity", nn.MaxPool2d(2)), basic()), 3, 20),
    "tensor between": (lambda: (basic(), Block((unit(20, 20),), "tensor"), basic(), basic()), 3, 20),
    "tensor, then none": (lambda: (Block((unit(5, 7),), "tensor"), Block((unit(7, 7),))), 2, 5),
    "groups": (lambda: (Block((unit(6, 9, groups=3), unit(9, 6)), "identity"),), 1, 6),
    "groups between": (lambda: (basic(), basic(), Block((unit(20, 20, groups=20),)), strided()), 3, 20),
    "dilated, same": (lambda: (Block((unit(5, 5, dilation=2, padding="same"),), "identity"),), 1, 5),
    "valid": (lambda: (Block((unit(5, 6, padding="valid"),)),), 1, 5),
    "rectangular": (lambda: (Block((Unit(*_rectangular(), "relu"),)),), 1, 5),
    "one channel": (lambda: (Block((unit(1, 1, 1), unit(1, 3)), unit(1, 3, 1, relu=False)),), 1, 1),
}  # fmt: skip


def _rectangular() -> tuple[nn.Module, nn.Module]:
    norm = unit(5, 6).norm
    return nn.Conv2d(5, 6, (1, 5), (2, 1), (0, 2)).requires_grad_(False), norm


def make(case: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Block, ...]:
    torch.manual_seed(seed)
    blocks = CASES[case][0]()
    for module in modules(blocks):
        module.to(dtype)
    return blocks


def layer_of(unit: Unit) -> Any:
    """Return the packed weights of a unit that a program has run."""
    return folded_layer._layers[id(unit.conv.__dict__), id(unit.norm.__dict__)]


def modules(blocks: Sequence[Block]) -> list[nn.Module]:
    return [module for block in blocks for one in block.convolutions for module in (one.conv, one.norm)]


def images(channels: int, batch: int = 2, size: int = 19, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(batch * 1000 + size)
    return torch.randn(batch, channels, size, size + 3, generator=generator, dtype=torch.float64).to(dtype)


def reference(x: Tensor, blocks: Sequence[Block], residual: Tensor | None = None) -> Tensor:
    """Return the blocks' output computed in float64."""

    def run(unit: Unit, x: Tensor) -> Tensor:
        conv, norm = copy.deepcopy(unit.conv).double(), copy.deepcopy(unit.norm).double()
        return norm(conv(x))

    x = x.double()
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for block in blocks:
            y = x
            for index, one in enumerate(block.units):
                y = run(one, y)
                if index == len(block.units) - 1:
                    if isinstance(block.shortcut, Unit):
                        y = y + run(block.shortcut, x)
                    elif block.shortcut != "none":
                        added = x if block.shortcut == "identity" else residual
                        assert added is not None
                        y = y + added.double()
                y = y.relu() if one.activation == "relu" else y
            x = y if block.pool is None else block.pool(y)
    return x


def residual_for(x: Tensor, blocks: Sequence[Block]) -> Tensor | None:
    """Return a random residual for the block with the shortcut "tensor", or None if there is no such block."""
    for index, block in enumerate(blocks):
        if block.shortcut == "tensor":
            without = block._replace(shortcut="none", pool=None)
            shape = reference(x, [*blocks[:index], without]).shape
            return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(x.dtype)
    return None


def assert_close(actual: Tensor | None, expected: Tensor, count: int = 1, dtype: torch.dtype | None = None) -> None:
    assert actual is not None and actual.shape == expected.shape and actual.dtype == (dtype or actual.dtype)
    limit = TOLERANCE[actual.dtype] * count**0.5
    assert (actual.double() - expected).norm() <= limit * expected.norm()


def run(x: Tensor, blocks: tuple[Block, ...], *arguments: Any, **options: Any) -> Tensor | None:
    return PackedProgram().run(x, blocks, *arguments, **options)


def check(blocks: tuple[Block, ...], x: Tensor, program: PackedProgram | None = None, backend: str = "auto") -> None:
    """Compare two calls, which prepare and reuse the steps, with float64."""
    residual = residual_for(x, blocks)
    program = PackedProgram() if program is None else program
    with torch.no_grad():
        output, again = (program.run(x, blocks, residual, backend) for _ in range(2))
    assert output is not None and again is not None and torch.equal(output, again)
    assert_close(output, reference(x, blocks, residual), len(modules(blocks)) // 2, x.dtype)


def steps(program: PackedProgram) -> list[str]:
    (sequence,) = program._sequences.values()
    assert sequence.last is not None
    return [type(step).__name__ for step in sequence.last.steps]


class TestResults:
    @pytest.mark.parametrize("backend", FAST_BACKENDS)
    @pytest.mark.parametrize("case", CASES)
    def test_matches_float64(self, case: str, backend: str) -> None:
        blocks, x = make(case), images(CASES[case][2])
        check(blocks, x, backend=backend)
        check(blocks, x.contiguous(memory_format=torch.channels_last), backend=backend)

    @pytest.mark.skipif("triton" not in BACKENDS, reason="needs the Triton interpreter")
    @pytest.mark.parametrize("case", ["projection", "tensor and pool"])
    def test_matches_float64_with_triton(self, case: str, forced_kernels: None) -> None:
        for dtype in (torch.float32, torch.float16):
            check(make(case, dtype), images(CASES[case][2], 1, 6, dtype), backend="triton")

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("case", ["identity", "projection", "tensor", "stem", "groups"])
    def test_dtypes(self, case: str, dtype: torch.dtype) -> None:
        check(make(case, dtype), images(CASES[case][2], dtype=dtype))

    def test_float32_norm_after_a_16_bit_convolution(self) -> None:
        blocks = make("identity", torch.bfloat16)
        for one in blocks[0].units:
            one.norm.float()
        check(blocks, images(5, dtype=torch.bfloat16))

    def test_batches_and_sizes(self) -> None:
        blocks, program = make("stem and blocks"), PackedProgram()
        for batch, size in ((2, 33), (1, 20), (3, 33), (2, 33), (7, 18), (5, 47), (2, 33)):
            check(blocks, images(3, batch, size), program)
        output = program.run(images(3, 0, 33), blocks)
        assert output is not None and output.shape == (0, 24, 5, 5)

    @needs_cpu_backend
    @pytest.mark.parametrize("case", CASES)
    def test_number_of_steps(self, case: str) -> None:
        """Consecutive blocks run as one inference graph; a block that no graph can contain splits it."""
        blocks, x, program = make(case), images(CASES[case][2]), PackedProgram()
        assert program.run(x, blocks, residual_for(x, blocks), "cpu") is not None
        assert len(steps(program)) == CASES[case][1]
        expected = "_BlockStep" if blocks[0].shortcut == "tensor" or case == "groups" else "_GraphStep"
        assert steps(program)[0] == expected

    @needs_cpu_backend
    def test_graph_is_bitwise_equal_to_single_convolutions(self, monkeypatch: pytest.MonkeyPatch) -> None:
        blocks, x, program = make("stem and blocks"), images(3, 3, 40), PackedProgram()
        expected = program.run(x, blocks, backend="cpu")
        y: Any = x
        for block in blocks:
            y = program.run(y, (block,), backend="cpu")
        assert expected is not None and torch.equal(y, expected)
        monkeypatch.setattr(registry.resolve("cpu", x.device), "prepare_inference_graph", None)
        other = PackedProgram()
        single = other.run(x, blocks, backend="cpu")
        assert single is not None and torch.equal(single, expected) and steps(other) == ["_BlockStep"] * len(blocks)

    @pytest.mark.parametrize("backend", FAST_BACKENDS)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_autocast(self, dtype: torch.dtype, backend: str) -> None:
        blocks, x = make("stem and blocks"), images(3, size=40)
        expected, program = reference(x, blocks), PackedProgram()
        with torch.autocast("cpu", dtype):
            for inputs in (x, x.to(dtype)):
                assert_close(program.run(inputs, blocks, backend=backend), expected, 16, dtype)
            with torch.autocast("cpu", enabled=False):
                assert_close(program.run(x, blocks, backend=backend), expected, 8, torch.float32)
            residual = make("tensor")
            x, added = images(5), torch.randn(2, 7, 19, 22)
            output = run(x, residual, added.to(dtype), backend)
            assert_close(output, reference(x, residual, added), 2, dtype)
            assert run(x, residual, added, backend) is None  # stock PyTorch adds in float32

    def test_memory_formats_of_the_residual(self) -> None:
        blocks, x = make("tensor"), images(5)
        residual = residual_for(x, blocks)
        assert residual is not None
        outputs = [
            run(x, blocks, one)
            for one in (residual, residual.contiguous(memory_format=torch.channels_last), residual.mT.contiguous().mT)
        ]
        for output in outputs:
            assert_close(output, reference(x, blocks, residual))

    def test_operands_in_any_memory_format(self) -> None:
        blocks = make("identity")
        for one in blocks[0].units:
            one.conv.weight.data = one.conv.weight.data.mT.contiguous().mT
            one.norm.bias.data = torch.stack((one.norm.bias.data, torch.full((5,), torch.nan)), 1)[:, 0]
        check(blocks, images(5))

    def test_one_convolution_with_two_norms(self) -> None:
        first, second = unit(5, 5), unit(5, 5)
        blocks = (Block((first, Unit(first.conv, second.norm, "identity"))),)
        check(blocks, images(5))

    def test_inference_mode(self) -> None:
        with torch.inference_mode():
            blocks = make("projection")
            x = images(20)
            inside = PackedProgram()
            output = inside.run(x, blocks)
        assert output is not None and torch.equal(inside.run(images(20), blocks), output)  # type: ignore[arg-type]
        blocks[0].units[0].conv.weight = nn.Parameter(torch.zeros(9, 20, 1, 1), False)
        check(blocks, images(20), inside)

    @pytest.mark.parametrize("case", ["stem and blocks", "tensor", "groups between"])
    def test_meta_tensors(self, case: str) -> None:
        """Meta tensors give the output's shape and layout; weights that are materialized later are packed again."""
        blocks, x, program = make(case), images(CASES[case][2], size=40), PackedProgram()
        state = [{name: t.clone() for name, t in module.state_dict().items()} for module in modules(blocks)]
        residual = residual_for(x, blocks)
        with torch.no_grad():
            expected = run(x, blocks, residual)
        for module in modules(blocks):
            module.to("meta")
        output = program.run(x.to("meta"), blocks, None if residual is None else residual.to("meta"))
        assert output is not None and expected is not None and output.is_meta
        assert (output.shape, output.stride(), output.dtype) == (expected.shape, expected.stride(), expected.dtype)
        for module, saved in zip(modules(blocks), state, strict=True):
            module.to_empty(device="cpu").load_state_dict(saved)
        check(blocks, x, program)

    def test_settings(self) -> None:
        blocks, x, program = make("identity"), images(5), PackedProgram()
        with fused_res.backends.use("reference"):
            program.run(x, blocks)
            assert {selection.name for selection in program.selected().values()} == {"reference"}
        check(blocks, x, program)
        with pytest.raises(ValueError, match="backend must be one of"):
            program.run(x, blocks, backend="cudnn")

    @needs_cpu_backend
    def test_selected(self) -> None:
        blocks, x, program = make("groups between"), images(20), PackedProgram()
        assert program.selected() == {}
        program.run(x, blocks, backend="cpu")
        names = {module: selection.name for module, selection in program.selected().items()}
        assert list(names) == [one.conv for block in blocks for one in block.convolutions]
        assert names[blocks[2].units[0].conv] == "onednn" and names[blocks[0].units[0].conv].startswith("winograd")
        with fused_res.backends.use("auto", winograd=False):
            program.run(x, blocks, backend="cpu")
            assert program.selected()[blocks[0].units[0].conv].name == "direct"


def _optimizer_step(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    parameters = [*conv.parameters(), *norm.parameters()]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(parameters, lr=0.1).step()


def _train_norm(norm: nn.BatchNorm2d) -> None:
    norm.train()(torch.randn(4, norm.num_features, 3, 3).to(norm.running_mean))  # type: ignore[arg-type]
    norm.eval()


def _train_fused(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    block = fused_res.nn.ResidualBlock([(conv, norm.train())])
    block(torch.randn(4, conv.in_channels, 6, 6).to(conv.weight))
    norm.eval()


def _doubled(conv: nn.Conv2d) -> dict[str, Tensor]:
    return {name: 2 * tensor for name, tensor in conv.state_dict().items()}


def _set_data(tensor: Tensor, value: Tensor) -> None:
    tensor.data = value


WRITES: dict[str, Callable[[Any, Any], Any]] = {
    "weight in place": lambda conv, norm: conv.weight.mul_(2),
    "element of weight": lambda conv, norm: conv.weight[0, 0, 0, 0].fill_(9),
    "conv bias in place": lambda conv, norm: conv.bias.add_(1),
    "norm weight in place": lambda conv, norm: norm.weight.neg_(),
    "norm bias in place": lambda conv, norm: norm.bias.add_(1),
    "running mean in place": lambda conv, norm: norm.running_mean.add_(1),
    "running variance in place": lambda conv, norm: norm.running_var.mul_(3),
    "foreach": lambda conv, norm: torch._foreach_mul_([conv.weight, norm.bias], 2),
    "optimizer": _optimizer_step,
    "training forward": lambda conv, norm: _train_norm(norm),
    "fused training forward": _train_fused,
    "reset_running_stats": lambda conv, norm: norm.reset_running_stats(),
    "load_state_dict": lambda conv, norm: conv.load_state_dict(_doubled(conv)),
    "load_state_dict with assign": lambda conv, norm: conv.load_state_dict(_doubled(conv), assign=True),
    "new parameter": lambda conv, norm: setattr(conv, "weight", nn.Parameter(conv.weight + 1, False)),
    "new buffer": lambda conv, norm: setattr(norm, "running_mean", norm.running_mean + 1),
    "bias removed": lambda conv, norm: setattr(conv, "bias", None),
    "affine parameters removed": lambda conv, norm: (setattr(norm, "weight", None), setattr(norm, "bias", None)),
    "dictionary replaced": lambda conv, norm: setattr(conv, "_parameters", _doubled(conv)),
    "data replaced": lambda conv, norm: _set_data(conv.weight, conv.weight * 2),
    "data of a buffer replaced": lambda conv, norm: _set_data(norm.running_var, norm.running_var * 2),
    "data replaced by a view of the same memory": lambda conv, norm: _set_data(conv.weight, conv.weight.data.mT),
    "set_": lambda conv, norm: conv.weight.set_(2 * conv.weight),
    "vector_to_parameters": lambda conv, norm: nn.utils.vector_to_parameters(torch.ones_like(norm.bias), [norm.bias]),
    "eps": lambda conv, norm: setattr(norm, "eps", 0.5),
    "padding": lambda conv, norm: setattr(conv, "padding", (0, 0)),
    "stride": lambda conv, norm: setattr(conv, "stride", (2, 1)),
    "dilation": lambda conv, norm: setattr(conv, "dilation", (2, 2)),
}  # fmt: skip
# The memory format of a weight has no influence on the result.
UNCHANGED = {"to channels_last": lambda conv, norm: conv.to(memory_format=torch.channels_last)}


@pytest.fixture(params=["C++", "Python"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare with a snapshot in C++ and in Python."""
    if request.param == "Python":
        monkeypatch.setattr(snapshot, "_is_current", snapshot._is_current_in_python)
    elif not _extension.loaded:
        pytest.skip("needs the C++ extension")


@pytest.mark.usefixtures("implementation")
class TestCurrency:
    def blocks(self, seed: int = 0) -> tuple[Block, ...]:
        torch.manual_seed(seed)
        first, second = unit(5, 5, bias=True), unit(5, 5, bias=True)
        return (Block((first,)), Block((second, unit(5, 5, relu=False))))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)  # one graph; single convolutions
    @pytest.mark.parametrize("name", [*WRITES, *UNCHANGED])
    def test_every_write_is_seen(self, name: str, dtype: torch.dtype) -> None:
        blocks, program = self.blocks(), PackedProgram()
        for module in modules(blocks):
            module.to(dtype)
        inputs = [images(5, batch, dtype=dtype) for batch in (1, 2)]
        other = PackedProgram()
        before = [program.run(x, blocks) for x in inputs]
        other.run(inputs[0], blocks[1:])
        with torch.no_grad():
            (WRITES | UNCHANGED)[name](blocks[1].units[0].conv, blocks[1].units[0].norm)
        for module in modules(blocks):
            module.requires_grad_(False)
        fresh = copy.deepcopy(blocks)
        for x, old in zip(inputs, before, strict=True):
            output, expected = program.run(x, blocks), PackedProgram().run(x, fresh)
            assert output is not None and expected is not None and old is not None
            assert torch.equal(output, expected)
            assert_close(output, reference(x, blocks), 3)
            assert (output.shape == old.shape and torch.equal(output, old)) == (name in UNCHANGED)
        assert_close(other.run(inputs[0], blocks[1:]), reference(inputs[0], blocks[1:]), 2)

    def test_unchanged_weights_are_packed_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        blocks, program, calls = self.blocks(), PackedProgram(), []
        fold = folded_layer.fold

        def record(*arguments: Any) -> Any:
            calls.append(arguments)
            return fold(*arguments)

        monkeypatch.setattr(folded_layer, "fold", record)
        program.run(images(5), blocks)
        assert len(calls) == 2 * 3  # the bias, then the weight
        for _ in range(3):
            program.run(images(5), blocks)
            PackedProgram().run(images(5), blocks[1:])  # programs share the packed weights
        assert len(calls) == 2 * 3
        blocks[0].units[0].conv.weight.mul_(2)
        program.run(images(5), blocks)
        assert len(calls) == 2 * 3 + 2  # only the changed layer

    def test_packed_weights_of_a_changed_weight_are_freed(self) -> None:
        blocks, program = self.blocks(), PackedProgram()
        for batch in (1, 2, 3):
            program.run(images(5, batch), blocks)
        changed, unchanged = (weakref.ref(layer_of(block.units[0])) for block in blocks)
        blocks[0].units[0].conv.weight.mul_(2)
        program.run(images(5), blocks)
        gc.collect()
        assert changed() is None and unchanged() is layer_of(blocks[1].units[0])

    def test_conversion_to_another_dtype_and_back(self) -> None:
        blocks, program = self.blocks(), PackedProgram()
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
            for module in modules(blocks):
                module.to(dtype)
            check(blocks, images(5, dtype=dtype), program)

    def test_functional_call(self) -> None:
        class Model(nn.Module):
            def __init__(self, blocks: tuple[Block, ...]) -> None:
                super().__init__()
                self.children_ = nn.ModuleList(modules(blocks))
                self.program, self.blocks = PackedProgram(), blocks

            def forward(self, x: Tensor) -> Tensor:
                output = self.program.run(x, self.blocks)
                assert output is not None
                return output

        model, x = Model(self.blocks()), images(5)
        before = model(x)
        state = {name: 1.5 * tensor for name, tensor in model.state_dict().items()}
        swapped = torch.func.functional_call(model, state, (x,))
        assert torch.equal(model(x), before) and not torch.equal(swapped, before)
        model.load_state_dict(state)
        assert torch.equal(model(x), swapped)

    def test_replaced_modules(self) -> None:
        blocks, program = self.blocks(), PackedProgram()
        check(blocks, images(5), program)
        for _ in range(5):  # the id of a freed norm may be used again
            one = blocks[0].units[0]._replace(norm=unit(5, 5).norm)
            blocks = (blocks[0]._replace(units=(one,)), blocks[1])
            check(blocks, images(5), program)

    def test_gradients_required_later(self) -> None:
        blocks, program, x = self.blocks(), PackedProgram(), images(5)
        assert program.run(x, blocks) is not None
        for parameter in (blocks[1].units[1].norm.bias, blocks[0].units[0].conv.weight):
            parameter.requires_grad_()
            assert program.run(x, blocks) is None
            with torch.no_grad():
                assert program.run(x, blocks) is not None
            parameter.requires_grad_(False)
            assert program.run(x, blocks) is not None

    def test_modes_of_the_norm(self) -> None:
        blocks, program, x = self.blocks(), PackedProgram(), images(5)
        norm = blocks[1].units[1].norm
        for training in (False, True, False):
            norm.train(training)
            assert (program.run(x, blocks) is None) == training

    def test_settings_of_the_pooling(self) -> None:
        blocks, program = make("stem"), PackedProgram()
        check(blocks, images(3), program)
        blocks[0].pool.kernel_size, blocks[0].pool.padding = 5, 2  # type: ignore[union-attr]
        check(blocks, images(3), program)


TENSOR = torch.zeros(2)


class TestSnapshot:
    @pytest.mark.skipif(not _extension.loaded, reason="needs the C++ extension")
    @pytest.mark.parametrize(
        "arguments",
        [
            (((), ()), ((), (), (), ()), False),
            (((), (), ()), ((), (), (), (), ()), False),
            ((({},), (), ()), ((), (), (), ()), False),
            ((([],), ("a",), (1,)), ((), (), (), ()), False),
            (((), (), ()), ((1,), (1,), (0,), (0,)), False),
            (((), (), ()), ((TENSOR,), (TENSOR,), ("0",), (0,)), False),
            (((), (), ()), ((TENSOR,), (TENSOR,), (0,), ("0",)), False),
            (((), (), ()), ((TENSOR,), (TENSOR,), (1 << 64,), (0,)), False),
            ((1, 2, 3), ((), (), (), ()), False),
        ],
    )
    def test_invalid_arguments_raise(self, arguments: Any) -> None:
        with pytest.raises((ValueError, TypeError, OverflowError), match="expected|integer|too big"):
            _extension.cpp.snapshot_is_current(*arguments)

    @pytest.mark.usefixtures("implementation")
    def test_missing_key(self) -> None:
        state = {"a": torch.zeros(2), "b": None}
        taken = snapshot.Snapshot([(state, ("a", "b"))])
        assert taken.is_current(True)
        del state["b"]
        assert not taken.is_current()

    @pytest.mark.usefixtures("implementation")
    def test_inference_tensors_have_no_version(self) -> None:
        with torch.inference_mode():
            state = {"a": torch.zeros(2)}
        assert snapshot.Snapshot([(state, ("a",))]).is_current()

    @pytest.mark.usefixtures("implementation")
    @pytest.mark.parametrize(
        "other",
        [
            lambda: torch.zeros(2, 3),
            lambda: torch.zeros(2, 3).to_sparse(),
            lambda: torch.zeros(2, 3).to_mkldnn(),
            lambda: torch.zeros(2, 3, device="meta"),
            lambda: torch.zeros(2, 3).as_subclass(Subclass),
        ],
    )
    def test_swapped_tensors(self, other: Callable[[], Tensor]) -> None:
        """Module.to swaps the tensors of parameters if set_swap_module_params_on_conversion is on."""
        state = {"a": torch.zeros(2, 3)}
        taken = snapshot.Snapshot([(state, ("a",))])
        assert taken.is_current()
        torch.utils.swap_tensors(state["a"], other())
        assert not taken.is_current()


class Subclass(Tensor):
    pass


class DispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class ParameterSubclass(nn.Parameter):
    pass


def _replace_weight(blocks: tuple[Block, ...], make_weight: Callable[[Tensor], Any]) -> None:
    conv = blocks[0].units[0].conv
    conv._parameters["weight"] = make_weight(conv.weight.detach())


def _leaked(x: Tensor) -> Tensor:
    """Return `x` in the wrapper of a ``torch.func`` transform that has ended."""
    leaked: list[Tensor] = []
    torch.func.grad(lambda x: (leaked.append(x), x.sum())[1])(x)
    return leaked[0]


def _first(blocks: tuple[Block, ...]) -> tuple[Any, Any]:
    return blocks[0].units[0].conv, blocks[0].units[0].norm


CHANGES: dict[str, Callable[[tuple[Block, ...]], Any]] = {
    "weight requires grad": lambda b: _first(b)[0].weight.requires_grad_(),
    "norm bias requires grad": lambda b: b[0].units[1].norm.bias.requires_grad_(),
    "training norm": lambda b: _first(b)[1].train(),
    "batch statistics": lambda b: _first(b)[1].__dict__["_buffers"].update(running_mean=None, running_var=None),
    "only one statistic": lambda b: setattr(_first(b)[1], "running_mean", None),
    "no batch counter": lambda b: setattr(_first(b)[1], "num_batches_tracked", None),
    "parametrization": lambda b: nn.utils.parametrizations.weight_norm(_first(b)[0]).requires_grad_(False),
    "pruning": lambda b: prune.l1_unstructured(_first(b)[0], "weight", 0.5),
    "weight is None": lambda b: setattr(_first(b)[0], "weight", None),
    "parameter subclass": lambda b: _replace_weight(b, lambda w: ParameterSubclass(w, False)),
    "sparse weight": lambda b: _replace_weight(b, lambda w: w.to_sparse()),
    "weight from a transform": lambda b: _replace_weight(b, _leaked),
    "weight of another dtype": lambda b: _first(b)[0].double(),
    "norm of another dtype": lambda b: _first(b)[1].double(),
    "weight on another device": lambda b: _first(b)[0].to("meta"),
    "norm on another device": lambda b: _first(b)[1].to("meta"),
    "unit on another device": lambda b: [module.to("meta") for module in _first(b)],
    "norm of another size": lambda b: _first(b)[1].__dict__.update(unit(5, 1).norm.__dict__),
    "reflect padding": lambda b: setattr(_first(b)[0], "padding_mode", "reflect"),
    "asymmetric padding": lambda b: _first(b)[0].__dict__.update(unit(5, 5, 2, padding="same").conv.__dict__),
    "mutable stride": lambda b: setattr(_first(b)[0], "stride", [1, 1]),
    "negative eps": lambda b: setattr(_first(b)[1], "eps", -1.0),
}  # fmt: skip


class TestRefused:
    @pytest.mark.parametrize("name", CHANGES)
    @pytest.mark.parametrize("used", [False, True])
    def test_modules(self, name: str, used: bool) -> None:
        torch.manual_seed(0)
        blocks, x, program = (basic(5),), images(5), PackedProgram()
        if used:
            assert program.run(x, blocks) is not None
        CHANGES[name](blocks)
        assert program.run(x, blocks) is None

    @pytest.mark.parametrize(
        "x",
        [
            images(5).requires_grad_(),
            images(5).as_subclass(Subclass),
            images(6),
            images(5, dtype=torch.float64),
            images(5, dtype=torch.bfloat16),
            images(5).int(),
            images(5)[0],
            images(5)[None],
            images(5).to("meta"),
            images(5).to_sparse(),
            images(5, size=0),
            _leaked(images(5)),
        ],
    )
    def test_inputs(self, x: Tensor) -> None:
        assert run(x, (basic(5),)) is None
        assert run(x, (Block((unit(5, 5),)),)) is None

    def test_input_too_small(self) -> None:
        blocks = (Block((unit(5, 5, 5, padding=0),), "none", nn.MaxPool2d(2)),)
        assert run(torch.randn(1, 5, 4, 9), blocks) is None and run(torch.randn(1, 5, 5, 9), blocks) is None
        assert run(torch.randn(1, 5, 6, 9), blocks) is not None

    def test_shortcuts_that_broadcast(self) -> None:
        wide = Block((unit(1, 5),), "identity")  # stock PyTorch adds one channel to five
        assert run(images(1), (wide,)) is None
        shrinking = Block((unit(5, 5, padding=0),), "identity")
        assert run(torch.randn(1, 5, 3, 3), (shrinking,)) is None
        projection = Block((unit(5, 6),), unit(5, 1, 1, relu=False))
        assert run(images(5), (projection,)) is None
        # Stride and padding whose sizes agree for some inputs only.
        sometimes = Block((unit(5, 5, 2, 2, padding=0),), unit(5, 5, 1, 2, relu=False))
        assert run(torch.randn(1, 5, 7, 7), (sometimes,)) is None
        check((sometimes,), torch.randn(1, 5, 8, 8))

    def test_projection_with_relu(self) -> None:
        assert run(images(5), (Block((unit(5, 6),), unit(5, 6, 1)),)) is None

    @pytest.mark.parametrize(
        "residual",
        [
            None,
            torch.randn(2, 7, 1, 1),
            torch.randn(1, 7, 19, 22),
            torch.randn(7, 19, 22),
            torch.randn(2, 7, 19, 22).double(),
            torch.randn(2, 7, 19, 22).as_subclass(Subclass),
            torch.randn(2, 7, 19, 22).requires_grad_(),
            torch.randn(2, 7, 19, 22).to("meta"),
            torch.randn(2, 7, 19, 22).to_sparse(),
            _leaked(torch.randn(2, 7, 19, 22)),
        ],
    )
    def test_residuals(self, residual: Tensor | None) -> None:
        program, blocks = PackedProgram(), make("tensor")
        assert program.run(images(5), blocks, residual) is None
        assert program.run(images(5), blocks, torch.randn(2, 7, 19, 22)) is not None
        assert program.run(images(5), blocks, residual) is None

    def test_residual_without_a_block_that_adds_it(self) -> None:
        assert run(images(5), make("unit"), torch.randn(2, 7, 19, 22)) is None
        two = (Block((unit(5, 5),), "tensor"), Block((unit(5, 5),), "tensor"))
        with pytest.raises(ValueError, match="at most one block"):
            run(images(5), two, torch.randn(2, 5, 19, 22))

    @pytest.mark.parametrize(
        "pool",
        [
            nn.MaxPool2d(3, ceil_mode=True),
            nn.MaxPool2d(3, return_indices=True),
            nn.MaxPool2d(3, dilation=2),
            nn.MaxPool2d([3, 3]),
            nn.MaxPool2d(16),
            nn.AvgPool2d(3),
        ],
    )
    def test_poolings(self, pool: Any) -> None:
        assert run(images(5), (Block((unit(5, 5),), "none", pool),)) is None

    def test_autocast(self) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            assert run(images(5), make("identity")) is None  # stock PyTorch adds in float32
            assert run(images(5, dtype=torch.bfloat16), make("identity")) is not None
            assert run(images(5, dtype=torch.float64), make("unit", torch.float64)) is None
            assert run(images(5, dtype=torch.bfloat16), make("unit", torch.float64)) is None

    def test_contexts(self) -> None:
        program, blocks, x = PackedProgram(), make("identity"), images(5)

        def refused(x: Any) -> Any:
            output = program.run(x, blocks)
            return x + 1 if output is None else x

        assert torch.equal(refused(x), x)
        assert torch.equal(torch.vmap(refused)(x[None]), x[None] + 1)
        assert torch.equal(torch.func.jvp(refused, (x,), (x,))[0], x + 1)
        with torch.autograd.forward_ad.dual_level():
            assert torch.equal(refused(x), x + 1)
        expected = x + 1
        with DispatchMode():
            output = refused(x)
        assert torch.equal(output, expected)
        assert torch.equal(torch.jit.trace(refused, x, check_trace=False)(x), x + 1)
        assert torch.equal(torch.fx.symbolic_trace(refused)(x), x + 1)
        assert torch.equal(torch.compile(refused, backend="eager", fullgraph=True)(x), x + 1)
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
        assert torch.equal(refused(x), x + 1)
        handle.remove()
        assert torch.equal(refused(x), x)


class TestCaches:
    def test_copies_start_empty(self) -> None:
        program, blocks = PackedProgram(), make("identity")
        program.run(images(5), blocks)
        for other in (copy.copy(program), copy.deepcopy(program), pickle.loads(pickle.dumps(program))):
            assert type(other) is PackedProgram and other._sequences == {} and program._sequences

    def test_caches_are_bounded(self) -> None:
        program, blocks = PackedProgram(), make("groups between")
        for size in range(8, 20):
            check(blocks, images(20, size=size), program)
        (sequence,) = program._sequences.values()
        assert len(sequence.prepared) == folded_layer.MAX_CACHE_ENTRIES
        for block in blocks:
            for one in block.convolutions:
                assert len(layer_of(one)._packed) <= folded_layer.MAX_CACHE_ENTRIES

    def test_sequences_are_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(packed, "_MAX_SEQUENCES", 3)
        program = PackedProgram()
        for _ in range(2):
            for seed in range(5):
                check(make("unit", seed=seed), images(5), program)
        assert len(program._sequences) == 3

    @needs_cpu_backend
    def test_unpacked_weights_are_not_cached(self) -> None:
        """Winograd's transformed filter has four times the weight's size; the folded weight is not cached besides."""
        blocks, program = (basic(64), strided(64, 64)), PackedProgram()
        for size in (18, 20):
            program.run(images(64, size=size), blocks, backend="cpu")
        for one in (one for block in blocks for one in block.convolutions):
            (tensor,) = layer_of(one)._packed.values()
            outputs, weight = one.conv.weight.shape[0], one.conv.weight.nbytes
            panels = -(-outputs // 32) * 32 / outputs  # the packed output channels are padded
            winograd = program.selected()[one.conv].name.startswith("winograd")
            assert weight <= tensor.nbytes <= (4 if winograd else 1) * panels * weight

    @pytest.mark.parametrize("cycle", [False, True])
    def test_nothing_outlives_the_model(self, cycle: bool) -> None:
        model = nn.Sequential(*unit(5, 5)[:2])
        program = model.__dict__["program"] = PackedProgram()
        assert program.run(images(5), (Block((Unit(model[0], model[1], "relu"),)),)) is not None
        if cycle:  # references to the model from the state of the layer
            model[0].register_forward_hook(lambda *_, model=model: None)
            model[1].bias.model = model  # type: ignore[union-attr]
        alive = [weakref.ref(model[0]), weakref.ref(layer_of(Unit(model[0], model[1], "relu")))]  # type: ignore[arg-type]
        del model, program
        gc.collect()
        assert [one() for one in alive] == [None, None]

    def test_state_of_the_modules_is_untouched(self) -> None:
        blocks = make("stem and blocks")
        keys = [set(module.__dict__) for module in modules(blocks)]
        state = [copy.deepcopy(module.state_dict()) for module in modules(blocks)]
        PackedProgram().run(images(3, size=40), blocks)
        assert keys == [set(module.__dict__) for module in modules(blocks)]
        for module, before in zip(modules(blocks), state, strict=True):
            assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("writes", [False, True])
def test_concurrent_callers(writes: bool, one_thread: None) -> None:
    """Threads that share one program and its weights, with different shapes, compute the same as a single one."""
    blocks, program = make("stem and blocks"), PackedProgram()
    inputs = [images(3, batch, size) for batch, size in ((1, 20), (3, 33), (2, 18), (5, 25), (1, 40), (2, 21))]
    expected = [PackedProgram().run(x, copy.deepcopy(blocks)) for x in inputs]
    errors: list[Any] = []

    def work(start: int) -> None:
        try:
            for call in range(12):
                index = (start + call) % len(inputs)
                if writes:  # the same values, but every write invalidates what other threads use
                    blocks[1].units[0].conv.weight.data = blocks[1].units[0].conv.weight.data.clone()
                output = program.run(inputs[index], blocks)
                if output is None or not torch.equal(output, expected[index]):  # type: ignore[arg-type]
                    errors.append(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
