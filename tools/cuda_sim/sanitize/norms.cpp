// Sanitizer cases of the batch norm kernels: statistics, apply, backward, single pass, running statistics.
#include "cases.h"
#include "cuda/single_pass.h"

extern "C" int fused_res_cuda_single_pass(int mode);

namespace fused_res::cuda::sanitize {
namespace {

// Limit of the number of work units, so low that some parts have several tiles.
constexpr int64_t kUnits = 12;

struct NormCase {
  Arrays arrays;
  Dtype dtype;
  ActivationShape shape;
  Dtype stats_dtype;
  WorkPartition work;
  void *x, *residual, *dy, *y, *stats, *residual_stats;
  uint8_t* mask;

  NormCase(Dtype dtype, ActivationShape shape, int vector_size)
      : dtype(dtype),
        shape(shape),
        stats_dtype(dtype == Dtype::kFloat64 ? dtype : Dtype::kFloat32),
        work(partition_work(shape, vector_size, kUnits)),
        x(like_x()),
        residual(like_x()),
        dy(like_x()),
        y(arrays.empty(dtype, shape.numel())),
        stats(arrays.random(stats_dtype, 5 * shape.channels)),
        residual_stats(arrays.random(stats_dtype, 5 * shape.channels)),
        mask(arrays.random_bits(shape.rows() * shape.mask_cols())) {}

  void* like_x() { return arrays.random(dtype, shape.numel()); }
  void* empty_channel_rows(int64_t rows) { return arrays.empty(stats_dtype, rows * shape.channels); }
  Parameter parameter(Dtype of) { return {arrays.random(of, shape.channels), of}; }
  ParameterGrad grad(Dtype of) { return {arrays.empty(of, shape.channels), of}; }
  bool is_double() const { return stats_dtype == Dtype::kFloat64; }

