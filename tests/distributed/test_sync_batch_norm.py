"""Synchronized batch norm: several processes match one process with the whole batch, for any split of the batch."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import fsdp
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fused_res
from fused_res import functional, models, ops
from fused_res import nn as fnn
from fused_res.backends.reference import batch_norm_act as norm
from fused_res.backends.reference import batch_norm_sync as reference_sync
from fused_res.testing import assert_within_stock_error, stub_torchvision_operators
from tests.block.test_residual_block import (
    BLOCK_SPECS,
    RECOMPUTE_LEVELS,
    assert_all_close,
    clone_with_grad,
    make_block_case,
    run_forward_backward,
)
from tests.block.test_residual_block import stock as stock_block
from tests.support.cpu_backends import BACKENDS as EVERY
from tests.support.cpu_backends import FAST_BACKENDS
from tests.support.distributed_workers import worker_group

BACKENDS = [*FAST_BACKENDS, "reference, fused"]
SIZES = [(3, 5), (4, 0, 1, 3)]  # batch size of each rank
FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    with worker_group(2, tmp_path_factory.mktemp("two")) as group:
        yield group


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    with worker_group(4, tmp_path_factory.mktemp("four")) as group:
        yield group


@pytest.fixture(params=SIZES, ids=str)
def sizes(request):
    return request.param


@pytest.fixture
def group(request, sizes):
    return request.getfixturevalue("two" if len(sizes) == 2 else "four")


def rank_slice(sizes):
    start = sum(sizes[: dist.get_rank()])
    return slice(start, start + sizes[dist.get_rank()])


def combine_ranks(rank_results, kind_of):
    """Combine the tensors that the ranks returned.

    Args:
        rank_results: the list of tensors of each rank.
        kind_of: maps a tensor's index to "batch" (concatenated along the batch), "sum" (added) or "equal" (checked to
            be equal on all ranks).
    """
    combined = []
    for index, tensors in enumerate(zip(*rank_results, strict=True)):
        kind = kind_of(index)
        if kind == "equal":
            assert all(torch.equal(tensors[0], other) for other in tensors[1:])
        combined.append(torch.cat(tensors) if kind == "batch" else sum(tensors) if kind == "sum" else tensors[0])
    return combined


# --- the kernels ---


@pytest.mark.parametrize("backend", [name for name in FAST_BACKENDS if name != "cuda"])  # tested in test_gpu_kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 7, 9), (4, 33, 8, 8), (2, 3, 150, 150), (5, 16, 1, 1), (0, 7, 3, 3)], ids=str)
def test_statistics_and_backward(backend, dtype, format, shape):
    kernels = fused_res.backends.resolve(backend, torch.device("cpu"))
    torch.manual_seed(0)

    def images():
        return (3 * torch.randn(shape) + 20).to(dtype).contiguous(memory_format=format)

    x, residual, dy = images(), images(), images()
    count, accumulated = x.numel() // shape[1], ops.stats_dtype(dtype)
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    partials = kernels.batch_norm_partials(x)
    assert partials.shape == (1, 3, shape[1])
    torch.testing.assert_close(partials, reference_sync.batch_norm_partials(x.double()), **tolerance)
    stats, residual_stats = (
        kernels.merge_stats(kernels.batch_norm_partials(t), None, None, 1e-3, dtype == torch.float64)
        for t in (x, residual)
    )
    mask = norm.pack_mask(images() > 20)
    for relu_mask, activation, pair in (
        (mask, "identity", False),
        (None, "relu", False),
        (None, "identity", False),
        (mask, "identity", True),
        (None, "relu6", False),
        (None, "leaky_relu", False),
        (None, "silu", False),
    ):
        pair_args = (residual, residual_stats) if pair else (None, None)
        wide = [None if t is None else t.double() for t in (dy, x, stats, *pair_args)]
        sums = kernels.batch_norm_sums(dy, x, stats, relu_mask, activation, *pair_args)
        exact = reference_sync.batch_norm_sums(*wide[:3], relu_mask, activation, *wide[3:])
        assert sums.dtype == accumulated and sums.shape == exact.shape
        scale = 25 * count**0.5 + 1  # magnitude of a sum of `count` values
        torch.testing.assert_close(sums.double(), exact, rtol=tolerance["rtol"], atol=tolerance["atol"] * scale)
        for terms in (sums[:2].contiguous(), None):
            dx = kernels.batch_norm_act_dx(dy, x, stats, relu_mask, activation, terms, count)
            terms = None if terms is None else terms.double()
            exact = reference_sync.batch_norm_act_dx(*wide[:3], relu_mask, activation, terms, count)
            assert dx.dtype == dtype and dx.stride() == x.stride()
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(dx.double(), exact, rtol=4 * eps, atol=40 * eps)


def test_invalid_kernel_arguments_raise():
    kernels = fused_res.backends.resolve("cpu", torch.device("cpu"))
    x, stats = torch.randn(2, 3, 4, 4), torch.randn(5, 3)
    for call, message in (
        (
            lambda: kernels.batch_norm_sums(x, x, stats, None, "relu", x, None),
            "residual: expected together with residual_stats",
        ),
        (lambda: kernels.batch_norm_sums(x, x, stats[:4], None, "relu", None, None), r"stats: expected \(5, 3\)"),
        (
            lambda: kernels.batch_norm_act_dx(x, x, stats, None, "relu", torch.randn(3, 3), 32),
            r"sums: expected \(2, 3\)",
        ),
        (lambda: kernels.batch_norm_act_dx(x[1:], x, stats, None, "relu", None, 32), "grad_output: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# --- a block ---


def block_on_rank(name, sizes, recompute, backend, channels_last, dtype=torch.float64, frozen=(), training=True):
    """Return output and gradients for this rank's part of the batch, and the updated tensors."""
    backend, _, convolution = backend.partition(", ")
    spec, x, tensors = make_block_case(name, dtype, bias=True, batch=sum(sizes))
    with torch.no_grad():
        shape = stock_block(x, spec, clone_with_grad(tensors), training).shape
    rows = rank_slice(sizes)
    x = x[rows]
    x = x.contiguous(memory_format=torch.channels_last) if channels_last and x.dim() == 4 else x.contiguous()
    grad = torch.linspace(-1, 2, shape.numel(), dtype=torch.float64).to(dtype).view(shape)[rows]

    def ours(x, tensors):
        return functional.residual_block(
            x, spec, tensors, training=training, recompute=recompute, backend=backend, process_group=dist.group.WORLD
        )

    with fused_res.backends.use("auto", convolution or ("fused" if backend == "cuda" else "planned")):
        return run_forward_backward(ours, x, clone_with_grad(tensors, frozen), grad)


