// Work partition of a weight gradient into tasks. Free of torch, like convolution.h; here too the order of
// summation depends on the shape only.
#pragma once

#include <array>

#include "cpu/convolution.h"

namespace fused_res::cpu {
namespace {  // anonymous, as in tiles.h, because classes have members of its types

// Split-K is for accumulators of up to this many floats: 1 MB, which a core's L2 of 1 or 2 MB keeps.
constexpr int64_t kSplitKMaxFloats = 1 << 18;
// The parts of split-K, of so many accumulators each. All of them fit into 4 MB, because each is written and
// read again; more than 4 are a multiple of 4, so that every thread has as many.
inline int64_t split_k_parts(int64_t chunks, int64_t accumulator_floats) {
  constexpr int64_t kMaxFloats = 1 << 20, kMaxParts = 16, kMultiple = 4;
  const int64_t parts = std::min({chunks, kMaxParts, std::max<int64_t>(kMaxFloats / accumulator_floats, 2)});
  return parts > kMultiple ? parts / kMultiple * kMultiple : parts;
}

// Passes fused with a weight gradient, chunk by chunk, in memory that stays in L2.
class GradientFusion {
 public:
  virtual ~GradientFusion() = default;
  // Computes the convolution's input, or the gradient of its output, for these pixels, counted through all
  // images.
  virtual bool computes_input() const { return false; }
  virtual void input(Range, void*) const {}
  virtual bool computes_grad_output() const { return false; }
  virtual void grad_output(Range, void*) const {}
  // The pixels of the output gradient that chunk(rows) reads; at least `rows`.
  virtual Range grad_output_pixels(Range rows) const { return rows; }
  // Another use of the output gradient of these rows. dz: as WeightGradientArgs::dz, for
  // grad_output_pixels(rows). `memory`: chunk_bytes(rows) bytes.
  virtual void chunk(int64_t /*chunk*/, Range /*rows*/, const void* /*dz*/, char* /*memory*/) const {}
  virtual int64_t chunk_bytes(int64_t /*rows*/) const { return 0; }
  // The memory that the chunk of `rows` reads.
  virtual std::array<MemoryRange, kMaxNextRanges> operands(Range rows) const = 0;
};

// Computes what the fusion computes of both operands of a chunk, packs them, and runs fusion.chunk(). Returns
// the arguments with these operands. `memory`: fusion_bytes(). pack_input(args), pack_grad_output(args).
template <class PackInput, class PackGradOutput>
WeightGradientArgs pack_fused_chunk(WeightGradientArgs args, const GradientFusion& fusion, int64_t chunk,
                                    Range rows, int64_t element_size, char* memory,
                                    const PackInput& pack_input, const PackGradOutput& pack_grad_output) {
  const ConvolutionArgs& shape = args.convolution;
  if (fusion.computes_input()) {
    const Range pixels = input_pixels(shape, rows);
    fusion.input(pixels, memory);
    args.convolution.x = memory - pixels.begin * shape.channels * element_size;
  }
  pack_input(args);
  if (fusion.computes_grad_output()) {
    const Range pixels = fusion.grad_output_pixels(rows);
    fusion.grad_output(pixels, memory);  // the input is packed
    args.dz = memory - pixels.begin * shape.out_channels * element_size;
    memory += (pixels.end - pixels.begin + kBlockK) * shape.out_channels * element_size;
  }
  pack_grad_output(args);
  fusion.chunk(chunk, rows, args.dz, memory + (64 - reinterpret_cast<uintptr_t>(memory) % 64) % 64);
  return args;
}

// Bytes of the memory of pack_fused_chunk, for chunks of up to `most` output pixels.
template <class Rows>
int64_t fusion_bytes(const GradientFusion& fusion, const ConvolutionArgs& shape, int64_t element_size,
                     int64_t chunks, int64_t most, const Rows& rows) {
  int64_t input = 0, grad_output = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const Range x = input_pixels(shape, rows(chunk)), dz = fusion.grad_output_pixels(rows(chunk));
    if (fusion.computes_input()) input = std::max(input, x.end - x.begin);
    if (fusion.computes_grad_output()) grad_output = std::max(grad_output, dz.end - dz.begin + kBlockK);
  }
  const int64_t bytes = std::max(input * shape.channels * element_size,
                                 grad_output * shape.out_channels * element_size + fusion.chunk_bytes(most));
  return ceil_div(bytes, 64) * 64 + 64;
}

// K, the output pixels or tiles, is partitioned into chunks, whose contributions are added in order. Split-K:
// where the accumulators are small, the chunks are distributed over parts with private accumulators, and a
// task packs and multiplies the chunks of its part; the split-K reduction adds the parts. Staged: otherwise
// the operands of a few chunks are packed first, and then each task adds to its own range of the shared
// accumulators.
class WeightGradientTasks {
 public:
  explicit WeightGradientTasks(const WeightGradientArgs& args)
      : args_(args),
        shape_(args.convolution),
        winograd_(shape_.tile != 0),
        tiles_(winograd_ ? TileGrid(shape_) : TileGrid(1, 1, shape_.out_height, shape_.out_width)),
        total_(shape_.images * tiles_.per_image()),
        points_(winograd_ ? kTransformPoints : 1),
        channels_(winograd_ ? shape_.channels : gemm_k(shape_)) {
    split_k_ = accumulator_floats() <= kSplitKMaxFloats;
    const int64_t max_chunk =
        winograd_ ? (split_k_ ? kSplitKTiles : kStagedTiles) / shape_.stride_h : kPixels;
    chunks_ = ceil_div(total_, max_chunk);
    parts_ = split_k_ ? split_k_parts(chunks_, accumulator_floats()) : 1;
  }

