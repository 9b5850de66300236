"""conv_bias_act on every backend: accuracy against float64, memory formats, packed weights and argument checks.

The accuracy criterion is an error against float64 of at most twice that of stock PyTorch.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_res
from fused_res import ops
from fused_res.backends import registry
from fused_res.dispatch import PackedWeight, Problem, Selection
from fused_res.functional import conv_bias_act
from fused_res.ops.checks import check_convolution
from fused_res.testing import assert_within_stock_error
from tests.support.cpu_backends import FAST_BACKENDS as BACKENDS
from tests.support.stock_pytorch import CONV_BY_RANK
from tests.support.stock_pytorch import conv_bias_act as stock

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

#: Name -> input shape, output channels, kernel size, and options other than the defaults.
CASES: dict[str, tuple[tuple[int, ...], int, tuple[int, ...], dict[str, Any]]] = {
    "3x3": ((2, 35, 9, 7), 100, (3, 3), {"padding": 1}),
    "1x1": ((3, 100, 5, 6), 35, (1, 1), {}),
    "1x1, stride": ((2, 24, 9, 7), 40, (1, 1), {"stride": 2}),
    "stem": ((1, 3, 33, 31), 16, (7, 7), {"stride": 2, "padding": 3}),
    "ragged": ((2, 5, 11, 8), 7, (3, 2), {"stride": (2, 1), "padding": (0, 1), "dilation": (1, 2)}),
    "dilated, same": ((2, 16, 9, 9), 16, (3, 3), {"padding": "same", "dilation": 2}),
    "valid": ((2, 16, 9, 9), 16, (3, 3), {"padding": "valid"}),
    "groups": ((2, 32, 8, 8), 64, (3, 3), {"padding": 1, "groups": 4}),
    "depthwise": ((2, 12, 8, 8), 12, (3, 3), {"padding": 1, "groups": 12}),
    "one pixel": ((2, 64, 1, 1), 32, (3, 3), {"padding": 1}),
    "one image": ((1, 64, 6, 6), 32, (3, 3), {"padding": 1}),
    "one channel": ((2, 1, 9, 9), 1, (3, 3), {"padding": 1}),
    "sequence": ((2, 10, 40), 12, (5,), {"stride": 2, "padding": 2}),
    "volume": ((2, 6, 5, 7, 6), 9, (3, 3, 3), {"padding": 1, "stride": (1, 2, 1)}),
}


def make_conv_case(case: str, dtype: torch.dtype, mean: float = 1.0) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return input (far from zero), weight, bias and residual in ``dtype``, and the convolution's options."""
    shape, out_channels, kernel, options = CASES[case]
    generator = torch.Generator().manual_seed(sum(shape))

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    weight = randn(out_channels, shape[1] // options.get("groups", 1), *kernel)
    tensors = {
        "input": randn(*shape) + mean,
        "weight": weight / weight[0].numel() ** 0.5,
        "bias": randn(out_channels) * max(mean, 1),
    }
    convolution = CONV_BY_RANK[len(shape)]
    tensors["residual"] = randn(*convolution(tensors["input"], tensors["weight"], **options).shape) + mean
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}, options


def check_conv_bias_act(tensors: dict[str, Tensor], options: dict[str, Any], backend: str) -> Tensor:
    with torch.no_grad():
        ours = conv_bias_act(**tensors, **options, backend=backend)
        theirs = stock(**tensors, **options)
        exact = stock(**{name: tensor.double() for name, tensor in tensors.items()}, **options)
    assert_within_stock_error("output", ours, theirs, exact)
    return ours


def is_channels_last_contiguous(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=CHANNELS_LAST[tensor.dim()])


pytestmark = pytest.mark.usefixtures("forced_kernels")


@pytest.fixture(autouse=True)
def _no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


