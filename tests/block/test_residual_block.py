"""residual_block compared with stock PyTorch in float64 at every recompute level, and the bytes saved for backward."""

import itertools

import pytest
import torch
from torch.nn import functional as F

import fused_res
from fused_res import BlockSpec, PoolSpec, UnitSpec
from fused_res.functional import residual_block
from fused_res.testing import assert_within_stock_error
from tests.support.cpu_backends import BACKENDS as EVERY
from tests.support.cpu_backends import FAST_BACKENDS
from tests.support.stock_pytorch import residual_block as stock

BACKENDS = [*FAST_BACKENDS, "reference, fused"]
RECOMPUTE_LEVELS = ("none", "norm", "conv")
SAME = UnitSpec(padding=(1, 1))

# The spec, and for every convolution, the projection last: input channels, output channels, kernel size
BLOCK_SPECS = {
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
    "no final activation": (BlockSpec((SAME, UnitSpec(activation="identity")), "identity"), [(8, 6, 3), (6, 8, 1)]),
    "stem": (BlockSpec((UnitSpec((2, 2), (3, 3)),), pool=PoolSpec()), [(8, 6, 7)]),
    "sequence": (BlockSpec((UnitSpec((1,), (1,), (1,)),), "identity"), [(8, 8, 3)]),
    "activations": (
        BlockSpec(
            (
                UnitSpec(activation="silu"),
                UnitSpec(padding=(1, 1), activation="leaky_relu", negative_slope=0.2),
                UnitSpec(activation="relu6"),
            )
        ),
        [(8, 4, 1), (4, 4, 3), (4, 8, 1)],
    ),
    "inner activations": (
        BlockSpec(
            (UnitSpec(activation="relu6"), UnitSpec((2, 2), (1, 1), activation="silu"), UnitSpec()),
            UnitSpec((2, 2), activation="identity"),
        ),
        [(8, 4, 1), (4, 4, 3), (4, 12, 1), (8, 12, 1)],
    ),
    "stem with SiLU": (BlockSpec((UnitSpec((2, 2), (3, 3), activation="silu"),), pool=PoolSpec()), [(8, 6, 7)]),
}


@pytest.fixture
def backend(request):
    """The backend's name; for "NAME, fused" with fused convolution algorithms wherever supported, as for a GPU's."""
    name, _, convolution = request.param.partition(", ")
    with fused_res.backends.use("auto", convolution or ("fused" if name == "cuda" else "planned")):
        yield name


def make_block_case(name, dtype=torch.float64, bias=False, batch=3, size=7):
    spec, convolutions = BLOCK_SPECS[name]
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


def clone_with_grad(tensors, frozen=()):
    """Return clones of the tensors; parameters require a gradient unless their index is in ``frozen``."""
    copies = [None if t is None else t.clone() for t in tensors]
    for index, t in enumerate(copies):
        if t is not None and index % 6 < 4 and index not in frozen:
            t.requires_grad_()
    return copies


