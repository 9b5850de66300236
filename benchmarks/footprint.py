"""What a training step keeps and needs: bytes saved for backward, peak of tensor memory, peak of the process.

Three views, because each alone can be fooled:
- `saved_for_backward` counts what goes through PyTorch's saved tensors, which is what the library promises to
  keep small; it also searches the graph's nodes for tensors that were put beside them.
- `tensor_memory` replays the allocator's own events: what a forward still holds at its end (hidden or not),
  and the highest sum within a step. Exact and repeatable, but without what oneDNN allocates for itself.
- `peak_resident` asks the kernel for the highest resident size of a fresh process: what a user's machine must
  have.
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
class Saved:
    """Bytes at the end of a forward, each storage counted once and whole (a saved slice keeps all of its
    storage)."""

    visible: int  # through save_for_backward
    hidden: int  # reachable from the graph's nodes otherwise

    @property
    def total(self) -> int:
        return self.visible + self.hidden


class _Kept:
    """Stands in the graph for a saved tensor, and lives as long as the graph keeps it."""

    def __init__(self, tensor: Tensor) -> None:
        # Detached: a saved output would otherwise refer to the node that holds it, and never be freed.
        self.tensor = tensor.detach()


def saved_for_backward(forward: Callable[[], Tensor], module: nn.Module, inputs: Iterable[Tensor]) -> Saved:
    """Counts what `forward()` saves, without the module's parameters and buffers and without `inputs`: these
    exist anyway."""
    excluded = {storage_key(tensor) for tensor in (*module.parameters(), *module.buffers(), *inputs)}
    kept: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Kept:
        item = _Kept(tensor)
        kept.add(item)
        return item

    with saved_tensors_hooks(pack, lambda item: item.tensor):
        output = forward()
    assert output.grad_fn is not None, "nothing to go backward through"
    visible = {storage_key(item.tensor): item.tensor.untyped_storage().nbytes() for item in kept}
    hidden = {storage_key(tensor): tensor.untyped_storage().nbytes() for tensor in tensors_on_nodes(output.grad_fn)}
    return Saved(
        sum(size for key, size in visible.items() if key not in excluded),
        sum(size for key, size in hidden.items() if key not in excluded and key not in visible),
    )


def nodes_behind(root: Node) -> Iterator[Node]:
    stack, seen = [root], {root}
    while stack:
        node = stack.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)


def tensors_on_nodes(root: Node) -> Iterator[Tensor]:
    """Tensors that Python Functions keep as attributes of their ctx (the node itself), in containers or in
    closures."""
    seen: set[int] = set()
    for node in nodes_behind(root):
        yield from _tensors_in(getattr(node, "__dict__", {}), seen)


def _tensors_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, (type, types.ModuleType, str, bytes, int, float)) or id(value) in seen:
        return
    seen.add(id(value))
    parts: Iterable[Any] = ()
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        parts = value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts = value
    elif isinstance(value, types.FunctionType):
        parts = (cell.cell_contents for cell in value.__closure__ or ())
    elif isinstance(value, types.MethodType):
        parts = (value.__self__,)
    else:
        parts = getattr(value, "__dict__", {}).values()
    for part in parts:
        yield from _tensors_in(part, seen)


@dataclass(frozen=True)
class TensorMemory:
    held: int  # allocated during the call and not freed when it returned
    peak: int  # highest sum during the call, above what there was before


def tensor_memory(call: Callable[[], Any]) -> TensorMemory:
    """What PyTorch's CPU allocator gave out during `call()`, whose result is kept alive until the end."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it announces every start and stop
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del result
    return TensorMemory(held, peak)


def gpu_memory(call: Callable[[], Any]) -> TensorMemory:
    """The same of the current GPU's allocator, workspaces of libraries included."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    held, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    del result
    return TensorMemory(held, peak)


@dataclass(frozen=True)
class Resident:
    before: int  # with the model and the batch in memory, before the first step
    peak: int  # highest within PEAK_STEPS steps that follow a first one


def peak_resident(build: Callable[..., Callable[[], Any]], *arguments: Any) -> Resident:
    """`build(*arguments)` in a fresh process gives a step; measures that process while it runs the step."""
    # A server that has imported everything and computed nothing forks it: as fresh, and sooner there.
    context = get_context("forkserver")
    context.set_forkserver_preload([build.__module__, "sklearn.datasets"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measure_resident, build, arguments).result()


def _measure_resident(build: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...]) -> Resident:
    step = build(*arguments)
    before = _status("VmRSS")
    step()  # compiles where the step is compiled, and makes the optimizer's state
    Path("/proc/self/clear_refs").write_text("5")  # forget the high-water mark that compiling may have left
    for _ in range(PEAK_STEPS):
        step()
    return Resident(before, _status("VmHWM"))


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: peak memory is measured on Linux only")
