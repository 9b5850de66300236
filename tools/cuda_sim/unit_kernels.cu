// Unit-test kernels of the simulator, one CUDA primitive each (tests/tools/test_cuda_simulator.py).
#include "cuda/launch.h"
#include "cuda/ptx.cuh"

namespace fused_res::cuda::unit_kernels {

struct Args {
  const void* in;
  const void* other;
  void* out;
  int number;  // a parameter: see each kernel
  unsigned* counter;
};

FUSED_RES_KERNEL(1024, 1) empty_kernel(const __grid_constant__ Args) {}

FUSED_RES_KERNEL(1024, 1) thread_indices(const __grid_constant__ Args args) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  static_cast<unsigned*>(args.out)[block * blockDim.x + threadIdx.x] = block << 10 | threadIdx.x;
}

// Each of 32 lanes shuffles its lane index. `number`: width of the first four shuffles.
FUSED_RES_KERNEL(32, 1) shuffles(const __grid_constant__ Args args) {
  const int lane = threadIdx.x, width = args.number;
  auto* out = static_cast<double*>(args.out) + lane * 5;
  out[0] = __shfl_sync(~0u, lane + 0.5, 3, width);
  out[1] = __shfl_xor_sync(~0u, lane, 5, width);
  out[2] = __shfl_down_sync(~0u, static_cast<float>(lane), 2, width);
  out[3] = __shfl_up_sync(~0u, static_cast<int64_t>(lane) << 40, 2, width) >> 40;
  // Each half warp shuffles by itself, at a call site of its own.
  const unsigned half = lane < 16 ? 0xFFFFu : 0xFFFF0000u;
  out[4] = lane < 16 ? __shfl_xor_sync(half, lane, 1) : __shfl_xor_sync(half, lane, 2);
}

// `number`: the thread that votes differently from the others, or the number of threads that vote true.
FUSED_RES_KERNEL(96, 1) votes(const __grid_constant__ Args args) {
  const int odd = threadIdx.x % 2, number = args.number, thread = threadIdx.x;
  auto* out = static_cast<unsigned*>(args.out) + thread * 6;
  out[0] = __ballot_sync(~0u, odd);
  out[1] = __any_sync(~0u, thread == number);
  out[2] = __all_sync(~0u, thread != number);
  out[3] = __syncthreads_or(thread == number);
  out[4] = __syncthreads_and(thread < number);
  out[5] = __syncthreads_count(thread < number);
}

// One m16n8k16 product: cp.async to shared memory, ldmatrix, mma. The matrices are row-major, b is
// column-major if `number` is nonzero.
template <class T>
FUSED_RES_KERNEL(32, 1)
product(const __grid_constant__ Args args) {
  auto* a = reinterpret_cast<uint4*>(shared_memory());  // 16 x 16
  uint4* b = a + 32;                                    // 16 x 8, or 8 x 16
  const int lane = threadIdx.x;
  ptx::cp_async(shared_address(a + lane), static_cast<const uint4*>(args.in) + lane, true);
  if (lane < 16) ptx::cp_async(shared_address(b + lane), static_cast<const uint4*>(args.other) + lane, true);
  ptx::cp_async_commit_group();
  ptx::cp_async_wait_group<0>();
  __syncwarp();
  uint32_t a_fragment[4], b_fragments[4];
  ptx::ldmatrix_x4(a_fragment, shared_address(a + lane % 16 * 2 + lane / 16));
  if (args.number) {
    ptx::ldmatrix_x4(b_fragments, shared_address(b + lane % 8 * 2 + lane / 8 % 2));
  } else {
    ptx::ldmatrix_x4_trans(b_fragments, shared_address(b + lane % 16));
  }
  float sums[4] = {};
  ptx::mma_sync<T>(sums, a_fragment, {b_fragments[0], b_fragments[1]});
  auto* out = static_cast<float*>(args.out) + lane / 4 * 8 + lane % 4 * 2;
  for (int i = 0; i < 4; ++i) out[i / 2 * 64 + i % 2] = sums[i];
}

// One m16n8k8 product of row-major a (16 x 8) and b (8 x 8). If `number` is nonzero, the operands are
// rounded to TF32 first.
FUSED_RES_KERNEL(32, 1) product_tf32(const __grid_constant__ Args args) {
  const int lane = threadIdx.x, group = lane / 4, thread_in_group = lane % 4;
  const auto operand = [&](const void* matrix, int row, int column) {
    const float value = static_cast<const float*>(matrix)[row * 8 + column];
    return args.number ? ptx::to_tf32(value) : __float_as_uint(value);
  };
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) a[i] = operand(args.in, group + i % 2 * 8, thread_in_group + i / 2 * 4);
  for (int i = 0; i < 2; ++i) b[i] = operand(args.other, thread_in_group + i * 4, group);
  float sums[4] = {};
  ptx::mma_sync<uint32_t>(sums, a, b);
  auto* out = static_cast<float*>(args.out) + group * 8 + thread_in_group * 2;
  for (int i = 0; i < 4; ++i) out[i / 2 * 64 + i % 2] = sums[i];
}

