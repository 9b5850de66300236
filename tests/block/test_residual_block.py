"""residual_block against stock PyTorch in float64, at every recompute level, and what it keeps."""

import itertools

import pytest
import torch
from torch.nn import functional as F

import fused_res
from fused_res import BlockSpec, PoolSpec, UnitSpec
from fused_res.functional import residual_block
from fused_res.testing import assert_as_exact_as
from tests.support.cpu_backends import FAST
from tests.support.stock_pytorch import residual_block as stock

BACKENDS = [*FAST, "reference, fused"]
RECOMPUTE = ("none", "norm", "conv")
SAME = UnitSpec(padding=(1, 1))

# spec, channels and kernel size of every convolution (the projection last)
BLOCKS = {
    "bottleneck": (BlockSpec((UnitSpec(), SAME, UnitSpec()), "identity"), [(8, 4, 1), (4, 4, 3), (4, 8, 1)]),
    "projection": (
        BlockSpec((UnitSpec(), UnitSpec((2, 2), (1, 1)), UnitSpec()), UnitSpec((2, 2), activation="identity")),
        [(8, 4, 1), (4, 4, 3), (4, 12, 1), (8, 12, 1)],
    ),
    "basic": (BlockSpec((SAME, SAME), "identity"), [(8, 8, 3), (8, 8, 3)]),
    "grouped": (
        BlockSpec((UnitSpec(), UnitSpec((1, 1), (2, 2), (2, 2), groups=2), UnitSpec()), "identity"),
        [(8, 4, 1), (4, 4, 3), (4, 8, 1)],
    ),
    "plain": (BlockSpec((SAME, UnitSpec(eps=1e-3))), [(8, 6, 3), (6, 5, 1)]),
    "linear end": (BlockSpec((SAME, UnitSpec(activation="identity")), "identity"), [(8, 6, 3), (6, 8, 1)]),
    "stem": (BlockSpec((UnitSpec((2, 2), (3, 3)),), pool=PoolSpec()), [(8, 6, 7)]),
    "sequence": (BlockSpec((UnitSpec((1,), (1,), (1,)),), "identity"), [(8, 8, 3)]),
}


@pytest.fixture
def backend(request):
    """A backend's name, while its convolutions are fused wherever they can be, or as it chooses."""
    name, _, convolution = request.param.partition(", ")
    with fused_res.backends.use("auto", convolution or "auto"):
        yield name


