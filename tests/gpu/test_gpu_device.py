"""What only a GPU can show: streams, CUDA graphs, other devices, tensors of more than 2^31 elements, launch errors."""

import pytest
import torch
import torch.nn.functional as F

import fused_res
from fused_res.functional import batch_norm_act, conv_bias_act
from tests.support import gpu_backends as gpu

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

pytestmark = pytest.mark.parametrize("backend", gpu.BACKENDS)


def images(*shape, dtype=torch.bfloat16, device="cuda"):
    return torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)


def block(backend, device="cuda"):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        fused_res.nn.Bottleneck(64, 16), fused_res.nn.Bottleneck(64, 16), fused_res.nn.BasicBlock(64, 64)
    )
    return fused_res.fuse(model.to(device, memory_format=torch.channels_last), backend=backend)


def close(ours, exact, tolerance):
    assert (ours.double() - exact.double()).norm() <= tolerance * exact.double().norm()


def test_training_step_in_a_graph(backend):
    """A step that is captured and replayed on other data has the eager step's result."""
    model, x = block(backend), images(4, 64, 14, 14)
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            model(x).float().square().mean().backward()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    model.load_state_dict(state)
    x.copy_(images(4, 64, 14, 14))
    graph.replay()
    replayed = [p.grad.clone() for p in model.parameters()]
    running = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    model.zero_grad(set_to_none=True)
    step()
    for ours, eager in zip(replayed, model.parameters(), strict=True):
        close(ours, eager.grad, 1e-5)
    for name, value in model.state_dict().items():
        if "running" in name:
            close(running[name], value, 1e-6)


def test_current_stream(backend):
    """Kernels wait for what their stream did before, and for nothing else."""
    x = images(8, 64, 28, 28, dtype=torch.float32)
    weight, bias = torch.rand(64, device="cuda"), torch.rand(64, device="cuda")
    expected = batch_norm_act(2 * x, None, None, weight, bias, training=True, backend=backend)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        doubled = 2 * x
        y = batch_norm_act(doubled, None, None, weight, bias, training=True, backend=backend)
    stream.synchronize()
    assert torch.equal(y, expected)


def test_nothing_waits_for_the_gpu(backend):
    """The host comes back from a whole step while the GPU still sleeps."""
    model, x = block(backend), images(4, 64, 14, 14, dtype=torch.float32)
    model(x).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one(backend):
    x = images(4, 64, 14, 14, dtype=torch.float32, device="cuda:1")
    model = block(backend, "cuda:1")
    assert torch.cuda.current_device() == 0
    ours = model(x)
    with torch.cuda.device(1):
        assert torch.equal(ours, model(x))


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
def test_more_than_two_to_the_31_elements(backend, memory_format):
    """The last images are right: each has offsets beyond 32 bits."""
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GB of free memory")
    n, c, side = 171, 64, 448
    x = torch.empty((n, c, side, side), device="cuda", dtype=torch.bfloat16, memory_format=memory_format).normal_()
    assert x.numel() > 2**31
    weight, bias = torch.rand(c, device="cuda"), torch.rand(c, device="cuda")
    mean, var = torch.zeros(c, device="cuda"), torch.ones(c, device="cuda")
    with torch.no_grad():
        y = batch_norm_act(x, mean, var, weight, bias, x, training=True, backend=backend)
        last = x[-1:].double()
        batch_mean = torch.stack([x[:, index].float().mean() for index in range(c)]).double()
        batch_var = torch.stack([x[:, index].float().var(correction=0) for index in range(c)]).double()
        exact = F.relu(F.batch_norm(last, batch_mean, batch_var, weight.double(), bias.double()) + last)
        close(y[-1:], exact, 1e-2)
        del y
        if memory_format == torch.channels_last:
            kernel = torch.randn(64, 64, 1, 1, device="cuda", dtype=torch.bfloat16) / 8
            y = conv_bias_act(x, kernel, None, None, activation="identity", backend=backend)
            close(y[-1:], F.conv2d(last, kernel.double()), 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_views_that_are_not_aligned(backend, dtype):
    storage = torch.randn(1 + 4 * 64 * 49, device="cuda").to(dtype)
    x = storage[1:].view(4, 7, 7, 64).permute(0, 3, 1, 2)
    weight, bias = torch.rand(64, device="cuda"), torch.rand(64, device="cuda")
    y = batch_norm_act(x, None, None, weight, bias, training=True, backend=backend)
    aligned = batch_norm_act(x.clone(memory_format=torch.channels_last), None, None, weight, bias, training=True,
                             backend=backend)  # fmt: skip
    close(y, aligned, 1e-6)
    kernel = (torch.randn(32, 64, 1, 1, device="cuda") / 8).to(dtype)
    with torch.no_grad():
        close(conv_bias_act(x, kernel, backend=backend), F.relu(F.conv2d(x.double(), kernel.double())), 1e-2)


def test_empty(backend):
    x = images(0, 64, 7, 7)
    weight, bias = torch.rand(64, device="cuda"), torch.rand(64, device="cuda")
    mean, var = torch.zeros(64, device="cuda"), torch.ones(64, device="cuda")
    assert batch_norm_act(x, mean, var, weight, bias, training=False, backend=backend).shape == x.shape


def test_tensors_on_two_devices(backend):
    x = images(2, 64, 7, 7)
    with pytest.raises(ValueError, match="must be on cuda"):
        batch_norm_act(x, None, None, torch.rand(64), torch.rand(64), training=True, backend=backend)
