// How the work on one tensor is cut, and the two-pass scheme that runs it. Free of torch: the parallel loop
// is a functor, so that a test can run the same code on plain threads under ThreadSanitizer.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "cpu/isa/kernels.h"

namespace fused_res::cpu {

struct Shape {
  int64_t images, channels, spatial;
  Layout layout;

  int64_t numel() const { return images * channels * spatial; }
  int64_t values_per_channel() const { return images * spatial; }
  // What a mask is made of: rows padded to whole bytes.
  int64_t rows() const { return layout == Layout::kNhwc ? images * spatial : images * channels; }
  int64_t cols() const { return layout == Layout::kNhwc ? channels : spatial; }
};

struct Channels {
  int64_t begin, end;
};

// Statistics need all of a channel before its first output can be written, so x is read twice. The second
// pass runs backwards: what the first one read last, some 12 MB here, is still in cache.
//
// A channel's values are cut into chunks, each with a partial result of its own, merged in order. Chunks
// depend on nothing but the shape; who works on them may depend on the machine. So the same input gives the
// same bits.
//
// NHWC takes all channels at once. Slices of channels, small enough to stay in cache between the passes,
// would read x from memory once; but a slice is 64 to 512 bytes here and there, which the L2's prefetcher
// does not follow: two cores read 8 to 10 GB/s that way, with and without huge pages or software prefetch,
// and 25 to 39 along the rows. NCHW planes are contiguous, so there the channels are taken in groups.
class Partition {
 public:
  // `bytes`: of one element in all the operands that both passes read.
  Partition(const Shape& shape, int64_t bytes, int64_t threads) : shape_(shape) {
    const int64_t channel_bytes = std::max<int64_t>(shape.values_per_channel() * bytes, 1);
    const int64_t cached = kCacheBytes / channel_bytes;
    if (shape.layout == Layout::kNhwc) {
      // A power of two, so that threads get equal shares; long enough that partial results are few.
      const auto wanted = std::clamp<int64_t>(shape.rows() / kRowChunk, 1, 64);
      const auto chunks = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(wanted)));
      length_ = std::clamp<int64_t>((shape.rows() + chunks - 1) / chunks, 1, kRowChunkMost);
      chunks_ = (shape.rows() + length_ - 1) / length_;
      group_ = shape.channels;
    } else {
      length_ = std::min<int64_t>(shape.spatial, kPlaneChunk);
      spans_ = (shape.spatial + length_ - 1) / std::max<int64_t>(length_, 1);
      images_ = std::max<int64_t>(kPlaneChunk / std::max<int64_t>(shape.spatial, 1), 1);
      chunks_ = (shape.images + images_ - 1) / images_ * spans_;
      // Where there are channels enough, a thread keeps to its own: no waiting between the passes, and its
      // own L2.
      owned_ = shape.channels >= 2 * threads && cached >= threads;
      group_ = owned_ ? std::min(kOwnedBytes / channel_bytes, shape.channels / (2 * threads)) : cached;
    }
    group_ = std::clamp<int64_t>(group_, 1, std::max<int64_t>(shape.channels, 1));
  }

  const Shape& shape() const { return shape_; }
  bool owned() const { return owned_; }
  int64_t chunks() const { return chunks_; }
  int64_t groups() const { return (shape_.channels + group_ - 1) / group_; }
  Channels group(int64_t index) const {
    return {index * group_, std::min((index + 1) * group_, shape_.channels)};
  }

  // NHWC: a task is a chunk of all the group's channels; NCHW: of one channel.
  int64_t tasks(Channels group) const {
    return shape_.layout == Layout::kNhwc ? chunks_ : chunks_ * (group.end - group.begin);
  }
  int64_t chunk(int64_t task) const { return shape_.layout == Layout::kNhwc ? task : task % chunks_; }
  Block block(Channels group, int64_t task) const {
    const auto [images, channels, spatial, layout] = shape_;
    const int64_t index = chunk(task);
    if (layout == Layout::kNhwc) {
      const int64_t row = index * length_;
      return {channels, spatial, row, std::min(row + length_, shape_.rows()), group.begin, group.end, 0, 0};
    }
    const int64_t n = index / spans_ * images_, s = index % spans_ * length_,
                  c = group.begin + task / chunks_;
    return {channels, spatial, n, std::min(n + images_, images), c, c + 1, s, std::min(s + length_, spatial)};
  }
  // The values of one channel in a chunk.
  double count(int64_t chunk) const {
    const Block b = block({0, 1}, chunk);
    return static_cast<double>(shape_.layout == Layout::kNhwc ? b.n1 - b.n0 : (b.n1 - b.n0) * (b.s1 - b.s0));
  }

 private:
  static constexpr int64_t kCacheBytes = 16 << 20;                 // about half of a last-level cache
  static constexpr int64_t kOwnedBytes = 256 << 10;                // a quarter of a thread's own cache
  static constexpr int64_t kRowChunk = 128, kRowChunkMost = 2048;  // rows
  // Values. A multiple of 8: chunks begin at whole bytes of the mask.
  static constexpr int64_t kPlaneChunk = 16384;

  Shape shape_;
  int64_t length_ = 0;  // NHWC: rows in a chunk; NCHW: positions
  int64_t spans_ = 1;   // NCHW: chunks that share an image
  int64_t images_ = 1;  // NCHW: images that share a chunk
  int64_t chunks_ = 0;
  int64_t group_ = 1;  // channels
  bool owned_ = false;
};