#: The GPU kernels are 2D. Other convolutions run in ATen, whose output has another layout on a CPU than on a GPU.
ON_BACKENDS = [
    (case, backend) for case in CASES for backend in BACKENDS if backend != "cuda" or len(CASES[case][2]) == 2
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "backend"), ON_BACKENDS)
class TestPrecision:
    @pytest.mark.parametrize("parts", ["", "bias", "residual", "bias residual"])
    def test_optional_operands(self, case: str, parts: str, dtype: torch.dtype, backend: str) -> None:
        tensors, options = make_conv_case(case, dtype)
        operands = {name: t for name, t in tensors.items() if name in ("input", "weight") or name in parts.split()}
        for activation in ("relu", "identity"):
            assert check_conv_bias_act(operands, options | {"activation": activation}, backend).is_contiguous()

    def test_channels_last_and_a_large_mean(self, case: str, dtype: torch.dtype, backend: str) -> None:
        tensors, options = make_conv_case(case, dtype, mean=100.0)
        format = CHANNELS_LAST.get(tensors["input"].dim(), torch.contiguous_format)
        formatted = {name: t.contiguous(memory_format=format) if t.dim() > 1 else t for name, t in tensors.items()}
        output = check_conv_bias_act(formatted, options, backend)
        assert torch.equal(output, check_conv_bias_act(formatted | {"residual": tensors["residual"]}, options, backend))
        assert output.is_contiguous(memory_format=format)


@pytest.mark.parametrize("backend", BACKENDS)
class TestLayout:
    @pytest.mark.parametrize("case", ["3x3", "groups", "volume"])
    @pytest.mark.parametrize("input", [False, True])
    @pytest.mark.parametrize("weight", [False, True])
    @pytest.mark.parametrize("residual", [False, True])
    def test_channels_last_output_if_input_or_weight_is(
        self, case: str, input: bool, weight: bool, residual: bool, backend: str
    ) -> None:
        tensors, options = make_conv_case(case, torch.float32)
        for name, channels_last in (("input", input), ("weight", weight), ("residual", residual)):
            if channels_last:
                tensors[name] = tensors[name].contiguous(memory_format=CHANNELS_LAST[tensors[name].dim()])
        output = check_conv_bias_act(tensors, options, backend)
        assert is_channels_last_contiguous(output) == (input or weight) and output.is_contiguous() != (input or weight)

    def test_one_channel_with_gaps(self, backend: str) -> None:
        """A single channel with stride 1 but gaps between pixels must not be treated as channels_last.

        Stock bfloat16 conv3d computes wrong results for such strides.
        """
        gapped = torch.empty(2, 3, 1, 1, 2, dtype=torch.bfloat16)[..., :1].permute(0, 4, 2, 1, 3)
        x = gapped.copy_(torch.randn(2, 1, 1, 3, 1))
        weight = torch.randn(7, 1, 2, 1, 2).bfloat16()
        y = conv_bias_act(x, weight, padding=(1, 0, 1), backend=backend)
        exact = torch.conv3d(x.double(), weight.double(), padding=(1, 0, 1)).relu()
        torch.testing.assert_close(y.double(), exact, rtol=1e-2, atol=1e-2)

    @pytest.mark.parametrize("channels", [1, 4])
    def test_padded_volume_of_depth_one_with_a_channel_per_group(self, channels: int, backend: str) -> None:
        """The oneDNN of torch 2.11 leaves the output of this bfloat16 convolution uninitialized.

        With AMX that of torch 2.13 does so too, also when PyTorch calls it.
        """
        x, weight = torch.randn(2, channels, 1, 8, 8).bfloat16(), torch.randn(2 * channels, 1, 3, 3, 3).bfloat16()
        y = conv_bias_act(x, weight, padding=1, groups=channels, backend=backend)
        exact = torch.conv3d(x.double(), weight.double(), padding=1, groups=channels).relu()
        stock = torch.conv3d(x, weight, padding=1, groups=channels).relu()
        if torch.cpu._is_amx_tile_supported() and not torch.allclose(stock.double(), exact, rtol=1e-2, atol=1e-2):
            pytest.skip("PyTorch's own convolution is wrong on this processor, and ours calls it")
        torch.testing.assert_close(y.double(), exact, rtol=1e-2, atol=1e-2)

    def test_strided_views(self, backend: str) -> None:
        tensors, options = make_conv_case("3x3", torch.float32)
        for view in (
            tensors["input"][:, :, ::2],
            tensors["input"].transpose(2, 3),
            tensors["input"][:1].expand(4, -1, -1, -1),
        ):
            check_conv_bias_act({"input": view, "weight": tensors["weight"], "bias": tensors["bias"]}, options, backend)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("case", ["3x3", "groups", "volume"])
    def test_strided_bias(self, case: str, dtype: torch.dtype, backend: str) -> None:
        tensors, options = make_conv_case(case, dtype)
        strided = torch.full((2 * len(tensors["bias"]),), float("nan"), dtype=dtype)[::2]
        tensors["bias"] = strided.copy_(tensors["bias"])
        for channels_last in (False, True):
            if channels_last:
                tensors["input"] = tensors["input"].contiguous(memory_format=CHANNELS_LAST[tensors["input"].dim()])
            check_conv_bias_act(tensors, options, backend)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
    def test_empty_batch(self, dtype: torch.dtype, format: torch.memory_format, backend: str) -> None:
        tensors, options = make_conv_case("3x3", dtype)
        tensors |= {name: tensors[name][:0].contiguous(memory_format=format) for name in ("input", "residual")}
        assert check_conv_bias_act(tensors, options, backend).shape == tensors["residual"].shape

    def test_arguments_are_not_written(self, backend: str) -> None:
        for case in ("3x3", "groups", "sequence"):
            for dtype in (torch.float32, torch.float64):
                tensors, options = make_conv_case(case, dtype)
                before = {name: tensor.clone() for name, tensor in tensors.items()}
                check_conv_bias_act(tensors, options, backend)
                assert all(torch.equal(tensors[name], before[name]) for name in tensors)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the cpu backend")
