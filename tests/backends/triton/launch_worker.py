"""Cases of test_launch.py; runs in a process in which Triton is not interpreted.

A case compares what the driver library receives on the direct path with what it receives on the ordinary path,
``kernel[grid](...)``: function, grid, threads, shared memory, stream, and the bytes of every parameter.
"""

import contextlib
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton import knobs

from fused_res import nn
from fused_res.backends import registry
from fused_res.backends.triton import batch_norm_act, batch_norm_sync, conv_bias_act, launch, max_pool
from fused_res.backends.triton.kernels import batch_norm_act as kernels
from fused_res.backends.triton.launch import Launch
from tools.stub_driver.driver import StandInDriver, use_stand_in_driver

CL = torch.channels_last


@contextlib.contextmanager
def direct_calls() -> Iterator[list[bool]]:
    """Collect, for every launch of this context, whether it took the direct path."""
    taken: list[bool] = []
    ordinary = Launch._launch

    def spy(self: Launch, *tensors: Tensor | None) -> Any:
        taken[-1] = False
        return ordinary(self, *tensors)

    call = Launch.__call__

    def counted(self: Launch, queue: Any, *tensors: Tensor | None) -> None:
        taken.append(True)
        call(self, queue, *tensors)

    with mock.patch.object(Launch, "_launch", spy), mock.patch.object(Launch, "__call__", counted):
        yield taken


def check_equal_launches(driver: StandInDriver, call: Callable[[], Any]) -> int:
    """Check that the direct path launches what the ordinary one launches; return the number of launches."""
    call()  # the first call of a launch takes the ordinary path
    direct = Launch.__call__

    def both(self: Launch, queue: Any, *tensors: Tensor | None) -> None:
        direct(self, queue, *tensors)
        self.kernel[self.grid](*tensors, *self.scalars, **self._options)

    with mock.patch.object(Launch, "__call__", both), driver.record() as launches:
        call()
    with driver.record() as once, direct_calls() as taken:
        call()
    assert taken and all(taken), f"{taken.count(False)} of {len(taken)} launches took the ordinary path"
    assert len(launches) == 2 * len(once) == 2 * len(taken)
    for one, other in zip(launches[::2], launches[1::2], strict=True):
        assert one == other, f"direct {one}\nordinary {other}"
    return len(once)


def bottleneck(projection: bool, backend: str = "triton", planes: int = 16) -> nn.Bottleneck:
    inplanes = 32 if projection else 4 * planes
    down = None
    if projection:
        down = torch.nn.Sequential(
            torch.nn.Conv2d(inplanes, 4 * planes, 1, bias=False), torch.nn.BatchNorm2d(4 * planes)
        )
    module = nn.Bottleneck(inplanes, planes, downsample=down)
    module.backend = backend
    return module.to(memory_format=CL)


def block(driver: StandInDriver) -> None:
    """Every kernel of a block's forward and backward, with and without fused convolutions."""
    names = set()
    for preference in ("aten", "fused"):
        for projection in (False, True):
            module = bottleneck(projection)
            x = torch.randn(2, 32 if projection else 64, 8, 8).to(memory_format=CL).requires_grad_()

            def step(module=module, x=x) -> list[Tensor]:
                with torch.autocast("cpu", torch.bfloat16):
                    y = module(x.bfloat16() if isinstance(module.downsample, type(None)) else x)
                y.backward(torch.ones_like(y))
                grads = [p.grad for p in module.parameters()]
                module.zero_grad()
                return [y, *grads]

            with registry.use("auto", convolution=preference):
                count = check_equal_launches(driver, step)
                with driver.record() as launches:
                    step()
            names |= {item.kernel for item in launches}
            if preference == "aten":
                assert count == (21 if projection else 20), count
    expected = "partials merge_partials apply sums merge_norm_sums dx add_masked update_running_stats convolution"
    missing = {f"{name}_kernel" for name in expected.split()} | {"wgrad_kernel", "dgrad_kernel"}
    assert missing <= names, missing - names


def norms(driver: StandInDriver) -> None:
    """Operators that a training block does not call: inference, max pooling, fused inference convolution."""
    for memory_format in (CL, torch.contiguous_format):
        x = torch.randn(2, 32, 8, 8).to(memory_format=memory_format)
        vector = torch.rand(32)
        running = [vector] * 4
        stats = batch_norm_act.batch_norm_stats(x, *running, False, 1e-5)
        window = [3, 3], [2, 2], [1, 1]
        with torch.no_grad():
            check_equal_launches(driver, lambda x=x, r=running: batch_norm_act.batch_norm_stats(x, *r, False, 1e-5))
            check_equal_launches(
                driver,
                lambda x=x, r=running: batch_norm_act.batch_norm_act_forward(x, x, None, *r, False, 1e-5, "relu", True),
            )
            check_equal_launches(driver, lambda x=x: batch_norm_sync.batch_norm_partials(x))
            check_equal_launches(driver, lambda x=x, s=stats: max_pool.max_pool_forward(x, s, True, *window))
            y, indices = max_pool.max_pool_forward(x, stats, True, *window)
            check_equal_launches(driver, lambda x=x, y=y, i=indices: max_pool.max_pool_backward(y, i, x, *window))
            weight = torch.randn(32, 32, 3, 3)
            geometry = [1, 1], [1, 1], [1, 1], 1
            check_equal_launches(
                driver, lambda x=x, w=weight, v=vector: conv_bias_act.conv_bias_act(x, w, v, x, *geometry, True)
            )


