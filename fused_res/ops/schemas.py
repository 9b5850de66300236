"""Schemas and semantics of the operators that every backend implements: the reference for a kernel author.

Each backend registers its kernels for the same schemas in a dispatcher namespace of its own (``fused_res_cpu::``,
``fused_res_triton::``, ``fused_res_cuda::``), so that two backends on one device do not compete for a dispatch key.
Definitions are in Python only; C++ and Triton code only register implementations. The ``reference`` backend
(:mod:`fused_res.backends.reference`) implements every operator in plain PyTorch and is the specification that kernels
are tested against.

Below, each entry of :data:`SCHEMAS` has a comment with its formula, its arguments and its results. The conventions that
all of them share:

**Notation.** ``N`` images (or rows), ``C`` channels and ``S`` pixels per image; ``M = N * S`` values per channel. ``K``
is the number of output channels of a convolution. ``x`` is the input, ``y`` the output, ``dy`` the gradient with
respect to ``y``. Vectors of shape ``(C,)`` are broadcast along dimension 1.

**Batch norm** (Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167)::

    mean = sum x / M,  var = sum (x - mean)^2 / M        in training; the running statistics in evaluation
    xhat = (x - mean) * invstd                           invstd = 1 / sqrt(var + eps)
    norm(x) = weight * xhat + bias                       an absent weight is 1, an absent bias is 0

**Statistics.** ``stats`` is one tensor of shape ``(5, C)``, float32, or float64 for float64 input
(:func:`stats_dtype`), whose rows are

==========  ====================================================================================
``MEAN``    mean of the batch in training, the running mean in evaluation
``INVSTD``  ``1 / sqrt(var + eps)`` of the biased variance
``SCALE``   ``weight * invstd``
``SHIFT``   ``bias + (rounded mean - mean) * scale``: the bias, and a compensation for rounding the mean
``VAR``     unbiased variance of the batch, the value that ``update_running_stats`` reads; in evaluation ``running_var``
==========  ====================================================================================

Every kernel of every backend evaluates the norm as ``fma(x - mean, scale, shift)``: forward, recomputation, prologues
and backward, so that a recomputed ReLU mask is bitwise equal to the forward one. The usual form,
``fma(x, scale, bias - mean * scale)``, loses about ``log2(|mean| / std)`` bits to cancellation. ``x - mean`` does not:
it is exact where ``x`` is within a factor of two of the mean (Sterbenz lemma) and correctly rounded elsewhere.

**Partial statistics.** ``partials`` is float64 of shape ``(P, 3, C)``: count, mean and ``M2 = sum (x - mean)^2`` of
``P`` disjoint parts of the batch. Operators return one part (``P = 1``); the ranks of a process group stack theirs.
``merge_stats`` combines them (Chan, Golub & LeVeque 1979). A part with a count of 0 is ignored, whatever its other rows
hold.

**Gradient sums.** ``sums`` has the dtype of ``stats`` and the shape ``(2, C)``: ``sum dy'`` and ``sum dy' * xhat``,
with ``dy'`` the gradient with respect to the activation's input. Over the ranks of a process group they are added and
multiplied by local count / global count (``total_sums`` in :mod:`fused_res.distributed`), because every rank passes its
local ``count`` with them. Given the sums, the backward of a batch norm is elementwise::

    dx = scale * (dy' - sums[0] / count - xhat * sums[1] / count)    batch statistics of `count` values per channel
    dx = scale * dy'                                                 constant statistics (evaluation): `sums` is None

**Activation.** ``act`` is named by ``activation``, one of :data:`fused_res.ops.checks.ACTIVATIONS`. Its value at NaN is
NaN. ``act'`` is the derivative that PyTorch uses, in backward ``dy' = dy * act'(z)`` with ``z = norm(x)``; at the kinks
and at NaN it is the value of the condition:

================  =======================================  ======================================================
``activation``    ``act(z)``                               ``act'(z)``
================  =======================================  ======================================================
``"identity"``    ``z``                                    ``1``
``"relu"``        ``max(z, 0)``                            ``0 if z <= 0 else 1``
``"relu6"``       ``min(max(z, 0), 6)``                    ``0 if z <= 0 or z >= 6 else 1``
``"leaky_relu"``  ``z if z > 0 else negative_slope * z``   ``1 if z > 0 else negative_slope``
``"silu"``        ``z / (1 + exp(-z))``                    ``s * (1 + z * (1 - s))``, ``s = 1 / (1 + exp(-z))``
================  =======================================  ======================================================

ReLU6: Howard et al. 2017, https://arxiv.org/abs/1704.04861; SiLU: Elfwing et al. 2017, https://arxiv.org/abs/1702.03118.
SiLU is NaN at ``-inf``, and so is its derivative at both infinities, as in PyTorch. ``negative_slope`` is read for
``"leaky_relu"`` only. Operators with a flag ``relu`` (convolutions, prologues) apply ``"relu"`` or ``"identity"``.

Backward operators get ``act'`` in one of two forms:

- ``relu_mask``, with ``"relu"`` or ``"identity"``: uint8, one bit per element, least significant bit first, set where
  the gradient passes. A row of bits is padded to whole bytes. It is one pixel, ``(N * S, ceil(C / 8))``, if
  :func:`fused_res.ops.memory_format.is_channels_last` is true for the norm's input, and one plane,
  ``(N * C, ceil(S / 8))``, otherwise (:func:`fused_res.ops.memory_format.relu_mask_shape`).
- ``relu_mask=None``: ``act'(z)`` is recomputed from ``z = norm(x)``. This is possible only where no residual was added
  before the activation.

**Residual.** ``residual`` has the shape and dtype of ``input`` and is added before the activation, which must then be
``"relu"`` or ``"identity"``. With ``residual_stats`` ``(5, C)``, ``norm(residual)`` is added instead: the batch norm of
a projection shortcut, whose output is never materialized. ``residual_stats`` requires ``residual``.

**Operand prologue.** Operators with ``input_stats`` and ``input_relu`` (``stats`` and ``relu`` of ``max_pool_forward``)
apply ``act(norm(input))`` to their input while they load it, rounded to the input's dtype as if it had been stored.
Padding is applied after the prologue: padded positions are 0 (-inf in max pooling). ``input_stats=None``: the input is
used as is.

**Dtypes.** ``input`` is float32, float64, bfloat16 or float16. Arithmetic, accumulation and statistics are in
``stats_dtype(input.dtype)`` or wider; each result is rounded once. Parameters (``weight``, ``bias``, running
statistics) of a norm have the input's dtype or float32.

**Shapes and strides.** Norms accept 2 to 5 dimensions, ``(N, C)`` to ``(N, C, D, H, W)``; convolutions 3 to 5. Operands
may have any strides: a kernel copies what it cannot address. An elementwise result has the strides of
``torch.empty_like(input)``. Batches may be empty. A result that is not requested (``save_mask``, ``partials``, a false
entry of ``output_mask``) is returned with the shape ``(0,)``. :mod:`fused_res.ops.fakes` has the exact shape, dtype and
strides of every result.

**Determinism.** The kernels reduce in a fixed order that depends on shapes and dtypes only, not on the number of
threads or on the GPU: equal inputs give equal bits.

Arguments are validated by the callers (:mod:`fused_res.ops.checks`); kernels check only what memory safety requires.
"""

