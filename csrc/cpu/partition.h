// Work partition of a batch norm over one tensor, and the two-pass scheme (reduction, then elementwise pass)
// that runs it. Free of torch: the parallel loop is a functor, so that tests can run the same code on
// std::thread under ThreadSanitizer.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "cpu/caches.h"
#include "cpu/isa/kernels.h"

namespace fused_res::cpu {

// The shape of an activation (N, C, ...), with all pixels of an image in one dimension.
struct Shape {
  int64_t images, channels, spatial;
  Layout layout;

  int64_t numel() const { return images * channels * spatial; }
  int64_t values_per_channel() const { return images * spatial; }
  // The activation as a matrix. A mask has the same rows, padded to whole bytes.
  int64_t rows() const { return layout == Layout::kNhwc ? images * spatial : images * channels; }
  int64_t cols() const { return layout == Layout::kNhwc ? channels : spatial; }
};

struct ChannelRange {
  int64_t begin, end;
};

// Statistics need all values of a channel before its first output can be written, so x is read twice. The
// second pass runs in reverse order, because the data that the first pass read last (about 12 MB on the
// development machine) is still in cache.
//
// A channel's values are partitioned into chunks. Each chunk has its own partial statistics, which are merged
// in order. The chunks depend on the shape only, not on the number of threads nor on the caches, so results
// are bitwise reproducible, on other machines with the same instruction set as well.
//
// NHWC processes all channels at once. Slices of channels that are small enough to stay in cache between the
// passes would read x from memory only once. But such a slice is 64 to 512 bytes of each row, a pattern that
// the L2 prefetcher does not follow: two cores read 8 to 10 GB/s that way, with and without huge pages or
// software prefetch, and 25 to 39 along the rows. NCHW planes are contiguous, so the channels are processed
// in groups there.
class Partition {
 public:
  // `bytes`: size of one element, summed over all operands that both passes read.
  Partition(const Shape& shape, int64_t bytes, int64_t threads) : shape_(shape) {
    const int64_t channel_bytes = std::max<int64_t>(shape.values_per_channel() * bytes, 1);
    // Half of the L3, and of a core's L2 a quarter, for a group of channels that both passes read.
    const int64_t cached_channels = caches().l3 / 2 / channel_bytes;
    if (shape.layout == Layout::kNhwc) {
      // A power of two, so that threads get equal shares. Chunks are long enough that there are few partial
      // statistics.
      const auto target = std::clamp<int64_t>(shape.rows() / kRowChunk, 1, 64);
      const auto chunks = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(target)));
      chunk_length_ = std::clamp<int64_t>((shape.rows() + chunks - 1) / chunks, 1, kMaxRowChunk);
      chunks_ = (shape.rows() + chunk_length_ - 1) / chunk_length_;
      group_channels_ = shape.channels;
    } else {
      chunk_length_ = std::min<int64_t>(shape.spatial, kPlaneChunk);
      chunks_per_image_ = (shape.spatial + chunk_length_ - 1) / std::max<int64_t>(chunk_length_, 1);
      images_per_chunk_ = std::max<int64_t>(kPlaneChunk / std::max<int64_t>(shape.spatial, 1), 1);
      chunks_ = (shape.images + images_per_chunk_ - 1) / images_per_chunk_ * chunks_per_image_;
      // With enough channels, each thread runs both passes of its own groups: there is no barrier between the
      // passes, and a group stays in the thread's L2.
      group_per_thread_ = shape.channels >= 2 * threads && cached_channels >= threads;
      group_channels_ = group_per_thread_
                            ? std::min(caches().l2 / 4 / channel_bytes, shape.channels / (2 * threads))
                            : cached_channels;
    }
    group_channels_ = std::clamp<int64_t>(group_channels_, 1, std::max<int64_t>(shape.channels, 1));
  }

  const Shape& shape() const { return shape_; }
  bool group_per_thread() const { return group_per_thread_; }
  int64_t chunks() const { return chunks_; }
  int64_t groups() const { return (shape_.channels + group_channels_ - 1) / group_channels_; }
  ChannelRange group(int64_t index) const {
    return {index * group_channels_, std::min((index + 1) * group_channels_, shape_.channels)};
  }

  // A task is one chunk, of all channels of the group in NHWC and of one channel in NCHW.
  int64_t tasks(ChannelRange group) const {
    return shape_.layout == Layout::kNhwc ? chunks_ : chunks_ * (group.end - group.begin);
  }
  int64_t chunk(int64_t task) const { return shape_.layout == Layout::kNhwc ? task : task % chunks_; }
  Block block(ChannelRange group, int64_t task) const {
    const auto [images, channels, spatial, layout] = shape_;
    const int64_t index = chunk(task);
    if (layout == Layout::kNhwc) {
      const int64_t row = index * chunk_length_;
      return {channels,    spatial,   row, std::min(row + chunk_length_, shape_.rows()),
              group.begin, group.end, 0,   0};
    }
    const int64_t n = index / chunks_per_image_ * images_per_chunk_,
                  s = index % chunks_per_image_ * chunk_length_, c = group.begin + task / chunks_;
    return {channels, spatial, n, std::min(n + images_per_chunk_, images),
            c,        c + 1,   s, std::min(s + chunk_length_, spatial)};
  }
  // The number of values of one channel in a chunk.
  double count(int64_t chunk) const {
    const Block b = block({0, 1}, chunk);
    return static_cast<double>(shape_.layout == Layout::kNhwc ? b.n1 - b.n0 : (b.n1 - b.n0) * (b.s1 - b.s0));
  }

 private:
  // The chunks are the order of summation, so they do not depend on the caches.
  static constexpr int64_t kRowChunk = 128, kMaxRowChunk = 2048;  // rows
  // Values; a multiple of 8, so that chunks begin at whole bytes of the mask.
  static constexpr int64_t kPlaneChunk = 16384;

  Shape shape_;
  int64_t chunk_length_ = 0;      // NHWC: rows in a chunk; NCHW: positions
  int64_t chunks_per_image_ = 1;  // NCHW, large images
  int64_t images_per_chunk_ = 1;  // NCHW, small images
  int64_t chunks_ = 0;
  int64_t group_channels_ = 1;  // channels
  bool group_per_thread_ = false;
};

