// Convolution as blocked im2col + GEMM (the algorithm `direct`, without Winograd), NHWC: M = output pixels,
// N = output channels, K = kernel elements x input channels (the receptive field). For a 1x1 kernel with
// stride 1 and no padding the input itself is A; otherwise im2col copies the receptive fields of a block of
// pixels into scratch memory first.
#pragma once

#include "cpu/isa/epilogue.h"
#include "cpu/isa/micro_kernel.h"
#include "cpu/isa/operand.h"
#include "cpu/isa/tiles.h"

namespace fused_res::cpu {
namespace {

// Packs B: packed[panel][kernel row][kernel column][channel][kPanelWidth], padded with zeros.
void direct_pack(const WeightView& weight, Range panels, void* packed) {
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    float* to = static_cast<float*>(packed) +
                panel * weight.kernel_h * weight.kernel_w * weight.channels * kPanelWidth;
    const int64_t width = min(kPanelWidth, weight.out_channels - panel * kPanelWidth);
    const float* from = weight.data + panel * kPanelWidth * weight.output_stride;
    for (int64_t y = 0; y < weight.kernel_h; ++y) {
      for (int64_t x = 0; x < weight.kernel_w; ++x) {
        for (int64_t c = 0; c < weight.channels; ++c, to += kPanelWidth) {
          const float* w =
              from + y * weight.row_stride + x * weight.column_stride + c * weight.channel_stride;
          for (int64_t o = 0; o < kPanelWidth; ++o) to[o] = o < width ? w[o * weight.output_stride] : 0.0f;
        }
      }
    }
  }
}

inline void clear_floats(float* to, int64_t n) {
  for_each_vector<Vec<float>>(n, [&](auto part, int64_t i) { part.store(to + i, Vec<float>::zero()); });
}

// im2col: copies the receptive field of each output pixel of `rows` into a row of `to`; rows are
// padded_row_stride(K) floats apart. Padding is filled with zeros.
template <class T>
inline void im2col(const ConvolutionArgs& args, Range rows, float* to) {
  using V = Vec<float>;
  const int64_t line_floats = args.kernel_w * args.channels,
                stride = padded_row_stride(args.kernel_h * line_floats);
  int64_t x = rows.begin % args.out_width, y = rows.begin / args.out_width % args.out_height;
  int64_t image = rows.begin / (args.out_width * args.out_height);
  const auto advance = [&] {
    if (++x == args.out_width) {
      x = 0;
      if (++y == args.out_height) y = 0, ++image;
    }
  };
  const T* const input = static_cast<const T*>(args.x);
  const T* const end = input + args.images * args.height * args.width * args.channels;
  for (int64_t row = rows.begin; row < rows.end; ++row, to += stride) {
    const int64_t top = y * args.stride_h - args.pad_h, left = x * args.stride_w - args.pad_w;
    const Range valid_h = valid_taps(top, args.kernel_h, args.dilation_h, args.height);
    const Range valid_w = valid_taps(left, args.kernel_w, args.dilation_w, args.width);
    const T* corner = input + ((image * args.height + top) * args.width + left) * args.channels;
    const int64_t pitch = args.dilation_h * args.width * args.channels;
    if (valid_h.end - valid_h.begin == args.kernel_h && valid_w.end - valid_w.begin == args.kernel_w &&
        args.dilation_w == 1 && corner + (args.kernel_h - 1) * pitch + line_floats + V::lanes <= end) {
      // Copied in full vectors: the surplus elements are overwritten by the next line or lie in the padding
      // after the row.
      for (int64_t i = 0; i < args.kernel_h; ++i) {
        for (int64_t j = 0; j < line_floats; j += V::lanes)
          store(to + i * line_floats + j, load(corner + i * pitch + j));
      }
      advance();
      continue;
    }
    for (int64_t i = 0; i < args.kernel_h; ++i) {
      float* line = to + i * line_floats;
      if (i < valid_h.begin || i >= valid_h.end || valid_w.begin == valid_w.end) {
        clear_floats(line, line_floats);
        continue;
      }
      const T* from = corner + i * pitch;
      clear_floats(line, valid_w.begin * args.channels);
      if (args.dilation_w == 1) {
        copy_floats(line + valid_w.begin * args.channels, from + valid_w.begin * args.channels,
                    (valid_w.end - valid_w.begin) * args.channels);
      } else {
        for (int64_t j = valid_w.begin; j < valid_w.end; ++j) {
          copy_floats(line + j * args.channels, from + j * args.dilation_w * args.channels, args.channels);
        }
      }
      clear_floats(line + valid_w.end * args.channels, line_floats - valid_w.end * args.channels);
    }
    advance();
  }
}

// Micro-kernel with the epilogue applied to the accumulators in registers, for register blocks of full
// vectors. With the accumulators stored and loaded again, as in direct_run, a block with a K of 64 to 256
// takes 4 % longer.
template <class T, int R>
inline void micro_kernel_epilogue(const ConvolutionArgs& args, const float* a, int64_t stride, const float* b,
                                  int64_t k, int64_t pixel, int64_t c, int64_t ahead) {
  using V = Vec<float>;
  V acc[R][kNrVectors];
  micro_kernel<R>(a, stride, b, k, acc, ahead);
  const int64_t pitch = args.out_channels, first = pixel * pitch + c;
  if (args.bias) {
    V bias[kNrVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kNrVectors; ++v) bias[v] = load(args.bias + c + v * V::lanes);
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kNrVectors; ++v) acc[r][v] = acc[r][v] + bias[v];
    }
  }
  if (args.residual) {
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kNrVectors; ++v)
        acc[r][v] = acc[r][v] + load(static_cast<const T*>(args.residual) + first + r * pitch + v * V::lanes);
    }
  }
  if (args.relu) {
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kNrVectors; ++v) acc[r][v] = maskz(not_less_equal_zero(acc[r][v]), acc[r][v]);
    }
  }
  const bool stream = streaming_enabled<T>(args);
