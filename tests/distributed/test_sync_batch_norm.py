"""Statistics of several processes: equal to one process with the whole batch, whoever has how much of it."""

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
from fused_res.backends.reference import batch_norm_sync as halves
from fused_res.testing import assert_as_exact_as, stub_torchvision_operators
from tests.block.test_residual_block import BLOCKS, RECOMPUTE, assert_same, learnable, make, run
from tests.block.test_residual_block import stock as stock_block
from tests.support.cpu_backends import BACKENDS as EVERY
from tests.support.cpu_backends import FAST
from tests.support.distributed_workers import processes

BACKENDS = [*FAST, "reference, fused"]
SIZES = [(3, 5), (4, 0, 1, 3)]  # images of each process
FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    with processes(2, tmp_path_factory.mktemp("two")) as group:
        yield group


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    with processes(4, tmp_path_factory.mktemp("four")) as group:
        yield group


@pytest.fixture(params=SIZES, ids=str)
def sizes(request):
    return request.param


@pytest.fixture
def group(request, sizes):
    return request.getfixturevalue("two" if len(sizes) == 2 else "four")


def own_rows(sizes):
    start = sum(sizes[: dist.get_rank()])
    return slice(start, start + sizes[dist.get_rank()])


def whole(parts, batched):
    """Of what every process found: rows in a row for tensors of images, sums for gradients, else what all agree on."""
    found = []
    for index, tensors in enumerate(zip(*parts, strict=True)):
        kind = batched(index)
        if kind == "agree":
            assert all(torch.equal(tensors[0], other) for other in tensors[1:])
        found.append(torch.cat(tensors) if kind == "rows" else sum(tensors) if kind == "sum" else tensors[0])
    return found


# --- the kernels ---


@pytest.mark.parametrize("backend", [name for name in FAST if name != "cuda"])  # that one: test_gpu_kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 7, 9), (4, 33, 8, 8), (2, 3, 150, 150), (5, 16, 1, 1), (0, 7, 3, 3)], ids=str)
def test_halves(backend, dtype, format, shape):
    kernels = fused_res.backends.resolve(backend, torch.device("cpu"))
    torch.manual_seed(0)

    def images():
        return (3 * torch.randn(shape) + 20).to(dtype).contiguous(memory_format=format)

    x, residual, dy = images(), images(), images()
    count, accumulated = x.numel() // shape[1], ops.stats_dtype(dtype)
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    partials = kernels.batch_norm_partials(x)
    assert partials.shape == (1, 3, shape[1])
    torch.testing.assert_close(partials, halves.batch_norm_partials(x.double()), **tolerance)
    stats, residual_stats = (
        kernels.merge_stats(kernels.batch_norm_partials(t), None, None, 1e-3, dtype == torch.float64)
        for t in (x, residual)
    )
    mask = norm.pack_mask(images() > 20)
    for relu_mask, relu, pair in ((mask, False, False), (None, True, False), (None, False, False), (mask, False, True)):
        more = (residual, residual_stats) if pair else (None, None)
        wide = [None if t is None else t.double() for t in (dy, x, stats, *more)]
        sums = kernels.batch_norm_sums(dy, x, stats, relu_mask, relu, *more)
        exact = halves.batch_norm_sums(*wide[:3], relu_mask, relu, *wide[3:])
        assert sums.dtype == accumulated and sums.shape == exact.shape
        scale = 25 * count**0.5 + 1  # of a sum of so many values
        torch.testing.assert_close(sums.double(), exact, rtol=tolerance["rtol"], atol=tolerance["atol"] * scale)
        for terms in (sums[:2].contiguous(), None):
            dx = kernels.batch_norm_act_dx(dy, x, stats, relu_mask, relu, terms, count)
            terms = None if terms is None else terms.double()
            exact = halves.batch_norm_act_dx(*wide[:3], relu_mask, relu, terms, count)
            assert dx.dtype == dtype and dx.stride() == x.stride()
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(dx.double(), exact, rtol=4 * eps, atol=40 * eps)


def test_kernels_refuse_what_does_not_fit():
    kernels = fused_res.backends.resolve("cpu", torch.device("cpu"))
    x, stats = torch.randn(2, 3, 4, 4), torch.randn(5, 3)
    for call, complaint in (
        (lambda: kernels.batch_norm_sums(x, x, stats, None, True, x, None), "residual: expected together"),
        (lambda: kernels.batch_norm_sums(x, x, stats[:4], None, True, None, None), r"stats: expected \(5, 3\)"),
        (lambda: kernels.batch_norm_act_dx(x, x, stats, None, True, torch.randn(3, 3), 32), r"sums: expected \(2, 3\)"),
        (lambda: kernels.batch_norm_act_dx(x[1:], x, stats, None, True, None, 32), "grad_output: expected"),
    ):
        with pytest.raises(ValueError, match=complaint):
            call()