  // True if the weight gradient can have a fusion that computes an operand or uses one: a direct split-K.
  bool fusible() const { return split_k_ && !winograd_; }
  int64_t chunks() const { return chunks_; }
  int64_t scratch(int64_t threads, const GradientFusion& fusion) const {
    return (all_accumulator_floats() + threads * (copied_floats() + fused_floats(fusion)) +
            slots(threads) * operand_floats()) *
           kElement;
  }

  template <class Parallel>
  void run(const ConvolutionKernels& kernels, char* memory, const Parallel& parallel,
           const GradientFusion& fusion) const {
    auto* const scratch = reinterpret_cast<float*>(memory);
    const WeightGradientKernels& k = winograd_ ? kernels.winograd_wgrad : kernels.direct_wgrad;
    const int64_t panels = num_panels(shape_.out_channels);
    float* const copied = scratch + all_accumulator_floats();
    const int64_t own_floats = copied_floats() + fused_floats(fusion);
    float* const operands = copied + parallel.threads() * own_floats;
    if (split_k_) {
      parallel(parts_, [&](int64_t begin, int64_t end) {
        float* v = operands + parallel.thread() * operand_floats();
        float* const own = copied + parallel.thread() * own_floats;
        for (int64_t part = begin; part < end; ++part) {
          const Range chunks = balanced_range(chunks_, part, parts_);
          for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
            const Range block = rows(chunk);
            const WeightGradientArgs args = pack_fused_chunk(
                args_, fusion, chunk, block, kElement, reinterpret_cast<char*>(own + copied_floats()),
                [&](const WeightGradientArgs& a) { k.pack_input(a, block, block, own, v); },
                [&](const WeightGradientArgs& a) {
                  k.pack_grad_output(a, block, block, v + input_floats());
                });
            const bool prefetches = !winograd_ && chunk + 1 < chunks.end;
            const auto next = prefetches ? fusion.operands(rows(chunk + 1)) : kNothing;
            k.gemm(args, block, {0, panels}, {0, ranges()}, v, v + input_floats(), chunk == chunks.begin,
                   scratch + part * accumulator_floats(), next.data());
          }
        }
      });
    }
    for (int64_t first = 0; !split_k_ && first < chunks_; first += kChunksPerStage) {
      const int64_t chunks = std::min(kChunksPerStage, chunks_ - first);
      const auto chunk_operands = [&](int64_t chunk) { return operands + chunk * operand_floats(); };
      parallel(chunks * kPackTasks, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const Range block = rows(first + task / kPackTasks);
          const Range slice = balanced_range(block.end - block.begin, task % kPackTasks, kPackTasks);
          const Range part = {block.begin + slice.begin, block.begin + slice.end};
          float* v = chunk_operands(task / kPackTasks);
          k.pack_input(args_, block, part, copied + parallel.thread() * own_floats, v);
          k.pack_grad_output(args_, block, part, v + input_floats());
        }
      });
      const int64_t passes = panel_passes();
      for (int64_t pass = 0; pass < passes; ++pass) {
        const Range pass_panels = balanced_range(panels, pass, passes);
        float* const acc = scratch - pass_panels.begin * (accumulator_floats() / panels);
        gemm_stage(k, parallel, pass_panels, first, chunks, operands, acc);
        if (first + chunks == chunks_) reduce(k, parallel, pass_panels, acc);
      }
    }
    if (split_k_) reduce(k, parallel, {0, panels}, scratch);
  }

 private:
  // These constants are the order of summation, so they do not depend on the caches.
  static constexpr int64_t kPixels = 128, kSplitKTiles = 28, kStagedTiles = 84;
  static constexpr int64_t kChunksPerStage = 4, kPackTasks = 28, kTasksPerThread = 4;
  static constexpr int64_t kPassFloats = 5 << 20;
  static constexpr int64_t kElement = 4;  // bytes
  static constexpr int64_t kGroup = 4;    // blocks of rows of A^T
  static constexpr int64_t kLine = 16;    // channels
  static constexpr std::array<MemoryRange, kMaxNextRanges> kNothing = {};

  // The GEMMs of the chunks of a stage, for some panels.
  template <class Parallel>
  void gemm_stage(const WeightGradientKernels& k, const Parallel& parallel, Range panels, int64_t first,
                  int64_t chunks, const float* operands, float* acc) const {
    // Both operands of a transform point are read by one task, if there are enough of them for the threads.
    const int64_t count = panels.end - panels.begin;
    const int64_t groups = winograd_ ? ranges() : ceil_div(ranges(), kGroup);
    const int64_t panel_groups =
        winograd_ ? std::min(count, ceil_div(kTasksPerThread * parallel.threads(), groups)) : count;
    parallel(panel_groups * groups, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const Range part = balanced_range(count, task / groups, panel_groups),
                    group = balanced_range(ranges(), task % groups, groups);
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          const float* v = operands + chunk * operand_floats();
          k.gemm(args_, rows(first + chunk), {panels.begin + part.begin, panels.begin + part.end}, group, v,
                 v + input_floats(), first + chunk == 0, acc, kNothing.data());
        }
      }
    });
  }
  template <class Parallel>
  void reduce(const WeightGradientKernels& k, const Parallel& parallel, Range panels,
              const float* acc) const {
    const int64_t lines = ceil_div(shape_.channels, kLine);
    parallel((panels.end - panels.begin) * lines, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t panel = panels.begin + task / lines, c = task % lines * kLine;
        k.reduce_and_store(args_, {panel, panel + 1}, {c, std::min(c + kLine, shape_.channels)}, acc, parts_,
                           accumulator_floats());
      }
    });
  }

  int64_t accumulator_floats() const {
    return num_panels(shape_.out_channels) * kPanelWidth * points_ * channels_;
  }
  // Where all operands are packed in one stage, the panels are computed in passes that share the memory of
  // kPassFloats of accumulators, 20 MB: those of Winograd with 512 channels are 38 MB. Passes of 4 MB
  // take 1.1 times as long.
  int64_t panel_passes() const {
    if (split_k_ || chunks_ > kChunksPerStage) return 1;
    return std::min(num_panels(shape_.out_channels), ceil_div(accumulator_floats(), kPassFloats));
  }
  int64_t all_accumulator_floats() const {
    const int64_t panels = num_panels(shape_.out_channels);
    return split_k_ ? parts_ * accumulator_floats()
                    : ceil_div(panels, panel_passes()) * (accumulator_floats() / panels);
  }
  // What the tasks of the GEMMs share beside the panels: see WeightGradientKernels::gemm.
  int64_t ranges() const { return winograd_ ? kTransformPoints : wgrad_row_blocks(channels_); }
  int64_t slots(int64_t threads) const { return split_k_ ? threads : kChunksPerStage; }
  Range rows(int64_t chunk) const { return balanced_range(total_, chunk, chunks_); }
  int64_t fused_floats(const GradientFusion& fusion) const {
    if (!fusible()) return 0;
    return fusion_bytes(fusion, shape_, kElement, chunks_, ceil_div(total_, chunks_),
                        [&](int64_t chunk) { return rows(chunk); }) /
           kElement;
  }
  // The rows of a chunk's packed operands, and the size of each operand, in floats.
  int64_t packed_rows() const {
    return ceil_div(total_, chunks_) * (winograd_ ? tiles_.transform_elements() : 1);
  }
  int64_t input_floats() const {
    return winograd_ ? packed_rows() * padded_row_stride(channels_)
                     : ranges() * wgrad_row_block_floats(packed_rows());
  }
  int64_t copied_floats() const {
    return !winograd_ && shape_.needs_im2col ? kCopiedRows * padded_row_stride(channels_) : 0;
  }
  int64_t grad_output_floats() const {
    return winograd_ || args_.pack_dz ? packed_rows() * num_panels(shape_.out_channels) * kPanelWidth : 0;
  }
  int64_t operand_floats() const { return input_floats() + grad_output_floats(); }

  const WeightGradientArgs& args_;
  const ConvolutionArgs& shape_;
  bool winograd_;
  TileGrid tiles_;
  int64_t total_, points_, channels_;
  bool split_k_;
  int64_t chunks_, parts_;
};

