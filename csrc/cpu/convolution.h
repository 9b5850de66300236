// Work partition of a convolution into tasks. Free of torch, like partition.h. The arithmetic of each output
// depends on the shape only, so results are bitwise identical for any number of threads.
//
// The tasks run in a parallel loop, one region a layer: parallel(n, body) runs body(begin, end) over parts of
// [0, n), parallel.in_stages(...) the tasks of a TaskQueue (task_queue.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/caches.h"
#include "cpu/isa/kernels.h"
#include "cpu/isa/operand.h"
#include "cpu/isa/tiles.h"

namespace fused_res::cpu {
namespace {  // anonymous, as in tiles.h, because classes have members of its types

inline int64_t ceil_div(int64_t n, int64_t divisor) { return (n + divisor - 1) / divisor; }
// Part `index` of [0, n), divided into `parts` parts whose sizes differ by at most one, as by oneDNN's
// balance211, but with the larger parts interleaved.
inline Range balanced_range(int64_t n, int64_t index, int64_t parts) {
  return {n * index / parts, n * (index + 1) / parts};
}

inline int64_t num_panels(int64_t out_channels) { return ceil_div(out_channels, kPanelWidth); }
// The elements of a packed weight of float32.
inline int64_t packed_size(int64_t out_channels, int64_t channels, int64_t taps, bool winograd) {
  return num_panels(out_channels) * kPanelWidth * channels * (winograd ? kTransformPoints : taps);
}
// The elements of a weight that is packed for products of bfloat16, with K padded to whole blocks.
inline int64_t packed_bf16_size(int64_t out_channels, int64_t channels, int64_t kernel_h, int64_t kernel_w,
                                bool tiles) {
  return num_panels(out_channels) * kPanelWidth * padded_k(channels, kernel_h, kernel_w, tiles);
}

// True if the Winograd kernels support this geometry.
inline bool supports_winograd(const ConvolutionArgs& args) {
  return args.kernel_h == kTaps && args.kernel_w == kTaps && args.stride_h == args.stride_w &&
         args.stride_h >= 1 && args.stride_h <= 2 && args.dilation_h == 1 && args.dilation_w == 1;
}
// True if the Winograd kernels support the output tile size m = `tile`.
constexpr bool supports_winograd_tile(int64_t tile) { return tile >= 2 && tile <= 4; }

// A chunk is a range of output pixels or tiles; in the arguments of the kernels, `block` is this range.
//
// Memory for the partial statistics of a convolution's output, doubles (mean, M2)[out_channels] for each
// chunk; null if they are not requested.
struct ChunkMoments {
  double* data = nullptr;
  double* of(int64_t chunk, int64_t out_channels) const {
    return data ? data + chunk * 2 * out_channels : nullptr;
  }
};

// The chunk of pixels and the group of panels of a task. A thread's tasks are consecutive: its own pixels
// where there are enough chunks, so that it reads activations that it wrote, else its own part of the weight.
struct ChunkAndGroup {
  int64_t chunk, group;
};
inline ChunkAndGroup chunk_and_group(int64_t task, int64_t chunks, int64_t groups, int64_t threads) {
  if (chunks >= threads) return {task / groups, task % groups};
  return {task % chunks, task / chunks};
}

// Pixels of an NHWC tensor, for a kernel of a norm.
inline Block pixel_block(int64_t channels, Range pixels) {
  return {channels, 0, pixels.begin, pixels.end, 0, channels, 0, 0};
}

// Passes over the input or the output of a convolution, fused with it: chunk by chunk, in memory that stays
// in L2.
class ChunkFusion {
 public:
  virtual ~ChunkFusion() = default;
  // Computes the convolution's input for these pixels, counted through all images. With computes_input(), the
  // input of the convolution itself is not read.
  virtual bool computes_input() const { return false; }
  virtual void input(Range, void*) const {}
  // The output pixels `rows` are written.
  virtual void output(int64_t /*chunk*/, Range /*rows*/) const {}

  // The passes as stages before and after the convolution, where there are too few chunks for the threads.
  template <class Parallel>
  void input_stage(const Parallel& parallel, int64_t pixels, int64_t tasks, int64_t pixel_bytes,
                   char* to) const {
    parallel(tasks, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Range part = balanced_range(pixels, i, tasks);
        input(part, to + part.begin * pixel_bytes);
      }
    });
  }
  template <class Parallel, class Rows>
  void output_stage(const Parallel& parallel, int64_t chunks, const Rows& rows) const {
    parallel(chunks, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) output(chunk, rows(chunk));
    });
  }
};