def make(name, dtype=torch.float64, bias=False, batch=3, size=7):
    spec, convolutions = BLOCKS[name]
    generator = torch.Generator().manual_seed(len(name))

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rank = len(spec.units[0].stride)
    tensors = []
    for unit, (cin, cout, kernel) in zip(spec.convolutions, convolutions, strict=True):
        weight = 0.4 * randn(cout, cin // unit.groups, *(kernel,) * rank)
        tensors += [
            weight,
            randn(cout) if bias else None,
            randn(cout) + 1,
            randn(cout),
            randn(cout),
            randn(cout) ** 2 + 1,
        ]
    tensors = [None if t is None else t.to(dtype) for t in tensors]
    x = (randn(batch, convolutions[0][0], *(size,) * rank) * 2 + 3).to(dtype)
    return spec, x, tensors


def learnable(tensors, frozen=()):
    """Fresh copies; parameters require grad unless their index is frozen."""
    copies = [None if t is None else t.clone() for t in tensors]
    for index, t in enumerate(copies):
        if t is not None and index % 6 < 4 and index not in frozen:
            t.requires_grad_()
    return copies


def run(function, x, tensors, grad=None, frozen_input=False):
    """Output, gradients of all that wants one, and every tensor afterwards."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_(not frozen_input)
    y = function(x, tensors)
    wanted = [t for t in (x, *tensors) if t is not None and t.requires_grad]
    if grad is None:
        grad = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    grads = torch.autograd.grad(y, wanted, grad) if wanted else []
    return [y.detach(), *grads, *(t.detach() for t in tensors if t is not None)]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", BLOCKS)
def test_equals_stock(name, training, recompute, backend):
    for channels_last, bias in itertools.product((True, False), repeat=2):
        spec, x, tensors = make(name, bias=bias)
        if channels_last and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)

        def ours(x, tensors, spec=spec):
            return residual_block(x, spec, tensors, training=training, recompute=recompute, backend=backend)

        found = run(ours, x, learnable(tensors))
        assert_same(found, run(lambda x, t, spec=spec: stock(x, spec, t, training), x, learnable(tensors)))


@pytest.mark.parametrize("name", ["bottleneck", "projection", "basic", "grouped", "stem"])
def test_maps_smaller_than_the_kernel(name):
    """Taps that read padding only are cut from the weight; their gradient is zero."""
    for size, last in itertools.product((1, 2, 3, 4), (True, False)):
        spec, x, tensors = make(name, batch=5, size=size)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        ours = run(lambda x, t, s=spec: residual_block(x, s, t, training=True), x, learnable(tensors))
        assert_same(ours, run(lambda x, t, s=spec: stock(x, s, t), x, learnable(tensors)))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_a_projection_of_a_sequence(backend):
    """Also of a single place, which a stride leaves as long as it was."""
    for stride, size in itertools.product((1, 2), (1, 5)):
        unit = UnitSpec((stride,), (1,), (1,))
        spec = BlockSpec((unit,), UnitSpec((stride,), (0,), (1,), activation="identity"))
        generator = torch.Generator().manual_seed(0)
        tensors = []
        for kernel in (3, 1):
            weight = torch.randn(6, 4, kernel, generator=generator, dtype=torch.float64)
            tensors += [weight, None, *torch.rand(4, 6, generator=generator, dtype=torch.float64).add(0.5)]
        x = torch.randn(3, 4, size, generator=generator, dtype=torch.float64)
        ours = run(lambda x, t, s=spec: residual_block(x, s, t, training=True, backend=backend), x, learnable(tensors))
        assert_same(ours, run(lambda x, t, s=spec: stock(x, s, t), x, learnable(tensors)))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_layouts_that_disagree(backend):
    """Weights in channels_last turn convolution outputs to channels_last, 1x1 weights do not tell; and the gradient
    comes as it likes. The mask's bits must lie in one order all the same."""
    for name, x_last, weights_last, grad_last in itertools.product(("projection", "basic"), *[(True, False)] * 3):
        spec, x, tensors = make(name, size=8)
        formats = {True: torch.channels_last, False: torch.contiguous_format}
        x = x.contiguous(memory_format=formats[x_last])
        tensors = [
            t.contiguous(memory_format=formats[weights_last]) if t is not None and t.dim() == 4 else t for t in tensors
        ]
        y = stock(x, spec, tensors)
        grad = torch.randn_like(y).contiguous(memory_format=formats[grad_last])
        ours = run(
            lambda x, t, s=spec: residual_block(x, s, t, training=True, backend=backend), x, learnable(tensors), grad
        )
        assert_same(ours, run(lambda x, t, s=spec: stock(x, s, t), x, learnable(tensors), grad))


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("name", ["bottleneck", "projection", "stem"])
def test_frozen_tensors(name, recompute):
    """Whatever is frozen, the rest is right, and never more bytes are kept than stock keeps."""
    spec, x, tensors = make(name, dtype=torch.float32)
    spec64, x64, tensors64 = make(name)
    parameters = [i for i, t in enumerate(tensors) if t is not None and i % 6 < 4]
    first_unit, last_weight = parameters[:3], parameters[-3:-2]
    weights = [i for i in parameters if i % 6 == 0]
    for frozen, frozen_input in itertools.product(
        ([], first_unit, last_weight, weights, parameters[:-1], [i for i in parameters if i % 6]), (True, False)
    ):
        ours = run(
            lambda x, t: residual_block(x, spec64, t, training=True, recompute=recompute),
            x64, learnable(tensors64, frozen), frozen_input=frozen_input,
        )  # fmt: skip
        assert_same(
            ours, run(lambda x, t: stock(x, spec64, t), x64, learnable(tensors64, frozen), frozen_input=frozen_input)
        )
        if recompute == "none":
            x32 = x.clone().requires_grad_(not frozen_input)
            mine = kept_bytes(lambda t: residual_block(x32, spec, t, training=True), learnable(tensors, frozen))
            theirs = kept_bytes(lambda t: stock(x32, spec, t), learnable(tensors, frozen))
            # Our masks and 5-row statistics on maps of 7x7 are more than stock's two rows; both are noise on real ones.
            small = sum(5 * 4 * t.shape[0] for t in tensors if t is not None and t.dim() == 1) + x.numel() // 8 * 4
            assert mine <= theirs + small, (frozen, frozen_input)


def kept_bytes(function, tensors):
    seen = {}

    def pack(t):
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function(tensors)
    for t in tensors:
        if t is not None:
            seen.pop(t.untyped_storage().data_ptr(), None)
    # stock keeps the output of its last ReLU, which is there anyway: the next block's input
    seen.pop(y.untyped_storage().data_ptr(), None)
    return sum(seen.values())


def test_recompute_levels_keep_what_they_say():
    spec, x, tensors = make("projection", torch.float32, batch=4, size=16)
    x.requires_grad_()
    pixels, strided = 4 * 16 * 16 * 4, 4 * 8 * 8 * 4
    small = 4 * 5 * (4 + 4 + 12 + 12) + 4 * 8 * 8 * 2 + 256  # statistics, and 12 bits a pixel in 2 bytes
    expected = {
        "none": 8 * pixels + 2 * 4 * pixels + 2 * 4 * strided + 2 * 12 * strided,  # x, z0 a0, z1 a1, z2 zs
        "norm": 8 * pixels + 4 * pixels + 4 * strided + 2 * 12 * strided,
        "conv": 8 * pixels + 4 * pixels + 4 * strided,
    }
    for level, size in expected.items():
        for format in (torch.contiguous_format, torch.channels_last):
            laid_out = x.detach().contiguous(memory_format=format).requires_grad_()
            found = kept_bytes(
                lambda t, x=laid_out, level=level: residual_block(x, spec, t, training=True, recompute=level),
                learnable(tensors),
            )
            assert size <= found <= size + small, level


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("name", ["bottleneck", "projection", "stem"])
def test_compiled(name, backend):
    """fullgraph, the same numbers, and the same bytes kept at each level."""
    spec, x, tensors = make(name, size=8)
    for recompute in RECOMPUTE:
        torch._dynamo.reset()

        def block(x, tensors, recompute=recompute):
            return residual_block(x, spec, tensors, training=True, recompute=recompute, backend=backend)

        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        assert_same(run(compiled, x, learnable(tensors)), run(block, x, learnable(tensors)))
        mine = x.clone().requires_grad_()
        kept = [kept_bytes(lambda t, f=f: f(mine, t), learnable(tensors)) for f in (block, compiled)]
        assert kept[0] == kept[1], recompute


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_operators(backend):
    for name in ("bottleneck", "projection", "stem"):
        spec, x, tensors = make(name)
        flat = [t for index, t in enumerate(learnable(tensors)) if t is not None and index % 6 < 4]
        present = [t is not None and index % 6 < 4 for index, t in enumerate(tensors)]
        ints, eps = spec.encode()
        flags = [True, *present]
        args = (x.requires_grad_(), flat, present, ints, eps, [True] * len(eps), flags, False, "norm", backend)
        args += (fused_res.backends.registry.convolution(backend), "")
        torch.library.opcheck(torch.ops.fused_res.block_forward.default, args, test_utils="test_schema")
        torch.library.opcheck(torch.ops.fused_res.block_forward.default, args, test_utils="test_faketensor")
        torch.library.opcheck(torch.ops.fused_res.block_forward.default, args, test_utils="test_autograd_registration")


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_bias_alone_is_trained(training, backend):
    """Nothing of the convolution's input is kept then, and nothing of it is needed."""
    for name in ("plain", "bottleneck"):
        spec, x, tensors = make(name, bias=True)
        x = x.contiguous(memory_format=torch.channels_last)
        frozen = set(range(len(tensors))) - {1}

        def ours(x, t, spec=spec):
            return residual_block(x, spec, t, training=training, backend=backend)

        found = run(ours, x, learnable(tensors, frozen), frozen_input=True)
        expected = run(lambda x, t, s=spec: stock(x, s, t, training), x, learnable(tensors, frozen), frozen_input=True)
        assert_same(found, expected)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("name", ["bottleneck", "projection", "stem"])
def test_gradcheck_twice(name, backend):
    spec, x, tensors = make(name, batch=2, size=4)
    parameters = learnable(tensors)
    for training in (True, False):

        def function(x, weight, training=training):
            return residual_block(x, spec, [weight, *parameters[1:]], training=training, backend=backend)

        inputs = (x.requires_grad_(), parameters[0].detach().requires_grad_())
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_precision(dtype):
    """To the precision contract, against float64 on the same rounded inputs."""
    for name, training in itertools.product(("bottleneck", "projection"), (True, False)):
        spec, x, tensors = make(name, dtype, batch=8, size=14)
        tensors = [t if t is None or i % 6 < 2 else t.float() for i, t in enumerate(tensors)]
        wide = [None if t is None else t.double() for t in tensors]
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            ours = residual_block(x, spec, [None if t is None else t.clone() for t in tensors], training=training)
            theirs = stock(x, spec, [None if t is None else t.clone() for t in tensors], training)
            exact = stock(x.double(), spec, wide, training)
        assert_as_exact_as(f"{name} output", ours, theirs, exact)


def test_autocast_does_what_stock_does():
    spec, x, tensors = make("plain", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(lambda x, t: residual_block(x, spec, t, training=True), x, learnable(tensors))
        theirs = run(lambda x, t: stock(x, spec, t), x, learnable(tensors))
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 0.05 * (1 + b.abs().max())


def test_running_statistics_take_a_batch_once():
    """Checkpointing runs the block again in backward; the batch was counted the first time."""
    spec, x, tensors = make("bottleneck")
    once, twice = learnable(tensors), learnable(tensors)
    residual_block(x.requires_grad_(), spec, once, training=True).sum().backward()
    torch.utils.checkpoint.checkpoint(
        lambda x: residual_block(x, spec, twice, training=True), x, use_reentrant=False
    ).sum().backward()
    assert_same([t.detach() for t in once if t is not None], [t.detach() for t in twice if t is not None])


def test_mixed_training_and_momenta():
    spec, x, tensors = make("projection")
    flags, momenta = (True, False, True, False), (0.1, 0.2, 0.3, 0.4)
    for grad in (True, False):
        mine, theirs = learnable(tensors), learnable(tensors)
        with torch.set_grad_enabled(grad):
            ours = residual_block(x, spec, mine, training=flags, momentum=momenta)
            expected = stock(x, spec, theirs, flags)
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(mine[4], theirs[4])
        rest = tensors[16] * 0.7 + (theirs[16] - 0.9 * tensors[16]) / 0.1 * 0.3
        torch.testing.assert_close(mine[16], rest)
        for index in (10, 11, 22, 23):
            assert torch.equal(mine[index], tensors[index])


def test_max_pool_ties_and_nan():
    """The same element wins as in PyTorch, so the same element gets the gradient."""
    kernels = [fused_res.backends.resolve(name, torch.device("cpu")) for name in BACKENDS if "," not in name]
    generator = torch.Generator().manual_seed(0)
    for dtype, last, (kernel, stride, padding) in itertools.product(
        (torch.float32, torch.float64, torch.bfloat16),
        (True, False),
        (((3, 3), (2, 2), (1, 1)), ((2, 3), (2, 1), (0, 1)), ((5, 5), (5, 5), (2, 2))),
    ):
        x = torch.randint(-2, 2, (3, 19, 11, 13), generator=generator).to(dtype)
        x[0, 0, 4, 4] = float("nan")
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        y = F.max_pool2d(x, kernel, stride, padding)
        grad = torch.randn(y.shape, generator=generator).to(dtype)
        # The values are small integers, so float64 picks the same elements; 16-bit sums are rounded once.
        exact = x.double().requires_grad_()
        (expected,) = torch.autograd.grad(F.max_pool2d(exact, kernel, stride, padding), exact, grad.double())
        for k in kernels:
            found, indices = k.max_pool_forward(x, None, False, kernel, stride, padding)
            assert indices.dtype == torch.uint8 and indices.nbytes == y.numel()
            assert torch.equal(found.nan_to_num(99), y.nan_to_num(99)), k.name
            back = k.max_pool_backward(grad, indices, x, kernel, stride, padding)
            torch.testing.assert_close(back, expected.to(dtype), msg=k.name)


@pytest.mark.parametrize(
    ("index", "value", "error", "words"),
    [
        (0, None, ValueError, "0.weight must have 4 dimensions"),
        (0, torch.randn(4, 7, 1, 1).double(), ValueError, "0.weight .* reads 7 channels, and is given 8"),
        (0, torch.randn(4, 8, 1, 1), TypeError, "0.weight must have the input's dtype"),
        (2, torch.ones(5).double(), ValueError, r"0.norm_weight must have the shape \(4,\)"),
        (12, torch.randn(9, 4, 1, 1).double(), ValueError, "2.norm_weight must have the shape"),
        (11, torch.ones(3).double(), ValueError, "1.running_var must have the shape"),
        (11, None, ValueError, "1.running_mean and running_var must both be given, or neither"),
        (0, [1.0], TypeError, r"tensors\[0\] \(0.weight\) must be a torch.Tensor, got list"),
        (9, torch.nn.ReLU(), TypeError, r"tensors\[9\] \(1.norm_bias\) must be a torch.Tensor, got ReLU"),
        (8, torch.ones(4), TypeError, "1.norm_weight must be of the input's dtype torch.float64, got torch.float32"),
        (10, torch.zeros(4).long(), TypeError, "1.running_mean must be of the input's dtype"),
        # A dispatcher that sees one tensor without data runs the fake kernel: uninitialised memory came back.
        (2, torch.ones(4).double().to("meta"), ValueError, "0.norm_weight must be on cpu as the input is, got meta"),
        (6, torch.ones(4, 4, 3, 3).double().to("meta"), ValueError, "1.weight must be on cpu as the input is"),
    ],
)
def test_bad_tensors_are_named_before_anything_is_written(index, value, error, words):
    spec, x, tensors = make("bottleneck")
    tensors = [t if t is None else t.clone() for t in tensors]
    tensors[index] = value
    before = [t.clone() if isinstance(t, torch.Tensor) and not t.is_meta else None for t in tensors]
    with pytest.raises(error, match=words):
        residual_block(x, spec, tensors, training=True)
    assert all(a is None or torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"input": torch.randn(2, 8, 7)}, ValueError, "input must have 4 dimensions"),
        ({"input": torch.ones(2, 8, 7, 7).int()}, TypeError, "input must be one of"),
        ({"input": torch.ones(1, 8, 1, 1).double()}, ValueError, "Expected more than 1 value per channel"),
        ({"tensors": []}, ValueError, "tensors must hold 18 entries"),
        ({"training": (True, False)}, ValueError, r"training must be one value or 3 \(one per unit\), got 2"),
        ({"recompute": "all"}, ValueError, "recompute must be one of"),
        ({"recompute": ["none"]}, ValueError, "recompute must be one of"),
        ({"spec": SAME}, TypeError, "spec must be a fused_res.BlockSpec, got UnitSpec"),
        ({"tensors": torch.ones(18)}, TypeError, "tensors must be a list or tuple, got Tensor"),
        ({"training": "yes"}, TypeError, "training must be True or False, or one of them for each unit, got 'yes'"),
        ({"training": [True, None, False]}, TypeError, "training must be True or False"),
        ({"momentum": None}, TypeError, "momentum must be a number, got None"),
        ({"momentum": [0.1, 0.1, float("inf")]}, ValueError, "momentum must be finite"),
        ({"process_group": 3}, TypeError, "process_group must be a torch.distributed.ProcessGroup"),
        ({"spec": BlockSpec((UnitSpec(), SAME, UnitSpec(eps=0.0)))}, ValueError, "eps must be above 0 when training"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
        (
            {"spec": BlockSpec((UnitSpec(), SAME, UnitSpec(eps=0.0)), "identity")},
            ValueError,
            "2.eps must be above 0",
        ),
        ({"spec": BlockSpec((UnitSpec(), SAME, UnitSpec((2, 2))), "identity")}, ValueError, "cannot be added"),
        ({"spec": BlockSpec((UnitSpec((9, 9), (0, 0), (9, 9)), SAME, SAME))}, ValueError, "cannot|too small|reads"),
    ],
)
def test_bad_arguments(change, error, words):
    spec, x, tensors = make("bottleneck")
    arguments = {"input": x, "spec": spec, "tensors": tensors, "training": True} | change
    if "cannot|too" in words:
        arguments["tensors"] = [torch.randn(4, 8, 3, 3).double(), *tensors[1:]]
    with pytest.raises(error, match=words):
        residual_block(**arguments)


