"""Which algorithm computes a convolution: the lists, the override, what really runs, the measurement."""

import re
from pathlib import Path

import pytest
import torch

import fused_res
from fused_res import BlockSpec, UnitSpec, dispatch, functional, models
from fused_res.backends import registry
from fused_res.backends.implicit_gemm import ALGORITHMS as GPU
from fused_res.backends.reference.convolution import ALGORITHMS as REFERENCE
from fused_res.block.plan import BlockConfig
from fused_res.block.planner import plan
from fused_res.dispatch import Machine, Problem, select_training, tuning
from fused_res.functional import residual_block
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


@pytest.mark.parametrize(
    ("changes", "forward", "backward", "reason"),
    [
        ({}, "implicit_gemm", "implicit_gemm", "1x1"),
        ({"dtype": torch.float16}, "implicit_gemm", "implicit_gemm", "1x1"),
        ({"dtype": torch.float32}, "aten", "aten", "float32 gains less"),
        ({"dtype": torch.float32, "preference": "fused"}, "implicit_gemm", "implicit_gemm", "1x1"),
        ({"dtype": torch.float64, "preference": "fused"}, "aten", "aten", "float64 has no"),
        ({"spec": SPATIAL, "weight": (64, 64, 3, 3)}, "aten", "aten", "cuDNN"),
        ({"spec": SPATIAL, "weight": (64, 64, 3, 3), "preference": "fused"}, "implicit_gemm", "aten", ""),
        ({"spec": UnitSpec((2, 2))}, "aten", "aten", "cuDNN"),
        ({"spec": UnitSpec((2, 2)), "projection": True}, "implicit_gemm", "implicit_gemm", "1x1"),
        ({"spec": UnitSpec(groups=2), "preference": "fused"}, "aten", "aten", "grouped"),
        ({"weight": (64, 12, 1, 1)}, "aten", "aten", "channels"),
        ({"weight": (100, 64, 1, 1)}, "aten", "aten", "channels"),
        ({"weight": (1, 64, 1, 1), "preference": "fused"}, "aten", "aten", "single channel"),
        ({"channels_last": False, "preference": "fused"}, "aten", "aten", "channels_last"),
        ({"preference": "aten"}, "aten", "aten", "FUSED_RES_CONVOLUTION"),
        ({"list": "reference"}, "aten", "aten", "nothing to gain"),
        ({"list": "reference", "preference": "fused"}, "reference", "reference", "plain PyTorch"),
    ],
    ids=str,
)
def test_gpu_and_reference(changes, forward, backward, reason):
    algorithms = REFERENCE if "list" in changes else GPU
    made = names(algorithms, **{name: value for name, value in changes.items() if name != "list"})
    assert made[:3] == (forward, backward, backward)
    assert reason in made[3]


WINOGRAD = {"spec": SPATIAL, "weight": (64, 64, 3, 3)}