inline int64_t element_size(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }
inline int64_t input_size(const ConvolutionArgs& args) { return args.images * args.height * args.width; }
// The most input pixels of a chunk of output pixels.
template <class Rows>
inline int64_t most_input_pixels(const ConvolutionArgs& args, int64_t chunks, const Rows& rows) {
  int64_t pixels = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const Range range = input_pixels(args, rows(chunk));
    pixels = std::max(pixels, range.end - range.begin);
  }
  return pixels;
}

// im2col + GEMM (isa/direct.h): a task is a chunk of output pixels and a group of panels. With a fusion, a
// task is a chunk, if there are enough of them; otherwise the passes of the fusion are stages before and
// after.
class DirectTasks {
 public:
  explicit DirectTasks(const ConvolutionArgs& args)
      : args_(args), rows_(args.images * args.out_height * args.out_width), k_(gemm_k(args)) {
    // The im2col rows of a chunk stay in L2 while the panels are streamed: 256 KB, a quarter of a Zen 4
    // core's L2 and an eighth of a Xeon's. The size does not follow the machine's L2, because a chunk's
    // partial statistics are summed in its order, and because kMaxDirectRows bounds all but the longest rows
    // already.
    const int64_t chunk_pixels = std::clamp<int64_t>(kChunkFloats / k_, kMinRows, kMaxDirectRows);
    chunks_ = ceil_div(rows_, chunk_pixels);
  }

  int64_t chunks() const { return chunks_; }
  int64_t pixel_count(int64_t chunk) const { return rows(chunk).end - rows(chunk).begin; }
  // Bytes.
  int64_t scratch(int64_t threads, const ChunkFusion* fusion = nullptr) const {
    const bool staged = chunks_ < kTasksPerThread * threads;
    return threads * im2col_bytes() + (staged ? 1 : threads) * input_bytes(fusion, staged);
  }

  template <class Parallel>
  void run(const Kernels& k, void* scratch, const Parallel& parallel, ChunkMoments moments,
           const ChunkFusion* fusion = nullptr) const {
    // More than one group of panels only where there are too few chunks for the threads, because im2col is
    // repeated for each group.
    const int64_t panels = num_panels(args_.out_channels), target = kTasksPerThread * parallel.threads();
    const bool staged = chunks_ < target, computes_input = fusion && fusion->computes_input();
    const int64_t groups = staged ? std::min(panels, ceil_div(target, chunks_)) : 1;
    const auto rows_of = [&](int64_t chunk) { return rows(chunk); };
    auto* const im2col = static_cast<char*>(scratch);
    char* const inputs = im2col + parallel.threads() * im2col_bytes();
    ConvolutionArgs args = args_;
    if (staged && computes_input) {
      fusion->input_stage(parallel, input_size(args_), target, pixel_bytes(), inputs);
      args.x = inputs;
    }
    const int64_t bytes = input_bytes(fusion, staged);
    parallel(groups * chunks_, [&](int64_t begin, int64_t end) {
      const int64_t thread = parallel.thread();
      ConvolutionArgs task_args = args;
      for (int64_t task = begin; task < end; ++task) {
        const auto [chunk, group] = chunk_and_group(task, chunks_, groups, parallel.threads());
        if (!staged && computes_input) {
          const Range pixels = input_pixels(args_, rows(chunk));
          char* const input = inputs + thread * bytes;
          fusion->input(pixels, input);
          task_args.x = input - pixels.begin * pixel_bytes();
        }
        k.convolution->direct[dtype_index(args_)].run(
            task_args, rows(chunk), balanced_range(panels, group, groups), im2col + thread * im2col_bytes(),
            moments.of(chunk, args_.out_channels));
        if (!staged && fusion) fusion->output(chunk, rows(chunk));
      }
    });
    if (staged && fusion) fusion->output_stage(parallel, chunks_, rows_of);
  }

 private:
  static constexpr int64_t kChunkFloats = 65536, kMinRows = 14, kTasksPerThread = 4;

  Range rows(int64_t chunk) const { return balanced_range(rows_, chunk, chunks_); }
  int64_t im2col_bytes() const {
    return args_.needs_im2col
               ? ceil_div(rows_, chunks_) * padded_row_stride(k_) * static_cast<int64_t>(sizeof(float))
               : 0;
  }
  int64_t pixel_bytes() const { return args_.channels * element_size(args_.dtype); }
  // Of the input that a fusion computes: of all chunks if `staged`, else of one.
  int64_t input_bytes(const ChunkFusion* fusion, bool staged) const {
    if (!fusion || !fusion->computes_input()) return 0;
    const auto rows_of = [&](int64_t chunk) { return rows(chunk); };
    const int64_t pixels = staged ? input_size(args_) : most_input_pixels(args_, chunks_, rows_of);
    return ceil_div(pixels * pixel_bytes(), 64) * 64;
  }