// Weight gradient with products of bfloat16 (isa/conv_wgrad_bf16.h), with the same two schedules.
class WeightGradientBf16Tasks {
 public:
  WeightGradientBf16Tasks(const WeightGradientArgs& args, bool tiles)
      : args_(args),
        shape_(args.convolution),
        tiles_(tiles),
        operand_(select_operand(shape_, tiles)),
        band_(shape_, tiles),
        total_(shape_.images * shape_.out_height * shape_.out_width),
        unit_(operand_ == Operand::kBand ? shape_.out_width : kBlockK),
        tap_rows_(wgrad_tap_rows(shape_, tiles)) {
    const int64_t units = ceil_div(total_, unit_),
                  unit_positions = operand_ == Operand::kBand ? band_.pitch : kBlockK;
    // Taps read both operands of a chunk again, from L1.
    const int64_t chunk_positions = operand_ == Operand::kBand ? kBandPositions : kPositions;
    chunks_ = ceil_div(units, std::max<int64_t>(chunk_positions / unit_positions, 1));
    // As many chunks for every thread, where there are few.
    if (chunks_ < kManyChunks) chunks_ = std::min(units, ceil_div(chunks_, kChunkMultiple) * kChunkMultiple);
    split_k_ = accumulator_floats() <= kSplitKMaxFloats;
    parts_ = split_k_ ? split_k_parts(chunks_, accumulator_floats()) : 1;
    slots_ = std::min(chunks_, kChunksPerStage);
  }