def run_forward_backward(function, x, tensors, grad=None, frozen_input=False):
    """Return the output, the gradients of every tensor that requires one, and all tensors after the call."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_(not frozen_input)
    y = function(x, tensors)
    sources = [t for t in (x, *tensors) if t is not None and t.requires_grad]
    if grad is None:
        grad = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    grads = torch.autograd.grad(y, sources, grad) if sources else []
    return [y.detach(), *grads, *(t.detach() for t in tensors if t is not None)]


def assert_all_close(actual, expected):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("recompute", RECOMPUTE_LEVELS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", BLOCK_SPECS)
def test_matches_stock(name, training, recompute, backend):
    for channels_last, bias in itertools.product((True, False), repeat=2):
        spec, x, tensors = make_block_case(name, bias=bias)
        if channels_last and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)

        def ours(x, tensors, spec=spec):
            return residual_block(x, spec, tensors, training=training, recompute=recompute, backend=backend)

        found = run_forward_backward(ours, x, clone_with_grad(tensors))
        assert_all_close(
            found,
            run_forward_backward(lambda x, t, spec=spec: stock(x, spec, t, training), x, clone_with_grad(tensors)),
        )


@pytest.mark.parametrize("name", ["bottleneck", "projection", "basic", "grouped", "stem"])
def test_input_smaller_than_the_kernel(name):
    """Filter taps that only overlap the padding are removed from the weight; their gradient is zero."""
    for size, last in itertools.product((1, 2, 3, 4), (True, False)):
        spec, x, tensors = make_block_case(name, batch=5, size=size)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        ours = run_forward_backward(
            lambda x, t, s=spec: residual_block(x, s, t, training=True), x, clone_with_grad(tensors)
        )
        assert_all_close(ours, run_forward_backward(lambda x, t, s=spec: stock(x, s, t), x, clone_with_grad(tensors)))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_projection_of_1d_input(backend):
    """With a stride too, and with inputs of length 1, which a stride does not shorten."""
    for stride, size in itertools.product((1, 2), (1, 5)):
        unit = UnitSpec((stride,), (1,), (1,))
        spec = BlockSpec((unit,), UnitSpec((stride,), (0,), (1,), activation="identity"))
        generator = torch.Generator().manual_seed(0)
        tensors = []
        for kernel in (3, 1):
            weight = torch.randn(6, 4, kernel, generator=generator, dtype=torch.float64)
            tensors += [weight, None, *torch.rand(4, 6, generator=generator, dtype=torch.float64).add(0.5)]
        x = torch.randn(3, 4, size, generator=generator, dtype=torch.float64)
        ours = run_forward_backward(
            lambda x, t, s=spec: residual_block(x, s, t, training=True, backend=backend), x, clone_with_grad(tensors)
        )
        assert_all_close(ours, run_forward_backward(lambda x, t, s=spec: stock(x, s, t), x, clone_with_grad(tensors)))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_mixed_memory_formats(backend):
    """The bits of the ReLU mask have one order, whatever the memory formats of input, weights and gradient.

    A channels_last weight makes the convolution's output channels_last, a 1x1 weight has either format, and the
    gradient's format is independent of both.
    """
    for name, x_last, weights_last, grad_last in itertools.product(("projection", "basic"), *[(True, False)] * 3):
        spec, x, tensors = make_block_case(name, size=8)
        formats = {True: torch.channels_last, False: torch.contiguous_format}
        x = x.contiguous(memory_format=formats[x_last])
        tensors = [
            t.contiguous(memory_format=formats[weights_last]) if t is not None and t.dim() == 4 else t for t in tensors
        ]
        y = stock(x, spec, tensors)
        grad = torch.randn_like(y).contiguous(memory_format=formats[grad_last])
        ours = run_forward_backward(
            lambda x, t, s=spec: residual_block(x, s, t, training=True, backend=backend),
            x,
            clone_with_grad(tensors),
            grad,
        )
        assert_all_close(
            ours, run_forward_backward(lambda x, t, s=spec: stock(x, s, t), x, clone_with_grad(tensors), grad)
        )


@pytest.mark.parametrize("recompute", RECOMPUTE_LEVELS)
@pytest.mark.parametrize("name", ["bottleneck", "projection", "stem"])
def test_frozen_tensors(name, recompute):
    """With any tensors frozen, the other gradients match stock PyTorch, and no more bytes are saved than by it."""
    spec, x, tensors = make_block_case(name, dtype=torch.float32)
    spec64, x64, tensors64 = make_block_case(name)
    parameters = [i for i, t in enumerate(tensors) if t is not None and i % 6 < 4]
    first_unit, last_weight = parameters[:3], parameters[-3:-2]
    weights = [i for i in parameters if i % 6 == 0]
    for frozen, frozen_input in itertools.product(
        ([], first_unit, last_weight, weights, parameters[:-1], [i for i in parameters if i % 6]), (True, False)
    ):
        ours = run_forward_backward(
            lambda x, t: residual_block(x, spec64, t, training=True, recompute=recompute),
            x64, clone_with_grad(tensors64, frozen), frozen_input=frozen_input,
        )  # fmt: skip
        assert_all_close(
            ours,
            run_forward_backward(
                lambda x, t: stock(x, spec64, t), x64, clone_with_grad(tensors64, frozen), frozen_input=frozen_input
            ),
        )
        if recompute == "none":
            x32 = x.clone().requires_grad_(not frozen_input)
            mine = count_saved_bytes(
                lambda t: residual_block(x32, spec, t, training=True), clone_with_grad(tensors, frozen)
            )
            theirs = count_saved_bytes(lambda t: stock(x32, spec, t), clone_with_grad(tensors, frozen))
            # On 7x7 feature maps, the masks and the saved statistics (5 values per channel) are larger than stock
            # PyTorch's two vectors (mean, invstd); at realistic sizes both are negligible.
            small = sum(5 * 4 * t.shape[0] for t in tensors if t is not None and t.dim() == 1) + x.numel() // 8 * 4
            assert mine <= theirs + small, (frozen, frozen_input)


def count_saved_bytes(function, tensors):
    """Return the bytes that autograd saves for backward, without the tensors themselves and the output."""
    sizes = {}

    def pack(t):
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function(tensors)
    for t in tensors:
        if t is not None:
            sizes.pop(t.untyped_storage().data_ptr(), None)
    # Stock PyTorch saves the output of the last ReLU, which exists anyway as the next block's input.
    sizes.pop(y.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


def test_saved_bytes_of_recompute_levels():
    spec, x, tensors = make_block_case("projection", torch.float32, batch=4, size=16)
    x.requires_grad_()
    pixels, strided = 4 * 16 * 16 * 4, 4 * 8 * 8 * 4
    small = 4 * 5 * (4 + 4 + 12 + 12) + 4 * 8 * 8 * 2 + 256  # statistics, and a mask of 12 bits per pixel in 2 bytes
    expected = {
        "none": 8 * pixels + 2 * 4 * pixels + 2 * 4 * strided + 2 * 12 * strided,  # x, z0 a0, z1 a1, z2 zs
        "norm": 8 * pixels + 4 * pixels + 4 * strided + 2 * 12 * strided,
        "conv": 8 * pixels + 4 * pixels + 4 * strided,
    }
    for level, size in expected.items():
        for format in (torch.contiguous_format, torch.channels_last):
            formatted = x.detach().contiguous(memory_format=format).requires_grad_()
            found = count_saved_bytes(
                lambda t, x=formatted, level=level: residual_block(x, spec, t, training=True, recompute=level),
                clone_with_grad(tensors),
            )
            assert size <= found <= size + small, level


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("name", ["bottleneck", "projection", "stem"])
def test_compiled_block_matches_eager(name, backend):
    """With fullgraph=True; equal values, and equal bytes saved at each recompute level."""
    spec, x, tensors = make_block_case(name, size=8)
    for recompute in RECOMPUTE_LEVELS:
        torch._dynamo.reset()

        def block(x, tensors, recompute=recompute):
            return residual_block(x, spec, tensors, training=True, recompute=recompute, backend=backend)

        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        assert_all_close(
            run_forward_backward(compiled, x, clone_with_grad(tensors)),
            run_forward_backward(block, x, clone_with_grad(tensors)),
        )
        mine = x.clone().requires_grad_()
        saved = [count_saved_bytes(lambda t, f=f: f(mine, t), clone_with_grad(tensors)) for f in (block, compiled)]
        assert saved[0] == saved[1], recompute


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_opaque_operators_pass_opcheck(backend):
    for name in ("bottleneck", "projection", "stem"):
        spec, x, tensors = make_block_case(name)
        flat = [t for index, t in enumerate(clone_with_grad(tensors)) if t is not None and index % 6 < 4]
        present = [t is not None and index % 6 < 4 for index, t in enumerate(tensors)]
        ints, floats = spec.encode()
        flags, training = [True, *present], [True] * len(spec.convolutions)
        args = (x.requires_grad_(), flat, present, ints, floats, training, flags, False, "norm", backend)
        args += (fused_res.backends.registry.conv_preference(), "")
        torch.library.opcheck(torch.ops.fused_res.block_forward.default, args, test_utils="test_schema")
        torch.library.opcheck(torch.ops.fused_res.block_forward.default, args, test_utils="test_faketensor")
        torch.library.opcheck(torch.ops.fused_res.block_forward.default, args, test_utils="test_autograd_registration")


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_only_a_convolution_bias_requires_grad(training, backend):
    """The convolution's input is then neither saved nor needed."""
    for name in ("plain", "bottleneck"):
        spec, x, tensors = make_block_case(name, bias=True)
        x = x.contiguous(memory_format=torch.channels_last)
        frozen = set(range(len(tensors))) - {1}

        def ours(x, t, spec=spec):
            return residual_block(x, spec, t, training=training, backend=backend)

        found = run_forward_backward(ours, x, clone_with_grad(tensors, frozen), frozen_input=True)
        expected = run_forward_backward(
            lambda x, t, s=spec: stock(x, s, t, training), x, clone_with_grad(tensors, frozen), frozen_input=True
        )
        assert_all_close(found, expected)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("name", ["bottleneck", "projection", "stem"])
