"""Device code of the Triton backend; the host code that selects tile sizes and launches it is one folder up.

The batch norm kernels process an activation as *tiles* of a matrix: in channels_last (NHWC) memory rows are pixels and
columns channels; in contiguous (NCHW) memory rows are images and columns the pixels of one channel. The convolution
kernels are GEMMs with their operands and output in channels_last memory. ``LARGE`` is set where element offsets need 64
bits, ``ACC`` is the accumulation dtype.

Sizes that vary with the batch or the image are not specialized (``do_not_specialize``), so that another batch size
compiles no new variant; the number of channels is, because loads are vectorized by its divisibility by 16.
"""