@needs_cpu
@pytest.mark.parametrize(
    ("changes", "algorithms", "reason"),
    [
        (WINOGRAD, ("winograd_f4x4",) * 3, "fewer operations"),
        (WINOGRAD | {"winograd": False}, ("aten", "aten", "direct"), "as fast"),
        (WINOGRAD | {"input": (1, 64, 2, 2)}, ("aten",) * 3, "few output pixels"),
        (WINOGRAD | {"input": (1, 64, 2, 2), "weight_channels_last": True}, ("im2col_gemm",) * 3, "few output pixels"),
        (WINOGRAD | {"input": (2, 64, 1, 1), "weight_channels_last": True}, ("tap_gemm",) * 3, "one output pixel"),
        (WINOGRAD | {"spec": UnitSpec((2, 2), (1, 1))}, ("winograd_f4x4", "aten", "winograd_f4x4"), "fewer"),
        (WINOGRAD | {"spec": UnitSpec(padding=(3, 3))}, ("winograd_f4x4", "aten", "winograd_f4x4"), "fewer"),
        (WINOGRAD | {"weight": (8, 8, 3, 3), "input": (16, 8, 56, 56)}, ("aten",) * 3, "as fast"),
        ({}, ("direct",) * 3, "1x1: one GEMM"),
        ({"weight": (64, 256, 1, 1), "input": (16, 256, 56, 56)}, ("direct", "direct", "aten"), "1x1"),
        ({"spec": UnitSpec((2, 2))}, ("direct",) * 3, "1x1, stride 2"),
        ({"spec": UnitSpec(padding=(1, 1)), "input": (64, 64, 56, 56)}, ("direct", "aten", "direct"), "1x1"),
        ({"spec": UnitSpec((2, 2), (3, 3)), "weight": (64, 3, 7, 7), "input": (16, 3, 224, 224)},
         ("direct", "aten", "aten"), "7x7, stride 2"),
        (WINOGRAD | {"spec": UnitSpec(padding=(1, 1), groups=2), "weight": (64, 32, 3, 3)}, ("aten",) * 3, "grouped"),
        ({"dtype": torch.bfloat16}, ("aten",) * 3, "float32 images"),
        ({"channels_last": False}, ("aten",) * 3, "channels_last"),
        ({"traced": True}, ("aten",) * 3, "ATen's operators only"),
        ({"machine": Machine("baseline")}, ("aten",) * 3, "AVX2"),
        (WINOGRAD | {"preference": "fused"}, ("winograd_f4x4",) * 3, "fewer"),
        (WINOGRAD | {"preference": "aten"}, ("aten",) * 3, "backends.use"),
    ],
    ids=str,
)  # fmt: skip
def test_cpu_training(changes, algorithms, reason):
    from fused_res.backends.cpu.convolution import ALGORITHMS

    made = names(ALGORITHMS, **({"dtype": torch.float32} | changes))
    assert made[:3] == algorithms
    assert reason in made[3]


@needs_cpu
def test_cpu_inference():
    from fused_res.backends.cpu.convolution import ALGORITHMS

    def name(input, weight=None, padding=(1, 1), groups=1, stride=(1, 1), dilation=(1, 1), **changes):
        weight = weight or (input[1], input[1], 3, 3)
        geometry = UnitSpec(stride, padding, dilation, groups)
        made = problem(geometry, weight, input, **({"dtype": torch.float32, "packed": True} | changes))
        return dispatch.select(ALGORITHMS, made._replace(operation="inference"), "planned").name

    assert name((16, 64, 56, 56)) == name((16, 512, 7, 7)) == "winograd_f4x4"
    assert name((1, 512, 7, 7)) == "winograd_f2x2"
    assert name((16, 3, 32, 32), (16, 3, 3, 3)) == name((1, 512, 1, 1)) == "direct"
    assert name((16, 64, 56, 56), stride=(2, 2)) == "winograd_f4x4"
    assert name((1, 256, 14, 14), (512, 256, 3, 3), stride=(2, 2)) == "direct"
    assert name((16, 64, 56, 56), stride=(2, 1)) == name((16, 64, 56, 56), dilation=(2, 2)) == "direct"
    assert name((16, 64, 56, 56), (64, 32, 3, 3), groups=2) == "onednn"
    # A weight that is packed for one call has to pay at once.
    assert name((1, 256, 14, 14), packed=False) == "direct"
    assert name((16, 64, 56, 56), packed=False) == "winograd_f4x4"
    assert name((16, 64, 56, 56), channels_last=False) == "onednn"
    assert name((1, 64, 56, 56), channels_last=False, packed=False) == "aten"
    assert name((16, 64, 56, 56), machine=Machine("baseline", (torch.float32,))) == "onednn"
    assert name((16, 64, 56, 56), machine=Machine("baseline")) == "aten"
    assert name((16, 64, 56, 56), winograd=False) == "direct"


def block_tensors(dtype=torch.float64):
    tensors = []
    for shape in ((4, 8, 1, 1), (4, 4, 3, 3), (8, 4, 1, 1)):
        channels = shape[0]
        norm = [torch.ones(channels), torch.zeros(channels), torch.zeros(channels), torch.ones(channels)]
        tensors += [torch.randn(shape), None, *norm]
    return [None if t is None else t.to(dtype) for t in tensors]