def test_gradcheck_and_gradgradcheck(name, backend):
    spec, x, tensors = make_block_case(name, batch=2, size=4)
    parameters = clone_with_grad(tensors)
    for training in (True, False):

        def function(x, weight, training=training):
            return residual_block(x, spec, [weight, *parameters[1:]], training=training, backend=backend)

        inputs = (x.requires_grad_(), parameters[0].detach().requires_grad_())
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def second_derivatives(function, x, tensors, required):
    """Return the gradients of the tensors at the indices ``required`` (-1: the input), and their second derivatives.

    The second derivatives are those of a fixed linear combination of the gradients, with respect to the same tensors
    and to the gradient of the output.
    """
    x = x.clone(memory_format=torch.preserve_format).requires_grad_(-1 in required)
    tensors = [None if t is None else t.clone().requires_grad_(at in required) for at, t in enumerate(tensors)]
    y = function(x, tensors)
    sources = [x if at == -1 else tensors[at] for at in required]
    dy = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape).requires_grad_()
    grads = torch.autograd.grad(y, sources, dy, create_graph=True)
    combination = sum((g * torch.linspace(1, 3, g.numel(), dtype=g.dtype).view(g.shape)).sum() for g in grads)
    return [*grads, *torch.autograd.grad(combination, [*sources, dy], materialize_grads=True)]