# --- a block ---


def block_part(name, sizes, recompute, backend, last, dtype=torch.float64, frozen=(), training=True):
    """Output and gradients of this process's rows, and the tensors afterwards."""
    backend, _, convolution = backend.partition(", ")
    spec, x, tensors = make(name, dtype, bias=True, batch=sum(sizes))
    with torch.no_grad():
        shape = stock_block(x, spec, learnable(tensors), training).shape
    rows = own_rows(sizes)
    x = x[rows]
    x = x.contiguous(memory_format=torch.channels_last) if last and x.dim() == 4 else x.contiguous()
    grad = torch.linspace(-1, 2, shape.numel(), dtype=torch.float64).to(dtype).view(shape)[rows]

    def ours(x, tensors):
        return functional.residual_block(
            x, spec, tensors, training=training, recompute=recompute, backend=backend, process_group=dist.group.WORLD
        )

    with fused_res.backends.use("auto", convolution or "auto"):
        return run(ours, x, learnable(tensors, frozen), grad)


def whole_block(parts, name, frozen=()):
    tensors = make(name, bias=True)[2]
    gradients = sum(t is not None and i % 6 < 4 and i not in frozen for i, t in enumerate(tensors))
    return whole(parts, lambda index: "rows" if index < 2 else "sum" if index < 2 + gradients else "agree")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", BLOCKS)
def test_block_equals_one_process(group, sizes, name, backend):
    spec, x, tensors = make(name, bias=True, batch=sum(sizes))
    one = run(lambda x, t: stock_block(x, spec, t), x, learnable(tensors))
    for recompute, last in itertools.product(RECOMPUTE, (True, False)):
        parts = group.run(block_part, name, sizes, recompute, backend, last)
        assert_same(whole_block(parts, name), one)


@pytest.mark.parametrize("name", ["bottleneck", "projection", "stem"])
def test_block_keeps_the_precision_contract(group, sizes, name):
    spec, x, tensors = make(name, torch.float32, bias=True, batch=sum(sizes))
    ours = whole_block(group.run(block_part, name, sizes, "none", "cpu", True, torch.float32), name)
    stock = run(lambda x, t: stock_block(x, spec, t), x, learnable(tensors))
    wide = [None if t is None else t.double() for t in tensors]
    grad = torch.linspace(-1, 2, stock[0].numel(), dtype=torch.float64).to(torch.float32).double().view_as(stock[0])
    exact = run(lambda x, t: stock_block(x, spec, t), x.double(), learnable(wide), grad)
    # Convolutions' biases have gradients of zero, all rounding: the floor is that of the weights' beside them.
    floor = 1e-5 * max(t.abs().max().item() for t in exact[2:])
    for index, found in enumerate(zip(ours, stock, exact, strict=True)):
        assert_as_exact_as(f"{name} {index}", *found, floor=floor if index > 1 else 0.0)


@pytest.mark.parametrize("backend", [name for name in ("cuda", "triton") if name in EVERY])
@pytest.mark.parametrize("name", ["bottleneck", "projection"])
def test_kernels_for_gpus(group, sizes, name, backend):
    """1x1 convolutions that normalise as they load, and form the gradient before the norm as they load that."""
    spec, x, tensors = make(name, torch.float16, bias=True, batch=sum(sizes))
    # A bias before a norm has a gradient of zero, which is the sum of large ones over processes: all rounding.
    biases = range(1, len(tensors), 6)
    arguments = sizes, "none", f"{backend}, fused", True, torch.float16, biases
    ours = whole_block(group.run(block_part, name, *arguments), name, biases)
    wide = [None if t is None else t.double() for t in tensors]
    grad = torch.linspace(-1, 2, ours[0].numel(), dtype=torch.float64).half().double().view_as(ours[0])
    exact = run(lambda x, t: stock_block(x, spec, t), x.double(), learnable(wide, biases), grad)

    def block(x, tensors):
        return functional.residual_block(x, spec, tensors, training=True, backend=backend)

    with fused_res.backends.use("auto", "fused"):
        one = run(block, x.contiguous(memory_format=torch.channels_last), learnable(tensors, biases), grad.half())
    for index, (found, alone, wanted) in enumerate(zip(ours, one, exact, strict=True)):
        # In 16 bits elements near zero flip their ReLU, here or there: a gradient is compared as a whole.
        error, its, size = (found.double() - wanted).norm(), (alone.double() - wanted).norm(), wanted.norm()
        assert error <= 2 * its + 0.005 * size + 0.01, f"{index}: {error:.3g}, one process {its:.3g}, of {size:.3g}"


