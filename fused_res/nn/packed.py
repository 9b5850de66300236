"""Packed inference on live modules: convolutions with their batch norms folded in, derived from the modules' tensors.

The modules are not modified, and nothing is stored in them. Their folded and packed weights are derived data: every
call of :meth:`PackedProgram.run` compares the modules with a snapshot and derives them again after a change, so that
the modules can be called alone, trained, loaded and moved in between. `folded_layer` holds the weights, `packed_steps`
what runs for one input shape.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor, nn

from fused_res import _torch_compat, functional
from fused_res.backends import registry
from fused_res.dispatch import Selection, tuning
from fused_res.nn import chain
from fused_res.nn.chain import Unit
from fused_res.nn.folded_layer import MAX_CACHE_ENTRIES, cache_lock, insert_bounded
from fused_res.nn.packed_steps import Block, Head, Prepared, Settings, prepare, prepare_tuned
from fused_res.ops.memory_format import has_channels_last_strides, is_permuted

__all__ = ["Block", "Head", "PackedProgram", "Unit"]

#: Bound on the sequences of blocks of one program, for a program whose modules are replaced again and again.
_MAX_SEQUENCES = 256


class PackedProgram:
    """Runs blocks of a model with packed weights; caches what it prepared for each sequence of blocks and input shape.

    Programs of one model share the packed weights, which live as long as a program that uses them. A program refers to
    the modules: keep it in the model, not in a global variable. Copies and pickles of a program start empty.
    """

    def __init__(self, tune: bool = False) -> None:
        self._tune = tune
        self._sequences: dict[tuple[Block | Head, ...], _Sequence] = {}

    def __reduce__(self) -> tuple[type[PackedProgram], tuple[bool]]:
        return PackedProgram, (self._tune,)  # a copied model has other modules

    def run(
        self, x: Tensor, blocks: tuple[Block | Head, ...], residual: Tensor | None = None, backend: str = "auto"
    ) -> Tensor | None:
        """Return the output of consecutive blocks, or None if the caller has to compute it another way.

        None is returned while PyTorch traces, compiles or exports; under dispatch modes and ``torch.func`` transforms;
        if a gradient is needed; if a norm uses the statistics of the batch; for tensors, shapes and settings that the
        kernels do not support or that PyTorch rejects; and while a CUDA graph is captured, unless an earlier call has
        prepared this input shape.

        Args:
            x: input ``(N, C, ...)`` of rank 3 to 5.
            blocks: the blocks, of which the last may be a :class:`Head`; the output of each is the input of the next.
            residual: tensor that the block with the shortcut ``"tensor"`` adds, of the dtype and shape of what it is
                added to; None if there is no such block.
            backend: name of a backend, see :mod:`fused_res.backends`.

        Raises:
            BackendUnavailableError: the named backend cannot run on `x`'s device.
        """
        if torch.compiler.is_compiling() or chain.unsupported_context() or _torch_compat.has_torch_dispatch_mode():
            return None
        if chain.inspect_input(x) or _torch_compat.is_functorch_wrapper(x):
            return None
        refuse_grad = torch.is_grad_enabled()
        if refuse_grad and (x.requires_grad or (residual is not None and residual.requires_grad)):
            return None
        kernels = registry.resolve(backend, x.device)
        autocast, preference = functional.autocast_dtype(x), registry.conv_preference()
        if self._tune and preference == "planned" and x.device.type == "cpu" and tuning.can_measure(x.device):
            preference = "tuned"
        key = (
            x.shape, x.dtype, x.device, autocast, preference, kernels.name, *registry.selection_settings(kernels.name)
        )  # fmt: skip
        sequence = self._sequences.get(blocks)
        prepared = None if sequence is None else sequence.prepared.get(key)
        if sequence is None or prepared is None or not prepared.snapshot.is_current(refuse_grad):
            if prepared is not None and prepared.snapshot.is_current():
                return None  # a gradient is needed
            if sequence is None:
                sequence = _Sequence()
            elif prepared is not None:
                sequence.discard_prepared()
            if x.is_cuda and torch.cuda.is_current_stream_capturing():
                return None  # tensors that are created during the capture must not outlive the CUDA graph
            settings = Settings(kernels, preference, x.device, autocast or x.dtype, autocast is not None)
            blocks = tuple([block if isinstance(block, Head) else Block.of(*block) for block in blocks])
            if preference == "tuned":
                prepared = prepare_tuned(x, residual, blocks, settings, refuse_grad)
            else:
                prepared = prepare(x, blocks, settings, refuse_grad)
            if prepared is None:
                return None
            insert_bounded(sequence.prepared, key, prepared, MAX_CACHE_ENTRIES)
            insert_bounded(self._sequences, blocks, sequence, _MAX_SEQUENCES)
        # The kernels return channels_last memory, PyTorch only if the input or a weight has it.
        is_channels_last = prepared.has_channels_last_weight or has_channels_last_strides(x)
        if is_channels_last and x.dim() == 5:
            return None  # which memory format a Conv3d returns depends on the library that computes it
        if not prepared.accepts(residual) or (blocks[0][1:2] == ("identity",) and is_permuted(x)):
            return None
        sequence.last = prepared
        output = prepared.run(x, residual)
        return output if is_channels_last or output.dim() == 2 else output.contiguous()

    def selected(self) -> dict[nn.Module, Selection]:
        """Return the algorithm that each convolution or linear layer ran last, for human-readable reports.

        A linear layer that ran as a matrix multiplication of PyTorch is left out.
        """
        found: dict[nn.Module, Selection] = {}
        for blocks, sequence in list(self._sequences.items()):
            if sequence.last is not None:
                modules = [unit.conv for block in blocks for unit in block.convolutions]
                pairs = zip(modules, sequence.last.convolutions, strict=True)
                found |= {module: packed.selected for module, packed in pairs if packed.selected is not None}
        return found


class _Sequence:
    """What was prepared for one sequence of blocks: by input shape, dtype and settings, and what ran last."""

    __slots__ = ("last", "prepared")

    def __init__(self) -> None:
        self.prepared: dict[Hashable, Prepared] = {}
        self.last: Prepared | None = None

    def discard_prepared(self) -> None:
        """Free what was derived from weights that have changed, for all input shapes."""
        with cache_lock:
            self.prepared.clear()
        self.last = None
