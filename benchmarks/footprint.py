"""Memory footprint of a training step: bytes saved for backward, peak tensor memory, peak resident memory.

There are three measurements, because each of them alone is incomplete:
- `saved_for_backward` counts the tensors that pass through PyTorch's saved-tensor hooks, the number that the library
  minimizes. It also searches the autograd nodes for tensors that are stored elsewhere.
- `tensor_memory` replays the events of PyTorch's allocator: the bytes that are live at the end of a forward (saved or
  hidden), and the maximum within a step. It is exact and repeatable, but does not include oneDNN's own allocations.
- `peak_resident` reads the peak resident set size of a fresh process, which is the memory that a machine must have.
"""

import gc
import os
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, saved_tensors_hooks

PEAK_STEPS = 2


def storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@dataclass(frozen=True)
class SavedBytes:
    """Saved bytes at the end of a forward. Storages count once and in full: a saved slice retains its whole storage."""

    visible: int  # saved through save_for_backward
    hidden: int  # stored elsewhere on the autograd nodes

    @property
    def total(self) -> int:
        return self.visible + self.hidden


class _PackedTensor:
    """Placeholder of a saved tensor in the autograd graph, alive as long as the graph refers to it."""

    def __init__(self, tensor: Tensor) -> None:
        # Detached, because a saved output would otherwise refer to the node that holds it and never be freed.
        self.tensor = tensor.detach()


def saved_for_backward(forward: Callable[[], Tensor], module: nn.Module, inputs: Iterable[Tensor]) -> SavedBytes:
    """Count the bytes that `forward()` saves, without parameters, buffers and `inputs`, which exist in any case."""
    excluded = {storage_key(tensor) for tensor in (*module.parameters(), *module.buffers(), *inputs)}
    packed: weakref.WeakSet[_PackedTensor] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _PackedTensor:
        item = _PackedTensor(tensor)
        packed.add(item)
        return item

    with saved_tensors_hooks(pack, lambda item: item.tensor):
        output = forward()
    assert output.grad_fn is not None, "the output does not require grad"
    visible = {storage_key(item.tensor): item.tensor.untyped_storage().nbytes() for item in packed}
    hidden = {storage_key(tensor): tensor.untyped_storage().nbytes() for tensor in tensors_on_nodes(output.grad_fn)}
    return SavedBytes(
        sum(size for key, size in visible.items() if key not in excluded),
        sum(size for key, size in hidden.items() if key not in excluded and key not in visible),
    )


def reachable_nodes(root: Node) -> Iterator[Node]:
    """Yield each autograd node that is reachable from `root` once."""
    stack, visited = [root], {root}
    while stack:
        node = stack.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in visited:
                visited.add(following)
                stack.append(following)


def tensors_on_nodes(root: Node) -> Iterator[Tensor]:
    """Yield the tensors that Python autograd Functions store on their ctx (the node itself), directly, in containers or
    in closures."""
    visited: set[int] = set()
    for node in reachable_nodes(root):
        yield from _tensors_in(getattr(node, "__dict__", {}), visited)


def _tensors_in(value: Any, visited: set[int]) -> Iterator[Tensor]:
    if isinstance(value, (type, types.ModuleType, str, bytes, int, float)) or id(value) in visited:
        return
    visited.add(id(value))
    children: Iterable[Any] = ()
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        children = value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        children = value
    elif isinstance(value, types.FunctionType):
        children = (cell.cell_contents for cell in value.__closure__ or ())
    elif isinstance(value, types.MethodType):
        children = (value.__self__,)
    else:
        children = getattr(value, "__dict__", {}).values()
    for child in children:
        yield from _tensors_in(child, visited)


@dataclass(frozen=True)
class TensorMemory:
    live: int  # bytes allocated during the call and not freed when it returned
    peak: int  # maximum during the call, above the bytes that were live before


def tensor_memory(call: Callable[[], Any]) -> TensorMemory:
    """Measure what PyTorch's CPU allocator allocates during `call()`, whose result stays alive until the end."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise Kineto prints a line at every start and stop
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    del result
    return TensorMemory(live, peak)


def gpu_memory(call: Callable[[], Any]) -> TensorMemory:
    """Measure the same for the allocator of the current GPU, including library workspaces."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    live, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    del result
    return TensorMemory(live, peak)


@dataclass(frozen=True)
class ResidentMemory:
    before: int  # bytes with the model and the batch in memory, before the first step
    peak: int  # maximum within PEAK_STEPS steps after a first one


def peak_resident(build: Callable[..., Callable[[], Any]], *arguments: Any) -> ResidentMemory:
    """Measure the resident memory of a fresh process while it runs the step that `build(*arguments)` returns."""
    # Forked from a server that has imported all modules and computed nothing: as clean as a new process, and faster.
    context = get_context("forkserver")
    context.set_forkserver_preload([build.__module__, "sklearn.datasets"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measure_resident, build, arguments).result()


def _measure_resident(build: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...]) -> ResidentMemory:
    step = build(*arguments)
    before = _status("VmRSS")
    step()  # compiles a compiled step, and creates the optimizer's state
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark, which compilation may have raised
    for _ in range(PEAK_STEPS):
        step()
    return ResidentMemory(before, _status("VmHWM"))


def _status(field: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: peak memory is measured on Linux only")