@pytest.mark.parametrize("frozen", [(0, 1), (2, 3), (0, 1, 2, 3, 6, 7, 18, 19), (*range(24),)], ids=str)
def test_partial_gradients(two, frozen):
    sizes = (3, 5)
    spec, x, tensors = make("projection", bias=True, batch=8)
    one = run(lambda x, t: stock_block(x, spec, t), x, learnable(tensors, frozen))
    parts = two.run(block_part, "projection", sizes, "norm", "cpu", True, torch.float64, frozen)
    assert_same(whole_block(parts, "projection", frozen), one)


def test_frozen_norms_keep_to_themselves(two):
    """A unit that uses running statistics has nothing to tell; the others do as ever."""
    spec, x, tensors = make("projection", bias=True, batch=8)
    training = (True, False, True, False)
    one = run(lambda x, t: stock_block(x, spec, t, training), x, learnable(tensors))
    arguments = "projection", (3, 5), "none", "cpu", True, torch.float64, (), training
    assert_same(whole_block(two.run(block_part, *arguments), "projection"), one)


def told(name):
    """Every collective that a step of a block makes, with how many numbers each process brings."""
    calls = []
    gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    originals = {called: getattr(dist, called) for called in (gather, "all_reduce")}

    def spy(called):
        def call(*tensors, **options):
            calls.append((called, tensors[-1].numel()))
            return originals[called](*tensors, **options)

        return call

    for called in originals:
        setattr(dist, called, spy(called))
    try:
        block_part(name, (3, 5), "none", "cpu", True)
    finally:
        for called, original in originals.items():
            setattr(dist, called, original)
    return [(called.startswith("all_gather"), numbers) for called, numbers in calls]


def test_what_is_told(two):
    """For each norm: count, mean, M2 forward; two sums and the count backward, three for the pair that is added."""
    for calls in two.run(told, "bottleneck"):
        assert calls == [(True, 12), (True, 12), (True, 24), (False, 17), (False, 9), (False, 9)]
    for calls in two.run(told, "projection"):
        assert calls == [(True, 12), (True, 12), (True, 36), (True, 36), (False, 37), (False, 9), (False, 9)]


def refused():
    spec, x, tensors = make("basic")
    group = dist.group.WORLD

    def block(x):
        return functional.residual_block(x, spec, tensors, training=True, process_group=group)

    def single(x):
        return functional.batch_norm_act(x, None, None, training=True, process_group=group)

    for function in (block, single):
        y = function(x.requires_grad_())
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            torch.autograd.grad(y.sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="process_group: .*do not reach other processes"):
            torch.func.vmap(function)(x[None])
        with pytest.raises(ValueError, match="input is empty in every process"):
            function(x[:0])


def test_refuses_what_it_cannot_do(two):
    two.run(refused)


# --- a norm by itself ---