def required_subsets(tensors, units):
    """Yield every subset of {input} and, for main path and projection, {weight, bias, norm weight, norm bias}.

    Then, for each unit, every subset of its tensors alone.
    """
    chain = [6 * unit for unit in range(units)]
    projection = [6 * units] if len(tensors) > 6 * units else []
    choices = [[-1], *([first + kind for first in part] for part in (chain, projection) for kind in range(4))]
    per_unit = [[[first + kind] for kind in range(4)] for first in chain]
    for groups in (list(filter(None, choices)), *per_unit):
        for size in range(1, len(groups) + 1):
            for subset in itertools.combinations(groups, size):
                yield sorted(itertools.chain(*subset))


# Double backward reads the values that the plan saves: one backend with an unfused plan, and one with a fused plan.
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name in ("cpu", "reference, fused")], indirect=True)
@pytest.mark.parametrize("recompute", RECOMPUTE_LEVELS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["bottleneck", "projection", "no final activation", "plain", "stem", "sequence"])
def test_second_derivatives_of_every_subset(name, training, recompute, backend):
    """Double backward needs nothing that the first backward did not save, whichever tensors require a gradient."""
    spec, x, tensors = make_block_case(name, bias=True, batch=2, size=3)
    for at, required in enumerate(required_subsets(tensors, len(spec.units))):
        if x.dim() == 4:
            x = x.contiguous(memory_format=(torch.contiguous_format, torch.channels_last)[at % 2])
        ours = second_derivatives(
            lambda x, t: residual_block(x, spec, t, training=training, recompute=recompute, backend=backend),
            x, tensors, required,
        )  # fmt: skip
        theirs = second_derivatives(lambda x, t: stock(x, spec, t, training), x, tensors, required)
        names = ["input" if index == -1 else spec.tensor_names()[index] for index in required]
        for source, a, b in zip([*names, *names, "dy"], ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8, msg=lambda m, s=source, r=names: f"{s} of {r}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_output_is_within_stock_error(dtype):
    """The accuracy criterion holds, against float64 on the same rounded inputs."""
    for name, training in itertools.product(("bottleneck", "projection"), (True, False)):
        spec, x, tensors = make_block_case(name, dtype, batch=8, size=14)
        tensors = [t if t is None or i % 6 < 2 else t.float() for i, t in enumerate(tensors)]
        wide = [None if t is None else t.double() for t in tensors]
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            ours = residual_block(x, spec, [None if t is None else t.clone() for t in tensors], training=training)
            theirs = stock(x, spec, [None if t is None else t.clone() for t in tensors], training)
            exact = stock(x.double(), spec, wide, training)
        assert_within_stock_error(f"{name} output", ours, theirs, exact)


def test_autocast_matches_stock():
    spec, x, tensors = make_block_case("plain", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = run_forward_backward(lambda x, t: residual_block(x, spec, t, training=True), x, clone_with_grad(tensors))
        theirs = run_forward_backward(lambda x, t: stock(x, spec, t), x, clone_with_grad(tensors))
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 0.05 * (1 + b.abs().max())


def test_running_statistics_update_once_under_checkpointing():
    """Activation checkpointing recomputes the block in backward, which must not update the running statistics again."""
    spec, x, tensors = make_block_case("bottleneck")
    once, twice = clone_with_grad(tensors), clone_with_grad(tensors)
    residual_block(x.requires_grad_(), spec, once, training=True).sum().backward()
    torch.utils.checkpoint.checkpoint(
        lambda x: residual_block(x, spec, twice, training=True), x, use_reentrant=False
    ).sum().backward()
    assert_all_close([t.detach() for t in once if t is not None], [t.detach() for t in twice if t is not None])


def test_training_and_momentum_per_unit():
    spec, x, tensors = make_block_case("projection")
    flags, momenta = (True, False, True, False), (0.1, 0.2, 0.3, 0.4)
    for grad in (True, False):
        mine, theirs = clone_with_grad(tensors), clone_with_grad(tensors)
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
    """Ties and NaN select the same element as PyTorch, so that the same element receives the gradient."""
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
        # The values are small integers, so float64 selects the same elements; 16-bit sums are rounded once.
        exact = x.double().requires_grad_()
        (expected,) = torch.autograd.grad(F.max_pool2d(exact, kernel, stride, padding), exact, grad.double())
        for k in kernels:
            found, indices = k.max_pool_forward(x, None, False, kernel, stride, padding)
            assert indices.dtype == torch.uint8 and indices.nbytes == y.numel()
            assert torch.equal(found.nan_to_num(99), y.nan_to_num(99)), k.name
            back = k.max_pool_backward(grad, indices, x, kernel, stride, padding)
            torch.testing.assert_close(back, expected.to(dtype), msg=k.name)


@pytest.mark.parametrize(
    ("index", "value", "error", "message"),
    [
        (0, None, ValueError, "0.weight must have 4 dimensions"),
        (0, torch.randn(4, 7, 1, 1).double(), ValueError, "0.weight .* expects 7 input channels, got 8"),
        (0, torch.randn(4, 8, 1, 1), TypeError, "0.weight must have the input's dtype"),
        (2, torch.ones(5).double(), ValueError, r"0.norm_weight must have the shape \(4,\)"),
        (12, torch.randn(9, 4, 1, 1).double(), ValueError, "2.norm_weight must have the shape"),
        (11, torch.ones(3).double(), ValueError, "1.running_var must have the shape"),
        (11, None, ValueError, "1.running_mean and running_var must both be given, or neither"),
        (0, [1.0], TypeError, r"tensors\[0\] \(0.weight\) must be a torch.Tensor, got list"),
        (9, torch.nn.ReLU(), TypeError, r"tensors\[9\] \(1.norm_bias\) must be a torch.Tensor, got ReLU"),
        (8, torch.ones(4), TypeError, "1.norm_weight must have the input's dtype torch.float64, got torch.float32"),
        (10, torch.zeros(4).long(), TypeError, "1.running_mean must have the input's dtype"),
        # If an operand is a meta tensor, the dispatcher runs the fake kernel, which would return uninitialized memory.
        (2, torch.ones(4).double().to("meta"), ValueError, "0.norm_weight must be on the input's device cpu, got meta"),
        (6, torch.ones(4, 4, 3, 3).double().to("meta"), ValueError, "1.weight must be on the input's device cpu"),
    ],
)
def test_invalid_tensor_raises_without_side_effects(index, value, error, message):
    spec, x, tensors = make_block_case("bottleneck")
    tensors = [t if t is None else t.clone() for t in tensors]
    tensors[index] = value
    before = [t.clone() if isinstance(t, torch.Tensor) and not t.is_meta else None for t in tensors]
    with pytest.raises(error, match=message):
        residual_block(x, spec, tensors, training=True)
    assert all(a is None or torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.randn(2, 8, 7)}, ValueError, "input must have 4 dimensions"),
        ({"input": torch.ones(2, 8, 7, 7).int()}, TypeError, "input's dtype must be one of"),
        ({"input": torch.ones(1, 8, 1, 1).double()}, ValueError, "Expected more than 1 value per channel"),
        ({"tensors": []}, ValueError, "tensors must have 18 entries"),
        ({"training": (True, False)}, ValueError, r"training must be one value or 3 \(one per unit\), got 2"),
        ({"recompute": "all"}, ValueError, "recompute must be one of"),
        ({"recompute": ["none"]}, ValueError, "recompute must be one of"),
        ({"spec": SAME}, TypeError, "spec must be a fused_res.BlockSpec, got UnitSpec"),
        ({"tensors": torch.ones(18)}, TypeError, "tensors must be a list or tuple, got Tensor"),
        ({"training": "yes"}, TypeError, "training must be True or False, or one of them per unit, got 'yes'"),
        ({"training": [True, None, False]}, TypeError, "training must be True or False"),
        ({"momentum": None}, TypeError, "momentum must be a number, got None"),
        ({"momentum": [0.1, 0.1, float("inf")]}, ValueError, "momentum must be finite"),
        ({"process_group": 3}, TypeError, "process_group must be a torch.distributed.ProcessGroup"),
        ({"spec": BlockSpec((UnitSpec(), SAME, UnitSpec(eps=0.0)))}, ValueError, "eps must be positive when training"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
        (
            {"spec": BlockSpec((UnitSpec(), SAME, UnitSpec(eps=0.0)), "identity")},
            ValueError,
            "2.eps must be positive",
        ),
        ({"spec": BlockSpec((UnitSpec(), SAME, UnitSpec((2, 2))), "identity")}, ValueError, "cannot be added"),
        ({"spec": BlockSpec((UnitSpec((9, 9), (0, 0), (9, 9)), SAME, SAME))}, ValueError, "cannot|too small|expects"),
    ],
)
def test_invalid_argument_raises(change, error, message):
    spec, x, tensors = make_block_case("bottleneck")
    arguments = {"input": x, "spec": spec, "tensors": tensors, "training": True} | change
    if "cannot|too" in message:
        arguments["tensors"] = [torch.randn(4, 8, 3, 3).double(), *tensors[1:]]
    with pytest.raises(error, match=message):
        residual_block(**arguments)


