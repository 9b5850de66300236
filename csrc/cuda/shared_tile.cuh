// Tiles of a product's operands in shared memory: lines of 16-byte chunks, whose order in a line is swizzled
// so that neither a line that is written nor a column of chunks that is read keeps a bank busy twice.
#pragma once

#include <type_traits>

#include "cuda/elementwise.cuh"
#include "cuda/ptx.cuh"

namespace fused_res::cuda {

constexpr int kChunkBytes = 16;

// What one stage of the pipeline holds of a line along the summed index: two steps of the tensor cores.
constexpr int kDepthBytes = 64;

template <class T>
constexpr int kDepth = kDepthBytes / static_cast<int>(sizeof(T));

template <int lines, int chunks>
struct SharedTile {
  static constexpr int kLines = lines;
  static constexpr int kChunks = chunks;
  static constexpr int kBytes = lines * chunks * kChunkBytes;

  // Where a chunk lies, in bytes. Eight lines that begin at a multiple of eight have any one chunk in eight
  // different groups of banks: what ldmatrix reads at once. In long lines the first four of them are also two
  // groups apart, for fragments of 32-bit elements that are read transposed.
  static __device__ int at(int line, int chunk) {
    if constexpr (chunks == 4) return (line * chunks + (chunk ^ ((line >> 1) & 3))) * kChunkBytes;
    return (line * chunks + (chunk ^ ((line & 3) << 1 | ((line >> 2) & 1)))) * kChunkBytes;
  }
  static_assert(chunks == 4 || chunks % 8 == 0);
};

// Which chunks of a tile a thread brings: the same one of several lines, every kLines-th.
template <class Tile, class Shape>
struct Share {
  static constexpr int kLines = Shape::kThreads / Tile::kChunks, kEach = Tile::kLines / kLines;
  static_assert(kLines * Tile::kChunks == Shape::kThreads && kEach * kLines == Tile::kLines);

  static __device__ int chunk() { return static_cast<int>(threadIdx.x) % Tile::kChunks; }
  static __device__ int line(int i) { return static_cast<int>(threadIdx.x) / Tile::kChunks + i * kLines; }
  static __device__ int at(int i) { return Tile::at(line(i), chunk()); }
};

// Brings a chunk of a tensor, of which so many elements exist; the others become zeros. Aligned: without
// waiting, and all of it exists or nothing.
template <bool aligned, class T>
__device__ void copy_chunk(unsigned char* place, const T* tensor, int64_t at, int64_t exist) {
  if constexpr (aligned) {
    ptx::copy_async(shared_address(place), tensor + (exist > 0 ? at : 0), exist > 0);
  } else {
    Vector<T, kVector<T>> chunk;
    for (int i = 0; i < kVector<T>; ++i) chunk[i] = i < exist ? tensor[at + i] : from_float<T>(0);
    store(reinterpret_cast<T*>(place), chunk);
  }
}

// One operand of a product: `rows` rows (of the second operand: columns), each kDepth elements long. In
// memory either the depth runs along a line, or the rows do.
template <class T, int rows, bool depth_along_lines>
struct ProductOperand {
  using Element = T;
  static constexpr bool kDepthAlongLines = depth_along_lines;
  using Tile = std::conditional_t<depth_along_lines, SharedTile<rows, kDepthBytes / kChunkBytes>,
                                  SharedTile<kDepth<T>, rows* static_cast<int>(sizeof(T)) / kChunkBytes>>;
};

}  // namespace fused_res::cuda