// Stores the contents of shared memory before the copies, while they are in flight, after a wait for all but
// the second group, and after all of them; the source changes while they are in flight.
FUSED_RES_KERNEL(1, 1) async_copies(const __grid_constant__ Args args) {
  auto* shared = reinterpret_cast<float4*>(shared_memory());
  auto* source = const_cast<float4*>(static_cast<const float4*>(args.in));
  auto* out = static_cast<float4*>(args.out);
  for (int i = 0; i < 3; ++i) *out++ = shared[i];
  for (int i = 0; i < 3; ++i) {
    ptx::cp_async(shared_address(shared + i), source + i, i != 1);
    if (i != 0) ptx::cp_async_commit_group();
  }
  for (int i = 0; i < 3; ++i) *out++ = shared[i];
  source[0].x = -1;
  ptx::cp_async_wait_group<1>();
  for (int i = 0; i < 3; ++i) *out++ = shared[i];
  ptx::cp_async_wait_group<0>();
  for (int i = 0; i < 3; ++i) *out++ = shared[i];
}

// Grid-wide sums in three rounds: each block adds up the values that all blocks stored in the previous round.
FUSED_RES_KERNEL(64, 1) grid_sums(const __grid_constant__ Args args) {
  auto* values = static_cast<unsigned*>(args.out);
  unsigned value = blockIdx.x + 1;
  for (unsigned round = 0; round < 3; ++round) {
    unsigned* row = values + round * gridDim.x;
    if (threadIdx.x == 0) row[blockIdx.x] = value;
    ptx::grid_barrier(args.counter, (round + 1) * gridDim.x);
    value = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) value += row[i];
  }
}

// Violates the CUDA rule that `number` selects.
FUSED_RES_KERNEL(64, 1) rule_violations(const __grid_constant__ Args args) {
  const int thread = threadIdx.x;
  unsigned char* shared = shared_memory();
  uint32_t registers[4];
  switch (args.number) {
    case 0:  // divergent __syncthreads
      if (thread < 32)
        __syncthreads();
      else
        __syncthreads();
      break;
    case 1:  // a thread returns without arriving at __syncthreads
      if (thread != 5) __syncthreads();
      break;
    case 2:  // a lane of the mask returns without arriving at the shuffle
      if (thread != 40) __shfl_sync(~0u, thread, 0);
      break;
    case 3:  // the calling lane is not in the mask
      __ballot_sync(0xFFFF, 1);
      break;
    case 4:  // the source lane is not in the mask
      __shfl_sync(0xFFFFFFFF >> (thread % 32 < 16 ? 16 : 0), thread, 20);
      break;
    case 5:  // cp.async to a misaligned address
      ptx::cp_async(shared_address(shared + 8), args.in, true);
      break;
    case 6:  // cp.async from a misaligned address
      ptx::cp_async(shared_address(shared), static_cast<const char*>(args.in) + 4, true);
      break;
    case 7:  // ldmatrix at a misaligned address
      ptx::ldmatrix_x4(registers, shared_address(shared + 2));
      break;
    case 8:  // ldmatrix past the end of the shared memory (256 bytes)
      ptx::ldmatrix_x4(registers, shared_address(shared + 256));
      break;
    case 9:  // cp.async to before the shared memory
      ptx::cp_async(shared_address(shared) - 16, args.in, true);
      break;
    case 10:  // grid barrier in a launch that is not cooperative
      ptx::grid_barrier(args.counter, gridDim.x);
      break;
    case 11:  // store past the end of the shared memory
      shared[256 + thread] = 0;
      break;
    case 12:  // store to a null pointer
      static_cast<volatile int*>(nullptr)[thread] = 0;
      break;
    case 13:  // the lanes of a warp wait at different collectives
      if (thread % 32 == 31)
        ptx::ldmatrix_x4(registers, shared_address(shared));
      else
        __syncwarp();
      break;
    case 14:  // grid barrier with more arrivals than blocks
      ptx::grid_barrier(args.counter, gridDim.x + 1);
      break;
  }
}

template void product<__half>(Args);
template void product<__nv_bfloat16>(Args);

}  // namespace fused_res::cuda::unit_kernels

namespace {

using Args = fused_res::cuda::unit_kernels::Args;

void (*kernel_named(const std::string& name))(Args) {
  namespace unit_kernels = fused_res::cuda::unit_kernels;
  const std::pair<const char*, void (*)(Args)> kernels[] = {
      {"empty_kernel", unit_kernels::empty_kernel},   {"thread_indices", unit_kernels::thread_indices},
      {"shuffles", unit_kernels::shuffles},           {"votes", unit_kernels::votes},
      {"product_f16", unit_kernels::product<__half>}, {"product_bf16", unit_kernels::product<__nv_bfloat16>},
      {"product_tf32", unit_kernels::product_tf32},   {"async_copies", unit_kernels::async_copies},
      {"grid_sums", unit_kernels::grid_sums},         {"rule_violations", unit_kernels::rule_violations}};
  for (const auto& [known, kernel] : kernels) {
    if (name == known) return kernel;
  }
  throw std::invalid_argument("no kernel " + name);
}

}  // namespace

// Returns the error message, or an empty string.
extern "C" const char* fused_res_sim_run_unit_kernel(const char* name, const unsigned* grid, unsigned threads,
                                                     size_t shared, const Args* args, bool cooperative) {
  static std::string error;
  error.clear();
  try {
    const auto kernel = kernel_named(name);
    const dim3 blocks(grid[0], grid[1], grid[2]);
    if (cooperative)
      fused_res::cuda::launch_cooperative(kernel, blocks, threads, shared, nullptr, *args);
    else
      fused_res::cuda::launch(kernel, blocks, threads, shared, nullptr, *args);
  } catch (const std::exception& caught) {
    error = caught.what();
  }
  return error.c_str();
}
