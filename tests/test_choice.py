"""Who computes a convolution: the static choice, the override, the measurement."""

import pytest
import torch

import fused_res
from fused_res import BlockSpec, UnitSpec, tune
from fused_res.backends import registry
from fused_res.choice import choose
from fused_res.functional import residual_block
from fused_res.plan import plan

POINTWISE = UnitSpec()
SPATIAL = UnitSpec(padding=(1, 1))
BLOCK = BlockSpec((POINTWISE, SPATIAL, POINTWISE), "identity")


def choice(
    spec=POINTWISE, weight=(64, 64, 1, 1), dtype=torch.bfloat16, preference="planned", backend="triton", **other
):
    options = {"channels_last": True, "projection": False} | other
    return choose(spec, weight, dtype, options["channels_last"], options["projection"], backend, preference)


@pytest.mark.parametrize(
    ("arguments", "forward", "backward", "reason"),
    [
        ({}, "fused", "fused", "1x1"),
        ({"dtype": torch.float16}, "fused", "fused", "1x1"),
        ({"dtype": torch.float32}, "aten", "aten", "float32 gains less"),
        ({"dtype": torch.float32, "preference": "fused"}, "fused", "fused", "1x1"),
        ({"dtype": torch.float64, "preference": "fused"}, "aten", "aten", "float64 has no"),
        ({"spec": SPATIAL, "weight": (64, 64, 3, 3)}, "aten", "aten", "cuDNN"),
        ({"spec": SPATIAL, "weight": (64, 64, 3, 3), "preference": "fused"}, "fused", "aten", "for 1x1"),
        ({"spec": UnitSpec((2, 2))}, "aten", "aten", "cuDNN"),
        ({"spec": UnitSpec((2, 2)), "projection": True}, "fused", "fused", "1x1"),
        ({"spec": UnitSpec(groups=2), "preference": "fused"}, "aten", "aten", "grouped"),
        ({"weight": (64, 12, 1, 1)}, "aten", "aten", "channels"),
        ({"weight": (100, 64, 1, 1)}, "aten", "aten", "channels"),
        ({"channels_last": False, "preference": "fused"}, "aten", "aten", "channels_last"),
        ({"backend": "cpu", "preference": "fused"}, "aten", "aten", "for float32 images"),
        ({"backend": "cpu", "dtype": torch.float32}, "own", "own", "faster than ATen's"),
        ({"backend": "cpu", "dtype": torch.float32, "spec": SPATIAL, "weight": (8, 8, 3, 3)}, "own", "own", "Winograd"),
        ({"backend": "cpu", "dtype": torch.float32, "preference": "aten"}, "aten", "aten", "says so"),
        ({"backend": "reference"}, "aten", "aten", "nothing to gain"),
        ({"preference": "aten"}, "aten", "aten", "says so"),
    ],
    ids=str,
)
def test_static_choice(arguments, forward, backward, reason):
    made = choice(**arguments)
    assert (made.forward, made.backward) == (forward, backward)
    assert reason in made.reason


def block_tensors(dtype=torch.float64):
    tensors = []
    for shape in ((4, 8, 1, 1), (4, 4, 3, 3), (8, 4, 1, 1)):
        channels = shape[0]
        norm = [torch.ones(channels), torch.zeros(channels), torch.zeros(channels), torch.ones(channels)]
        tensors += [torch.randn(shape), None, *norm]
    return [None if t is None else t.to(dtype) for t in tensors]


def test_one_channel_has_no_rows():
    """Its mask lies in planes, which fused gradients do not read."""
    assert "single channel" in choice(weight=(1, 64, 1, 1), preference="fused").reason


def test_override_is_a_context():
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last)

    def kernels():
        preference = registry.convolution("reference")
        made = plan(BLOCK, x, block_tensors(), (True,) * 3, "none", "reference", preference=preference)
        return [unit.kernels.kernels for unit in made.units]

    assert kernels() == ["ATen"] * 3
    with fused_res.backends.use("reference", convolution="fused"):
        assert kernels() == ["fused", "fused forward, ATen backward", "fused"]
    assert kernels() == ["ATen"] * 3
    assert registry.convolution("triton") == "fused" and registry.convolution("auto") == "planned"
    with fused_res.backends.use("auto", convolution="planned"):
        assert registry.convolution("triton") == "planned"
    with pytest.raises(ValueError, match="convolution must be one of"):
        fused_res.backends.use("auto", convolution="cudnn")


class TestTuning:
    @pytest.fixture(autouse=True)
    def forget(self):
        tune._measured.clear()
        yield
        tune._measured.clear()

    def run(self, **options):
        x = torch.randn(2, 8, 5, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
        return residual_block(x, BLOCK, block_tensors(), training=True, backend="reference", **options)

    def test_measures_each_convolution_once(self, monkeypatch):
        self.run(tune=True)
        made = dict(tune._measured)
        assert len(made) == 3
        assert all(choice.reason.startswith("measured: ") for choice in made.values())
        monkeypatch.setattr(tune, "_measure", None)
        self.run(tune=True)
        assert tune._measured == made

    def test_the_faster_one_is_taken(self, monkeypatch):
        slow = {"aten": 2.0, "fused": 1.0, "apply": 0.1}

        def pretend(function, device):
            return slow["aten" if "aten" in function.__name__ else "fused" if "fused" in function.__name__ else "apply"]

        monkeypatch.setattr(tune, "_seconds", pretend)
        self.run(tune=True)
        first, second, third = tune._measured.values()
        assert first[:2] == third[:2] == ("fused", "fused") and second[:2] == ("fused", "aten")
        tune._measured.clear()
        slow["fused"] = 3.0
        self.run(tune=True)
        assert all(choice[:2] == ("aten", "aten") for choice in tune._measured.values())

    def test_not_unless_asked_nor_where_runs_have_to_be_alike(self):
        self.run()
        with fused_res.backends.use("reference", convolution="aten"):
            self.run(tune=True)
        torch.use_deterministic_algorithms(True)
        try:
            self.run(tune=True)
        finally:
            torch.use_deterministic_algorithms(False)
        assert not tune._measured

    def test_bad_tensors_are_refused_before(self):
        x = torch.randn(2, 6, 5, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
        with pytest.raises(ValueError, match=r"0\.weight"):
            residual_block(x, BLOCK, block_tensors(), training=True, backend="reference", tune=True)
        assert not tune._measured