def norm_part(sizes, shape, format, residual, scaled, momentum):
    torch.manual_seed(1)
    rows = own_rows(sizes)
    x, added, grad = ((torch.randn(sum(sizes), *shape, dtype=torch.float64) + 2)[rows] for _ in range(3))
    weight, bias, scale, shift, mean, var = (torch.rand(shape[0], dtype=torch.float64) + 0.5 for _ in range(6))
    if len(shape) == 3:
        x = x.contiguous(memory_format=format)
    learned = [x, weight, bias, *([added] if residual else []), *([scale, shift] if scaled else [])]
    for tensor in learned:
        tensor.requires_grad_()
    extra = {"residual_scale": scale, "residual_shift": shift} if scaled else {}
    group = dist.group.WORLD
    y = functional.batch_norm_act(
        x, mean, var, weight, bias, added if residual else None, True, momentum, process_group=group, **extra
    )
    return [y.detach(), *torch.autograd.grad(y, learned, grad), mean, var]


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize(("residual", "scaled"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("shape", [(6,), (6, 5), (6, 4, 3), (3, 2, 3, 2)], ids=str)
def test_norm_equals_one_process(group, sizes, shape, residual, scaled, format):
    arguments = shape, format, residual, scaled, 0.3
    parts = group.run(norm_part, sizes, *arguments)
    images = {0, 1} | ({4} if residual else set())
    last = len(parts[0]) - 2
    found = whole(parts, lambda index: "rows" if index in images else "agree" if index >= last else "sum")
    torch.manual_seed(1)
    total = sum(sizes)
    x, added, grad = (torch.randn(total, *shape, dtype=torch.float64) + 2 for _ in range(3))
    weight, bias, scale, shift, mean, var = (torch.rand(shape[0], dtype=torch.float64) + 0.5 for _ in range(6))
    learned = [x, weight, bias, *([added] if residual else []), *([scale, shift] if scaled else [])]
    for tensor in learned:
        tensor.requires_grad_()
    z = F.batch_norm(x, mean, var, weight, bias, True, 0.3)
    if residual:
        per_channel = (-1, *(1,) * (len(shape) - 1))
        z = z + (added * scale.view(per_channel) + shift.view(per_channel) if scaled else added)
    y = F.relu(z)
    assert_same(found, [y.detach(), *torch.autograd.grad(y, learned, grad), mean, var])


# --- modules and whole nets ---


def net(kind="ours"):
    """A small net with every kind of norm that can be synchronised; the stock twin has the same numbers."""
    torch.manual_seed(0)
    own = fnn.BatchNormAct2d(3)
    trunk = models.cifar_resnet(8, 10, width=4)
    if kind != "ours":
        fused_res.unfuse(trunk)
        own.fused = False
    return nn.Sequential(own, trunk, nn.BatchNorm1d(10, momentum=None)).double()


def batch(sizes):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(sum(sizes), 3, 12, 12, generator=generator, dtype=torch.float64) * 2 + 1
    return x, torch.randint(10, (sum(sizes),), generator=generator)


def trained(model, parts):
    """Three steps of SGD, each on all of the batch; the loss is the mean over all, brought in by parts."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for x, y, weight in parts:
        optimizer.zero_grad()
        (F.cross_entropy(model(x), y, reduction="sum") * weight).backward()
        optimizer.step()
    return [t.detach() for t in model.state_dict().values()]


def steps(sizes):
    x, y = batch(sizes)
    return [(x + 0.1 * step, y, 1 / sum(sizes)) for step in range(3)]


def own_steps(sizes, format):
    """DistributedDataParallel takes the mean over processes: the loss is a sum over the global count, times them."""
    rows = own_rows(sizes)
    return [
        (x[rows].contiguous(memory_format=format), y[rows], weight * dist.get_world_size())
        for x, y, weight in steps(sizes)
    ]


def ddp_part(sizes, format, recompute):
    model = net()
    fused_res.fuse(model, recompute=recompute)
    fused_res.convert_sync_batchnorm(model)
    return trained(DistributedDataParallel(model), own_steps(sizes, format))


def assert_same_net(parts, sizes):
    one = trained(net("stock"), steps(sizes))
    for part in parts:
        assert_same(part, one)


@pytest.mark.parametrize(("format", "recompute"), zip(FORMATS, ("none", "conv"), strict=True), ids=str)
def test_ddp_equals_one_process(group, sizes, format, recompute):
    assert_same_net(group.run(ddp_part, sizes, format, recompute), sizes)


def stock_sync_part(sizes):
    """nn.SyncBatchNorm, which by itself refuses the CPU, inside a fused block."""
    model = net()[1]
    stock = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(stock.layer1[0].bn1) is nn.SyncBatchNorm
    x, y = batch(sizes)
    rows = own_rows(sizes)
    loss = F.cross_entropy(stock(x[rows]), y[rows], reduction="sum")
    loss.backward()
    return [*(p.grad for p in stock.parameters()), *stock.buffers()]


def test_blocks_take_stock_sync_batch_norm(group, sizes):
    model = net("stock")[1]
    x, y = batch(sizes)
    F.cross_entropy(model(x), y, reduction="sum").backward()
    count = len(list(model.parameters()))
    found = whole(group.run(stock_sync_part, sizes), lambda index: "sum" if index < count else "agree")
    assert_same(found, [*(p.grad for p in model.parameters()), *model.buffers()])


def checkpointed_part(sizes):
    model = fused_res.convert_sync_batchnorm(net())
    trunk = model[1]
    for name in ("layer1", "layer2", "layer3"):
        stage = getattr(trunk, name)
        stage.forward = lambda x, run=stage.forward: checkpoint(run, x, use_reentrant=False)
    return trained(DistributedDataParallel(model), own_steps(sizes, torch.channels_last))


def test_activation_checkpointing(two):
    """Runs the gathering again in backward, and counts the batch once."""
    assert_same_net(two.run(checkpointed_part, (3, 5)), (3, 5))


def sharded_part(sizes):
    from tests.support.model_comparison import counted

    model = fused_res.convert_sync_batchnorm(net())
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    for block in [m for m in model.modules() if isinstance(m, fnn.BasicBlock)]:
        fsdp.fully_shard(block, mesh=mesh)
    fsdp.fully_shard(model, mesh=mesh)
    with counted() as calls:
        trained(model, own_steps(sizes, torch.channels_last))
    assert calls.count("residual_block") == 3 * 4  # the stem and three blocks, all of them fused
    return [t.full_tensor() if isinstance(t, dist.tensor.DTensor) else t for t in model.state_dict().values()]


def test_fully_shard(two):
    assert_same_net(two.run(sharded_part, (3, 5)), (3, 5))


def compiled_part(sizes, compiler):
    torch._dynamo.reset()
    model = fused_res.convert_sync_batchnorm(net())
    model[2].momentum = 0.1  # a cumulative average reads its counter, where stock PyTorch breaks the graph, too
    model.add_module("last", fused_res.fuse(nn.Sequential(nn.Unflatten(1, (10, 1, 1)), fnn.SyncBatchNorm(10).double())))
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    found = []
    for net_ in (eager, compiled):
        for x, _, _ in own_steps(sizes, torch.channels_last):
            net_.zero_grad()
            net_(x).square().sum().backward()
        found.append([*(p.grad for p in net_.parameters()), *net_.buffers()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    return [dist.get_rank()]


# Inductor compiles the same graph as in one process: see test_nn.py and test_residual_block.py.
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_compiled(two, compiler):
    two.run(compiled_part, (3, 5), compiler)


def subgroup_part():
    """Two groups of two, each with its own batch; and a block whose norms belong to different groups."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    own = groups[dist.get_rank() // 2]
    model = fused_res.convert_sync_batchnorm(net(), own)
    x, _ = batch((4, 4))
    start = 4 * (dist.get_rank() % 2)
    y = model(x[start : start + 4])
    mixed = fnn.BasicBlock(3, 3).double()
    fused_res.convert_sync_batchnorm(mixed.bn1)
    fused_res.convert_sync_batchnorm(mixed.bn2, own)
    assert mixed.refusal().why == "some norms take their statistics from other processes than others do"
    assert mixed(x[start : start + 4]).isfinite().all()  # norm by norm
    return [y.detach(), *model.buffers()]


def test_groups(four):
    parts = four.run(subgroup_part)
    one = net("stock")
    y = one(batch((4, 4))[0]).detach()
    for pair in (parts[:2], parts[2:]):
        assert_same(whole(pair, lambda index: "agree" if index else "rows"), [y, *one.buffers()])


# --- conversion, in one process ---


def test_conversion_changes_nothing_else():
    model, twin = net(), net()
    seen = []
    hooks = [
        hooked[1].layer1[0].bn1.register_forward_hook(lambda layer, *_: seen.append(type(layer)))
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
    for _ in range(2):  # alone, and converted once more
        for train in (True, False):
            assert torch.equal(model.train(train)(x), twin.train(train)(x))
        fused_res.convert_sync_batchnorm(model)
    assert set(seen) == {nn.BatchNorm2d, fnn.SyncBatchNorm}
    hooks[0].remove()
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    torch.testing.assert_close(again(x), twin(x))
    frozen = fused_res.freeze(model)
    torch.testing.assert_close(frozen(x), twin(x))
    assert not any(isinstance(m, fnn.SyncBatchNorm) for m in frozen[1].modules())
    text = str(fused_res.summarize(fused_res.convert_sync_batchnorm(net())))
    assert "layer1.0" in text and "not exactly" not in text


def test_conversion_of_a_norm_itself():
    layer = nn.BatchNorm2d(4)
    assert fused_res.convert_sync_batchnorm(layer) is layer and type(layer) is fnn.SyncBatchNorm
    with pytest.raises(ValueError, match="expected 2D to 5D input"):
        layer.train()(torch.randn(4))


def test_conversion_refuses_what_would_be_lost():
    stub_torchvision_operators()
    from timm.layers import BatchNormAct2d

    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(BatchNormAct2d(3)))
    with pytest.raises(TypeError, match=r"1\.0 is a timm\..*BatchNormAct2d"):
        fused_res.convert_sync_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm2d


def test_stock_conversion_does_not_drop_the_activation():
    for layer in (fnn.BatchNormAct2d(3), fnn.SyncBatchNormAct2d(3)):
        with pytest.raises(RuntimeError, match=r"would drop the activation .*fused_res\.convert_sync_batchnorm"):
            nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(layer))