// first(block, chunk) for all of a group, then between(channels), then second(block), backwards: what the
// first pass read last is in cache. parallel(n, body) runs body(begin, end) over parts of [0, n); nothing
// waits inside.
template <class Parallel, class First, class Between, class Second>
void two_passes(const Partition& partition, const Parallel& parallel, const First& first,
                const Between& between, const Second& second) {
  const auto forwards = [&](Channels group, int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) first(partition.block(group, task), partition.chunk(task));
  };
  const auto backwards = [&](Channels group, int64_t begin, int64_t end) {
    for (int64_t task = end; task-- > begin;) second(partition.block(group, task));
  };
  if (partition.owned()) {
    parallel(partition.groups(), [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) {
        const Channels group = partition.group(index);
        forwards(group, 0, partition.tasks(group));
        between(group);
        backwards(group, 0, partition.tasks(group));
      }
    });
    return;
  }
  for (int64_t index = 0; index < partition.groups(); ++index) {
    const Channels group = partition.group(index);
    const int64_t tasks = partition.tasks(group);
    parallel(tasks, [&](int64_t begin, int64_t end) { forwards(group, begin, end); });
    between(group);
    parallel(tasks, [&](int64_t begin, int64_t end) { backwards(group, begin, end); });
  }
}

// body(block) over the whole tensor, in the order of memory.
template <class Parallel, class Body>
void one_pass(const Shape& shape, const Parallel& parallel, const Body& body) {
  const auto [images, channels, spatial, layout] = shape;
  if (layout == Layout::kNhwc) {
    parallel(shape.rows(), [&, channels = channels, spatial = spatial](int64_t begin, int64_t end) {
      body(Block{channels, spatial, begin, end, 0, channels, 0, 0});
    });
    return;
  }
  parallel(shape.rows(), [&, channels = channels, spatial = spatial](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end;) {  // image by image
      const int64_t n = plane / channels, c = plane % channels;
      const int64_t c1 = std::min(channels, c + end - plane);
      body(Block{channels, spatial, n, n + 1, c, c1, 0, spatial});
      plane += c1 - c;
    }
  });
}

// What stays of partial[chunks][2][C] for the channels of a group is in partial[0].
inline void merge_chunks(const Kernels& k, const Partition& partition, double* partial, Channels group) {
  const int64_t channels = partition.shape().channels;
  double count = partition.count(0);
  for (int64_t i = 1; i < partition.chunks(); ++i) {
    const double more = partition.count(i);
    k.merge(partial, partial + i * 2 * channels, count, more, channels, group.begin, group.end);
    count += more;
  }
}
// The same for partial[chunks][rows][C].
inline void add_chunks(const Kernels& k, const Partition& partition, double* partial, int64_t rows,
                       Channels group) {
  const int64_t channels = partition.shape().channels;
  for (int64_t i = 1; i < partition.chunks(); ++i) {
    k.add(partial, partial + i * rows * channels, rows, channels, group.begin, group.end);
  }
}

}  // namespace fused_res::cpu