// For each group of channels: calls first(block, chunk) for all blocks, then between(channels), then
// second(block) for all blocks in reverse order, because the data that the first pass read last is in cache.
// parallel(n, body) runs body(begin, end) over parts of [0, n) and returns when all are done.
template <class Parallel, class First, class Between, class Second>
void two_passes(const Partition& partition, const Parallel& parallel, const First& first,
                const Between& between, const Second& second) {
  const auto run_first_pass = [&](ChannelRange group, int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) first(partition.block(group, task), partition.chunk(task));
  };
  const auto run_second_pass_reversed = [&](ChannelRange group, int64_t begin, int64_t end) {
    for (int64_t task = end; task-- > begin;) second(partition.block(group, task));
  };
  if (partition.group_per_thread()) {
    parallel(partition.groups(), [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) {
        const ChannelRange group = partition.group(index);
        run_first_pass(group, 0, partition.tasks(group));
        between(group);
        run_second_pass_reversed(group, 0, partition.tasks(group));
      }
    });
    return;
  }
  for (int64_t index = 0; index < partition.groups(); ++index) {
    const ChannelRange group = partition.group(index);
    const int64_t tasks = partition.tasks(group);
    parallel(tasks, [&](int64_t begin, int64_t end) { run_first_pass(group, begin, end); });
    between(group);
    parallel(tasks, [&](int64_t begin, int64_t end) { run_second_pass_reversed(group, begin, end); });
  }
}

// Calls body(block) over the whole tensor, in memory order.
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

// Merges partial[chunks][2][C], the (mean, M2) of all chunks, into partial[0] for the channels of a group.
inline void merge_chunks(const Kernels& k, const Partition& partition, double* partial, ChannelRange group) {
  const int64_t channels = partition.shape().channels;
  double count = partition.count(0);
  for (int64_t i = 1; i < partition.chunks(); ++i) {
    const double chunk_count = partition.count(i);
    k.merge_partials(partial, partial + i * 2 * channels, count, chunk_count, channels, group.begin,
                     group.end);
    count += chunk_count;
  }
}
// Adds partial[chunks][rows][C] of all chunks into partial[0] for the channels of a group.
inline void add_chunks(const Kernels& k, const Partition& partition, double* partial, int64_t rows,
                       ChannelRange group) {
  const int64_t channels = partition.shape().channels;
  for (int64_t i = 1; i < partition.chunks(); ++i) {
    k.add_partials(partial, partial + i * rows * channels, rows, channels, group.begin, group.end);
  }
}

}  // namespace fused_res::cpu
