"""Selection of convolution algorithms: heuristics, overrides, the operators that run, and tuning."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

import fused_res
from fused_res import BlockSpec, UnitSpec, dispatch, functional, models
from fused_res.backends import implicit_gemm, registry
from fused_res.backends.reference.convolution import ALGORITHMS as REFERENCE
from fused_res.block import planner
from fused_res.block.plan import BlockConfig
from fused_res.block.planner import plan
from fused_res.dispatch import Machine, Problem, select_training, tuning
from fused_res.functional import residual_block
from tests.support import stock_pytorch as stock
from tests.support.cpu_backends import BACKENDS

POINTWISE = UnitSpec()
SPATIAL = UnitSpec(padding=(1, 1))
BLOCK = BlockSpec((POINTWISE, SPATIAL, POINTWISE), "identity")
needs_cpu = pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the cpu backend")


def problem(spec=POINTWISE, weight=(64, 64, 1, 1), input=(16, 64, 56, 56), dtype=torch.bfloat16, **other):
    machine = {"channels_last": True, "device": "cpu", "machine": Machine("avx2", (torch.float32,))} | other
    return Problem("forward", input, weight, *spec.geometry, dtype, **machine)


def names(algorithms, preference="planned", **changes):
    made = select_training(algorithms, problem(**changes), preference)
    return made.forward.name, made.input_gradient.name, made.weight_gradient.name, made.forward.reason


HOPPER = {"device": "cuda", "machine": Machine("sm_90")}


@pytest.mark.parametrize(
    ("changes", "forward", "backward", "reason"),
    [
        ({}, "implicit_gemm", "implicit_gemm", "1x1"),
        ({"dtype": torch.float16}, "implicit_gemm", "implicit_gemm", "1x1"),
        ({"dtype": torch.float32}, "aten", "aten", "in float32, cuDNN is faster"),
        ({"dtype": torch.float32, "preference": "fused"}, "implicit_gemm", "implicit_gemm", "1x1"),
        ({"dtype": torch.float64, "preference": "fused"}, "aten", "aten", "do not support float64"),
        ({"spec": SPATIAL, "weight": (64, 64, 3, 3)}, "aten", "aten", "cuDNN"),
        ({"spec": SPATIAL, "weight": (64, 64, 3, 3), "preference": "fused"}, "implicit_gemm", "aten", ""),
        ({"spec": UnitSpec((2, 2))}, "aten", "aten", "cuDNN"),
        ({"spec": UnitSpec((2, 2)), "projection": True}, "implicit_gemm", "implicit_gemm", "1x1"),
        ({"spec": UnitSpec(groups=2), "preference": "fused"}, "aten", "aten", "grouped"),
        ({"weight": (64, 12, 1, 1)}, "aten", "aten", "channels"),
        ({"weight": (100, 64, 1, 1)}, "aten", "aten", "channels"),
        ({"weight": (1024, 256, 1, 1)}, "aten", "aten", "FLOP per byte"),
        ({"weight": (1024, 256, 1, 1), "preference": "fused"}, "implicit_gemm", "implicit_gemm", "1x1"),
        ({"weight": (1, 64, 1, 1), "preference": "fused"}, "aten", "aten", "single channel"),
        ({"channels_last": False, "preference": "fused"}, "aten", "aten", "channels_last"),
        ({"preference": "aten"}, "aten", "aten", "FUSED_RES_CONVOLUTION"),
        ({"list": "reference"}, "aten", "aten", "nothing to gain"),
        ({"list": "reference", "preference": "fused"}, "reference", "reference", "plain PyTorch"),
    ],
    ids=str,
)
def test_gpu_and_reference_selection(changes, forward, backward, reason):
    algorithms = REFERENCE if "list" in changes else implicit_gemm.algorithms("triton")
    made = names(algorithms, **HOPPER | {name: value for name, value in changes.items() if name != "list"})
    assert made[:3] == (forward, backward, backward)
    assert reason in made[3]


#: A bottleneck's reducing and expanding 1x1 weight in each layer of ResNet-50, and its arithmetic intensity.
LAYERS = [((planes, 4 * planes, 1, 1), (4 * planes, planes, 1, 1)) for planes in (64, 128, 256, 512)]


@pytest.mark.parametrize(
    ("backend", "machine", "training", "reducing", "expanding"),
    [
        ("cuda", "sm_90", 1, 2, 3),
        ("triton", "sm_90", 2, 2, 3),
        ("cuda", "sm_80", 1, 2, 3),
        ("triton", "sm_100", 2, 3, 4),
        ("cuda", "sm_100", 0, 1, 2),
        ("cuda", "", 0, 1, 2),
    ],
)
def test_fused_layers_of_resnet50(backend, machine, training, reducing, expanding):
    """The number of layers, from the first, whose 1x1 convolutions are fused: in training, and in inference."""

    def fused_layers(operation, index, residual=False):
        selected = [
            dispatch.select(
                implicit_gemm.algorithms(backend),
                problem(weight=layer[index], machine=Machine(machine), device="cuda")._replace(
                    operation=operation, residual=residual
                ),
                "planned",
            ).name
            for layer in LAYERS
        ]
        fused = [name == "implicit_gemm" for name in selected]
        assert fused == sorted(fused, reverse=True)
        return sum(fused)

    for operation, index in ((operation, index) for operation in dispatch.TRAINING_OPERATIONS for index in (0, 1)):
        assert fused_layers(operation, index) == training
    assert fused_layers("inference", 0) == reducing
    assert fused_layers("inference", 1, residual=True) == expanding


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "aten_epilogue"), (torch.float16, "aten")], ids=str)
def test_epilogue_of_convolutions_in_cudnn(dtype, name):
    spatial = problem(SPATIAL, (64, 64, 3, 3), dtype=dtype, **HOPPER)._replace(operation="inference")
    assert dispatch.select(implicit_gemm.algorithms("triton"), spatial, "planned").name == name


@pytest.mark.skipif("cuda" not in BACKENDS, reason="needs the CUDA C++ backend")
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("parts", ["", "bias", "residual", "bias residual relu", "relu"])
def test_epilogue_pass_after_aten_matches_float64(parts, channels_last):
    torch.manual_seed(0)
    format = torch.channels_last if channels_last else torch.contiguous_format
    x, weight = torch.randn(2, 12, 7, 6).to(memory_format=format), torch.randn(10, 6, 3, 3)
    bias = torch.randn(10) if "bias" in parts else None
    residual = torch.randn(2, 10, 4, 3) if "residual" in parts else None
    kernels = registry.resolve("cuda", torch.device("cpu"))
    geometry, relu = ((2, 2), (1, 1), (1, 1), 2), "relu" in parts
    y = kernels.aten_conv_with_epilogue(x, weight, bias, residual, *geometry, relu)
    wide = [None if t is None else t.double() for t in (x, weight, bias, residual)]
    options = dict(zip(("stride", "padding", "dilation", "groups"), geometry, strict=True))
    exact = stock.conv_bias_act(*wide, "relu" if relu else "identity", **options)
    assert y.is_contiguous(memory_format=format) and (y - exact).norm() <= 1e-6 * exact.norm()


def forget_plans():
    planner.cached_plan.cache_clear(), planner._cached_check_and_plan.cache_clear(), planner._recent_plans.clear()


@pytest.mark.parametrize("channels_last", [True, False])
def test_compact_input_gradient_of_a_projection_matches_aten(monkeypatch, channels_last):
    """The gradient is computed for the strided positions only, and the block adds it there."""
    from fused_res.dispatch import convolution

    spec = BlockSpec((UnitSpec((2, 2), (1, 1)),), UnitSpec((2, 2), activation="identity"))
    gradients = []
    for rules in ((), convolution.ATEN_COMPACT.rules):
        algorithms = (dataclasses.replace(convolution.ATEN_COMPACT, rules=rules), convolution.ATEN)
        monkeypatch.setattr(registry.resolve("reference", torch.device("cpu")), "algorithms", algorithms)
        forget_plans()
        torch.manual_seed(0)
        x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
        x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        tensors = []
        for weight in (torch.randn(6, 4, 3, 3), torch.randn(6, 4, 1, 1)):
            tensors += [weight.double().requires_grad_(), None, None, None, None, None]
        y = residual_block(x.requires_grad_(), spec, tensors, training=True, backend="reference")
        selected = functional.last_plan[tensors[0]].projection.algorithms.input_gradient.name
        assert selected == ("aten" if rules else "aten_compact")
        y.square().sum().backward()
        gradients.append([x.grad, *(t.grad for t in tensors if t is not None)])
    forget_plans()
    for compact, dense in zip(*gradients, strict=True):
        torch.testing.assert_close(compact, dense)


@pytest.mark.parametrize(("backend", "fused", "added"), [("cuda", 1, 3), ("triton", 2, 3)])
def test_layers_of_resnet50_whose_input_gradient_adds_the_shortcut_gradient(backend, fused, added):
    """The first layers are fused with their norms; the next add in the epilogue; only the input gradient is changed."""
    algorithms = implicit_gemm.algorithms(backend)

    def selected(preference="planned", **changes):
        return [
            tuple(
                one.name
                for one in select_training(algorithms, problem(weight=layer[0], **HOPPER | changes), preference)
            )
            for layer in LAYERS
        ]

    chain, gemm = ("aten",) * 3, ("implicit_gemm",) * 3
    adding = ("aten", "implicit_gemm_add", "aten")
    assert selected(residual=True) == [gemm] * fused + [adding] * (added - fused) + [chain] * (4 - added)
    assert selected() == [gemm] * fused + [chain] * (4 - fused)
    assert selected("aten", residual=True) == [chain] * 4
    assert selected("fused", residual=True) == [gemm] * 4
    for change in (
        {"dtype": torch.float32}, {"dtype": torch.float64}, {"channels_last": False}, {"spec": UnitSpec((2, 2))},
        {"spec": UnitSpec(groups=2)}, {"spec": UnitSpec(padding=(1, 1))},
    ):  # fmt: skip
        assert selected(residual=True, **change) == [chain] * 4
    assert not select_training(
        algorithms, problem(weight=LAYERS[2][0], residual=True, **HOPPER), "planned"
    ).fused_backward


def test_float16_inference_runs_the_epilogue_of_cudnn():
    half = problem(dtype=torch.float16, **HOPPER)._replace(operation="inference")
    assert dispatch.select(implicit_gemm.algorithms("triton"), half, "planned").name == "aten"


WINOGRAD = {"spec": SPATIAL, "weight": (64, 64, 3, 3)}


@needs_cpu
@pytest.mark.parametrize(
    ("changes", "algorithms", "reason"),
    [
        (WINOGRAD, ("winograd_f4x4",) * 3, "multiply-adds"),
        (WINOGRAD | {"allow_winograd": False}, ("aten", "aten", "direct"), "direct is no faster"),
        (WINOGRAD | {"input": (1, 64, 2, 2)}, ("aten",) * 3, "few output pixels"),
        (WINOGRAD | {"input": (1, 64, 2, 2), "weight_channels_last": True}, ("im2col_gemm",) * 3, "few output pixels"),
        (WINOGRAD | {"input": (2, 64, 1, 1), "weight_channels_last": True}, ("tap_gemm",) * 3, "one output pixel"),
        (WINOGRAD | {"spec": UnitSpec((2, 2), (1, 1))}, ("winograd_f4x4", "direct", "winograd_f4x4"), "multiply-adds"),
        (WINOGRAD | {"spec": UnitSpec(padding=(3, 3))}, ("winograd_f4x4", "aten", "winograd_f4x4"), "multiply-adds"),
        (WINOGRAD | {"weight": (8, 8, 3, 3), "input": (16, 8, 56, 56)}, ("aten",) * 3, "direct is no faster"),
        ({}, ("fused_fp32",) * 3, "with the adjacent norms"),
        ({"relu_norms": False}, ("direct",) * 3, "1x1: one GEMM"),
        ({"weight": (64, 256, 1, 1), "input": (16, 256, 56, 56)}, ("fused_fp32",) * 3, "with the adjacent norms"),
        ({"weight": (256, 1024, 1, 1), "input": (16, 1024, 14, 14)},
         ("fused_fp32", "fused_input_fp32", "fused_input_fp32"), "with the adjacent norms"),
        ({"weight": (512, 2048, 1, 1), "input": (16, 2048, 7, 7)}, ("direct",) * 3, "1x1"),
        ({"weight": (8, 64, 1, 1)}, ("aten", "aten", "direct"), "direct is no faster"),
        ({"spec": UnitSpec((2, 2))}, ("direct",) * 3, "1x1, stride 2"),
        ({"spec": UnitSpec(padding=(1, 1)), "input": (64, 64, 56, 56)}, ("direct", "aten", "direct"), "1x1"),
        ({"spec": UnitSpec((2, 2), (3, 3)), "weight": (64, 3, 7, 7), "input": (16, 3, 224, 224)},
         ("direct", "aten", "aten"), "7x7, stride 2"),
        (WINOGRAD | {"spec": UnitSpec(padding=(1, 1), groups=2), "weight": (64, 32, 3, 3)}, ("aten",) * 3, "grouped"),
        ({"dtype": torch.bfloat16}, ("aten",) * 3, "float32"),
        ({"channels_last": False}, ("aten",) * 3, "channels_last"),
        ({"under_torch_dispatch": True}, ("aten",) * 3, "requires ATen's operators"),
        ({"machine": Machine("baseline")}, ("aten",) * 3, "AVX2"),
        (WINOGRAD | {"preference": "fused"}, ("winograd_f4x4",) * 3, "multiply-adds"),
        (WINOGRAD | {"preference": "aten"}, ("aten",) * 3, "backends.use"),
    ],
    ids=str,
)  # fmt: skip
def test_cpu_training_selection(changes, algorithms, reason):
    from fused_res.backends.cpu.convolution import ALGORITHMS

    made = names(ALGORITHMS, **({"dtype": torch.float32} | changes))
    assert made[:3] == algorithms
    assert reason in made[3]


@needs_cpu
def test_cpu_inference_selection():
    from fused_res.backends.cpu.convolution import ALGORITHMS

    def name(input, weight=None, padding=(1, 1), groups=1, stride=(1, 1), dilation=(1, 1), **changes):
        weight = weight or (input[1], input[1], 3, 3)
        geometry = UnitSpec(stride, padding, dilation, groups)
        made = problem(geometry, weight, input, **({"dtype": torch.float32, "prepacked": True} | changes))
        return dispatch.select(ALGORITHMS, made._replace(operation="inference"), "planned").name

    assert name((16, 64, 56, 56)) == name((16, 512, 7, 7)) == "winograd_f4x4"
    assert name((1, 512, 7, 7)) == "winograd_f2x2"
    assert name((16, 3, 32, 32), (16, 3, 3, 3)) == name((1, 512, 1, 1)) == "direct"
    assert name((16, 64, 56, 56), stride=(2, 2)) == "winograd_f4x4"
    assert name((1, 256, 14, 14), (512, 256, 3, 3), stride=(2, 2)) == "direct"
    assert name((16, 64, 56, 56), stride=(2, 1)) == name((16, 64, 56, 56), dilation=(2, 2)) == "direct"
    assert name((16, 64, 56, 56), (64, 32, 3, 3), groups=2) == "onednn"
    # Without a cached packed weight, one call has to amortize the packing.
    assert name((1, 256, 14, 14), prepacked=False) == "direct"
    assert name((16, 64, 56, 56), prepacked=False) == "winograd_f4x4"
    assert name((16, 64, 56, 56), channels_last=False) == "onednn"
    assert name((1, 64, 56, 56), channels_last=False, prepacked=False) == "aten"
    assert name((16, 64, 56, 56), machine=Machine("baseline", (torch.float32,))) == "onednn"
    assert name((16, 64, 56, 56), machine=Machine("baseline")) == "aten"
    assert name((16, 64, 56, 56), allow_winograd=False) == "direct"


def block_tensors(dtype=torch.float64):
    tensors = []
    for shape in ((4, 8, 1, 1), (4, 4, 3, 3), (8, 4, 1, 1)):
        channels = shape[0]
        norm = [torch.ones(channels), torch.zeros(channels), torch.zeros(channels), torch.ones(channels)]
        tensors += [torch.randn(shape), None, *norm]
    return [None if t is None else t.to(dtype) for t in tensors]


def test_override_is_undone_when_its_context_exits():
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last)

    def algorithms():
        preference = registry.conv_preference()
        made = plan(BlockConfig(BLOCK, (True,) * 3, "reference", preference=preference), x, block_tensors())
        return [(unit.algorithms.forward.name, unit.algorithms.weight_gradient.name) for unit in made.units]

    assert algorithms() == [("aten", "aten")] * 3
    with fused_res.backends.use("reference", convolution="fused"):
        assert algorithms() == [("reference", "reference"), ("reference", "aten"), ("reference", "reference")]
    assert algorithms() == [("aten", "aten")] * 3
    with pytest.raises(ValueError, match="convolution must be one of"):
        fused_res.backends.use("auto", convolution="cudnn")


# --- operators that run --------------------------------------------------------------------------------------

#: The profiler event of each algorithm's forward.
PROFILER_EVENTS = {
    "winograd_f4x4": "fused_res_cpu::convolve",
    "winograd_f2x2": "fused_res_cpu::convolve",
    "direct": "fused_res_cpu::convolve",
    "fused_fp32": "fused_res_cpu::convolve",
    "fused_input_fp32": "fused_res_cpu::convolve",
    "onednn": "mkldnn::_convolution_pointwise",
    "aten": "aten::convolution",
    "tap_gemm": "aten::mm",
    "im2col_gemm": "aten::mm",
}


def profile_event_counts(call) -> dict[str, int]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return {event.key: event.count for event in profile.key_averages()}


def expected_event_counts(selected: list[str]) -> dict[str, int]:
    return {key: sum(PROFILER_EVENTS[name] == key for name in selected) for key in set(PROFILER_EVENTS.values())}


@needs_cpu
@pytest.mark.parametrize("size", [32, 96])  # the last stage has feature maps of one pixel, and of several
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_reported_algorithms_are_the_ones_that_run(name, size):
    """Compare profiler events with the plan and `summarize` in training, and with `summarize` in inference."""
    torch.manual_seed(0)
    model = getattr(models, name)(num_classes=10).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, size, size).contiguous(memory_format=torch.channels_last)
    events = profile_event_counts(lambda: model(x))
    plans = [functional.last_plan[weight] for weight in model.parameters() if weight in functional.last_plan]
    units = [unit for one in plans for unit in one.all_units]
    assert len(units) == sum(isinstance(module, torch.nn.Conv2d) for module in model.modules())
    expected = expected_event_counts([unit.algorithms.forward.name for unit in units])
    expected["aten::mm"] = sum(_mm_calls(unit) for unit in units)
    assert {key: events.get(key, 0) for key in expected} == expected
    assert any(unit.algorithms.forward.name.endswith("_gemm") for unit in units)
    summary = fused_res.summarize(model)
    text = str(summary)
    for unit in units:
        assert str(unit.algorithms) in text
    assert [*summary.plans.values()] == plans and all(str(one) in summary.steps for one in plans)

    backward = profile_event_counts(lambda: model(x).sum().backward())
    gradients = [(unit.algorithms.input_gradient.name, unit.algorithms.weight_gradient.name) for unit in units]
    required = [pair if unit.needs_input_grad else pair[1:] for unit, pair in zip(units, gradients, strict=True)]
    native = [name for pair in required for name in set(pair) if PROFILER_EVENTS[name] == "fused_res_cpu::convolve"]
    assert backward.get("fused_res_cpu::conv_backward", 0) == len(native)
    aten = [pair for pair in required if "aten" in pair]
    assert backward.get("aten::convolution_backward", 0) == len(aten)

    frozen = fused_res.freeze(model.eval())
    with torch.inference_mode():
        frozen(x)
        events = profile_event_counts(lambda: frozen(x))
    ran = [selection.name for selection in frozen._fused_res.packed.selected().values()]
    assert len(ran) == len(units) + 1  # the classifier
    assert set(ran) <= {"winograd_f4x4", "winograd_f2x2", "direct"}
    assert events["fused_res_cpu::conv_program"] > 0 and "aten::convolution" not in events
    assert all(name in str(fused_res.summarize(frozen)) for name in ran)


def _mm_calls(unit) -> int:
    """Return the number of `aten::mm` calls of a forward; further taps of `tap_gemm` are `aten::addmm_` calls."""
    return unit.algorithms.forward.name in ("tap_gemm", "im2col_gemm")


@needs_cpu
@torch.no_grad()
def test_preference_aten_runs_aten_convolutions_only():
    model = models.resnet18(num_classes=10).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with fused_res.backends.use("auto", convolution="aten"):
        for network in (model, fused_res.freeze(model.eval())):
            events = profile_event_counts(lambda: network(x))
            assert events["aten::convolution"] == 20
            others = [key for key in events if re.search("fused_res_cpu::conv|_pointwise$|aten::mm$", key)]
            assert not others


# --- tuning --------------------------------------------------------------------------------------------------


class TestTuning:
    @pytest.fixture(autouse=True)
    def empty_cache(self, monkeypatch):
        monkeypatch.setattr(tuning, "_training_cache", {})
        monkeypatch.setattr(tuning, "_MIN_RUN_TIME", 0.0)

    def run(self, backend="reference", **options):
        x = torch.randn(2, 8, 5, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
        return residual_block(x, BLOCK, block_tensors(), training=True, backend=backend, **options)

    def test_each_convolution_is_timed_once(self, monkeypatch):
        self.run(tune=True)
        made = dict(tuning._training_cache)
        assert len(made) == 3
        assert all(one.reason.startswith("measured: ") for algorithms in made.values() for one in algorithms)
        monkeypatch.setattr(tuning, "_measure", None)
        self.run(tune=True)
        assert tuning._training_cache == made

    def test_fastest_algorithm_is_selected(self, monkeypatch):
        seconds = {"aten": 2.0, "reference": 1.0, "apply": 0.1}

        def fake_median_time(function, device):
            if function.__name__ == "activation":
                return seconds["apply"]
            return seconds.get(function.algorithm, 9.0)

        original = tuning._TimedCalls.call_for

        def call_for(self, operation, algorithm):
            function = original(self, operation, algorithm)
            function.algorithm = algorithm.name
            return function

        monkeypatch.setattr(tuning._TimedCalls, "call_for", call_for)
        monkeypatch.setattr(tuning, "_median_time", fake_median_time)
        self.run(tune=True)
        chosen = [tuple(one.name for one in algorithms) for algorithms in tuning._training_cache.values()]
        assert chosen[0] == chosen[2] == ("reference",) * 3 and chosen[1] == ("reference", "aten", "aten")
        tuning._training_cache.clear()
        seconds["reference"] = 3.0
        self.run(tune=True)
        assert all(one.name == "aten" for algorithms in tuning._training_cache.values() for one in algorithms)

    @pytest.mark.skipif("triton" not in BACKENDS, reason="needs the triton backend")
    def test_addition_of_the_shortcut_gradient_is_timed(self):
        kernels = registry.resolve("triton", torch.device("cpu"))
        shapes = {"weight": (16, 32, 1, 1), "input": (1, 32, 2, 2), "dtype": torch.float16}
        for residual in (False, True):
            made = tuning.tuned_training_algorithms(
                kernels, problem(residual=residual, **shapes), False, True, torch.device("cpu")
            )
            timed = [set(re.findall(r"([a-z_]+) [0-9]+ us", one.reason)) for one in made]
            assert timed[0] == timed[2] == {"implicit_gemm", "aten"}
            assert timed[1] - timed[0] == ({"implicit_gemm_add"} if residual else set())

    @needs_cpu
    def test_tuned_cpu_block_is_accurate(self):
        torch.manual_seed(0)
        x = torch.randn(2, 64, 14, 14).contiguous(memory_format=torch.channels_last)
        norm = [torch.ones(64), torch.zeros(64), torch.zeros(64), torch.ones(64)]
        tensors = [torch.randn(64, 64, 3, 3) / 24, None, *norm]
        spec = BlockSpec((SPATIAL,), "identity")
        found = residual_block(x, spec, [t if t is None else t.clone() for t in tensors], training=True, tune=True)
        (made,) = tuning._training_cache.values()
        assert {"winograd_f4x4", "direct", "aten"} <= set(re.findall(r"([a-z_0-9]+) [0-9]+ us", made.forward.reason))
        wide = [t if t is None else t.double() for t in tensors]
        exact = residual_block(x.double(), spec, wide, training=True, backend="reference")
        assert (found - exact).norm() <= 1e-5 * exact.norm()

    def test_nothing_is_timed_without_request_or_under_deterministic_algorithms(self, monkeypatch):
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
        self.run()
        with fused_res.backends.use("reference", convolution="aten"):
            self.run(tune=True)
        torch.use_deterministic_algorithms(True)
        try:
            self.run(tune=True)
        finally:
            torch.use_deterministic_algorithms(False)
        assert not tuning._training_cache

    def test_invalid_tensors_raise_before_timing(self):
        x = torch.randn(2, 6, 5, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
        with pytest.raises(ValueError, match=r"0\.weight"):
            residual_block(x, BLOCK, block_tensors(), training=True, backend="reference", tune=True)
        assert not tuning._training_cache


# --- "auto" on a GPU ------------------------------------------------------------------------------------------


def auto_name(monkeypatch, available):
    monkeypatch.setattr(registry, "unavailable", lambda name: None if name in available else "not here")
    monkeypatch.setattr(registry, "_resolve_cache", {})
    return registry.resolve("auto", torch.device("cuda")).name


@pytest.mark.skipif(not {"cuda", "triton"} <= {*BACKENDS}, reason="needs both GPU backends")
def test_auto_takes_norms_from_cuda_and_convolutions_from_triton(monkeypatch):
    assert auto_name(monkeypatch, ("triton", "cuda")) == "cuda+triton"
    assert auto_name(monkeypatch, ("triton",)) == "triton"
    assert auto_name(monkeypatch, ("cuda",)) == "cuda"
    assert auto_name(monkeypatch, ()) == "reference"


@pytest.mark.skipif(not {"cuda", "triton"} <= {*BACKENDS}, reason="needs both GPU backends")
def test_block_on_kernels_of_two_backends_matches_float64():
    kernels = registry.resolve("cuda+triton", torch.device("cpu"))
    cuda, triton = (registry.resolve(name, torch.device("cpu")) for name in ("cuda", "triton"))
    assert kernels.conv_bn_stats is triton.conv_bn_stats and kernels.algorithms is triton.algorithms
    assert kernels.batch_norm_sums is cuda.batch_norm_sums and cuda.conv_bn_stats is not triton.conv_bn_stats
    torch.manual_seed(0)
    x = torch.randn(2, 8, 5, 5).contiguous(memory_format=torch.channels_last)
    results = []
    for backend, dtype in (("cuda+triton", torch.float32), ("reference", torch.float64)):
        torch.manual_seed(1)
        tensors = [t if t is None else t.to(dtype).requires_grad_(t.dim() == 4) for t in block_tensors()]
        with fused_res.backends.use("auto", convolution="fused"):
            y = residual_block(x.to(dtype), BLOCK, tensors, training=True, backend=backend)
            y.square().sum().backward()
        results.append([y, *(t.grad for t in tensors if t is not None and t.requires_grad)])
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm()


# --- independence of the backends -----------------------------------------------------------------------------


def test_no_backend_name_is_compared_outside_backends():
    """Outside of `backends/` the name of a backend is passed through only; no line of code compares it."""
    package = Path(fused_res.__file__).parent
    for path in package.rglob("*.py"):
        if "backends" not in path.relative_to(package).parts:
            compared = re.findall(r"(?:kernels\.name|backend\w*) (?:==|!=|in) .*", path.read_text())
            assert not [line for line in compared if re.search("triton|cuda|cpu|reference", line)], path
