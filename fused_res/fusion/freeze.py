"""``freeze``: a copy of a model for inference, with batch norms folded into packed weights."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm

from fused_res.backends import registry
from fused_res.fusion.convert import install, unfuse
from fused_res.fusion.fused import Settings, run_under_autocast
from fused_res.nn.fusable_module import FusableModule, check_model, check_settings

Model = TypeVar("Model", bound=nn.Module)


def freeze(model: Model, backend: str = "auto", tune: bool = False, dtype: torch.dtype | None = None) -> Model:
    """Return a copy of `model` for inference that runs with batch norms folded into packed weights.

    The copy has the model's modules, parameters, buffers and ``state_dict``, in evaluation mode and without gradients.
    Its forwards run packed programs derived from them: each convolution contains the following norm in its weight and
    bias and runs with the addition and the ReLU as one kernel (:func:`fused_res.functional.conv_bias_act`). On the CPU
    in float32, bfloat16 and float16, consecutive blocks, the global average pooling after them and an ``nn.Linear``
    classifier run as one call, so that a ResNet is one call. Children called by themselves, hooks, feature extractors
    and gradients of the input compute what they do in the source model. Pruning, weight norm, spectral norm and other
    parametrizations are replaced by the effective weights. The copy can be copied, pickled, moved, compiled and
    exported; compiled and exported code contains the unfolded layers.

    Weights are packed at the first call and again after they have changed: PyTorch counts writes to a tensor (in-place
    operators, ``copy_``, ``load_state_dict``), and replaced tensors or storages (``p.data = ...``, ``to``) are seen. A
    write through ``p.data`` or NumPy into the same storage is not counted: reassign the tensor, or copy the model,
    after such a write.

    ``train()`` leaves the copy in evaluation mode and warns once, so that it can be a part of a model in training.

    Args:
        model: any module; it is not modified.
        backend: name of a backend, see :mod:`fused_res.backends`; default ``"auto"``.
        tune: whether to measure, at the first call with each input shape, which algorithms are fastest, instead of
            selecting them by rules; on the CPU only. Each supported algorithm of a convolution computes it with its
            weights, after 64 MB of other data have passed through the caches. The rules' choice stays unless another is
            3 % faster, in six of seven rounds. Where the fastest cannot be a part of an inference graph, whole
            sequences of blocks are timed. Measured once a process for equal convolutions, with the threads of that
            call; other processes may choose other algorithms, and so give other rounding errors. Nothing is measured,
            and the rules select, under ``torch.use_deterministic_algorithms``. Default False.
        dtype: bfloat16 or float16: the copy runs under ``torch.autocast`` with this dtype. Its parameters stay in their
            dtype, and weights with folded norms are computed from them in float64 and rounded to float32, then to
            `dtype`. Default None: the dtype of the parameters.

    Returns:
        The copy, of `model`'s class.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `backend` is not a known name, or `dtype` is neither None, bfloat16 nor float16.
        BackendUnavailableError: the named backend cannot run here.
    """
    check_model(model)
    check_settings(backend, "none")
    if dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype: expected None, torch.bfloat16 or torch.float16, got {dtype!r}")
    registry.check_devices(backend, {parameter.device for parameter in model.parameters()})
    with torch.inference_mode(False), torch.no_grad():
        frozen = unfuse(_copy(model)).eval()
        for module in frozen.modules():
            _apply_reparametrizations(module)
            if isinstance(module, FusableModule):
                module.configure(backend)
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
    install(frozen, Settings(backend, tune=tune), packed=True, frozen=True)
    if dtype is not None:
        run_under_autocast(frozen, dtype)
    return frozen


def _copy(model: Model) -> Model:
    """Return a deep copy; tensors computed from parameters, which pruning leaves on modules, cannot be deep-copied."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in (*vars(module).values(), *module._buffers.values()):
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def _apply_reparametrizations(module: nn.Module) -> None:
    """Replace weights that are computed on every call by their present values."""
    if parametrize.is_parametrized(module):
        # remove_parametrizations would change the class, which the copy shares with the source.
        values = {name: getattr(module, name) for name in module.parametrizations}  # type: ignore[union-attr]
        module.__class__ = type(module).__bases__[0]
        del module._modules["parametrizations"]
        for name, value in values.items():
            module.register_parameter(name, nn.Parameter(value))
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)
        elif isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)
