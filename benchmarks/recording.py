"""Recording of a network's launches without a GPU: the real programs run on meta tensors, and no kernel is executed.

Three sources of launches are recorded in one list, in execution order:

* Triton kernels, intercepted in :func:`fused_res.backends.triton.launch.launch`;
* CUDA C++ kernels, whose host code runs in the simulator's library on uninitialized tensors (``tools/cuda_sim``);
* operators of PyTorch, of which convolutions, pooling, optimizer and stock networks consist.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.events import Event, Gemm, Touch, convolution_gemm, library_gemm, operator_gemm
from fused_res import _torch_compat
from fused_res.backends import implicit_gemm, registry
from fused_res.dispatch.backend import Kernels

#: Operators of PyTorch that allocate, or change metadata only.
_FREE = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh",
    "_unsafe_view", "as_strided_", "resize_", "set_",
}  # fmt: skip


class Recorder(TorchDispatchMode):
    """Records the launches of everything that runs inside the ``with`` statement, in :attr:`events`.

    Args:
        backend: ``"triton"`` or ``"cuda"``, the backend that networks of fused_res use inside; None: none is used.
        preference: algorithm preference, see :func:`fused_res.dispatch.select`.
    """

    def __init__(self, backend: str | None = None, preference: str = "planned") -> None:
        super().__init__()
        self.backend, self.preference = backend, preference
        self.events: list[Event] = []
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._next_id = 0
        self._operator: list[str] = []
        #: Base address -> (size, tensor) of the tensors of the current CUDA operator.
        self._addresses: dict[int, tuple[int, Tensor]] | None = None

    # Identity and size of tensors

    def tensor_id(self, tensor: Tensor) -> int:
        """Return a number that identifies the tensor's storage, in order of first use."""
        storage = tensor.untyped_storage()
        known = self._storages.get(storage._cdata)
        if known is None or known[0].expired():
            known = self._storages[storage._cdata] = StorageWeakRef(storage), self._next_id
            self._next_id += 1
        return known[1]

    def touch(self, tensor: Tensor) -> Touch:
        size = min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
        return Touch(self.tensor_id(tensor), size)

    # PyTorch's operators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if name == "convolution":
            return self._convolution(*args, **kwargs)
        if name == "convolution_backward":
            return self._convolution_backward(*args, **kwargs)
        returned = func(*args, **kwargs)
        if self._addresses is not None:
            for tensor in _tensors(returned):
                if tensor.device.type == "cpu" and tensor.numel():
                    storage = tensor.untyped_storage()
                    self._addresses[storage.data_ptr()] = storage.nbytes(), tensor
        if func.is_view or name in _FREE:
            return returned
        self._record_aten(name, args, kwargs, returned)
        return returned

    def _record_aten(self, name: str, args: Any, kwargs: Any, returned: Any, gemm: Gemm | None = None) -> None:
        inputs, outputs = _tensors((args, kwargs)), _tensors(returned)
        in_place = name.endswith("_") and not name.endswith("__")
        if in_place and not outputs:  # foreach operators return nothing
            outputs = _tensors(args[:1])
        if not outputs:
            return
        if name in ("zeros_like", "zero_", "fill_", "zeros", "new_zeros", "ones_like", "full_like"):
            inputs = []
        if name == "copy_":
            inputs = inputs[1:]
        if name == "native_batch_norm" and not args[5]:  # returns no statistics on a GPU
            name, outputs = "batch_norm_inference", outputs[:1]
        self.events.append(
            Event(
                f"aten::{name}",
                name,
                [self.touch(t) for t in inputs],
                [self.touch(t) for t in outputs],
                gemm or library_gemm(name, args),
            )
        )

    def _convolution(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, *rest: Any
    ) -> Tensor:
        groups = rest[2]
        sizes = [
            (size + 2 * pad - space * (taps - 1) - 1) // step + 1
            for size, pad, space, taps, step in zip(
                input.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True
            )
        ]
        output = _empty_channels_last(input, (input.shape[0], weight.shape[0], *sizes))
        gemm = convolution_gemm("forward", tuple(input.shape), tuple(weight.shape), tuple(output.shape), groups)
        self._record_aten("convolution", (input, weight, bias), {}, output, gemm)
        self._scale_strided(input, weight, stride)
        return output

    def _scale_strided(self, input: Tensor, weight: Tensor, stride: Sequence[int]) -> None:
        """Reduce the bytes of the last event's pass over ``input``: a strided 1x1 kernel skips most pixels."""
        if set(weight.shape[2:]) == {1} and max(stride) > 1:
            event, key = self.events[-1], self.tensor_id(input)
            event.reads[:] = [
                Touch(one.tensor, one.bytes // math.prod(stride)) if one.tensor == key else one for one in event.reads
            ]

    def _convolution_backward(
        self, grad: Tensor, input: Tensor, weight: Tensor, biases: Any, stride: Any, *rest: Any
    ) -> tuple[Tensor | None, ...]:
        groups, (needs_input, needs_weight, needs_bias) = rest[4], rest[5]
        shapes = tuple(input.shape), tuple(weight.shape), tuple(grad.shape)
        grad_input = _empty_channels_last(input, input.shape) if needs_input else None
        grad_weight = torch.empty_like(weight) if needs_weight else None
        if grad_input is not None:
            gemm = convolution_gemm("input_gradient", *shapes, groups)
            self._record_aten("convolution_backward", (grad, weight), {}, grad_input, gemm)
        if grad_weight is not None:
            gemm = convolution_gemm("weight_gradient", *shapes, groups)
            self._record_aten("convolution_backward", (grad, input), {}, grad_weight, gemm)
            self._scale_strided(input, weight, stride)
        grad_bias = weight.new_empty(weight.shape[0]) if needs_bias else None
        if grad_bias is not None:
            self._record_aten("sum", (grad,), {}, grad_bias)
        return grad_input, grad_weight, grad_bias

    # Our operators

    def call(self, backend: str, name: str, operator: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        """Run an operator of a backend, and record its launches."""
        first = len(self.events)
        self._operator.append(f"{backend}::{name}")
        try:
            returned = self._call_cuda(operator, arguments) if backend == "cuda" else operator(*arguments)
        finally:
            self._operator.pop()
        _finish_operator(self, name, self.events[first:], arguments, returned)
        return returned

    def triton_launch(self, kernel: Any, grid: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Record one launch of a Triton kernel."""
        named = dict(zip(kernel.arg_names, arguments, strict=False)) | {
            key: value for key, value in options.items() if key in kernel.arg_names
        }
        tile = tuple(named[key] for key in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if key in named)
        self.events.append(
            Event(
                self._operator[-1] if self._operator else "triton::",
                kernel.__name__,
                [self.touch(one) for one in arguments if isinstance(one, Tensor)],
                grid=tuple(grid),
                threads=32 * options.get("num_warps", 4),
                variant=_triton_variant(kernel, named, options),
                tile=tile if len(tile) == 3 else None,  # type: ignore[arg-type]
                handle=("triton", kernel, tuple(grid), arguments, dict(options)),
            )
        )

    def _call_cuda(self, operator: Any, arguments: Sequence[Any]) -> Any:
        """Run a CUDA C++ operator's host code on uninitialized CPU tensors of the same layout as ``arguments``."""
        identities: dict[int, Tensor] = {}

        def to_cpu(tensor: Tensor) -> Tensor:
            one = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            identities[one.untyped_storage().data_ptr()] = tensor
            return one

        with torch.utils._python_dispatch._disable_current_modes():
            cpu = torch.utils._pytree.tree_map_only(Tensor, to_cpu, list(arguments))
        self._addresses = {
            one.untyped_storage().data_ptr(): (one.untyped_storage().nbytes(), one) for one in _tensors(cpu)
        }
        self._cuda_identities = identities
        try:
            returned = operator.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *cpu)
        finally:
            self._addresses = None

        def to_meta(tensor: Tensor) -> Tensor:
            known = identities.get(tensor.untyped_storage().data_ptr())
            if known is not None:
                return known
            with torch.utils._python_dispatch._disable_current_modes():
                one = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            self._storages[one.untyped_storage()._cdata] = (
                StorageWeakRef(one.untyped_storage()),
                self.tensor_id(tensor),
            )
            return one

        return torch.utils._pytree.tree_map_only(Tensor, to_meta, returned)

    def cuda_launch(self, launch: Any, argument: bytes) -> None:
        """Record one launch of a CUDA C++ kernel, and find its tensors by the addresses in its argument."""
        words = (ctypes.c_uint64 * (len(argument) // 8)).from_buffer_copy(argument[: len(argument) // 8 * 8])
        touches = []
        assert self._addresses is not None
        for word in words:
            for base, (size, tensor) in self._addresses.items():
                # Not padding after a 32-bit member, whose other half can be a stale half of an address.
                if word == base or (base < word < base + size and word & 0xFFFFFFFF > 1 << 16):
                    identity = self._cuda_identities.get(base, tensor)
                    touches.append(Touch(self.tensor_id(identity), base + size - word))
        self.events.append(
            Event(
                self._operator[-1],
                launch.kernel,
                touches,
                grid=launch.grid,
                threads=launch.threads,
                shared=launch.shared,
                variant=launch.kernel,
                tile=_cuda_tile(launch.kernel),
                handle=("cuda", launch.kernel),
            )
        )

    # The context

    def __enter__(self) -> Recorder:
        self._stack = contextlib.ExitStack()
        global _current
        self._stack.enter_context(mock.patch.object(_torch_compat, "has_torch_dispatch_mode", return_value=False))
        self._stack.enter_context(_use_recorder(self))
        if self.backend is not None:
            kernels = _recording_kernels(self.backend)
            resolved = {(name, "meta"): kernels for name in ("auto", self.backend)}
            self._stack.enter_context(mock.patch.dict(registry._resolve_cache, resolved))
            self._stack.enter_context(mock.patch.object(registry, "_conv_preference", self.preference))
            self._stack.enter_context(implicit_gemm.assume_machine("sm_90"))
            for name in self.backend.split("+"):
                self._stack.enter_context(_intercept(name, self))
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._stack.close()


_current: Recorder | None = None


@contextlib.contextmanager
def _use_recorder(recorder: Recorder) -> Iterator[None]:
    global _current
    previous, _current = _current, recorder
    try:
        yield
    finally:
        _current = previous


def _intercept(backend: str, recorder: Recorder) -> contextlib.AbstractContextManager[Any]:
    if backend == "triton":
        from fused_res.backends.triton.launch import intercept_launches

        return intercept_launches(recorder.triton_launch)
    from tools.ptx import nvcc_runner

    return nvcc_runner.intercept_launches(recorder.cuda_launch)


@functools.cache
def _recording_kernels(name: str) -> Kernels:
    """Return a backend's kernels with every operator replaced by one that reports to the current recorder."""
    norms, _, convolutions = name.partition("+")
    if "cuda" in (norms, convolutions):
        from tools.cuda_sim.simulator import build

        library = build()
        if not os.path.exists(library):
            raise RuntimeError(f"the launches of the CUDA C++ backend need the simulator: {library}")
        with mock.patch.dict(os.environ, {"FUSED_RES_SIMULATOR": str(library)}):
            kernels = registry._load(name)
        if kernels.batch_norm_stats.namespace != "fused_res_sim":
            raise RuntimeError("the CUDA C++ library is loaded in this process: record launches in another one")
    else:
        kernels = registry._load(name)

    def wrap(operator_name: str, operator: Callable[..., Any]) -> Callable[..., Any]:
        backend = convolutions if convolutions and operator_name.startswith("conv_") else norms
        if backend == "cuda":  # without the Python function that adds activations
            operator = getattr(getattr(torch.ops, kernels.batch_norm_stats.namespace), operator_name).default

        def call(*arguments: Any) -> Any:
            assert _current is not None, "a recorded program runs outside its recorder"
            return _current.call(backend, operator_name, operator, arguments)

        return call

    operators = {
        key: wrap(key, value) for key, value in vars(kernels).items() if callable(value) and key not in _NOT_OPERATORS
    }
    return Kernels(**{**vars(kernels), **operators})


_NOT_OPERATORS = ("prepare_inference_graph",)


def _finish_operator(
    recorder: Recorder, name: str, events: list[Event], arguments: Sequence[Any], returned: Any
) -> None:
    """Complete the events of one operator with what only the operator's arguments show: the GEMM, strided passes."""
    ours = [event for event in events if event.backend != "aten"]
    external = {recorder.tensor_id(t) for t in _tensors((arguments, returned)) if t.numel()}
    outputs = {recorder.tensor_id(t) for t in _tensors(returned)} - {recorder.tensor_id(t) for t in _tensors(arguments)}
    for event in ours:
        if event.kernel.endswith("sums_kernel") or "11sums_kernel" in event.kernel:
            # The struct of the CUDA kernel contains the gradients, too, which only dx_kernel writes.
            event.reads[:] = [touch for touch in event.reads if touch.tensor not in outputs]
        if "add_masked_kernel" in event.kernel:  # reads and writes its first operand
            event.reads.insert(0, event.reads[0])
    gemm, strided = operator_gemm(name, arguments, returned)
    if gemm is None or not ours:
        return
    main = next(event for event in ours if event.tile is not None)
    main.gemm = gemm
    if name == "conv_bn_stats":
        main.formed, main.statistics = (arguments[3] is not None, False), arguments[9]
    elif name == "conv_dgrad":
        main.formed, main.statistics = (arguments[1] is not None, False), arguments[9] is not None
    elif name == "conv_wgrad":
        main.formed = True, arguments[9] is not None
    if strided is not None:
        key, factor = recorder.tensor_id(strided[0]), strided[1]
        main.reads[:] = [Touch(t.tensor, t.bytes // factor) if t.tensor == key else t for t in main.reads]
    if "split_k_reduce" in ours[-1].kernel:
        # The struct of a split-K GEMM contains the epilogue's operands, too, which only the reduction kernel accesses.
        epilogue = {touch.tensor for touch in ours[-1].reads} & external
        main.reads[:] = [touch for touch in main.reads if touch.tensor not in epilogue]


def _empty_channels_last(like: Tensor, shape: Sequence[int]) -> Tensor:
    format = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=format)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _triton_variant(kernel: Any, named: dict[str, Any], options: dict[str, Any]) -> str:
    """Return a text that is equal for launches of the same kernel: its constants, dtypes and options.

    Sizes are not in it, although Triton specializes integers that are 1 or divisible by 16.
    """
    words = []
    constants = {key for key, annotation in kernel.fn.__annotations__.items() if "constexpr" in str(annotation)}
    for key, value in named.items():
        if isinstance(value, Tensor):
            words.append(f"{key}:{str(value.dtype).removeprefix('torch.')}")
        elif value is None or key in constants:
            words.append(f"{key}={value}")
    return " ".join([kernel.__name__, *words, *(f"{k}={v}" for k, v in sorted(options.items()))])


def _cuda_tile(kernel: str) -> tuple[int, int, int] | None:
    """Return rows, columns and depth of the threadblock tile in a mangled name, from ``TileShape<rows, cols, ...>``."""
    found = re.search(r"TileShapeILi(\d+)ELi(\d+)E", kernel)
    return None if found is None else (int(found[1]), int(found[2]), 32)
