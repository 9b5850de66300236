// Threadblock-level GEMM: tile shapes, warp-level multiply-accumulate on tensor cores (mma.sync) or CUDA
// cores (SIMT), and the multistage cp.async main loop that all convolution kernels share. The names follow
// CUTLASS (https://github.com/NVIDIA/cutlass).
#pragma once

#include <cstring>

#include "cuda/shared_tile.cuh"

namespace fused_res::cuda {

// Threadblock tile of rows x cols (M x N), divided into warps_m x warps_n warp tiles.
template <int rows, int cols, int warps_m, int warps_n>
struct TileShape {
  static constexpr int kRows = rows, kCols = cols;
  static constexpr int kWarpRows = rows / warps_m, kWarpCols = cols / warps_n;
  static constexpr int kThreads = kWarpSize * warps_m * warps_n;

  static __device__ int warp_row() { return static_cast<int>(threadIdx.x) / kWarpSize / warps_n * kWarpRows; }
  static __device__ int warp_col() { return static_cast<int>(threadIdx.x) / kWarpSize % warps_n * kWarpCols; }
};

using Tile128x128 = TileShape<128, 128, 2, 4>;
using Tile128x64 = TileShape<128, 64, 2, 2>;
using Tile64x64 = TileShape<64, 64, 2, 2>;

// Float32 accumulator tile in shared memory, through which the accumulators reach the epilogue. The padding
// of 8 floats places consecutive rows eight banks apart.
template <class Shape>
struct AccumulatorTile {
  static constexpr int kStride = Shape::kCols + 8;
  static constexpr int kBytes = Shape::kRows * kStride * static_cast<int>(sizeof(float));
};

// Warp-level multiply-accumulate on tensor cores. T: bfloat16, float16, or float for TF32. A and B:
// GemmOperand.
template <class T, class Shape, class A, class B>
class WarpMmaTensorOp {
 public:
  // Add the product of the operand tiles of one stage to the accumulators.
  __device__ void multiply_accumulate(const unsigned char* a, const unsigned char* b) {
    constexpr int kMmaKSteps = kTileKBytes / 32;
#pragma unroll
    for (int step = 0; step < kMmaKSteps; ++step) {
      uint32_t a_fragments[kFragmentsM][4], b_fragments[kFragmentsN][4];
#pragma unroll
      for (int i = 0; i < kFragmentsM; ++i)
        load_fragment<A, true>(a_fragments[i], a, Shape::warp_row() + 16 * i, step);
#pragma unroll
      for (int j = 0; j < kFragmentsN; ++j)
        load_fragment<B, false>(b_fragments[j], b, Shape::warp_col() + 16 * j, step);
#pragma unroll
      for (int i = 0; i < kFragmentsM; ++i) {
#pragma unroll
        for (int j = 0; j < 2 * kFragmentsN; ++j) {
          const uint32_t b_fragment[2] = {b_fragments[j / 2][j % 2 * 2], b_fragments[j / 2][j % 2 * 2 + 1]};
          ptx::mma_sync<MmaElement>(accumulators_[i][j], a_fragments[i], b_fragment);
        }
      }
    }
  }

  __device__ void store_accumulators(float* accumulators) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    float* dst = accumulators + (Shape::warp_row() + lane / 4) * AccumulatorTile<Shape>::kStride +
                 Shape::warp_col() + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2 * kFragmentsM; ++i) {
#pragma unroll
      for (int j = 0; j < 2 * kFragmentsN; ++j) {
        const float* pair = accumulators_[i / 2][j] + i % 2 * 2;
        *reinterpret_cast<float2*>(dst + i * 8 * AccumulatorTile<Shape>::kStride + j * 8) =
            make_float2(pair[0], pair[1]);
      }
    }
  }

 private:
  static constexpr bool kTf32 = std::is_same_v<T, float>;
  using MmaElement = std::conditional_t<kTf32, uint32_t, T>;
  // Fragments of the warp tile, 16 rows (A) or columns (B) each.
  static constexpr int kFragmentsM = Shape::kWarpRows / 16, kFragmentsN = Shape::kWarpCols / 16;

  // Load a fragment of 16 rows by 32 bytes of K as four 8 x 16-byte matrices, 2 in rows by 2 in K.
  // `rows_first`: the row half varies fastest in the order of the registers, as operand A of mma.sync
  // requires; otherwise the K half, as B requires. The 8x8 matrix of 16-bit elements of ldmatrix is an 8x4
  // matrix of 32-bit elements. ldmatrix transposes 16-bit elements only, so TF32 operands that are not
  // K-major use scalar loads.
  template <class Operand, bool rows_first>
  static __device__ void load_fragment(uint32_t (&fragment)[4], const unsigned char* tile, int row,
                                       int step) {
    using Tile = typename Operand::Tile;
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const auto row_half = [](int matrix) { return rows_first ? matrix % 2 : matrix / 2; };
    const auto k_half = [](int matrix) { return rows_first ? matrix / 2 : matrix % 2; };
    const int matrix = lane / 8;  // the matrix that this lane supplies a row address for
    if constexpr (Operand::kKMajor) {
      const int offset = Tile::byte_offset(row + 8 * row_half(matrix) + lane % 8, 2 * step + k_half(matrix));
      ptx::ldmatrix_x4(fragment, shared_address(tile) + offset);
    } else if constexpr (!kTf32) {
      const int offset =
          Tile::byte_offset(16 * step + 8 * k_half(matrix) + lane % 8, row / 8 + row_half(matrix));
      ptx::ldmatrix_x4_trans(fragment, shared_address(tile) + offset);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int element_row = row + 8 * row_half(i) + lane / 4;
        const int offset = Tile::byte_offset(8 * step + 4 * k_half(i) + lane % 4, element_row / 4);
        fragment[i] = reinterpret_cast<const uint32_t*>(tile + offset)[element_row % 4];
      }
    }
    if constexpr (kTf32) {
#pragma unroll
      for (uint32_t& element : fragment) {
        float x;
        memcpy(&x, &element, sizeof(x));
        element = ptx::to_tf32(x);
      }
    }
  }

  float accumulators_[kFragmentsM][2 * kFragmentsN][4] = {};
};