  bool fusible() const { return true; }
  int64_t chunks() const { return chunks_; }
  int64_t scratch(int64_t threads, const GradientFusion& fusion) const {
    return accumulator_bytes(threads) + (split_k_ ? threads : slots_) * operand_bytes() +
           threads * (copy_bytes() + fused_bytes(fusion));
  }

  template <class Parallel>
  void run(const Bf16ConvolutionKernels& kernels, char* scratch, const Parallel& parallel,
           const GradientFusion& fusion) const {
    const Bf16WeightGradientKernels& k = kernels.weight_gradient;
    const int64_t panels = num_panels(shape_.out_channels), row_blocks = tap_rows_ / kBlockK;
    auto* const acc = reinterpret_cast<float*>(scratch);
    char* const operands = scratch + accumulator_bytes(parallel.threads());
    char* const memory = operands + (split_k_ ? parallel.threads() : slots_) * operand_bytes();
    const int64_t memory_bytes = copy_bytes() + fused_bytes(fusion);
    const auto pack = [&](int64_t chunk, char* to) {
      pack_chunk(k, chunk, to, memory + parallel.thread() * memory_bytes, fusion);
    };
    if (split_k_) {
      parallel(parts_, [&](int64_t begin, int64_t end) {
        char* const own = operands + parallel.thread() * operand_bytes();
        for (int64_t part = begin; part < end; ++part) {
          const Range chunks = balanced_range(chunks_, part, parts_);
          for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
            pack(chunk, own);
            std::array<MemoryRange, kMaxNextRanges> next = {};
            if (chunk + 1 < chunks.end) next = fusion.operands(rows(chunk + 1));
            k.gemm(args_, rows(chunk), {0, panels}, {0, row_blocks}, own, own + transposed_bytes(),
                   chunk == chunks.begin, acc + part * accumulator_floats(), next.data());
          }
        }
      });
    }
    if (split_k_) {
      const int64_t panel_floats = accumulator_floats() / panels;
      parallel(panels, [&](int64_t begin, int64_t end) {
        k.reduce_and_store(args_, {begin, end}, {0, row_blocks}, acc + begin * panel_floats, parts_,
                           accumulator_floats());
      });
      return;
    }
    const TaskGrid grid = task_grid(parallel.threads());
    const std::array<MemoryRange, kMaxNextRanges> nothing = {};
    for (int64_t first = 0; first < chunks_; first += slots_) {
      const int64_t chunks = std::min(slots_, chunks_ - first);
      const auto chunk_operands = [&](int64_t slot) { return operands + slot * operand_bytes(); };
      parallel(chunks, [&](int64_t begin, int64_t end) {
        for (int64_t slot = begin; slot < end; ++slot) pack(first + slot, chunk_operands(slot));
      });
      parallel(grid.panel_groups * grid.row_groups, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const Range panel_group = balanced_range(panels, task % grid.panel_groups, grid.panel_groups),
                      row_group = balanced_range(row_blocks, task / grid.panel_groups, grid.row_groups);
          // In one stage, the accumulators of a task stay in L2 until they are stored.
          float* const own = acc + (one_stage() ? parallel.thread() : task) * grid.accumulator_floats;
          for (int64_t slot = 0; slot < chunks; ++slot) {
            const char* chunk = chunk_operands(slot);
            k.gemm(args_, rows(first + slot), panel_group, row_group, chunk, chunk + transposed_bytes(),
                   first + slot == 0, own, nothing.data());
          }
          if (first + chunks == chunks_) k.reduce_and_store(args_, panel_group, row_group, own, 1, 0);
        }
      });
    }
  }

 private:
  static constexpr int64_t kElement = 2;  // bytes
  static constexpr int64_t kPositions = 256, kBandPositions = 256, kChunksPerStage = 32;
  static constexpr int64_t kTasksPerThread = 4, kManyChunks = 32, kChunkMultiple = 4;

  // The tasks of the GEMMs of a stage: groups of panels and of blocks of rows of A^T. The accumulators of a
  // task stay in L2, with its part of both operands of a chunk.
  struct TaskGrid {
    int64_t panel_groups, row_groups;
    int64_t accumulator_floats;  // of the largest task
  };
  TaskGrid task_grid(int64_t threads) const {
    const int64_t limit[2] = {num_panels(shape_.out_channels), tap_rows_ / kBlockK};
    const int64_t pair_floats = padded_k(shape_, tiles_) / tap_rows_ * kBlockK * kPanelWidth,
                  operand_bytes = wgrad_pitch(positions()) * kBlockK * kElement;
    int64_t tile[2] = {1, 1};  // panels and blocks of rows of a task
    for (int side = 0, full = 0; full < 2; side ^= 1) {
      const int64_t grown = tile[side] + 1, other = tile[side ^ 1];
      const bool fits =
          grown * other * pair_floats * 4 + (grown + other) * operand_bytes <= caches().l2 / 2 &&
          ceil_div(limit[side], grown) * ceil_div(limit[side ^ 1], other) >= kTasksPerThread * threads;
      full = fits && grown <= limit[side] ? 0 : full + 1;
      if (full == 0) tile[side] = grown;
    }
    return {ceil_div(limit[0], tile[0]), ceil_div(limit[1], tile[1]), tile[0] * tile[1] * pair_floats};
  }
  bool one_stage() const { return chunks_ <= slots_; }
  int64_t accumulator_bytes(int64_t threads) const {
    int64_t floats = parts_ * accumulator_floats();
    if (!split_k_) {
      const TaskGrid grid = task_grid(threads);
      floats = (one_stage() ? threads : grid.panel_groups * grid.row_groups) * grid.accumulator_floats;
    }
    return ceil_div(floats * static_cast<int64_t>(sizeof(float)), 64) * 64;
  }

  Range rows(int64_t chunk) const {
    const Range units = balanced_range(ceil_div(total_, unit_), chunk, chunks_);
    return {units.begin * unit_, std::min(units.end * unit_, total_)};
  }

  void pack_chunk(const Bf16WeightGradientKernels& k, int64_t chunk, char* to, char* memory,
                  const GradientFusion& fusion) const {
    pack_fused_chunk(
        args_, fusion, chunk, rows(chunk), kElement, memory + copy_bytes(),
        [&](const WeightGradientArgs& args) { k.pack_input(args, rows(chunk), memory, to); },
        [&](const WeightGradientArgs& args) {
          k.pack_grad_output(args, rows(chunk), to + transposed_bytes());
        });
  }
  int64_t fused_bytes(const GradientFusion& fusion) const {
    return fusion_bytes(fusion, shape_, kElement, chunks_, largest(),
                        [&](int64_t chunk) { return rows(chunk); });
  }
  int64_t accumulator_floats() const {
    return num_panels(shape_.out_channels) * kPanelWidth * padded_k(shape_, tiles_);
  }
  // Of the largest chunk: its output pixels, the lines of its band, and the positions of a plane of A.
  int64_t largest() const { return ceil_div(ceil_div(total_, unit_), chunks_) * unit_; }
  int64_t lines() const {
    const int64_t rows = largest() / shape_.out_width,
                  images = std::min(shape_.images, (rows - 1) / shape_.out_height + 2);
    return rows + images * band_.halo;
  }
  int64_t positions() const {
    return operand_ == Operand::kBand ? lines() * band_.pitch + band_.tail : largest();
  }
  int64_t planes() const { return operand_ == Operand::kBand ? band_.row_phases * band_.column_phases : 1; }
  int64_t transposed_bytes() const { return planes() * tap_rows_ * wgrad_pitch(positions()) * kElement; }
  int64_t operand_bytes() const {
    // Each image of a band begins a new block of K.
    const int64_t blocks = positions() / kBlockK + std::min(shape_.images, largest()) + 1;
    const int64_t packed = num_panels(shape_.out_channels) * blocks * kBlockK * kPanelWidth * kElement +
                           blocks * static_cast<int64_t>(sizeof(int64_t));
    return ceil_div(transposed_bytes() + packed, 64) * 64;
  }
  int64_t copy_bytes() const {
    return ceil_div(copied_elements(shape_, tiles_, largest()) * kElement, 64) * 64;
  }

  const WeightGradientArgs& args_;
  const ConvolutionArgs& shape_;
  bool tiles_;
  Operand operand_;
  BandLayout band_;
  int64_t total_, unit_, tap_rows_;
  bool split_k_;
  int64_t chunks_, parts_, slots_;
};

}  // namespace
}  // namespace fused_res::cpu
