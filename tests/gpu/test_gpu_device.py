"""Tests that require a GPU: streams, CUDA graphs, several devices, unaligned views, and more than 2^31 elements."""

import pytest
import torch
import torch.nn.functional as F

import fused_res
from fused_res.functional import batch_norm_act, conv_bias_act
from tests.support import gpu_backends as gpu

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

pytestmark = [pytest.mark.parametrize("backend", gpu.BACKENDS), pytest.mark.usefixtures("forced_kernels")]


def random_channels_last(*shape, dtype=torch.bfloat16, device="cuda"):
    return torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)


def fused_blocks(backend, device="cuda"):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        fused_res.nn.Bottleneck(64, 16), fused_res.nn.Bottleneck(64, 16), fused_res.nn.BasicBlock(64, 64)
    )
    return fused_res.fuse(model.to(device, memory_format=torch.channels_last), backend=backend)


def assert_norm_close(actual, expected, tolerance):
    assert (actual.double() - expected.double()).norm() <= tolerance * expected.double().norm()


def test_cuda_graph_of_training_step_matches_eager(backend):
    """A captured training step, replayed on other data, has the result of an eager step."""
    model, x = fused_blocks(backend), random_channels_last(4, 64, 14, 14)
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
    x.copy_(random_channels_last(4, 64, 14, 14))
    graph.replay()
    replayed = [p.grad.clone() for p in model.parameters()]
    running = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    model.zero_grad(set_to_none=True)
    step()
    for actual, eager in zip(replayed, model.parameters(), strict=True):
        assert_norm_close(actual, eager.grad, 1e-5)
    for name, value in model.state_dict().items():
        if "running" in name:
            assert_norm_close(running[name], value, 1e-6)


def test_kernels_run_on_current_stream(backend):
    """Kernels are ordered after earlier work on the current stream."""
    x = random_channels_last(8, 64, 28, 28, dtype=torch.float32)
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


def test_training_step_does_not_synchronize(backend):
    """No call in a training step synchronizes the host with the GPU."""
    model, x = fused_blocks(backend), random_channels_last(4, 64, 14, 14, dtype=torch.float32)
    model(x).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_non_current_device(backend):
    x = random_channels_last(4, 64, 14, 14, dtype=torch.float32, device="cuda:1")
    model = fused_blocks(backend, "cuda:1")
    assert torch.cuda.current_device() == 0
    actual = model(x)
    with torch.cuda.device(1):
        assert torch.equal(actual, model(x))


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
def test_tensors_with_64_bit_offsets(backend, memory_format):
    """The results of the last batch element, whose offsets exceed 32 bits, are correct."""
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
        expected = F.relu(F.batch_norm(last, batch_mean, batch_var, weight.double(), bias.double()) + last)
        assert_norm_close(y[-1:], expected, 1e-2)
        del y
        if memory_format == torch.channels_last:
            kernel = torch.randn(64, 64, 1, 1, device="cuda", dtype=torch.bfloat16) / 8
            y = conv_bias_act(x, kernel, None, None, activation="identity", backend=backend)
            assert_norm_close(y[-1:], F.conv2d(last, kernel.double()), 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unaligned_views_match_aligned_tensors(backend, dtype):
    storage = torch.randn(1 + 4 * 64 * 49, device="cuda").to(dtype)
    x = storage[1:].view(4, 7, 7, 64).permute(0, 3, 1, 2)
    weight, bias = torch.rand(64, device="cuda"), torch.rand(64, device="cuda")
    y = batch_norm_act(x, None, None, weight, bias, training=True, backend=backend)
    aligned = batch_norm_act(x.clone(memory_format=torch.channels_last), None, None, weight, bias, training=True,
                             backend=backend)  # fmt: skip
    assert_norm_close(y, aligned, 1e-6)
    kernel = (torch.randn(32, 64, 1, 1, device="cuda") / 8).to(dtype)
    with torch.no_grad():
        assert_norm_close(
            conv_bias_act(x, kernel, backend=backend), F.relu(F.conv2d(x.double(), kernel.double())), 1e-2
        )


def test_empty_batch_in_eval(backend):
    x = random_channels_last(0, 64, 7, 7)
    weight, bias = torch.rand(64, device="cuda"), torch.rand(64, device="cuda")
    mean, var = torch.zeros(64, device="cuda"), torch.ones(64, device="cuda")
    assert batch_norm_act(x, mean, var, weight, bias, training=False, backend=backend).shape == x.shape


def test_tensors_on_two_devices_raise(backend):
    x = random_channels_last(2, 64, 7, 7)
    with pytest.raises(ValueError, match="must be on cuda"):
        batch_norm_act(x, None, None, torch.rand(64), torch.rand(64), training=True, backend=backend)