  MergeArgs merge_args() {
    return {.partials = nullptr,
            .rows = 4,
            .parts = work.parts,
            .parts_per_group = work.parts,
            .channels = shape.channels,
            .stats = stats,
            .merged = nullptr,
            .weight = parameter(Dtype::kBFloat16),
            .bias = parameter(Dtype::kFloat32),
            .eps = 1e-5};
  }
  ApplyArgs apply_args(bool normalized_residual) {
    return {.partition = work,
            .x = x,
            .y = y,
            .residual = residual,
            .residual_stats = normalized_residual ? residual_stats : nullptr,
            .stats = stats,
            .fold = {},
            .mask = mask,
            .relu = true};
  }
  BackwardArgs backward_args(bool pair) {
    const int rows = pair ? 3 : 2;
    return {.partition = work,
            .dy = dy,
            .x = x,
            .stats = stats,
            .residual = pair ? residual : nullptr,
            .residual_stats = pair ? residual_stats : nullptr,
            .mask = pair ? mask : nullptr,
            .relu = true,
            .partials = empty_channel_rows(rows * work.parts),
            .sums = empty_channel_rows(rows),
            .dx = y,
            .dresidual = arrays.empty(dtype, shape.numel()),
            .count = static_cast<double>(shape.images * shape.pixels),
            .training = true,
            .residual_training = pair,
            .sums_rows = rows};
  }
  ParameterGrads parameter_grads(bool pair) {
    return {.weight = grad(Dtype::kBFloat16),
            .bias = grad(Dtype::kFloat32),
            .residual_weight = pair ? grad(Dtype::kFloat16) : ParameterGrad{},
            .residual_bias = pair ? grad(Dtype::kFloat64) : ParameterGrad{}};
  }
};

void forward(NormCase& norm) {
  MergeArgs merge = norm.merge_args();
  void* partials = norm.empty_channel_rows(4 * norm.work.parts);
  launch_partials(norm.dtype, {.partition = norm.work, .x = norm.x, .partials = partials}, nullptr);
  merge.partials = partials;
  launch_merge(norm.is_double(), norm.is_double(), merge, nullptr);
  // Merge groups of three parts, and then the groups to statistics.
  merge.parts_per_group = 3;
  merge.merged = static_cast<double*>(
      norm.arrays.empty(Dtype::kFloat64, ceil_div(merge.parts, 3) * 3 * norm.shape.channels));
  merge.stats = nullptr;
  launch_merge(norm.is_double(), true, merge, nullptr);
  merge.partials = merge.merged;
  merge.rows = 3;
  merge.parts = merge.parts_per_group = ceil_div(merge.parts, 3);
  merge.merged = nullptr;
  merge.stats = norm.stats;
  launch_merge(true, norm.is_double(), merge, nullptr);

  for (const bool normalized : {false, true}) launch_apply(norm.dtype, norm.apply_args(normalized), nullptr);
  ApplyArgs folded = norm.apply_args(false);
  folded.residual = nullptr;
  folded.mask = nullptr;
  folded.fold = {.active = true,
                 .mean = norm.parameter(Dtype::kFloat32),
                 .var = norm.parameter(Dtype::kFloat64),
                 .weight = {},
                 .bias = norm.parameter(Dtype::kFloat16),
                 .eps = 1e-5,
                 .stats = norm.stats,
                 .channels = norm.shape.channels};
  launch_apply(norm.dtype, folded, nullptr);
  launch_fold(norm.is_double(), folded.fold, nullptr);
}

void backward(NormCase& norm) {
  for (const bool pair : {false, true}) {
    const BackwardArgs args = norm.backward_args(pair);
    launch_sums(norm.dtype, args, nullptr);
    const SumPartialsArgs add = {.partials = args.partials,
                                 .sums = args.sums,
                                 .parts = args.partition.parts,
                                 .parts_per_group = args.partition.parts,
                                 .width = args.sums_rows * norm.shape.channels,
                                 .grads = norm.parameter_grads(pair),
                                 .channels = norm.shape.channels};
    launch_sum_partials(norm.is_double(), add, nullptr);
    launch_dx(norm.dtype, args, nullptr);
  }
  const ActivationShape matrix = {norm.shape.rows(), norm.shape.cols(), 1, true};
  launch_add_masked(norm.dtype,
                    {.partition = partition_work(matrix, norm.work.vector_size, kUnits),
                     .into = norm.x,
                     .grad = norm.dy,
                     .mask = norm.mask},
                    nullptr);
}

// kFewUnits is small, because all blocks are resident and ThreadSanitizer's run time grows with the square of
// their threads. It is larger than the number of blocks that are resident on the one multiprocessor of
// main(), so that a block processes units of different channels.
void single_pass(NormCase& norm) {
  constexpr int64_t kFewUnits = 9;
  norm.work = partition_work(norm.shape, norm.work.vector_size, kFewUnits);
  fused_res_cuda_single_pass(1);  // wherever it is possible
  auto* counter = static_cast<unsigned*>(norm.arrays.bytes(sizeof(unsigned)));
  if (const auto config = choose_single_pass_forward(norm.dtype, norm.work)) {
    launch_single_pass_forward(norm.dtype,
                               {.apply = norm.apply_args(true),
                                .merge = norm.merge_args(),
                                .partials = norm.empty_channel_rows(4 * norm.work.parts),
                                .config = *config,
                                .counter = counter},
                               nullptr);
  }
  for (const bool pair : {false, true}) {
    if (const auto config = choose_single_pass_backward(norm.dtype, norm.work)) {
      launch_single_pass_backward(norm.dtype,
                                  {.backward = norm.backward_args(pair),
                                   .grads = norm.parameter_grads(pair),
                                   .config = *config,
                                   .counter = counter},
                                  nullptr);
    }
  }
}

void update_running(Dtype dtype) {
  Arrays arrays;
  UpdateRunningArgs args = {};
  for (int i = 0; i < 2; ++i) {
    const int64_t channels = 5 + 300 * i;
    args.norms[i] = {.mean = arrays.random(dtype, channels),
                     .var = arrays.random(Dtype::kFloat32, channels),
                     .mean_dtype = dtype,
                     .var_dtype = Dtype::kFloat32,
                     .stats = arrays.random(Dtype::kFloat32, 5 * channels),
                     .is_double = false,
                     .channels = channels,
                     .momentum = 0.1};
  }
  launch_update_running(args, 2, 305, nullptr);
}

}  // namespace

void add_norms(Cases& cases) {
  constexpr ActivationShape kShapes[] = {{3, 5, 7, true},  {2, 24, 9, true},  {5, 72, 33, true},
                                         {3, 5, 7, false}, {2, 3, 24, false}, {3, 2, 1030, false}};
  for (const Dtype dtype : kDtypes) {
    for (const ActivationShape& shape : kShapes) {
      const int widest = max_vector_size(dtype), vector_size = shape.cols() % widest == 0 ? widest : 1;
      const std::string name = std::string(name_of(dtype)) + (shape.channels_last ? " nhwc " : " nchw ") +
                               std::to_string(shape.channels);
      const auto add = [&](const char* what, void (*run)(NormCase&)) {
        cases.push_back({what + name, [=] {
                           NormCase norm(dtype, shape, vector_size);
                           run(norm);
                         }});
      };
      add("norm forward ", forward);
      add("norm backward ", backward);
      add("norm single pass ", single_pass);
    }
    cases.push_back({std::string("update running ") + name_of(dtype), [=] { update_running(dtype); }});
  }
}

}  // namespace fused_res::cuda::sanitize