#pragma GCC unroll 14
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kNrVectors; ++v)
      store_or_stream(FullVector{}, static_cast<T*>(args.y) + first + r * pitch + v * V::lanes, acc[r][v],
                      stream);
  }
}

// acc = A B for n rows, with K accumulated in parts that are then added. The error of a dot product of 2048
// elements is a third of that of one accumulator, and at most that of PyTorch's linear layer.
inline void gemm_in_parts(int64_t n, const float* a, int64_t stride, const float* b, int64_t k, float* acc) {
  constexpr int64_t kPart = 64;
  micro_gemm(n, a, stride, b, min(k, kPart), acc);
  for (int64_t begin = kPart; begin < k; begin += kPart) {
    float part[kMr * kPanelWidth];
    micro_gemm(n, a + begin, stride, b + begin * kPanelWidth, min(k - begin, kPart), part);
    for (int64_t r = 0; r < n; ++r) {
      for (int v = 0; v < kNrVectors; ++v) {
        float* element = acc + r * kPanelWidth + v * Vec<float>::lanes;
        store(element, load(element) + load(part + r * kPanelWidth + v * Vec<float>::lanes));
      }
    }
  }
}

// Computes the output pixels `rows` for the output channels of `panels`: im2col if needed, then GEMM and
// epilogue, one register block at a time. With `moments`, the output's partial statistics are accumulated as
// well.
template <class T>
void direct_run(const ConvolutionArgs& args, Range rows, Range panels, void* scratch, double* moments) {
  constexpr int kLanes = Vec<float>::lanes;
  const int64_t k = args.kernel_h * args.kernel_w * args.channels;
  const float* a = static_cast<const float*>(args.x) + rows.begin * args.channels;
  int64_t stride = args.channels;
  if (sizeof(T) != sizeof(float) || args.needs_im2col) {  // im2col also widens
    im2col<T>(args, rows, static_cast<float*>(scratch));
    a = static_cast<const float*>(scratch), stride = padded_row_stride(k);
  }
  // The hardware prefetches within a row only. 1x1 kernels of 256 to 64 channels at 56x56, which read more
  // than they write, take 0.75 of the time with prefetches two register blocks ahead.
  const int64_t ahead = a == scratch ? 0 : 2 * kMr * stride;
  const int64_t end = min(panels.end * kPanelWidth, args.out_channels);
  // The positions of the output pixels in y, where they are strided.
  int64_t strided[kMaxDirectRows];
  for (int64_t i = 0; args.y_stride_h != 0 && i < rows.end - rows.begin; ++i) {
    const int64_t row = rows.begin + i, line = row / args.out_width;
    const int64_t x = row % args.out_width, y = line % args.out_height, image = line / args.out_height;
    strided[i] = (image * args.y_height + y * args.y_stride_h) * args.y_width + x * args.y_stride_w;
  }
  const auto pixel = [&](int64_t row) { return args.y_stride_h != 0 ? strided[row] : rows.begin + row; };
  // One pixel per image, as in a linear layer: reading the weight takes longer than accumulating in parts.
  const bool in_parts = args.out_height * args.out_width == 1;
  for (int64_t c = panels.begin * kPanelWidth; c < end; c += kNr) {
    const float* b =
        static_cast<const float*>(args.packed) + c / kPanelWidth * kPanelWidth * k + c % kPanelWidth;
    MomentAccumulator accumulators[kNrVectors];
    const int64_t prefetched = c == panels.begin * kPanelWidth ? ahead : 0;
    for_each_row_block(rows.end - rows.begin, [&](int64_t row, int64_t n) {
      for (int64_t r = 0; r < n; ++r) prefetch_epilogue<T>(args, pixel(row + r), c);
      if (c + kNr <= end && moments == nullptr && !in_parts && args.y_stride_h == 0) {
        return dispatch_mr(n, [&](auto count) {
          micro_kernel_epilogue<T, count.value>(args, a + row * stride, stride, b, k, rows.begin + row, c,
                                                prefetched);
        });
      }
      float acc[kMr * kPanelWidth];
      if (in_parts) {
        gemm_in_parts(n, a + row * stride, stride, b, k, acc);
      } else {
        micro_gemm(n, a + row * stride, stride, b, k, acc, prefetched);
      }
      for (int v = 0; v < kNrVectors && c + v * kLanes < end; ++v) {
        dispatch_tail(end - (c + v * kLanes), [&](auto part) {
          const Epilogue<T> epilogue(args, part, c + v * kLanes);
          Vec<float> values[kMr];
          for (int64_t r = 0; r < n; ++r) {
            values[r] = load(acc + r * kPanelWidth + v * kLanes);
            values[r] = epilogue.apply(part, values[r], pixel(row + r));
          }
          if (moments) accumulators[v].add(values, n);
        });
      }
    });
    for (int v = 0; moments && v < kNrVectors && c + v * kLanes < end; ++v) {
      const int64_t at = c + v * kLanes;
      dispatch_tail(end - at, [&](auto part) {
        accumulators[v].store(part, moments + at, moments + args.out_channels + at);
      });
    }
  }
  if (args.stream) stream_fence();
}

template <class T>
inline constexpr DirectKernels direct = {direct_pack, direct_run<T>};

}  // namespace
}  // namespace fused_res::cpu