def combine_block(rank_results, name, frozen=()):
    tensors = make_block_case(name, bias=True)[2]
    gradients = sum(t is not None and i % 6 < 4 and i not in frozen for i, t in enumerate(tensors))
    return combine_ranks(
        rank_results, lambda index: "batch" if index < 2 else "sum" if index < 2 + gradients else "equal"
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", BLOCK_SPECS)
def test_block_matches_one_process(group, sizes, name, backend):
    spec, x, tensors = make_block_case(name, bias=True, batch=sum(sizes))
    one = run_forward_backward(lambda x, t: stock_block(x, spec, t), x, clone_with_grad(tensors))
    for recompute, channels_last in itertools.product(RECOMPUTE_LEVELS, (True, False)):
        parts = group.run(block_on_rank, name, sizes, recompute, backend, channels_last)
        assert_all_close(combine_block(parts, name), one)


@pytest.mark.parametrize("name", ["bottleneck", "projection", "stem"])
def test_block_accuracy_vs_stock(group, sizes, name):
    spec, x, tensors = make_block_case(name, torch.float32, bias=True, batch=sum(sizes))
    ours = combine_block(group.run(block_on_rank, name, sizes, "none", "cpu", True, torch.float32), name)
    stock = run_forward_backward(lambda x, t: stock_block(x, spec, t), x, clone_with_grad(tensors))
    wide = [None if t is None else t.double() for t in tensors]
    grad = torch.linspace(-1, 2, stock[0].numel(), dtype=torch.float64).to(torch.float32).double().view_as(stock[0])
    exact = run_forward_backward(lambda x, t: stock_block(x, spec, t), x.double(), clone_with_grad(wide), grad)
    # The gradient of a convolution's bias before a norm is zero up to rounding, so the error's floor is relative to the
    # largest of the other gradients.
    floor = 1e-5 * max(t.abs().max().item() for t in exact[2:])
    for index, compared in enumerate(zip(ours, stock, exact, strict=True)):
        assert_within_stock_error(f"{name} {index}", *compared, floor=floor if index > 1 else 0.0)


@pytest.mark.parametrize("backend", [name for name in ("cuda", "triton") if name in EVERY])
@pytest.mark.parametrize("name", ["bottleneck", "projection"])
def test_gpu_kernels_with_operand_prologues(group, sizes, name, backend):
    """1x1 convolutions with a normalize-ReLU prologue, and gradients with a norm backward prologue."""
    spec, x, tensors = make_block_case(name, torch.float16, bias=True, batch=sum(sizes))
    # The biases are frozen: the gradient of a bias before a norm is zero, a sum of large gradients over the ranks, and
    # so consists of rounding errors only.
    biases = range(1, len(tensors), 6)
    arguments = sizes, "none", f"{backend}, fused", True, torch.float16, biases
    ours = combine_block(group.run(block_on_rank, name, *arguments), name, biases)
    wide = [None if t is None else t.double() for t in tensors]
    grad = torch.linspace(-1, 2, ours[0].numel(), dtype=torch.float64).half().double().view_as(ours[0])
    exact = run_forward_backward(lambda x, t: stock_block(x, spec, t), x.double(), clone_with_grad(wide, biases), grad)

    def block(x, tensors):
        return functional.residual_block(x, spec, tensors, training=True, backend=backend)

    with fused_res.backends.use("auto", "fused"):
        one = run_forward_backward(
            block, x.contiguous(memory_format=torch.channels_last), clone_with_grad(tensors, biases), grad.half()
        )
    for index, (ranks, single, expected) in enumerate(zip(ours, one, exact, strict=True)):
        # In 16 bits, rounding flips the ReLU of some elements near zero, so gradients are compared by their norms.
        error, limit, size = (ranks.double() - expected).norm(), (single.double() - expected).norm(), expected.norm()
        assert error <= 2 * limit + 0.005 * size + 0.01, f"{index}: {error:.3g}, one process {limit:.3g}, of {size:.3g}"


@pytest.mark.parametrize("frozen", [(0, 1), (2, 3), (0, 1, 2, 3, 6, 7, 18, 19), (*range(24),)], ids=str)
def test_requested_gradients(two, frozen):
    sizes = (3, 5)
    spec, x, tensors = make_block_case("projection", bias=True, batch=8)
    one = run_forward_backward(lambda x, t: stock_block(x, spec, t), x, clone_with_grad(tensors, frozen))
    parts = two.run(block_on_rank, "projection", sizes, "norm", "cpu", True, torch.float64, frozen)
    assert_all_close(combine_block(parts, "projection", frozen), one)


def test_frozen_norms_are_not_synchronized(two):
    """Units that use running statistics communicate nothing; the other units synchronize as usual."""
    spec, x, tensors = make_block_case("projection", bias=True, batch=8)
    training = (True, False, True, False)
    one = run_forward_backward(lambda x, t: stock_block(x, spec, t, training), x, clone_with_grad(tensors))
    arguments = "projection", (3, 5), "none", "cpu", True, torch.float64, (), training
    assert_all_close(combine_block(two.run(block_on_rank, *arguments), "projection"), one)


def record_collectives(name):
    """Return every collective of a block's training step: whether it is an all-gather, and the elements per rank."""
    calls = []
    gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    originals = {function: getattr(dist, function) for function in (gather, "all_reduce")}

    def spy(function):
        def call(*tensors, **options):
            calls.append((function, tensors[-1].numel()))
            return originals[function](*tensors, **options)

        return call

    for function in originals:
        setattr(dist, function, spy(function))
    try:
        block_on_rank(name, (3, 5), "none", "cpu", True)
    finally:
        for function, original in originals.items():
            setattr(dist, function, original)
    return [(function.startswith("all_gather"), elements) for function, elements in calls]


def test_collective_payloads(two):
    """Each norm communicates (count, mean, M2) in the forward, and two sums and the count in the backward.

    A norm pair (the norms of the last unit and of the projection) communicates three sums in the backward.
    """
    for calls in two.run(record_collectives, "bottleneck"):
        assert calls == [(True, 12), (True, 12), (True, 24), (False, 17), (False, 9), (False, 9)]
    for calls in two.run(record_collectives, "projection"):
        assert calls == [(True, 12), (True, 12), (True, 36), (True, 36), (False, 37), (False, 9), (False, 9)]


def check_unsupported():
    spec, x, tensors = make_block_case("basic")
    group = dist.group.WORLD

    def block(x):
        return functional.residual_block(x, spec, tensors, training=True, process_group=group)

    def single(x):
        return functional.batch_norm_act(x, None, None, training=True, process_group=group)

    for function in (block, single):
        y = function(x.requires_grad_())
        with pytest.raises(RuntimeError, match="process_group: double backward is not supported"):
            torch.autograd.grad(y.sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="process_group: not supported under torch.func"):
            torch.func.vmap(function)(x[None])
        with pytest.raises(ValueError, match="input must not be empty in every process"):
            function(x[:0])


def test_unsupported_transforms_and_empty_batch_raise(two):
    two.run(check_unsupported)


# --- a single norm ---


def norm_on_rank(sizes, shape, format, residual, scaled, momentum):
    torch.manual_seed(1)
    rows = rank_slice(sizes)
    x, added, grad = ((torch.randn(sum(sizes), *shape, dtype=torch.float64) + 2)[rows] for _ in range(3))
    weight, bias, scale, shift, mean, var = (torch.rand(shape[0], dtype=torch.float64) + 0.5 for _ in range(6))
    if len(shape) == 3:
        x = x.contiguous(memory_format=format)
    inputs = [x, weight, bias, *([added] if residual else []), *([scale, shift] if scaled else [])]
    for tensor in inputs:
        tensor.requires_grad_()
    extra = {"residual_scale": scale, "residual_shift": shift} if scaled else {}
    group = dist.group.WORLD
    y = functional.batch_norm_act(
        x, mean, var, weight, bias, added if residual else None, True, momentum, process_group=group, **extra
    )
    return [y.detach(), *torch.autograd.grad(y, inputs, grad), mean, var]


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize(("residual", "scaled"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("shape", [(6,), (6, 5), (6, 4, 3), (3, 2, 3, 2)], ids=str)
def test_norm_matches_one_process(group, sizes, shape, residual, scaled, format):
    arguments = shape, format, residual, scaled, 0.3
    parts = group.run(norm_on_rank, sizes, *arguments)
    batched = {0, 1} | ({4} if residual else set())
    buffers = len(parts[0]) - 2
    combined = combine_ranks(parts, lambda i: "batch" if i in batched else "equal" if i >= buffers else "sum")
    torch.manual_seed(1)
    total = sum(sizes)
    x, added, grad = (torch.randn(total, *shape, dtype=torch.float64) + 2 for _ in range(3))
    weight, bias, scale, shift, mean, var = (torch.rand(shape[0], dtype=torch.float64) + 0.5 for _ in range(6))
    inputs = [x, weight, bias, *([added] if residual else []), *([scale, shift] if scaled else [])]
    for tensor in inputs:
        tensor.requires_grad_()
    z = F.batch_norm(x, mean, var, weight, bias, True, 0.3)
    if residual:
        per_channel = (-1, *(1,) * (len(shape) - 1))
        z = z + (added * scale.view(per_channel) + shift.view(per_channel) if scaled else added)
    y = F.relu(z)
    assert_all_close(combined, [y.detach(), *torch.autograd.grad(y, inputs, grad), mean, var])


# --- modules and networks ---


def network(kind="fused"):
    """Return a small network with every kind of norm that can be synchronized; kind "stock" has the same weights."""
    torch.manual_seed(0)
    first = fnn.BatchNormAct2d(3)
    trunk = models.cifar_resnet(8, 10, width=4)
    if kind != "fused":
        fused_res.unfuse(trunk)
        first.fused = False
    return nn.Sequential(first, trunk, nn.BatchNorm1d(10, momentum=None)).double()


def batch(sizes):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(sum(sizes), 3, 12, 12, generator=generator, dtype=torch.float64) * 2 + 1
    return x, torch.randint(10, (sum(sizes),), generator=generator)


def train(model, steps):
    """Return the model's state after SGD steps; each step is (input, labels, weight of the summed loss)."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for x, y, weight in steps:
        optimizer.zero_grad()
        (F.cross_entropy(model(x), y, reduction="sum") * weight).backward()
        optimizer.step()
    return [t.detach() for t in model.state_dict().values()]


def global_steps(sizes):
    x, y = batch(sizes)
    return [(x + 0.1 * step, y, 1 / sum(sizes)) for step in range(3)]


def rank_steps(sizes, format):
    """Return this rank's steps; losses are scaled by the world size, because DDP averages gradients over the ranks."""
    rows = rank_slice(sizes)
    return [
        (x[rows].contiguous(memory_format=format), y[rows], weight * dist.get_world_size())
        for x, y, weight in global_steps(sizes)
    ]


def ddp_on_rank(sizes, format, recompute):
    model = network()
    fused_res.fuse(model, recompute=recompute)
    fused_res.convert_sync_batchnorm(model)
    return train(DistributedDataParallel(model), rank_steps(sizes, format))


def assert_ranks_match_one_process(parts, sizes):
    one = train(network("stock"), global_steps(sizes))
    for part in parts:
        assert_all_close(part, one)


@pytest.mark.parametrize(("format", "recompute"), zip(FORMATS, ("none", "conv"), strict=True), ids=str)
def test_ddp_matches_one_process(group, sizes, format, recompute):
    assert_ranks_match_one_process(group.run(ddp_on_rank, sizes, format, recompute), sizes)


def stock_sync_on_rank(sizes):
    """Return gradients and buffers with nn.SyncBatchNorm, whose own forward rejects CPU tensors, in fused blocks."""
    model = network()[1]
    stock = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(stock.layer1[0].bn1) is nn.SyncBatchNorm
    x, y = batch(sizes)
    rows = rank_slice(sizes)
    loss = F.cross_entropy(stock(x[rows]), y[rows], reduction="sum")
    loss.backward()
    return [*(p.grad for p in stock.parameters()), *stock.buffers()]


def test_blocks_support_stock_sync_batch_norm(group, sizes):
    model = network("stock")[1]
    x, y = batch(sizes)
    F.cross_entropy(model(x), y, reduction="sum").backward()
    count = len(list(model.parameters()))
    combined = combine_ranks(group.run(stock_sync_on_rank, sizes), lambda index: "sum" if index < count else "equal")
    assert_all_close(combined, [*(p.grad for p in model.parameters()), *model.buffers()])


def checkpointed_on_rank(sizes):
    model = fused_res.convert_sync_batchnorm(network())
    trunk = model[1]
    for name in ("layer1", "layer2", "layer3"):
        stage = getattr(trunk, name)
        stage.forward = lambda x, run=stage.forward: checkpoint(run, x, use_reentrant=False)
    return train(DistributedDataParallel(model), rank_steps(sizes, torch.channels_last))


def test_running_stats_update_once_under_checkpointing(two):
    """Checkpointing repeats the all-gather in the backward, but updates the running statistics once."""
    assert_ranks_match_one_process(two.run(checkpointed_on_rank, (3, 5)), (3, 5))


def sharded_on_rank(sizes):
    from tests.support.model_comparison import record_fused_calls

    model = fused_res.convert_sync_batchnorm(network())
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    for block in [m for m in model.modules() if isinstance(m, fnn.BasicBlock)]:
        fsdp.fully_shard(block, mesh=mesh)
    fsdp.fully_shard(model, mesh=mesh)
    with record_fused_calls() as calls:
        train(model, rank_steps(sizes, torch.channels_last))
    assert calls.count("residual_block") == 3 * 4  # the stem and three blocks, all fused
    return [t.full_tensor() if isinstance(t, dist.tensor.DTensor) else t for t in model.state_dict().values()]


def test_fully_shard_matches_one_process(two):
    assert_ranks_match_one_process(two.run(sharded_on_rank, (3, 5)), (3, 5))


def compiled_on_rank(sizes, compiler):
    torch._dynamo.reset()
    model = fused_res.convert_sync_batchnorm(network())
    model[2].momentum = 0.1  # momentum=None reads num_batches_tracked, a graph break also in stock PyTorch
    model.add_module("last", fused_res.fuse(nn.Sequential(nn.Unflatten(1, (10, 1, 1)), fnn.SyncBatchNorm(10).double())))
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    results = []
    for candidate in (eager, compiled):
        for x, _, _ in rank_steps(sizes, torch.channels_last):
            candidate.zero_grad()
            candidate(x).square().sum().backward()
        results.append([*(p.grad for p in candidate.parameters()), *candidate.buffers()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    return [dist.get_rank()]


# Inductor compiles the same graph as in one process: see test_nn.py and test_residual_block.py.
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_compiled_model_matches_eager(two, compiler):
    two.run(compiled_on_rank, (3, 5), compiler)


def subgroup_on_rank():
    """Two process groups of two ranks, each with a batch; and a block whose norms belong to different groups."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    subgroup = groups[dist.get_rank() // 2]
    model = fused_res.convert_sync_batchnorm(network(), subgroup)
    x, _ = batch((4, 4))
    start = 4 * (dist.get_rank() % 2)
    y = model(x[start : start + 4])
    mixed = fnn.BasicBlock(3, 3).double()
    fused_res.convert_sync_batchnorm(mixed.bn1)
    fused_res.convert_sync_batchnorm(mixed.bn2, subgroup)
    assert mixed.unsupported_reason().reason == "the norms synchronize their statistics across different process groups"
    assert mixed(x[start : start + 4]).isfinite().all()  # runs unfused
    return [y.detach(), *model.buffers()]


def test_subgroups_match_one_process(four):
    parts = four.run(subgroup_on_rank)
    one = network("stock")
    y = one(batch((4, 4))[0]).detach()
    for pair in (parts[:2], parts[2:]):
        assert_all_close(combine_ranks(pair, lambda index: "equal" if index else "batch"), [y, *one.buffers()])


# --- conversion in one process ---


def test_conversion_preserves_modules_parameters_and_hooks():
    from tests.support.model_comparison import record_stock_norms

    model, twin = network(), network()
    hooked_types = []
    hooks = [
        hooked[1].layer1[0].bn1.register_forward_hook(lambda layer, *_: hooked_types.append(type(layer)))
        for hooked in (model, twin)
    ]
    before = {name: (id(module), type(module)) for name, module in model.named_modules()}
    parameters, keys = list(model.parameters()), list(model.state_dict())
    assert fused_res.convert_sync_batchnorm(model) is model
    assert list(model.state_dict()) == keys and all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    for name, module in model.named_modules():
        identity, kind = before[name]
        assert id(module) == identity
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            kind = fnn.SyncBatchNormAct2d if name == "0" else fnn.SyncBatchNorm
        assert type(module) is kind
    x = batch((3, 5))[0]
    for _ in range(2):  # converted once, then twice
        for train in (True, False):
            assert torch.equal(model.train(train)(x), twin.train(train)(x))
        fused_res.convert_sync_batchnorm(model)
    assert set(hooked_types) == {nn.BatchNorm2d, fnn.SyncBatchNorm}
    hooks[0].remove()
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    torch.testing.assert_close(copied(x), twin(x))
    frozen = fused_res.freeze(model)
    torch.testing.assert_close(frozen(x), twin(x))
    with record_stock_norms() as recorded:
        frozen(x)
    assert all(len(shape) == 2 for shape in recorded)  # a BatchNorm1d follows
    text = str(fused_res.summarize(fused_res.convert_sync_batchnorm(network())))
    assert "layer1.0" in text and "not exactly" not in text


def test_conversion_of_single_norm():
    layer = nn.BatchNorm2d(4)
    assert fused_res.convert_sync_batchnorm(layer) is layer and type(layer) is fnn.SyncBatchNorm
    with pytest.raises(ValueError, match="expected 2D to 5D input"):
        layer.train()(torch.randn(4))


def test_unsupported_norm_class_raises_without_side_effects():
    stub_torchvision_operators()
    from timm.layers import BatchNormAct2d

    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(BatchNormAct2d(3)))
    with pytest.raises(TypeError, match=r"1\.0 is a timm\..*BatchNormAct2d"):
        fused_res.convert_sync_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm2d


def test_stock_conversion_of_fused_activation_raises():
    for layer in (fnn.BatchNormAct2d(3), fnn.SyncBatchNormAct2d(3)):
        with pytest.raises(RuntimeError, match=r"would drop the activation .*fused_res\.convert_sync_batchnorm"):
            nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(layer))