from __future__ import annotations

import torch

#: Operator name -> schema, for every backend.
SCHEMAS = {
    # --- batch norm, residual addition and activation --------------------------------------------------------------
    # Return `stats` (5, C): of the batch if `training`, else from running_mean and running_var (both (C,), then
    # required). Running statistics are read, never written: `update_running_stats` does that.
    "batch_norm_stats": "(Tensor input, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var,"
    " bool training, float eps) -> Tensor",
    # output = act(norm(input) [+ residual | + norm(residual)]), with `stats` as of `batch_norm_stats`.
    # If `save_mask`, relu_mask is the ReLU mask of the sum, for "relu" and "identity".
    "batch_norm_act_forward": "(Tensor input, Tensor? residual, Tensor? residual_stats, Tensor? weight, Tensor? bias,"
    " Tensor? running_mean, Tensor? running_var, bool training, float eps, str activation, bool save_mask,"
    " float negative_slope=0.01) -> (Tensor output, Tensor stats, Tensor relu_mask)",
    # The elementwise half of `batch_norm_act_forward`, from existing `stats`: bitwise equal to its output and mask.
    # Used for recomputation in backward and where statistics come from a convolution's epilogue or from several ranks.
    "batch_norm_act_apply": "(Tensor input, Tensor stats, Tensor? residual, Tensor? residual_stats, str activation,"
    " bool save_mask, float negative_slope=0.01) -> (Tensor output, Tensor relu_mask)",
    # In place, input = act(norm(input) [+ residual | + norm(residual)]) with running statistics.
    "batch_norm_act_inference_": "(Tensor(a!) input, Tensor? residual, Tensor? residual_stats, Tensor? weight,"
    " Tensor? bias, Tensor running_mean, Tensor running_var, float eps, str activation, float negative_slope=0.01)"
    " -> ()",
    # Backward of act(norm(input) + residual), `residual` optional and without a norm. With dy' = dy * act':
    #   grad_input = dx as above, with batch statistics (count = M) if `training`, else constant ones;
    #   grad_residual = dy';  grad_weight = sum dy' * xhat;  grad_bias = sum dy'.
    # `output_mask` requests the four results in this order. Those like `input` have its dtype and strides; grad_weight
    # and grad_bias have the dtype of `weight`, or of `stats` without one.
    "batch_norm_act_backward": "(Tensor grad_output, Tensor input, Tensor? weight, Tensor stats, Tensor? relu_mask,"
    " bool training, str activation, bool[4] output_mask, float negative_slope=0.01)"
    " -> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)",
    # Backward of act(norm(input) + norm(residual)): the end of a block with a projection shortcut. Both norms have the
    # same dy' = dy * mask (relu_mask None: no ReLU), so it is read once. Gradients as of `batch_norm_act_backward`, for
    # each norm with its own `stats`, `weight` and `training`; `output_mask` requests the six results in the order of
    # the schema.
    "batch_norm_act_backward_pair": "(Tensor grad_output, Tensor input, Tensor? weight, Tensor stats, Tensor residual,"
    " Tensor? residual_weight, Tensor residual_stats, Tensor? relu_mask, bool training, bool residual_training,"
    " bool[6] output_mask) -> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias,"
    " Tensor grad_residual_weight, Tensor grad_residual_bias)",
    # In place, self += grad * mask: accumulate the masked gradient of a shortcut. `relu_mask` is in the layout of
    # `grad`; None adds all of `grad`. `self` and `grad` have equal shapes and dtypes.
    "add_masked_": "(Tensor(a!) self, Tensor grad, Tensor? relu_mask) -> ()",
    # For each norm, in place: running_mean = (1 - momentum) * running_mean + momentum * stats[MEAN], and running_var
    # likewise from stats[VAR], in the dtype of `stats`. The lists have one entry per norm.
    "update_running_stats": "(Tensor(a!)[] running_mean, Tensor(b!)[] running_var, Tensor[] stats, float[] momentum)"
    " -> ()",
    # --- the two passes of a norm, reduction and elementwise, as separate operators --------------------------------
    # For callers that do other work in between: a convolution whose epilogue computes the partial statistics, a
    # convolution whose prologue normalizes, or a process group that reduces statistics over its ranks (SyncBatchNorm).
    #
    # Return the partial statistics (1, 3, C) of `input`.
    "batch_norm_partials": "(Tensor input) -> Tensor",
    # Merge `partials` (P, 3, C) and return `stats` (5, C), float64 if `double`, else float32. `weight` and `bias` as of
    # `batch_norm_stats`. With n values in all, var = M2 / n for INVSTD and M2 / max(n - 1, 1) for VAR.
    "merge_stats": "(Tensor partials, Tensor? weight, Tensor? bias, float eps, bool double) -> Tensor",
    # Return the gradient sums (2, C) of this rank's batch. With `residual` and `residual_stats` (both or neither) the
    # shape is (3, C): the third row is sum dy' * xhat with the xhat of the residual; sum dy' is common to both norms.
    "batch_norm_sums": "(Tensor grad_output, Tensor input, Tensor stats, Tensor? relu_mask, str activation,"
    " Tensor? residual, Tensor? residual_stats, float negative_slope=0.01) -> Tensor",
    # grad_input of a norm, elementwise, from `sums` (2, C) and `count`; only sums / count enters. `count` is the number
    # of values per channel of this rank. `sums` is as of `batch_norm_sums`; with a process group, the global sums times
    # local count / global count. `sums` None: the statistics are constants.
    "batch_norm_act_dx": "(Tensor grad_output, Tensor input, Tensor stats, Tensor? relu_mask, str activation,"
    " Tensor? sums, int count, float negative_slope=0.01) -> Tensor",
    # --- convolutions ----------------------------------------------------------------------------------------------
    # `weight` is (K, C / groups, ...); stride, padding and dilation have one entry per spatial dimension.
    #
    # Inference: output = act(conv(input, weight) + bias [+ residual]), rounded once. `residual` has the output's shape.
    # The output is channels_last if `conv_output_is_channels_last(input, weight)`, else contiguous.
    "conv_bias_act": "(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, int[] stride, int[] padding,"
    " int[] dilation, int groups, bool relu) -> Tensor",
    # Forward of norm-ReLU-convolution with the statistics of the following norm: output = conv(prologue(input), weight)
    # + bias, and, if `partials`, the partial statistics (1, 3, K) of the output as it is stored (rounded).
    # `input_stats` is (5, C). The output has the layout of `input` (is_channels_last).
    "conv_bn_stats": "(Tensor input, Tensor weight, Tensor? bias, Tensor? input_stats, bool input_relu, int[] stride,"
    " int[] padding, int[] dilation, int groups, bool partials) -> (Tensor output, Tensor partials)",
    # Input gradient of the convolution of `conv_bn_stats`, with the backward of the following norm as operand prologue:
    #   dz = batch_norm_act_dx(grad_output, output, stats, relu_mask, activation, sums, count), rounded to the output's
    #        dtype. `activation` is "relu" if `relu`, else "identity"; `output` (N, K, H, W) is the convolution's raw
    #        output, which is the norm's input;
    #   grad[n, c, h, w] = sum over k of dz[n, k, h, w] * weight[k, c], `weight` (K, C, 1, 1).
    # Without `output` and `stats` (both or neither) there is no prologue: dz is `grad_output`, and `relu_mask`, `relu`
    # and `sums` are None or false.
    # For 1x1 kernels without padding, dilation or groups. It ignores the stride: grad_input is (N, C, H, W) with the
    # size of `grad_output`, channels_last; for a stride other than 1 that is the compact gradient at the strided input
    # positions. Its epilogue is one of two:
    #   with `input` and `input_stats` (5, C): the backward of the prologue's ReLU and the reduction of the prologue's
    #       norm. grad_input is grad, with zeros where norm(input) <= 0 if `input_relu`; `sums` (2, C) are the gradient
    #       sums of grad_input with the xhat of `input`. `added` is None.
    #   without them: grad_input = grad [+ `added` * `added_mask`]. `added` is the gradient of a shortcut, in the shape
    #       of grad_input, and `added_mask` the relu_mask to apply to it, in channels_last layout, or None; `sums` has
    #       the shape (0,).
    "conv_dgrad": "(Tensor grad_output, Tensor? output, Tensor? stats, Tensor? relu_mask, bool relu, Tensor? sums,"
    " int count, Tensor weight, Tensor? input, Tensor? input_stats, bool input_relu, Tensor? added=None,"
    " Tensor? added_mask=None) -> (Tensor grad_input, Tensor sums)",
    # Weight gradient of the same convolution, with dz as of `conv_dgrad` and the forward convolution's `input`:
    #   grad_weight[k, c] = sum over n, p, q of dz[n, k, p, q] * prologue(input)[n, c, p * stride_h, q * stride_w].
    # The result is like `weight` (K, C, 1, 1).
    "conv_wgrad": "(Tensor grad_output, Tensor output, Tensor stats, Tensor? relu_mask, bool relu, Tensor? sums,"
    " int count, Tensor weight, Tensor input, Tensor? input_stats, bool input_relu, int[] stride) -> Tensor",
    # --- max pooling -----------------------------------------------------------------------------------------------
    # output = max_pool2d(prologue(input)), floor mode, without dilation; the prologue is act(norm(input)) if `stats` is
    # given. `indices` is uint8 in the output's shape: the position i * kernel_w + j of the maximum inside its window.
    # 255 is reserved for "no position", so a window has at most 255 positions. Ties and NaN are resolved as in PyTorch.
    # Padding is at most half the kernel.
    "max_pool_forward": "(Tensor input, Tensor? stats, bool relu, int[2] kernel_size, int[2] stride, int[2] padding)"
    " -> (Tensor output, Tensor indices)",
    # grad_input of the pooling: for each input pixel, the sum of grad_output over the windows whose maximum it is. Of
    # `input` only shape, dtype and strides are used. With a prologue, this is the gradient with respect to the
    # prologue's output.
    "max_pool_backward": "(Tensor grad_output, Tensor indices, Tensor input, int[2] kernel_size, int[2] stride,"
    " int[2] padding) -> Tensor",
}