def test_override_is_a_context():
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last)

    def algorithms():
        preference = registry.convolution("reference")
        made = plan(BlockConfig(BLOCK, (True,) * 3, "reference", preference=preference), x, block_tensors())
        return [(unit.algorithms.forward.name, unit.algorithms.weight_gradient.name) for unit in made.units]

    assert algorithms() == [("aten", "aten")] * 3
    with fused_res.backends.use("reference", convolution="fused"):
        assert algorithms() == [("reference", "reference"), ("reference", "aten"), ("reference", "reference")]
    assert algorithms() == [("aten", "aten")] * 3
    assert registry.convolution("triton") == "fused" and registry.convolution("auto") == "planned"
    with fused_res.backends.use("auto", convolution="planned"):
        assert registry.convolution("triton") == "planned"
    with pytest.raises(ValueError, match="convolution must be one of"):
        fused_res.backends.use("auto", convolution="cudnn")


# --- what really runs ---------------------------------------------------------------------------------------

#: What the profiler sees of each algorithm, forward; ATen's convolutions are its own operators.
SEEN = {
    "winograd_f4x4": "fused_res_cpu::convolve",
    "winograd_f2x2": "fused_res_cpu::convolve",
    "direct": "fused_res_cpu::convolve",
    "onednn": "mkldnn::_convolution_pointwise",
    "aten": "aten::convolution",
    "tap_gemm": "aten::mm",
    "im2col_gemm": "aten::mm",
}


def profiled(call) -> dict[str, int]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return {event.key: event.count for event in profile.key_averages()}


def counted(selected: list[str]) -> dict[str, int]:
    return {key: sum(SEEN[name] == key for name in selected) for key in set(SEEN.values())}


@needs_cpu
@pytest.mark.parametrize("size", [32, 96])  # the last stage on a map of one pixel, and of several
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_named_algorithms_run(name, size):
    """Counted by the profiler: in training by the plan and by `summarize`, in inference by `summarize`."""
    torch.manual_seed(0)
    model = getattr(models, name)(num_classes=10).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, size, size).contiguous(memory_format=torch.channels_last)
    seen = profiled(lambda: model(x))
    plans = [functional.last_plan[weight] for weight in model.parameters() if weight in functional.last_plan]
    units = [unit for one in plans for unit in one.all_units]
    assert len(units) == sum(isinstance(module, torch.nn.Conv2d) for module in model.modules())
    expected = counted([unit.algorithms.forward.name for unit in units])
    expected["aten::mm"] = sum(_products(unit) for unit in units)
    assert {key: seen.get(key, 0) for key in expected} == expected
    assert any(unit.algorithms.forward.name.endswith("_gemm") for unit in units)
    summary = fused_res.summarize(model)
    told = str(summary)
    for unit in units:
        assert str(unit.algorithms) in told
    assert [*summary.plans.values()] == plans and all(str(one) in summary.steps for one in plans)

    backward = profiled(lambda: model(x).sum().backward())
    gradients = [(unit.algorithms.input_gradient.name, unit.algorithms.weight_gradient.name) for unit in units]
    own = sum(SEEN[of_weight] == "fused_res_cpu::convolve" for _, of_weight in gradients)
    assert backward.get("fused_res_cpu::conv_weight_gradient", 0) == own
    wanted = [pair if unit.grad_reads else pair[1:] for unit, pair in zip(units, gradients, strict=True)]
    aten = [pair for pair in wanted if "aten" in pair]
    assert backward.get("aten::convolution_backward", 0) == len(aten)

    frozen = fused_res.freeze(model.eval())
    with torch.inference_mode():
        frozen(x)
        seen = profiled(lambda: frozen(x))
    ran = [module.kernel.name for module in frozen.modules() if getattr(module, "kernel", None)]
    assert len(ran) == len(units) and set(ran) <= {"winograd_f4x4", "winograd_f2x2", "direct"}
    assert seen["fused_res_cpu::conv_program"] > 0 and "aten::convolution" not in seen
    assert all(name in str(fused_res.summarize(frozen)) for name in ran)


def _products(unit) -> int:
    """GEMMs that are `aten::mm`; the further taps of `tap_gemm` are `aten::addmm_`."""
    return unit.algorithms.forward.name in ("tap_gemm", "im2col_gemm")


@needs_cpu
@torch.no_grad()
def test_aten_means_aten_and_nothing_else():
    model = models.resnet18(num_classes=10).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with fused_res.backends.use("auto", convolution="aten"):
        for network in (model, fused_res.freeze(model.eval())):
            seen = profiled(lambda: network(x))
            assert seen["aten::convolution"] == 20
            own = [key for key in seen if re.search("fused_res_cpu::conv|_pointwise$|aten::mm$", key)]
            assert not own