  const ConvolutionArgs& args_;
  int64_t rows_, k_, chunks_;
};

// Convolution with bfloat16 products (isa/direct_bf16.h): a task is a chunk of output pixels and a group of
// panels. With a fusion, a task is a chunk, if there are enough of them; otherwise the passes of the fusion
// are stages before and after.
class DirectBf16Tasks {
 public:
  explicit DirectBf16Tasks(const ConvolutionArgs& args, bool tiles)
      : args_(args),
        tiles_(tiles),
        operand_(select_operand(args, tiles)),
        band_(args, tiles),
        rows_(args.images * args.out_height * args.out_width),
        // Chunks of whole register blocks, or of whole lines of the output where a band of the input is
        // copied.
        unit_(operand_ == Operand::kBand ? args.out_width
              : tiles                    ? 32
                                         : 14) {
    // The rows of A of a chunk stay in L2, beside a panel of the weight.
    const int64_t row_elements =
        operand_ == Operand::kBand ? band_.size(1) / args.out_width : padded_k(args, tiles);
    int64_t rows = std::clamp<int64_t>(caches().l2 / 4 / (row_elements * kElement), kMinRows, kMaxRows);
    // The threads share the pixels if the weight, which each of them reads then, is smaller than the input,
    // which each of them would read otherwise.
    const int64_t weight =
        packed_bf16_size(args.out_channels, args.channels, args.kernel_h, args.kernel_w, tiles);
    if (weight < args.images * args.height * args.width * args.channels)
      rows = std::min(rows, std::max(kMinRows, ceil_div(rows_, kMinChunks)));
    chunks_ = ceil_div(ceil_div(rows_, unit_), std::max<int64_t>(rows / unit_, 1));
  }

  int64_t chunks() const { return chunks_; }
  int64_t pixel_count(int64_t chunk) const { return rows(chunk).end - rows(chunk).begin; }
  int64_t scratch(int64_t threads, const ChunkFusion* fusion = nullptr) const {
    const bool staged = chunks_ < kTasksPerThread * threads;
    return threads * (operand_bytes() + moments_bytes()) +
           (staged ? 1 : threads) * input_bytes(fusion, staged);
  }

  template <class Parallel>
  void run(const Kernels& k, void* scratch, const Parallel& parallel, ChunkMoments moments,
           const ChunkFusion* fusion = nullptr) const {
    const int64_t panels = num_panels(args_.out_channels), target = kTasksPerThread * parallel.threads();
    const int64_t panel_bytes = kPanelWidth * padded_k(args_, tiles_) * kElement;
    // A group whose panels stay in L2 is read again for every block of pixels: 1x1 kernels of 512 to 1024
    // channels take 0.94 to 0.97 of the time with two such groups.
    const int64_t cached = caches().l2 / 2,
                  fitting = std::min(panels, ceil_div(panels * panel_bytes, cached));
    const int64_t groups =
        std::max(chunks_ >= target ? 1 : std::min(panels, ceil_div(target, chunks_)), fitting);
    ConvolutionArgs args = args_;
    args.pixels_outer = ceil_div(panels, groups) * panel_bytes <= cached;
    const int64_t own_bytes = operand_bytes() + moments_bytes();
    char* const inputs = static_cast<char*>(scratch) + parallel.threads() * own_bytes;
    if (fusion && chunks_ >= target) {
      const int64_t bytes = input_bytes(fusion, false);
      parallel(chunks_, [&](int64_t begin, int64_t end) {
        char* const own = static_cast<char*>(scratch) + parallel.thread() * own_bytes;
        ConvolutionArgs task_args = args;
        for (int64_t chunk = begin; chunk < end; ++chunk) {
          if (fusion->computes_input()) {
            const Range pixels = input_pixels(args_, rows(chunk));
            char* const input = inputs + parallel.thread() * bytes;
            fusion->input(pixels, input);
            task_args.x = input - pixels.begin * args_.channels * kElement;
          }
          for (int64_t group = 0; group < groups; ++group) {
            task_args.operand_cached = group > 0;
            k.bf16_convolution->run(task_args, rows(chunk), balanced_range(panels, group, groups), own,
                                    own + operand_bytes(), moments.of(chunk, args_.out_channels));
          }
          fusion->output(chunk, rows(chunk));
        }
      });
      return;
    }
    if (fusion && fusion->computes_input()) {
      fusion->input_stage(parallel, input_size(args_), target, args_.channels * kElement, inputs);
      args.x = inputs;
    }
    // The chunk that each thread has read last.
    std::vector<int64_t> read(static_cast<size_t>(parallel.threads()), -1);
    parallel(groups * chunks_, [&](int64_t begin, int64_t end) {
      const int64_t thread = parallel.thread();
      ConvolutionArgs task_args = args;
      for (int64_t task = begin; task < end; ++task) {
        const auto [chunk, group] = chunk_and_group(task, chunks_, groups, parallel.threads());
        task_args.operand_cached = std::exchange(read[static_cast<size_t>(thread)], chunk) == chunk;
        char* const own = static_cast<char*>(scratch) + thread * own_bytes;
        k.bf16_convolution->run(task_args, rows(chunk), balanced_range(panels, group, groups), own,
                                own + operand_bytes(), moments.of(chunk, args_.out_channels));
      }
    });
    if (fusion) fusion->output_stage(parallel, chunks_, [&](int64_t chunk) { return rows(chunk); });
  }

