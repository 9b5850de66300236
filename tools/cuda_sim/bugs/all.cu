// One translation unit for all kernels: most of their compile time is CUDA's headers.
#include "kernels/missing_second_syncthreads.cu"
#include "kernels/missing_syncthreads.cu"
#include "kernels/missing_syncwarp.cu"
#include "kernels/out_of_bounds_global.cu"
#include "kernels/out_of_bounds_shared.cu"
#include "kernels/race_between_blocks.cu"
#include "kernels/swapped_fragments.cu"
#include "kernels/wrong_wait_group.cu"