// Warp-level multiply-accumulate in IEEE float32 on CUDA cores with scalar FMAs. A lane accumulates every
// eighth row and every fourth column of the warp tile.
template <class Shape, class A, class B>
class WarpMmaSimt {
 public:
  __device__ void multiply_accumulate(const unsigned char* a, const unsigned char* b) {
#pragma unroll 1
    for (int step = 0; step < kTileK<float> / 4; ++step) {
      float a_fragment[kRowsPerThread][4];
#pragma unroll
      for (int i = 0; i < kRowsPerThread; ++i) load_fragment<A>(a_fragment[i], a, first_row() + 8 * i, step);
#pragma unroll
      for (int j = 0; j < kColsPerThread; ++j) {
        float b_fragment[4];
        load_fragment<B>(b_fragment, b, first_col() + 4 * j, step);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
#pragma unroll
          for (int i = 0; i < kRowsPerThread; ++i)
            accumulators_[i][j] = fmaf(a_fragment[i][k], b_fragment[k], accumulators_[i][j]);
        }
      }
    }
  }

  __device__ void store_accumulators(float* accumulators) const {
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
#pragma unroll
      for (int j = 0; j < kColsPerThread; ++j) {
        accumulators[(first_row() + 8 * i) * AccumulatorTile<Shape>::kStride + first_col() + 4 * j] =
            accumulators_[i][j];
      }
    }
  }

 private:
  static constexpr int kRowsPerThread = Shape::kWarpRows / 8, kColsPerThread = Shape::kWarpCols / 4;

  static __device__ int first_row() {
    return Shape::warp_row() + static_cast<int>(threadIdx.x) % kWarpSize / 4;
  }
  static __device__ int first_col() { return Shape::warp_col() + static_cast<int>(threadIdx.x) % 4; }

  // Load four consecutive elements along K of one row (A) or column (B).
  template <class Operand>
  static __device__ void load_fragment(float (&elements)[4], const unsigned char* tile, int row, int step) {
    using Tile = typename Operand::Tile;
    if constexpr (Operand::kKMajor) {
      const float4 chunk = *reinterpret_cast<const float4*>(tile + Tile::byte_offset(row, step));
      elements[0] = chunk.x, elements[1] = chunk.y, elements[2] = chunk.z, elements[3] = chunk.w;
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        elements[k] =
            reinterpret_cast<const float*>(tile + Tile::byte_offset(4 * step + k, row / 4))[row % 4];
      }
    }
  }

  float accumulators_[kRowsPerThread][kColsPerThread] = {};
};

template <class T, bool simt, class Shape, class A, class B>
using WarpMma = std::conditional_t<simt, WarpMmaSimt<Shape, A, B>, WarpMmaTensorOp<T, Shape, A, B>>;

// Minimum number of resident threadblocks per multiprocessor, the second argument of __launch_bounds__. Its
// 65536 registers give 128 registers to each of 512 resident threads, or 168 to each of 384: for SIMT
// accumulators and for the prologues of dgrad and wgrad (`grad_prologue`). The forward's prologue is compiled
// for 128. So is the largest tile: with 168 a multiprocessor would hold one threadblock only.
template <class Shape, bool simt, bool grad_prologue>
constexpr int kMinBlocksPerSM = ((simt || grad_prologue ? 384 : 512) + Shape::kThreads - 1) / Shape::kThreads;

constexpr int kStages = 3;

// Multistage GEMM main loop: accumulates `steps` K tiles, with the cp.async copies of the next kStages - 1
// tiles in flight. Shared memory is reusable on return. OperandLoader provides:
//   copy_stage_async(stage)  starts the copy of the next K tile; called once per tile, in order.
//   transform_stage(stage)   applies the operand prologue in place. A thread transforms only elements that it
//                            copied itself, so cp.async.wait_group suffices before it; the barrier after it
//                            publishes the result.
//   a(stage), b(stage)       return the operand tiles in shared memory.
template <class WarpMma, class OperandLoader>
__device__ void gemm_mainloop(WarpMma& mma, OperandLoader& loader, int steps) {
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < steps) loader.copy_stage_async(stage);
    ptx::cp_async_commit_group();
  }
  int stage = 0, free_stage = kStages - 1;
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait_group<kStages - 2>();
    loader.transform_stage(stage);
    __syncthreads();
    // After the barrier all warps have read the previous stage, whose buffer is overwritten next.
    if (step + kStages - 1 < steps) loader.copy_stage_async(free_stage);
    ptx::cp_async_commit_group();
    mma.multiply_accumulate(loader.a(stage), loader.b(stage));
    free_stage = stage;
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  ptx::cp_async_wait_group<0>();
  __syncthreads();
}

}  // namespace fused_res::cuda