 private:
  static constexpr int64_t kElement = 2;  // bytes
  static constexpr int64_t kMinRows = 64, kMaxRows = 896, kMinChunks = 8;
  static constexpr int64_t kTasksPerThread = 4;

  Range rows(int64_t chunk) const {
    const Range units = balanced_range(ceil_div(rows_, unit_), chunk, chunks_);
    return {units.begin * unit_, std::min(units.end * unit_, rows_)};
  }
  int64_t operand_bytes() const {
    const int64_t rows = ceil_div(ceil_div(rows_, unit_), chunks_) * unit_;
    return ceil_div(copied_elements(args_, tiles_, rows) * kElement, 64) * 64;
  }
  // Of the input that a fusion computes: of all chunks if `staged`, else of one. The last tile reads rows
  // beyond the last.
  int64_t input_bytes(const ChunkFusion* fusion, bool staged) const {
    if (!fusion || !fusion->computes_input()) return 0;
    const auto rows_of = [&](int64_t chunk) { return rows(chunk); };
    const int64_t pixels = staged ? input_size(args_) : most_input_pixels(args_, chunks_, rows_of);
    return ceil_div((pixels + 32) * args_.channels * kElement, 64) * 64;
  }
  int64_t moments_bytes() const { return num_panels(args_.out_channels) * kPanelMomentsBytes; }

  const ConvolutionArgs& args_;
  bool tiles_;
  Operand operand_;
  BandLayout band_;
  int64_t rows_, unit_, chunks_;
};

// Winograd convolution, in one of two schedules. Fused: a task takes a chunk of tiles through input
// transform, GEMMs and output transform; used where the transformed filter U stays in the caches. Staged: the
// input transforms of a few chunks come first, then tasks of one panel each, which read their part of U once;
// used where U does not stay in the caches, or where there are few tiles.
class WinogradTasks {
 public:
  explicit WinogradTasks(const ConvolutionArgs& args)
      : args_(args), tiles_(args), total_(args.images * tiles_.per_image()) {
    const int64_t side = args.tile + 2;
    const int64_t weight = num_panels(args.out_channels) * kPanelWidth * args.channels * side * side;
    staged_ = total_ < (weight > kSmallWeight ? kFewTiles : 3 * kFusedChunk) || weight > kCachedWeight;
    chunks_ = ceil_div(total_, staged_ ? kStagedChunk / args.stride_h : kFusedChunk);
  }

  // True if the tasks may transform the weight themselves (ConvolutionArgs::weight): a task reads one panel.
  bool staged() const { return staged_; }
  int64_t chunks() const { return chunks_; }
  int64_t pixel_count(int64_t chunk) const {
    const Range block = balanced_range(total_, chunk, chunks_);
    int64_t count = 0;
    for (int64_t t = block.begin; t < block.end; ++t) {
      const int64_t y = t % tiles_.per_image() / tiles_.tiles_w, x = t % tiles_.tiles_w;
      count += std::min(tiles_.tile, args_.out_height - y * tiles_.tile) *
               std::min(tiles_.tile, args_.out_width - x * tiles_.tile);
    }
    return count;
  }
  // Bytes.
  int64_t scratch(int64_t threads) const {
    const int64_t floats = staged_ ? kChunksPerStage * v_floats() + threads * (m_floats() + u_floats())
                                   : threads * (v_floats() + m_floats());
    return floats * static_cast<int64_t>(sizeof(float));
  }

