"""Blocks and models on the GPU backends, with and without fused convolutions, and errors without a GPU."""

import itertools
import subprocess
import sys

import pytest
import torch

import fused_res
from fused_res import BlockSpec, UnitSpec
from fused_res.backends import cuda
from fused_res.functional import batch_norm_act, last_plan, residual_block
from tests.block.test_residual_block import BLOCK_SPECS, clone_with_grad, make_block_case, run_forward_backward, stock
from tests.ops.test_conv_bias_act import check_conv_bias_act, make_conv_case
from tests.support import gpu_backends as gpu
from tests.support.gpu_backends import DEVICE

pytestmark = pytest.mark.usefixtures("forced_kernels")
on_all = pytest.mark.parametrize("backend", gpu.BACKENDS)
BLOCKS_2D = [name for name, (spec, _) in BLOCK_SPECS.items() if len(spec.units[0].stride) == 2]


@pytest.fixture(autouse=True)
def _no_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def small_block_case(name, bias=False):
    spec, x, tensors = make_block_case(name, torch.float32, bias, batch=2, size=5)
    tensors = [None if t is None else t.to(DEVICE) for t in tensors]
    return spec, x.to(DEVICE).contiguous(memory_format=torch.channels_last), tensors


def assert_near(actual, expected):
    """Compare float32 with float64, for gradients of convolutions that sum hundreds of terms with cancellation."""
    for a, b in zip(actual, expected, strict=True):
        scale = b.abs().max().item()
        # The gradient of a bias before a norm is zero except for rounding.
        assert (a.double() - b).abs().max().item() <= 1e-4 * scale + 2e-5


def float64_reference(spec, x, tensors, training, **options):
    wide = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    return run_forward_backward(lambda x, t: stock(x, spec, t, training), x.double(), wide, **options)