#: Operator family -> its operators. A backend has kernels for all operators of a family or for none.
OP_FAMILIES: dict[str, tuple[str, ...]] = {
    "batch_norm_act": (
        "batch_norm_stats",
        "batch_norm_act_forward",
        "batch_norm_act_apply",
        "batch_norm_act_inference_",
        "batch_norm_act_backward",
        "batch_norm_act_backward_pair",
        "add_masked_",
        "update_running_stats",
    ),
    "batch_norm_sync": ("batch_norm_partials", "merge_stats", "batch_norm_sums", "batch_norm_act_dx"),
    "max_pool": ("max_pool_forward", "max_pool_backward"),
    "conv_bias_act": ("conv_bias_act",),
    "conv_bn_stats": ("conv_bn_stats",),
    "conv_dgrad": ("conv_dgrad",),
    "conv_wgrad": ("conv_wgrad",),
}

#: Building blocks of the CPU backend's ``conv_*`` families: images of float32, bfloat16 or float16 in channels_last
#: memory, and packed weights.
#: They are not part of the interface that all backends share and have no fake implementations.
CPU_SCHEMAS = {
    # Pack `weight` (K, C, kh, kw) into the panels that the kernels read. winograd: 0 for direct convolution; the
    # stride (1 or 2) of a Winograd convolution, whose filter is transformed first. transposed: the weight of the input
    # gradient, with filter positions reversed, and input and output channels exchanged. bf16_products: pack bfloat16,
    # for an algorithm that multiplies bfloat16, instead of float32. resident: many calls will read the packed weight.
    "pack_conv_weight": "(Tensor weight, int winograd, bool transposed, bool bf16_products=False,"
    " bool resident=False) -> Tensor",
    # act(conv(input) + bias [+ residual]). weight: packed, of one dimension, or (K, C, kh, kw), which is packed within
    # the call. outputs: number of output channels. tile: output pixels per side of a Winograd tile, m of
    # F(m x m, 3 x 3), or 0 for direct convolution, which may have a norm before it, with `input_stats` (5, C) and
    # `input_relu`. partials: also return the partial statistics (1, 3, outputs) of the output. bf16_products: multiply
    # bfloat16, instead of float32.
    "convolve": "(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, int outputs, int[2] kernel_size,"
    " int[2] stride, int[2] padding, int[2] dilation, int tile, bool relu, bool partials,"
    " bool bf16_products=False, Tensor? input_stats=None, bool input_relu=False)"
    " -> (Tensor output, Tensor partials)",
    # Gradients of a convolution of float32 or bfloat16 without groups, with the passes of the norms around it;
    # `output_mask` requests those of input and weight. Arguments as of `conv_dgrad` and `conv_wgrad`, for filters of
    # any size. Without `output` and `stats` (both or neither) there is no norm after it: dz is `grad_output`. Without
    # `input_stats` there is none before it. `weight` has the dtype of `input` or is float32, and its gradient has its
    # dtype. grad_input is [+ `added` * `added_mask`], not masked by the ReLU of the prologue; `sums` are nevertheless
    # those of the masked gradient. That of a strided 1x1 convolution is compact. tile: as of `convolve`, of float32
    # without norms and addition.
    "conv_backward": "(Tensor grad_output, Tensor? output, Tensor? stats, Tensor? relu_mask, bool relu, Tensor? sums,"
    " int count, Tensor weight, Tensor input, Tensor? input_stats, bool input_relu, Tensor? added, Tensor? added_mask,"
    " int[2] stride, int[2] padding, int[2] dilation, bool[2] output_mask, int tile=0)"
    " -> (Tensor grad_input, Tensor sums, Tensor grad_weight)",
    # Run an inference graph: convolutions, poolings and linear layers with intermediate values in an arena. steps: the
    # graph in the format of csrc/cpu/conv_program.h. arena: size of the arena in elements per image. chunk: number of
    # images processed at a time.
    "conv_program": "(Tensor input, Tensor[] packed, Tensor[] bias, int[] steps, int arena, int chunk,"
    " int[] output_size) -> Tensor",
}

#: Rows of ``stats``.
MEAN, INVSTD, SCALE, SHIFT, VAR = range(5)


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of statistics and accumulators: float64 for float64, float32 for all other input dtypes."""
    return torch.float64 if dtype == torch.float64 else torch.float32