  template <class Parallel>
  void run(const Kernels& kernels, void* memory, const Parallel& parallel, ChunkMoments moments) const {
    const WinogradKernels& k = kernels.convolution->winograd[dtype_index(args_)];
    auto* const scratch = static_cast<float*>(memory);
    const int64_t panels = num_panels(args_.out_channels);
    if (!staged_) {
      parallel(chunks_, [&](int64_t begin, int64_t end) {
        float* v = scratch + parallel.thread() * (v_floats() + m_floats());
        for (int64_t chunk = begin; chunk < end; ++chunk) {
          const Range block = balanced_range(total_, chunk, chunks_);
          k.input_transform(args_, block, block, v);
          k.gemm_output_transform(args_, block, {0, panels}, v, v + v_floats(),
                                  moments.of(chunk, args_.out_channels));
        }
      });
      return;
    }
    float* const own = scratch + kChunksPerStage * v_floats();
    // The panel that each thread has transformed last.
    std::vector<int64_t> transformed(static_cast<size_t>(parallel.threads()), -1);
    // The input transforms of a few chunks are one stage, their GEMMs the next.
    const auto first_chunk = [](int64_t stage) { return stage / 2 * kChunksPerStage; };
    const auto chunks_of = [&](int64_t stage) {
      return std::min(kChunksPerStage, chunks_ - first_chunk(stage));
    };
    parallel.in_stages(
        2 * ceil_div(chunks_, kChunksPerStage),
        [&](int64_t stage) { return chunks_of(stage) * (stage % 2 == 0 ? kTransformTasks : panels); },
        [&](int64_t stage, int64_t begin, int64_t end) {
          const int64_t first = first_chunk(stage), chunks = chunks_of(stage), thread = parallel.thread();
          float *const m = own + thread * (m_floats() + u_floats()), *const u = m + m_floats();
          ConvolutionArgs args = args_;
          for (int64_t task = begin; task < end; ++task) {
            if (stage % 2 == 0) {
              const int64_t index = task / kTransformTasks;
              const Range block = balanced_range(total_, first + index, chunks_);
              const Range part =
                  balanced_range(block.end - block.begin, task % kTransformTasks, kTransformTasks);
              k.input_transform(args_, block, {block.begin + part.begin, block.begin + part.end},
                                scratch + index * v_floats());
            } else {
              const int64_t panel = task / chunks, index = task % chunks, chunk = first + index;
              if (args_.weight) {
                float* const packed = u - panel * u_floats();
                if (std::exchange(transformed[static_cast<size_t>(thread)], panel) != panel)
                  k.pack(*args_.weight, {panel, panel + 1}, packed);
                args.packed = packed;
              }
              k.gemm_output_transform(args, balanced_range(total_, chunk, chunks_), {panel, panel + 1},
                                      scratch + index * v_floats(), m, moments.of(chunk, args.out_channels));
            }
          }
        });
  }

 private:
  // Chunks are the order of summation of the partial statistics, so these do not depend on the caches. Nor is
  // it the size of the L3 alone that bounds kCachedWeight, 12 MB: the fused schedule reads all of U from the
  // L3 once per kFusedChunk tiles, so its limit is the bandwidth of the L3. Not measured with a larger L3.
  static constexpr int64_t kSmallWeight = 1 << 20, kCachedWeight = 3 << 20;                    // floats
  static constexpr int64_t kFusedChunk = 14, kStagedChunk = 112, kFewTiles = 8 * kFusedChunk;  // tiles
  static constexpr int64_t kChunksPerStage = 4, kTransformTasks = 28;

  // The rows of V and M of a chunk, and the size of V and of one panel of M, in floats.
  int64_t rows() const { return ceil_div(total_, chunks_) * tiles_.transform_elements(); }
  int64_t v_floats() const { return rows() * padded_row_stride(args_.channels); }
  int64_t m_floats() const { return rows() * kPanelWidth; }
  // The size of a panel of U that a thread transforms.
  int64_t u_floats() const {
    return args_.weight ? packed_size(kPanelWidth, args_.channels, kTaps * kTaps, true) : 0;
  }

  const ConvolutionArgs& args_;
  TileGrid tiles_;
  int64_t total_, chunks_;
  bool staged_;
};

// Calls f(tasks) with the tasks of the algorithm that args.tile and args.bf16_products select.
template <class F>
auto dispatch_tasks(const Kernels& k, const ConvolutionArgs& args, F f) {
  if (args.tile != 0) return f(WinogradTasks(args));
  return args.bf16_products ? f(DirectBf16Tasks(args, k.bf16_convolution->tiles)) : f(DirectTasks(args));
}

}  // namespace
}  // namespace fused_res::cpu