class TestPackedWeights:
    """Packed weights, which a packed program passes to the CPU backend instead of a weight."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("case", [case for case in CASES if case != "sequence"])
    def test_result_is_as_accurate_as_stock(self, case: str, dtype: torch.dtype) -> None:
        tensors, options = make_conv_case(case, dtype)
        input, weight = tensors["input"], tensors["weight"]
        rank = input.dim() - 2

        def pack_weight(selected: Selection, problem: Problem) -> PackedWeight:
            if selected.algorithm.pack is None:
                pytest.skip(f"oneDNN does not support {dtype} on this machine")
            return PackedWeight(selected.algorithm.pack(problem, weight), weight.shape)

        geometry = [options.get(name, default) for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))]
        checked = check_convolution(input, weight, tensors["bias"], None, *geometry, options.get("groups", 1))
        full, kernels = (*checked, options.get("groups", 1)), registry.resolve("cpu", input.device)
        for residual in (None, tensors["residual"]):
            output = registry.dispatch_conv_bias_act(
                kernels, input, weight, tensors["bias"], residual, full, True, "planned", pack_weight
            )
            operands = tensors | {"residual": residual}
            exact = stock(**{name: t if t is None else t.double() for name, t in operands.items()}, **options)
            assert_within_stock_error("output", output, stock(**operands, **options), exact)
            assert is_channels_last_contiguous(output) or rank == 1

    def test_onednn_is_not_selected_when_disabled(self) -> None:
        tensors, options = make_conv_case("3x3", torch.float32)
        with torch.backends.mkldnn.flags(enabled=False):
            for layout in CHANNELS_LAST[4], torch.contiguous_format:
                operands = tensors | {"input": tensors["input"].contiguous(memory_format=layout)}
                arguments = operands["input"], operands["weight"], ((1, 1), (1, 1), (1, 1), 1), "planned", True
                supported = layout is CHANNELS_LAST[4]  # by this library's kernels, which do not need oneDNN
                _, selected = registry.select("cpu", "inference", *arguments)
                assert (selected.name != "aten") == supported and selected.name != "onednn"
                with fused_res.backends.use("auto", winograd=False):
                    check_conv_bias_act(operands, options, "cpu")


class TestOperator:
    @pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the cpu backend")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("channels_last", [False, True])
    @pytest.mark.parametrize("case", ["3x3", "groups", "one image", "sequence", "volume"])
    def test_opcheck(self, case: str, channels_last: bool, dtype: torch.dtype) -> None:
        fused_res.backends.resolve("cpu", torch.device("cpu"))  # defines the operator
        tensors, options = make_conv_case(case, dtype)
        input, rank = tensors["input"], tensors["input"].dim() - 2
        if channels_last and rank > 1:
            input = input.contiguous(memory_format=CHANNELS_LAST[rank + 2])

        def expand(name: str, default: int) -> list[int]:
            value = options.get(name, default)
            return [value] * rank if isinstance(value, int) else list(value)

        geometry = (expand("stride", 1), expand("padding", 0), expand("dilation", 1), options.get("groups", 1))
        for bias, residual in ((tensors["bias"], tensors["residual"]), (None, None)):
            torch.library.opcheck(
                torch.ops.fused_res_cpu.conv_bias_act.default,
                (input, tensors["weight"], bias, residual, *geometry, True),
            )

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_compile(self, backend: str) -> None:
        tensors, options = make_conv_case("3x3", torch.float32)

        def function(input: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
            return conv_bias_act(input, weight, bias, residual, **options, backend=backend)

        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
        for batch in (1, 2):
            part = tensors | {name: tensors[name][:batch] for name in ("input", "residual")}
            expected = function(**part)
            torch.testing.assert_close(compiled(**part), expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_fake_tensors(self, backend: str) -> None:
        with FakeTensorMode():
            output = conv_bias_act(torch.empty(2, 4, 8, 8), torch.empty(6, 4, 3, 3), padding=1, backend=backend)
        assert output.shape == (2, 6, 8, 8)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_vmap(self, backend: str) -> None:
        inputs, weight = torch.randn(3, 2, 4, 6, 6), torch.randn(5, 4, 3, 3)
        outputs = torch.vmap(lambda x: conv_bias_act(x, weight, backend=backend))(inputs)
        for output, x in zip(outputs, inputs, strict=True):
            torch.testing.assert_close(output, stock(x, weight))

    def test_python_operator_bypasses_the_dispatcher_for_plain_tensors(self) -> None:
        calls = []

        def implementation(tensors: list[Tensor], *_: Any) -> None:
            calls.append(type(tensors[0]))

        library = "fused_res_test"
        ops.define(library)
        try:
            call = ops.register_python_operator(library, "update_running_stats", implementation, "CPU")
            one = torch.ones(3)
            call([one], [one], [one], [0.1])
            torch.ops.fused_res_test.update_running_stats([one], [one], [one], [0.1])
            with FakeTensorMode() as mode:
                fake = mode.from_tensor(one)
                call([fake], [fake], [fake], [0.1])
            assert calls == [Tensor, Tensor]  # no call with a fake tensor
        finally:
            del ops.library._libraries[library]


class TestAutocast:
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_casts_like_conv2d(self, backend: str) -> None:
        tensors, options = make_conv_case("3x3", torch.float32)
        half = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        expected = conv_bias_act(**half, **options, backend=backend)
        mixed = tensors | {"weight": half["weight"]}
        with torch.autocast("cpu", torch.bfloat16):
            for operands in (tensors, half, mixed):
                assert torch.equal(conv_bias_act(**operands, **options, backend=backend), expected)
            wide = {name: tensor.double() for name, tensor in tensors.items()}
            assert conv_bias_act(**wide, **options, backend=backend).dtype == torch.float64


def arguments(**changes: Any) -> dict[str, Any]:
    return {"input": torch.ones(2, 4, 6, 6), "weight": torch.ones(8, 4, 3, 3), "bias": torch.ones(8), **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input": [1.0]}, TypeError, "input must be a torch.Tensor, got list"),
        ({"input": torch.ones(2, 4, 6, 6, dtype=torch.int32)}, TypeError, "input's dtype must be one of float32"),
        ({"input": torch.ones(2, 4)}, ValueError, r"input must have 3 to 5 dimensions \(N, C, ...\), got 2"),
        ({"input": torch.ones(2, 4, 6)}, ValueError, "weight must have 3 dimensions like input, got 4"),
        ({"input": torch.ones(2, 3, 6, 6)}, ValueError, r"input must have 4 channels .* groups=1, got 3"),
        (
            {"input": torch.ones(2, 4, 2, 6)},
            ValueError,
            r"input of size \(2, 6\) is too small for a kernel of \(3, 3\)",
        ),
        ({"weight": torch.ones(8, 4, 3, 3).double()}, TypeError, "weight must have input's dtype torch.float32"),
        ({"weight": torch.ones(8, 4, 3, 3, device="meta")}, ValueError, "weight must be on cpu like input, got meta"),
        ({"bias": torch.ones(4)}, ValueError, r"bias must have the shape \(8,\), got \(4,\)"),
        ({"bias": torch.ones(8).bfloat16()}, TypeError, "bias must have input's dtype torch.float32"),
        ({"residual": torch.ones(2, 8, 1, 4)}, ValueError, r"residual must have the shape \(2, 8, 4, 4\), got"),
        ({"residual": torch.ones(2, 8, 4, 4).half()}, TypeError, "residual must have input's dtype torch.float32"),
        ({"stride": 0}, ValueError, "stride must be a positive integer, or a tuple of 2, got 0"),
        ({"stride": (1, 1, 1)}, ValueError, "stride must be"),
        ({"stride": 1.5}, ValueError, "stride must be"),
        ({"dilation": (0, 1)}, ValueError, "dilation must be"),
        ({"padding": -1}, ValueError, "padding must be a non-negative integer"),
        ({"padding": "full"}, ValueError, "padding must be 'same', 'valid' or integers, got 'full'"),
        ({"padding": "same", "stride": 2}, ValueError, "padding='same' must be symmetric"),
        ({"groups": 0}, ValueError, "groups must be a positive integer, got 0"),
        ({"groups": 2}, ValueError, r"input must have 8 channels .* groups=2, got 4"),
        (
            {"weight": torch.ones(6, 1, 3, 3), "groups": 4, "bias": None},
            ValueError,
            "6 output channels, which groups=4",
        ),
        ({"activation": "gelu"}, ValueError, "activation must be one of"),
        ({"backend": "cudnn"}, ValueError, "backend must be one of"),
        ({"weight": None}, TypeError, "weight must be a torch.Tensor, got NoneType"),
        ({"weight": torch.nn.Conv2d(4, 8, 3)}, TypeError, "weight must be a torch.Tensor, got Conv2d"),
        ({"bias": [0.0] * 8}, TypeError, "bias must be a torch.Tensor, got list"),
        ({"residual": 1.0}, TypeError, "residual must be a torch.Tensor, got float"),
        ({"stride": [1, [1]]}, ValueError, "stride must be"),
        ({"groups": [1]}, ValueError, r"groups must be a positive integer, got \[1\]"),
        ({"input": torch.ones(2, 4, 6, 6).to_sparse()}, TypeError, "input must be a strided tensor"),
    ],
)
def test_invalid_arguments_raise(changes: dict[str, Any], error: Any, message: str) -> None:
    for autocast in (False, True):
        # Autocast casts all operands to one dtype, so that a wrong dtype is not an error.
        if not (autocast and "dtype" in message):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast), pytest.raises(error, match=message):
                conv_bias_act(**arguments(**changes))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["input", "weight", "bias", "residual"])
def test_operands_that_require_grad_raise(name: str, backend: str) -> None:
    operands = arguments(residual=torch.ones(2, 8, 4, 4))
    operands[name] = operands[name].requires_grad_()
    with pytest.raises(RuntimeError, match=f"conv_bias_act is for inference, but {name} requires a gradient"):
        conv_bias_act(**operands, backend=backend)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert not conv_bias_act(**operands, backend=backend).requires_grad
