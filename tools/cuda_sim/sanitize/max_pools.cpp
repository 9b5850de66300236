// Sanitizer cases of max pooling.
#include "cases.h"
#include "cuda/max_pool.h"
#include "cuda/work_partition.h"

namespace fused_res::cuda::sanitize {
namespace {

void max_pool(Dtype dtype, bool channels_last, int64_t channels, bool after_norm) {
  Arrays arrays;
  const int widest = max_vector_size(dtype);
  MaxPoolArgs args = {};
  args.channels_last = channels_last;
  args.vector_size = channels_last && channels % widest == 0 ? widest : 1;
  args.images = 2, args.channels = channels, args.height = 7, args.width = 10;
  args.kernel_h = 3, args.kernel_w = 2, args.stride_h = 2, args.stride_w = 1, args.pad_h = args.pad_w = 1;
  args.out_height = 4, args.out_width = 11;
  const int64_t inputs = args.images * channels * args.height * args.width,
                outputs = args.images * channels * args.out_height * args.out_width;
  void *x = arrays.random(dtype, inputs), *y = arrays.empty(dtype, outputs);
  const Dtype stats = dtype == Dtype::kFloat64 ? dtype : Dtype::kFloat32;
  args.stats = after_norm ? arrays.random(stats, 5 * channels) : nullptr;
  args.relu = after_norm;
  args.x = x, args.y = y;
  args.indices = static_cast<uint8_t*>(arrays.bytes(outputs));
  launch_max_pool_forward(dtype, args, nullptr);
  args.x = y, args.y = x;
  launch_max_pool_backward(dtype, args, nullptr);
}

}  // namespace

void add_max_pools(Cases& cases) {
  for (const Dtype dtype : kDtypes) {
    for (const bool channels_last : {false, true}) {
      for (const int64_t channels : {5, 24}) {
        const std::string name = std::string("max pool ") + name_of(dtype) +
                                 (channels_last ? " nhwc " : " nchw ") + std::to_string(channels);
        cases.push_back({name, [=] { max_pool(dtype, channels_last, channels, channels == 24); }});
      }
    }
  }
}

}  // namespace fused_res::cuda::sanitize