@on_all
@pytest.mark.parametrize("convolution", ["aten", "fused"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", BLOCKS_2D)
def test_blocks_match_float64(name, training, convolution, backend):
    recomputes = ("none", "conv") if convolution == "fused" else ("norm",)
    for recompute in recomputes:
        spec, x, tensors = small_block_case(name, bias=recompute == "conv")
        with fused_res.backends.use(backend, convolution):
            actual = run_forward_backward(
                lambda x, t, s=spec, r=recompute: residual_block(x, s, t, training=training, recompute=r),
                x,
                clone_with_grad(tensors),
            )
        assert_near(actual, float64_reference(spec, x, clone_with_grad(tensors), training))


@on_all
@pytest.mark.parametrize("name", ["bottleneck", "projection"])
def test_gradients_with_frozen_tensors(name, backend):
    """Any tensor of a fused block, including its input, may not require grad."""
    count = len(make_block_case(name)[2])
    for frozen_input, frozen in itertools.product((True, False), ((0, 12), (2, 3, 8, 9, 14, 15), range(1, count))):
        spec, x, tensors = small_block_case(name)
        with fused_res.backends.use(backend, "fused"):
            actual = run_forward_backward(
                lambda x, t, s=spec: residual_block(x, s, t, training=True),
                x,
                clone_with_grad(tensors, frozen),
                frozen_input=frozen_input,
            )
        assert_near(
            actual, float64_reference(spec, x, clone_with_grad(tensors, frozen), True, frozen_input=frozen_input)
        )


@on_all
@pytest.mark.parametrize("case", ["3x3", "1x1", "1x1, stride", "ragged", "one image", "sequence"])
def test_conv_bias_act_matches_stock(case, backend):
    """Explicitly selected backend, either memory format; a 1-d convolution is dispatched to ATen."""
    for dtype, format in itertools.product((torch.float32, torch.float16), (torch.channels_last, None)):
        tensors, options = make_conv_case(case, dtype)
        if format and tensors["input"].dim() == 4:
            tensors["input"] = tensors["input"].contiguous(memory_format=format)
        check_conv_bias_act({name: t.to(DEVICE) for name, t in tensors.items()}, options, backend)


@on_all
@pytest.mark.parametrize("compiled", [False, True])
def test_frozen_model_matches_unfused(compiled, backend):
    torch.manual_seed(0)
    model = fused_res.models.cifar_resnet(8, num_classes=3).eval().to(DEVICE, memory_format=torch.channels_last)
    for norm in (module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        torch.nn.init.normal_(norm.running_mean), torch.nn.init.uniform_(norm.running_var, 0.5, 2)
    frozen = fused_res.freeze(model, backend=backend)
    x = torch.randn(1, 3, 9, 9, device=DEVICE).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = fused_res.unfuse(model.double())(x.double())
        frozen(x)
        reasons = [row.why for row in fused_res.summarize(frozen).fused]
        assert all(f"backend={backend}" in why and "implicit_gemm" in why for why in reasons)
        if compiled:
            torch._dynamo.reset()
            frozen = torch.compile(frozen, fullgraph=True, backend="aot_eager")
        assert (frozen(x) - expected).abs().max() <= 1e-5 * expected.abs().max()


@on_all
def test_compiled_block_matches_eager(backend):
    spec, x, tensors = small_block_case("projection")

    def block(x, tensors):
        return residual_block(x, spec, tensors, training=True)

    with fused_res.backends.use(backend, "fused"):
        eager = run_forward_backward(block, x, clone_with_grad(tensors))
        torch._dynamo.reset()
        compiled = run_forward_backward(
            torch.compile(block, fullgraph=True, backend="aot_eager"), x, clone_with_grad(tensors)
        )
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)


@on_all
def test_compiled_norm_calls_its_operators(backend):
    x = torch.randn(2, 6, 5, 5, device=DEVICE).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(6, device=DEVICE, requires_grad=True), torch.randn(6, device=DEVICE)
    traced_targets = []

    def recording_backend(graph, inputs):
        from torch._dynamo.backends.common import aot_autograd

        def compiler(graph, _):
            traced_targets.extend(str(node.target) for node in graph.graph.nodes)
            return graph

        return aot_autograd(fw_compiler=compiler)(graph, inputs)

    def norm(x, weight):
        return batch_norm_act(x, None, None, weight, bias, training=True, backend=backend)

    torch._dynamo.reset()
    torch.testing.assert_close(
        torch.compile(norm, fullgraph=True, backend=recording_backend)(x, weight), norm(x, weight)
    )
    assert any(name.endswith(".batch_norm_act_forward.default") for name in traced_targets)


@on_all
def test_operators_pass_opcheck(backend):
    """opcheck compares schemas, fake implementations, shapes and strides."""
    namespace = torch.ops.fused_res_triton if backend == "triton" else getattr(torch.ops, cuda.namespace())
    x = torch.randn(2, 8, 4, 3, device=DEVICE).contiguous(memory_format=torch.channels_last)
    z = torch.randn(2, 16, 4, 3, device=DEVICE).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(16, 8, 1, 1, device=DEVICE)
    kernels = fused_res.backends.resolve(backend, DEVICE)
    stats = kernels.batch_norm_stats(z, None, None, None, None, True, 1e-5)
    x_stats = kernels.batch_norm_stats(x, None, None, None, None, True, 1e-5)
    partials = kernels.batch_norm_partials(z).repeat(3, 1, 1)
    sums = kernels.batch_norm_sums(z, z, stats, None, "relu", None, None)
    geometry = [1, 1], [0, 0], [1, 1], 1
    common = z, z, stats, None, True, sums, 24, weight
    no_prologue = None, None, None, False, None, 0
    torch.library.opcheck(namespace.conv_dgrad.default, (z, *no_prologue, weight, None, None, False, x))
    for name, arguments in {
        "batch_norm_partials": (z,),
        "merge_stats": (partials, None, None, 1e-5, False),
        "batch_norm_sums": (z, z, stats, None, "relu", None, None),
        "batch_norm_act_dx": (z, z, stats, None, "relu", sums, 24),
        "batch_norm_act_apply": (z, stats, z, stats, "relu", True),
        "batch_norm_act_backward_pair": (z, z, None, stats, z, None, stats, None, True, True, [True] * 6),
        "conv_bias_act": (x, weight, None, z, *geometry, True),
        "conv_bn_stats": (x, weight, None, x_stats, True, *geometry, True),
        "conv_dgrad": (*common, x, x_stats, True),
        "conv_wgrad": (*common, x, x_stats, True, [1, 1]),
        "max_pool_forward": (z, stats, True, [2, 2], [2, 2], [0, 0]),
    }.items():
        torch.library.opcheck(getattr(namespace, name).default, arguments)


@on_all
@pytest.mark.parametrize("frozen", ["", "weight", "input"])
def test_shortcut_gradient_is_added_by_the_input_gradient(frozen, backend):
    """A block whose first 1x1 is not fused with its norm: all gradients match those of separate additions.

    In float16: without a GPU, Triton interprets bfloat16 incorrectly.
    """
    channels, inner = 512, 128
    torch.manual_seed(0)
    spec = BlockSpec((UnitSpec(), UnitSpec()), "identity")
    tensors = []
    for outputs, inputs in ((inner, channels), (channels, inner)):
        weight = torch.randn(outputs, inputs, 1, 1, device=DEVICE) / inputs**0.5
        tensors += [weight.half(), torch.randn(outputs, device=DEVICE).half()]
        tensors += [torch.rand(outputs, device=DEVICE), torch.randn(outputs, device=DEVICE), None, None]
    tensors = [t if t is None else t.requires_grad_(not (frozen == "weight" and t is tensors[0])) for t in tensors]
    x = torch.randn(2, channels, 3, 3, device=DEVICE).half().contiguous(memory_format=torch.channels_last)
    x.requires_grad_(frozen != "input")
    dy = torch.randn_like(x)
    results = []
    for convolution in ("planned", "aten"):
        with fused_res.backends.use(backend, convolution):
            y = residual_block(x, spec, tensors, training=True)
        operators = [step.operator for step in last_plan[tensors[0]].backward.steps]
        additions = [name for name in operators if name in ("conv_dgrad", "add_masked_")]
        assert additions == ["conv_dgrad" if convolution == "planned" else "add_masked_"] * (frozen != "input")
        leaves = [t for t in (x, *tensors) if t is not None and t.requires_grad]
        results.append(torch.autograd.grad(y, leaves, dy))
    for found, expected in zip(*results, strict=True):
        # The sum is rounded once instead of twice.
        assert (found - expected).double().norm() <= 2**-10 * expected.double().norm()


@on_all
def test_training_step_of_resnet_matches_reference(backend):
    """The gradients of a bottleneck network with a stem equal those of the reference backend in float64."""
    torch.manual_seed(0)
    model = fused_res.models.resnet50(num_classes=3)
    model.layer1, model.layer2 = model.layer1[:1], model.layer2[:1]
    model.layer3, model.layer4, model.fc = torch.nn.Identity(), torch.nn.Identity(), torch.nn.Linear(512, 3)
    model = model.to(DEVICE, memory_format=torch.channels_last)
    x = torch.randn(2, 3, 18, 18, device=DEVICE).contiguous(memory_format=torch.channels_last)
    grads = []
    for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        model = fused_res.fuse(model.to(dtype), backend=name)
        with fused_res.backends.use("auto", "aten" if name == "reference" else "fused"):
            model(x.to(dtype)).square().sum().backward()
        grads.append([p.grad.double() for p in model.parameters()])
        model.zero_grad()
    for actual, expected in zip(*grads, strict=True):
        assert (actual - expected).norm() <= 1e-3 * expected.norm() + 1e-6


class TestWithoutAGpu:
    """Every module can be imported, and an unavailable backend reports the reason."""

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ("importlib.util.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)",
             "Triton is not installed: pip install triton"),
            ("importlib.metadata.version = lambda n: '2.1.0'", "Triton 2.1.0 is too old"),
            ("pass", "no NVIDIA GPU is available"),
        ],
    )  # fmt: skip
    def test_triton_reports_why_unavailable(self, change, words):
        code = f"""if True:
            import importlib.metadata, importlib.util, os, sys
            find = importlib.util.find_spec
            import torch
            torch.cuda.is_available = lambda: False
            {change}
            import fused_res
            assert {words!r} in fused_res.backends.unavailable("triton")
            model = fused_res.fuse(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)))
            model(torch.randn(2, 3, 5, 5))
            for use in (lambda: fused_res.fuse(model, backend="triton"), lambda: fused_res.backends.use("triton")):
                try:
                    use()
                except fused_res.BackendUnavailableError as error:
                    assert {words!r} in str(error), error
                else:
                    raise SystemExit("did not raise")"""
        environment = {"PATH": "/usr/bin", "TRITON_INTERPRET": "0"}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    @pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU is available, and possibly the library")
    def test_cuda_reports_missing_library(self):
        """The reason names the missing library and the command that installs it."""
        code = """if True:
            import fused_res
            reason = fused_res.backends.unavailable("cuda")
            assert "CUDA kernels is unavailable" in reason and "FUSED_RES_CUDA=1 pip install" in reason, reason
            try:
                fused_res.backends.use("cuda")
            except fused_res.BackendUnavailableError as error:
                assert reason in str(error)
            else:
                raise SystemExit("did not raise")"""
        done = subprocess.run([sys.executable, "-c", code], env={"PATH": "/usr/bin"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def test_kernels_are_not_imported_before_first_use(self):
        code = "import sys, fused_res; assert 'fused_res.backends.triton.registration' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True)