def test_specs():
    for spec, _ in BLOCKS.values():
        assert BlockSpec.decode(*spec.encode()) == spec
        assert len(spec.tensor_names()) == 6 * len(spec.convolutions)
    for bad in (
        lambda: BlockSpec(()),
        lambda: BlockSpec((SAME,), "maybe"),
        lambda: BlockSpec((SAME,), SAME),
        lambda: BlockSpec((SAME,), "identity", PoolSpec()),
        lambda: UnitSpec(activation="gelu"),
        lambda: UnitSpec(stride=(0, 1)),
        lambda: UnitSpec(groups=0),
        lambda: PoolSpec((17, 17)),
        lambda: PoolSpec((2, 2), padding=(2, 2)),
        lambda: UnitSpec(stride=1),
        lambda: UnitSpec((1,), (1, 1), (1, 1)),
        lambda: UnitSpec((), (), ()),
        lambda: UnitSpec(groups="1"),
        lambda: UnitSpec(eps=-1e-5),
        lambda: UnitSpec(eps=None),
        lambda: PoolSpec(3, 2, 1),
        lambda: PoolSpec((3, 3, 3)),
        lambda: PoolSpec((3.0, 3.0)),
        lambda: BlockSpec(SAME),
        lambda: BlockSpec([SAME]),
        lambda: BlockSpec((SAME,), pool=(3, 3)),
        lambda: BlockSpec((SAME, UnitSpec((1,), (1,), (1,)))),
    ):
        with pytest.raises((ValueError, TypeError), match="must|may|goes with|has no activation"):
            bad()


@pytest.mark.parametrize("autocast", [False, True])
def test_what_is_no_tensor_is_named_under_autocast_too(autocast):
    spec, x, tensors = make("bottleneck", dtype=torch.float32)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        pytest.raises(TypeError, match=r"tensors\[1\] \(0.bias\) must be a torch.Tensor, got float"),
    ):
        residual_block(x, spec, [tensors[0], 1.0, *tensors[2:]], training=True)