def test_spec_encoding_and_validation():
    for spec, _ in BLOCK_SPECS.values():
        assert BlockSpec.decode(*spec.encode()) == spec
        assert len(spec.tensor_names()) == 6 * len(spec.convolutions)
    for invalid in (
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
        with pytest.raises((ValueError, TypeError), match="must|may|has no activation"):
            invalid()


@pytest.mark.parametrize("autocast", [False, True])
def test_error_names_an_argument_that_is_not_a_tensor(autocast):
    spec, x, tensors = make_block_case("bottleneck", dtype=torch.float32)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        pytest.raises(TypeError, match=r"tensors\[1\] \(0.bias\) must be a torch.Tensor, got float"),
    ):
        residual_block(x, spec, [tensors[0], 1.0, *tensors[2:]], training=True)


@pytest.mark.parametrize("backend", [*EVERY, "reference, fused"], indirect=True)
def test_parameter_gradients_are_independent(backend):
    """Gradients of a norm may share one tensor of two rows, but no element of it, and keep no larger buffer alive."""
    spec, x, tensors = make_block_case("bottleneck", torch.float32)
    tensors = clone_with_grad(tensors)
    with fused_res.backends.use("auto", "fused"):
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        residual_block(x, spec, tensors, training=True, backend=backend).square().sum().backward()
    for weight, bias in ((tensors[i], tensors[i + 1]) for i in range(2, len(tensors), 6)):
        assert weight.grad.untyped_storage().nbytes() <= 2 * weight.grad.nbytes
        before = bias.grad.clone()
        weight.grad += 1
        assert torch.equal(bias.grad, before)