# --- measuring ----------------------------------------------------------------------------------------------


class TestTuning:
    @pytest.fixture(autouse=True)
    def forget(self, monkeypatch):
        monkeypatch.setattr(tuning, "_measured", {})
        monkeypatch.setattr(tuning, "_SECONDS", 0.0)

    def run(self, backend="reference", **options):
        x = torch.randn(2, 8, 5, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
        return residual_block(x, BLOCK, block_tensors(), training=True, backend=backend, **options)

    def test_measures_each_convolution_once(self, monkeypatch):
        self.run(tune=True)
        made = dict(tuning._measured)
        assert len(made) == 3
        assert all(one.reason.startswith("measured: ") for algorithms in made.values() for one in algorithms)
        monkeypatch.setattr(tuning, "_measure", None)
        self.run(tune=True)
        assert tuning._measured == made

    def test_the_faster_one_is_taken(self, monkeypatch):
        slow = {"aten": 2.0, "reference": 1.0, "apply": 0.1}

        def pretend(function, device):
            if function.__name__ == "activation":
                return slow["apply"]
            return slow.get(function.algorithm, 9.0)

        original = tuning._Calls.of

        def of(self, operation, algorithm):
            function = original(self, operation, algorithm)
            function.algorithm = algorithm.name
            return function

        monkeypatch.setattr(tuning._Calls, "of", of)
        monkeypatch.setattr(tuning, "_seconds", pretend)
        self.run(tune=True)
        chosen = [tuple(one.name for one in algorithms) for algorithms in tuning._measured.values()]
        assert chosen[0] == chosen[2] == ("reference",) * 3 and chosen[1] == ("reference", "aten", "aten")
        tuning._measured.clear()
        slow["reference"] = 3.0
        self.run(tune=True)
        assert all(one.name == "aten" for algorithms in tuning._measured.values() for one in algorithms)

    @needs_cpu
    def test_a_cpu_measures_as_well_and_stays_right(self):
        torch.manual_seed(0)
        x = torch.randn(2, 64, 14, 14).contiguous(memory_format=torch.channels_last)
        norm = [torch.ones(64), torch.zeros(64), torch.zeros(64), torch.ones(64)]
        tensors = [torch.randn(64, 64, 3, 3) / 24, None, *norm]
        spec = BlockSpec((SPATIAL,), "identity")
        found = residual_block(x, spec, [t if t is None else t.clone() for t in tensors], training=True, tune=True)
        (made,) = tuning._measured.values()
        assert {"winograd_f4x4", "direct", "aten"} <= set(re.findall(r"([a-z_0-9]+) [0-9]+ us", made.forward.reason))
        wide = [t if t is None else t.double() for t in tensors]
        exact = residual_block(x.double(), spec, wide, training=True, backend="reference")
        assert (found - exact).norm() <= 1e-5 * exact.norm()

    def test_not_unless_asked_nor_where_runs_have_to_be_alike(self):
        self.run()
        with fused_res.backends.use("reference", convolution="aten"):
            self.run(tune=True)
        torch.use_deterministic_algorithms(True)
        try:
            self.run(tune=True)
        finally:
            torch.use_deterministic_algorithms(False)
        assert not tuning._measured

    def test_bad_tensors_are_refused_before(self):
        x = torch.randn(2, 6, 5, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
        with pytest.raises(ValueError, match=r"0\.weight"):
            residual_block(x, BLOCK, block_tensors(), training=True, backend="reference", tune=True)
        assert not tuning._measured


# --- the core -----------------------------------------------------------------------------------------------


def test_the_core_names_no_backend():
    """Outside of `backends/` a backend's name is a value that travels through: no line of code compares with one."""
    package = Path(fused_res.__file__).parent
    for path in package.rglob("*.py"):
        if "backends" not in path.relative_to(package).parts:
            compared = re.findall(r"(?:kernels\.name|backend\w*) (?:==|!=|in) .*", path.read_text())
            assert not [line for line in compared if re.search("triton|cuda|cpu|reference", line)], path