def _apply(x: Tensor, stats: Tensor, residual: Tensor | None = None) -> Any:
    return batch_norm_act.batch_norm_act_apply(x, stats, residual, None, "relu", False)


def alignment_and_dtypes(driver: StandInDriver) -> None:
    """Tensors that a kernel was not compiled for take the ordinary path, which compiles another variant."""
    stats = torch.rand(5, 64)
    x = torch.randn(2, 64, 4, 4)
    shifted = torch.randn(x.numel() + 1)[1:].view_as(x)
    _apply(x, stats)
    for tensor, direct in ((x, True), (shifted, False), (shifted, False), (x, True)):
        with driver.record() as launches, direct_calls() as taken:
            _apply(tensor, stats)
        assert taken == [direct]
        aligned = [int.from_bytes(p, "little") % 16 == 0 for p in launches[0].parameters[:1]]
        assert aligned == [direct]
    # float32 weights and bfloat16 weights of norms of one shape; with and without a residual
    half = x.bfloat16()
    for weight in (torch.ones(64), torch.ones(64).bfloat16(), None):
        check_equal_launches(
            driver,
            lambda w=weight: batch_norm_act.batch_norm_act_forward(
                half, None, None, w, w, None, None, True, 0.1, "relu", False
            ),
        )
    _apply(x, stats), _apply(x, stats, x)
    with direct_calls() as taken:
        _apply(x, stats), _apply(x, stats, x)
    assert taken == [True, True]


def device_and_stream(driver: StandInDriver) -> None:
    """Launches are on the current stream; a tensor on another device than the current one takes the ordinary path."""
    x, stats = torch.randn(2, 64, 4, 4), torch.rand(5, 64)
    _apply(x, stats)
    for stream in (7, 0, 1 << 40):
        driver.stream = stream
        with driver.record() as launches, direct_calls() as taken:
            _apply(x, stats)
        assert [item.stream for item in launches] == [stream] and taken == [True]
    driver.stream = 0
    driver.device = 1
    try:
        with direct_calls() as taken:
            _apply(x, stats)
            _apply(x, stats)
        assert taken == [False, False]
    finally:
        driver.device = -1


def hooks_and_settings(driver: StandInDriver) -> None:
    """Hooks are called, settings are heeded, and interceptors get every launch."""
    x, stats = torch.randn(2, 64, 4, 4), torch.rand(5, 64)
    _apply(x, stats)
    seen: list[Any] = []
    for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        chain.add(seen.append)
        _apply(x, stats)
        chain.remove(seen.append)
    assert len(seen) == 2
    with knobs.runtime.scope():
        knobs.runtime.launch_enter_hook = seen.append
        _apply(x, stats)
    assert len(seen) == 3
    kernels.apply_kernel.pre_run_hooks.append(lambda *args, **kwargs: seen.append("pre-run"))
    try:
        _apply(x, stats)
    finally:
        kernels.apply_kernel.pre_run_hooks.clear()
    assert seen[3:] == ["pre-run"]
    for changes in ((knobs.runtime, "debug", True), (knobs.compilation, "instrumentation_mode", "other")):
        with mock.patch.object(*changes):
            assert launch.queue_of(x) is None
    intercepted: list[Any] = []
    with launch.intercept_launches(lambda *call: intercepted.append(call)), driver.record() as launches:
        _apply(x, stats)
    assert len(intercepted) == 1 and not launches
    with direct_calls() as taken:
        _apply(x, stats)
    assert taken == [True] and len(seen) == 4


def batch_sizes(driver: StandInDriver) -> None:
    """A last batch of another size, and images of another size, compile no new variant."""
    jitted = [k for k in vars(kernels).values() if hasattr(k, "device_caches")]

    def compiled() -> int:
        return sum(len(caches[0]) for kernel in jitted for caches in kernel.device_caches.values())

    def step(module: nn.Bottleneck, batch: int, size: int) -> None:
        x = torch.randn(batch, 128, size, size).to(memory_format=CL).requires_grad_()
        module(x).sum().backward()

    with registry.use("auto", convolution="aten"):
        module = bottleneck(False, planes=32)
        step(module, 8, 8)
        before = compiled()
        for batch, size in ((7, 8), (5, 9), (16, 7)):
            step(module, batch, size)
        assert compiled() == before, f"{compiled() - before} new variants"


def threads(driver: StandInDriver) -> None:
    """Threads that launch at once pass their own tensors."""
    stats = torch.rand(5, 64)
    failures: list[str] = []

    def work(batch: int) -> None:
        x = torch.randn(batch, 64, 4, 4)
        for _ in range(200):
            y, _ = _apply(x, stats)
            if y.shape != x.shape:
                failures.append(f"batch {batch}")

    with direct_calls() as taken:
        workers = [threading.Thread(target=work, args=(1 + i % 2,)) for i in range(4)]
        [worker.start() for worker in workers]
        [worker.join() for worker in workers]
    assert not failures and len(taken) == 800


if __name__ == "__main__":
    torch.set_num_threads(1)
    with use_stand_in_driver() as stand_in:
        registry._resolve_cache["triton", "cpu"] = registry._load("triton")
        for name in sys.argv[1:]:
            try:
                globals()[name](stand_in)
                outcome = "ok"
            except Exception:
                outcome = traceback.format_exc()
            print(f"\x1e{name}\x1f{outcome}", flush=True)
