// What the kernels of one instruction set offer, as a table of plain functions. Included by the host side,
// compiled for the baseline, and by isa/kernels.cpp, compiled once for each instruction set: so no ATen and
// no STL, whose inline functions would reach the linker in an AVX-512 version and then run everywhere.
#pragma once

#include <stdint.h>

namespace fused_res::cpu {

enum class Dtype { kFloat32, kFloat64, kBFloat16, kFloat16 };
constexpr int kDtypes = 4;

enum class Layout { kNhwc, kNchw };  // rows of channels; planes, one for each channel
constexpr int kLayouts = 2;

// The part of a tensor that one call handles. NHWC: the channels [c0, c1) of the rows [n0, n1), a row being
// one pixel. NCHW: the positions [s0, s1) in the planes of the channels [c0, c1) of the images [n0, n1).
struct Block {
  int64_t channels;  // of the whole tensor: the length of an NHWC row
  int64_t spatial;   // of the whole tensor: the length of an NCHW plane
  int64_t n0, n1;
  int64_t c0, c1;
  int64_t s0, s1;
};

// "stats" in the comments: float, or double for float64 tensors. "mask": one bit an element, least
// significant first, rows (NHWC) or planes (NCHW) padded to whole bytes.

struct ForwardArgs {
  const void* x;
  const void* residual;  // or null
  const void* mean;      // stats[C]
  const void* scale;     // stats[C]
  const void* shift;     // stats[C]
  void* y;               // may be x
  uint8_t* mask;         // or null
  bool relu;
  bool stream;  // write y past the caches; y is aligned for that
};

struct BackwardArgs {
  const void* dy;
  const void* x;
  const void* mean;     // stats[C]
  const void* scale;    // stats[C]
  const void* shift;    // stats[C]
  const uint8_t* mask;  // or null; goes before `relu`
  bool relu;            // without a mask: recompute it
  const void* slope;    // stats[C], or null: dx = scale * dy
  const void* offset;   // stats[C]
  void* dx;             // or null
  void* dresidual;      // or null
  bool stream;
};

struct ParamArgs {     // of one normalisation, converted to the stats dtype
  const void* weight;  // stats[C], or null
  const void* bias;    // stats[C], or null
  double eps;
};

struct GradientArgs {
  const void* stats;  // stats[5][C]
  void* slope;        // stats[C] each
  void* offset;
  void* dweight;
  void* dbias;
};

// The rows of a stats tensor.
enum StatsRow { kMean, kInvstd, kScale, kShift, kVar, kStatsRows };

// Partial results are doubles [2][C]: (mean, M2) of the forward statistics, (sum dy, sum dy * (x - mean)) of
// the backward ones.
struct BatchNormActKernels {
  void (*moments)(const Block&, const void* x, double* partial);
  void (*forward)(const Block&, const ForwardArgs&);
  void (*reduce)(const Block&, const BackwardArgs&, double* partial);
  void (*backward)(const Block&, const BackwardArgs&);
};

struct PoolArgs {
  int64_t images, channels, height, width;  // of the input
  int64_t out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
  const void* x;      // forward: input; backward: gradient of the output
  const void* mean;   // stats[C]
  const void* scale;  // stats[C], or null: x is pooled as it is
  const void* shift;  // stats[C]
  bool relu;
  void* y;           // forward: output; backward: gradient of the input
  uint8_t* indices;  // of the output's shape: position in the window
};

struct MaxPoolKernels {
  // The rows [begin, end) of what is written: (image, y) in NHWC, (plane, y) in NCHW.
  void (*forward)(const PoolArgs&, int64_t begin, int64_t end);
  void (*backward)(const PoolArgs&, int64_t begin, int64_t end);
};

struct Kernels {
  const char* name;
  BatchNormActKernels batch_norm_act[kDtypes][kLayouts];
  MaxPoolKernels max_pool[kDtypes][kLayouts];
  // self += mask ? grad : 0, in rows of `cols` elements; mask or null
  void (*add_masked[kDtypes])(void* self, const void* grad, const uint8_t* mask, int64_t begin, int64_t end,
                              int64_t cols);
  // partial_a[2][C] = merge(partial_a, partial_b) for the channels [c0, c1), or the plain sum
  void (*merge)(double* a, const double* b, double count_a, double count_b, int64_t channels, int64_t c0,
                int64_t c1);
  void (*add)(double* a, const double* b, int64_t channels, int64_t c0, int64_t c1);
  // stats[5][C] from merged moments. [0]: float, [1]: double
  void (*finish[2])(void* stats, const double* moments, double count, const ParamArgs&, int64_t channels,
                    int64_t c0, int64_t c1);
  // From sums[2][C] and stats[5][C]: slope[C] and offset[C] of BackwardArgs, dweight[C], dbias[C]; each may
  // be null.
  void (*finish_gradient[2])(const GradientArgs&, const double* sums, double count, int64_t channels,
                             int64_t c0, int64_t c1);
};

extern const Kernels kernels_baseline;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

}  // namespace fused_res::cpu
